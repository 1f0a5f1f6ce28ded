"""`Sandbox`: persistent workers that judge programs by their tests."""

import contextlib
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from forge_lightning.core.validate import require
from forge_lightning.sandbox.wire import MOST_BYTES, frame

Status = Literal["passed", "failed", "timeout", "out of memory", "killed", "could not run"]

_GRACE = 10.0  # seconds that a worker may need beyond a program's own
_STARTUP = 60.0
NO_TIME = "no time was left"
"""Detail of a program that was not run because ``max_seconds`` were over."""


class SandboxError(RuntimeError):
    """This machine cannot confine programs, or no worker can be started."""


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Args:
        status: "passed" if all tests ran to their end; "failed" if one did not, or the program raised or ended itself;
            "timeout", "out of memory" or "killed" (by a signal) if a limit ended it; "could not run" if there was no
            worker to run it. Without any tests, a program passes that runs to its end.
        detail: The first error, and the line of the tests that it came from.
        seconds: Wall time in the worker.
        stdout: End of what the program printed, errors included, at most 2,000 bytes.
    """

    status: Status
    detail: str = ""
    seconds: float = 0.0
    stdout: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests ran to their end."""
        return self.status == "passed"


@dataclass(frozen=True)
class Capabilities:
    """What confines programs on this machine, found out by doing.

    Args:
        landlock: Version of the kernel's file rules; 0 without them.
        seccomp: Whether system calls are filtered.
        bubblewrap: Whether workers live in namespaces of their own: no network, no other process, few files.
        escapes: What a program could do in a trial that it must not.
    """

    landlock: int
    seccomp: bool
    bubblewrap: bool
    escapes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Protections that programs should not run without."""
        lacks = [] if self.landlock else ["landlock (Linux 5.13 or newer): programs can read the user's files"]
        if not self.seccomp:
            lacks.append(
                "seccomp (Linux on x86_64 or aarch64): programs can start others, reach the network, signal processes"
            )
        return lacks + [f"a trial program could {escape}" for escape in self.escapes]


@dataclass(frozen=True)
class Task:
    """A program and its tests.

    Args:
        solution: The program. Not trusted.
        tests: Statements that fail where the program is wrong, as assertions do. They call the program by the names in
            ``entry_point``. What it returns should be compared here: a method of an object of the program's that is
            given the expected value can say what it likes.
        entry_point: Name, or names, that the program defines and the tests use.
        setup: Statements that the tests need before: imports, helpers. They run beside the tests.
    """

    solution: str
    tests: str
    entry_point: str | Sequence[str]
    setup: str = ""


_TRIAL = """
import ctypes, fcntl, os, socket
def trial(secret):
    done, mine = [], f"/tmp/{os.path.basename(secret)}-written"
    def attempt(what, action):
        try:
            action()
        except (OSError, PermissionError):
            return
        done.append(what)
    attempt("read a file of the user's", lambda: open(secret).close())
    attempt("write a file", lambda: (open(mine, "w").close(), os.unlink(mine)))
    attempt("start a process", lambda: os._exit(0) if os.fork() == 0 else None)
    attempt("open a socket", lambda: socket.socket().close())
    attempt("signal another process", lambda: os.kill(os.getppid(), 0))
    attempt("change a file's mode", lambda: os.chmod(secret, 0o600))
    attempt("reach the pipes of another process", lambda: os.open(f"/proc/{os.getppid()}/fd/3", os.O_RDONLY))
    attempt("have another process signalled", lambda: fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid()))
    return done
"""


class Sandbox:
    """Judges programs: each in two processes of its own, forked by a warm worker, confined by the kernel.

    One process holds the program and one the tests, which call it by message; so no object, exit code or forged message
    of a program can pass for a right answer. Arguments and results cross by value: what a program changes in place, its
    tests do not see, and objects of its own classes can be called and read, but not compared. Iterators are read as far
    as the tests read them. Exceptions arrive as the nearest class of Python's own, and as the program's own class.

    Right programs fail whose tests hand them functions or decorators, use operators or ``with`` on objects of the
    program's classes, ask ``isinstance`` of them, or ``send`` to its generators.

    Programs and tests have Python's own library, and no installed package; no file to write, no network, no other
    process, no further thread, an empty environment, no input, and limits on time, memory and output. Where there is no
    bubblewrap they can learn which files exist, their sizes, and where links lead.

    Use it as a context manager, or call `close`. Safe to use from several threads.

    Args:
        timeout_seconds: Wall time of a program and its tests together, above 0.
        memory_bytes: Address space of each of the two processes, at least 64 MiB, which Python itself needs.
        num_workers: Programs at a time. Default: the number of cores.
        bubblewrap: Put workers into namespaces where `bwrap` is installed and works.
        allow_weaker: Run programs also where a protection is missing. Only for programs you would run yourself.

    Raises:
        ValueError: If an argument is out of range.
        SandboxError: On first use, if a protection is missing and ``allow_weaker`` is not set.

    Example:
        >>> with Sandbox(num_workers=1) as sandbox:
        ...     sandbox.run("def double(x): return 2 * x", "assert double(3) == 6", "double").status
        'passed'
    """

    def __init__(
        self,
        timeout_seconds: float = 3.0,
        memory_bytes: int = 1 << 30,
        num_workers: int | None = None,
        bubblewrap: bool = True,
        allow_weaker: bool = False,
    ) -> None:
        check = partial(require, "Sandbox")
        check(timeout_seconds > 0, "timeout_seconds", timeout_seconds, "above 0")
        check(memory_bytes >= 64 << 20, "memory_bytes", memory_bytes, "at least 64 MiB")
        check(num_workers is None or num_workers >= 1, "num_workers", num_workers, "at least 1")
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self.num_workers = num_workers or os.cpu_count() or 1
        self.bubblewrap = bubblewrap
        self.allow_weaker = allow_weaker
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers: list[_Worker] = []
        self._capabilities: Capabilities | None = None
        self._finalizer: Any = weakref.finalize(self, _close_all, self._workers)

    def __enter__(self) -> "Sandbox":
        self.capabilities()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next use starts new ones."""
        with self._lock:
            _close_all(self._workers)
            self._idle = queue.LifoQueue()

    def capabilities(self) -> Capabilities:
        """What confines programs here.

        Raises:
            SandboxError: If a protection is missing and ``allow_weaker`` is not set, or no worker can be started.
        """
        with self._lock:
            if self._capabilities is None:
                if not hasattr(os, "fork"):
                    raise SandboxError(
                        "`Sandbox` needs an operating system that forks: Linux, or macOS with less safety."
                    )
                self._capabilities = self._try_out()
            missing = self._capabilities.missing
        if missing and not self.allow_weaker:
            raise SandboxError(
                "`Sandbox` cannot confine programs on this machine. Missing: " + "; ".join(missing) + "."
                " Set `allow_weaker: true` to run them all the same, where you would run them yourself."
            )
        return self._capabilities

    def run(self, solution: str, tests: str, entry_point: str | Sequence[str], setup: str = "") -> Verdict:
        """Judge one program. See `Task` for the arguments."""
        return self.run_many([Task(solution, tests, entry_point, setup)])[0]

    def run_many(self, tasks: Iterable[Task], max_seconds: float | None = None) -> list[Verdict]:
        """Judge programs, several at a time.

        Args:
            tasks: Programs and tests.
            max_seconds: Wall time for all of them. Those that it leaves out "could not run".

        Returns:
            One verdict for each, in order. A worker that dies is replaced, and its program "could not run".
        """
        self.capabilities()
        tasks = list(tasks)
        stop = threading.Event()
        timer = threading.Timer(max_seconds, stop.set) if max_seconds is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            with ThreadPoolExecutor(min(self.num_workers, len(tasks)) or 1) as pool:
                return list(pool.map(lambda task: self._run(task, stop), tasks))
        finally:
            if timer is not None:
                timer.cancel()

    def _run(self, task: Task, stop: threading.Event) -> Verdict:
        if stop.is_set():
            return Verdict("could not run", NO_TIME)
        if len(task.solution) + len(task.tests) + len(task.setup) > MOST_BYTES // 8:
            return Verdict("could not run", "the program is too long")
        try:
            worker = self._take()
        except SandboxError as error:
            return Verdict("could not run", str(error))
        try:
            verdict = worker.judge(task, self.timeout_seconds, self.memory_bytes)
        except _LOST as error:
            self._drop(worker)
            return Verdict("could not run", f"the worker was lost: {error}")
        if worker.goes_on:
            self._idle.put(worker)
        else:
            self._drop(worker)
        return verdict

    def _take(self) -> "_Worker":
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            assert self._capabilities is not None
            worker = _Worker(self._capabilities.bubblewrap)
            self._workers.append(worker)
            return worker

    def _drop(self, worker: "_Worker") -> None:
        with self._lock:
            if worker in self._workers:
                self._workers.remove(worker)
        worker.close()

    def _try_out(self) -> Capabilities:
        """Start a worker, within bubblewrap where that works, and let a program try what it must not do."""
        worker = None
        if self.bubblewrap and shutil.which("bwrap"):
            with contextlib.suppress(SandboxError):  # user namespaces may be forbidden
                worker = _Worker(bubblewrap=True)
        worker = worker or _Worker(bubblewrap=False)
        with tempfile.NamedTemporaryFile(prefix="forge-trial-") as secret:
            task = Task(_TRIAL, f"done = trial({secret.name!r})\nassert not done, '|'.join(done)", "trial")
            try:
                verdict = worker.judge(task, 10.0, max(self.memory_bytes, 256 << 20))
            except _LOST as error:
                worker.close()
                raise SandboxError(f"`Sandbox`: the trial program could not run: {error}") from None
        escapes: tuple[str, ...] = ()
        if not verdict.passed:
            said = verdict.detail.removeprefix("AssertionError: ").split("  in: ")[0]
            escapes = tuple(said.split("|"))
        self._workers.append(worker)
        self._idle.put(worker)
        return Capabilities(worker.landlock, worker.seccomp, worker.bubblewrap, escapes)


class _Worker:
    """One warm process, and what it says of itself. Nothing it does can keep this process waiting."""

    def __init__(self, bubblewrap: bool) -> None:
        self.bubblewrap = bubblewrap
        self.goes_on = True  # whether it can judge another program
        try:
            self._process = _start(_command(bubblewrap))
        except OSError as error:
            raise SandboxError(f"`Sandbox`: no worker can be started: {error}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._results = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self._requests, self._results):
            os.set_blocking(fd, False)
        try:
            hello = self._read_frame(time.monotonic() + _STARTUP)
            self.landlock, self.seccomp = int(hello["landlock"]), bool(hello["seccomp"])
        except _LOST as error:
            self.close()
            raise SandboxError(f"`Sandbox`: a worker did not start: {error!r}") from None

    def judge(self, task: Task, timeout: float, memory: int) -> Verdict:
        """What the worker says of a program.

        Raises:
            OSError, EOFError, ValueError, KeyError, TypeError, TimeoutError: If the worker is lost.
        """
        names = [task.entry_point] if isinstance(task.entry_point, str) else list(task.entry_point)
        end = time.monotonic() + timeout + _GRACE
        self._write(
            frame({"timeout": timeout, "memory": memory})
            + frame({"solution": task.solution, "names": names})
            + frame({"tests": task.tests, "setup": task.setup, "names": names}),
            end,
        )
        header = self._read_frame(end)
        self.goes_on = bool(header["again"])
        status, note = header["status"], str(header["note"])
        if status not in get_args(Status) or status == "could not run":
            raise ValueError(f"status {status!r}, {note}")
        length, printed = int(header["detail"]), int(header["stdout"])
        if not 0 <= length <= _MOST_SAID or not 0 <= printed <= _MOST_SAID:
            raise ValueError("it announces too much")
        detail, stdout = (self._read(count, end).decode(errors="replace") for count in (length, printed))
        if select.select([self._results], [], [], 0)[0]:
            raise ValueError("it says more than it may")
        return Verdict(status, note or detail, float(header["seconds"]), stdout)

    def close(self) -> None:
        """End it, and everything that it started: its children end with it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _write(self, data: bytes, end: float) -> None:
        rest = memoryview(data)
        while rest:
            if not select.select([], [self._requests], [], max(0.0, end - time.monotonic()))[1]:
                raise TimeoutError("it does not listen")
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._requests, rest[: 1 << 16]) :]

    def _read_frame(self, end: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(4, end), "little")
        if size > _MOST_SAID:
            raise ValueError("it announces too much")
        found = json.loads(self._read(size, end))
        if not isinstance(found, dict):
            raise ValueError("it says nothing that is known")
        return found

    def _read(self, count: int, end: float) -> bytes:
        data = b""
        while len(data) < count:
            if not select.select([self._results], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("it does not answer")
            part = os.read(self._results, count - len(data))
            if not part:
                raise EOFError("it has ended")
            data += part
        return data


_LOST = (OSError, EOFError, ValueError, KeyError, TypeError)  # `TimeoutError` is an `OSError`
_MOST_SAID = 1 << 14

_starters: dict[int, ThreadPoolExecutor] = {}


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    """From a thread that lives as long as this process: workers ask the kernel to end them when that thread does."""
    starter = _starters.setdefault(os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="sandbox"))
    return starter.submit(
        subprocess.Popen,
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"},
        start_new_session=True,
    ).result()


def _close_all(workers: "list[_Worker]") -> None:
    while workers:
        workers.pop().close()


def _command(bubblewrap: bool) -> list[str]:
    here = Path(__file__).resolve().parent
    package = here.parent
    # Without the packages' own imports, which would make every fork dearer.
    start = (
        "import sys, types\n"
        f"for name, path in (('forge_lightning', {str(package)!r}), ('forge_lightning.sandbox', {str(here)!r})):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from forge_lightning.sandbox.worker import serve\n"
        "serve()"
    )
    interpreter = os.path.realpath(sys.executable)
    # Not `-I`, which would ignore the hash seed: the environment is ours.
    python = [interpreter, "-S", "-s", "-B", "-u", "-c", start]
    if not bubblewrap:
        return python
    folders = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, str(Path(interpreter).parents[1])]
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for folder in dict.fromkeys([*folders, str(package)]):
        command += ["--ro-bind-try", folder, folder]
    return [*command, "--dev", "/dev", "--remount-ro", "/", "--chdir", "/", *python]
