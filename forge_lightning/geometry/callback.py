"""GeometryProbe: the dimension of what layers put out, while training."""

import inspect
import math
import random
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from statistics import median
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from forge_lightning.core.batch import PositionFields, field_of
from forge_lightning.core.callback import ForgeCallback, is_dev_run, loss_of_step, overrides
from forge_lightning.core.distributed import sum_over_ranks
from forge_lightning.core.kept_state import buffers_kept, generators_kept
from forge_lightning.core.layers import select_layers
from forge_lightning.core.protocols import SupportsProbe
from forge_lightning.core.step_log import muted
from forge_lightning.geometry.activation_tap import ActivationTap, Positions
from forge_lightning.geometry.change_detector import Change, ChangeDetector, LossHealth
from forge_lightning.geometry.estimators import check_estimators, estimate, quantities

_MOST_EVENTS = 1000
_MOST_BATCHES = 64  # of a held-out probe
_MOST_KEPT = 1 << 26  # bytes of batches to cache; larger ones are loaded again for each probe
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

    Cost: 0.1 % of a GPT-2-small step, thirteen layers every 50 steps; ``num_points × D`` numbers for each layer while a
    probe is under way.

    When to use: to see on training data that generalisation is about to come, or that a layer collapses.

    When it does not help: dimension led generalisation on small algorithmic tasks, on training points. Nothing is known
    for the fine-tuning of language models. Transitions are looked for only once the loss, which must be positive, has
    fallen to a fifth of its first value; a module that returns no loss gets none.

    Args:
        layers: "all", or names and patterns of modules, and fractions of the depth (0 the first layer, 1 the last).
        every_n_steps: Optimizer steps between probes.
        num_points: Rows of each layer, over all ranks. Estimates compare only at the same number.
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
        output: Key of the activation, where a layer puts out a mapping.
        max_overhead: Largest share of training time; a costlier probe comes less often, with a warning. ``None`` for no
            limit.
        change_estimator: The estimator whose transitions are looked for; ``None`` for none. Default:
            "levina_bickel" where it is among ``estimators``, else the first.
        relative_change: Share by which a dimension must fall (or the rise that undoes it), in (0, 1).
        seed: Seed of the sampling, which leaves the global random stream alone.
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
        self._interval = every_n_steps
        self._next_due = every_n_steps
        self._detectors: dict[str, ChangeDetector] = {}
        self._health = LossHealth()
        self._events: list[dict[str, Any]] = []
        self._tap: ActivationTap | None = None
        self._last_loss: Tensor | None
        self._taps_batches = source in ("auto", "batch")
        self._resumed_taps: tuple[bool, int] | None = None
        self._steps_short = 0  # steps in a row that had too few points
        self._examples: list[Any] | None = None  # batches of a held-out probe
        self._reset_clock()

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
        self._reset_clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        taps, short = self._resumed_taps or (True, 0)
        self._taps_batches = self.source == "batch" or (self.source == "auto" and taps)
        self._steps_short, self._resumed_taps = short, None
        if self._next_due > trainer.global_step + self._interval:  # a second fit counts its steps from 0 again
            self._next_due = trainer.global_step + self.every_n_steps

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
        self._refuse_what_cannot_be_tapped()
        loss = loss_of_step(trainer, outputs)
        if loss is not None:
            self._last_loss = loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._tap is None:
            return
        self._measure_step()
        if not self._taps_batches:
            if not self._is_due(trainer) or (self.source == "val" and trainer.val_dataloaders is None):
                return  # to make validation data earlier than it is made would draw from the global random stream
            self._collecting = True
            self._run_held_out(trainer, pl_module)
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
        """Whether the step has as many points as were asked for, on all ranks."""
        assert self._tap is not None
        enough = self._tap.num_rows() >= self._share(trainer)
        return trainer.strategy.reduce_boolean_decision(enough, all=True) if trainer.world_size > 1 else enough

    def _run_for_more(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take examples of the data set in place of the step's points, from now on, where they can be run."""
        assert self._tap is not None
        tapped, seconds = self._tap.rows, self._tap.seconds
        self._tap.clear()
        why = self._why_not_run(trainer, pl_module)
        if not why:
            try:
                self._run_held_out(trainer, pl_module)
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
            f"a step has {self._tap.num_rows()} points on this process, and {self._share(trainer)} were asked for;"
            " estimates of few points read low, and compare only with those of as many. Examples of the training data"
            f" cannot be run for more: {why or 'another process failed at them.'} To silence this, set"
            " `source='batch'` or a smaller `num_points`.",
            key="few points",
        )

    def _why_not_run(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Why examples of the training data cannot be run; empty where they can."""
        loader: Any = trainer.train_dataloader
        loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
        sampler = getattr(loader, "sampler", None)
        usual = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return f"the training data is {type(loader).__name__}, which does not draw from a data set."
        if not isinstance(sampler, usual) or getattr(sampler, "makes_examples", False):
            return f"its sampler, {type(sampler).__name__}, may not draw by number."
        if not isinstance(pl_module, SupportsProbe) and not overrides(pl_module, "forward"):
            return f"{type(pl_module).__name__} has no `forward` or `probe_forward(batch)`."
        return ""

    def reset(self) -> None:
        super().reset()
        self._interval = self._next_due = self.every_n_steps
        self._detectors, self._health, self._events = {}, LossHealth(), []

    def state_dict(self) -> dict[str, Any]:
        return {
            "next_due": self._next_due,
            "interval": self._interval,
            "taps_batches": self._taps_batches,
            "steps_short": self._steps_short,
            "health": self._health.state_dict(),
            "detectors": {layer: detector.state_dict() for layer, detector in self._detectors.items()},
            "events": [dict(event) for event in self._events],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next_due, self._interval = state_dict["next_due"], state_dict["interval"]
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
        self._collecting, self._examples = False, None

    def _refuse_what_cannot_be_tapped(self) -> None:
        assert self._tap is not None
        if self._tap.error is not None:
            raise MisconfigurationException(f"`GeometryProbe`: {self._tap.error}")

    def _reset_clock(self) -> None:
        self._collecting = False
        self._step_before = 0
        self._last_loss = None
        self._ended: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._probe_seconds: deque[float] = deque(maxlen=3)

    def _is_due(self, trainer: Trainer) -> bool:
        done = trainer.global_step + self._taps_batches  # the step under way counts
        return self._collecting or done >= self._next_due or is_dev_run(trainer)

    def _share(self, trainer: Trainer) -> int:
        """Rows that this rank gives."""
        return math.ceil(self.num_points / trainer.world_size)

    def _seed_of(self, trainer: Trainer, batch_idx: int) -> int:
        parts = (self.seed, trainer.global_step, batch_idx, trainer.global_rank)
        return hash(parts) % 2**63  # of integers: the same in every process

    def _fields(self, batch: Any) -> PositionFields:
        return PositionFields(*(field_of(batch, key) for key in (self.mask, self.labels, self.tokens)))

    def _measure_step(self) -> None:
        now = time.perf_counter()
        if self._ended is not None:
            self._step_seconds.append(now - self._ended)
        self._ended = now

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._tap is not None
        start = time.perf_counter()
        try:
            share = self._share(trainer)
            rows = [torch.cat(parts)[:share] if parts else None for parts in self._tap.rows.values()]
            estimates = self._estimate(trainer, rows, pl_module.device)
        finally:
            copied = self._tap.seconds
            self._tap.clear()
            self._collecting = False
        loss = torch.tensor(math.nan) if self._last_loss is None else self._last_loss
        loss = sum_over_ranks(trainer, loss) / trainer.world_size
        metrics = self._read(estimates)
        metrics |= self._look_for_changes(trainer, metrics, float(loss))
        self._probe_seconds.append(copied + time.perf_counter() - start)
        self._plan_next(trainer)
        self.log_metrics(trainer, metrics | {"overhead": self._overhead(self._interval)})
        self._ended = time.perf_counter()  # the next step's time is its own

    def _estimate(self, trainer: Trainer, rows: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """``(layers, 2 quantities + 1)``: values, standard errors, number of points."""
        rank, world = trainer.global_rank, trainer.world_size
        width = 2 * len(self._quantities) + 1
        table = torch.zeros(len(rows), width, dtype=torch.float64)
        gathered = [r if r is None else r.float() for r in rows] if world == 1 else self._gather(trainer, rows, device)
        for index in range(rank, len(rows), world):
            points, name = gathered[index], self.layer_names[index]
            if points is None:
                self._warn_here(f"layer {name!r} was not called in the step that was probed", "uncalled")
                table[index] = math.nan
                continue
            found = estimate(points, self.estimators)
            for column, quantity in enumerate(self._quantities):
                result = found[quantity]
                table[index, column], table[index, len(self._quantities) + column] = result[:2]
                if result.reason:
                    self._warn_here(f"no {quantity} of layer {name!r}: {result.reason}", quantity)
                table[index, -1] = result.num_points
        return sum_over_ranks(trainer, table)

    def _gather(self, trainer: Trainer, rows: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
        """Everybody's rows of every layer, in one exchange; ranks may have different numbers of them."""
        share = self._share(trainer)
        shapes = torch.tensor([[0, 0] if r is None else [min(len(r), share), r.shape[1]] for r in rows], device=device)
        every = trainer.strategy.all_gather(shapes).cpu()  # (W, L, 2)
        widths = every[:, :, 1].amax(0).tolist()
        if bool(((every[:, :, 1] > 0) & (every[:, :, 1] != every[:, :, 1].amax(0))).any()):
            raise MisconfigurationException(
                "`GeometryProbe`: a layer has another width on another rank, as with inputs of different sizes. Name"
                " layers of fixed width."
            )
        flat = torch.zeros(share * sum(widths), dtype=torch.float32, device=device)
        offset = 0
        for row, width in zip(rows, widths, strict=True):
            if row is not None:
                part = row[:share].float().flatten()
                flat[offset : offset + len(part)] = part
            offset += share * width
        everything = trainer.strategy.all_gather(flat)
        gathered: list[Tensor | None] = []
        offset = 0
        for index, width in enumerate(widths):
            parts = []
            for rank in range(trainer.world_size):
                count = int(every[rank, index, 0])
                parts.append(everything[rank, offset : offset + count * width].view(count, width or 1))
            offset += share * width
            gathered.append(torch.cat(parts) if width else None)
        return gathered

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

    def _overhead(self, interval: int) -> float:
        if not self._step_seconds:
            return math.nan
        return min(self._probe_seconds) / (interval * median(self._step_seconds))

    def _plan_next(self, trainer: Trainer) -> None:
        """The next multiple of the interval, which a costly probe stretches; rank 0's clock decides."""
        interval = self._interval  # until two probes were timed, as before a resume
        if self.max_overhead is not None and len(self._probe_seconds) > 1 and self._step_seconds:
            interval = self.every_n_steps
            share = self._overhead(interval)
            if trainer.world_size > 1:
                share = trainer.strategy.broadcast(share)
            interval *= max(1, math.ceil(share / self.max_overhead))
            if interval > self._interval and interval > self.every_n_steps:
                rank_zero_warn(
                    f"GeometryProbe: a probe takes {1000 * min(self._probe_seconds):.3g} ms and a step"
                    f" {1000 * median(self._step_seconds):.3g} ms. It comes every {interval} steps from here on, not"
                    f" every {self.every_n_steps}, to stay within `max_overhead={self.max_overhead}`. Probe fewer"
                    " layers or points, or raise `max_overhead`."
                )
        self._interval = interval
        self._next_due = (trainer.global_step // self.every_n_steps) * self.every_n_steps + interval

    def _warn_here(self, message: str, key: str) -> None:
        """Warn on the rank that measured, once for each key: the layers are shared out among the ranks."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(f"GeometryProbe: {message}. NaN is logged. This is said once.", stacklevel=2)

    def _run_held_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take examples that are always the same, in evaluation mode."""
        assert self._tap is not None
        begun = time.perf_counter()
        was_training = [(module, module.training) for module in pl_module.modules()]
        share = self._share(trainer)
        loader = self._held_out_loader(trainer)
        with ExitStack() as stack:  # activations come of it, and nothing else
            stack.enter_context(isolate_rng())
            stack.enter_context(generators_kept(loader))
            stack.enter_context(buffers_kept(pl_module))
            stack.enter_context(muted(trainer, pl_module))
            stack.enter_context(torch.no_grad())
            pl_module.eval()
            try:
                for number, batch in enumerate(self._held_out(trainer)):
                    enough = self._tap.num_rows() >= share
                    if trainer.world_size > 1:
                        enough = trainer.strategy.reduce_boolean_decision(enough, all=True)
                    if enough:
                        break
                    batch = trainer.strategy.batch_to_device(batch)
                    self._tap.start(self._fields(batch), share, self.seed + number)
                    with trainer.precision_plugin.forward_context():
                        self._forward(pl_module, trainer.precision_plugin.convert_input(batch))
                    self._tap.stop()
                    self._refuse_what_cannot_be_tapped()
            finally:
                self._tap.stop()
                for module, training in was_training:
                    module.training = training
        self._tap.seconds = time.perf_counter() - begun

    def _held_out(self, trainer: Trainer) -> Iterator[Any]:
        """Yield the held-out batches, cached up to `_MOST_KEPT` bytes."""
        if self._examples is not None:
            yield from map(deepcopy, self._examples)
            return
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # whenever they are drawn, they are the same
            seed(self.seed % (1 << 32))
        kept: list[Any] | None = []
        size = 0.0
        try:
            for batch in self._held_out_batches(trainer):
                size += _size_of(batch)
                kept = None if kept is None or size > _MOST_KEPT else [*kept, deepcopy(batch)]
                yield batch
        finally:  # also where no more are asked for
            self._examples = kept

    def _held_out_loader(self, trainer: Trainer) -> Any:
        loader: Any = trainer.val_dataloaders if self.source == "val" else trainer.train_dataloader
        return loader[0] if isinstance(loader, list | tuple) and loader else loader

    def _held_out_batches(self, trainer: Trainer) -> Iterator[Any]:
        loader = self._held_out_loader(trainer)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"`GeometryProbe(source={self.source!r})` draws from a DataLoader over a data set with a length, and"
                f" the {self.source} data is {type(loader).__name__}. Use `source='batch'`."
            )
        data: Any = loader.dataset
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed)).tolist()
        mine = order[trainer.global_rank :: trainer.world_size][: len(order) // trainer.world_size]
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
        mine = mine[: _MOST_BATCHES * size]
        alone = {"sampler": mine, "batch_size": None}  # every item is a batch
        batches = {"batch_sampler": [mine[start : start + size] for start in range(0, len(mine), size)]}
        # In a worker where the loader has some: what the data set opens here, as a file, all later workers would share.
        examples = DataLoader(
            data,
            collate_fn=loader.collate_fn,
            num_workers=min(1, loader.num_workers),
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(self.seed),
            **(alone if loader.batch_sampler is None else batches),
        )
        yield from examples

    def _forward(self, pl_module: LightningModule, batch: Any) -> None:
        if isinstance(pl_module, SupportsProbe):
            pl_module.probe_forward(batch)
            return
        if not overrides(pl_module, "forward"):
            raise MisconfigurationException(
                f"`GeometryProbe(source={self.source!r})` runs the module on a batch, and {type(pl_module).__name__}"
                " has no `forward`. Give it one, or `probe_forward(batch)`, or use `source='batch'`."
            )
        signature = inspect.signature(pl_module.forward)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(batch, Mapping):
            kwargs = {key: value for key, value in batch.items() if key in signature.parameters}
        else:
            args = (batch[0] if isinstance(batch, list | tuple) else batch,)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            has = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise MisconfigurationException(
                f"`GeometryProbe(source={self.source!r})` calls `{type(pl_module).__name__}.forward{signature}` with a"
                f" batch ({has}): {error}. Give the module a `probe_forward(batch)`, or use `source='batch'`."
            ) from None
        pl_module(*args, **kwargs)


def _size_of(batch: Any) -> float:
    """Bytes of its tensors and arrays; infinite where it holds what is not known."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor | np.ndarray | int | float | bool | str | None) for leaf in leaves):
        return math.inf
    return float(sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor | np.ndarray)))
