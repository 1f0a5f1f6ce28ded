"""What judging a program costs, and whether all official solutions pass: `python -m benchmarks.sandbox`.

Needs FORGE_MBPP and FORGE_HUMANEVAL. Run it on a quiet machine.
"""

import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.environment import header, table
from forge_lightning.data import CodeTasks
from forge_lightning.data.code_tasks import Problem
from forge_lightning.sandbox import Sandbox

OUT = Path(__file__).with_suffix(".md")
INTRO = """\
CPU time of a program: of this process, the workers and all they fork, from start to end, over the number of programs;
median of three passes. "judged" is `Sandbox`: the program in one process, its tests in another, landlock, seccomp and
limits. "subprocess" is `python -I -S` on solution and tests in one text, without any protection. CPU time inside
bubblewrap is not told to its parent; its wall time is given.
"""


def problems() -> dict[str, list[Problem]]:
    mbpp = CodeTasks(dataset="mbpp")
    every = [p for split in ("train", "val", "test") for p in mbpp.problems(split)]
    return {"HumanEval": CodeTasks(dataset="humaneval").problems("test"), "MBPP": every}


def cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def judged(chosen: list[Problem], bubblewrap: bool) -> tuple[float, float, int]:
    """CPU and wall seconds, and how many passed."""
    begin, start = cpu(), time.perf_counter()
    with Sandbox(timeout_seconds=10.0, bubblewrap=bubblewrap) as sandbox:
        verdicts = sandbox.run_many([p.task(p.solution) for p in chosen])
    return cpu() - begin, time.perf_counter() - start, sum(v.passed for v in verdicts)


def unprotected(chosen: list[Problem]) -> tuple[float, float, int]:
    def run(problem: Problem) -> bool:
        task = problem.task(problem.solution)
        text = f"{task.setup}\n{task.solution}\n{task.tests}"
        return subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True).returncode == 0

    begin, start = cpu(), time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = sum(pool.map(run, chosen))
    return cpu() - begin, time.perf_counter() - start, passed


def stubs(chosen: list[Problem]) -> int:
    """How many pass that return nothing."""
    with Sandbox(timeout_seconds=10.0) as sandbox:
        empty = ["    return None\n" if "/" in p.task_id else _stub(p) for p in chosen]
        return sum(v.passed for v in sandbox.run_many([p.task(e) for p, e in zip(chosen, empty, strict=True)]))


def _stub(problem: Problem) -> str:
    return "\n".join(f"def {name}(*_, **__): return None" for name in problem.entry_point)


def main() -> None:
    rows = []
    for name, chosen in problems().items():
        ways = {
            "subprocess": lambda c=chosen: unprotected(c),
            "judged": lambda c=chosen: judged(c, False),
            "judged, in bubblewrap": lambda c=chosen: judged(c, True),
        }
        passes = [{way: run() for way, run in ways.items()} for _ in range(3)]
        for way in ways:
            found = sorted(p[way] for p in passes)[1]
            count = len(chosen)
            each = "–" if "bubblewrap" in way else f"{1000 * found[0] / count:.1f}"
            rows.append([f"{name}, {count}", way, each, f"{count / found[1]:,.0f}", str(found[2])])
        rows.append([f"{name}, {len(chosen)}", "judged, programs that return nothing", "–", "–", str(stubs(chosen))])
    columns = ["programs", "how", "CPU ms each", "a second on all cores", "passed"]
    text = f"# What judging a program costs\n\n{header('python -m benchmarks.sandbox')}\n{INTRO}\n"
    OUT.write_text(text + table(columns, rows))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
