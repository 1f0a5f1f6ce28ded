"""What every codec is: a matrix to few bytes, and back."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A weight as it is written: its bytes, and the plain settings needed to read them.

    Args:
        tensors: Indices, scales and codebooks, as uint8, float16 or float32.
        metadata: ``codec``, ``shape`` and what else the decoder needs.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors, codebooks and scales included, by the number of weights."""
        return 8 * self.num_bytes / max(1, int(math.prod(self.metadata["shape"])))


class Codec(ABC):
    """A lossy code for a matrix of weights.

    Subclasses are made from plain settings and have no state.
    """

    registry: ClassVar[dict[str, type["Codec"]]] = {}
    needs_hessian: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Codec.registry[cls.__name__] = cls

    @abstractmethod
    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        """Write a matrix.

        Args:
            weight: Matrix of a linear layer, ``(out, in)``, finite, of any floating type.
            hessian: Mean of ``x xᵀ`` over inputs ``x`` of the layer, ``(in, in)``: the error of outputs is minimised
                in place of that of weights.
            row_weights: How much an error of each output matters, ``(out,)``, at least 0.

        Returns:
            Tensors and metadata.

        Raises:
            ValueError: If the weight is no matrix or not finite, or ``hessian`` or ``row_weights`` do not fit it.
        """

    @classmethod
    @abstractmethod
    def read(cls, packed: Packed) -> Tensor:
        """The matrix that was written, ``(out, in)``, float32."""

    @property
    def label(self) -> str:
        """The class and its settings, as in ``GPTQ(bits=3, group_size=128)``."""
        settings = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in vars(self).items()
        )
        return f"{type(self).__name__}({settings})"


def decode(packed: Packed) -> Tensor:
    """The matrix that a codec wrote, ``(out, in)``, float32.

    Raises:
        ValueError: If the codec is unknown, or the tensors are not what it wrote.
    """
    name = packed.metadata.get("codec")
    if name not in Codec.registry:
        raise ValueError(f"There is no codec {name!r}. There are {sorted(Codec.registry)}.")
    return Codec.registry[str(name)].read(packed)


def checked(
    owner: str, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, Hessian and row weights as float32 on the CPU.

    Raises:
        ValueError: If they cannot be what they are called.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"`{owner}.encode` takes a matrix, not a tensor of shape {tuple(weight.shape)}.")
    weight = weight.detach().float().cpu()
    if not weight.isfinite().all():
        raise ValueError(f"`{owner}.encode`: {int((~weight.isfinite()).sum())} weights are not finite.")
    rows, columns = weight.shape
    for name, given, shape in (("hessian", hessian, (columns, columns)), ("row_weights", row_weights, (rows,))):
        if given is not None and (tuple(given.shape) != shape or not given.isfinite().all()):
            raise ValueError(f"`{owner}.encode({name}=...)` must be finite and of shape {shape}.")
    if row_weights is not None and bool((row_weights < 0).any()):
        raise ValueError(f"`{owner}.encode(row_weights=...)` must be at least 0.")
    return (
        weight,
        None if hessian is None else hessian.detach().float().cpu(),
        None if row_weights is None else row_weights.detach().float().cpu(),
    )


def proxy_error(
    weight: Tensor, decoded: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None
) -> float:
    r"""Error of a layer's outputs: :math:`\sum_i r_i\, (E H E^T)_{ii}` with :math:`E = \hat W - W`.

    Args:
        weight: ``(out, in)``.
        decoded: Weight after coding, ``(out, in)``.
        hessian: ``H``, ``(in, in)``. Default: the identity.
        row_weights: ``r``, ``(out,)``. Default: ones.
    """
    error = (decoded - weight).double()
    by_row = (error * (error if hessian is None else error @ hessian.double())).sum(1)
    return float(by_row.sum() if row_weights is None else by_row @ row_weights.double())


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """Norm of the error by the norm of the weight."""
    return float(torch.linalg.vector_norm(decoded - weight) / torch.linalg.vector_norm(weight).clamp(min=1e-30))
