"""Points, and what several estimators of their dimension share."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NEAR = 1e-6  # duplicates, in median distances from the mean
_CANCELLED = 1e-3  # a squared distance this small against the squared norms has lost its digits in a Gram matrix
_BLOCK = 256  # rows of the Gram matrix at a time
_WHOLE = 4096  # up to as many points all squared distances are kept, 64 MiB


class PointCloud:
    """Points with what several estimators share: distances to the nearest neighbours, and moments of the Gram matrix.

    Computed on the device of the points, centred, in fp32 (fp64 for fp64 points) with autocast and reduced matmul
    precision off, in blocks of 256 rows. Distances that cancellation would spoil are computed again from differences.
    Memory: ``N²`` distances up to ``N`` = 4096, above that ``256 N``.

    Args:
        points: ``(N, D)``.
        num_neighbors: Nearest neighbours that the estimators will ask for; more are found when asked for.
    """

    def __init__(self, points: Tensor, num_neighbors: int = 20) -> None:
        if points.ndim != 2:
            raise ValueError(f"Points must be (N, D), not {tuple(points.shape)}.")
        if not points.is_floating_point():
            raise ValueError(f"Points must be floating-point numbers, not {points.dtype}.")
        x = points.detach()
        if x.device.type == "mps":  # no fp64 there, which the rare cases need
            x = x.cpu()
        x = x if x.dtype == torch.float64 else x.float()
        largest = float(torch.linalg.vector_norm(x, math.inf)) if x.numel() else 0.0
        if math.isfinite(largest) and largest > 0 and not 2.0**-16 < largest < 2.0**16:
            # By a power of two, which rounds nothing: fourth powers of huge or tiny activations have no place in fp32.
            x = x * 2.0 ** -math.frexp(largest)[1]
        self.points = x
        self.reason = ""
        self._nearest: Tensor
        with _full_precision(x.device.type):
            self._prepare(max(1, num_neighbors))

    @property
    def num_points(self) -> int:
        """Points left after duplicates are removed."""
        return len(self.points)

    def neighbor_distances(self, num_neighbors: int) -> Tensor:
        """Distances to the nearest neighbours, ascending: ``(N, num_neighbors)``, fp64, on the CPU."""
        if num_neighbors > self._nearest.shape[1]:
            with _full_precision(self.points.device.type):
                self._nearest = self._find_nearest(num_neighbors)
        return self._nearest[:, :num_neighbors]

    def count_within(self, radius: float) -> Tensor:
        """Other points closer than ``radius``, for each point: ``(N,)``, fp64, on the CPU."""
        squared = radius * radius
        with _full_precision(self.points.device.type):
            counts = [_count_below(block, squared) for _, block in self._distance_blocks()]
        return torch.cat(counts).double().cpu()

    def neighbor_indices(self, num_neighbors: int) -> Tensor:
        """Nearest neighbours of each point, ``(N, num_neighbors)``."""
        with _full_precision(self.points.device.type):
            found = [block.topk(num_neighbors, largest=False).indices for _, block in self._distance_blocks()]
        return torch.cat(found)

    def _prepare(self, num_neighbors: int) -> None:
        x = self.points
        self._squares: Tensor | None = None
        self._nearest = torch.empty(len(x), 0, dtype=torch.float64)
        if len(x) < 3:
            self.reason = f"{len(x)} points are too few"
        elif not bool(x.isfinite().all()):
            self.reason = "the points are not finite"
        if self.reason:
            return
        self._center()
        if float(self.norms.max()) == 0:
            self.reason = "the points are all the same"
            return
        self._duplicates: list[Tensor] = []
        self._nearest = self._find_nearest(min(num_neighbors, len(x) - 1))
        if self._duplicates:
            keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
            keep[torch.cat(self._duplicates)] = False
            self.points = x[keep]
            self._prepare(num_neighbors)

    def _center(self) -> None:
        self.points = self.points - self.points.mean(0)
        self.points = self.points - self.points.mean(0)  # what rounding left of a large offset
        self.norms = (self.points * self.points).sum(1)  # squared
        self._near = _NEAR * float(self.norms.sqrt().median())

    def _find_nearest(self, num_neighbors: int) -> Tensor:
        """Also fills ``moments``, and lists duplicates."""
        k = min(num_neighbors, len(self.points) - 1)
        self.moments = torch.zeros(len(self.points), dtype=torch.float64)
        self._squares, self._budget = None, 16 * len(self.points)
        try:
            found = [_smallest(block, k) for _, block in self._distance_blocks()]
        except _TooManyCancelled:
            self.points = self.points.double()
            self._center()
            self.moments.zero_()
            self._squares = None
            found = [_smallest(block, k) for _, block in self._distance_blocks()]
        self._budget = sys.maxsize  # later passes repair what this one did
        return torch.cat(found).double().cpu().clamp_(min=0).sqrt_()

    def _distance_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows of the squared distances, infinite on the diagonal."""
        n = len(self.points)
        if n > _WHOLE:
            for start in range(0, n, _BLOCK):
                rows = self.points[start : start + _BLOCK]
                gram = rows @ self.points.T
                self.moments[start : start + _BLOCK] = gram.square().sum(1).double().cpu()
                block = gram.mul_(-2).add_(self.norms).add_(self.norms[start : start + _BLOCK, None])
                yield start, self._repair(start, block)
            return
        if self._squares is None:
            squares = self.points.new_empty(n, n)
            moments = torch.zeros(n, dtype=torch.float64, device=self.points.device)
            for start in range(0, n, _BLOCK):
                stop = min(start + _BLOCK, n)
                gram = self.points[start:stop] @ self.points[start:].T
                energy = gram * gram
                moments[start:stop] += energy.sum(1)
                moments[stop:] += energy[:, stop - start :].sum(0)
                block = gram.mul_(-2).add_(self.norms[start:]).add_(self.norms[start:stop, None])
                squares[start:stop, start:] = block
                squares[stop:, start:stop] = block[:, stop - start :].T
            for start in range(0, n, _BLOCK):
                self._repair(start, squares[start : start + _BLOCK])
            self._squares, self.moments = squares, moments.cpu()
        yield 0, self._squares

    def _repair(self, start: int, block: Tensor) -> Tensor:
        """Compute again, from differences, what cancelled; note duplicates."""
        norms = self.norms[start : start + len(block), None]
        block.diagonal(start).fill_(math.inf)
        if self.points.dtype == torch.float64 and float(block.min()) > (2 * self._near) ** 2:
            return block
        bound = _CANCELLED * norms if self.points.dtype == torch.float32 else torch.full_like(norms, 4 * self._near**2)
        suspects = (block.amin(1) < bound[:, 0]).nonzero()[:, 0]
        if not len(suspects):
            return block
        rows, columns = (block[suspects] < bound[suspects]).nonzero().unbind(1)
        rows = suspects[rows]
        if self.points.dtype == torch.float32:
            self._budget -= len(rows)
            if self._budget < 0:
                raise _TooManyCancelled
        for part in torch.arange(len(rows), device=rows.device).split(max(1, (1 << 22) // self.points.shape[1])):
            i, j = rows[part], columns[part]
            exact = (self.points[i + start] - self.points[j]).square().sum(1)
            block[i, j] = exact
            same = exact <= self._near**2
            if bool(same.any()):  # the first of a group stays
                self._duplicates.append(torch.maximum(i[same] + start, j[same]).unique())
        return block


class _TooManyCancelled(Exception):
    """So many distances are small against the norms that fp64 throughout is cheaper."""


def _smallest(block: Tensor, k: int) -> Tensor:
    """The ``k`` smallest of each row, ascending."""
    if block.device.type == "cpu" and k < block.shape[1] - 1:  # numpy's partition is several times faster than topk
        found = np.partition(block.numpy(), k - 1, axis=1)[:, :k]
        found.sort(axis=1)
        return torch.from_numpy(found)
    return block.topk(k, dim=1, largest=False, sorted=True).values


def _count_below(block: Tensor, bound: float) -> Tensor:
    if block.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(block.numpy() < block.numpy().dtype.type(bound), axis=1))
    return (block < bound).sum(1)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, and fp32 matrix products in fp32 whatever is set for training."""
    backends: Sequence[Any] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
