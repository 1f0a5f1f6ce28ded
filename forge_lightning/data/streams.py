"""Batches of tokens from data that is read while training, without a table on disk."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from forge_lightning.core.distributed import current_rank
from forge_lightning.data.encoding import Encoder
from forge_lightning.data.rows import Tokens
from forge_lightning.data.tokens import batch_of

Pair = tuple[Tokens, Tokens]


class RowStream:
    """Rows of one source, without end: packed blocks, or examples. After its last record comes its first.

    Args:
        records: A `datasets.IterableDataset`.
        encoder: Makes tokens of records.
        length: Tokens of a row, at most.
        packed: Blocks across documents, or each document by itself.
        what: The source, for errors.
    """

    def __init__(self, records: Any, encoder: Encoder, length: int, packed: bool, what: str) -> None:
        self._whole, self._encoder, self._length, self._packed, self.what = records, encoder, length, packed, what
        self._records: Any = None
        self._iterator: Iterator[Any] | None = None
        self._passes = 0
        self._waiting: list[Pair] = []  # documents, or parts of them, whose tokens are not handed out

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and tensors."""
        return {
            "records": None if self._records is None else self._records.state_dict(),
            "passes": self._passes,
            "waiting": _packed(self._waiting),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._open()
        if state["records"] is not None:
            self._records.load_state_dict(state["records"])
        self._passes, self._waiting = state["passes"], _unpacked(state["waiting"])

    def _open(self) -> None:
        self.open_for(*current_rank())

    def open_for(self, rank: int, world_size: int) -> None:
        """Begin at the start, with the records of one rank."""
        from datasets.distributed import split_dataset_by_node

        records = deepcopy(self._whole)  # which is never read, so that each pass begins at the start
        self._records = split_dataset_by_node(records, rank, world_size) if world_size > 1 else records
        self._iterator = None

    def pairs(self, once: bool = False) -> Iterator[Pair]:
        """Tokens and labels of each row.

        Args:
            once: End with the last record.
        """
        while True:
            while (row := self._cut()) is not None:
                yield row
            record = self._next_record(once)
            if record is None:
                return
            found = self._encoder({name: [value] for name, value in record.items()})
            for number, ids in enumerate(found["input_ids"]):
                tokens = np.asarray(ids, dtype=np.int32)
                labels = np.asarray(found["labels"][number], dtype=np.int32) if "labels" in found else tokens
                if len(tokens):
                    self._waiting.append((tokens, labels))

    def _next_record(self, once: bool) -> dict[str, Any] | None:
        if self._records is None:
            self._open()
        empty_handed = 0
        while True:
            if self._iterator is None:
                self._iterator = iter(self._records)
            record = next(self._iterator, None)
            if record is not None:
                return dict(record)
            empty_handed += 1
            if once:
                return None
            if empty_handed > 1:
                raise MisconfigurationException(f"The stream of {self.what} holds no record for every rank.")
            self._passes += 1
            self._open()

    def _cut(self) -> Pair | None:
        """The next row, if enough waits."""
        if not self._waiting:
            return None
        if self._packed and sum(len(ids) for ids, _ in self._waiting) < self._length:
            return None
        parts: list[Pair] = []
        missing = self._length
        while self._waiting and missing > 0:
            ids, labels = self._waiting[0]
            parts.append((ids[:missing], labels[:missing]))
            if len(ids) > missing:
                self._waiting[0] = (ids[missing:], labels[missing:])
            else:
                self._waiting.pop(0)
            missing -= len(parts[-1][0])
            if not self._packed:
                break
        # Copies, that a row does not keep its document in memory.
        row = tuple(np.concatenate([part[side] for part in parts]) for side in range(2))
        return row[0], row[1]


class StreamLoader:
    """Batches from streams, shuffled through a buffer of rows, whose state resumes a run at any step, bit by bit.

    An epoch is a number of batches; the streams go on from one to the next. Ranks read different records.

    Args:
        streams: The sources.
        weights: How often each is drawn, beside the others.
        batch_size: Rows a batch and rank.
        steps_per_epoch: Batches of an epoch.
        buffer: Rows to draw from; 1 keeps their order.
        seed: Seed of the draws.
        pad_token_id: Fills the shorter rows.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        weights: Sequence[float],
        batch_size: int,
        steps_per_epoch: int,
        buffer: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        self.streams, self.batch_size, self.steps_per_epoch = list(streams), batch_size, steps_per_epoch
        self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._size, self._seed, self._pad = buffer, seed, pad_token_id
        self._rows: list[Pair] = []
        self._drawn = 0
        self._generator: torch.Generator | None = None
        self._pairs: list[Iterator[Pair]] = []

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.steps_per_epoch):  # after a resume Lightning ends the epoch where it was to end
            yield self._batch()

    def _batch(self) -> dict[str, Tensor]:
        rank, world_size = current_rank()
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self._seed * 1_000_003 + rank)
        if not self._pairs:
            self._pairs = [stream.pairs() for stream in self.streams]
        while len(self._rows) < self._size:
            self._rows.append(self._next())
        rows = []
        for _ in range(self.batch_size):
            place = int(torch.randint(self._size, (1,), generator=self._generator))
            rows.append((self._drawn * world_size + rank, *self._rows[place]))
            self._rows[place] = self._next()
            self._drawn += 1
        return batch_of(rows, self._pad)

    def _next(self) -> Pair:
        source = 0
        if len(self._pairs) > 1:
            source = int(torch.multinomial(self._weights, 1, generator=self._generator))
        return next(self._pairs[source])

    def _shape(self) -> dict[str, Any]:
        return {
            "sources": [stream.what for stream in self.streams],
            "weights": self._weights.tolist(),
            "block size": self.streams[0]._length,
            "packing": self.streams[0]._packed,
            "buffer": self._size,
            "seed": self._seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks: where their streams are, and the rows in their buffers. All ranks have to call it."""
        own = {
            "streams": [stream.state_dict() for stream in self.streams],
            "rows": _packed(self._rows),
            "drawn": self._drawn,
            "generator": None if self._generator is None else self._generator.get_state(),
        }
        _, world_size = current_rank()
        states: list[Any] = [own]
        if world_size > 1:
            states = [None] * world_size
            torch.distributed.all_gather_object(states, own)
        return {"shape": self._shape(), "ranks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            MisconfigurationException: If it is of another number of ranks, or of another shape of rows.
        """
        rank, world_size = current_rank()
        if "ranks" not in state:
            raise MisconfigurationException(
                "The checkpoint holds the place in another kind of data than a stream. Resume with the data as it was."
            )
        here = self._shape() | {"ranks": world_size}
        before = state["shape"] | {"ranks": len(state["ranks"])}
        changed = [
            f"{name}: {before.get(name)}, now {value}" for name, value in here.items() if before.get(name) != value
        ]
        if changed:
            raise MisconfigurationException(
                f"The checkpoint's place in the stream is of other data ({'; '.join(changed)}). Resume with the data"
                " and the number of ranks as they were."
            )
        own = state["ranks"][rank]
        for stream, each in zip(self.streams, own["streams"], strict=True):
            stream.load_state_dict(each)
        self._rows, self._drawn, self._pairs = _unpacked(own["rows"]), own["drawn"], []
        self._generator = None
        if own["generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(own["generator"])


def _packed(rows: Sequence[Pair]) -> dict[str, Tensor]:
    """Rows as three tensors: a checkpoint of thousands of small ones would be slow."""
    flat = [np.concatenate([row[i] for row in rows]) if rows else np.zeros(0, np.int32) for i in range(2)]
    return {
        "lengths": torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64),
        "input_ids": torch.from_numpy(np.array(flat[0], dtype=np.int32)),
        "labels": torch.from_numpy(np.array(flat[1], dtype=np.int32)),
    }


def _unpacked(state: Mapping[str, Tensor]) -> list[Pair]:
    sizes = state["lengths"].tolist()
    ids, labels = (state[name].split(sizes) for name in ("input_ids", "labels"))
    return [(one.numpy().copy(), other.numpy().copy()) for one, other in zip(ids, labels, strict=True)]
