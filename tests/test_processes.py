"""Hung processes are given up with all their children; slow ones are waited for."""

import os
import subprocess
import sys
import time

import pytest

from tests import processes

CHILD = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"  # ended, and nobody has looked yet


def left_by(out, **options):
    """The child of a process, for as long as it is there."""
    deadline = time.monotonic() + 60
    while is_there(pid := int(out.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_there(pid)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="tells of processes by /proc")
def test_a_hung_process_is_given_up_with_its_children(tmp_path):
    out = tmp_path / "out.txt"
    command = [sys.executable, "-c", CHILD + "time.sleep(600)"]
    with pytest.raises(subprocess.TimeoutExpired), open(out, "w") as file, processes.started(command, stdout=file) as p:
        processes.wait(p, still=2.0)
    assert p.returncode is not None
    assert not left_by(out)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="tells of processes by /proc")
def test_a_slow_process_is_waited_for_and_leaves_nothing(tmp_path):
    code = CHILD + "end = time.monotonic() + 4\nwhile time.monotonic() < end: pass\nsys.exit(3)"
    result = processes.run([sys.executable, "-c", code], still=1.0)
    assert (result.returncode, result.stderr) == (3, "")
    (tmp_path / "out.txt").write_text(result.stdout)
    assert not left_by(tmp_path / "out.txt")


def test_a_module_runs_in_a_process_of_its_own(tmp_path):
    (tmp_path / "said.py").write_text(
        "import os, sys, warnings\n"
        "print(__name__, sys.argv[1:], os.getcwd(), 'lightning.pytorch' in sys.modules)\n"
        "print(os.getpid(), file=sys.stderr)\n"
        "sys.exit(len(sys.argv))\n"
    )
    result = processes.run_module("said", "a", 1, cwd=tmp_path)
    assert result.returncode == 3
    assert result.stdout == f"__main__ ['a', '1'] {tmp_path} True\n"
    assert int(result.stderr) != os.getpid()
    assert "said" not in sys.modules


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="tells of processes by /proc")
def test_a_module_that_hangs_is_given_up_with_its_children(tmp_path):
    out = tmp_path / "out.txt"
    code = CHILD.replace("flush=True", "file=open(sys.argv[1], 'w'), flush=True") + "time.sleep(600)"
    (tmp_path / "hangs.py").write_text(code)
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run_module("hangs", out, cwd=tmp_path, still=2.0)
    assert not left_by(out)
