"""InterruptCheckpoint: stop a run with a checkpoint that resumes it."""

import signal
import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from forge_lightning.core.callback import ForgeCallback, compute_metrics, run_directory
from forge_lightning.core.device import HostCopy, reads_are_free

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptCheckpoint(ForgeCallback):
    """On Ctrl-C or SIGTERM, finish the optimizer step, write a checkpoint that resumes bit by bit, and stop.

    Hook: ``on_train_batch_end``, after all other callbacks: it moves to the end of their list. A checkpoint written
    inside a step would hold filters and metrics that are a step ahead of the weights. A second signal stops at once,
    without a checkpoint.

    Reads: signals. With several processes, one that any of them got counts for all.
    Changes: nothing.
    Logs: nothing.

    Cost: none; with several processes one small exchange a step, on accelerators read one step later: a validation that
    is due comes before.

    When to use: where a run may be stopped, by you or by a scheduler.

    When it does not help: no program can catch SIGKILL. A step that takes longer than the scheduler's grace period is
    killed before it ends.

    Args:
        dirpath: Folder of ``interrupted.ckpt``. Default: ``checkpoints`` in the run directory.
        name: Tells two instances apart.
    """

    namespace: ClassVar[str] = "interrupt_checkpoint"

    def __init__(self, dirpath: str | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.dirpath = dirpath
        self._received: int | None = None
        self._unread: HostCopy | None = None  # of the step before, on accelerators: how many processes got one
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._received, self._unread = None, None
        # A new list, because the trainer is walking the old one. Behind `ModelCheckpoint`, whose state is kept as well.
        others = [callback for callback in getattr(trainer, "callbacks", []) if callback is not self]
        vars(trainer)["callbacks"] = [*others, self]
        if threading.current_thread() is threading.main_thread():  # signals cannot be handled elsewhere
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        # Not between micro-batches of one step, where the gradients so far would be lost.
        device = trainer.strategy.root_device
        if trainer.world_size == 1 or reads_are_free(device):
            self.stop_if_asked(trainer)
            return
        received = torch.full((), float(self._received is not None), device=device)
        before, self._unread = self._unread, HostCopy({"asked": trainer.strategy.reduce(received, reduce_op="sum")})
        if before is not None and float(before.read()["asked"]) > 0:  # the same on all ranks
            self._stop(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """After a signal, write the checkpoint and end the run. Only between steps, and on all ranks alike.

        Raises:
            KeyboardInterrupt, SIGTERMException: After a signal.
        """
        if self._is_asked(trainer):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._write(trainer)
        raise SIGTERMException if self._received == signal.SIGTERM else KeyboardInterrupt

    def _is_asked(self, trainer: Trainer) -> bool:
        received = self._received is not None
        return trainer.strategy.reduce_boolean_decision(received, all=False) if trainer.world_size > 1 else received

    def _write(self, trainer: Trainer) -> None:
        path = Path(self.dirpath or (run_directory(trainer) or Path(trainer.default_root_dir)) / "checkpoints")
        path = trainer.strategy.broadcast(path)  # rank 0's, whose logger numbers the run
        trainer.save_checkpoint(path / "interrupted.ckpt")
        how = f"`--ckpt_path {path / 'interrupted.ckpt'}`"
        if (path.parent / "config.yaml").is_file() and path.name == "checkpoints":
            how = f"`forge-fit resume {path.parent}`, or {how}"
        rank_zero_info(f"\nWrote {path / 'interrupted.ckpt'}. Continue with {how}.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal behind the last step: the run ends by itself, and keeps what was promised."""
        steps, epochs = trainer.max_steps, trainer.max_epochs
        last = 0 <= steps <= trainer.global_step or 0 <= (-1 if epochs is None else epochs) <= trainer.current_epoch + 1
        compute_metrics(trainer)
        if (last or trainer.should_stop) and self._is_asked(trainer):
            self._write(trainer)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None:
            self.detach()
            raise KeyboardInterrupt
        self._received = number
        rank_zero_info("\nStopping after this optimizer step, with a checkpoint. Once more stops at once, without.")

    def detach(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
