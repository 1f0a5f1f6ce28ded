"""Find and read config files."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import yaml

from forge_lightning.core.mistakes import UsageError

_MERGE = "tag:yaml.org,2002:merge"


def config_folders() -> list[Path]:
    """Where configs are looked up, in this order: the working directory, its ``configs``, and those shipped."""
    package = Path(__file__).parents[1]
    shipped = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return [Path(), Path("configs"), shipped]


def find_config(name: str) -> Path:
    """The config file of that name, with or without suffix.

    Raises:
        UsageError: If there is none, naming those that exist, and close ones.
    """
    for folder in config_folders():
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    shipped = [shown for shown, _ in shipped_configs()]
    here = [str(path) for folder in (Path(), Path("configs")) for path in sorted(folder.glob("*.yaml"))]
    close = get_close_matches(name, here, n=1, cutoff=0.6)
    close += get_close_matches(name.removesuffix(".yaml"), shipped, n=3, cutoff=0.4)
    raise UsageError(
        f"`--config {name}`: no such file in the working directory, in its `configs`, or among those shipped."
        + (f" Close: {close}. `forge-fit list` shows all." if close else f" Shipped: {', '.join(shipped)}.")
    )


def shipped_configs() -> list[tuple[str, str]]:
    """Name and first comment line of every config that comes with the package."""
    folder = config_folders()[-1]
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        first = path.read_text().split("\n", 1)[0]
        found.append((str(path.relative_to(folder)), first.removeprefix("#").strip()))
    return found


def grouped_configs() -> dict[str, list[tuple[str, str]]]:
    """`shipped_configs`, by what they are for."""
    folder = config_folders()[-1]
    groups: dict[str, list[tuple[str, str]]] = {
        name: [] for name in ("Language models", "Algorithmic tasks", "Add-ons", "Loggers")
    }
    for name, about in shipped_configs():
        kind = name.split("/")[0]
        if kind in ("callbacks", "loggers"):
            group = "Add-ons" if kind == "callbacks" else "Loggers"
        else:
            is_language = "class_path: ForgeModule" in (folder / name).read_text()
            group = "Language models" if is_language else "Algorithmic tasks"
        about = about.removeprefix("Add-on: ").removeprefix("Add-on, ")
        groups[group].append((name.removesuffix(".yaml"), about[:1].upper() + about[1:]))
    return groups


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace the names after ``--config`` by paths. Inline YAML stays."""
    resolved, expect = [], False
    for argument in argv:
        if expect:
            argument = resolve_name(argument)
        elif argument.startswith("--config="):
            argument = "--config=" + resolve_name(argument.removeprefix("--config="))
        expect = not expect and argument in ("--config", "-c")
        resolved.append(argument)
    return resolved


def resolve_name(value: str) -> str:
    """The path of the config of that name; inline YAML as it is."""
    return value if is_inline(value) else str(find_config(value))


def is_inline(value: str) -> bool:
    """Whether it is YAML itself, not the name of a file."""
    return ":" in value and "\n" in value


def named_configs(argv: Sequence[str]) -> list[str]:
    """What a command line says after `--config`."""
    said, expect = [], argv[:1] == ["check"]
    for argument in argv[1:]:
        named = argument.startswith(("--config=", "-c="))
        if named or (expect and not argument.startswith("-")):
            said.append(argument.partition("=")[2] if named else argument)
        expect = argument in ("--config", "-c")
    return said


def config_files(argv: Sequence[str]) -> list[Path]:
    """The config files that a command line names."""
    files = []
    for name in named_configs(argv):
        with suppress(UsageError, OSError):  # none of that name; inline YAML
            files.append(find_config(name))
    return files


def resume_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of `forge-fit fit` that go on with a run, for those of `forge-fit resume RUN`.

    Raises:
        UsageError: If there is no run, or it has no checkpoint.
    """
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            "`forge-fit resume RUN [arguments as for fit]`: name the run's directory, as its summary prints it."
        )
    run = Path(argv[0])
    return ["fit", "--config", str(config_of_run(run)), "--ckpt_path", str(newest_checkpoint(run)), *argv[1:]]


RESUME_HELP = """\
usage: forge-fit resume RUN [arguments as for fit]

Go on with a run from its newest checkpoint, with its config. More steps: `--trainer.max_steps=2000`. The resumed run
writes into a directory of its own, beside the first.
"""


def config_of_run(run: Path) -> Path:
    """The whole config that a run has saved.

    Raises:
        UsageError: If it is missing, naming runs below the directory.
    """
    config = run / "config.yaml"
    if config.is_file():
        return config
    below = [str(path.parent) for path in sorted(run.glob("**/config.yaml"))[:3]] if run.is_dir() else []
    raise UsageError(
        f"`{run}` holds no config.yaml: no run of `forge-fit fit` has begun to train there."
        + (f" There are {below} below it." if below else " The summary that ends a run prints its directory.")
    )


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of a run that was written last; a folder where weights are sharded.

    Raises:
        UsageError: If the run has no checkpoint.
    """
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"`{run}` holds no checkpoint. Name one with `--ckpt_path`.")
    return found[-1]


def find_modules_beside(argv: Sequence[str]) -> None:
    """Let a config name classes of files in the working directory and beside itself, behind all that is installed."""
    for folder in (Path.cwd(), *(path.resolve().parent for path in config_files(argv))):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def refuse_doubled_keys(argv: Sequence[str]) -> None:
    """Raise if a config says one thing twice: the parser takes the last, and drops the first without a word."""
    for name in named_configs(argv):
        path = "--config"
        try:
            if not is_inline(name):
                path, name = str(find_config(name)), find_config(name).read_text()
            node = yaml.compose(name, Loader=yaml.SafeLoader)
        except (UsageError, OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
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
                        raise UsageError(
                            f"{path}, line {line}: `{key.value}` was set in line {first[said]} already. Keep one of"
                            " the two."
                        )
                    first[said] = line
