"""The file of a compressed model: packed weights with a hash of each, in one safetensors file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.compression.codecs.base import Packed, decode
from forge_lightning.compression.packed_files import contiguous, digest
from forge_lightning.core.extras import require_extra
from forge_lightning.core.mistakes import UsageError

FILE_NAME = "model.forge.safetensors"
REPORT_NAME = "compression.json"
_FORMAT = "forge-lightning compressed model 1"
_DENSE = "dense"
_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache")


def is_compressed(folder: str | Path) -> bool:
    """Whether a folder holds a compressed model."""
    return (Path(folder) / FILE_NAME).is_file()


def save(
    folder: Path,
    model: Any,
    packed: Mapping[str, Packed],
    transposed: Mapping[str, bool],
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
) -> int:
    """Write a model's file and config. What is not packed is written as it is.

    Args:
        folder: Where; made if it does not exist.
        model: A causal language model of transformers.
        packed: Packed weights, by name.
        transposed: Whether the model holds a weight as ``(in, out)``, by name.
        dtypes: Type of each other weight in the file, by name, or one for all.

    Returns:
        Size of the file in bytes.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        known = first.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        if known != name:
            aliases[name] = known
            continue
        if name in packed:
            parts, entry = packed[name].tensors, dict(packed[name].metadata) | {"transposed": transposed[name]}
        else:
            kept = value.detach().cpu()
            dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, kept.dtype)
            parts = {_DENSE: kept.to(dtype) if kept.is_floating_point() else kept}
            entry = {"codec": None, "shape": list(value.shape)}
        parts = contiguous(parts)
        entries[name] = entry | {"sha256": digest(parts)}
        tensors |= {f"{name}|{part}": content for part, content in parts.items()}
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    content = json.dumps({"entries": entries, "aliases": aliases, "config": _config_of(folder)})
    path = folder / FILE_NAME
    part = path.with_suffix(".part")
    save_file(tensors, part, {"format": _FORMAT, "content": content, "sha256": _hash_of(content)})
    part.replace(path)
    return path.stat().st_size


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _config_of(folder: str | Path) -> dict[str, Any]:
    """What config.json says of the model itself."""
    settings: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return {key: value for key, value in settings.items() if key not in _NOT_OF_THE_MODEL}


def read_weights(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of a compressed model one after the other, decoded, with their names; shared ones under each name.

    Raises:
        UsageError: If the file is missing, damaged, or of a format that is unknown.
    """
    safetensors = require_extra("safetensors", "hf", "`forge_lightning.compression.load`")
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise UsageError(f"`{folder}` holds no {FILE_NAME}: `forge-fit compress` writes one.")
    try:
        file = safetensors.safe_open(path, "pt")
        described = file.metadata() or {}
        if described.get("format") != _FORMAT:
            raise UsageError(f"{path} has the format {described.get('format')!r}; this version reads {_FORMAT!r}.")
        if described["sha256"] != _hash_of(described["content"]):
            raise UsageError(f"{path}: the header is not what was written (SHA-256). Copy the file again.")
        content = json.loads(described["content"])
        entries, aliases = content["entries"], content["aliases"]
        names = list(file.keys())
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged or cut off: {error}. Copy it again.") from None
    _refuse_other_config(folder, content["config"])
    for name, entry in entries.items():
        parts = {key.rpartition("|")[2]: file.get_tensor(key) for key in names if key.rpartition("|")[0] == name}
        found = digest(parts)
        if found != entry["sha256"]:
            raise UsageError(
                f"{path}: the bytes of {name} are not those that were written (SHA-256 {found[:16]}…, written were"
                f" {entry['sha256'][:16]}…). Copy the file again."
            )
        if entry["codec"] is None:
            value = parts[_DENSE]
        else:
            value = decode(Packed(parts, entry))
            value = value.t().contiguous() if entry["transposed"] else value
        yield name, value
        for alias in (alias for alias, known in aliases.items() if known == name):
            yield alias, value


def _refuse_other_config(folder: str | Path, before: Mapping[str, Any]) -> None:
    try:
        now = _config_of(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"`{folder}`: config.json cannot be read ({error}).") from None
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if other:
        raise UsageError(
            f"`{folder}`: {FILE_NAME} and config.json are of different models: {other[0]!r} is"
            f" {now.get(other[0])!r}, and was {before.get(other[0])!r}."
        )


def load(folder: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A compressed model, decoded: a causal language model of transformers, in evaluation mode.

    Args:
        folder: Written by `forge-fit compress`.
        dtype: Type of the weights.
        **options: More for ``AutoModelForCausalLM.from_config``, as ``attn_implementation``.

    Raises:
        UsageError: If a file is missing or damaged, or config and weights are of different models.
        MissingExtraError: If transformers is not installed.

    Example:
        ``model = load("small"); tokenizer = AutoTokenizer.from_pretrained("small")``
    """
    require_extra("transformers", "hf", "`forge_lightning.compression.load`")
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    weights = dict(read_weights(folder))  # before memory is taken for a model that does not fit
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"`{folder}`: {str(error).splitlines()[0]}") from None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    fill(model, weights, folder)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Set all weights of a model.

    Raises:
        UsageError: If they are not this model's.
    """
    own = model.state_dict(keep_vars=True)
    missing, more = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or more or other:
        named = [*(f"no {name}" for name in missing), *(f"{name} too many" for name in more)]
        named += [f"{name} of {tuple(weights[name].shape)} in place of {tuple(own[name].shape)}" for name in other]
        raise UsageError(
            f"`{folder}`: {FILE_NAME} and config.json are of different models ({', '.join(named[:3])}"
            f"{', …' if len(named) > 3 else ''})."
        )
    for name, value in own.items():
        value.copy_(weights[name])
