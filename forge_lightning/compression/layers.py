"""The matrices of a model that can be compressed, each once, however many layers share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from forge_lightning.core.layers import block_list, network_modules, plain_name


@dataclass
class Matrix:
    """A weight of linear layers or embeddings.

    Args:
        name: The parameter's name; of a shared one, the first.
        param: The parameter itself.
        layers: Modules that use it, by name.
        block: Number of the block that it is in; ``None`` outside.
    """

    name: str
    param: nn.Parameter
    layers: dict[str, nn.Module]
    block: int | None

    @property
    def transposed(self) -> bool:
        """Whether the layer holds it as ``(in, out)``, as Hugging Face's ``Conv1D`` does."""
        return all(_is_conv1d(layer) for layer in self.layers.values())

    def read(self) -> Tensor:
        """The values, ``(out, in)``, float32."""
        values = self.param.detach().float().cpu()
        return values.t().contiguous() if self.transposed else values.clone()

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the values, ``(out, in)``."""
        self.param.copy_(values.t() if self.transposed else values)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Weights of all linear layers and embeddings, in the order of the model.

    Args:
        model: Where to look. Modules that callbacks added are left out.
    """
    stack = block_list(model)
    of_block = {id(part): number for number, block in enumerate(stack or []) for part in block.modules()}
    found: dict[int, Matrix] = {}
    for name, module in network_modules(model):
        if not (isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)):
            continue
        param = module.weight
        if not isinstance(param, nn.Parameter) or param.ndim != 2 or not param.is_floating_point():
            continue
        known = found.setdefault(
            id(param), Matrix(plain_name(f"{name}.weight").removeprefix("."), param, {}, of_block.get(id(module)))
        )
        known.layers[plain_name(name)] = module
    return {matrix.name: matrix for matrix in found.values()}


def select(found: dict[str, Matrix], targets: Sequence[str]) -> dict[str, Matrix]:
    """Matrices whose name, or whose layer's name, matches a pattern.

    Args:
        found: From `matrices`.
        targets: Patterns, as ``"*.mlp.*"``; a star stands for anything, dots too.

    Raises:
        ValueError: If a pattern matches nothing, listing close names.
    """
    chosen: dict[str, None] = {}
    for target in targets:
        names = [
            name
            for name, matrix in found.items()
            if fnmatchcase(name, target) or any(fnmatchcase(layer, target) for layer in matrix.layers)
        ]
        if not names:
            close = get_close_matches(target.strip("*."), found, n=5, cutoff=0.3) or list(found)[:5]
            raise ValueError(f"`targets`: no weight matches {target!r}. Close: {close}.")
        chosen |= dict.fromkeys(names)
    return {name: matrix for name, matrix in found.items() if name in chosen}
