"""The README of an exported model: what it is, what it was trained on, and how well it does."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from forge_lightning import __version__

_TEXT = 'inputs = tokenizer("PROMPT", add_special_tokens=False, return_tensors="pt")\n'
_CHAT = (
    'turns = [{"role": "user", "content": "PROMPT"}]\n'
    'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}\n'
    "inputs = tokenizer.apply_chat_template(turns, **options)\n"
)
_OWN_METRICS = ("forge/",)


def model_card(
    name: str,
    num_params: int,
    config: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None,
    adapter: bool = False,
    is_chat: bool = False,
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        name: Title.
        num_params: Weights of the model.
        config: The run's whole config, as ``config.yaml`` has it.
        summary: The run's ``summary.json``.
        adapter: Whether the folder holds an adapter alone.
        is_chat: Whether it trained on chats.
    """
    config, summary = config or {}, summary or {}
    model = _arguments(config.get("model"))
    data = _arguments(config.get("data"))
    base = model.get("pretrained")
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["forge-lightning", *(["lora"] if model.get("peft") else [])],
    }
    local = base is not None and Path(str(base)).exists()
    if base and not local:
        head["base_model"] = str(base)
    front = yaml.safe_dump(head, sort_keys=False).strip()
    what = f"fine-tuned from `{Path(str(base)).name if local else base}`" if base else "trained from random weights"
    lines = [f"---\n{front}\n---", f"# {name}", f"A causal language model of {num_params:,} weights, {what}."]
    metrics = {
        key: value
        for key, value in (summary.get("metrics") or {}).items()
        if not key.startswith(_OWN_METRICS) and isinstance(value, int | float)
    }
    if metrics:
        rows = "\n".join(f"| `{key}` | {value:.4g} |" for key, value in sorted(metrics.items()))
        lines += [
            f"## Results\n\nAfter {summary.get('steps', 0):,} steps:\n\n| metric | value |\n| --- | --- |\n{rows}"
        ]
    if config:
        told = {
            "data": config.get("data"),
            "optimizer": model.get("optimizer"),
            "lr_scheduler": model.get("lr_scheduler"),
            "peft": model.get("peft"),
            "seed_everything": config.get("seed_everything"),
            "precision": (config.get("trainer") or {}).get("precision"),
        }
        written = yaml.safe_dump(_set(told), sort_keys=False)
        lines += [f"## Training\n\n```yaml\n{written.strip()}\n```"]
        if data.get("path"):
            lines[-1] += "\n\nSay here what the data is, where it comes from, and under which licence."
    used = "AutoModelForCausalLM, AutoTokenizer"
    lines += [
        "## Use\n\n```python\n"
        f"from transformers import {used}\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        f"{_CHAT if is_chat else _TEXT}"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```"
        "\n\nByte tokenizers put an end token behind a prompt without `add_special_tokens=False`.",
        "## Limits\n\nNothing was measured beyond the results above: not safety, not bias, not other data.",
        f"Trained with forge-lightning {__version__}.",
    ]
    return "\n\n".join(lines) + "\n"


def _set(value: Any) -> Any:
    """Settings without those that are not set."""
    if not isinstance(value, Mapping):
        return value
    return {key: _set(inner) for key, inner in value.items() if inner is not None and inner is not False}


def run_files(run: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config and summary of a run directory, each ``None`` if the file does not exist or cannot be parsed."""
    config: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    with suppress(OSError, yaml.YAMLError):
        config = yaml.safe_load((run / "config.yaml").read_text())
    with suppress(OSError, ValueError):
        summary = json.loads((run / "summary.json").read_text())
    return config if isinstance(config, dict) else None, summary if isinstance(summary, dict) else None


def _arguments(part: Any) -> dict[str, Any]:
    """The ``init_args`` of a class in a config."""
    found = part.get("init_args") if isinstance(part, dict) else None
    return found if isinstance(found, dict) else {}
