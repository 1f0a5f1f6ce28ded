"""The page of a report: HTML that fetches nothing, is read in light and dark, on a phone, and aloud."""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from forge_lightning.reports import figures

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d9d9d9; --soft: #f4f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181d; --line: #3a3f4a; --soft: #20242c;
  --link: #7ab8f5; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: 0.3rem; } a { color: var(--link); }
img { max-width: 100%; height: auto; } figure { margin: 0.8rem 0; } figcaption { font-size: 0.9rem; opacity: 0.85; }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid
  var(--link); outline-offset: 2px; }
@media (max-width: 640px) { figure img { max-width: none; width: 44rem; } }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal; }
td, th { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem 0.25rem 0; text-align: left;
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
ul.remarks { background: var(--soft); padding: 0.7rem 1rem 0.7rem 2rem; border-radius: 0.3rem; }
pre { background: var(--soft); padding: 0.7rem 1rem; overflow-x: auto; font-size: 0.85rem; }
details { margin: 0.6rem 0; } summary { cursor: pointer; }
code { background: var(--soft); padding: 0 0.2rem; border-radius: 0.2rem; }
"""
_NUMBER = re.compile(r"[-–−+]?[\d.,]+(e[-+]?\d+)?( ?(%|s|ms|h|min|nats|GiB))?|–")


class Pictures:
    """Draws figures, light and dark, and keeps those of a folder in order: what it wrote before and not now, goes.

    Args:
        folder: Where the files go; ``None`` for none.
        before: Names of files that an earlier report has written there.
    """

    def __init__(self, folder: Path | None, before: Iterable[str] = ()) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._before = [name for name in before if re.fullmatch(r"[\w.-]+_(light|dark)\.png", name)]

    def figure(self, name: str, caption: str, draw: Callable[[], Any]) -> str:
        """A figure of the page; empty where there is nothing to draw."""
        shown: dict[str, str] = {}
        told = ""
        for mode in ("light", "dark"):
            with figures.theme(dark=mode == "dark"):
                figure = draw()
                if figure is None:
                    return ""
                told = told or described(figure)
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=130)
            shown[mode] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            if self.folder is not None:
                file = f"{name}_{mode}.png"
                (self.folder / file).write_bytes(buffer.getvalue())
                self.names.append(file)
        return (
            '<figure><div class=scroll tabindex=0 role=group aria-label="picture"><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{shown["dark"]}">'
            f'<img src="{shown["light"]}" alt="{html.escape(told or caption)}"></picture></div>'
            f"<figcaption>{words(caption)}</figcaption></figure>"
        )

    def sweep(self) -> None:
        """Remove the pictures of an earlier report that this one has not drawn."""
        if self.folder is not None:
            for name in set(self._before) - set(self.names):
                (self.folder / name).unlink(missing_ok=True)


def described(figure: Any) -> str:
    """What a figure shows, in words: of each panel its title, and where its lines begin, end, and go between."""
    panels = []
    for axis in (axis for axis in figure.axes if axis.get_visible()):
        lines = []
        for line in axis.get_lines():
            values = [float(value) for value in line.get_ydata() if math.isfinite(float(value))]
            label = str(line.get_label())
            if label.startswith("_") or len(values) < 2:
                continue
            least, most = min(values), max(values)
            way = f"from {values[0]:.3g} to {values[-1]:.3g}"
            if least < min(values[0], values[-1]) or most > max(values[0], values[-1]):
                way += f", between {least:.3g} and {most:.3g}"
            lines.append(f"{label} {way}")
        title = axis.get_title("left") or axis.get_title("center") or axis.get_ylabel()
        if lines:
            panels.append(f"{title}: {'; '.join(lines)}.".replace("\n", ", "))
    return " ".join(panels)


def words(text: str) -> str:
    """Text as HTML, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """A table; columns of numbers alone are set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    width = max((len(row) for row in cells), default=0)
    right = [
        header is not None and all(_NUMBER.fullmatch(row[column]) for row in cells if len(row) > column)
        for column in range(width)
    ]

    def line(row: Sequence[str], tag: str) -> str:
        marked = (f"<{tag}{' class=n' if right[i] else ''}>{words(cell)}</{tag}>" for i, cell in enumerate(row))
        return f"<tr>{''.join(marked)}</tr>"

    head = "" if header is None or not cells else line(header, "th")
    return f"<div class=scroll tabindex=0><table>{head}{''.join(line(row, 'td') for row in cells)}</table></div>"


def details(title: str, text: str) -> str:
    """Text as it is, folded away."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-.") or "run"
