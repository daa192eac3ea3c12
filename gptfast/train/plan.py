"""Training and serving on paper: memory, FLOPs, time, communication and cost of a configuration on so many GPUs.

N parameters, D tokens, L layers, C width, H heads of D_h, F MLP width, V vocabulary, T context, t GPUs of a tensor-
parallel group, d data-parallel groups, b sequences of a GPU at once.

FLOPs      6 N D (Kaplan et al., arXiv:2001.08361) is what papers quote. Times here come from what is really multiplied:
           6 per matrix element and token, 12 H D_h for each layer and key that a token sees, (T + 1) / 2 on average
           under a causal mask. Recomputing activations adds a forward pass: 8 and 16.
time       FLOPs / (GPUs x peak x MFU), or that of the communication which could hide behind it, where it is longer.
           MFU 40% unless given: Llama 3 had 38-43% on 8,192-16,384 H100 (arXiv:2407.21783, table 4), PaLM 46%, GPT-3
           21% (arXiv:2204.02311, table 3), llm.c's GPT-2 124M 60%.
states     bf16 with fp32 AdamW: 2 bytes a weight, 2 a gradient, 12 for the fp32 copy and two moments (Rajbhandari et
           al.: ZeRO, arXiv:1910.02054, section 3.1); fp32: 4, 4 and 8. ddp keeps all of it on each GPU, zero1 shards
           the optimiser's, fsdp (ZeRO-3) everything, and holds two blocks' gathered weights. tp divides everything by
           t = 8 and is fsdp between the groups.
activations  bytes of a token in a layer, 16 bit (Korthikanti et al., arXiv:2205.05198, equation 1, written for other
           MLPs and grouped heads; 34 C for GPT-3): norms' inputs 4 C, inputs of qkv and MLP 4 C, q 2 H D_h, k and v
           4 Hk D_h, the output projection's input 2 H D_h, the MLP's 2 F (gated: 4 F) and 2 F, 2 C of dropout masks.
           Attention's T^2 scores (their 5 H T) and the logits are never stored by fused kernels: 4 H for the
           log-sum-exp. Checkpointing keeps each layer's input, 2 C, and one layer whole. tp with sequence parallelism
           divides by t (equation 4).
communication  bytes that a GPU sends in a step, rings: ddp and zero1 2 (d-1)/d of the gradients; fsdp 3 (d-1)/d of the
           weights (gathered twice, gradients scattered; ZeRO section 7); tp 4 all-reduces of 2 b T C a layer, each
           2 (t-1)/t. Inside a node over the GPUs' own links, else over the network.
serving    prefill is bound by FLOPs, at the same MFU; a decode step reads every matrix once and each row's keys and
           values, at 60% of the memory's bandwidth (MBU; llama.cpp and gpt-fast reach 60-80%), or computes, whichever
           is longer. tp exchanges 2 all-reduces a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from gptfast.hardware import GPUS, Gpu
from gptfast.model.config import GPTConfig

MFU, MBU = 0.40, 0.60
RESERVED = 0.08  # of a GPU's memory: the context of its driver, fragments, the buffers of communication
STEP_TOKENS = 1 << 19  # of a batch where none is given, as GPT-2 and GPT-3's small models were trained
PARALLEL = ("ddp", "zero1", "fsdp", "tp")
PRECISIONS = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}  # bytes of a weight, of its gradient, of the optimiser's states
TENSOR_GROUP = 8
MOST = 1 << 16  # GPUs


@dataclass(frozen=True)
class Board:
    """A GPU in its machine. Bytes of memory; bytes/s to its neighbours and, per GPU, to other machines, one way."""

    gpu: Gpu
    memory: float
    link: float
    network: float
    node: int = 8


# Data sheets: NVLink's and Infinity Fabric's total halved to one way; PCIe for cards without; networks as the vendors'
# own eight-GPU machines have them.
BOARDS = {
    "v100": Board(Gpu("V100-SXM2-32GB", 125e12, 0.9e12, 80), 32e9, 150e9, 6.25e9),
    "a100-40gb": Board(Gpu("A100-SXM-40GB", 312e12, 1.555e12, 108), 40e9, 300e9, 25e9),
    "a100": Board(GPUS["A100-SXM-80GB"], 80e9, 300e9, 25e9),
    "h100": Board(GPUS["H100-SXM"], 80e9, 450e9, 50e9),
    "h200": Board(GPUS["H200-SXM"], 141e9, 450e9, 50e9),
    "mi300x": Board(GPUS["MI300X"], 192e9, 448e9, 50e9),
    "rtx4090": Board(GPUS["RTX 4090"], 24e9, 32e9, 1.25e9),
    "rtx5090": Board(GPUS["RTX 5090"], 32e9, 64e9, 1.25e9),
}


def board(name: str) -> Board:
    """The GPU of this name. Raises ValueError that lists the names."""
    if name.lower() not in BOARDS:
        raise ValueError(f"expected a GPU among {', '.join(BOARDS)}, got {name!r}")
    return BOARDS[name.lower()]


@dataclass(frozen=True)
class Job:
    """What is asked. batch: sequences of a step, all GPUs together; micro: those of one GPU at once; mfu, mbu: parts of
    the peaks that are reached; price: of a GPU for an hour."""

    config: GPTConfig
    gpu: str = "h100"
    gpus: int = 8
    tokens: float = 0.0  # 0: 20 N, Hoffmann et al. (arXiv:2203.15556)
    context: int = 0  # 0: the model's
    batch: int = 0  # 0: some 2^19 tokens
    micro: int = 0  # 0: as many as make it fastest
    precision: str = "bf16"
    parallel: str = "auto"
    checkpointing: bool = False
    mfu: float = MFU
    mbu: float = MBU
    price: float | None = None
    rows: int = 32  # sequences served together

    def __post_init__(self) -> None:
        board(self.gpu)
        for name, default in (("context", self.config.context), ("tokens", 20.0 * self.config.parameters())):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if not self.batch:
            object.__setattr__(self, "batch", max(1, round(STEP_TOKENS / self.context)))
        names = ("auto", *PARALLEL)
        for condition, expected, got in (
            (1 <= self.gpus <= MOST, f"1 to {MOST} GPUs", self.gpus),
            (self.context >= 1 and self.batch >= 1 and self.micro >= 0 and self.rows >= 1,
             "context, batch and rows of at least 1 and micro of at least 0",
             (self.context, self.batch, self.micro, self.rows)),
            (self.tokens > 0 and math.isfinite(self.tokens), "a positive number of tokens", self.tokens),
            (self.precision in PRECISIONS, f"a precision among {', '.join(PRECISIONS)}", self.precision),
            (self.parallel in names, f"parallel among {', '.join(names)}", self.parallel),
            (0 < self.mfu <= 1 and 0 < self.mbu <= 1, "0 < MFU, MBU <= 1", (self.mfu, self.mbu)),
            (self.price is None or self.price >= 0, "a price of at least 0", self.price),
        ):  # fmt: skip
            if not condition:
                raise ValueError(f"plan: expected {expected}, got {got}")

    @property
    def board(self) -> Board:
        return board(self.gpu)

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU's matrix units in this precision; fp32 is taken as TF32, half of bf16."""
        return self.board.gpu.bf16_flops / (1 if self.precision == "bf16" else 2)


@dataclass(frozen=True)
class Training:
    """A way to train. Bytes of one GPU, seconds, bytes sent by one GPU in a step."""

    parallel: str
    gpus: int
    tensor: int  # GPUs of a tensor-parallel group
    micro: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    activations_checkpointed: float
    checkpointing: bool
    capacity: float
    flops: float  # of the whole training, with what is computed again
    flops_6nd: float
    steps: float
    step_s: float
    compute_s: float  # of a step
    sent: float
    sent_s: float
    hours: float
    tokens_per_s: float
    cost: float | None

    @property
    def memory(self) -> float:
        kept = self.activations_checkpointed if self.checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + self.gathered + kept

    @property
    def fits(self) -> bool:
        return self.memory <= self.capacity


@dataclass(frozen=True)
class Serving:
    """One copy of a model on `tensor` GPUs. Bytes of one GPU, tokens/s of the copy."""

    tensor: int
    rows: int
    context: int
    weights: float
    kv_cache: float
    capacity: float
    prefill_per_s: float
    decode_per_s: float  # all rows together
    step_s: float
    bound: str  # what a decode step waits for: "memory", "compute" or "link"
    most_rows: int  # that fit
    cost_per_million: float | None  # tokens decoded

    @property
    def fits(self) -> bool:
        return self.weights + self.kv_cache <= self.capacity


@dataclass(frozen=True)
class Plan:
    """Everything about a job. `smallest`: the fewest GPUs, in powers of two, that each way of training needs; None
    where none is enough."""

    job: Job
    training: Training
    serving: Serving
    smallest: dict[str, int | None] = field(default_factory=dict)


def training_flops(config: GPTConfig, tokens: float, context: int) -> float:
    """FLOPs of forward and backward over so many tokens in rows of `context`."""
    keys = sum((_attended(config.attended(layer, context), context)) for layer in range(config.n_layer))
    return tokens * 3 * (2 * config.matrix_parameters() + 4 * config.n_head * config.head_dim * keys)


def _attended(most: int, context: int) -> float:
    """The keys that the average token of a row sees where each sees at most so many."""
    return most - most * (most - 1) / 2 / context


def layer_activations(config: GPTConfig, *, bytes_each: int = 2, scores: int = 0) -> float:
    """Bytes that the backward needs of one token in one layer; with `scores` keys, attention's unfused scores too."""
    c = config
    heads, kv_heads = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    elements = 4 * c.n_embd + 2 * heads + 2 * kv_heads + c.ffn_dim * (3 if c.gated else 2)
    masks = 2 * c.n_embd if c.dropout else 0
    if scores:
        masks += c.n_head * scores * (1 if c.dropout else 0)
        elements += c.n_head * scores * (2 if c.dropout else 1)
        return elements * bytes_each + masks
    return elements * bytes_each + masks + 4 * c.n_head


def training(job: Job, parallel: str, gpus: int) -> Training:
    """What this way of training costs on so many GPUs, each with job.micro sequences at once (one where that is 0)."""
    c, hardware = job.config, job.board
    tensor = min(TENSOR_GROUP, gpus, hardware.node) if parallel == "tp" else 1
    while tensor > 1 and (gpus % tensor or c.n_head % tensor):
        tensor -= 1
    groups = gpus // tensor
    per_weight, per_gradient, per_state = PRECISIONS[job.precision]
    N = c.parameters() / tensor
    everything = groups if parallel in ("fsdp", "tp") else 1
    states = groups if parallel in ("zero1", "fsdp", "tp") else 1
    block = (c.parameters() - 2 * c.vocab_size * c.n_embd) / c.n_layer if c.n_layer else 0
    gathered = 2 * max(block, 0) / tensor * per_weight if everything > 1 else 0.0
    micro = min(job.micro or 1, -(-job.batch // groups))
    row = micro * job.context
    layer = layer_activations(c, bytes_each=per_weight) * row / tensor
    checkpointed = c.n_layer * c.n_embd * per_weight * row / tensor + layer
    tokens = job.batch * job.context
    flops = training_flops(c, job.tokens, job.context)
    if job.checkpointing:
        flops *= 4 / 3
    steps = job.tokens / tokens
    # With fewer sequences than groups some GPUs have nothing to do.
    busy = min(groups, job.batch) * tensor
    compute = flops / steps / (busy * job.peak * job.mfu)
    times = max(1.0, job.batch / (groups * micro))  # forward and backward passes of a step
    sent, sent_s = _communication(job, parallel, tensor, groups, N, row, times)
    step = max(compute, sent_s)
    hours = steps * step / 3600
    return Training(
        parallel, gpus, tensor, micro,
        N * per_weight / everything, N * per_gradient / everything, N * per_state / states, gathered,
        layer * c.n_layer, checkpointed, job.checkpointing, hardware.memory * (1 - RESERVED),
        flops, 6.0 * c.parameters() * job.tokens, steps, step, compute, sent, sent_s, hours, tokens / step,
        None if job.price is None else job.price * gpus * hours,
    )  # fmt: skip


def _communication(
    job: Job, parallel: str, tensor: int, groups: int, weights: float, row: int, times: float
) -> tuple[float, float]:
    """(bytes that a GPU sends in a step, the seconds that takes). weights: of one tensor-parallel part."""
    hardware, width = job.board, PRECISIONS[job.precision][0]
    part = (groups - 1) / groups
    if parallel in ("ddp", "zero1"):
        between = 2 * part * weights * width
    else:
        between = part * weights * width * (2 * times + 1)  # gathered in each pass, scattered once
    within = 4 * job.config.n_layer * row * job.config.n_embd * width * 2 * (tensor - 1) / tensor * times
    speed = hardware.link if groups * tensor <= hardware.node else hardware.network
    return between + within, between / speed + within / hardware.link


def serving(job: Job, tensor: int) -> Serving:
    """One copy of the model on so many GPUs, for job.rows sequences of job.context tokens."""
    c, hardware = job.config, job.board
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    width, capacity = dtype.itemsize, hardware.memory * (1 - RESERVED)
    weights = c.parameters() * width / tensor
    row = c.kv_bytes_per_token(dtype) * job.context / tensor
    read = c.bytes_per_step(job.rows, job.context, dtype) / tensor / (hardware.gpu.bytes_per_s * job.mbu)
    computed = job.rows * c.flops_per_token(job.context) / tensor / (job.peak * job.mfu)
    speed = hardware.link if tensor <= hardware.node else hardware.network
    exchanged = 2 * c.n_layer * job.rows * c.n_embd * width * 2 * (tensor - 1) / tensor / speed
    step = max(read, computed) + exchanged
    bound = "link" if exchanged > max(read, computed) else "memory" if read >= computed else "compute"
    average = c.flops_per_token(max(1, job.context // 2))
    per_s = job.rows / step
    return Serving(
        tensor, job.rows, job.context, weights, row * job.rows, capacity,
        tensor * job.peak * job.mfu / average, per_s, step, bound, max(0, int((capacity - weights) // row)),
        None if job.price is None else job.price * tensor / 3600 / per_s * 1e6,
    )  # fmt: skip


def plan(job: Job) -> Plan:
    """The job on its GPUs: of the ways to train that were left open (parallel, micro, and activations computed again),
    the fastest that fits, else the one that takes least memory; served on the fewest GPUs that hold it."""
    names = PARALLEL if job.parallel == "auto" else (job.parallel,)
    sizes = [job.micro] if job.micro else [1 << i for i in range(7) if 1 << i <= job.batch]
    again = (True,) if job.checkpointing else (False, True)
    tries = [
        training(replace(job, micro=micro, checkpointing=checkpointing), name, job.gpus)
        for checkpointing in again
        for name in names
        for micro in sizes
    ]
    found = min((t for t in tries if t.fits), key=lambda t: t.step_s, default=min(tries, key=lambda t: t.memory))
    copies = [serving(job, n) for n in (1 << i for i in range(10)) if job.config.n_head % n == 0]
    served = next((s for s in copies if s.fits), copies[-1])
    return Plan(job, found, served, {name: _smallest(job, name) for name in PARALLEL})


def _smallest(job: Job, parallel: str) -> int | None:
    least = replace(job, checkpointing=True, micro=1)
    return next((n for n in (1 << i for i in range(17)) if training(least, parallel, n).fits), None)
