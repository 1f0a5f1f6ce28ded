"""RNGState: random generators that continue after a resume."""

import random
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from forge_lightning.core.callback import ForgeCallback


class RNGState(ForgeCallback):
    """Keep the random generators in every checkpoint, so that dropout and noise continue bit by bit after a resume.

    Hook: saving and loading of checkpoints. Lightning's own checkpoints leave random generators out.

    Reads: the generators of Python, NumPy, and torch on the CPU and on every CUDA device, of each process.
    Changes: nothing in a run that is not a resume. On a resume, the generators, to what they were.
    Logs: nothing.

    Cost: a few KiB in each checkpoint.

    When to use: always, where a run may be resumed.

    When it does not help: a loader that keeps no state begins its epoch anew (use `StatefulDataLoader`). A resume with
    a different world size leaves the generators as they are.

    Args:
        name: Tells two instances apart.
    """

    namespace: ClassVar[str] = "rng_state"

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._restored: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        epoch_done = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        checkpoint[self.state_key] = {"epoch_done": epoch_done, "ranks": _gather(_capture(), trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(self.state_key)
        if saved is None or len(saved["ranks"]) != trainer.world_size:
            return
        if saved["epoch_done"]:
            _restore(saved["ranks"][trainer.global_rank])  # what a loader draws to begin the next epoch comes after
        else:
            self._restored = [saved["ranks"][trainer.global_rank]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # What a loader draws to begin this epoch had been drawn before the checkpoint.
        if self._restored:
            _restore(self._restored.pop())


def _capture() -> dict[str, Any]:
    version, keys, gauss = random.getstate()
    kind, words, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(keys), gauss],
        "numpy": [str(kind), torch.tensor(np.asarray(words, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _gather(state: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states
