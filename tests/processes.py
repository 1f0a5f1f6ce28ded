"""Other processes that tests start: given up when they stand still, not when they are slow, and none is left behind."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

LEAST_SHARE = 0.01
"""Of a core: who computes less than that stands still, also where many others wait for the same cores."""


def cpu_seconds(group):
    """CPU time of all processes of a group, in seconds; the clock where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        return time.monotonic()
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(command, **options):
    """A process in a group of its own, all of which is killed at the end."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process, still=300.0, until=lambda: False):
    """Wait for the end of a process, or for something else.

    Args:
        process: Of `started`.
        still: Seconds in which it and its children must compute something, or be taken for hung.
        until: What else is waited for.

    Raises:
        subprocess.TimeoutExpired: If it is hung.
    """
    seen = deque([(time.monotonic(), cpu_seconds(process.pid))])
    while process.poll() is None and not until():
        time.sleep(0.05)
        now = time.monotonic()
        if now - seen[-1][0] < still / 10:
            continue
        seen.append((now, cpu_seconds(process.pid)))
        while now - seen[0][0] >= still:
            if seen[-1][1] - seen[0][1] < LEAST_SHARE * still:
                raise subprocess.TimeoutExpired(process.args, still)
            seen.popleft()


def run(command, still=300.0, **options):
    """Run a command to its end, as `subprocess.run` with its output captured as text; see `wait` for ``still``."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with started(command, stdout=out, stderr=errors, **options) as process:
            wait(process, still)
        texts = [(file.seek(0), file.read())[1] for file in (out, errors)]
        return subprocess.CompletedProcess(command, process.returncode, *texts)


def run_module(name, *arguments, cwd, still=300.0):
    """As ``python -m name arguments``, without the ten seconds that importing Lightning can take.

    The process is forked from one that has imported it, and nothing else has happened in that one. Variables that
    modules read while they are imported are those of the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / "out", Path(folder) / "errors"]
        command = [name, *map(str, arguments)]
        process = _Forked(target=_main, args=(command, str(cwd), list(map(str, texts)), dict(os.environ)))
        process.start()
        try:
            wait(process, still)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(text.read_text() for text in texts))


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["forge_lightning.cli.main", "forge_lightning.callbacks", "forge_lightning.models"])


class _Forked(_forks.Process):
    """With the two names of a `subprocess.Popen` that `wait` asks for."""

    args = "a module"

    def poll(self):
        return self.exitcode


def _main(command, cwd, texts, environment):
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = command
    sys.path.insert(0, cwd)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
