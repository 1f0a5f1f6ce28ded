"""Programs in processes of their own, with limits.

What holds: wall time, CPU time, memory, size of written files, open files, new processes (not for root, whom the kernel
exempts), an empty environment, a temporary working directory, no input, bounded output, and an end of the whole process
group. What does not: a program can read what its user can read, reach the network, and, if it means to, leave the
process group or claim to have passed. Run programs of a model you do not trust under a user with nothing to lose.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "timeout", "out of memory", "killed", "could not run"]

_OUTPUT_BYTES = 2000

# Runs in the new process: sets its limits, reads verdict token and program from the input, runs the program, and writes
# the token only after its last line. An exit code would not do: `exit(0)` is not a pass.
_BOOTSTRAP = """
import os, resource, sys
limits = {limits!r}
for name, value in limits.items():
    if hasattr(resource, name):
        resource.setrlimit(getattr(resource, name), (value, value))
source = sys.stdin.buffer.read().decode()
token, source = source[:32], source[32:]
verdict = os.dup(1)
os.dup2(2, 1)
sys.stdin = open(os.devnull)
try:
    exec(compile(source, "program.py", "exec"), {{"__name__": "__main__"}})
except MemoryError:
    os.write(verdict, b"out of memory")
    raise
os.write(verdict, token.encode())
"""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Args:
        status: "passed" if it ran to its end; "failed" if it raised or exited before; "timeout", "out of memory" or
            "killed" (by a signal) if a limit ended it; "could not run" if no process could be started.
        output: End of what it printed, errors included, at most 2,000 bytes.
    """

    status: Status
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "passed"


def run_programs(
    programs: Sequence[str], *, timeout: float = 5.0, memory_mb: int = 1024, num_workers: int | None = None
) -> list[ProgramResult]:
    """Run Python programs, several at a time.

    Args:
        programs: Source texts. One passes if it runs to its last line, so tests belong at its end, as assertions.
        timeout: Seconds of wall time for each; the CPU time is limited to one second more.
        memory_mb: Address space of each, in MiB.
        num_workers: Programs at a time. Default: the number of cores.

    Returns:
        One result for each, in order.

    Raises:
        ValueError: If ``timeout`` is not positive or ``memory_mb`` below 64, which Python itself needs.
    """
    if timeout <= 0:
        raise ValueError(f"`timeout={timeout}` must be above 0.")
    if memory_mb < 64:
        raise ValueError(f"`memory_mb={memory_mb}` must be at least 64.")
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: _run(program, timeout, memory_mb), programs))


def _run(program: str, timeout: float, memory_mb: int) -> ProgramResult:
    limits = {
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 1,
        "RLIMIT_CORE": 0,
    }
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="forge-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as errors,
    ):
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOTSTRAP.format(limits=limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,  # a file, which the file-size limit bounds
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            return ProgramResult("could not run", str(error))
        try:
            verdict, _ = process.communicate((token + program).encode(errors="replace"), timeout=timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            verdict, timed_out = b"", True
        finally:
            _kill_group(process)
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - _OUTPUT_BYTES))
        output = errors.read().decode(errors="replace")
    return ProgramResult(_status(verdict, token, process.returncode, timed_out), output)


def _status(verdict: bytes, token: str, returncode: int, timed_out: bool) -> Status:
    if timed_out or returncode == -signal.SIGXCPU:
        return "timeout"
    if verdict == token.encode() and returncode == 0:
        return "passed"
    if verdict.endswith(b"out of memory"):
        return "out of memory"
    return "killed" if returncode < 0 else "failed"


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and left none behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
