"""Models that were trained with ternary weights, as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.compression.codecs.ternary import Ternary, ternary_scale
from forge_lightning.compression.container import save
from forge_lightning.compression.packed_files import contiguous
from forge_lightning.core.layers import block_list
from forge_lightning.core.mistakes import UsageError

_VALUES_PER_BYTE = 4  # of transformers' layout


def write_packed_ternary(folder: Path, model: Any, layers: Sequence[str]) -> int:
    """Write a model as `forge-fit compress` does: five ternary weights in a byte, the others in bfloat16.

    Args:
        folder: Where.
        model: A causal language model of transformers.
        layers: Names of its ternary layers.

    Returns:
        Size of the file in bytes.
    """
    packed = {f"{name}.weight": Ternary().encode(model.get_submodule(name).weight) for name in layers}
    return save(folder, model, packed, dict.fromkeys(packed, False), torch.bfloat16)


def write_bitnet(folder: Path, model: Any, layers: Sequence[str]) -> None:
    """Write a model in the layout that transformers' own loader of BitNet reads, two bits a weight.

    That loader rounds activations to 8 bits, as training did.

    Args:
        folder: Where; made if it does not exist.
        model: A causal language model of transformers.
        layers: Names of its ternary layers: all linear layers of the blocks.

    Raises:
        UsageError: If a linear layer of the blocks is not ternary, or has a number of outputs that 4 does not divide.
    """
    from safetensors.torch import save_file

    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    stack = block_list(model)
    inside = {id(part) for part in (stack.modules() if stack is not None else ())}
    exact = sorted(name for name in linear - set(layers) if id(model.get_submodule(name)) in inside)
    if exact:
        raise UsageError(
            f"`--ternary bitnet`: transformers makes all linear layers of the blocks ternary, and {exact[0]} is not."
        )
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    for name in layers:
        weight = state[f"{name}.weight"]
        if len(weight) % _VALUES_PER_BYTE:
            raise UsageError(f"`--ternary bitnet`: {name} has {len(weight)} outputs, which 4 does not divide.")
        scale = ternary_scale(weight)
        state[f"{name}.weight"] = _two_bits((weight / scale).round().clamp(-1, 1))
        state[f"{name}.weight_scale"] = (1 / scale).reshape(1)  # outputs are divided by it
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(contiguous(state), folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "float32",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": sorted(linear - set(layers)),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _two_bits(values: Tensor) -> Tensor:
    """-1, 0 and 1 in two bits each: a byte holds the rows ``i``, ``i + R``, ``i + 2 R`` and ``i + 3 R`` of ``4 R``."""
    quarters = (values + 1).to(torch.uint8).chunk(_VALUES_PER_BYTE)
    packed = torch.zeros_like(quarters[0])
    for place, quarter in enumerate(quarters):
        packed |= quarter << (2 * place)
    return packed
