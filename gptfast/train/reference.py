"""The model that a policy is kept near, or compared with: a copy, or the policy itself without its adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from gptfast.model import GPT
from gptfast.train.lora import adapted, disabled


class Reference:
    """A frozen model.

    given  None: the policy as it is now, copied; where it has adapters, the policy without them, and no copy
    """

    def __init__(self, policy: GPT, given: GPT | None = None) -> None:
        self._without = given is None and bool(adapted(policy))
        if self._without:
            self.model = policy
        else:
            self.model = (copy.deepcopy(policy) if given is None else given).eval().requires_grad_(False)

    @contextmanager
    def __call__(self) -> Iterator[GPT]:
        """The model to ask, inside of which there are no gradients."""
        with torch.no_grad(), disabled(self.model) if self._without else nullcontext():
            yield self.model
