"""The model and the data of a run directory."""

import sys
from pathlib import Path
from typing import Any

import torch

from forge_lightning import models
from forge_lightning.cli.checks import refuse_cut_off
from forge_lightning.cli.configs import config_of_run, newest_checkpoint
from forge_lightning.cli.forge_cli import CheckCLI
from forge_lightning.core.mistakes import UsageError
from forge_lightning.data.tokens import TokenDataModule


def as_chat(tokenizer: Any, said: str) -> str:
    """A prompt in the tokenizer's chat template: the user's turn, and the beginning of the answer."""
    turns = [{"role": "user", "content": said}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(start)  # which the tokenizer sets itself
    return text


def load_run(run: Path, ckpt_path: Path | None) -> tuple[Any, Any, int]:
    """The module of a run directory, in evaluation mode with the weights of a checkpoint; its data; and the step.

    Args:
        run: Run directory.
        ckpt_path: Checkpoint; ``None`` for the run's newest.

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
    return module.eval(), datamodule, int(checkpoint["global_step"])
