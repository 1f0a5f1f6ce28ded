"""Find and read config files."""

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

_MERGE = "tag:yaml.org,2002:merge"


def config_folders() -> list[Path]:
    """Where configs are looked up, in this order: the working directory, its ``configs``, and those shipped."""
    package = Path(__file__).parents[1]
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
        with suppress(MisconfigurationException, OSError):  # none of that name; inline YAML
            files.append(find_config(name))
    return files


def refuse_doubled_keys(argv: Sequence[str]) -> None:
    """Raise if a config says one thing twice: the parser takes the last, and drops the first without a word."""
    for name in named_configs(argv):
        path = "--config"
        try:
            if not is_inline(name):
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
