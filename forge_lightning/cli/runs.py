"""The model and the data of a run directory."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from forge_lightning import models
from forge_lightning.cli.checks import refuse_cut_off
from forge_lightning.cli.configs import config_of_run, newest_checkpoint
from forge_lightning.cli.forge_cli import CheckCLI
from forge_lightning.compression.container import load
from forge_lightning.compression.ternary_export import write_bitnet, write_packed_ternary
from forge_lightning.compression.ternary_qat import TernaryQAT
from forge_lightning.core.mistakes import UsageError
from forge_lightning.data.tokens import TokenDataModule, build_tokenizer
from forge_lightning.models.forge_module import refuse_pretrained


def as_chat(tokenizer: Any, said: str) -> str:
    """A prompt in the tokenizer's chat template: the user's turn, and the beginning of the answer."""
    turns = [{"role": "user", "content": said}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(start)  # which the tokenizer sets itself
    return text


def load_model(name: str) -> tuple[Any, None]:
    """A `ForgeModule` of a folder or hub name, in evaluation mode, with its tokenizer; and no data.

    Raises:
        MisconfigurationException: If there is no model or no tokenizer of that name.
        UsageError: If a compressed model is damaged.
    """
    refuse_pretrained(name)
    module = models.ForgeModule(pretrained=name)
    module.build(build_tokenizer(name))
    return module.eval(), None


def ternary_settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of each `TernaryQAT` of a run, by its whole config."""
    found = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = found if isinstance(found, list) else [found]
    return [callback for callback in callbacks if str(callback.get("class_path")).endswith(".TernaryQAT")]


def export_ternary(module: Any, config: dict[str, Any], output: Path, form: str) -> None:
    """Write the model of a run with `TernaryQAT`, its ternary layers rounded.

    Args:
        module: The run's module, with its weights.
        config: The run's whole config.
        output: Folder to write.
        form: "rounded", "packed" or "bitnet".

    Raises:
        UsageError: If the run had no `TernaryQAT`, or its model cannot be written so.
    """
    callbacks = [TernaryQAT(**(found.get("init_args") or {})) for found in ternary_settings(config)]
    callbacks = [callback for callback in callbacks if not callback.is_off]
    if not callbacks:
        raise UsageError("`--ternary`: the run has no `TernaryQAT` that is on.")
    if module.peft is not None:
        raise UsageError("`--ternary` cannot write a model with adapters.")
    layers = {name: layer for callback in callbacks for name, layer in callback.find_layers(module).items()}
    names = [name.removeprefix("model.") for name in layers]
    if form == "rounded":
        for callback in callbacks:
            callback.round_weights(module)
        module.export(output)
        print(f"The weights of {len(names)} layers are rounded; activations are not.", file=sys.stderr)
        return
    if form == "packed":
        write_packed_ternary(output, module.model, names)
    else:
        write_bitnet(output, module.model, names)
    module.tokenizer.save_pretrained(output)


def write_dense(folder: Path, output: Path) -> None:
    """Write a compressed model as transformers reads it, in bfloat16, with its tokenizer.

    Raises:
        UsageError: If the folder holds no compressed model, or it is damaged.
    """
    model = load(folder, torch.bfloat16)
    model.save_pretrained(output)
    for file in folder.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_tokens")):
            shutil.copy2(file, output / file.name)


def load_run(run: Path, ckpt_path: Path | None, rounded: bool = True) -> tuple[Any, Any, int]:
    """The module of a run directory, in evaluation mode with the weights of a checkpoint; its data; and the step.

    Args:
        run: Run directory.
        ckpt_path: Checkpoint; ``None`` for the run's newest.
        rounded: Whether layers that `TernaryQAT` trained get their rounded weights.

    Raises:
        UsageError: If it is no run, or one of another module than `ForgeModule`.
        MisconfigurationException: If the checkpoint is cut off, or does not fit.
    """
    config = config_of_run(run)
    ckpt_path = newest_checkpoint(run) if ckpt_path is None else ckpt_path
    cli = CheckCLI(["fit", "--config", str(config)])
    module, datamodule = cli.model, cli.datamodule
    if not isinstance(module, models.ForgeModule):
        raise UsageError(
            f"`--run {run}` trained {type(module).__name__}, which does not continue text: only ForgeModule does."
        )
    if isinstance(datamodule, TokenDataModule):
        datamodule.serve(module)
    module.build(datamodule.tokenizer)
    refuse_cut_off(ckpt_path)
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    print(f"Weights: {ckpt_path}, of step {checkpoint['global_step']:,}", file=sys.stderr)
    # Without modules that callbacks added for training.
    parts = {name for name, part in module.named_children() if not getattr(part, "is_auxiliary", False)}
    weights = {name: weight for name, weight in checkpoint["state_dict"].items() if name.split(".")[0] in parts}
    checkpoint["state_dict"] = weights
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    found = cli.config_init["fit"]["trainer"].get("callbacks") or []
    for callback in found if isinstance(found, list) else [found]:
        if rounded and isinstance(callback, TernaryQAT) and not callback.is_off:
            callback.round_weights(module)
            print("Weights of the layers of TernaryQAT are rounded; activations are not.", file=sys.stderr)
    return module.eval(), datamodule, int(checkpoint["global_step"])
