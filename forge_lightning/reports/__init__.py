"""Reports on what runs recorded, from their files alone."""

from pathlib import Path
from typing import Any


def show(run: str | Path) -> Any:
    """A run directory as a notebook shows it: numbers first, then pictures.

    Raises:
        MissingExtraError: If IPython is not installed.
        ValueError: If it is no run.
    """
    from forge_lightning.reports.analysis import show as drawn

    return drawn(run)
