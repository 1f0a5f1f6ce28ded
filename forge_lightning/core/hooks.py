"""Hooks that stay out of what is pickled."""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn


def compile_anew(module: nn.Module) -> None:
    """Let a module that is compiled be compiled again, with the hooks that it has now.

    The compiler does not ask whether hooks have come since, and shares its code among all modules of a class. Where an
    earlier module of that class was trained without hooks, those of this one would not be called.

    Args:
        module: A module that has just got a hook, on itself or on a part.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and any(_is_compiled(part) for part in module.modules()):
        dynamo.reset()


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


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
