from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, threads, unsupported
from gptfast.kernels.cpu.policy import alike, mask_rows, with_stride


def supports_gae(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float) -> str | None:
    return unsupported(rewards, values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards, values = alike(rewards, values)
    (rewards, rewards_stride), (values, values_stride) = with_stride(rewards), with_stride(values)
    mask, mask_stride = mask_rows(mask)
    advantages, returns = (empty(rewards.shape, torch.float32) for _ in range(2))
    _cpu.gae(
        threads(rewards.numel()),
        advantages=advantages.data_ptr(),
        returns=returns.data_ptr(),
        rewards=rewards.data_ptr(),
        values=values.data_ptr(),
        mask=pointer(mask),
        rows=rewards.shape[0],
        cols=rewards.shape[1],
        rewards_stride=rewards_stride,
        values_stride=values_stride,
        mask_stride=mask_stride,
        gamma=gamma,
        lam=lam,
        dtype=DTYPES[rewards.dtype],
    )
    return advantages, returns
