"""Refuse, before a run has a directory, what cannot train."""

import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from forge_lightning import data, models
from forge_lightning.data.sources import refuse_absent_file
from forge_lightning.data.text import SourceData
from forge_lightning.data.tokens import TokenDataModule
from forge_lightning.models.forge_module import refuse_pretrained
from forge_lightning.models.optimizers import optimizer_config


def refuse_cut_off(path: Path) -> None:
    """Raise if a checkpoint is empty, or only the beginning of one."""
    with open(path, "rb") as file:
        head = file.read(2)
    if not head or (head == b"PK" and not zipfile.is_zipfile(path)):
        state = "cut off: the disk may have been full, or its writing or copying was interrupted" if head else "empty"
        raise MisconfigurationException(f"The checkpoint {path} is {state}. Name another one.")


def refuse_missing_files(datamodule: Any, *splits: str) -> None:
    """Raise if a file that one of our datamodules reads these splits from is not there."""
    if isinstance(datamodule, SourceData):
        for split in splits:
            for option, path in datamodule.files_of("train" if split == "train" else "val"):
                refuse_absent_file(option, path)
    if not isinstance(datamodule, data.CodeTasks):
        return
    for split in splits:
        found = datamodule.file_of(split)
        if found is not None and (not Path(found[1]).exists() or Path(found[1]).is_dir()):
            why = "it is a directory" if Path(found[1]).is_dir() else "no such file"
            raise MisconfigurationException(f"Cannot read the data file `{found[0]}={found[1]}`: {why}.")


def refuse_absent(model: Any, datamodule: Any) -> None:
    """Raise if what our modules name of Hugging Face is neither here nor on the hub: no weights are read."""
    if builds_network(model) and model.pretrained_tokenizer is not None:
        name, options = model.pretrained_tokenizer
        refuse_pretrained(name, **options)
    if isinstance(datamodule, TokenDataModule):
        datamodule.serve(model)
        _ = datamodule.tokenizer


def load_data(datamodule: Any, split: str) -> None:
    """Raise what would be raised once the run has a directory, if the data of a split cannot be had."""
    refuse_missing_files(datamodule, split)
    if isinstance(datamodule, data.CodeTasks):
        if split == "train":
            datamodule.refuse_training()
        datamodule.load(split)
    elif isinstance(datamodule, SourceData):
        datamodule.setup()  # which is done once


def refuse_optimizer(model: Any) -> None:
    """Raise before any data is read, if the optimizer or the schedule of one of our modules cannot be made as set."""
    shapes: list[list[tuple[int, ...]]] = [[(2, 2)], [(2,)]]
    params: list[Any] = [[torch.nn.Parameter(torch.zeros(shape)) for shape in group] for group in shapes]
    if _configures(model, models.ForgeModule):
        groups = [{"params": params[0]}, {"params": params[1], "weight_decay": 0.0}]
    elif _configures(model, models.AlgorithmicModule):
        groups = [*params[0], *params[1]]
    else:
        return
    try:
        optimizer_config(groups, model.optimizer, model.lr_scheduler)
    except (ValueError, TypeError, RuntimeError) as error:
        raise MisconfigurationException(f"`--model.optimizer` or `--model.lr_scheduler`: {error}") from error


def builds_network(model: Any) -> bool:
    """Whether it makes or loads its network as `ForgeModule` does."""
    kind = models.ForgeModule
    names = ("build", "configure_model", "_pretrained_model", "_new_model")
    return isinstance(model, kind) and all(getattr(type(model), name) is getattr(kind, name) for name in names)


def _configures(model: Any, kind: type[pl.LightningModule]) -> bool:
    """Whether a model makes its optimizer as this class of ours does."""
    return isinstance(model, kind) and type(model).configure_optimizers is kind.configure_optimizers


def refuse_trainer(settings: Any, checkpoints: list[Any]) -> None:
    """Raise if the Trainer does not take its settings, whatever the machine that it will run on."""
    elsewhere = {
        "accelerator": "cpu", "strategy": "auto", "devices": 1, "num_nodes": 1, "precision": None, "plugins": None,
        "sync_batchnorm": False, "logger": False, "callbacks": checkpoints, "profiler": None, "default_root_dir": None,
        "enable_progress_bar": False,
    }  # fmt: skip
    _refuse_names(settings)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this machine; what it says of the run, it says there
        pl.Trainer(**(settings.as_dict() | elsewhere))


def _refuse_names(settings: Any) -> None:
    """Raise if a Trainer's setting names what Lightning does not have, or is a number that it cannot be."""
    known = {
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "profiler": ["simple", "advanced", "pytorch", "xla"],
    }
    for name, values in known.items():
        value = settings.get(name)
        if isinstance(value, str) and (value if name == "accelerator" else value.lower()) not in values:
            close = get_close_matches(value, values) or sorted(set(values))
            raise MisconfigurationException(f"`--trainer.{name}={value}` is unknown to Lightning. Close: {close}.")
    for name in ("devices", "num_nodes", "accumulate_grad_batches"):
        value = settings.get(name)
        if name == "devices" and isinstance(value, str) and value != "auto":
            if not re.fullmatch(r"\s*[+-]?\d+\s*|\s*\d+\s*(,\s*\d+\s*)*,?\s*", value):
                raise MisconfigurationException(f'`--trainer.devices={value}` must be a number, "0, 2", or "auto".')
            value = [int(part) for part in value.split(",") if part.strip()] if "," in value else int(value)
        if name == "devices" and isinstance(value, list):
            if len(set(value)) < len(value) or not value:
                raise MisconfigurationException(f"`--trainer.devices={value}` must be different devices, at least one.")
            if settings.get("accelerator") == "cpu":
                raise MisconfigurationException(f"`--trainer.devices={value}`: CPUs are counted, not numbered.")
        least = -1 if name == "devices" and settings.get("accelerator") != "cpu" else 1
        if isinstance(value, int) and (value == 0 or value < least):
            raise MisconfigurationException(f"`--trainer.{name}={value}` must be at least 1.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of seeds and of this machine's devices."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
