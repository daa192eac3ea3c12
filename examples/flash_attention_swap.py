"""Code that was written for flash-attn, on any machine: an import line is all that changes.

python examples/flash_attention_swap.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptfast.compat.flash_attn import flash_attn_func, flash_attn_varlen_func  # was: from flash_attn import ...


def main() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 50, 8, 64), torch.randn(2, 50, 2, 64), torch.randn(2, 50, 2, 64)
    out = flash_attn_func(q, k, v, causal=True)
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    wanted = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(1, 2)
    print("causal, grouped heads:      ", tuple(out.shape), f"{(out - wanted).abs().max():.1e} from PyTorch's")
    torch.testing.assert_close(out, wanted)

    edges = torch.tensor([0, 50, 70, 100], dtype=torch.int32)  # two texts of the batch, end to end, and cut anew
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, edges, edges, 50, 50, causal=True, window_size=(15, 0), return_attn_probs=True
    )
    print("three sequences, window 16: ", tuple(out.shape), "log-sum-exp", tuple(lse.shape))
    q, k, v = (t[None, 50:70] for t in (q, k, v))
    alone = flash_attn_func(q, k, v, causal=True, window_size=(15, 0))
    assert torch.equal(out[50:70], alone[0]), "a sequence's result doesn't depend on what lies beside it"


if __name__ == "__main__":
    main()
