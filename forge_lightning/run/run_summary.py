"""RunSummary: the results of a run, on the terminal, as JSON and as a picture."""

import json
import math
import time
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from forge_lightning.core.callback import ForgeCallback, is_a, is_dev_run, run_directory
from forge_lightning.core.metric_names import VAL_LOSS, VAL_SUCCESS
from forge_lightning.reports.learning_curves import plot_learning_curves, read_metrics


class RunSummary(ForgeCallback):
    """Write ``summary.json`` and ``learning_curves.png`` into the run directory, and print a summary, as a fit ends.

    Hook: the end of every validation, and of the fit; also of one that failed or was interrupted. The picture is drawn
    from what Lightning's ``CSVLogger`` wrote, and is missing without one; that of a resumed run begins where it was
    resumed, and says so. W&B and TensorBoard get picture and summary too.
    In ``fast_dev_run``, and where a run failed before training began, nothing is written.

    Reads: every logged metric; ``monitor`` after each validation.
    Changes: nothing.
    Logs: nothing.

    Cost: none while training.

    When to use: always.

    When it does not help: a run that is killed ends without a summary. `forge-fit analyze` reads what it left.

    Args:
        monitor: Validation metric whose best value is reported, and its first step at ``threshold`` or better.
        threshold: That value. ``None`` reports no such step.
        mode: "max" if larger is better, "min" if smaller.
        name: Tells two instances apart.

    Raises:
        ValueError: If ``mode`` is neither.
    """

    namespace: ClassVar[str] = "run_summary"

    def __init__(
        self,
        monitor: str = "val/accuracy",
        threshold: float | None = None,
        mode: str = "max",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if mode not in ("max", "min"):
            raise ValueError(f"`RunSummary(mode={mode!r})` must be 'max' or 'min'.")
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.reached_at: int | None = None
        self._best: float | None = None
        self._best_at: int | None = None
        self._began_at: int | None = None  # step at which training began
        self._trained = self._validated = False
        self._seconds_before = {"wall": 0.0, "cpu": 0.0}
        self._started = (time.monotonic(), time.process_time())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._began_at, self._trained, self._validated = None, False, False
        self._started = (time.monotonic(), time.process_time())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began_at, self._trained = trainer.global_step, True
        self._warn_of_no_validation(trainer)

    def _warn_of_no_validation(self, trainer: Trainer) -> None:
        """Say at the start that what is monitored will not be measured."""
        first, steps = float(trainer.val_check_batch or 0), trainer.max_steps
        if not self.monitor.startswith("val") or steps < 0 or is_dev_run(trainer) or not trainer.enable_validation:
            return
        if trainer.check_val_every_n_epoch is not None:
            first += (trainer.check_val_every_n_epoch - 1) * trainer.num_training_batches
        left = (steps - trainer.global_step) * trainer.accumulate_grad_batches
        if first > left and self._best is None:
            self.warn_once(
                f"no validation will run: the first is due after {first:,.0f} batches, and the run ends after"
                f" {left:,.0f}. Lower `val_check_interval` or `check_val_every_n_epoch`."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validated = True
        name = self._name_in(trainer.callback_metrics)
        if name not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[name])
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (self._best is None or sign * value > sign * self._best):
            self._best, self._best_at = value, trainer.global_step
        reached = self.threshold is not None and sign * value >= sign * self.threshold
        if reached and self.reached_at is None:
            self.reached_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.reporting("the summary"):
            self._finish(trainer, "finished")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained and not is_dev_run(trainer):
            print(f"Nothing was trained: at step {trainer.global_step:,} this run is at its end already.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit)
        with self.reporting("the summary"):  # what ended the run is what is to be seen
            self._finish(trainer, "interrupted" if interrupted else f"failed: {type(exception).__name__}: {exception}")

    def reset(self) -> None:
        super().reset()
        self.reached_at = self._best = self._best_at = None
        self._seconds_before = {"wall": 0.0, "cpu": 0.0}

    def seconds(self) -> dict[str, float]:
        """Wall and CPU seconds of the fit so far, earlier parts of a resumed one included."""
        wall, cpu = time.monotonic() - self._started[0], time.process_time() - self._started[1]
        return {"wall": self._seconds_before["wall"] + wall, "cpu": self._seconds_before["cpu"] + cpu}

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self._best, "best_at": self._best_at}
        return {"reached_at": self.reached_at, **best, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached_at = state_dict["reached_at"]
        self._best, self._best_at = state_dict["best"], state_dict.get("best_at")
        self._seconds_before = dict(state_dict["seconds"])

    @rank_zero_only
    def _finish(self, trainer: Trainer, status: str) -> None:
        if is_dev_run(trainer) or self._began_at is None:
            return
        directory = run_directory(trainer)
        summary = self._summary(trainer, status, directory)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            loggers: list[Any] = trainer.loggers
            for logger in loggers:
                if is_a(logger, "CSVLogger") and logger.experiment.metrics:
                    logger.save()
            metrics_path = directory / "metrics.csv"
            if metrics_path.exists():
                self._draw(summary, directory, metrics_path)
            with self.reporting("the summary in loggers"):
                _hand_on(loggers, summary, directory / "learning_curves.png")
        self._print(summary)
        self._began_at = None

    def _draw(self, summary: Mapping[str, Any], directory: Path, metrics_path: Path) -> None:
        with self.reporting("the picture of the learning curves"):
            marks = {} if self.threshold is None else {summary["monitor"]: self.threshold}
            title = f"{directory.parent.name}/{directory.name}" if directory.parent.name else directory.name
            metrics = read_metrics(metrics_path)
            begins = min((steps[0] + 1 for steps, _ in metrics.values()), default=0)
            if 0 < (self._began_at or 0) < begins:
                title += f", resumed after step {self._began_at:,}"
            if not plot_learning_curves(metrics, directory / "learning_curves.png", title=title, marks=marks):
                self.warn_once("no metric is called `train/...` or `val/...`, and there are no learning curves.")

    def _summary(self, trainer: Trainer, status: str, directory: Path | None) -> dict[str, Any]:
        checkpoints: list[Any] = [c for c in trainer.checkpoint_callbacks if is_a(c, "ModelCheckpoint")]
        best = next((c.best_model_path for c in checkpoints if c.monitor is not None), "")
        written = [
            (c._last_global_step_saved, c.last_model_path or c._last_checkpoint_saved or c.best_model_path)
            for c in checkpoints
        ]
        last_step, last = max((found for found in written if found[1]), key=lambda found: found[0], default=(0, ""))
        metrics = {key: _json_number(float(value)) for key, value in trainer.callback_metrics.items()}
        return {
            "status": status,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": {key: round(value, 2) for key, value in self.seconds().items()},
            "monitor": self._name_in(metrics),
            "threshold": self.threshold,
            "steps_to_threshold": self.reached_at,
            "best": self._best,
            "best_step": self._best_at,
            "metrics": metrics,
            "best_checkpoint": best or None,
            "last_checkpoint": last or None,
            "last_checkpoint_step": last_step or None,  # 0 where all were written before a resume
            "run": None if directory is None else str(directory),
        }

    def _name_in(self, metrics: Mapping[str, Any]) -> str:
        """What is monitored, as the module calls it: ``val_loss`` is ``val/loss``."""
        names = next((names for names in (VAL_LOSS, VAL_SUCCESS) if self.monitor in names), ())
        return next((name for name in (self.monitor, *names) if name in metrics), self.monitor)

    def _print(self, summary: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        status = ": ".join(summary["status"].split(": ")[:2])  # without the error, which is shown where it was raised
        table = Table(title=Text(f"Run {status}", style="table.title"), show_header=False, title_justify="left")
        monitor = summary["monitor"]
        if self.threshold is not None:
            sign = "≥" if self.mode == "max" else "≤"
            steps = summary["steps_to_threshold"]
            table.add_row(
                f"steps to {monitor} {sign} {self.threshold:g}", "not reached" if steps is None else f"{steps:,}"
            )
        last = summary["metrics"].get(monitor)
        close = get_close_matches(monitor, summary["metrics"], n=2, cutoff=0.5)
        missing = "not logged" + (f"; close: {', '.join(close)}" if close else "")
        if monitor.startswith("val") and not self._validated:
            missing = "not measured: no validation has run"
        table.add_row(f"last {monitor}", missing if last is None else f"{last:.4g}")
        if self._best is not None:
            step = "" if self._best_at is None else f" at step {self._best_at:,}"
            table.add_row(f"best {monitor}", f"{self._best:.4g}{step}")
        table.add_row("steps", f"{summary['steps']:,}")
        table.add_row("time", f"{summary['seconds']['wall']:.1f} s ({summary['seconds']['cpu']:.1f} s CPU)")
        saved = summary["last_checkpoint_step"]
        if saved is not None and saved < summary["steps"] and status == "finished":  # else one may still be written
            name = Path(summary["last_checkpoint"]).name
            table.add_row("last checkpoint", Text(f"{name}, {summary['steps'] - saved:,} steps before the end"))
        if summary["run"]:
            table.add_row("run", Text(summary["run"]))
        Console().print(table)


def _hand_on(loggers: list[Any], summary: Mapping[str, Any], picture: Path) -> None:
    """Give the picture and the table to W&B and TensorBoard, where a run has them."""
    rows = [(summary["monitor"], summary["metrics"].get(summary["monitor"])), ("best", summary["best"])]
    rows += [("best step", summary["best_step"]), ("steps", summary["steps"]), ("status", summary["status"])]
    for logger in loggers:
        if is_a(logger, "WandbLogger"):
            logger.experiment.summary.update({f"summary/{name.replace('/', '_')}": value for name, value in rows})
            if picture.exists():
                logger.log_image("learning_curves", [str(picture)])
        elif is_a(logger, "TensorBoardLogger"):
            lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
            logger.experiment.add_text("summary", "\n".join(lines), summary["steps"])
            if picture.exists():
                from matplotlib.image import imread

                logger.experiment.add_image("learning_curves", imread(picture), summary["steps"], dataformats="HWC")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
