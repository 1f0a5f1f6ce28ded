"""GeometryProbe: the intrinsic dimension of layers during training."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from forge_lightning.core.batch import PositionFields, field_of
from forge_lightning.core.callback import ForgeCallback, is_dev_run, loss_of_step
from forge_lightning.core.distributed import broadcast_from_rank_zero, sum_over_ranks
from forge_lightning.core.layers import select_layers
from forge_lightning.geometry.activation_tap import ActivationTap, Positions
from forge_lightning.geometry.change_detector import Change, ChangeDetector, LossHealth
from forge_lightning.geometry.estimators import check_estimators, quantities
from forge_lightning.geometry.held_out import HeldOutExamples, raise_error_of
from forge_lightning.geometry.layer_estimates import estimate_layers
from forge_lightning.geometry.pace import ProbePace

_MOST_EVENTS = 1000
_MOST_SHORT = 4  # steps to wait for one that has enough points
_SOURCES = ("auto", "batch", "train", "val")


class GeometryProbe(ForgeCallback):
    """Measure the intrinsic dimension of layers while training, and find its phase transitions.

    Hook: forward hooks on the layers copy ``num_points`` sampled rows of a training step (no extra forward pass); the
    estimates are made after the optimizer step. All points are of the same weights: points of several steps lie on
    clouds that the steps have moved apart. Where the batches of a step have fewer points, examples of the training data
    are run in evaluation mode, the same each time, once four steps in a row had too few.
    On several ranks each gives its share of the rows; the layers are shared out among the ranks; all ranks log the
    estimates of all rows. A compiled module stays whole; the step that is probed runs uncompiled.

    Reads: activations; the loss, to leave out of the search for transitions what a spike of the loss does.
    Changes: nothing.
    Logs: every ``every_n_steps``, for each layer: ``forge/geometry/<layer>/<estimator>`` and
    ``forge/geometry/<layer>/<estimator>_se`` (its standard error), ``forge/geometry/<layer>/num_points`` (different
    points), and at a transition ``forge/geometry/<layer>/change`` (confidence in [0, 1], negative for a fall);
    ``forge/geometry/overhead`` (share of the time between probes that one takes).

    Cost: thirteen layers every 50 steps, 0.1 % of a GPT-2-small step where training batches are probed, 1.4 % with
    forward passes of its own; ``num_points × D`` numbers for each layer while a probe is under way.

    When to use: to see on training data that generalisation is about to come, or that a layer collapses.

    When it does not help: dimension led generalisation on small algorithmic tasks, on training points. Nothing is known
    for the fine-tuning of language models. Transitions are looked for only once the loss, which must be positive, has
    fallen to a fifth of its first value; a module that returns no loss gets none.

    Args:
        layers: "all", or names and patterns of modules, and fractions of the depth (0 the first layer, 1 the last).
        every_n_steps: Optimizer steps between probes.
        num_points: Number of activations of each layer, over all ranks. Estimates compare only at the same number.
        estimators: "two_nn", "levina_bickel", "gride" (six scales), "correlation", "participation_ratio", "pca", or
            "skdim:MLE" and the like for an estimator of scikit-dimension.
        source: "batch" taps the training batches of one optimizer step, and takes the points that they have. "train"
            and "val" take examples drawn once from that data set, and run them in evaluation mode: an extra forward
            pass, of which nothing is logged, and after which buffers and random generators are as they were. "auto" is
            "batch" where a step has ``num_points``, else "train" where the module has a ``forward`` and its loader
            draws from a data set; else "batch", with a warning.
        positions: Which tokens count: "labelled" those with a label, "last" the last one, "all"; "auto" is "labelled"
            where the batch has labels for each token. Padding never counts.
        unique_tokens: Take each token at most once in a probe.
        mask: Key or position in the batch of the attention mask, ``(B, T)``; ``None`` for no mask.
        labels: Key or position of the labels.
        tokens: Key or position of the token numbers, for ``unique_tokens``.
        output: Key of the activation, if a layer returns a mapping.
        max_overhead: Largest share of training time. A costlier probe takes fewer points, down to 128, and comes less
            often, with a warning. ``None`` for no limit.
        change_estimator: The estimator whose transitions are reported; ``None`` for no transitions. Default:
            "levina_bickel" if it is among ``estimators``, otherwise the first.
        relative_change: Share by which a dimension must fall (or the rise that undoes it), in (0, 1).
        seed: Random seed for the sampling. The global random generator is left alone.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if a layer is not found; at the first probe, if a layer's output or the
            data cannot be probed.

    References:
        Ansuini et al., `Intrinsic dimension of data representations in deep neural networks
        <https://arxiv.org/abs/1905.12784>`_, 2019.
    """

    namespace: ClassVar[str] = "geometry"

    def __init__(
        self,
        layers: list[float | str] | str = "all",
        every_n_steps: int = 50,
        num_points: int = 1024,
        estimators: Sequence[str] = ("two_nn", "levina_bickel", "correlation", "participation_ratio"),
        source: Literal["auto", "batch", "train", "val"] = "auto",
        positions: Positions = "auto",
        unique_tokens: bool = False,
        mask: str | int | None = "attention_mask",
        labels: str | int = "labels",
        tokens: str | int = "input_ids",
        output: str | None = None,
        max_overhead: float | None = 0.02,
        change_estimator: str | None = "auto",
        relative_change: float = 0.25,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        for argument, value, least in (("every_n_steps", every_n_steps, 1), ("num_points", num_points, 3)):
            if value < least:
                raise ValueError(f"`GeometryProbe({argument}={value})` must be at least {least}.")
        for argument, chosen, allowed in (("source", source, _SOURCES), ("positions", positions, get_args(Positions))):
            if chosen not in allowed:
                raise ValueError(f"`GeometryProbe({argument}={chosen!r})` must be one of {list(allowed)}.")
        if max_overhead is not None and not max_overhead > 0:
            raise ValueError(f"`GeometryProbe(max_overhead={max_overhead})` must be above 0, or None.")
        if not estimators:
            raise ValueError("`GeometryProbe(estimators=[])` must name at least one.")
        check_estimators(estimators)
        self.layers, self.every_n_steps, self.num_points = layers, every_n_steps, num_points
        self.estimators, self.source, self.positions = list(estimators), source, positions
        self.unique_tokens, self.output = unique_tokens, output
        self.mask, self.labels, self.tokens = mask, labels, tokens
        self.max_overhead, self.relative_change, self.seed = max_overhead, relative_change, seed
        self._quantities = quantities(estimators)
        if change_estimator == "auto":
            change_estimator = "levina_bickel" if "levina_bickel" in self._quantities else self._quantities[0]
        if change_estimator is not None and change_estimator not in self._quantities:
            raise ValueError(
                f"`GeometryProbe(change_estimator={change_estimator!r})` must be one of {self._quantities}."
            )
        self.change_estimator = change_estimator
        ChangeDetector(relative_change)  # refuses it here, where it was written
        self._pace = ProbePace(every_n_steps, max_overhead)
        self._held_out = HeldOutExamples(source, seed, self._fields)
        self._detectors: dict[str, ChangeDetector] = {}
        self._health = LossHealth()
        self._events: list[dict[str, Any]] = []
        self._tap: ActivationTap | None = None
        self._last_loss: Tensor | None = None
        self._collecting = False
        self._taps_batches = source in ("auto", "batch")
        self._resumed_taps: tuple[bool, int] | None = None
        self._steps_short = 0  # steps in a row that had too few points
        self._points = num_points  # fewer where probes are costly

    @property
    def events(self) -> list[dict[str, Any]]:
        """Transitions, oldest first: step, layer, estimator, direction, level before and after, confidence."""
        return list(self._events)

    @property
    def layer_names(self) -> list[str]:
        """The layers that are probed, from input to output; known while fitting."""
        return [] if self._tap is None else list(self._tap.modules)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        try:
            modules = select_layers(pl_module, self.layers)
        except ValueError as error:
            raise MisconfigurationException(f"`GeometryProbe(layers={self.layers!r})`: {error}") from None
        if not modules:
            raise MisconfigurationException(f"`GeometryProbe`: {type(pl_module).__name__} has no layers to probe.")
        self._tap = ActivationTap(modules, self.positions, self.unique_tokens, self.output)
        self._tap.attach()
        self._last_loss = None
        self._pace.start_fit()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        taps, short = self._resumed_taps or (True, 0)
        self._taps_batches = self.source == "batch" or (self.source == "auto" and taps)
        self._steps_short, self._resumed_taps = short, None
        pace = self._pace
        if pace.next_due > trainer.global_step + pace.interval:  # a second fit counts its steps from 0 again
            pace.next_due = trainer.global_step + self.every_n_steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._tap is None or not self._taps_batches or not self._is_due(trainer):
            return
        self._collecting = True
        if self._tap.num_rows() >= self._share(trainer):
            return  # from this step's earlier batches
        self._tap.start(self._fields(batch), self._share(trainer), self._seed_of(trainer, batch_idx))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._tap is not None:
            self._tap.stop()  # recomputed activations are not looked at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tap is None:
            return
        self._tap.stop()
        raise_error_of(self._tap)
        loss = loss_of_step(trainer, outputs)
        if loss is not None:
            self._last_loss = loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._tap is None:
            return
        self._pace.end_step()
        if not self._taps_batches:
            if not self._is_due(trainer) or (self.source == "val" and trainer.val_dataloaders is None):
                return  # to make validation data earlier than it is made would draw from the global random stream
            self._collecting = True
            self._held_out.run(trainer, pl_module, self._tap, self._share(trainer))
        if not self._collecting:
            return
        if self._taps_batches and not self._has_enough(trainer) and not is_dev_run(trainer):
            self._steps_short += 1
            if self._steps_short < _MOST_SHORT:
                self._tap.clear()  # another step may have more, as behind the last of an epoch
                return
            if self.source == "auto":
                self._run_for_more(trainer, pl_module)
        self._steps_short = 0
        self._probe(trainer, pl_module)

    def _has_enough(self, trainer: Trainer) -> bool:
        """Whether the step has ``num_points`` points, on all ranks."""
        assert self._tap is not None
        enough = self._tap.num_rows() >= self._share(trainer)
        return trainer.strategy.reduce_boolean_decision(enough, all=True) if trainer.world_size > 1 else enough

    def _run_for_more(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on probe examples of the data set instead of the step's points, if they can be run."""
        assert self._tap is not None
        tapped, seconds = self._tap.rows, self._tap.seconds
        self._tap.clear()
        why = self._held_out.why_not(trainer, pl_module)
        if not why:
            try:
                self._held_out.run(trainer, pl_module, self._tap, self._share(trainer))
            except MisconfigurationException as error:
                why = str(error)
            except Exception as error:  # of the user's `forward` or data set, which fitting may never call in this way
                why = f"`{type(pl_module).__name__}` fails on them: {type(error).__name__}: {error}."
        missing = [name for name, parts in tapped.items() if parts and not self._tap.rows[name]]
        if missing and not why:
            why = f"`forward` does not call {missing[0]!r}."
        failed = bool(why)
        if trainer.world_size > 1:
            failed = trainer.strategy.reduce_boolean_decision(failed, all=False)
        if not failed:
            self._taps_batches = False
            return
        self._tap.clear()
        self._tap.error = None
        self._tap.rows, self._tap.seconds = tapped, seconds
        self.warn_once(
            f"a step has {self._tap.num_rows()} points on this rank, and `num_points` asks for {self._share(trainer)};"
            " estimates of few points are too low, and comparable only at the same number. Training examples cannot be"
            f" run for more: {why or 'another rank failed to run them.'} To silence this, set"
            " `source='batch'` or a smaller `num_points`.",
            key="few points",
        )

    def reset(self) -> None:
        super().reset()
        self._pace = ProbePace(self.every_n_steps, self.max_overhead)
        self._detectors, self._health, self._events = {}, LossHealth(), []
        self._points = self.num_points

    def state_dict(self) -> dict[str, Any]:
        return {
            "next_due": self._pace.next_due,
            "interval": self._pace.interval,
            "points": self._points,
            "taps_batches": self._taps_batches,
            "steps_short": self._steps_short,
            "health": self._health.state_dict(),
            "detectors": {layer: detector.state_dict() for layer, detector in self._detectors.items()},
            "events": [dict(event) for event in self._events],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.next_due, self._pace.interval = state_dict["next_due"], state_dict["interval"]
        thinned = self.num_points if self.max_overhead is None else state_dict.get("points", self.num_points)
        self._points = min(self.num_points, thinned)
        self._resumed_taps = (state_dict["taps_batches"], state_dict["steps_short"])
        self._health.load_state_dict(state_dict["health"])
        self._detectors = {}
        for layer, saved in state_dict["detectors"].items():
            self._detectors[layer] = ChangeDetector(self.relative_change)
            self._detectors[layer].load_state_dict(saved)
        self._events = [dict(event) for event in state_dict["events"]]

    def detach(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap = None
        self._collecting = False
        self._held_out.clear()

    def _is_due(self, trainer: Trainer) -> bool:
        done = trainer.global_step + self._taps_batches  # the step under way counts
        return self._collecting or done >= self._pace.next_due or is_dev_run(trainer)

    def _share(self, trainer: Trainer) -> int:
        """Number of points from this rank."""
        return math.ceil(self._points / trainer.world_size)

    def _seed_of(self, trainer: Trainer, batch_idx: int) -> int:
        parts = (self.seed, trainer.global_step, batch_idx, trainer.global_rank)
        return hash(parts) % 2**63  # hashes of integers are the same in every process

    def _fields(self, batch: Any) -> PositionFields:
        return PositionFields(*(field_of(batch, key) for key in (self.mask, self.labels, self.tokens)))

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._tap is not None
        start = time.perf_counter()
        try:
            share = self._share(trainer)
            rows = [torch.cat(parts)[:share] if parts else None for parts in self._tap.rows.values()]
            estimates = estimate_layers(trainer, rows, self.layer_names, self.estimators, share, self._warn_here)
        finally:
            copied = self._tap.seconds
            self._tap.clear()
            self._collecting = False
        loss = torch.tensor(math.nan) if self._last_loss is None else self._last_loss
        loss = sum_over_ranks(trainer, loss) / trainer.world_size
        metrics = self._read(estimates)
        metrics |= self._look_for_changes(trainer, metrics, float(loss))
        self._pace.probe_seconds.append(copied + time.perf_counter() - start)
        broadcast = partial(broadcast_from_rank_zero, trainer)
        overhead = broadcast(self._pace.overhead())
        self._thin_points(broadcast)
        if warning := self._pace.plan_next(trainer.global_step, broadcast):
            rank_zero_warn(warning)
        self.log_metrics(trainer, metrics | {"overhead": overhead})
        self._pace.end_probe()

    def _thin_points(self, broadcast: Callable[[float], float]) -> None:
        """Take fewer points from here on, once, where probes would hardly ever come otherwise."""
        points = self._points if self._points < self.num_points else self._pace.fewer_points(self._points, broadcast)
        if points == self._points:
            return
        rank_zero_warn(
            f"GeometryProbe: a probe takes {1000 * min(self._pace.probe_seconds):.3g} ms, too long for steps of"
            f" {1000 * median(self._pace.step_seconds):.3g} ms and `max_overhead={self.max_overhead}`. It takes"
            f" {points} points from here on, not {self._points}. Estimates compare only at the same number."
        )
        self._points = points
        self._detectors = {}  # which compare levels
        self._pace.forget_probes()

    def _read(self, table: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        count = len(self._quantities)
        for layer, row in zip(self.layer_names, table.tolist(), strict=True):
            for column, quantity in enumerate(self._quantities):
                metrics[f"{layer}/{quantity}"] = row[column]
                if not quantity.startswith("skdim:"):
                    metrics[f"{layer}/{quantity}_se"] = row[count + column]
            metrics[f"{layer}/num_points"] = row[-1]
        return metrics

    def _look_for_changes(self, trainer: Trainer, metrics: Mapping[str, float], loss: float) -> dict[str, float]:
        healthy = self._health.update(loss)
        found: dict[str, float] = {}
        if self.change_estimator is None:
            return found
        for layer in self.layer_names:
            detector = self._detectors.setdefault(layer, ChangeDetector(self.relative_change))
            change = detector.update(trainer.global_step, metrics[f"{layer}/{self.change_estimator}"], healthy)
            if change is not None:
                found[f"{layer}/change"] = change.confidence * (-1 if change.direction == "down" else 1)
                self._events = [*self._events, self._event(layer, change)][-_MOST_EVENTS:]
        return found

    def _event(self, layer: str, change: Change) -> dict[str, Any]:
        return {
            "step": change.step,
            "kind": "geometry",
            "layer": layer,
            "last_layer": layer == self.layer_names[-1],
            "probe": self.name,
            "estimator": self.change_estimator,
            "direction": change.direction,
            "before": change.before,
            "after": change.after,
            "confidence": change.confidence,
        }

    def _warn_here(self, message: str, key: str) -> None:
        """Warn on the rank that measured, once for each key: the layers are shared out among the ranks."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(f"GeometryProbe: {message}. NaN is logged. This is said once.", stacklevel=2)
