"""The next-token loss of transformers models in training by ops.linear_cross_entropy, which never stores the logits.

The forward calls the model below its head and gives the hidden states, the head's weight and the labels to the op. Who
reads `logits` from the output makes them then, by the head, as part of the same graph.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptfast import ops
from gptfast.patch.changes import Replacement
from gptfast.patch.linears import Linear

NAME = "linear_cross_entropy"

# Models whose logits are the head's output, up to Gemma's cap.
KNOWN = frozenset(["gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "phi", "gemma2"])


class Loss(Replacement):
    """The forward of a causal language model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        given = dict(zip(_names(type(module)), args)) | kwargs
        labels, loss = given.get("labels"), None
        head = module.get_output_embeddings()
        plain = type(head) is nn.Linear and isinstance(head.__dict__.get("forward"), Linear | None)
        whole = given.get("logits_to_keep") in (None, 0) and given.get("return_dict") is not False
        if labels is None or not (module.training and plain and whole):
            return self.original(*args, **kwargs)
        below = {k: v for k, v in given.items() if k not in ("labels", "logits_to_keep")}
        found = module.base_model(**below)
        hidden, ignore = found.last_hidden_state, given.get("ignore_index", -100)
        target = given.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        count = given.get("num_items_in_batch")
        linear_cross_entropy: Any = getattr(ops, NAME)
        loss = linear_cross_entropy(
            *(hidden.flatten(0, -2), head.weight, target.flatten().to(hidden.device)),
            **dict(bias=head.bias, ignore_index=ignore, softcap=_cap(module), backend=self.backend),
            reduction="mean" if count is None else "sum",
        )
        loss = loss if count is None else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        names = ("past_key_values", "hidden_states", "attentions")
        output = _output_class()(loss=loss, **{name: getattr(found, name, None) for name in names})
        output.__dict__["_later"] = lambda: _capped(head(hidden), _cap(module))
        return output


@cache
def _names(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _cap(module: Any) -> float:
    return getattr(module.config, "final_logit_softcapping", None) or 0.0


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * (logits / cap).tanh() if cap else logits


@cache
def _output_class() -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class CausalLMOutput(CausalLMOutputWithPast):
        """transformers' output, whose logits are made when they are asked for."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "logits" and value is None and (later := self.__dict__.get("_later")) is not None:
                value = self.__dict__["_made"] = self.__dict__.get("_made")
                if value is None:
                    value = self.__dict__["_made"] = later()
            return value

        def __getitem__(self, key: Any) -> Any:
            if key == "logits":
                return self.logits
            return self.loss if key == 0 else super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            return key == "logits" or super().__contains__(key)

        def get(self, key: Any, default: Any = None) -> Any:
            return self.logits if key == "logits" else super().get(key, default)

        def to_tuple(self) -> tuple[Any, ...]:
            """Also for places and slices, such as the logits' [1]."""
            values = (getattr(self, field.name) for field in dataclasses.fields(self))
            return tuple(value for value in values if value is not None)

    return CausalLMOutput


def recognise(module: Any) -> str | None:
    """None where a model's loss can be ours; else why not, "" for what has no next-token loss."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return ""
    if "labels" not in _names(type(module)):
        return ""
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "its loss is not that of the next token"
    if not hasattr(ops, NAME):
        return "this version of gptfast has no linear_cross_entropy"
    if getattr(module.config, "model_type", None) not in KNOWN:
        return "how its logits come from its hidden states is not known"
    if getattr(module.loss_function, "__name__", "") != "ForCausalLMLoss":
        return "its loss function has been replaced"
    if type(module.get_output_embeddings()) is not nn.Linear:
        return "its head is no plain nn.Linear"
    return None
