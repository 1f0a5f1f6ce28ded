"""Examples as bytes, in memory or in a memory-mapped file, restored exactly."""

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge_lightning.core.tokens import IGNORED


@dataclass
class _Field:
    """How one field of every example is stored.

    Args:
        dtype: Type of the user's tensor.
        stored: Type in the store: integers take half the bits while they fit.
        tail: Shape of an entry along the example's first dimension.
        scalar: Whether an example is a single number.
        pad: Padding value of shorter examples, once it was seen.
        sequence: Whether the mask gives the length of each example; decided by the first batch.
        width: Length of all examples, if the field is no sequence.
        extra: Whether it comes example by example, each with its own length.
    """

    dtype: torch.dtype
    stored: torch.dtype
    tail: tuple[int, ...]
    scalar: bool
    pad: float | None = None
    sequence: bool = False
    width: int | None = None
    extra: bool = False

    @property
    def item(self) -> int:
        """Bytes of an entry along the example's first dimension."""
        return self.stored.itemsize * math.prod(self.tail)


class PackedRows:
    """A batch as bytes. An example is assembled only when it is read."""

    def __init__(self, items: Sequence[int], arrays: Sequence[Any], counts: Any, halved: Sequence[bool]) -> None:
        self.counts = counts
        self._items, self._arrays, self._halved = items, arrays, halved

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> Any:
        return np.concatenate(self._parts(i))

    def _parts(self, i: int) -> list[Any]:
        pieces = zip(self._arrays, self._items, self.counts[i].tolist(), strict=True)
        return [array[i][: item * count] for array, item, count in pieces]

    def length(self, i: int) -> int:
        """Bytes of an example."""
        return sum(item * count for item, count in zip(self._items, self.counts[i].tolist(), strict=True))

    def ids(self) -> list[int]:
        """Hashes of the examples' contents, 62 bits each."""
        ids = []
        for i in range(len(self)):
            digest = hashlib.blake2b(digest_size=8)
            for part, halved in zip(self._parts(i), self._halved, strict=True):
                digest.update((_doubled(part) if halved else part).tobytes())  # however it is kept
            ids.append(int.from_bytes(digest.digest(), "little") >> 2)
        return ids


class RowStore:
    """Examples by slot: the same fields in each, of any length along their first dimension.

    Sequences are the integer fields, ``(B, T)``, that are as long as the mask in the first batch. What the
    mask covers at their end is left out, and filled up again where rows are read together. Batches that are padded at
    the front are kept whole, and filled up there.

    Args:
        capacity: Number of slots.
        mask: Field that is 0 where sequences are padded.
        folder: Folder of a file for the examples, which ends with the process. Default: memory.
        owner: Name for error messages.
        labels: Fields that are padded with ``label_pad``.
        label_pad: Label that the loss ignores.
    """

    def __init__(
        self,
        capacity: int,
        mask: str | None,
        folder: str | Path | None,
        owner: str,
        labels: Sequence[str],
        label_pad: int = IGNORED,
    ) -> None:
        self.num_bytes = 0
        self.padded_at_front = False
        self._capacity, self._mask, self._owner, self._labels = capacity, mask, owner, labels
        self._label_pad = label_pad
        self._bytes: _Memory | _Mapped = _Memory() if folder is None else _Mapped(folder, capacity)
        self._fields: dict[str, _Field] = {}
        self._counts: Any = np.zeros((capacity, 0), np.int64)  # entries of each field of each row

    def pack(self, rows: Mapping[str, Tensor], extras: Mapping[str, Sequence[Tensor]]) -> PackedRows:
        """Convert a batch to bytes.

        Args:
            rows: ``(B, ...)`` each.
            extras: ``B`` tensors ``(n, ...)`` each.

        Raises:
            ValueError: If fields differ from those of earlier rows, or numbers of rows from each other.
        """
        size = len(next(iter(rows.values())))
        mask = rows.get(self._mask) if self._mask is not None else None
        mask = mask if mask is not None and mask.ndim == 2 else None
        if not self._fields:
            self._begin(rows, extras, mask)
        if {*rows, *extras} != set(self._fields):
            raise ValueError(f"`{self._owner}` stores rows of {list(self._fields)}, and got {[*rows, *extras]}.")
        real = None if mask is None else self._real_lengths(mask)
        arrays: list[Any] = []
        counts: Any = np.ones((size, len(self._fields)), np.int64)
        for place, (name, field) in enumerate(self._fields.items()):
            values: Any = extras[name] if field.extra else rows[name]
            if len(values) != size:
                raise ValueError(f"`{self._owner}`: {name!r} has {len(values)} rows, others {size}.")
            if field.extra:
                arrays.append([_bytes_of(self._fitting(name, field, one.unsqueeze(0))) for one in values])
                counts[:, place] = [len(one) for one in values]
                continue
            if field.sequence:
                if mask is None or real is None or values.shape[1] != mask.shape[1]:
                    width = None if mask is None else mask.shape[1]
                    raise ValueError(
                        f"`{self._owner}`: {name!r} was as long as the mask {self._mask!r}, and now is"
                        f" {values.shape[1]} long and the mask {width}."
                    )
                counts[:, place] = real
                if field.pad is None:
                    covered = values[mask == 0]
                    field.pad = covered[-1].item() if len(covered) else None
            elif not field.scalar:
                counts[:, place] = self._width(name, field, values.shape[1])
            arrays.append(_bytes_of(self._fitting(name, field, values)).reshape(size, -1))
        fields = self._fields.values()
        return PackedRows(
            [field.item for field in fields], arrays, counts, [field.stored != field.dtype for field in fields]
        )

    def put(self, slot: int, packed: PackedRows, i: int) -> None:
        """Store the ``i``-th example of a batch in a free slot."""
        self._put(slot, packed[i], packed.counts[i])

    def free(self, slot: int) -> None:
        """Drop an example."""
        self.num_bytes -= len(self._bytes[slot])
        self._bytes.free(slot)

    def read(self, slots: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Fields ``(B, ...)``, padded at the end to the longest example, and the extras of each."""
        split = [self._split(slot) for slot in slots]
        all_counts = self._counts[np.array(slots)]
        rows: dict[str, Tensor] = {}
        extras: dict[str, list[Tensor]] = {}
        for place, (name, field) in enumerate(self._fields.items()):
            counts = all_counts[:, place].tolist()
            if field.extra:
                made = [torch.empty(count, *field.tail, dtype=field.stored) for count in counts]
                for tensor, parts in zip(made, split, strict=True):
                    _bytes_of(tensor)[:] = parts[place]
                extras[name] = [tensor.to(field.dtype) for tensor in made]
                continue
            longest = [] if field.scalar else [max(counts)]
            tensor = torch.full((len(slots), *longest, *field.tail), field.pad or 0, dtype=field.stored)
            flat = _bytes_of(tensor).reshape(len(slots), -1)
            for i, parts in enumerate(split):
                end = flat.shape[1] if self.padded_at_front else len(parts[place])
                flat[i, end - len(parts[place]) : end] = parts[place]
            rows[name] = tensor.to(field.dtype)
        return rows, extras

    @property
    def sequences(self) -> list[str]:
        """Fields whose examples may differ in length."""
        return [name for name, field in self._fields.items() if field.sequence]

    def length(self, slot: int) -> int:
        """Bytes of a stored example."""
        return len(self._bytes[slot])

    @property
    def pads(self) -> dict[str, float]:
        """Padding value, by field."""
        return {name: field.pad or 0 for name, field in self._fields.items() if not field.extra}

    def state_dict(self, slots: Sequence[int]) -> dict[str, Any]:
        """The examples in these slots, as plain tensors and lists."""
        blobs = [self._bytes[slot] for slot in slots]
        fields = {
            name: [_name(f.dtype), _name(f.stored), list(f.tail), f.scalar, f.pad, f.sequence, f.width, f.extra]
            for name, f in self._fields.items()
        }
        return {
            "fields": fields,
            "padded_at_front": self.padded_at_front,
            "data": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *blobs])),
            "lengths": torch.tensor([len(blob) for blob in blobs], dtype=torch.int64),
            "counts": torch.from_numpy(self._counts[np.array(slots, np.int64)]),
        }

    def load(self, state: Mapping[str, Any], slots: Mapping[int, int]) -> None:
        """Load examples from a `state_dict`: from each position in it to a free slot."""
        if not self._fields:
            self._fields = {
                name: _Field(getattr(torch, dtype), getattr(torch, stored), tuple(tail), *rest)
                for name, (dtype, stored, tail, *rest) in state["fields"].items()
            }
            self._counts = np.zeros((self._capacity, len(self._fields)), np.int64)
            self.padded_at_front = state["padded_at_front"]
        ends = state["lengths"].cumsum(0).tolist()
        for place, slot in slots.items():
            blob = state["data"][ends[place - 1] if place else 0 : ends[place]].numpy()
            self._put(slot, self._as_here(blob, state, place), state["counts"][place].numpy())

    def _put(self, slot: int, row: Any, counts: Any) -> None:
        self._bytes[slot] = row
        self._counts[slot] = counts
        self.num_bytes += len(row)

    def _begin(self, rows: Mapping[str, Tensor], extras: Mapping[str, Sequence[Tensor]], mask: Tensor | None) -> None:
        for name, like in (*rows.items(), *((name, values[0].unsqueeze(0)) for name, values in extras.items())):
            whole = not like.is_floating_point() and not like.is_complex()
            field = _Field(
                like.dtype,
                torch.int32 if like.dtype == torch.int64 else like.dtype,
                tuple(like.shape[2:]),
                scalar=like.ndim == 1,
                pad=0 if name == self._mask else self._label_pad if name in self._labels and whole else None,
                sequence=name in rows and mask is not None and whole and like.shape == mask.shape,
                extra=name in extras,
            )
            self._fields[name] = field
        self._counts = np.zeros((self._capacity, len(self._fields)), np.int64)

    def _real_lengths(self, mask: Tensor) -> Any:
        """Positions up to the last one that the mask keeps, ``(B,)``; all if examples are padded at the front."""
        counts = mask.detach().cpu().ne(0)
        self.padded_at_front |= bool((counts[:, -1] & ~counts[:, 0]).any()) if counts.shape[1] else False
        if self.padded_at_front:
            return np.full(len(counts), counts.shape[1])
        last = counts.flip(1).int().argmax(1)
        return torch.where(counts.any(1), counts.shape[1] - last, 0).numpy()

    def _width(self, name: str, field: _Field, width: int) -> int:
        if field.width not in (None, width):
            raise ValueError(
                f"`{self._owner}`: rows of {name!r} were {field.width} long and now are {width}. Where lengths differ,"
                f" batches need a mask that is 0 at the padding (here {self._mask!r})."
            )
        field.width = width
        return width

    def _fitting(self, name: str, field: _Field, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        if tensor.dtype != field.dtype or tuple(tensor.shape[2:]) != field.tail or (tensor.ndim == 1) != field.scalar:
            was = ", ".join(["B", *([] if field.scalar else ["n"]), *map(str, field.tail)])
            raise ValueError(
                f"`{self._owner}`: {name!r} was {_name(field.dtype)} of ({was}), and now is {_name(tensor.dtype)} of"
                f" {tuple(tensor.shape)}."
            )
        if field.stored == field.dtype:
            return tensor
        if tensor.numel() and not -(1 << 31) <= int(tensor.min()) <= int(tensor.max()) < 1 << 31:
            self._widen(name, field)
        return tensor.to(field.stored)

    def _widen(self, name: str, field: _Field) -> None:
        """Store a field in full width, because its numbers no longer fit into half."""
        place = list(self._fields).index(name)
        pieces = {slot: self._split(slot) for slot in self._bytes.slots()}
        field.stored = field.dtype
        for slot, parts in pieces.items():
            self._rewrite(slot, [*parts[:place], _doubled(parts[place]), *parts[place + 1 :]])

    def _rewrite(self, slot: int, parts: Sequence[Any]) -> None:
        row = np.concatenate(parts)
        self.num_bytes += len(row) - len(self._bytes[slot])
        self._bytes[slot] = row

    def _as_here(self, blob: Any, state: Mapping[str, Any], place: int) -> Any:
        """An example of a state whose integers may have another width than here."""
        parts, at = [], 0
        saved = [getattr(torch, stored) for _, stored, *_ in state["fields"].values()]
        if saved == [field.stored for field in self._fields.values()]:
            return blob
        for number, ((name, field), stored) in enumerate(zip(self._fields.items(), saved, strict=True)):
            length = int(state["counts"][place, number]) * stored.itemsize * math.prod(field.tail)
            part, at = blob[at : at + length], at + length
            if stored.itemsize > field.stored.itemsize:
                self._widen(name, field)
            parts.append(_doubled(part) if stored.itemsize < field.stored.itemsize else part)
        return np.concatenate(parts)

    def _split(self, slot: int) -> list[Any]:
        row, parts, at = self._bytes[slot], [], 0
        for field, count in zip(self._fields.values(), self._counts[slot].tolist(), strict=True):
            length = count * field.item
            parts.append(row[at : at + length])
            at += length
        return parts


class _Memory:
    """Bytes by slot, in memory."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def __getitem__(self, slot: int) -> Any:
        return self._rows[slot]

    def __setitem__(self, slot: int, row: Any) -> None:
        self._rows[slot] = row.copy()

    def slots(self) -> list[int]:
        return list(self._rows)

    def free(self, slot: int) -> None:
        del self._rows[slot]


class _Mapped:
    """Bytes by slot, in a file of records as long as the longest example so far. Unused parts take no disk space."""

    def __init__(self, folder: str | Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity
        self._lengths: dict[int, int] = {}
        self._records: Any = np.zeros((capacity, 0), np.uint8)

    def __getitem__(self, slot: int) -> Any:
        return self._records[slot, : self._lengths[slot]]

    def __setitem__(self, slot: int, row: Any) -> None:
        if len(row) > self._records.shape[1]:
            self._grow(len(row))
        self._records[slot, : len(row)] = row
        self._lengths[slot] = len(row)

    def slots(self) -> list[int]:
        return list(self._lengths)

    def free(self, slot: int) -> None:
        del self._lengths[slot]

    def _grow(self, length: int) -> None:
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        width = 1 << (length - 1).bit_length()
        with tempfile.TemporaryFile(dir=self._folder, prefix="replay-") as file:  # the mapping outlives its name
            file.truncate(self._capacity * width)
            records: Any = np.memmap(file, np.uint8, "r+", shape=(self._capacity, width))
        for slot, count in self._lengths.items():
            records[slot, :count] = self._records[slot, :count]
        self._records = records


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as a flat ``uint8`` array."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _doubled(part: Any) -> Any:
    """Convert 32-bit integers to 64 bits."""
    return part.copy().view(np.int32).astype(np.int64).view(np.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
