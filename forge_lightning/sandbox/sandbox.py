"""`Sandbox`: persistent workers that judge programs by their tests."""

import contextlib
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge_lightning.sandbox.wire import MOST_BYTES, read_frame, write_frame

Status = Literal["passed", "failed", "timeout", "out of memory", "killed", "could not run"]

_GRACE = 10.0  # seconds that a worker may need beyond a program's own
_STARTUP = 60.0


class SandboxError(RuntimeError):
    """This machine cannot confine programs, or no worker can be started."""


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Args:
        status: "passed" if all tests ran to their end; "failed" if one did not, or the program raised or ended itself;
            "timeout", "out of memory" or "killed" (by a signal) if a limit ended it; "could not run" if there was no
            worker to run it.
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
            ``entry_point``.
        entry_point: Name, or names, that the program defines and the tests use.
        setup: Statements that the tests need before: imports, helpers. They run beside the tests.
    """

    solution: str
    tests: str
    entry_point: str | Sequence[str]
    setup: str = ""


_TRIAL = """
import ctypes, os, socket
def trial(secret):
    done, mine = [], f"/tmp/forge-trial-{os.getpid()}"
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
    attempt("change a file's mode", lambda: os.chmod(secret, 0o644))
    return done
"""


class Sandbox:
    """Judges programs: each in two processes of its own, forked by a warm worker, confined by the kernel.

    One process holds the program and one the tests, which call it by message; so no object, exit code or forged message
    of a program can pass for a right answer. Arguments and results cross by value: what a program changes in place, its
    tests do not see, and objects of its own classes can be called and read, but not compared.

    A program has no file to write, no network, no other process, an empty environment, no input, and limits on time,
    memory and output. It can still read Python's own library, and learn which files exist where there is no bubblewrap.

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
        def require(ok: bool, argument: str, value: object, allowed: str) -> None:
            if not ok:
                raise ValueError(f"`Sandbox({argument}={value!r})` must be {allowed}.")

        require(timeout_seconds > 0, "timeout_seconds", timeout_seconds, "above 0")
        require(memory_bytes >= 64 << 20, "memory_bytes", memory_bytes, "at least 64 MiB")
        require(num_workers is None or num_workers >= 1, "num_workers", num_workers, "at least 1")
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
            return Verdict("could not run", "no time was left")
        if len(task.solution) + len(task.tests) + len(task.setup) > MOST_BYTES // 8:
            return Verdict("could not run", "the program is too long")
        try:
            worker = self._take()
        except SandboxError as error:
            return Verdict("could not run", str(error))
        try:
            verdict = worker.judge(task, self.timeout_seconds, self.memory_bytes)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            self._drop(worker)
            return Verdict("could not run", f"the worker was lost: {error}")
        if verdict.pop("out_of_step", False):
            self._drop(worker)
        else:
            self._idle.put(worker)
        return Verdict(**verdict)

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
        secret = str(Path(__file__).resolve())
        task = Task(_TRIAL, f"done = trial({secret!r})\nassert not done, '|'.join(done)", "trial")
        try:
            verdict = worker.judge(task, 10.0, max(self.memory_bytes, 256 << 20))
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            worker.close()
            raise SandboxError(f"`Sandbox`: the trial program could not run: {error}") from None
        escapes: tuple[str, ...] = ()
        if verdict["status"] != "passed":
            said = verdict["detail"].removeprefix("AssertionError: ").split("  in: ")[0]
            escapes = tuple(said.split("|"))
        self._workers.append(worker)
        self._idle.put(worker)
        return Capabilities(worker.landlock, worker.seccomp, worker.bubblewrap, escapes)


class _Worker:
    """One warm process, and what it says of itself."""

    def __init__(self, bubblewrap: bool) -> None:
        self.bubblewrap = bubblewrap
        try:
            self._process = subprocess.Popen(
                _command(bubblewrap),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"`Sandbox`: no worker can be started: {error}") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._results = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            hello = self._read(_STARTUP)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            self.close()
            raise SandboxError(f"`Sandbox`: a worker did not start: {error}") from None
        self.landlock, self.seccomp = int(hello["landlock"]), bool(hello["seccomp"])

    def judge(self, task: Task, timeout: float, memory: int) -> dict[str, Any]:
        """What the worker says of a program.

        Raises:
            OSError, EOFError, ValueError, TimeoutError: If the worker is lost.
        """
        names = [task.entry_point] if isinstance(task.entry_point, str) else list(task.entry_point)
        limits = {"timeout": timeout, "memory": memory}
        write_frame(self._requests, {"solution": task.solution, "names": names, **limits})
        write_frame(self._requests, {"tests": task.tests, "setup": task.setup})
        verdict: dict[str, Any] = self._read(timeout + _GRACE)
        return verdict

    def close(self) -> None:
        """End it, and everything that it started."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self, seconds: float) -> Any:
        if not select.select([self._results], [], [], seconds)[0]:
            raise TimeoutError("it does not answer")
        value = read_frame(self._results)
        if value is None:
            raise EOFError("it has ended")
        return value


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
    command = ["bwrap", "--unshare-all", "--new-session", "--cap-drop", "ALL"]
    for folder in dict.fromkeys([*folders, str(package)]):
        command += ["--ro-bind-try", folder, folder]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/", "--chdir", "/", *python]
