"""Hooks that stay out of what is pickled."""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any


def compile_anew() -> None:
    """Let all that was compiled be compiled again, with the hooks that modules have now. To be called after new hooks.

    The compiler does not ask whether hooks have come since, and shares its code among all modules of a class. Where an
    earlier module of that class was trained without hooks, those of this one would not be called.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        dynamo.reset()


class Hook:
    """A hook of a module, which a copy or a checkpoint of that module does not take along.

    A module in a LightningModule's hyperparameters is pickled with its hooks into every checkpoint. In place of this
    one, a call that does nothing is pickled, of Python's own: the checkpoint loads where this package is missing.

    Args:
        act: What the hook does.
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> Any:
        return self._act(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(deepcopy(self._act, memo))  # a bound method's copy belongs to the copy

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (sys.audit, "module.hook")  # returns None, whatever it is called with
