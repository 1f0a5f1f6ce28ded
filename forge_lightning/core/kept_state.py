"""What a look at a module or a data set would change, put back afterwards."""

import functools
import gc
import random
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 20_000
"""Objects to look at for generators, the nearest first."""
_LONG = 10_000
"""Longest list or dictionary to look into: of transforms or parts, not of examples."""
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back a module's buffers, as a counter that its ``forward`` advances in evaluation mode too.

    What ``forward`` registers for the first time stays: it may have noted elsewhere that it is there.
    """
    before = [
        (part, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in before:
                if part._buffers.get(name) is not buffer:
                    part._buffers[name] = buffer
                if buffer is not None and value is not None and not _is_same(buffer, value):
                    _put_back(buffer, value)


def _is_same(buffer: Tensor, value: Tensor) -> bool:
    # Nobody outside inference mode can have changed what was made in it.
    return buffer.is_inference() or (
        buffer.shape == value.shape and buffer.layout == torch.strided and torch.equal(buffer.detach(), value)
    )


def _put_back(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape == value.shape:
        buffer.detach().copy_(value)
    else:
        buffer.data = value


@contextmanager
def generators_kept(data: Any) -> Iterator[None]:
    """Put back the random generators that a loader's data set and transforms hold: torch's, NumPy's and Python's.

    Looks as the garbage collector does: into closures, partial functions and slots too, and runs no user code.
    """
    before = [(generator, _state(generator)) for generator in _generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.set_state(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _generators(start: Any) -> Iterator[Any]:
    seen, waiting = {id(start)}, deque([start])
    while waiting and len(seen) < _MOST:
        found = waiting.popleft()
        if issubclass(type(found), _GENERATORS):  # asks no proxy for its class
            yield found
            continue
        for each in _inside(found):
            if id(each) not in seen:
                seen.add(id(each))
                waiting.append(each)


def _inside(found: Any) -> list[Any]:
    """What an object holds; nothing of modules, classes, tensors, and what is too long to be anything but examples."""
    kind = type(found)
    if issubclass(kind, types.FunctionType):
        held = (found.__closure__, found.__defaults__, found.__kwdefaults__, found.__dict__)  # not its module
        return [each for each in held if each]
    if issubclass(kind, functools.partial):
        return [found.func, found.args, found.keywords]
    if issubclass(kind, types.ModuleType | type | Tensor | np.ndarray | str | bytes):
        return []
    if issubclass(kind, dict | list | tuple | set) and kind.__len__(found) > _LONG:
        return []
    return gc.get_referents(found)
