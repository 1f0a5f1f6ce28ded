"""The process that judges programs.

It forks two processes for each program. One holds the program, and only answers calls; the other holds the tests, calls
the program by message, and compares what comes back. The first never sees the tests, the expected values, or the way to
a verdict; this process never does either, so that its later children cannot find them in its memory. Standard library
only.
"""

import builtins
import fcntl
import gc
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
from forge_lightning.sandbox.wire import _Handle, decode, encode, read_frame, write_frame

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
    while (request := read_frame(requests)) is not None:
        verdict = _judge(request, requests, filtered)
        write_frame(results, verdict)
        if verdict.pop("out_of_step", False):
            return


def _judge(request: dict[str, Any], requests: int, filtered: bool) -> dict[str, Any]:
    """Run one program; its tests are still in ``requests``."""
    start = time.monotonic()
    end = start + request["timeout"]
    call_read, call_write = os.pipe()
    reply_read, reply_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    output_read, output_write = os.pipe()

    def program() -> None:
        _confine([call_read, reply_write], output_write, request, filtered)
        _answer(request["solution"], request["names"])

    def tests() -> None:
        given = read_frame(requests)
        os.write(verdict_write, b"\n")  # what is left in `requests` is the next program
        _confine([reply_read, call_write, verdict_write], None, request, filtered)
        _test(given["setup"], given["tests"], request["names"])

    pids = [_fork(program), _fork(tests)]
    for fd in (call_read, call_write, reply_read, reply_write, verdict_write, output_write):
        os.close(fd)
    said, output, in_time = _listen(verdict_read, output_read, end)
    codes = [_end(pid) for pid in pids]
    output = (output + _rest(output_read))[-OUTPUT_BYTES:]
    os.close(verdict_read)
    os.close(output_read)
    status, detail = _status(said, in_time, codes)
    verdict = {"status": status, "detail": detail[:_DETAIL], "seconds": time.monotonic() - start}
    if not said.startswith(b"\n"):
        verdict["out_of_step"] = True
    return verdict | {"stdout": output.decode(errors="replace")}


def _fork(main: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            main()
        finally:
            os._exit(1)
    return pid


def _listen(verdict: int, output: int, end: float) -> tuple[bytes, bytes, bool]:
    """Until the tests have ended or the time has; the program's output is drained all the while."""
    said = printed = b""
    waiting = [verdict, output]
    while verdict in waiting:
        left = end - time.monotonic()
        if left <= 0:
            return said, printed, False
        for fd in select.select(waiting, [], [], left)[0]:
            part = os.read(fd, 1 << 16)
            if not part:
                waiting.remove(fd)
            elif fd == verdict:
                said += part
            else:
                printed = (printed + part)[-OUTPUT_BYTES:]
    return said, printed, True


def _rest(fd: int) -> bytes:
    os.set_blocking(fd, False)
    with suppress(BlockingIOError):
        return os.read(fd, 1 << 20)
    return b""


def _end(pid: int) -> int:
    """Kill a child, if it is still there; how it ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 0  # still running: nothing to tell
    return os.waitstatus_to_exitcode(status)


def _status(said: bytes, in_time: bool, codes: Sequence[int]) -> tuple[str, str]:
    program, tests = codes
    if not in_time or -signal.SIGXCPU in (program, tests):
        return "timeout", "ran out of time"
    try:
        status, detail = json.loads(said)
    except ValueError:
        return ("killed", f"the tests were ended by signal {-tests}") if tests < 0 else ("could not run", "no verdict")
    if status == "lost":
        if program < 0:
            return "killed", f"the program was ended by signal {-program}"
        return "failed", f"the program ended itself with code {program}"
    return str(status), str(detail)


def _confine(keep: Sequence[int], output: int | None, request: dict[str, Any], filtered: bool) -> None:
    """Leave this child with the pipes it needs, as 3, 4, ..., and with what every program may do."""
    os.setsid()
    protection.end_with_parent()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in keep]
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
    for index, fd in enumerate(high):
        os.dup2(fd, 3 + index)
    os.closerange(3 + len(keep), 1 << 16)
    random.seed(0)
    protection.limit(request["memory"], int(request["timeout"]) + 1)
    if filtered:
        protection.apply_seccomp(protection.WORKERS_OWN)


def _answer(source: str, names: Sequence[str]) -> NoReturn:
    """Be the program: run it, then answer calls until there are no more. Calls come on 3, replies go to 4."""
    kept: list[Any] = []
    handles: dict[int, int] = {}  # by identity, which what is kept holds on to

    def keep(value: Any) -> int:
        if id(value) not in handles:
            handles[id(value)] = len(kept)
            kept.append(value)
        return handles[id(value)]

    def find(handle: int, name: str) -> Any:
        return kept[handle]

    def reply(make: Callable[[], Any]) -> None:
        try:
            answer = ["ok", make()]
        except MemoryError:
            answer = ["raise", "MemoryError", ""]
        except BaseException as error:  # whatever the program does is the tests' to judge
            answer = ["raise", type(error).__name__, _text(error)]
        write_frame(4, answer)

    def run() -> dict[str, Any]:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        exec(compile(source, "solution.py", "exec"), module.__dict__)
        return {name: encode(module.__dict__[name], keep) for name in names if name in module.__dict__}

    operations: dict[str, Callable[..., Any]] = {
        "call": lambda target, args, kwargs: target(*args, **kwargs),
        "get": getattr,
        "set": setattr,
        "item": lambda target, key: target[key],
        "len": lambda target: len(target),
        "iter": lambda target: iter(target),
        "bool": lambda target: bool(target),
        "str": lambda target: str(target),
        "repr": lambda target: repr(target),
    }
    reply(run)
    while (message := read_frame(3)) is not None:
        operation, arguments = message
        reply(lambda: encode(operations[operation](*decode(arguments, find)), keep))  # noqa: B023  answered at once
    os._exit(0)


class _Lost(Exception):
    """The program's process is gone."""


class _Remote(_Handle):
    """An object of the program's. What would depend on an expected value, as ``==`` does, is answered here."""

    __slots__ = ("_handle", "_type")

    def __init__(self, handle: int, name: str) -> None:
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_type", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
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
        return isinstance(other, _Remote) and other._handle == self._handle

    def __hash__(self) -> int:
        return hash(self._handle)


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
        return decode(answer[1], _Remote)
    kind, text = getattr(builtins, str(answer[1]), None), str(answer[2])
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # of those that need more than a text
            raise kind(text)
    raise RuntimeError(f"{answer[1]}: {text}")


def _test(setup: str, tests: str, names: Sequence[str]) -> NoReturn:
    """Be the tests. Replies come on 3, calls go to 4, the verdict to 5."""
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
        namespace |= {name: decode(value, _Remote) for name, value in found.items() if name in names}
        exec(compile(tests, "tests.py", "exec"), namespace)
        status = "passed"
    except _Lost:
        status = "lost"
    except MemoryError:
        status, detail = "out of memory", "MemoryError"
    except BaseException as error:  # a test may raise anything
        detail = _explain(error, tests)
    data = json.dumps([status, detail]).encode()
    while data:
        data = data[os.write(5, data) :]
    os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_DETAIL]
    except BaseException:  # its own `__str__` may do anything
        return ""


def _explain(error: BaseException, tests: str) -> str:
    """The error, and the line of the tests that it came from."""
    import traceback  # late: each module makes every fork dearer

    said = f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
    lines = tests.splitlines()
    if frames and 0 < (frames[-1].lineno or 0) <= len(lines):
        said += f"  in: {lines[(frames[-1].lineno or 1) - 1].strip()}"
    return said
