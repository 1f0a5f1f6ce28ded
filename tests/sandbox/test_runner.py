import os
import time

import pytest

from forge_lightning.sandbox import run_programs


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("import json, re, math, collections, heapq, itertools, typing", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("def f(:", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("", "passed"),
        ("x = bytearray(4 << 30)", "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("open('big', 'wb').write(bytes(4 << 20))", "failed"),
        ("print(open('/dev/stdin').read()); assert input() == ''", "failed"),
    ],
)
def test_status(program, status):
    assert run_programs([program])[0].status == status


def test_a_program_that_does_not_end_is_ended_with_its_children(tmp_path):
    child = f"['/bin/sh', '-c', 'sleep 3; touch {tmp_path}/late']"
    program = f"import subprocess, time\nsubprocess.Popen({child})\ntime.sleep(60)"
    start = time.monotonic()
    result = run_programs([program], timeout=1.0)[0]
    assert time.monotonic() - start < 10
    assert result.status in ("timeout", "failed")  # failed: an ordinary user may not start the child at all
    time.sleep(3)
    assert not list(tmp_path.iterdir())


def test_environment_is_empty_and_the_folder_temporary():
    program = "import os\nassert not set(os.environ) - {'LC_CTYPE'}, os.environ\nassert os.listdir('.') == []\n"
    program += "print(os.getcwd())"
    result = run_programs([program])[0]
    assert result.passed, result.output
    assert not os.path.exists(result.output.strip())


def test_output_is_kept_from_its_end_and_bounded():
    result = run_programs(["print('x' * 100_000)\nprint('the end')"])[0]
    assert result.passed
    assert result.output.endswith("the end\n")
    assert len(result.output) <= 2000


def test_results_keep_the_order():
    programs = [f"import time; time.sleep({(3 - i) / 10}); print({i})" for i in range(4)]
    programs[2] = "assert False"
    results = run_programs(programs)
    assert [r.passed for r in results] == [True, True, False, True]
    assert results[3].output == "3\n"


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="`timeout=0` must be above 0"):
        run_programs(["pass"], timeout=0)
    with pytest.raises(ValueError, match="`memory_mb=1` must be at least 64"):
        run_programs(["pass"], memory_mb=1)
