"""`forge-fit check`."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning import data
from forge_lightning.cli.checks import (
    builds_network,
    refuse_absent,
    refuse_missing_files,
    refuse_optimizer,
    refuse_trainer,
)
from forge_lightning.cli.configs import refuse_doubled_keys, resolve_configs
from forge_lightning.cli.forge_cli import CheckCLI
from forge_lightning.core.callback import ForgeCallback
from forge_lightning.data.text import SourceData
from forge_lightning.data.tokens import TokenDataModule
from forge_lightning.models.forge_module import hugging_face_config, refuse_config


def check(argv: Sequence[str]) -> int:
    """Refuse what cannot train, as far as that can be known without data and weights."""
    named = argv[0].split("=")[0] in ("--config", "-c")  # as `fit` takes it
    refuse_doubled_keys(["check", *argv])
    cli = CheckCLI(["fit", *resolve_configs([*(() if named else ("--config",)), *argv])])
    trainer = cli.config_init["fit"]["trainer"]
    if isinstance(cli.datamodule, data.CodeTasks):
        cli.datamodule.refuse_training()
    refuse_missing_files(cli.datamodule, "train", "val", "test")
    refuse_optimizer(cli.model)
    refuse_absent(cli.model, cli.datamodule)
    if builds_network(cli.model) and cli.model.pretrained is not None and isinstance(cli.datamodule, TokenDataModule):
        cli.model.refuse_other_tokenizer(cli.datamodule.tokenizer)
    cli.refuse_checkpoint()
    made = True
    if builds_network(cli.model) and cli.model.config is not None:
        made = refuse_config(cli.model.config, getattr(cli.datamodule, "tokenizer", None))
    _refuse_long_rows(cli.model, cli.datamodule)
    if isinstance(cli.datamodule, SourceData):
        cli.datamodule.preflight()
    found = trainer.get("callbacks") or []
    found = found if isinstance(found, list) else [found]
    refuse_trainer(trainer, [c for c in found if isinstance(c, pl.callbacks.Checkpoint)])
    keys = [callback.state_key for callback in found if _is_stateful(callback)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise MisconfigurationException(
            f"`trainer.callbacks` holds {', '.join(twice)} twice, and their states would collide in a checkpoint."
            " Give one of them a `name`, or drop it."
        )
    for callback in found:
        if isinstance(callback, ForgeCallback):
            callback.preflight(cli.model, cli.datamodule)
    names = ", ".join(type(callback).__name__ for callback in found) or "none"
    config = argv[0] if not named else argv[0].partition("=")[2] or argv[1]
    print(f"{config}: valid. {type(cli.model).__name__} on {type(cli.datamodule).__name__}; callbacks: {names}.")
    if not made:
        print("Whether its model can be made is not known: it cannot be without memory for its weights.")
    if isinstance(cli.datamodule, data.CodeTasks):
        for split, what in (("train", "Its data comes"), ("test", "Its test data comes")):
            if (unset := cli.datamodule.from_hub(split)) is not None:
                print(f"{what} from the Hugging Face hub, since neither {unset} names a file.")
                break
    return 0


def _refuse_long_rows(model: Any, datamodule: Any) -> None:
    """Raise if rows of text are longer than the model has positions."""
    if not builds_network(model) or not isinstance(datamodule, SourceData) or not datamodule.packing:
        return
    from transformers import AutoConfig

    if model.config is not None:
        config = hugging_face_config({"vocab_size": 2, **model.config})
    else:
        name, _ = model.pretrained_tokenizer
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):  # of an adapter, say
            return
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and datamodule.length > positions:
        raise MisconfigurationException(
            f"Rows of {type(datamodule).__name__} have {datamodule.length} tokens, but the model has only {positions}"
            " positions. Lower `block_size` or `max_length`, or give the model more positions."
        )


def _is_stateful(callback: pl.Callback) -> bool:
    return type(callback).state_dict is not pl.Callback.state_dict
