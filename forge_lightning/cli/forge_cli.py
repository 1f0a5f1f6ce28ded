"""LightningCLI as `forge-fit` uses it."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from forge_lightning import callbacks, components, data, models, optim  # also so that short names are known
from forge_lightning.cli.checks import load_data, quiet, refuse_absent, refuse_cut_off, refuse_optimizer
from forge_lightning.cli.configs import resolve_configs


class _SaveConfig(SaveConfigCallback):
    """Also hands the whole config to every logger that keeps hyperparameters, as W&B's page of a run shows them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers:  # no run directory: config.yaml would replace one that the user has here
            self.save_to_log_dir = False
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # config.yaml lies beside its files
                logger.log_hyperparams({"config": config})


def _without_last_epoch(bar: RichProgressBar) -> None:
    """Let a progress bar say "Epoch 2", where Lightning says "Epoch 2/-2" of a run that `max_steps` ends."""
    described: Callable[[int], str] = bar._get_train_description

    def shorter(epoch: int) -> str:
        return re.sub(r"/-\d+", "", described(epoch))

    bar._get_train_description = shorter  # type: ignore[method-assign, assignment]


class _Parser(LightningArgumentParser):
    """Writes class paths as users import them: a saved config outlives a move of the code behind the catalogues."""

    def dump(self, *args: Any, **kwargs: Any) -> str:
        written: str = super().dump(*args, **kwargs)
        return re.sub(r"\bforge_lightning(\.\w+)+", lambda found: _public_paths().get(found[0], found[0]), written)


@cache
def _public_paths() -> dict[str, str]:
    """Where a class is exported, by where it is defined."""
    catalogues = (callbacks, components, optim, data, models)
    return {
        f"{exported.__module__}.{exported.__qualname__}": f"{catalogue.__name__}.{name}"
        for catalogue in catalogues
        for name in catalogue.__all__
        if isinstance(exported := getattr(catalogue, name), type)
    }


class ForgeCLI(LightningCLI):
    """LightningCLI as this project wants it: explicit settings win over a checkpoint's, variables ``FORGE_...``."""

    def __init__(self, args: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "default_env": True,
                "env_prefix": "FORGE",
                "prog": "forge-fit",
                "exit_on_error": False,
                "allow_abbrev": False,
                **{name: {"exit_on_error": False, "allow_abbrev": False} for name in self.subcommands()},
            },
            args=args,
            **kwargs,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForgeCLI":
        """Itself: an optimizer from a config knows its CLI, and a copy of a model would take the Trainer along."""
        return self

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, which writes public class paths."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = _Parser
        return parser

    def instantiate_classes(self) -> None:
        """What an ``__init__`` refuses is a mistake in the config: keep its words, drop the parser's around them."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            reasons = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- `")]
            raise MisconfigurationException("\n".join(reasons) or str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Leave out what `--trainer.enable_progress_bar=false` switches off; Lightning would call it a conflict."""
        settings = self.config_init[self.subcommand]["trainer"]
        if settings.get("enable_progress_bar") is False and isinstance(settings.get("callbacks"), list):
            settings["callbacks"] = [c for c in settings["callbacks"] if not isinstance(c, ProgressBar)]
        trainer = super().instantiate_trainer(**kwargs)
        for bar in (found for found in trainer.callbacks if isinstance(found, RichProgressBar)):  # type: ignore[attr-defined]
            _without_last_epoch(bar)
        return trainer

    def before_fit(self) -> None:
        """Before the run has a directory: what cannot train is refused, and data is fetched."""
        refuse_optimizer(self.model)
        refuse_absent(self.model, self.datamodule)
        self.refuse_checkpoint()
        load_data(self.datamodule, "train")

    def before_validate(self) -> None:
        """As `before_fit`."""
        refuse_absent(self.model, self.datamodule)
        self.refuse_checkpoint()
        load_data(self.datamodule, "val")

    def before_test(self) -> None:
        """As `before_fit`."""
        refuse_absent(self.model, self.datamodule)
        self.refuse_checkpoint()
        load_data(self.datamodule, "test")

    before_predict = before_test

    def refuse_checkpoint(self) -> None:
        """Raise if the checkpoint that the run is to go on from is a file that is not there."""
        path = str(self.config_init[self.subcommand].get("ckpt_path") or "")
        if path.endswith(".ckpt") and "://" not in path and not Path(path).exists():
            raise MisconfigurationException(f"`--ckpt_path {path}`: no such file.")
        if Path(path).is_file():
            refuse_cut_off(Path(path))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self._args = args

    def _parse_ckpt_path(self) -> None:
        settings = self.config.get(self.config.subcommand) if self.config and self.config.get("subcommand") else None
        path = Path(str((settings or {}).get("ckpt_path") or ""))
        if path.is_file():
            refuse_cut_off(path)
        before = self.config.clone() if self.config else self.config
        super()._parse_ckpt_path()
        if before == self.config:
            return
        # What the checkpoint's hyperparameters changed, the YAML or the command line may have said otherwise.
        explicit = self.parser.parse_args(self._args, defaults=False, _skip_validation=True)
        self.config.update(explicit)


def run_trainer(argv: Sequence[str]) -> None:
    """Run one of the Trainer's commands. ``sys.argv`` gets its arguments: launchers run that again as other ranks."""
    sys.argv[1:] = resolve_configs(argv)
    ForgeCLI()


class CheckCLI(ForgeCLI):
    """Everything up to the Trainer: arguments are parsed, and callbacks, data and module made, which is cheap."""

    def __init__(self, args: list[str]) -> None:
        sys.argv[1:] = args  # where the parent wants them
        with quiet():
            super().__init__()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass
