"""The stores of `DreamReplay`: what goes into each, and what is drawn."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forge_lightning.dream.buffer import Replay, ReplayBuffer, Strategy
from forge_lightning.dream.options import BatchFields, Storage
from forge_lightning.dream.progress import Progress
from forge_lightning.dream.scores import kept_by_example

SEED_STEP = 1_000_003
"""Distance of the random seeds of two ranks, or of two sleeps."""
NUM_WATCHED = 64
"""Stored examples that are measured before and after a sleep."""
_NUM_PROGRAMS = 2048
_USUAL = {"sample_id": ("sample_id",), "family": ("family", "arm", "level")}


@dataclass(frozen=True)
class Draw:
    """Examples drawn to be replayed: new programs first, then stored examples.

    Args:
        rows: Fields, ``(B, ...)`` each.
        num_programs: Number of new programs.
        stored: The stored examples among them; ``None`` for none.
    """

    rows: dict[str, Tensor]
    num_programs: int
    stored: Replay | None


class ReplayMemory:
    """Everything that one rank has stored.

    Args:
        storage: Limits of the main buffer.
        fields: Which entries of a batch are what.
        strategy: How examples are drawn from the main buffer.
        probe_size: Early examples that are never replayed.
        program_fraction: Share of new programs in a draw, once there are some.
        seed: Random seed for what is stored and drawn.
    """

    def __init__(
        self,
        storage: Storage,
        fields: BatchFields,
        strategy: Strategy,
        probe_size: int,
        program_fraction: float,
        seed: int,
    ) -> None:
        self.storage, self.fields, self.strategy, self.seed = storage, fields, strategy, seed
        self.probe_size, self.program_fraction = probe_size, program_fraction
        self.clear()

    def clear(self, rank: int = 0) -> None:
        """Drop everything.

        Args:
            rank: Whose random stream decides what is stored and drawn.
        """
        seed = self.seed * SEED_STEP + rank
        new, limits = partial(self._new_store, seed=seed), self.storage
        self.buffer = new(limits.capacity, limits.frontier, max_bytes=limits.max_bytes, memory_map=limits.memory_map)
        """What examples are drawn from."""
        self.probe = new(max(1, self.probe_size))
        """Early examples, by which forgetting is measured."""
        self.programs = new(_NUM_PROGRAMS)
        """New programs, from `ProgramReplay`."""
        self.watched = new(NUM_WATCHED)
        """Copies of stored examples that are measured before and after a sleep."""

    def _new_store(self, capacity: int, frontier: float = 0.0, **options: Any) -> ReplayBuffer:
        fields, owner = self.fields, "DreamReplay"
        return ReplayBuffer(
            capacity,
            frontier,
            mask=fields.mask,
            labels=fields.label_names,
            label_pad=fields.label_pad,
            owner=owner,
            **options,
        )

    def admit(
        self,
        rows: Mapping[str, Tensor],
        losses: Tensor,
        successes: Tensor,
        kept: Mapping[str, Tensor],
        progress: Progress,
        stage: int,
        step: int,
    ) -> None:
        """Offer fresh examples: every fourth to the probe while it has room, the others to the buffer.

        Args:
            rows: Fields, ``(B, ...)`` each, on the host as all of these.
            losses: ``(B,)``, NaN where unknown.
            successes: ``(B,)``, NaN where unknown.
            kept: What `RowScores.logits_to_keep` returned; empty for none.
            progress: Counters, of which ``offered`` and ``probe_closed`` are updated.
            stage: Number of the stage of training; -1 where unknown.
            step: Optimizer steps before that of these examples.

        Raises:
            ValueError: If the examples cannot be stored, or a field that was named is missing.
        """
        ids, families = (self._integers(argument, rows) for argument in ("sample_id", "family"))
        rows = {name: tensor.detach().cpu() for name, tensor in rows.items()}
        ids = self.probe.ids_of(rows) if ids is None else self._ids_of_fit(ids.cpu(), rows, progress.fits)
        for i, id in enumerate(ids.tolist()):
            progress.offered += 1
            if not progress.probe_closed and progress.offered % 4 == 1 and id not in self.buffer:
                one = slice(i, i + 1)
                self.probe.push({name: t[one] for name, t in rows.items()}, losses[one], successes[one], ids[one])
                progress.probe_closed = len(self.probe) == self.probe_size
        free = [i for i, id in enumerate(ids.tolist()) if id not in self.probe]
        if not free:
            return
        logits = kept_by_example(kept, successes.eq(1))
        extras = {name: [parts[i] for i in free] for name, parts in logits.items()}
        self.buffer.push(
            {name: tensor[free] for name, tensor in rows.items()},
            losses.cpu()[free],
            successes.cpu()[free],
            ids[free],
            None if families is None else families.cpu()[free],
            extras,
            stage=stage,
            step=step,
        )

    def admit_program(self, parent: dict[str, Tensor], row: dict[str, Tensor]) -> None:
        """Store a new program.

        Args:
            parent: The stored example that it was made from, ``(1, ...)`` each.
            row: Its own fields, which replace the parent's.

        Raises:
            ValueError: If it has fields that batches do not have.
        """
        if not set(row) <= set(parent):
            raise ValueError(f"`row_of` returns {list(row)}, and batches have {list(parent)}.")
        ids = self.programs.ids_of(parent | row)
        named = {name: ids for name in ("sample_id",) if name in parent}
        self.programs.push(parent | row | named, sample_id=ids)

    def draw(self, count: int, progress: Progress) -> Draw:
        """Draw examples to replay.

        Args:
            count: Number of examples; fewer where fewer are stored.
            progress: Counters, of which ``dream_carry`` is updated.

        Raises:
            ValueError: If programs and stored examples do not have the same fields.
        """
        if len(self.programs):
            progress.dream_carry += count * self.program_fraction
        wanted = min(count, int(progress.dream_carry))
        progress.dream_carry -= wanted
        programs = self.programs.sample(wanted, "uniform") if wanted else None
        num_programs = 0 if programs is None else len(programs)
        stored = self.buffer.sample(count - num_programs, self.strategy) if num_programs < count else None
        parts = [part.rows for part in (programs, stored) if part is not None]
        return Draw(parts[0] if len(parts) == 1 else self.buffer.joined(*parts), num_programs, stored)

    def watch(self) -> None:
        """Copy examples spread evenly over the buffer to ``watched``."""
        slots = self.buffer.slots()
        chosen = self.buffer.read(slots[:: max(1, len(slots) // NUM_WATCHED)][:NUM_WATCHED])
        self.watched = self._new_store(NUM_WATCHED)
        self.watched.push(chosen.rows, chosen.loss, chosen.success)

    def _ids_of_fit(self, ids: Tensor, rows: Mapping[str, Tensor], fits: int) -> Tensor:
        """Numbers that no other example of an earlier fit has: data sets all count from 0."""
        if not fits:
            return ids
        unique = []
        for id, content in zip(ids.tolist(), self.probe.ids_of(rows).tolist(), strict=True):
            numbers = [_number_in_fit(id, fit) for fit in range(fits + 1)]
            earlier = (n for n in numbers[:-1] for store in (self.buffer, self.probe) if store.content_of(n) == content)
            unique.append(next(earlier, numbers[-1]))
        return torch.tensor(unique)

    def _integers(self, argument: str, rows: Mapping[str, Tensor]) -> Tensor | None:
        """The field that ``sample_id`` or ``family`` names, ``(B,)``."""
        key: Any = getattr(self.fields, argument)
        if key is None:
            return None
        if isinstance(key, int) and key < 0:
            key += len(rows)
        names = _USUAL[argument] if key == "auto" else (str(key),)
        values = next((rows[name] for name in names if name in rows), None)
        if values is not None and values.ndim == 1 and not values.is_floating_point():
            return values
        if key == "auto":
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in rows.items()}
        raise ValueError(
            f"`BatchFields({argument}={getattr(self.fields, argument)!r})`: the batch has no integers (B,) under that"
            f" key. It has {shapes}."
        )

    @property
    def _stores(self) -> dict[str, ReplayBuffer]:
        return {"buffer": self.buffer, "probe": self.probe, "dreams": self.programs, "watched": self.watched}

    def state_dict(self) -> dict[str, Any]:
        """The state of each store."""
        return {name: store.state_dict() for name, store in self._stores.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Restore from the `state_dict` of all ranks, or take a share of it where the world size has changed.

        Args:
            states: One state for each rank that wrote the checkpoint. Stores that it lacks are left as they are.
            rank: This rank.
            world_size: Number of ranks now.
        """
        for name, store in self._stores.items():
            if name not in states[0]:
                continue
            if len(states) == world_size:
                store.load_state_dict(states[rank][name])
            else:
                store.load_shard([state[name] for state in states], rank, world_size)


def _number_in_fit(id: int, fit: int) -> int:
    """The number of an example in a fit: its own in the first, another one in each later fit."""
    if fit == 0:
        return id
    digest = hashlib.blake2b(f"{fit}/{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
