"""What a look at a module or a data set would change, put back afterwards."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 7
"""How many objects deep to look for generators: loader, data set, transform, list of transforms, each of them, ..."""
_LONG = 64
"""Longest list to look into: of transforms, not of examples."""


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back a module's buffers, as a counter that its ``forward`` advances in evaluation mode too."""
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in before:
                if part._buffers.get(name) is not buffer:
                    part._buffers[name] = buffer
                if not buffer.is_inference():  # nobody outside inference mode can have changed it
                    buffer.copy_(value)


@contextmanager
def generators_kept(data: Any) -> Iterator[None]:
    """Put back the random generators that a loader's data set and transforms hold: torch's, NumPy's and Python's."""
    before = [(generator, _state(generator)) for generator in _generators(data, _DEPTH, set())]
    try:
        yield
    finally:
        for generator, state in before:
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, np.random.RandomState):
                generator.set_state(state)
            else:
                generator.setstate(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _generators(found: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if id(found) in seen or depth < 0:
        return
    seen.add(id(found))
    if isinstance(found, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        yield found
        return
    inside: Any = ()
    if isinstance(found, Mapping):
        inside = found.values() if len(found) <= _LONG else ()
    elif isinstance(found, list | tuple):
        inside = found if len(found) <= _LONG else ()
    elif not isinstance(found, Tensor | np.ndarray | type):
        inside = getattr(found, "__dict__", {}).values()
    for each in list(inside):
        yield from _generators(each, depth - 1, seen)
