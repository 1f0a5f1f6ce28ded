"""What every callback says of itself: one source for the command line, the README and the pages of `docs`."""

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ORDER = (
    "EdgeController",
    "SelfModel",
    "DreamReplay",
    "TemperatureCurriculum",
    "TernaryQAT",
    "GeometryProbe",
    "StageClassifier",
    "Grokfast",
    "Calibration",
    "RNGState",
    "CodeEvaluation",
    "InterruptCheckpoint",
    "RegressionGate",
    "Telemetry",
    "RunSummary",
)
"""The callbacks in the order in which a YAML lists them."""

FIELDS = ("Hook", "Reads", "Changes", "Logs", "Cost", "When to use", "When it does not help")
_MARKS = "<!-- callbacks -->\n", "<!-- /callbacks -->"


@dataclass(frozen=True)
class Card:
    """A callback's docstring, taken apart.

    Args:
        name: The class.
        summary: Its first sentence.
        text: All of it, without arguments, errors and references.
        fields: What stands behind the labels of `FIELDS`.
    """

    name: str
    summary: str
    text: str
    fields: dict[str, str]


def card(name: str) -> Card:
    """The card of a callback of this package.

    Raises:
        KeyError: If there is none of that name.
    """
    if name not in ORDER:
        raise KeyError(f"There is no callback {name!r}. There are {list(ORDER)}.")
    text = _docstring(name)
    text = re.split(r"\n(?:Args|Raises|References):\n", text)[0].rstrip()
    labels = "|".join(FIELDS)
    parts = re.split(rf"^({labels}): ", text, flags=re.MULTILINE)
    fields = {
        label: " ".join(part.split("\n\n")[0].split()) for label, part in zip(parts[1::2], parts[2::2], strict=True)
    }
    return Card(name, " ".join(text.split("\n\n")[0].split()), text, fields)


@cache
def _docstring(name: str) -> str:
    """A callback's docstring, read from its file: importing it would import Lightning, which takes seconds."""
    package = Path(__file__).parent
    catalogue = ast.parse((package / "callbacks" / "__init__.py").read_text())
    module = next(
        line.module
        for line in catalogue.body
        if isinstance(line, ast.ImportFrom) and line.module and any(found.name == name for found in line.names)
    )
    source = ast.parse((package.parent / Path(*module.split("."))).with_suffix(".py").read_text())
    found = next(part for part in source.body if isinstance(part, ast.ClassDef) and part.name == name)
    return ast.get_docstring(found) or ""


def table() -> str:
    """All callbacks as a table in Markdown."""
    lines = ["| callback | does | changes | costs |", "| --- | --- | --- | --- |"]
    for name in ORDER:
        found = card(name)
        cells = (found.summary, found.fields["Changes"], found.fields["Cost"])
        lines.append(f"| `{name}` | " + " | ".join(cell.rstrip(".").replace("``", "`") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(page: Path) -> None:
    """Put the table between the marks of a page."""
    start, end = _MARKS
    text = page.read_text()
    before, rest = text.split(start)
    page.write_text(before + start + table() + end + rest.split(end)[1])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
