"""VPTQ: vectors of weights as entries of a codebook, with second-order feedback."""

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.compression.codecs.rounding import with_feedback
from forge_lightning.compression.packing import pack_bits, unpack_bits
from forge_lightning.core.validate import require


def weighted_kmeans(
    points: Tensor,
    weights: Tensor,
    num_centres: int,
    generator: torch.Generator,
    num_steps: int = 50,
    tolerance: float = 1e-5,
) -> Tensor:
    """Centres with the least weighted squared distance to their points, from centres drawn at random.

    A centre without points moves to the point that is worst off.

    Args:
        points: ``(N, D)``.
        weights: ``(N,)``, at least 0.
        num_centres: How many, ``K``. With no more different points than that, these are the centres.
        generator: Source of the first centres.
        num_steps: Rounds at most.
        tolerance: Share of the error by which a round must improve.

    Returns:
        ``(K, D)``.
    """
    weights = weights.clamp(min=0) + 1e-8 * weights.mean().clamp(min=1e-30)
    if len(points) <= num_centres:
        return torch.cat([points, points.new_zeros(num_centres - len(points), points.shape[1])])
    centres = points[torch.multinomial(weights, num_centres, generator=generator)].clone()
    before = torch.inf
    for _ in range(num_steps):
        nearest, distance = nearest_centres(points, centres)
        total = torch.zeros(num_centres).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(total[:, None] > 0, sums / total.clamp(min=1e-30)[:, None], centres)
        empty = (total == 0).nonzero().flatten()
        errors = distance * weights
        if len(empty):
            centres[empty] = points[errors.topk(len(empty)).indices]
        now = float(errors.sum())
        if not len(empty) and before - now <= tolerance * now:
            break
        before = now
    return centres


def nearest_centres(points: Tensor, centres: Tensor, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Number of the nearest centre of each point, and the squared distance to it: ``(N,)`` both."""
    half = centres.square().sum(1) / 2
    numbers, distances = [], []
    for part in points.split(chunk):
        closeness = torch.addmm(half, part, centres.t(), alpha=-1)
        least, number = closeness.min(1)
        numbers.append(number)
        distances.append((2 * least + part.square().sum(1)).clamp(min=0))
    return torch.cat(numbers), torch.cat(distances)


class VPTQ(Codec):
    """Vectors down a column as numbers of a codebook's entries; later columns make up for the errors of earlier ones.

    The codebook comes of k-means, in which columns count as their inputs do. It is counted: for a small matrix keep it
    small.

    Args:
        vector: Weights of a vector, 1 to 16.
        centroids: Entries of the codebook, a power of two from 2 to 65,536.
        residual: Entries of a second codebook for what the first leaves; 0 for none.
        seed: Random seed for the first centres of k-means.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Liu et al., `VPTQ <https://arxiv.org/abs/2409.17066>`_, 2024. Without outlier columns and norms of columns.
    """

    needs_hessian = True

    def __init__(self, vector: int = 4, centroids: int = 256, residual: int = 0, seed: int = 0) -> None:
        require("VPTQ", 1 <= vector <= 16, "vector", vector, "1 to 16")
        powers = [2**power for power in range(1, 17)]
        require("VPTQ", centroids in powers, "centroids", centroids, "a power of two from 2 to 65,536")
        require("VPTQ", residual in (0, *powers), "residual", residual, "0, or a power of two from 2 to 65,536")
        self.vector, self.centroids, self.residual, self.seed = vector, centroids, residual, seed

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, hessian, row_weights = checked("VPTQ", weight, hessian, row_weights)
        rows, columns = weight.shape
        high = -(-rows // self.vector)
        padded = weight.new_zeros(high * self.vector, columns)
        padded[:rows] = weight
        generator = torch.Generator().manual_seed(self.seed)
        importance = weight.new_ones(columns) if hessian is None else hessian.diagonal()
        of_vectors = importance.repeat(high)
        if row_weights is not None:
            wide = row_weights.new_zeros(high * self.vector)
            wide[:rows] = row_weights
            of_vectors = (wide.view(high, -1).sum(1)[:, None] * importance).flatten()
        points = padded.view(high, self.vector, columns).transpose(1, 2).reshape(-1, self.vector)
        books = [weighted_kmeans(points, of_vectors, self.centroids, generator).half().float()]
        numbers, targets = self._assign(padded, hessian, books)
        if self.residual:
            left = targets - books[0][numbers[0]]  # (high, in, vector)
            books.append(
                weighted_kmeans(left.reshape(-1, self.vector), of_vectors, self.residual, generator).half().float()
            )
            numbers, _ = self._assign(padded, hessian, books)
        tensors: dict[str, Tensor] = {}
        for place, (book, number) in enumerate(zip(books, numbers, strict=True)):
            tensors[f"codebook_{place}"] = book.half()
            tensors[f"numbers_{place}"] = pack_bits(number.flatten(), (len(book) - 1).bit_length())
        return Packed(tensors, {"codec": "VPTQ", "shape": [rows, columns], "vector": self.vector})

    def _assign(self, weight: Tensor, hessian: Tensor | None, books: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Entries of the codebooks for each vector, ``(high, in)`` each, and what they stand for, ``(high, in, v)``."""
        high, columns = len(weight) // self.vector, weight.shape[1]
        numbers = [torch.empty(columns, high, dtype=torch.int64) for _ in books]
        targets = torch.empty(columns, high, self.vector)

        def quantise(column: Tensor, number: int) -> Tensor:
            targets[number] = rest = column.view(high, self.vector)
            read = torch.zeros_like(rest)
            for book, places in zip(books, numbers, strict=True):
                places[number], _ = nearest_centres(rest - read, book)
                read = read + book[places[number]]
            return read.flatten()

        if hessian is None:
            for number, column in enumerate(weight.t().contiguous()):
                quantise(column, number)
        else:
            with_feedback(weight, hessian, quantise)
        return [places.t().contiguous() for places in numbers], targets.transpose(0, 1)

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        (rows, columns), vector = packed.metadata["shape"], packed.metadata["vector"]
        high = -(-rows // vector)
        total = torch.zeros(high, columns, vector)
        for place in range(2):
            if f"codebook_{place}" not in packed.tensors:
                continue
            book = packed.tensors[f"codebook_{place}"].float()
            bits = (len(book) - 1).bit_length()
            numbers = unpack_bits(packed.tensors[f"numbers_{place}"], bits, high * columns)
            total += book[numbers.long()].view(high, columns, vector)
        return total.transpose(1, 2).reshape(-1, columns)[:rows].contiguous()
