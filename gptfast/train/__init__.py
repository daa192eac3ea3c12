"""Training: the optimiser, and what clips its gradients."""

from gptfast.train.optim import AdamW, clip_grad_norm_

__all__ = ["AdamW", "clip_grad_norm_"]
