"""Turn the errors of parser, Trainer and checkpoints into one message for the user."""

import importlib
import inspect
import os
import pickle
import re
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning import callbacks, data, models
from forge_lightning.cli.commands import COMMANDS
from forge_lightning.cli.configs import config_files
from forge_lightning.data.records import DataFileError

_WORDLESS = re.compile(  # what jsonargparse says beside the reason
    r"(- )?Does not validate against any|Subtypes: |Errors:$|- Not a valid subclass|Subclass types expect"
    r"|- a (class path|dict) |- Expected a <class '(NoneType|lightning)|Given value type"
)


def explanation(error: Exception, argv: Sequence[str]) -> str | None:
    """One message for what the user can mend, ``None`` for a fault of ours.

    Args:
        error: What a command has raised.
        argv: The command line.
    """
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if isinstance(error, ArgumentError):
        return parser_error(str(error), argv)
    if isinstance(error, MisconfigurationException | DataFileError):
        return with_place(str(error), argv)
    if isinstance(error, EOFError):
        return "A file that was to be read is empty or cut off: the checkpoint, perhaps."
    if isinstance(error, pickle.UnpicklingError):
        return "The file given as checkpoint is none, or holds more than weights and plain settings."
    if isinstance(error, ValueError):
        return str(error) if argv[0] in COMMANDS or is_of_trainer(error) else None
    return _of_runtime(error) if isinstance(error, RuntimeError) else None


def _missing_package(error: ModuleNotFoundError) -> str | None:
    """The extra that brings a package which Lightning or a config asked for."""
    extras = {"wandb": "wandb", "tensorboard": "tensorboard", "tensorboardX": "tensorboard", "peft": "peft"}
    found = next((package for package in extras if package == error.name or package in str(error)), None)
    if found is None:
        return None
    return _install(found, extras[found])


def _install(package: str, extra: str) -> str:
    return f"The package `{package}` is not installed: pip install 'forge-lightning[{extra}]'."


def _of_runtime(error: RuntimeError) -> str | None:
    if isinstance(error, RecursionError) and is_of_parser(error):
        return "The config is nested too deep, or a part of it holds itself."
    if "more than one stateful callback" in str(error):
        return f"{error} (`forge-fit check` says which.)"
    if "PytorchStreamReader" in str(error):
        return f"A checkpoint is cut off, or none: {str(error).splitlines()[0]}"
    if is_of_trainer(error):
        return str(error)
    if "loading state_dict" not in str(error):
        return None
    return (
        "The checkpoint does not fit the model of this config. A callback that adds weights to the model, as"
        f" `SelfModel` does, belongs in both runs, or in neither.\n{error}"
    )


def parser_error(message: str, argv: Sequence[str] = ()) -> str:
    """Turn an error of jsonargparse into a short message with file, line and close names.

    Args:
        message: The message of jsonargparse's error.
        argv: The command line, whose config files are looked into.
    """
    for logger, package in (("WandbLogger", "wandb"), ("TensorBoardLogger", "tensorboard")):
        if f"loggers.{logger}" in message and find_spec(package) is None:
            return _install(package, package)
    lines = [line for line in message.splitlines() if line.strip() and not _WORDLESS.match(line.strip())]
    if any("Expected a <class" in line for line in lines):  # a number, say, may also be named by where it is defined
        lines = [line for line in lines if not re.search(r"Expected a (dot import )?path", line)]
    lines = [line for line in lines if not re.match(r"\s*Given value: [{\[].{60}", line)]  # all around it
    text = re.sub(r"Subcommand '\w+' does not accept option", "There is no option", "\n".join(lines).strip())
    text = re.sub(r"Expected a dot import path string:", "There is no class of that name:", text)
    for name in re.findall(r"class_path '[\w.]*?(\w+)'", text):  # a class that was found is also tried as a path
        text = re.sub(rf"\n\s*- There is no class of that name: {name}$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n\s*Given value: NestedArg.*", "", text)
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
    files = config_files(argv)
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
        known = ["trainer", "model", "data", "config", "seed_everything", "ckpt_path"]
        within = re.search(r"given class_path '([\w.]+)\.(\w+)'", text)
        if word == "trainer" and rest:
            word, known = rest.split(".")[0], list(inspect.signature(pl.Trainer).parameters)
        elif within:
            known = list(inspect.signature(getattr(importlib.import_module(within[1]), within[2])).parameters)
        elif word in ("model", "data") and rest:
            known = _arguments_of(models if word == "model" else data)
            word = rest.split(".")[0]
    elif found := re.search(r".*given class_path '([\w.]+)\.(\w+)'.*?Option '(\w+)' is not accepted", text, re.DOTALL):
        kind = getattr(importlib.import_module(found[1]), found[2])
        word, known = found[3], list(inspect.signature(kind).parameters)
        if place := getattr(kind, "moved_arguments", {}).get(word):
            text, known = f"{text}\n`{word}` is now `{place}`.", []
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


def _arguments_of(catalogue: Any) -> list[str]:
    """Names of the arguments of all classes of a catalogue."""
    kinds = [kind for name in catalogue.__all__ if isinstance(kind := getattr(catalogue, name), type)]
    return sorted({name for kind in kinds for name in inspect.signature(kind).parameters})


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


def with_place(message: str, argv: Sequence[str]) -> str:
    """Add file and line to a message about an argument and its value."""
    found = re.search(r"`(?:\w+\(|--[\w.]*?\.)(\w+)=([^`()]+)\)?`", message)
    return message + (_place(found[1], found[2].strip("'\""), config_files(argv), argv) if found else "")


def is_of_trainer(error: BaseException) -> bool:
    """Whether Lightning's loops or connectors raised it themselves, so that it is about a setting."""
    where, ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename), Path(pl.__file__).parent
    return any(where.is_relative_to(ours / part) for part in ("loops", "trainer", "callbacks"))


def is_of_parser(error: BaseException) -> bool:
    """Whether it was raised while a config was read."""
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return where.name == "copy.py" or bool({"yaml", "jsonargparse"} & set(where.parts))
