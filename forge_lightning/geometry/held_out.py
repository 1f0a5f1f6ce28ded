"""Run held-out examples for a probe, without a trace in the run."""

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
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

from forge_lightning.core.batch import PositionFields
from forge_lightning.core.callback import overrides
from forge_lightning.core.kept_state import buffers_kept, generators_kept
from forge_lightning.core.protocols import SupportsProbe
from forge_lightning.core.step_log import muted
from forge_lightning.geometry.activation_tap import ActivationTap

_MOST_BATCHES = 64
_MOST_KEPT = 1 << 26  # bytes of batches to cache; larger ones are loaded again for each probe


class HeldOutExamples:
    """The same examples for every probe of a fit, run in evaluation mode.

    Args:
        source: "val" for validation data; otherwise training data.
        seed: Random seed for the choice of examples.
        fields_of: Returns mask, labels and tokens of a batch.
    """

    def __init__(self, source: str, seed: int, fields_of: Callable[[Any], PositionFields]) -> None:
        self.source, self.seed = source, seed
        self._fields_of = fields_of
        self._cached: list[Any] | None = None

    def clear(self) -> None:
        """Drop cached batches."""
        self._cached = None

    def why_not(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Why examples of the training data cannot be run; empty if they can."""
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

    def run(self, trainer: Trainer, pl_module: LightningModule, tap: ActivationTap, share: int) -> None:
        """Run examples until all ranks have enough points.

        Args:
            trainer: The Trainer that fits.
            pl_module: The module that it fits.
            tap: Collects activations.
            share: Points that this rank needs.

        Raises:
            MisconfigurationException: If examples cannot be drawn or run.
        """
        begun = time.perf_counter()
        was_training = [(module, module.training) for module in pl_module.modules()]
        with ExitStack() as stack:  # it yields activations, and leaves no other trace
            stack.enter_context(isolate_rng())
            stack.enter_context(generators_kept(self._loader(trainer)))
            stack.enter_context(buffers_kept(pl_module))
            stack.enter_context(muted(trainer, pl_module))
            stack.enter_context(torch.no_grad())
            pl_module.eval()
            try:
                for number, batch in enumerate(self._batches(trainer)):
                    enough = tap.num_rows() >= share
                    if trainer.world_size > 1:
                        enough = trainer.strategy.reduce_boolean_decision(enough, all=True)
                    if enough:
                        break
                    batch = trainer.strategy.batch_to_device(batch)
                    tap.start(self._fields_of(batch), share, self.seed + number)
                    with trainer.precision_plugin.forward_context():
                        self._forward(pl_module, trainer.precision_plugin.convert_input(batch))
                    tap.stop()
                    raise_error_of(tap)
            finally:
                tap.stop()
                for module, training in was_training:
                    module.training = training
        tap.seconds = time.perf_counter() - begun

    def _loader(self, trainer: Trainer) -> Any:
        loader: Any = trainer.val_dataloaders if self.source == "val" else trainer.train_dataloader
        return loader[0] if isinstance(loader, list | tuple) and loader else loader

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        """Yield the held-out batches, cached up to `_MOST_KEPT` bytes."""
        if self._cached is not None:
            yield from map(deepcopy, self._cached)
            return
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # the same examples, whenever they are drawn
            seed(self.seed % (1 << 32))
        kept: list[Any] | None = []
        size = 0.0
        try:
            for batch in self._loaded(trainer):
                size += _size_of(batch)
                kept = None if kept is None or size > _MOST_KEPT else [*kept, deepcopy(batch)]
                yield batch
        finally:  # also if no more are asked for
            self._cached = kept

    def _loaded(self, trainer: Trainer) -> Iterator[Any]:
        loader = self._loader(trainer)
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


def raise_error_of(tap: ActivationTap) -> None:
    """Raise the error that a hook has kept, because a hook runs inside a user's forward pass.

    Raises:
        MisconfigurationException: If an activation of the last forward pass cannot be probed.
    """
    if tap.error is not None:
        raise MisconfigurationException(f"`GeometryProbe`: {tap.error}")


def _size_of(batch: Any) -> float:
    """Bytes of tensors and arrays in an object; infinite if it holds anything else."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor | np.ndarray | int | float | bool | str | None) for leaf in leaves):
        return math.inf
    return float(sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor | np.ndarray)))
