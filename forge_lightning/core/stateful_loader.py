"""Loading that a resumed run continues where it stopped, batch for batch."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, DistributedSampler

_BATCH = "examples of a batch, over all processes"  # a key in checkpoints; words: keep


class ResumableSampler(DistributedSampler[Any]):
    """A seeded shuffle of each epoch, split over the processes, that can start anywhere inside the epoch.

    A `DistributedSampler`, because that is the one kind Lightning leaves alone; rank and world size are looked up when
    iteration starts.

    Args:
        dataset: Anything with a length.
        shuffle: Draw a new order each epoch; otherwise the dataset's own.
        seed: Seed of the order, together with the epoch.
        drop_last: Drop the examples that do not divide evenly over the processes, instead of repeating a few.
    """

    def __init__(self, dataset: Dataset[Any], shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.start = 0  # examples of this process to skip in the next epoch begun
        self.shift = 0  # offset between Lightning's epoch counter and ours
        self.num_told = 0  # calls of `set_epoch` since a state was restored

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch begun."""
        super().set_epoch(epoch)
        self.num_told += 1

    @property
    def num_examples(self) -> int:
        """Number of examples of an epoch, over all ranks."""
        return len(self.dataset)  # type: ignore[arg-type]

    def bind(self) -> None:
        """Take the shape of the running process group, if there is one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.num_replicas, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        length = len(self.dataset)  # type: ignore[arg-type]
        round_ = math.floor if self.drop_last else math.ceil
        self.num_samples = round_(length / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[Any]:
        self.bind()
        start, self.start = self.start, 0
        epoch, self.epoch = self.epoch, self.epoch - self.shift
        indices = self._epoch_order()
        self.epoch = epoch
        return itertools.islice(indices, start, None)

    def _epoch_order(self) -> Iterator[Any]:
        """This rank's examples of the epoch."""
        return super().__iter__()

    def __len__(self) -> int:
        self.bind()
        return self.num_samples

    def shape(self) -> dict[str, Any]:
        """What the batches of an epoch depend on beside length, seed and shuffling, by names for an error."""
        return {}

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """What the order depends on beyond epoch and place; nothing here."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""


class StatefulDataLoader(DataLoader[Any]):
    """A `DataLoader` whose ``state_dict()`` Lightning keeps in its checkpoints: a mid-epoch resume sees the batches
    that the stopped run did not, with any number of workers.

    Counts batches handed out, not batches prefetched. Keeps the place in the order, not the random state of
    augmentations inside workers. A resume inside an epoch needs the same data, order and global batch size (examples of
    all ranks together); with other ones it is refused.

    Lightning forgets the state if ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``. Any callback
    of this package, as `RNGState`, restores it.

    Args:
        dataset: A map-style dataset.
        batch_size: Examples a batch and process.
        shuffle: Draw a new order each epoch.
        seed: Seed of the order.
        drop_last: Drop the last, smaller batch.
        sampler: In place of the seeded order. Only a `ResumableSampler` makes a resume possible.
        **kwargs: `DataLoader`'s own: ``num_workers``, ``collate_fn``, ``pin_memory``, ...
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        self.shuffle, self.seed = shuffle, seed  # Lightning makes loaders anew from attributes, as for `predict`
        if sampler is None and kwargs.get("batch_sampler") is None:
            sampler = ResumableSampler(dataset, shuffle=shuffle, seed=seed)
        # Seeds for workers come from here: a loader that drew from the global stream would move dropout.
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **kwargs)
        self._delivered = 0
        self._resume: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered = self._take_up() if isinstance(self.sampler, ResumableSampler) else 0
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def _take_up(self) -> int:
        """Point the sampler to where a restored state says; return the batches it skips.

        Lightning numbers epochs otherwise after some resumes than in a run never stopped: one too many after a resume
        at an epoch's end, and after one of a run that `max_steps` had ended inside an epoch. The restored state says
        which epoch it was. Whether that was over, Lightning shows by announcing two epochs before it reads a batch: the
        finished one, and the next.
        """
        resume, self._resume = self._resume, {}
        sampler: ResumableSampler = self.sampler  # type: ignore[assignment]
        if not resume.get("delivered"):
            return 0
        if resume["delivered"] < resume.get("num_batches", len(self)) and sampler.num_told <= 1:
            self._refuse_another_epoch(resume)
            sampler.shift = sampler.epoch - resume["epoch"]
            sampler.start = resume["delivered"] * (self.batch_size or 1)
            return int(resume["delivered"])
        sampler.shift = sampler.epoch - (resume["epoch"] + 1)
        return 0

    def state_dict(self) -> dict[str, Any]:
        """The running epoch, and its batches that were handed out."""
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        state: dict[str, Any] = {"epoch": sampler.epoch - sampler.shift, "delivered": self._delivered}
        state |= {"num_batches": len(self), "shape": self._shape()}
        return state | {"sampler": sampler.state_dict(self._delivered)}

    def _shape(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, by names for an error."""
        sampler: ResumableSampler = self.sampler  # type: ignore[assignment]
        sampler.bind()
        return {
            "examples": sampler.num_examples,
            _BATCH: (self.batch_size or 1) * sampler.num_replicas,
            "shuffle": bool(sampler.shuffle),
            "seed": sampler.seed if sampler.shuffle else None,
            "drop_last": bool(self.drop_last),
            **sampler.shape(),
        }

    def _refuse_another_epoch(self, state: Mapping[str, Any]) -> None:
        here = self._shape()
        before: Mapping[str, Any] = state.get("shape", here)
        changed = [
            f"{name.replace('processes', 'ranks')}: {before.get(name)}, now {value}"
            for name, value in here.items()
            if before.get(name) != value
        ]
        if changed:
            raise MisconfigurationException(
                f"The checkpoint was written inside epoch {state['epoch']}, after {state['delivered']} batches of"
                f" another order of the data ({'; '.join(changed)}): going on would repeat or drop examples. Resume"
                " with the data and batch size as they were, or from a checkpoint of an epoch's end."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In the next epoch begun, skip the batches that were handed out; after a complete one, begin the one after."""
        if state_dict and "delivered" not in state_dict:
            raise MisconfigurationException(
                "The checkpoint holds the place in another kind of data, a stream. Resume with the data as it was."
            )
        self._resume = dict(state_dict)
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.num_told = 0
            if state_dict.get("sampler"):
                self.sampler.load_state_dict(state_dict["sampler"])
