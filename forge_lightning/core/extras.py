"""Packages that only some uses need."""

import importlib
from importlib.util import find_spec
from typing import Any

from forge_lightning.core.mistakes import UsageError


class MissingExtraError(UsageError, ImportError, ValueError):
    """A package that a use needs is not installed; the message says which extra brings it.

    A `ValueError` too, so that it is explained where it is raised by a class that a config names.
    """


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
        if error.name != package and find_spec(package) is not None:  # it is there, and lacks something itself
            raise
        raise MissingExtraError(
            f"{what} needs the package `{package}`: pip install 'forge-lightning[{extra}]'.", name=package
        ) from None
