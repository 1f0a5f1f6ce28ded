"""Packed weights in files of their own, and hashes of tensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Packed


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in hexadecimal."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()


def write_packed(path: Path, packed: Packed) -> None:
    """Write one packed weight, whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file(contiguous(packed.tensors), part, {"metadata": json.dumps(packed.metadata)})
    part.replace(path)


def read_packed(path: Path) -> Packed:
    """Read what `write_packed` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return Packed({name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["metadata"]))  # noqa: SIM118


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors writes them."""
    return {name: value.contiguous() for name, value in tensors.items()}
