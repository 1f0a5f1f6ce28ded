"""forge-fit: a LightningCLI with our callbacks, data and models by short name, and a few commands around it."""

import argparse
import importlib
import inspect
import json
import logging
import os
import pickle
import re
import sys
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException

from forge_lightning import callbacks, cards, components, data, models, optim  # also so that short names are known
from forge_lightning.data.records import DataFileError
from forge_lightning.data.tokens import TokenDataModule
from forge_lightning.models.forge_module import refuse_config, refuse_pretrained
from forge_lightning.models.optimizers import optimizer_config

_MERGE = "tag:yaml.org,2002:merge"
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def config_folders() -> list[Path]:
    """Where configs are looked up, in this order: the working directory, its ``configs``, and those shipped."""
    package = Path(__file__).parent
    shipped = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return [Path(), Path("configs"), shipped]


def find_config(name: str) -> Path:
    """The config file of that name, with or without suffix.

    Raises:
        MisconfigurationException: If there is none, naming those that exist, and close ones.
    """
    for folder in config_folders():
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    shipped = [shown for shown, _ in shipped_configs()]
    close = get_close_matches(name.removesuffix(".yaml"), shipped, n=3, cutoff=0.4)
    raise MisconfigurationException(
        f"`--config {name}`: no such file in the working directory, in its `configs`, or among those shipped."
        + (f" Close: {close}." if close else "")
        + f" Shipped: {', '.join(shipped)}."
    )


def shipped_configs() -> list[tuple[str, str]]:
    """Name and first comment line of every config that comes with the package."""
    folder = config_folders()[-1]
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        first = path.read_text().split("\n", 1)[0]
        found.append((str(path.relative_to(folder)), first.removeprefix("#").strip()))
    return found


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace the names after ``--config`` by paths. Inline YAML stays."""
    resolved, expect = [], False
    for argument in argv:
        if expect:
            argument = _resolve(argument)
        elif argument.startswith("--config="):
            argument = "--config=" + _resolve(argument.removeprefix("--config="))
        expect = not expect and argument in ("--config", "-c")
        resolved.append(argument)
    return resolved


def _resolve(value: str) -> str:
    return value if _is_inline(value) else str(find_config(value))


def _is_inline(value: str) -> bool:
    return ":" in value and "\n" in value


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
        return super().instantiate_trainer(**kwargs)

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


class _CheckCLI(ForgeCLI):
    """Everything up to the Trainer: arguments are parsed, and callbacks, data and module made, which is cheap."""

    def __init__(self, args: list[str]) -> None:
        sys.argv[1:] = args  # where the parent wants them
        with _quiet():
            super().__init__()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def refuse_cut_off(path: Path) -> None:
    """Raise if a checkpoint is empty, or only the beginning of one."""
    with open(path, "rb") as file:
        head = file.read(2)
    if not head or (head == b"PK" and not zipfile.is_zipfile(path)):
        state = "cut off: the disk may have been full, or its writing or copying was interrupted" if head else "empty"
        raise MisconfigurationException(f"The checkpoint {path} is {state}. Name another one.")


def refuse_doubled_keys(argv: Sequence[str]) -> None:
    """Raise if a config says one thing twice: the parser takes the last, and drops the first without a word."""
    for name in _configs(argv):
        path = "--config"
        try:
            if not _is_inline(name):
                path, name = str(find_config(name)), find_config(name).read_text()
            node = yaml.compose(name, Loader=yaml.SafeLoader)
        except (MisconfigurationException, OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
            continue  # which is explained where it is read
        waiting, seen = [node], set()
        while waiting:
            node = waiting.pop()
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                waiting += node.value
            elif isinstance(node, yaml.MappingNode):
                first: dict[tuple[str, str], int] = {}
                for key, value in node.value:
                    waiting += [key, value]
                    if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                        continue
                    line, said = key.start_mark.line + 1, (key.tag, key.value)
                    if said in first:
                        raise MisconfigurationException(
                            f"{path}, line {line}: `{key.value}` was set in line {first[said]} already. Keep one of"
                            " the two."
                        )
                    first[said] = line


def refuse_missing_files(datamodule: Any, *splits: str) -> None:
    """Raise if a file that one of our datamodules reads these splits from is not there."""
    if not isinstance(datamodule, data.CodeTasks | data.TextData):
        return
    for split in splits:
        found = datamodule.file_of(split)
        if found is not None and (not Path(found[1]).exists() or Path(found[1]).is_dir()):
            why = "it is a directory" if Path(found[1]).is_dir() else "no such file"
            raise MisconfigurationException(f"Cannot read the data file `{found[0]}={found[1]}`: {why}.")


def refuse_absent(model: Any, datamodule: Any) -> None:
    """Raise if what our modules name of Hugging Face is neither here nor on the hub: no weights are read."""
    if _builds(model) and model.pretrained_tokenizer is not None:
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
    elif isinstance(datamodule, data.TextData):
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


def _builds(model: Any) -> bool:
    """Whether it makes or loads its network as `ForgeModule` does."""
    kind = models.ForgeModule
    names = ("build", "configure_model", "_pretrained_model", "_new_model")
    return isinstance(model, kind) and all(getattr(type(model), name) is getattr(kind, name) for name in names)


def _configures(model: Any, kind: type[pl.LightningModule]) -> bool:
    """Whether a model makes its optimizer as this class of ours does."""
    return isinstance(model, kind) and type(model).configure_optimizers is kind.configure_optimizers


def check(argv: Sequence[str]) -> int:
    """Types and ranges of a config, its wiring, and whether what it names is there; no data read, no weights made."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: forge-fit check CONFIG [--config CONFIG ...] [arguments as for fit]\n\n" + (check.__doc__ or ""))
        return 0 if argv else 2
    named = argv[0].split("=")[0] in ("--config", "-c")  # as `fit` takes it
    refuse_doubled_keys(["check", *argv])
    cli = _CheckCLI(["fit", *resolve_configs([*(() if named else ("--config",)), *argv])])
    trainer = cli.config_init["fit"]["trainer"]
    if isinstance(cli.datamodule, data.CodeTasks):
        cli.datamodule.refuse_training()
    refuse_missing_files(cli.datamodule, "train", "val", "test")
    refuse_optimizer(cli.model)
    refuse_absent(cli.model, cli.datamodule)
    if _builds(cli.model) and cli.model.pretrained is not None and isinstance(cli.datamodule, TokenDataModule):
        cli.model.refuse_other_tokenizer(cli.datamodule.tokenizer)
    cli.refuse_checkpoint()
    made = True
    if _builds(cli.model) and cli.model.config is not None:
        made = refuse_config(cli.model.config, getattr(cli.datamodule, "tokenizer", None))
    found = trainer.get("callbacks") or []
    found = found if isinstance(found, list) else [found]
    _refuse_trainer(trainer, [c for c in found if isinstance(c, pl.callbacks.Checkpoint)])
    keys = [callback.state_key for callback in found if _is_stateful(callback)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise MisconfigurationException(
            f"`trainer.callbacks` holds {', '.join(twice)} twice, and their states would collide in a checkpoint."
            " Give one of them a `name`, or drop it."
        )
    steers = any(isinstance(c, callbacks.EdgeController) for c in found)
    if steers and not _has_choices(cli.datamodule):
        raise MisconfigurationException(
            f"`EdgeController` has nothing to choose from in this {type(cli.datamodule).__name__}. Use GeneratedTasks,"
            " or CodeTasks with `difficulty`."
        )
    if getattr(cli.model, "self_model", None) is not None and any(isinstance(c, callbacks.SelfModel) for c in found):
        raise MisconfigurationException(
            "The model has a head of its own, `self_model`, and the callback `SelfModel` would be a second. Use one of"
            " the two (--model.self_model=null)."
        )
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


def _refuse_trainer(settings: Any, checkpoints: list[Any]) -> None:
    """Raise if the Trainer does not take its settings, whatever the machine that it will run on."""
    elsewhere = {
        "accelerator": "cpu", "strategy": "auto", "devices": 1, "num_nodes": 1, "precision": None, "plugins": None,
        "sync_batchnorm": False, "logger": False, "callbacks": checkpoints, "profiler": None, "default_root_dir": None,
        "enable_progress_bar": False,
    }  # fmt: skip
    _refuse_names(settings)
    with _quiet(), warnings.catch_warnings():
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
def _quiet() -> Iterator[None]:
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


def _has_choices(datamodule: Any) -> bool:
    """Whether its training data can be chosen by difficulty; of somebody else's, that is not known here."""
    if isinstance(datamodule, data.CodeTasks):
        return datamodule.difficulty_by is not None
    return not isinstance(datamodule, data.TextData | data.AlgorithmicData)


def _is_stateful(callback: pl.Callback) -> bool:
    return type(callback).state_dict is not pl.Callback.state_dict


def list_configs(argv: Sequence[str]) -> int:
    """Every shipped config with its one-line description; or the callbacks, and what one of them says of itself."""
    parser = argparse.ArgumentParser("forge-fit list", description=list_configs.__doc__)
    every = sorted(cards.ORDER)
    spelled = {name.lower(): name for name in every}
    parser.add_argument(
        "--callbacks",
        nargs="?",
        const="all",
        metavar="NAME",
        type=lambda name: spelled.get(name.lower(), name),
        choices=["all", *every],
        help=f"of {', '.join(every)}",
    )
    wanted = parser.parse_args(argv).callbacks
    if wanted in every:
        print(cards.card(wanted).text)
        print(f"\nIts arguments: forge-fit fit --trainer.callbacks.help={wanted}")
        return 0
    rows = shipped_configs()
    if wanted == "all":
        rows = [(name, cards.card(name).summary) for name in cards.ORDER]
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        print(f"{name:{width}}  {about}")
    return 0


def _load_run(run: Path, ckpt_path: Path | None) -> tuple[Any, Any]:
    """The module and datamodule of a run directory, with the weights of a checkpoint."""
    config = run / "config.yaml"
    if not config.is_file():
        below = [str(path.parent) for path in sorted(run.glob("**/config.yaml"))[:3]] if run.is_dir() else []
        raise MisconfigurationException(
            f"`--run {run}` holds no config.yaml: no run of `forge-fit fit` has begun to train there."
            + (f" There are {below} below it." if below else " The summary that ends a run prints its directory.")
        )
    if ckpt_path is None:
        found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise MisconfigurationException(f"`--run {run}` holds no checkpoint. Name one with `--ckpt_path`.")
        ckpt_path = found[-1]
    cli = _CheckCLI(["fit", "--config", str(config)])
    module, datamodule = cli.model, cli.datamodule
    if not isinstance(module, models.ForgeModule):
        raise MisconfigurationException(
            f"`--run {run}` trained {type(module).__name__}, which does not continue text: only ForgeModule does."
        )
    if isinstance(datamodule, TokenDataModule):
        datamodule.serve(module)
    module.build(datamodule.tokenizer)
    refuse_cut_off(ckpt_path)
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    print(f"Weights: {ckpt_path}, of step {checkpoint['global_step']:,}", file=sys.stderr)
    weights = {name: w for name, w in checkpoint["state_dict"].items() if not name.startswith("self_model_head")}
    module.load_state_dict(weights)  # without what `SelfModel` added for training
    module.on_load_checkpoint(checkpoint)
    return module.eval(), datamodule


def generate(argv: Sequence[str]) -> int:
    """Continue a prompt with the model of a run."""
    parser = argparse.ArgumentParser("forge-fit generate", description=generate.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, as the summary of a fit prints it")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    args = parser.parse_args(argv)
    module, _ = _load_run(args.run, args.ckpt_path)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    print(module.complete([args.prompt], **options)[0])
    return 0


def export(argv: Sequence[str]) -> int:
    """Write the model and tokenizer of a run as a Hugging Face folder."""
    parser = argparse.ArgumentParser("forge-fit export", description=export.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, as the summary of a fit prints it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    args = parser.parse_args(argv)
    if (args.output / "config.json").exists():
        raise MisconfigurationException(f"`--output {args.output}` holds a model already. Name another, or remove it.")
    module, _ = _load_run(args.run, args.ckpt_path)
    module.export(args.output)
    print(
        f"Wrote {args.output}: load it with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained of"
        " transformers. A prompt to continue takes tokenizer(prompt, add_special_tokens=False): byte tokenizers put an"
        " end token behind it otherwise."
    )
    return 0


def analyze(argv: Sequence[str]) -> int:
    """Draw and sum up what runs recorded: one page, its pictures, and a JSON of the same numbers."""
    from forge_lightning.reports.analysis import analyze as report
    from forge_lightning.reports.analysis import analyze_checkpoint

    parser = argparse.ArgumentParser("forge-fit analyze", description=analyze.__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="run directory, or its trace.jsonl; several are compared, those with one parent directory as one group,"
        " a run that was resumed as one with its beginning",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint alone, in place of runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write; default: `analysis` in the run,"
        " beside the checkpoint, or for several runs in the working directory",
    )
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.checkpoint):
        parser.error("name one or more runs, or a checkpoint with --checkpoint")
    if args.checkpoint:
        if not args.checkpoint.is_file():
            raise MisconfigurationException(f"`--checkpoint {args.checkpoint}`: no such file.")
        output = args.output or args.checkpoint.parent / f"{args.checkpoint.stem}_analysis"
        page = analyze_checkpoint(args.checkpoint, output)
    else:
        for run in args.runs:
            if not run.exists():
                raise MisconfigurationException(f"`forge-fit analyze {run}`: no such file or directory.")
        first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
        page = report(args.runs, args.output or (first if len(args.runs) == 1 else Path()) / "analysis")
    print(f"Wrote {page}")
    return 0


COMMANDS = {"list": list_configs, "check": check, "analyze": analyze, "generate": generate, "export": export}


_WORDLESS = re.compile(  # what jsonargparse says beside the reason
    r"(- )?Does not validate against any|Subtypes: |Errors:$|- Not a valid subclass|Subclass types expect"
    r"|- a (class path|dict) |- Expected a <class '(NoneType|lightning)|Given value type"
)


def parser_error(message: str, argv: Sequence[str] = ()) -> str:
    """What is wrong in a config, without what the parser says around it, with the file and line, and close names.

    Args:
        message: Of jsonargparse's error.
        argv: The command line, whose config files are looked into.
    """
    lines = [line for line in message.splitlines() if line.strip() and not _WORDLESS.match(line.strip())]
    if any("Expected a <class" in line for line in lines):  # a number, say, may also be named by where it is defined
        lines = [line for line in lines if not re.search(r"Expected a (dot import )?path", line)]
    lines = [line for line in lines if not re.match(r"\s*Given value: [{\[].{60}", line)]  # all around it
    text = re.sub(r"Subcommand '\w+' does not accept option", "There is no option", "\n".join(lines).strip())
    text = re.sub(r"Expected a dot import path string:", "There is no class of that name:", text)
    text = re.sub(r"Type typing.* expects a function or a callable class: |[.] Got value: Namespace.*", "", text)
    stranger = r"Import path (?:([\w.]+)\.(\w+) )?does not correspond to a subclass of"
    if (found := re.search(stranger, text)) and (
        found := found if found[1] else re.search(r"Given value: ([\w.]+)\.(\w+)", text)
    ):
        kind = getattr(importlib.import_module(found[1]), found[2], None)
        if any(base.__module__.startswith("pytorch_lightning") for base in getattr(kind, "__mro__", ())):
            text += (
                f"\n{found[2]} is a class of the package `pytorch_lightning`, which forge-fit does not run: its"
                " classes are others than those of `lightning`. Import `lightning.pytorch` in its place, or use the"
                " callbacks in a Trainer of `pytorch_lightning`."
            )
    files = _config_files(argv)
    if text == "Unexpected config:" and (file := next((f for f in files if not f.read_text().strip()), None)):
        return f"{file} is empty."
    if "<unicode string>" in text and (file := next(filter(_is_no_yaml, files), None)):
        return text.replace("<unicode string>", str(file))
    if re.match(r"unrecognized arguments: \S+\.ya?ml", text):
        return f"{text}. Each further file goes behind a `--config` of its own."
    if re.match(r"the following arguments are required: \w+\.(data|model)", text):
        return f"{text}. An add-on goes behind a whole recipe: `--config recipe.yaml --config add_on.yaml`."
    word, known = "", []
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        word, known = found[2], dir(importlib.import_module(found[1]))
    elif found := re.search(r"(?:There is no class of that name:|Unable to import) '?([\w.]+)", text):
        word = found[1].split(".")[-1]
        known = [name for part in (callbacks, data, models) for name in part.__all__]
        known += [name for part in (pl.callbacks, torch.optim) for name in vars(part) if name[0].isupper()]
    elif found := re.search(r"(?:There is no option '|unrecognized arguments: --)([\w.]+)", text):
        word, _, rest = found[1].partition(".")
        known = ["trainer", "model", "data", "seed_everything", "ckpt_path"]
        if word == "trainer" and rest:
            word, known = rest.split(".")[0], list(inspect.signature(pl.Trainer).parameters)
    elif found := re.search(r"given class_path '([\w.]+)\.(\w+)'.*Option '(\w+)' is not accepted", text, re.DOTALL):
        word, known = found[3], list(inspect.signature(getattr(importlib.import_module(found[1]), found[2])).parameters)
    elif keys := re.findall(r'Parser key "([\w.]+)"', text):
        word = keys[-1].split(".")[-1]  # the innermost
    if any(re.match(r"--trainer\.callbacks\.(?!help)", argument) for argument in argv):
        text += (
            "\n`--trainer.callbacks.…` reaches the last callback alone. Set another's in a YAML that lists `callbacks`"
            " anew."
        )
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    value = re.search(r"(?:Got|Given) value: ([\w+-]+)", text)
    return text + _place(word, value[1] if value else "", files, argv) + (f"\nClose: {close}." if close else "")


def _config_files(argv: Sequence[str]) -> list[Path]:
    """The config files that a command line names."""
    files = []
    for name in _configs(argv):
        with suppress(MisconfigurationException, OSError):  # none of that name; inline YAML
            files.append(find_config(name))
    return files


def _configs(argv: Sequence[str]) -> list[str]:
    """What a command line says after `--config`."""
    said, expect = [], argv[:1] == ["check"]
    for argument in argv[1:]:
        named = argument.startswith(("--config=", "-c="))
        if named or (expect and not argument.startswith("-")):
            said.append(argument.partition("=")[2] if named else argument)
        expect = argument in ("--config", "-c")
    return said


def _is_no_yaml(path: Path) -> bool:
    try:
        ArgumentParser(exit_on_error=False).parse_string(path.read_text())
    except ArgumentError as error:
        return "<unicode string>" in str(error)
    return False


def _place(word: str, value: str, files: Sequence[Path], argv: Sequence[str]) -> str:
    """``(file, line N)`` where a key stands with this value, if that is in one place alone."""
    elsewhere = [argument for argument in argv if argument.startswith("--") or "\n" in argument]
    elsewhere += [name.lower() for name in os.environ if name.startswith("FORGE_")]
    if not word or any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text) for text in elsewhere):
        return ""
    wanted = re.compile(rf"(^|[\s.{{,:-]){re.escape(word)}(?!\w)")
    given = re.compile(rf"(?<![\w.]){re.escape(value)}(?![\w.])") if value else re.compile("")
    places = [
        (path, number)
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wanted.search(line.split("#")[0]) and given.search(line)
    ]
    return f"\n({places[0][0]}, line {places[0][1]})" if len(places) == 1 else ""


def _placed(message: str, argv: Sequence[str]) -> str:
    """A message that tells of an argument and its value, with where they stand."""
    found = re.search(r"`(?:\w+\(|--[\w.]*?\.)(\w+)=([^`()]+)\)?`", message)
    return message + (_place(found[1], found[2].strip("'\""), _config_files(argv), argv) if found else "")


def _usage() -> str:
    lines = [f"  {name:9} Lightning's {name}; `forge-fit {name} --help`" for name in TRAINER_COMMANDS]
    lines += [f"  {name:9} {(run.__doc__ or '').splitlines()[0].replace('``', '`')}" for name, run in COMMANDS.items()]
    return "usage: forge-fit COMMAND ...\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Mistakes of the user end in one message and exit code 2, never in a traceback of ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Lightning 2.6 on torch 2.13: nothing a user could act on
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if argv[0] not in TRAINER_COMMANDS:
            raise MisconfigurationException(f"`forge-fit {argv[0]}`: no such command.\n{_usage()}")
        variable = f"FORGE_{argv[0].upper()}__CONFIG"
        if variable in os.environ:
            os.environ[variable] = _resolve(os.environ[variable])
            refuse_doubled_keys([argv[0], "--config", os.environ[variable]])
        refuse_doubled_keys(argv)
        # In `sys.argv`, because that is what a strategy's launcher runs again in its other processes.
        sys.argv[1:] = resolve_configs(argv)
        ForgeCLI()
    except ArgumentError as error:
        return _explain(parser_error(str(error), argv))
    except SIGTERMException:
        return 143  # 128 + SIGTERM, as a shell says it
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    except SystemExit as error:  # the Trainer ends so, with 1, what was interrupted
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise
    except (MisconfigurationException, DataFileError, OSError) as error:
        return _explain(_placed(str(error), argv))
    except EOFError:
        return _explain("A file that was to be read is empty or cut off: the checkpoint, perhaps.")
    except pickle.UnpicklingError:
        return _explain("The file given as checkpoint is none, or holds more than weights and plain settings.")
    except ValueError as error:
        if argv[0] not in COMMANDS and not _is_of_trainer(error):
            raise
        return _explain(str(error))
    except RuntimeError as error:
        if isinstance(error, RecursionError) and _is_of_parser(error):
            return _explain("The config is nested too deep, or a part of it holds itself.")
        if "more than one stateful callback" in str(error):
            return _explain(f"{error} (`forge-fit check` says which.)")
        if "PytorchStreamReader" in str(error):
            return _explain(f"A checkpoint is cut off, or none: {str(error).splitlines()[0]}")
        if _is_of_trainer(error):
            return _explain(str(error))
        if "loading state_dict" not in str(error):
            raise
        hint = ""
        if "self_model" in str(error):
            hint = (
                "\nWhat begins with `self_model` is the head of `SelfModel`, or of ForgeModule's `self_model`: train"
                " and test with the same one, or without in both."
            )
        return _explain(f"The checkpoint does not fit the model of this config.{hint}\n{error}")
    return 0


def _is_of_trainer(error: BaseException) -> bool:
    """Whether Lightning's loops or connectors raised it themselves: it tells of a setting."""
    where, ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename), Path(pl.__file__).parent
    return any(where.is_relative_to(ours / part) for part in ("loops", "trainer", "callbacks"))


def _is_of_parser(error: BaseException) -> bool:
    """Whether it was raised while a config was read."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return where.name == "copy.py" or bool({"yaml", "jsonargparse"} & set(where.parts))


def _explain(message: str) -> int:
    if os.environ.get("FORGE_TRACEBACK"):
        raise
    print(f"forge-fit: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
