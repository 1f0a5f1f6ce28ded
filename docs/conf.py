"""Settings of `make docs`."""

import re
from typing import Any

from forge_lightning import __version__
from forge_lightning.cards import FIELDS

project = "forge-lightning"
author = "the authors of forge-lightning"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"forge-lightning {release}"
exclude_patterns = ["_build"]
default_role = "code"  # single backticks name code, as in the docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]


def labels_apart(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """A paragraph of its own, with the label in bold, for what stands behind the labels of a callback's docstring."""
    pattern = re.compile(rf"({'|'.join(FIELDS)}): ")
    found = []
    for line in lines:
        match = pattern.match(line)
        found += ["", f"**{match[1]}:** {line[match.end() :]}"] if match else [line]
    lines[:] = found


def names_for_links(app: Any, page: str, source: list[str]) -> None:
    """The name of a file of the repository in place of a link to it: it is no page here."""
    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", names_for_links)
    # Before napoleon, which would take a line that ends in a colon for a section.
    app.connect("autodoc-process-docstring", labels_apart, priority=400)
