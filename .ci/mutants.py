"""Mutation check of the numerical code: `python .ci/mutants.py` changes one operator or number at a time.

Each mutant is imported in a process of its own, and the tests of its folder run against it until one fails. The report
names the mutants that survived. Sampled with a seed, so that two runs of one commit agree.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = {
    "grokfast/functional.py": (
        "tests/grokfast/test_functional.py",
        "tests/grokfast/test_filter.py",
        "tests/grokfast/test_unread.py",
    ),
    "grokfast/filter.py": (
        "tests/grokfast/test_filter.py",
        "tests/grokfast/test_unread.py",
        "tests/grokfast/test_callback.py",
    ),
    "grokfast/unread.py": ("tests/grokfast/test_unread.py",),
    "muon/functional.py": ("tests/muon/test_functional.py",),
    "muon/optim.py": ("tests/muon/test_optim.py",),
    "dream/membership.py": ("tests/dream/test_buffer.py",),
    "dream/functional.py": ("tests/dream/test_functional.py", "tests/dream/test_buffer.py"),
    "dream/reservoir.py": ("tests/dream/test_reservoir.py", "tests/dream/test_buffer.py"),
    "dream/frontier.py": ("tests/dream/test_frontier.py", "tests/dream/test_buffer.py"),
    "dream/progress.py": ("tests/dream/test_progress.py", "tests/dream/test_callback.py"),
    "dream/store.py": ("tests/dream/test_store.py", "tests/dream/test_buffer.py"),
    "dream/scores.py": ("tests/dream/test_scores.py", "tests/dream/test_callback.py"),
    "dream/memory.py": ("tests/dream/test_memory.py", "tests/dream/test_callback.py"),
    "dream/mixing.py": ("tests/dream/test_callback.py",),
    "dream/measuring.py": ("tests/dream/test_callback.py",),
    "edge/trackers.py": ("tests/edge/test_trackers.py", "tests/edge/test_callback.py"),
    "edge/complexity.py": ("tests/edge/test_complexity.py",),
    "geometry/functional.py": ("tests/geometry/test_formulas.py", "tests/geometry/test_functional.py"),
    "geometry/point_cloud.py": ("tests/geometry/test_formulas.py", "tests/geometry/test_functional.py"),
    "geometry/change_detector.py": ("tests/geometry/test_change_detector.py",),
    "geometry/pace.py": ("tests/geometry/test_pace.py",),
}
"""Numerical modules, and the tests that have to catch their mutants."""
SAME_RESULT: dict[str, dict[str, str]] = {
    "grokfast/functional.py": {
        "_BLOCK": "a size of blocks, which changes no result beyond rounding",
        'device.type == "cpu"': "two ways to the same result",
        "len(blocks) == 1": "two ways to the same result",
        "grad.dtype == other.dtype": "two ways to the same result, beyond rounding",
        "== index %": "in which turn sums are made afresh, against rounding",
    },
    "grokfast/filter.py": {"shift=": "dimensions of a DTensor: tests/contract/distributed.py has two processes"},
    "geometry/functional.py": {
        "1 << 24": "a size of blocks",
        "dimension = (n - 1) / ((n2 - 1) * total)": "where Newton's method starts",
        "range(100)": "its most steps",
        "1e-12": "when it stops; ties after rounding",
    },
    "geometry/point_cloud.py": {
        "_BLOCK": "a size of blocks",
        "_WHOLE": "two ways to the same result",
        "1 << 22": "a size of blocks",
        "2.0**-16": "rescaling by a power of two, which rounds nothing",
        "_budget": "when fp64 throughout is cheaper",
        "k < block.shape[1] - 1": "two ways to the same result",
        "num_neighbors > self._nearest.shape[1]": "finding the same neighbours again",
    },
    "edge/complexity.py": {"keys = rank * (n + 1)": "any larger factor sorts alike", "(-1, 0)": "a place before all"},
    "dream/reservoir.py": {"default=0": "no turns", "return max(self.held": "no place is beyond the last"},
    "dream/frontier.py": {"_RIVALS =": "how many are compared"},
    "dream/store.py": {
        "np.zeros((capacity, 0)": "a width that grows with the first example",
        "stored.itemsize > field.stored.itemsize": "the same type again",
        "one.unsqueeze(0)": "the same bytes",
    },
    "dream/functional.py": {"1e-12": "a floor that keeps logarithms finite"},
    "dream/measuring.py": {"seed=0": "nothing is drawn in evaluation mode"},
    "muon/functional.py": {"tall =": "the larger product comes to the same"},
    "muon/optim.py": {
        "_MOST_STACKED": "how many go together",
        "matrix[0].shape": "a gradient has its parameter's shape and device",
    },
    "edge/trackers.py": {"-30.0), 30.0": "the sigmoid is 0 or 1 there"},
    "geometry/change_detector.py": {"* sign": "1 or -1, which divide alike"},
}
"""Lines, by a part of their text, whose mutants give the same result, and why. They are not made."""
SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {"min": "max", "max": "min"}


def points(tree: ast.Module, same: set[int]) -> Iterator[tuple[int, str, Any]]:
    """Line, description and the change of every place that can be mutated, but for the lines ``same``."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign):
            part = node.annotation if isinstance(node, ast.AnnAssign) else node
            skipped |= {id(child) for child in ast.walk(part)}
        if isinstance(node, ast.FunctionDef):
            arguments = [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]
            annotations = [node.returns, *(argument.annotation for argument in arguments)]
            skipped |= {id(child) for part in annotations if part is not None for child in ast.walk(part)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            skipped |= {id(child) for decorator in node.decorator_list for child in ast.walk(decorator)}
    for node in ast.walk(tree):
        if id(node) in skipped or getattr(node, "lineno", 0) in same:
            continue
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
            yield node.lineno, type(node.op).__name__, (node, "op", SWAPPED[type(node.op)]())
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            yield node.lineno, type(node.ops[0]).__name__, (node, "ops", [SWAPPED[type(node.ops[0])](), *node.ops[1:]])
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            other = node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.01
            yield node.lineno, f"{node.value} to {other}", (node, "value", other)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.lineno, node.func.id, (node.func, "id", CALLS[node.func.id])


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed code."""

    def __init__(self, name: str, path: Path, code: Any) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module: Any) -> None:
        exec(self.code, module.__dict__)


def start(module: str, code: Any, tests: tuple[str, ...], seconds: float) -> int:
    """Run the tests against a mutant in a child process. Returns its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(int(seconds))  # tests that hang count as a failure
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    path = ROOT / "forge_lightning" / module
    sys.meta_path.insert(0, _Mutated(f"forge_lightning.{module[:-3].replace('/', '.')}", path, code))
    import pytest

    quick = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio", "-m", "not slow"]
    quick += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # what was imported before the fork
    os._exit(int(pytest.main([*quick, *tests])))


def main() -> int:
    """Check a sample of mutants of each module. Returns 1 if too few are caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--sample", type=int, default=8, help="mutants of each module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.85, help="share that must be caught")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the tests of a mutant")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import lightning.pytorch  # noqa: F401  # imported once, before the processes are forked
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    jobs = []
    for module in args.modules or TESTS:
        path = ROOT / "forge_lightning" / module
        tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
        parts = SAME_RESULT.get(module, {})
        same = {number for number, line in enumerate(lines, 1) if any(part in line for part in parts)}
        if unused := [part for part in parts if not any(part in line for line in lines)]:
            sys.exit(f"SAME_RESULT of {module} names what no line has: {', '.join(unused)}")
        jobs.append((module, 0, "unchanged", compile(tree, str(path), "exec")))  # the control, which must survive
        found = list(points(tree, same))
        chosen = random.Random(f"{args.seed}/{module}").sample(found, min(args.sample or len(found), len(found)))
        for line, what, (node, field, value) in chosen:
            before = getattr(node, field)
            setattr(node, field, value)
            jobs.append((module, line, what, compile(ast.fix_missing_locations(tree), str(path), "exec")))
            setattr(node, field, before)
    caught: dict[str, list[bool]] = {}
    began, running, waiting = time.monotonic(), {}, list(reversed(jobs))
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop()
            running[start(job[0], job[3], TESTS[job[0]], args.timeout)] = job
        child, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a test that hung has left
        module, line, what, _ = running.pop(child)
        survived = os.waitstatus_to_exitcode(status) == 0
        if line == 0:
            if not survived:
                sys.exit(f"The tests of {module} fail without a mutant: {' '.join(TESTS[module])}")
            continue
        caught.setdefault(module, []).append(not survived)
        if survived:
            print(f"survived: forge_lightning/{module}:{line}: {what}", flush=True)
    for module, values in caught.items():
        print(f"{module:32} {sum(values):4} of {len(values):4} caught")
    total = [value for values in caught.values() for value in values]
    share = sum(total) / len(total)
    print(f"{100 * share:.1f} % of {len(total)} mutants caught in {time.monotonic() - began:.0f} s")
    return int(share < args.least)


if __name__ == "__main__":
    sys.exit(main())
