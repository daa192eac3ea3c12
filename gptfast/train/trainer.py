"""The loop around every stage: steps, the learning rate, the log, evaluations, checkpoints, and going on after a stop.

A stage says what one step does; the trainer makes it a run that can be cut at any point. Everything that a step does is
a function of the modules, the optimiser's moments, the stage's state and the step's number: seeds are derived, never
drawn. So a run that was killed and goes on computes, bit for bit, what it would have computed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast import hardware
from gptfast.formats.files import FormatError, read_json, replacing
from gptfast.model import GPT
from gptfast.train import checkpoint
from gptfast.train.config import StageConfig, same_but
from gptfast.train.logs import Bar, Logs
from gptfast.train.lora import blank_of
from gptfast.train.optim import AdamW
from gptfast.train.packing import IGNORED, Packed, seed_of, share
from gptfast.train.parallel import Runner, World

# What may differ when a run goes on: it changes what is written, not what is computed.
FREE = ("log_every", "save_every", "keep")


class Stage(ABC):
    """One stage of training: what it trains, on what, and how well that went.

    modules   what is trained and saved, by name
    config    its dials
    world     the processes that train; set by the trainer before the first step
    """

    name: str
    config: Any
    modules: dict[str, nn.Module]
    world: World = World()

    @abstractmethod
    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        """One step, counted from 0; what it found. `loss` and `tokens` (how many went through) are shown.

        Raises RuntimeError where the loss isn't finite.
        """

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures on held-out data after `step` steps."""
        return {}

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Texts that show where it stands after `step` steps. All processes call it; the first one's are kept."""
        return []

    def flops_per_token(self) -> float:
        """FLOPs of training on one token (of those that `tokens` counts); 0 = not known."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """What isn't weights and isn't a function of the step, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave."""
        return

    def export(self, folder: Path) -> None:
        """Writes what the stage made where others will look for it. All processes call it, and `whole` in it."""
        return

    def whole(self, model: GPT) -> GPT | None:
        """The model with all of its parameters; None in processes other than the first where FSDP2 has cut them."""
        return self.world.whole(model, lambda: blank_of(model))


class Supervised(Stage):
    """A stage with a loss over packed sequences."""

    _runner: Runner | None = None
    micro_tokens = 4096  # of one forward and backward pass; a step's batch is cut into such

    @abstractmethod
    def batch(self, step: int) -> Packed:
        """What a step learns from, the same in every process."""

    @abstractmethod
    def loss(self, packed: Packed, count: int) -> Tensor:
        """The loss of these sequences divided by `count`, what the whole batch learns."""

    def runner(self) -> Runner:
        """`loss`, as all processes compute it together."""
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.loss)
        return self._runner

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        whole = self.batch(step)
        count = max(1, whole.learnt)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        runner = self.runner()
        parts = micro_batches(whole, self.micro_tokens, self.world)
        for i, part in enumerate(parts):
            torch.manual_seed(seed_of("dropout", self.config.seed, step, self.world.rank, i))
            with runner.part(last=i == len(parts) - 1):
                loss = runner(part, count)
                (loss * self.world.size if self.world.size > 1 else loss).backward()
            total += float(loss.detach())
        total = self.world.sum({"loss": total})["loss"]
        check_finite(total, step)
        optimizer.step()
        found = {"loss": total, "tokens": float(len(whole.ids)), "learnt": float(count)}
        if optimizer.grad_norm is not None:
            found["grad_norm"] = float(optimizer.grad_norm)
        return found


def micro_batches(packed: Packed, most: int, world: World) -> list[Packed]:
    """This process's part of a batch in as many pieces as every other process has, of about `most` tokens."""
    pieces = max(1, -(-len(packed.ids) // (world.size * most)))
    parts = [share(packed, world.rank * pieces + i, world.size * pieces) for i in range(pieces)]
    nothing = Packed(packed.ids[:1], torch.full_like(packed.targets[:1], IGNORED), torch.tensor([0, 1]).int())
    return [part if len(part.ids) else nothing for part in parts]


def check_finite(loss: float, step: int) -> None:
    """Raises RuntimeError for a loss that isn't a number, before it has spoilt the weights."""
    if not abs(loss) < float("inf"):
        raise RuntimeError(f"the loss of step {step} is {loss}: nothing was updated; a lower lr or clip may help")


class Result(NamedTuple):
    """How a run ended.

    steps         that are done
    train         the last step's figures
    evaluation    the last evaluation's
    seconds       of this process, all in all
    step_seconds  of all steps, those before a checkpoint that was gone on from among them
    tokens        that went through in them
    flops         that these cost, 0 where the stage doesn't know
    """

    steps: int
    train: dict[str, float]
    evaluation: dict[str, float]
    seconds: float
    step_seconds: float
    tokens: float
    flops: float


class Trainer:
    """Runs a stage in a folder, from its newest checkpoint if there is one.

    run          the folder: config.json, train.csv, evaluations.csv, samples.jsonl, checkpoints/
    world        the processes that train together; one where not given
    tensorboard  TensorBoard's files too
    quiet        prints nothing

    Raises ValueError where the folder holds a run with other dials, FormatError where its checkpoints are damaged,
    OSError where one can't be saved.
    """

    def __init__(
        self,
        stage: Stage,
        run: Path,
        *,
        world: World | None = None,
        tensorboard: bool = False,
        quiet: bool = False,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.stage, self.run_folder, self.world = stage, Path(run), world or World()
        self.tensorboard, self.quiet, self.on_step = tensorboard, quiet, on_step
        stage.world = self.world
        self._stop = False
        self._saved = -1
        self._spent = {"seconds": 0.0, "tokens": 0.0}

    def run(self) -> Result:
        """All steps that are left. Ctrl-C (or SIGTERM) ends it after the step at hand, saves, and raises
        KeyboardInterrupt; a second one ends it at once."""
        config: StageConfig = self.stage.config
        self._check_folder(config)
        self.world.prepare(self.stage.modules)
        optimizer = make_optimizer(self.stage.modules, config)
        start = self._resume(optimizer)
        logs = Logs(self.run_folder, start or -1, self.tensorboard) if self.world.first else None
        bar = Bar(self.stage.name, start, config.steps, self.world.first and not self.quiet)
        began = time.perf_counter()
        found = dict(logs.train.last) if logs is not None else {}
        evaluation = dict(logs.evaluations.last) if logs is not None else {}
        try:
            with self._interruptible():
                if start == 0 and config.eval_every:
                    self._evaluate(0, logs, bar)
                for step in range(start, config.steps):
                    found = self._step(step, optimizer, logs, bar)
                    done = step + 1
                    if done == config.steps or (config.eval_every and done % config.eval_every == 0):
                        evaluation = self._evaluate(done, logs, bar)
                    stopped = self.world.agree(self._stop)
                    if done == config.steps or stopped or (config.save_every and done % config.save_every == 0):
                        self._save(done, optimizer)
                    if stopped and done < config.steps:
                        bar.close()
                        raise KeyboardInterrupt(f"stopped and saved after {done} of {config.steps} steps")
            self.stage.export(self.run_folder)
            self.world.wait()
        finally:
            bar.close()
            if logs is not None:
                logs.close()
        spent = self._spent
        flops = spent["tokens"] * self.stage.flops_per_token()
        took = time.perf_counter() - began
        return Result(config.steps, found, evaluation, took, spent["seconds"], spent["tokens"], flops)

    def _step(self, step: int, optimizer: AdamW, logs: Logs | None, bar: Bar) -> dict[str, float]:
        lr = self.stage.config.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        since = time.perf_counter()
        for module in self.stage.modules.values():
            module.train()
        found = self.stage.step(step, optimizer)
        seconds = time.perf_counter() - since
        self._spent["seconds"] += seconds
        self._spent["tokens"] += found.get("tokens", 0.0)
        found = {**found, "lr": lr, "seconds": seconds}
        speed = found.get("tokens", 0.0) / seconds
        if speed:
            found["tokens_per_s"] = speed
            if peak := _peak_flops():
                found["mfu"] = speed * self.stage.flops_per_token() / (peak * self.world.size)
        if logs is not None and ((step + 1) % self.stage.config.log_every == 0 or step + 1 == self.stage.config.steps):
            logs.row(logs.train, step + 1, found)
        if self.on_step is not None:
            self.on_step(step + 1, found)
        bar.update(step + 1, _status(found))
        return found

    def _evaluate(self, done: int, logs: Logs | None, bar: Bar) -> dict[str, float]:
        for module in self.stage.modules.values():
            module.eval()
        with torch.no_grad():
            figures = self.stage.evaluate(done)
            texts = self.stage.samples(done)
        if logs is not None:
            if figures:
                logs.row(logs.evaluations, done, figures)
            if texts:
                logs.samples(done, texts)
            if figures and not self.quiet:
                shown = " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
                bar.say(f"{self.stage.name} {done:,}: {shown}")
        return figures

    def _check_folder(self, config: StageConfig) -> None:
        """The folder is this run's, or empty."""
        file = self.run_folder / "config.json"
        if file.is_file():
            old = read_json(file)
            if old.get("stage") != self.stage.name:
                raise ValueError(f"{self.run_folder} holds a run of {old.get('stage')}, not of {self.stage.name}")
            if checkpoint.checkpoints(self.run_folder):
                other = same_but(old.get("dials", {}), config, FREE)
                if other:
                    was = ", ".join(f"{n} {old['dials'].get(n)!r} then, {getattr(config, n)!r} now" for n in other)
                    raise ValueError(f"{self.run_folder} holds a run with other dials ({was}): give another folder")
        self.world.wait()
        if self.world.first:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            checkpoint.tidy(self.run_folder, config.keep)
            with replacing(file) as temporary:
                content = {"stage": self.stage.name, "dials": config.to_json()}
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _resume(self, optimizer: AdamW) -> int:
        newest = checkpoint.latest(self.run_folder)
        if newest is None:
            return 0
        state = checkpoint.load(newest, self.stage.modules, optimizer)
        if not isinstance(state.get("stage"), dict):
            raise FormatError(f"{newest.path.name}: expected the stage's state in state.json")
        self.stage.load_state(state["stage"])
        self._spent |= {k: float(v) for k, v in state.get("spent", {}).items() if k in self._spent}
        self._saved = newest.step
        return newest.step

    def _save(self, done: int, optimizer: AdamW) -> None:
        if done == self._saved:
            return
        config = self.stage.config
        state = {"name": self.stage.name, "stage": self.stage.state(), "dials": config.to_json(), "spent": self._spent}
        checkpoint.save(self.run_folder, done, self.stage.modules, optimizer, state, config.keep, self.world)
        self._saved = done

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals come to the main thread alone
            return
        old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def asked(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for s in old:
            signal.signal(s, asked)
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


def make_optimizer(modules: Mapping[str, nn.Module], config: StageConfig) -> AdamW:
    """AdamW over everything that wants gradients; weight decay on matrices only, as GPT-3 was trained."""
    seen: set[int] = set()
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules.values():
        for p in module.parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                (matrices if p.dim() >= 2 else others).append(p)
    groups: Sequence[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        max_norm=config.clip or float("inf"),
    )


def _peak_flops() -> float:
    """This machine's measured peak, FLOP/s in fp32; 0 where the CPU kernels aren't built."""
    if hardware.machine().isa is None:
        return 0.0
    return hardware.ceilings().best("fp32", torch.get_num_threads())


def _status(found: Mapping[str, float]) -> str:
    parts = [f"loss {found['loss']:.3f}"] if "loss" in found else []
    parts += [f"{found['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in found else []
    parts += [f"MFU {100 * found['mfu']:.0f}%"] if found.get("mfu") else []
    return " · ".join(parts)
