"""The reward and the value model: a GPT with one number in the place of the vocabulary.

    r    = the head's number at a sequence's last token;  the head starts as N(0, 1 / (d + 1)), its variance

Stiennon et al. (arXiv:2009.01325), appendix B.1. A value model has a number at every token. Both are saved as a Hugging
Face folder of the family's ForSequenceClassification with one label.

A reward model may be wide besides deep (Cheng et al., arXiv:1606.07792): then r has the sum of a number for each two
neighbouring tokens beside the head's, from a table that a hash indexes. Thousands of ratings teach a small transformer
few of the phrases that such numbers just hold. Transformers reads the deep part alone.

An ensemble is the mean of models that began differently: it errs less, and is harder to please by a flaw of one. Where
its members differ is what it doesn't know, which a policy may be kept from (Coste et al., arXiv:2310.02743).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.formats.files import FormatError, read_json, replacing
from gptfast.formats.huggingface import read_folder, write_folder
from gptfast.formats.tokenizer import Tokenizer
from gptfast.layers import Embedding, Linear
from gptfast.model import GPT, GPTConfig, convert
from gptfast.train.packing import Packed, generator, pack

HEAD = "score."  # transformers' name of a sequence classifier's head
NEIGHBOURS = "neighbours.weight"  # our name of a wide part's table
OURS = "gptfast_score"  # our entry of config.json
ENSEMBLE, MOST_MEMBERS = "ensemble.json", 64
FASTER = 2.0  # times a table's entry: so its numbers are learnt so much faster than AdamW moves a weight (LOG.md)
TOKENS_AT_ONCE = 16384  # where nothing is learnt


class Scorer(nn.Module):
    """A GPT and a linear layer that makes one number of a final hidden state.

    backbone  is used as it is, not copied; its own head does nothing here
    seed      decides the head's start
    """

    kind: str

    def __init__(self, backbone: GPT, seed: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        width = backbone.config.n_embd
        self.backbone = backbone
        self.score = Linear(width, 1, bias, device=backbone.device, dtype=backbone.dtype)
        start = torch.randn(1, width, generator=generator("score", seed)) / math.sqrt(width + 1)
        with torch.no_grad():
            assert isinstance(self.score.weight, Tensor)
            self.score.weight.copy_(start)
        if backbone.head is not None:
            backbone.head.requires_grad_(False)

    def scores(self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None) -> Tensor:
        """A number at every token of packed sequences, ids (1, T) -> (1, T) fp32; with rows (M,) int64 at these alone,
        (1, M), which spares much of the last block."""
        return self._at(ids, cu_seqlens, rows)

    def _at(self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
        self.score.backend = self.backbone.backend
        return self.score(self.backbone.hidden(ids, cu_seqlens=cu_seqlens, rows=rows))[..., 0].float()

    def save_folder(self, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Writes config.json, safetensors and, where one is given, the tokenizer."""
        config, tensors = convert.to_huggingface(self.backbone)
        names = config.get("architectures") or ["GPT2LMHeadModel"]
        base = names[0].removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        config |= {"architectures": [f"{base}ForSequenceClassification"], "num_labels": 1, OURS: self._extra()}
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        head = {HEAD + name: p.detach() for name, p in self.score.named_parameters()} | self._more_tensors()
        extra: dict[str, Any] = {}
        if tokenizer is not None:
            config["pad_token_id"] = tokenizer.pad_id  # which transformers finds the last token by
            extra = {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": tokenizer.to_config()}
            if tokenizer.chat_template is not None:
                extra["chat_template.jinja"] = tokenizer.chat_template
        write_folder(path, config, {n: t.contiguous() for n, t in tensors.items()} | head, extra)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what save_folder wrote. Raises FormatError for another folder."""
        folder = read_folder(path)
        extra = folder.config.get(OURS)
        if not isinstance(extra, dict) or extra.get("kind") != cls.kind:
            raise FormatError(f"{folder.path.name}: expected a {cls.kind} model's folder, got {extra!r:.80}")
        head = {n: folder.tensors[n] for n in folder.tensors if n.startswith(HEAD)}
        config = GPTConfig.from_huggingface(folder.config).replace(eos_ids=tuple(folder.eos_ids))
        rest = {n: folder.tensors[n] for n in folder.tensors if not n.startswith(HEAD)}
        table = rest.pop(NEIGHBOURS, None)
        shape = cls._shape(extra, table, folder.path.name)
        model = cls(convert.from_tensors(config, rest), **shape)
        for name, p in model.score.named_parameters():
            found = head.pop(HEAD + name, None)
            if found is None or found.shape != p.shape:
                got = "none" if found is None else str(tuple(found.shape))
                raise FormatError(f"{folder.path.name}: expected {HEAD}{name} {tuple(p.shape)}, got {got}")
            with torch.no_grad():
                p.copy_(found)
        if head:
            raise FormatError(f"{folder.path.name}: expected no tensor {min(head)}")
        if table is not None:
            model._take_table(table)
        model._take_extra(extra, folder.path.name)
        return model.eval()

    def _more_tensors(self) -> dict[str, Tensor]:
        return {}

    def _extra(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def _shape(cls, extra: dict[str, Any], table: Tensor | None, where: str) -> dict[str, Any]:
        """What the constructor needs to know, if the table of a wide part is as the description says."""
        if table is not None:
            raise FormatError(f"{where}: expected no tensor {NEIGHBOURS}")
        return {}

    def _take_table(self, table: Tensor) -> None:
        raise NotImplementedError

    def _take_extra(self, extra: dict[str, Any], where: str) -> None:
        return


class Judging:
    """What a reward model and an ensemble of them share: scores of answers, normalised by `mean` and `std`, (1,) fp32
    buffers."""

    members: int
    mean: Tensor
    std: Tensor
    training: bool

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        raise NotImplementedError

    def each(self, packed: Sequence[Packed]) -> Tensor:
        """Each member's numbers at the last tokens of its sequences, the same ones in `packed` for each: (members, n)
        fp32."""
        raise NotImplementedError

    def each_model(self) -> Iterator[RewardModel]:
        """The members."""
        raise NotImplementedError

    def raw(self, packed: Packed) -> Tensor:
        """The members' mean number at each sequence's last token, (n,) fp32."""
        return self.each([packed] * self.members).mean(0)

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """The normalised score of each response (token ids, its end token included), (n,) fp32."""
        return self.judged(prompts, responses)[0]

    @torch.no_grad()
    def judged(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The rewards, and the standard deviation between the members' scores of each (0 for one model), (n,) fp32."""
        each = self._each_raw([[*p, *r] for p, r in zip(prompts, responses)])
        return (each.mean(0) - self.mean) / self.std, each.std(0, correction=0) / self.std

    @torch.no_grad()
    def normalise(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """From now on rewards have mean 0 and standard deviation 1 over these responses, those of the model that PPO
        starts from for example. Raises ValueError for fewer than two."""
        if len(responses) < 2:
            raise ValueError(f"RewardModel.normalise: expected at least 2 responses, got {len(responses)}")
        raw = self._all_raw([[*p, *r] for p, r in zip(prompts, responses)])
        self.mean.copy_(raw.mean()[None])
        self.std.copy_(raw.std().clamp(min=1e-6)[None])

    def _all_raw(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return self._each_raw(sequences).mean(0)

    def _each_raw(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        module, training = cast(nn.Module, self), self.training
        module.eval()
        try:
            found = [self.each([packed] * self.members) for packed in rows_of(sequences)]
        finally:
            module.train(training)
        return torch.cat(found, 1) if found else torch.zeros(self.members, 0)


class RewardModel(Judging, Scorer):
    """How good an answer is: the number at its last token, normalised.

    neighbours  entries of the table of a wide part; 0: there is none
    """

    kind = "reward"
    members = 1

    def __init__(self, backbone: GPT, seed: int = 0, *, neighbours: int = 0) -> None:
        """Raises ValueError for a negative number of entries."""
        if neighbours < 0:
            raise ValueError(f"RewardModel: expected neighbours of at least 0, got {neighbours}")
        Scorer.__init__(self, backbone, seed)
        on: dict[str, Any] = {"device": backbone.device}
        self.register_buffer("mean", torch.zeros(1, **on))
        self.register_buffer("std", torch.ones(1, **on))
        self.neighbours = Embedding(neighbours, 1, **on, dtype=backbone.dtype) if neighbours else None
        if self.neighbours is not None:
            with torch.no_grad():
                assert isinstance(self.neighbours.weight, Tensor)
                self.neighbours.weight.zero_()

    @property
    def context(self) -> int:
        return self.backbone.config.context

    def each_model(self) -> Iterator[RewardModel]:
        yield self

    def each(self, packed: Sequence[Packed]) -> Tensor:
        [only] = packed
        scores = self._at(only.ids[None], only.cu_seqlens, only.last)
        return scores if self.neighbours is None else scores + self._wide(only)

    def _wide(self, packed: Packed) -> Tensor:
        """The sum of each sequence's neighbours' numbers, (1, n) fp32. Its first token has id 0 before it."""
        assert self.neighbours is not None
        before = packed.ids.roll(1).index_fill(0, packed.cu_seqlens[:-1].long(), 0)
        at = (1_000_003 * before + 7_919 * packed.ids) % self.neighbours.num_embeddings
        self.neighbours.backend = self.backbone.backend
        numbers = FASTER * self.neighbours(at)[:, 0].float()
        numbers = F.dropout(numbers, self.backbone.config.dropout, self.training)
        # Each sequence's by itself and in order: what stands beside it changes no bit.
        return torch.segment_reduce(numbers, "sum", lengths=packed.cu_seqlens.diff().long())[None]

    def blank(self) -> RewardModel:
        """One of the same shape on the meta device."""
        entries = 0 if self.neighbours is None else self.neighbours.num_embeddings
        return RewardModel(GPT(self.backbone.config, device="meta"), neighbours=entries)

    def _more_tensors(self) -> dict[str, Tensor]:
        if self.neighbours is None:
            return {}
        assert isinstance(self.neighbours.weight, Tensor)
        return {NEIGHBOURS: self.neighbours.weight.detach()}

    def _extra(self) -> dict[str, Any]:
        found = {"kind": self.kind, "mean": float(self.mean), "std": float(self.std)}
        return found if self.neighbours is None else found | {"neighbours": self.neighbours.num_embeddings}

    @classmethod
    def _shape(cls, extra: dict[str, Any], table: Tensor | None, where: str) -> dict[str, Any]:
        entries = extra.get("neighbours", 0)
        if not isinstance(entries, int) or isinstance(entries, bool) or entries < 0:
            raise FormatError(
                f"{where}: expected neighbours of at least 0 in config.json's {OURS}, got {entries!r:.80}"
            )
        if not entries:
            return super()._shape(extra, table, where)
        if table is None or table.shape != (entries, 1):
            got = "none" if table is None else str(tuple(table.shape))
            raise FormatError(f"{where}: expected neighbours in {NEIGHBOURS} {(entries, 1)}, got {got}")
        return {"neighbours": entries}

    def _take_table(self, table: Tensor) -> None:
        assert self.neighbours is not None and isinstance(self.neighbours.weight, Tensor)
        with torch.no_grad():
            self.neighbours.weight.copy_(table)

    def _take_extra(self, extra: dict[str, Any], where: str) -> None:
        mean, std = numbers_of(extra, where)
        self.mean.fill_(mean)
        self.std.fill_(std)


def numbers_of(extra: dict[str, Any], where: str) -> tuple[float, float]:
    """The mean and the standard deviation that a folder's description holds. Raises FormatError."""
    mean, std = extra.get("mean"), extra.get("std")
    if not isinstance(mean, float | int) or not isinstance(std, float | int) or not 0 < std < math.inf:
        raise FormatError(f"{where}: expected numbers mean and std > 0 in config.json's {OURS}, got {extra!r:.80}")
    return mean, std


class RewardEnsemble(Judging, nn.Module):
    """The mean of several reward models, normalised. Saved as a folder with a model's folder for each, 0, 1, ...

    models  the members, of one vocabulary
    """

    def __init__(self, models: Sequence[RewardModel]) -> None:
        """Raises ValueError for fewer than two, and for models of different vocabularies."""
        nn.Module.__init__(self)
        vocabularies = {model.backbone.config.vocab_size for model in models}
        if len(models) < 2 or len(vocabularies) > 1:
            raise ValueError(
                f"RewardEnsemble: expected at least 2 models of one vocabulary, got {len(models)} of {vocabularies}"
            )
        self.models = nn.ModuleList(models)
        self.members = len(models)
        on = models[0].backbone.device
        self.register_buffer("mean", torch.zeros(1, device=on))
        self.register_buffer("std", torch.ones(1, device=on))

    def each_model(self) -> Iterator[RewardModel]:
        for model in self.models:
            assert isinstance(model, RewardModel)
            yield model

    @property
    def context(self) -> int:
        return min(model.context for model in self.each_model())

    def each(self, packed: Sequence[Packed]) -> Tensor:
        return torch.cat([model.each([part]) for model, part in zip(self.each_model(), packed, strict=True)])

    def blank(self) -> RewardEnsemble:
        """One of the same shape on the meta device."""
        return RewardEnsemble([model.blank() for model in self.each_model()])

    def save_folder(self, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Writes ensemble.json and a folder for each member."""
        for i, model in enumerate(self.each_model()):
            model.save_folder(Path(path) / str(i), tokenizer)
        found = {"members": self.members, "mean": float(self.mean), "std": float(self.std)}
        with replacing(Path(path) / ENSEMBLE) as file:
            file.write_text(json.dumps(found, indent=2))

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> RewardEnsemble:
        """Reads what save_folder wrote. Raises FormatError for another folder."""
        folder = Path(path)
        found = read_json(folder / ENSEMBLE)
        members = found.get("members")
        if not isinstance(members, int) or not 2 <= members <= MOST_MEMBERS:
            raise FormatError(f"{folder.name}/{ENSEMBLE}: expected 2 to {MOST_MEMBERS} members, got {members!r:.80}")
        made = cls([RewardModel.from_folder(folder / str(i)) for i in range(members)])
        mean, std = numbers_of(found, f"{folder.name}/{ENSEMBLE}")
        made.mean.fill_(mean)
        made.std.fill_(std)
        return made.eval()


def read_reward(path: str | os.PathLike[str]) -> RewardModel | RewardEnsemble:
    """The reward model or the ensemble of a folder. Raises FormatError for another folder."""
    return (RewardEnsemble if (Path(path) / ENSEMBLE).is_file() else RewardModel).from_folder(path)


class ValueModel(Scorer):
    """What is still to come: a number at every token."""

    kind = "value"

    def __init__(self, backbone: GPT, seed: int = 0) -> None:
        super().__init__(backbone, seed, bias=True)

    @classmethod
    def from_reward(cls, reward: RewardModel | RewardEnsemble) -> ValueModel:
        """Starts as a copy of the reward model (an ensemble's first; of its deep part), in normalised units: Stiennon
        et al., section 3.4."""
        model = next(reward.each_model())
        made = cls(copy.deepcopy(model.backbone))
        weight, bias = made.score.weight, made.score.bias
        assert isinstance(weight, Tensor) and isinstance(model.score.weight, Tensor) and bias is not None
        with torch.no_grad():
            weight.copy_(model.score.weight / reward.std)
            bias.copy_(-reward.mean / reward.std)
        return made


def rows_of(sequences: Sequence[Sequence[int]], most: int = TOKENS_AT_ONCE) -> list[Packed]:
    """These sequences in their order, packed in rows of at most `most` tokens; a longer one stands alone."""
    groups: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if not groups or len(sequence) > room:
            groups.append([])
            room = most
        groups[-1].append(sequence)
        room -= len(sequence)
    return [pack(group) for group in groups]
