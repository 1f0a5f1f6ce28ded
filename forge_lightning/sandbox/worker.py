"""The process that judges programs.

It forks two processes for each program. One holds the program, and only answers calls; the other holds the tests, calls
the program by message, and compares what comes back. The first never sees the tests, the expected values, or the way to
a verdict; nor does this process, whose later children would find them in their memory. Standard library only.
"""

import builtins
import collections
import fcntl
import gc
import itertools
import json
import os
import random
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from forge_lightning.sandbox import protection
from forge_lightning.sandbox.wire import _Handle, builtin_bases, decode, encode, read_frame, write_frame

OUTPUT_BYTES = 2000  # kept of what a program prints: the end
_DETAIL = 500  # characters of a verdict's detail

# Modules that programs use most: already there after a fork. Each makes every fork a little dearer.
_WARM = (
    "bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "random", "re", "string",
    "typing",
)  # fmt: skip


def serve(protections: Sequence[str] = ("landlock", "seccomp")) -> None:
    """Confine this process, say what it is confined by, and judge what comes in until the stream ends."""
    sys.path[:] = [folder for folder in sys.path if folder]
    for name in _WARM:
        __import__(name)
    requests, results = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.chdir("/")
    protection.end_with_parent()
    protection.hide()
    landlock = protection.apply_landlock(protection.readable_folders()) if "landlock" in protections else 0
    protection.drop_capabilities()
    gc.collect()
    gc.freeze()  # shared with the children as it is
    filtered = False
    if "seccomp" in protections:
        with suppress(OSError, KeyError):
            protection.apply_seccomp(set(protection.SYSTEM_CALLS) - set(protection.WORKERS_OWN))
            filtered = True
    write_frame(results, {"landlock": landlock, "seccomp": filtered})
    judge = _Judge(requests, results, landlock, filtered)
    while (limits := read_frame(requests)) is not None:
        if not judge.run(limits["timeout"], limits["memory"]):
            return  # what is left in `requests` is not known


class _Judge:
    """Runs one program after another, and passes on what is said of them without reading it.

    What this process has once had in its memory, every later program has in its own: so solution and tests are read by
    the processes that need them, the tests' words go from pipe to pipe in the kernel, and what the program prints is
    held in a buffer that is wiped.
    """

    def __init__(self, requests: int, results: int, landlock: int, filtered: bool) -> None:
        self.requests, self.results, self.landlock, self.filtered = requests, results, landlock, filtered
        self._chunk, self._tail, self._printed = bytearray(1 << 16), bytearray(OUTPUT_BYTES), 0

    def run(self, timeout: float, memory: int) -> bool:
        """Judge one program; whether the next one can follow."""
        start = time.monotonic()
        end = start + timeout
        pipes = {name: os.pipe() for name in ("call", "reply", "ready", "verdict", "detail", "output")}
        read, write = ({name: pipe[side] for name, pipe in pipes.items()} for side in (0, 1))

        def program() -> None:
            given = read_frame(self.requests)
            os.write(write["ready"], b"\n")  # what is left in `requests` are its tests
            self._confine([read["call"], write["reply"]], write["output"], timeout, memory)
            _answer(given["solution"], given["names"])

        def tests() -> None:
            given = read_frame(self.requests)
            os.write(write["verdict"], b"\n")  # what is left in `requests` is the next program
            self._confine([read["reply"], write["call"], write["verdict"], write["detail"]], None, timeout, memory)
            _test(given["setup"], given["tests"], given["names"])

        pids = [_fork(program)]
        os.close(write["ready"])
        is_read = _wait_for(read["ready"], end)
        if is_read:
            pids.append(_fork(tests))
        for name in ("call", "reply", "verdict", "detail", "output"):
            os.close(write[name])
        said, in_time = self._listen(read["verdict"], read["output"], end) if is_read else (b"", end > time.monotonic())
        is_lost = said[1:2] == _CODES["lost"]
        codes = [_end(pid, 0.2 if is_lost else 0.0) for pid in pids]
        self._drain(read["output"])
        status, note, length = _status(said, in_time, codes)
        again = is_read and said.startswith(b"\n")
        header = {"status": status, "note": note, "seconds": time.monotonic() - start, "again": again}
        write_frame(self.results, header | {"detail": length, "stdout": self._printed})
        _pass_on(read["detail"], self.results, length)
        os.writev(self.results, [memoryview(self._tail)[OUTPUT_BYTES - self._printed :]])
        self._wipe()
        for fd in read.values():
            os.close(fd)
        return again

    def _listen(self, verdict: int, output: int, end: float) -> tuple[bytes, bool]:
        """Until the tests have ended or the time has; the program's output is drained all the while."""
        said, waiting = b"", [verdict, output]
        while verdict in waiting:
            left = end - time.monotonic()
            if left <= 0:
                return said, False
            for fd in select.select(waiting, [], [], left)[0]:
                if fd == output:
                    if not self._take(output):
                        waiting.remove(output)
                    continue
                part = os.read(verdict, 64)
                said += part
                if not part:
                    waiting.remove(verdict)
        return said, True

    def _take(self, output: int) -> int:
        """Read some of what the program prints, and keep its end."""
        count = os.readv(output, [self._chunk])
        chunk, tail = memoryview(self._chunk), memoryview(self._tail)
        if count >= OUTPUT_BYTES:
            tail[:] = chunk[count - OUTPUT_BYTES : count]
        elif count:
            tail[: OUTPUT_BYTES - count] = tail[count:]
            tail[OUTPUT_BYTES - count :] = chunk[:count]
        self._printed = min(OUTPUT_BYTES, self._printed + count)
        return count

    def _drain(self, output: int) -> None:
        """What is left of it, once the program has ended."""
        os.set_blocking(output, False)
        with suppress(BlockingIOError):
            while self._take(output):
                pass

    def _wipe(self) -> None:
        if self._printed:
            memoryview(self._chunk)[:] = _ZEROS
            memoryview(self._tail)[:] = _ZEROS[:OUTPUT_BYTES]
            self._printed = 0

    def _confine(self, keep: Sequence[int], output: int | None, timeout: float, memory: int) -> None:
        """Leave this child with the pipes it needs, as 3, 4, ..., and with what every program may do."""
        os.setsid()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in keep]
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        for index, fd in enumerate(high):
            os.dup2(fd, 3 + index)
        os.closerange(3 + len(keep), 1 << 16)
        random.seed(0)
        protection.limit(memory, int(timeout) + 1)
        protection.leave_siblings(self.landlock)
        if self.filtered:
            protection.apply_seccomp(protection.WORKERS_OWN)


_ZEROS = bytes(1 << 16)


def _wait_for(fd: int, end: float) -> bool:
    """Whether a byte comes in time."""
    ready = select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]
    return bool(ready) and os.read(fd, 1) == b"\n"


def _pass_on(source: int, target: int, count: int) -> None:
    """From pipe to pipe, past this process where the system can."""
    while count > 0:
        moved = os.splice(source, target, count) if hasattr(os, "splice") else os.write(target, os.read(source, count))
        if moved <= 0:
            raise EOFError("the tests said less than they announced")
        count -= moved


def _fork(main: Callable[[], None]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            protection.end_with_parent()
            if os.getppid() == parent:  # it may have ended before it was asked for
                main()
        finally:
            os._exit(1)
    return pid


def _end(pid: int, patience: float) -> int:
    """Kill a child, if it is still there after so many seconds; how it ended."""
    until = time.monotonic() + patience
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < until:  # its pipes close a little before it has ended
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 0  # still running: nothing to tell
    return os.waitstatus_to_exitcode(status)


_CODES = {"passed": b"p", "failed": b"f", "out of memory": b"m", "lost": b"l"}


def _status(said: bytes, in_time: bool, codes: Sequence[int]) -> tuple[str, str, int]:
    """Status, what there is to note of it, and the length of what the tests say."""
    if not in_time or -signal.SIGXCPU in codes:
        return "timeout", "ran out of time", 0
    status = next((name for name, code in _CODES.items() if said[1:2] == code), "")
    if len(said) != 4 or not status:
        if len(codes) > 1 and codes[1] < 0:
            return "killed", f"the tests were ended by signal {-codes[1]}", 0
        return "could not run", "no verdict", 0
    if status == "lost":
        if codes[0] < 0:
            return "killed", f"the program was ended by signal {-codes[0]}", 0
        return "failed", f"the program ended itself with code {codes[0]}", 0
    return status, "", int.from_bytes(said[2:4], "little")


def _answer(source: str, names: Sequence[str]) -> NoReturn:
    """Be the program: run it, then answer calls until there are no more. Calls come on 3, replies go to 4."""
    kept: list[Any] = []
    handles: dict[int, int] = {}  # by identity, which what is kept holds on to

    def keep(value: Any) -> int:
        if id(value) not in handles:
            handles[id(value)] = len(kept)
            kept.append(value)
        return handles[id(value)]

    def find(handle: int, name: str = "") -> Any:
        return kept[handle]

    def told(error: BaseException) -> list[Any]:
        """What the tests learn of an exception: its class, text and, of Python's own classes, arguments."""
        kind, arguments = type(error), None
        if vars(builtins).get(kind.__name__) is kind:
            with suppress(Exception):  # of any object
                arguments = encode(list(error.args), keep, serves=True)
        return ["raise", [keep(kind), kind.__name__, builtin_bases(kind)], _text(error), arguments]

    def reply(make: Callable[[], Any]) -> None:
        try:
            answer = ["ok", make()]
        except MemoryError:
            answer = ["raise", [0, "MemoryError", ["MemoryError"]], "", None]
        except BaseException as error:  # whatever the program does is the tests' to judge
            answer = told(error)
        write_frame(4, answer)

    def pull(iterator: Any, count: int) -> tuple[list[Any], Any]:
        """Items of an iterator; fewer than asked for if it ends or raises. An exception comes with earlier items."""
        items: list[Any] = []
        try:
            for item in itertools.islice(iterator, count):
                items.append(item)
        except Exception as error:
            return items, json.dumps(told(error))
        return items, len(items) == count

    def run() -> dict[str, Any]:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        exec(compile(source, "solution.py", "exec"), module.__dict__)
        return {name: encode(module.__dict__[name], keep, True) for name in names if name in module.__dict__}

    operations: dict[str, Callable[..., Any]] = {
        "call": lambda target, args, kwargs: target(*args, **kwargs),
        "get": getattr,
        "set": setattr,
        "item": lambda target, key: target[key],
        "len": lambda target: len(target),
        "iter": lambda target: iter(target),
        "pull": pull,
        "bool": lambda target: bool(target),
        "str": lambda target: str(target),
        "repr": lambda target: repr(target),
    }
    reply(run)
    while (message := read_frame(3)) is not None:
        operation, arguments = message
        reply(lambda: encode(operations[operation](*decode(arguments, find)), keep, True))  # noqa: B023  answered at once
    os._exit(0)


class _Lost(BaseException):
    """The program's process is gone."""


_PREDICATES = ("startswith", "endswith", "issubset", "issuperset", "isdisjoint", "equals")


class _Remote(_Handle):
    """An object of the program's. What would depend on an expected value, as ``==`` does, is answered here."""

    __slots__ = ("_handle", "_type")

    def __init__(self, handle: int, name: str) -> None:
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_type", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _PREDICATES:
            raise TypeError(
                f"{name!r} of a {self._type!r} is not the program's to say: return a value of Python's types"
            )
        return _ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask("item", self, key)

    def __len__(self) -> int:
        length: int = _ask("len", self)
        return length

    def __iter__(self) -> Any:
        return _ask("iter", self)

    def __bool__(self) -> bool:
        return bool(_ask("bool", self))

    def __str__(self) -> str:
        return str(_ask("str", self))

    def __repr__(self) -> str:
        return str(_ask("repr", self))

    def __contains__(self, item: object) -> bool:
        raise TypeError(f"what {self._type!r} contains is not the program's to say: return a list, set or dict")

    def __eq__(self, other: object) -> bool:
        if other is not self and isinstance(other, _Remote):
            raise TypeError(f"whether two {self._type!r} are equal is not the program's to say: compare their values")
        return other is self

    def __hash__(self) -> int:
        return hash(self._handle)


class _Pulled(_Handle):
    """An iterator of the program's, read as far as the tests go; ahead of them by no more than they have read."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._ready: collections.deque[Any] = collections.deque()
        self._count = 1  # items to ask for next
        self._rest: Any = True  # whether there are more, or the exception that it ended with, as JSON

    def __iter__(self) -> "_Pulled":
        return self

    def __next__(self) -> Any:
        if not self._ready and self._rest is True:
            items, self._rest = _ask("pull", _Remote(self._handle, "iterator"), self._count)
            self._ready.extend(items)
            self._count = min(2 * self._count, 1024)
        if self._ready:
            return self._ready.popleft()
        if self._rest:
            rest, self._rest = self._rest, False
            _answer_of(json.loads(rest))
        raise StopIteration


_classes: dict[int, type[BaseException]] = {}


def _exception_class(handle: int, name: str, bases: Sequence[str]) -> type[BaseException]:
    """A class that stands for one of the program's, which tests can name in ``except``."""
    own = [vars(builtins).get(base) for base in bases]
    found = [kind for kind in own if isinstance(kind, type) and issubclass(kind, Exception)]
    found = [kind for kind in found if not issubclass(kind, StopIteration | StopAsyncIteration)]
    if handle not in _classes:
        base = found[0] if found else RuntimeError
        _classes[handle] = type(name, (base,), {"_forge_handle": (handle,), "__init__": Exception.__init__})
    return _classes[handle]


def _stand_in(handle: int, name: str = "", bases: Sequence[str] | None = None) -> Any:
    """What stands for an object, an exception class, or an iterator of the program's."""
    if bases is not None:
        return _exception_class(handle, name, bases)
    return _Remote(handle, name) if name else _Pulled(handle)


def _ask(operation: str, *arguments: Any) -> Any:
    def keep(value: Any) -> int:
        raise TypeError(f"the tests give the program a {type(value).__name__}, which cannot be sent")

    try:
        write_frame(4, [operation, encode(list(arguments), keep)])
        answer = read_frame(3)
    except (EOFError, BrokenPipeError):
        raise _Lost from None
    if answer is None:
        raise _Lost
    return _answer_of(answer)


def _answer_of(answer: Any) -> Any:
    if answer[0] == "ok":
        return decode(answer[1], _stand_in)
    (handle, name, bases), text, arguments = answer[1], str(answer[2]), answer[3]
    kind = vars(builtins).get(str(name))
    own = isinstance(kind, type) and issubclass(kind, Exception) and bases[:1] == [name]
    ends_a_loop = kind in (StopIteration, StopAsyncIteration)  # of the tests, and with it what they still had to ask
    if ends_a_loop or not any(base in ("Exception", "MemoryError") for base in bases):
        raise RuntimeError(f"{name}: {text}")
    if own:
        assert isinstance(kind, type)
        for given in ([text] if arguments is None else arguments, [text]):
            with suppress(TypeError):  # of those that need more than a text
                error = kind(*decode(given, _stand_in))
                break
        else:
            error = RuntimeError(f"{name}: {text}")
        raise error
    raise _exception_class(int(handle), str(name), bases)(text)


def _test(setup: str, tests: str, names: Sequence[str]) -> NoReturn:
    """Be the tests. Replies come on 3, calls go to 4, the verdict to 5, and what there is to say of it to 6."""
    status, detail = "failed", ""
    try:
        module = types.ModuleType("tests")
        sys.modules["tests"] = module
        namespace = module.__dict__
        first = read_frame(3)
        if first is None:
            raise _Lost
        exec(compile(setup, "setup.py", "exec"), namespace)
        for name in names:
            namespace.pop(name, None)  # the program's own, or none
        found = first[1] if first[0] == "ok" else _answer_of(first)
        namespace |= {name: decode(value, _stand_in) for name, value in found.items() if name in names}
        try:
            compiled = compile(tests, "tests.py", "exec")
        except SyntaxError as error:
            raise SyntaxError(f"in the tests: {error}") from None
        exec(compiled, namespace)
        status = "passed"
    except _Lost:
        status = "lost"
    except MemoryError:
        status, detail = "out of memory", "MemoryError"
    except BaseException as error:  # a test may raise anything
        detail = _explain(error, tests, names)
    said = detail.encode(errors="replace")[:_DETAIL]
    if said:
        os.write(6, said)  # first, so that it is there once it is announced
    os.write(5, _CODES[status] + len(said).to_bytes(2, "little"))
    os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_DETAIL]
    except BaseException:  # its own `__str__` may do anything
        return ""


def _explain(error: BaseException, tests: str, names: Sequence[str]) -> str:
    """The error, and the line of the tests that it came from."""
    import traceback  # late: each module makes every fork dearer

    missing = getattr(error, "name", None) if isinstance(error, NameError) else None
    said = (
        f"the program defines no {missing!r}"
        if missing in names
        else f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
    )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
    lines = tests.splitlines()
    if frames and 0 < (frames[-1].lineno or 0) <= len(lines):
        said += f"  in: {lines[(frames[-1].lineno or 1) - 1].strip()}"
    return said
