"""Packages that only some uses need."""

import importlib
from typing import Any

from forge_lightning.core.mistakes import UsageError


class MissingExtraError(UsageError, ImportError):
    """A package that a use needs is not installed; the message says which extra brings it."""


def require_extra(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: What to import.
        extra: Extra of this package that installs it.
        what: Who needs it, for the message.

    Raises:
        MissingExtraError: If it is not installed.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{what} needs the package `{package}`: pip install 'forge-lightning[{extra}]'.", name=package
        ) from None
