"""Frames over pipes, and values as JSON: what may pass between a program and its tests. Standard library only.

Only values of Python's own types cross, by content. An object of a class of the program stays where it is, and a handle
crosses in its place: what it would answer to ``==``, ``in`` or ``<`` is never asked.
"""

import builtins
import collections
import importlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

MOST_BYTES = 1 << 24  # of a frame
_MOST_ITEMS = 100_000  # taken from an iterator
_DEPTH = 200
_SMALL = 1 << 62  # integers beyond cross as hexadecimal: Python refuses long decimal ones


def read_frame(fd: int) -> Any:
    """The next value; ``None`` at the end of the stream.

    Raises:
        ValueError: If the frame is too long, or no JSON.
        EOFError: If the stream ends inside a frame.
    """
    head = _read(fd, 4, may_end=True)
    if not head:
        return None
    (size,) = struct.unpack("<I", head)
    if size > MOST_BYTES:
        raise ValueError(f"a message of {size} bytes is too long")
    return json.loads(_read(fd, size))


def frame(value: Any) -> bytes:
    """A value of JSON's types as it is written."""
    data = json.dumps(value, separators=(",", ":")).encode()
    return struct.pack("<I", len(data)) + data


def write_frame(fd: int, value: Any) -> None:
    """Write a value of JSON's types."""
    data = frame(value)
    while data:
        data = data[os.write(fd, data) :]


def _read(fd: int, size: int, may_end: bool = False) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            if may_end and not data:
                return b""
            raise EOFError("the stream ended inside a message")
        data += part
    return data


def encode(value: Any, keep: Callable[[Any], int], serves: bool = False, depth: int = 0) -> Any:
    """Make JSON of a value.

    Args:
        value: What to send.
        keep: Returns the handle of an object that has to stay.
        serves: Whether this side answers for what stays: iterators then stay too, which may have no end, and so do
            exception classes.
        depth: Depth of nesting.
    """
    if value is None or type(value) in (bool, str, float):
        return value
    if depth > _DEPTH:
        raise RecursionError("a value is nested too deeply to be compared")
    if isinstance(value, _Handle):
        return {"o": [value._handle, ""]}
    if isinstance(value, type) and issubclass(value, BaseException) and (own := vars(value).get("_forge_handle")):
        return {"o": [own[0], ""]}

    def each(values: Any) -> list[Any]:
        return [encode(item, keep, serves, depth + 1) for item in values]

    def pairs(mapping: Any) -> list[Any]:
        return [each(pair) for pair in dict.items(mapping)]

    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        value = int(value)
        return value if -_SMALL < value < _SMALL else {"I": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return each(list.__iter__(value))
    if isinstance(value, tuple):
        items, names = each(tuple.__iter__(value)), getattr(type(value), "_fields", None)
        if type(names) is tuple and len(names) == len(items) and all(type(name) is str for name in names):
            return {"N": [type(value).__name__, list(names), items]}
        return {"t": items}
    if isinstance(value, set):
        return {"s": each(set.__iter__(value))}
    if isinstance(value, frozenset):
        return {"z": each(frozenset.__iter__(value))}
    if isinstance(value, dict):
        tag = "C" if isinstance(value, collections.Counter) else "d"
        return {tag: pairs(value)}
    for name, kind in _VIEWS.items():
        if type(value) is kind:
            return {"v": [name, each(value)]}
    if isinstance(value, collections.deque):
        return {"q": each(collections.deque.__iter__(value))}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "B": bytes(value).hex()}
    if type(value) in (complex, range):
        parts = (value.real, value.imag) if type(value) is complex else (value.start, value.stop, value.step)
        return {type(value).__name__: list(parts)}
    for name, (module, to_json, _) in _PLAIN.items():
        if module in sys.modules and type(value) is getattr(sys.modules[module], name):
            return {name: to_json(value)}
    if isinstance(value, type):
        name = str(type.__dict__["__name__"].__get__(value))
        if vars(builtins).get(name) is value:
            return {"T": name}
        if serves and issubclass(value, BaseException):
            return {"X": [keep(value), name, builtin_bases(value)]}
    if isinstance(value, Iterator):
        if serves:
            return {"g": keep(value)}
        items = []
        for item in value:
            items.append(encode(item, keep, serves, depth + 1))
            if len(items) > _MOST_ITEMS:
                raise ValueError(f"an iterator goes on beyond {_MOST_ITEMS} items")
        return {"i": items}
    return {"o": [keep(value), type(value).__name__]}


_VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}


def _view(name: str, items: list[Any]) -> Any:
    if name == "values":
        return dict(enumerate(items)).values()
    return dict(items).items() if name == "items" else dict.fromkeys(items).keys()


def builtin_bases(kind: type) -> list[str]:
    """Names of Python's own exceptions that a class comes from, nearest first."""
    return [base.__name__ for base in kind.__mro__ if vars(builtins).get(base.__name__) is base and base is not object]


def _from_iso(kind: Any, text: Any) -> Any:
    return kind.fromisoformat(text)


_PLAIN: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "Decimal": ("decimal", str, lambda kind, text: kind(text)),
    "Fraction": ("fractions", str, lambda kind, text: kind(text)),
    "date": ("datetime", lambda x: x.isoformat(), _from_iso),
    "datetime": ("datetime", lambda x: x.isoformat(), _from_iso),
    "time": ("datetime", lambda x: x.isoformat(), _from_iso),
    "timedelta": ("datetime", lambda x: [x.days, x.seconds, x.microseconds], lambda kind, parts: kind(*parts)),
}
"""Types of modules that not every program loads."""


class _Handle:
    """An object on the other side."""

    _handle: int


def decode(value: Any, find: Callable[..., Any]) -> Any:
    """What `encode` was given; ``find`` gives the object of a handle, or something that stands for it.

    ``find(handle, name)`` of an object, ``find(handle, name, bases)`` of an exception class whose bases among Python's
    own have these names, ``find(handle)`` of an iterator.
    """
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "I":
        return int(content, 16)
    if tag == "o":
        return find(int(content[0]), str(content[1]))
    if tag == "g":
        return find(int(content))
    if tag == "X":
        return find(int(content[0]), str(content[1]), [str(name) for name in content[2]])
    if tag == "N":
        name, names, items = content
        return collections.namedtuple(name, names, rename=True)(*(decode(item, find) for item in items))
    if tag == "v":
        return _view(content[0], [decode(item, find) for item in content[1]])
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "B":
        return bytearray.fromhex(content)
    if tag in ("complex", "range"):
        return complex(*content) if tag == "complex" else range(*content)
    if tag in _PLAIN:
        module, _, from_json = _PLAIN[tag]
        return from_json(getattr(importlib.import_module(module), tag), content)
    if tag == "T":
        found = vars(builtins).get(content)
        if not isinstance(found, type):
            raise ValueError(f"{content!r} is no type")
        return found
    items = [decode(item, find) for item in content]
    if tag in ("d", "C"):
        found = dict(map(tuple, items))
        return collections.Counter(found) if tag == "C" else found
    kinds: dict[str, Any] = {"t": tuple, "s": set, "z": frozenset, "q": collections.deque, "i": iter}
    return kinds[tag](items)
