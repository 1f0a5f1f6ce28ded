"""The obvious way to use the published filter in Lightning, and what the matrix must say about it."""

import torch
from lightning.pytorch import Callback


class NaiveGrokfast(Callback):
    """Filter after every backward, by out-of-place arithmetic, with state made once and never saved."""

    def __init__(self, alpha, lamb):
        self.alpha, self.lamb, self.emas = alpha, lamb, None

    @torch.no_grad()
    def on_after_backward(self, trainer, pl_module):
        grads = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        if self.emas is None:
            self.emas = dict(grads)
        for name, param in pl_module.named_parameters():
            if param.grad is not None:
                self.emas[name] = self.emas[name] * self.alpha + param.grad * (1 - self.alpha)
                param.grad = param.grad + self.emas[name] * self.lamb


MUST_FAIL = ["foreign_modules", "fp16_overflow", "accumulation", "resume_at_epoch_end", "resume_mid_epoch"]
