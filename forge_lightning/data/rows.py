"""Rows of tokens: blocks or single examples, cut out of tables that stay on disk."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from forge_lightning.core.stateful_loader import ResumableSampler
from forge_lightning.data.tokens import batch_of

Tokens = npt.NDArray[np.int32]


class Row(NamedTuple):
    """One row of a batch, before it is padded."""

    id: int
    input_ids: Tokens
    labels: Tokens


class TokenTable:
    """The tokens of a table of documents as one long line, read from disk where they are asked for.

    Args:
        table: A `datasets.Dataset` with a column ``input_ids``, and perhaps ``labels``.
    """

    def __init__(self, table: Any) -> None:
        self.table = table.flatten_indices() if table._indices is not None else table
        self.has_labels = "labels" in table.column_names
        self.ends = self._ends()
        """Where documents end, ``(N,)``."""
        self._chunks: dict[str, tuple[list[int], list[Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chunks": {}}  # a worker maps the files itself

    def _ends(self) -> npt.NDArray[np.int64]:
        total, parts = 0, [np.zeros(0, np.int64)]
        for chunk in self.table.data.column("input_ids").chunks:
            offsets = np.asarray(chunk.offsets, dtype=np.int64)
            parts.append(offsets[1:] - offsets[0] + total)
            total += int(offsets[-1] - offsets[0])
        return np.concatenate(parts)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, name: str, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` of a column."""
        if name not in self._chunks:
            begins, values, total = [], [], 0
            for chunk in self.table.data.column(name).chunks:
                first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
                begins.append(total)
                values.append(chunk.values.slice(first, last - first))
                total += last - first
            self._chunks[name] = (begins, values)
        begins, values = self._chunks[name]
        parts, index = [], bisect_right(begins, start) - 1
        while start < stop:
            inside = start - begins[index]
            part = values[index].slice(inside, min(stop - start, len(values[index]) - inside)).to_numpy()
            parts.append(part)
            start += len(part)
            index += 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


class TokenRows(Dataset[Row]):
    """Rows of a table: blocks across documents, or documents and their pieces.

    Args:
        table: Tokens.
        length: Tokens of a row, at most.
        packed: Blocks of ``length`` tokens, which begin and end anywhere; the last, shorter one is left out. Otherwise
            each document by itself, in pieces where it is longer.
    """

    def __init__(self, table: TokenTable, length: int, packed: bool) -> None:
        self.table, self.length, self.packed = table, length, packed
        self.first = 0
        self.last = len(table) // length if packed else 0
        self._starts = self._stops = np.zeros(0, np.int64)
        if not packed:
            begins = np.concatenate([[0], table.ends[:-1]]) if len(table.ends) else np.zeros(0, np.int64)
            pieces = -(-(table.ends - begins) // length)
            whole = np.repeat(np.arange(len(begins)), pieces)
            number = np.arange(len(whole)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            self._starts = begins[whole] + number * length
            self._stops = np.minimum(self._starts + length, table.ends[whole])
            self.last = len(self._starts)

    def part(self, first: int, last: int) -> "TokenRows":
        """The rows from ``first`` to ``last``, with the numbers that they have here."""
        found = TokenRows.__new__(TokenRows)
        found.__dict__ |= self.__dict__
        found.first, found.last = self.first + first, self.first + last
        return found

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Row:
        number = self.first + index
        if self.packed:
            start, stop = number * self.length, (number + 1) * self.length
        else:
            start, stop = int(self._starts[number]), int(self._stops[number])
        ids = self.table.read("input_ids", start, stop)
        labels = self.table.read("labels", start, stop) if self.table.has_labels else ids
        return Row(number, ids, labels)


class Mixture(Dataset[Row]):
    """Rows of several sources, one behind the other, numbered through.

    Args:
        parts: The sources.
        weights: How often a source is drawn, beside the others, in an epoch of as many rows as there are. ``None``:
            every row once.
        pad_token_id: Fills the shorter rows of a batch; masked out of attention and loss.
    """

    def __init__(
        self, parts: Sequence[Sequence[Row] | Dataset[Row]], weights: Sequence[float] | None, pad_token_id: int
    ) -> None:
        self.parts, self.weights, self.pad_token_id = list(parts), weights, pad_token_id
        self.sizes = [len(part) for part in self.parts]  # type: ignore[arg-type]
        self.begins = [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self.begins, index) - 1
        while index - self.begins[part] >= self.sizes[part]:  # an empty part begins where the next one does
            part -= 1
        row = self.parts[part][index - self.begins[part]]
        return row if len(self.parts) == 1 else row._replace(id=index)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """One batch, as long as its longest row."""
        return batch_of([(row.id, row.input_ids, row.labels) for row in rows], self.pad_token_id)

    def counts(self) -> list[int]:
        """Rows that an epoch draws from each source: shares of the weights, rounded so that their sum is the length."""
        if self.weights is None:
            return self.sizes
        total, exact = sum(self.weights), [weight * len(self) for weight in self.weights]
        counts = [int(share / total) for share in exact]
        rest = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i] / total)
        for i in rest[: len(self) - sum(counts)]:
            counts[i] += 1
        return counts


class MixtureSampler(ResumableSampler):
    """Draws each epoch of a `Mixture` by its weights. Every row of a source comes once before one comes again.

    Args:
        dataset: The sources.
        seed: Seed of the order, together with the epoch.
    """

    def __init__(self, dataset: Mixture, seed: int = 0) -> None:
        super().__init__(dataset, shuffle=True, seed=seed)
        self.mixture = dataset

    def shape(self) -> dict[str, Any]:
        return {"rows of the sources": self.mixture.sizes, "weights": list(self.mixture.weights or [])}

    def _epoch_order(self) -> Iterator[int]:
        drawn = []
        for part, (size, count) in enumerate(zip(self.mixture.sizes, self.mixture.counts(), strict=True)):
            place, end = self.epoch * count, (self.epoch + 1) * count  # in an endless line of permutations
            while place < end:
                round_, inside = divmod(place, size)
                permutation = torch.randperm(size, generator=_generator(self.seed, part, round_))
                taken = permutation[inside : inside + end - place]
                drawn.append(taken + self.mixture.begins[part])
                place += len(taken)
        rows = torch.cat(drawn)
        rows = rows[torch.randperm(len(rows), generator=_generator(self.seed, -1, self.epoch))]
        rows = rows.repeat(-(-self.total_size // len(rows)))[: self.total_size]  # whole batches on every rank
        return iter(rows[self.rank : self.total_size : self.num_replicas].tolist())


def _generator(*numbers: int) -> torch.Generator:
    seed = int(np.random.SeedSequence([number % 2**63 for number in numbers]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)
