"""Learning-rate schedules with a warm-up, over as many steps as a Trainer will run."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forge_lightning.core.validate import require


class WarmupSchedule(LRScheduler, ABC):
    """A rise to the optimizer's learning rates on a line, then a fall that a subclass says.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup: Steps of the rise, or below 1 their share of all steps. The first step has one part of them of the
            learning rate, and the last of them all of it.
        total_steps: Optimizer steps of the run. Default: as many as the Trainer will make, which `ForgeModule` and
            `AlgorithmicModule` find out.
        end: Learning rate at the end, as a share of the optimizer's, in [0, 1].
        last_epoch: Steps done before, less 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | float = 0.05,
        total_steps: int | None = None,
        end: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        owner = type(self).__name__
        require(owner, warmup >= 0, "warmup", warmup, "at least 0: steps, or a share below 1")
        require(owner, total_steps is None or total_steps >= 1, "total_steps", total_steps, "at least 1")
        require(owner, 0 <= end <= 1, "end", end, "in [0, 1]")
        self.warmup, self.total_steps, self.end = warmup, total_steps, end
        super().__init__(optimizer, last_epoch)

    def bind(self, total_steps: float) -> None:
        """Take the number of optimizer steps of the run, where none was given. Before the first step.

        Raises:
            ValueError: If it is not known.
        """
        if self.total_steps is not None:
            return
        if not math.isfinite(total_steps) or total_steps < 1:
            raise ValueError(
                f"`{type(self).__name__}`: the Trainer does not know how many steps it will make. Set `max_steps`, or"
                " `total_steps` of the schedule."
            )
        self.total_steps = int(total_steps)
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group, for the step that comes."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def factor(self, step: int) -> float:
        """Share of the learning rate.

        Args:
            step: Optimizer steps done before, at least 0.
        """
        if self.total_steps is None:
            return 1.0
        rise = self.warmup if self.warmup >= 1 else round(self.warmup * self.total_steps)
        if step < rise:
            return (step + 1) / rise
        share = min(1.0, (step - rise) / max(1.0, self.total_steps - rise))
        return self.end + (1 - self.end) * self._fall(share)

    @abstractmethod
    def _fall(self, share: float) -> float:
        """What is left of the way to ``end``, by the share of the steps behind the rise, in [0, 1]."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, with the warm-up, length and end that this schedule was made with."""
        kept = {name: getattr(self, name) for name in ("warmup", "total_steps", "end")}
        super().load_state_dict(state_dict | kept)


class WarmupCosine(WarmupSchedule):
    """A warm-up on a line, then half a cosine down to ``end``.

    In YAML, for a tenth of the run::

        lr_scheduler: {class_path: WarmupCosine, init_args: {warmup: 0.1}}

    In a LightningModule of yours ``configure_optimizers`` gives it the length of the run, and has it stepped after
    every optimizer step::

        schedule = WarmupCosine(optimizer, warmup=100, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    References:
        Loshchilov and Hutter, `SGDR: Stochastic Gradient Descent with Warm Restarts <https://arxiv.org/abs/1608.03983>`_,
        2017.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, warmup=2, total_steps=6)
        >>> [round(schedule.factor(step), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def _fall(self, share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2


class WarmupLinear(WarmupSchedule):
    """A warm-up on a line, then a line down to ``end``. See `WarmupCosine` for its use.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = WarmupLinear(optimizer, warmup=0.5, total_steps=4, end=0.1)
        >>> [round(schedule.factor(step), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """

    def _fall(self, share: float) -> float:
        return 1 - share
