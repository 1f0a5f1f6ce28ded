import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from forge_lightning.sandbox import Sandbox, SandboxError, Task, sandbox


@pytest.fixture(scope="module")
def box():
    with Sandbox(timeout_seconds=5.0) as made:
        yield made


@pytest.mark.parametrize(
    ("solution", "tests", "status", "detail"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2\nassert f(2) == 3", "passed", ""),
        ("def f(x): return x", "assert f(2) == 2\nassert f(1) == 2", "failed", "AssertionError  in: assert f(1) == 2"),
        ("def f(:", "assert f(1) == 2", "failed", "SyntaxError: invalid syntax"),
        ("def g(x): pass", "assert f(1) == 2", "failed", "the program defines no 'f'  in: assert f(1) == 2"),
        ("def f(x): pass", "assert f(1 == 2", "failed", "SyntaxError: in the tests: '(' was never closed"),
        ("def f(x): return {}[x]", "assert f(1) == 2", "failed", "KeyError"),
        ("raise SystemExit(0)", "assert f(1) == 2", "failed", "SystemExit"),
        ("import os; os._exit(0)", "assert f(1) == 2", "failed", "the program ended itself with code 0"),
        ("def f(x):\n  while True: pass", "assert f(1) == 2", "timeout", "ran out of time"),
        ("def f(x): return bytearray(4 << 30)", "assert f(1) == 2", "out of memory", "MemoryError"),
        ("def f(x): return 'x' * (17 << 20)", "assert f(1) == 2", "failed", "is too long"),
        ("import ctypes; ctypes.string_at(0)", "assert f(1) == 2", "killed", "ended by signal 11"),
        ("import os; os.kill(os.getpid(), 9)", "assert f(1) == 2", "killed", "ended by signal 9"),
        ("def f(x): return f(x)", "assert f(1) == 2", "failed", "RecursionError"),
        ("def f(x): return input()", "assert f(1) == 2", "failed", "EOFError"),
        ("def f(x):\n  a = []\n  a.append(a)\n  return a", "assert f(1) == 2", "failed", "nested too deeply"),
    ],
)
def test_status_and_detail(solution, tests, status, detail):
    with Sandbox(timeout_seconds=1.0, num_workers=1) as one:
        verdict = one.run(solution, tests, "f")
    assert verdict.status == status
    assert detail in verdict.detail
    assert verdict.passed == (status == "passed")
    assert 0 < verdict.seconds < 3


VALUES = [
    "None", "True", "-3", "10**5000", "-(10**30)", "0.1", "-0.0", "1e308", "'é\\ud800'", "b'\\x00'", "bytearray(b'a')",
    "(1, (2,))", "[1, [2]]", "{1: {'a': (2,)}}", "{1, 2}", "frozenset({1})", "range(1, 9, 2)", "1 + 2j", "int", "[str]",
    "collections.deque([1])", "collections.Counter('aab')", "decimal.Decimal('1.10')", "fractions.Fraction(2, 3)",
    "datetime.datetime(2020, 1, 2, 3)", "datetime.date(2020, 1, 2)", "datetime.timedelta(1, 2)",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_values_cross_both_ways(box, value):
    setup = "import collections, datetime, decimal, fractions"
    tests = f"value = {value}\nback = f(value)\nassert back == value and type(back) is type(value), back"
    verdict = box.run("def f(x): return x", tests, "f", setup)
    assert verdict.passed, verdict.detail
    verdict = box.run(f"{setup}\ndef f(): return {value}", f"assert f() == {value}", "f", setup)
    assert verdict.passed, verdict.detail


def test_what_is_no_number_is_none(box):
    assert box.run("def f(): return float('nan')", "x = f()\nassert x != x", "f").passed


def test_exceptions_keep_their_type(box):
    tests = "try: f(0)\nexcept ZeroDivisionError: pass\nelse: assert False"
    assert box.run("def f(x): return 1 / x", tests, "f").passed
    for kind in ("TypeError", "KeyError", "RecursionError", "AssertionError"):
        tests = f"try: f()\nexcept {kind}: pass\nelse: assert False"
        assert box.run(f"def f(): raise {kind}('x')", tests, "f").passed
    own = "class Mine(ValueError): pass\ndef f(x): raise Mine('text')"
    assert "Mine: text" in box.run(own, "f(0)", "f").detail


MINE = "class Mine(KeyError): pass\ndef f(): raise Mine('text')"


@pytest.mark.parametrize(
    ("solution", "raised", "text"),
    [
        ("import json\ndef f(): return json.loads('{')", "ValueError", "Expecting property name"),
        ("def f(): return b'\\xff'.decode()", "UnicodeDecodeError", "invalid start byte"),
        ("def f(): return {}['a']", "KeyError", "'a'"),
        ("def f(): raise TypeError('no number')", "TypeError", "no number"),
        ("def f(): open('/nothing/there')", "OSError", ""),
        (MINE, "Mine", "text"),
        (MINE, "LookupError", "text"),
    ],
)
def test_exceptions_are_caught_by_class_and_by_base(box, solution, raised, text):
    tests = f"try: f()\nexcept {raised} as error: assert {text!r} in str(error), str(error)\nelse: assert False"
    verdict = box.run(solution, tests, ["f", "Mine"])
    assert verdict.passed, verdict.detail
    assert not box.run(solution, "try: f()\nexcept ZeroDivisionError: pass", ["f", "Mine"]).passed


def test_endless_generators_are_read_as_far_as_the_tests_go(box):
    solution = """
def count():
    n = 0
    while True:
        yield n
        n += 1
def three():
    yield from "abc"
    raise ValueError("a fourth")
"""
    tests = """
from itertools import islice
assert list(islice(count(), 100)) == list(range(100))
found = three()
assert [next(found) for _ in range(3)] == ["a", "b", "c"]
try: next(found)
except ValueError as error: assert str(error) == "a fourth"
else: assert False
assert list(found) == []
"""
    verdict = box.run(solution, tests, ["count", "three"])
    assert verdict.passed, verdict.detail
    with Sandbox(timeout_seconds=1.0, num_workers=1) as one:
        assert one.run(solution, "sum(count())", ["count"]).status == "timeout"


def test_named_tuples_and_dict_views_keep_what_they_are(box):
    solution = "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)\n"
    solution += "def g(): return {1: 2}"
    tests = "assert f().x == 1 and f() == (1, 2)\nassert g().keys() == {1} and list(g().values()) == [2]"
    solution += "\ndef keys(): return {1: 2}.keys()"
    verdict = box.run(solution, tests + "\nassert keys() == {1}", ["f", "g", "keys"])
    assert verdict.passed, verdict.detail


def test_iterators_and_keywords_and_lambdas(box):
    solution = "def f(n, by=1):\n  for i in range(n): yield i * by\nfactor = 3\ng = lambda x: x * factor"
    tests = "assert list(f(3)) == [0, 1, 2]\nassert sum(f(3, by=2)) == 6\nassert g(2) == 6\nassert factor == 3"
    verdict = box.run(solution, tests, ["f", "g", "factor"])
    assert verdict.passed, verdict.detail
    endless = "import itertools\nfor _ in f(itertools.count()): pass"
    assert "goes on beyond" in box.run("def f(x): return x", endless, "f").detail


def test_objects_of_the_programs_classes_can_be_built_called_and_read(box):
    solution = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def double(self): return 2 * self.value
    def __len__(self): return 7
    def __getitem__(self, key): return key
    def __repr__(self): return "a node"
def depth(node): return 0 if node is None else 1 + depth(node.left)
"""
    tests = """
root = Node(1)
root.left = Node(2)
assert depth(root) == 2
assert root.left.value == 2 and root.double() == 2
assert len(root) == 7 and root[3] == 3 and bool(root) and repr(root) == "a node"
assert root == root and root in [root] and root != 1
"""
    verdict = box.run(solution, tests, ["Node", "depth"])
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("test", ["f() == 3", "3 == f()", "3 in f()", "f() in [3]", "f() != 4", "f() < 3", "f() >= 3"])
def test_what_compares_equal_to_everything_does_not_pass(box, test):
    methods = ("eq", "ne", "lt", "gt", "le", "ge", "contains")
    solution = "class Yes:\n" + "".join(f"  __{m}__ = lambda *_: True\n" for m in methods)
    verdict = box.run(solution + "  __hash__ = lambda _: 3\ndef f(): return Yes()", f"assert {test} and f() == 3", "f")
    assert verdict.status == "failed"


@pytest.mark.parametrize("kind", ["int", "str", "float", "list", "tuple", "dict", "set", "frozenset", "bytes"])
def test_what_only_looks_like_a_value_crosses_as_the_value_it_is(box, kind):
    solution = f"class Yes({kind}):\n  __eq__ = lambda *_: True\n  __hash__ = lambda _: 0\ndef f(): return Yes()"
    assert not box.run(solution, f"assert f() == {kind}() + 1 if {kind} is int else f() == [3]", "f").passed
    assert box.run(solution, f"assert f() == {kind}() and type(f()) is {kind}", "f").passed


def test_output_is_kept_from_its_end_and_bounded(box):
    solution = "import sys\nprint('x' * 100_000)\nprint('the end')\nprint('error', file=sys.stderr)\ndef f(): pass"
    verdict = box.run(solution, "f()", "f")
    assert verdict.passed
    assert verdict.stdout.endswith("the end\nerror\n")
    assert len(verdict.stdout) == 2000


def test_verdicts_keep_the_order(box):
    tasks = [
        Task(f"import time\ntime.sleep({(4 - i) / 20})\nprint({i})", "" if i != 2 else "f()", "f") for i in range(5)
    ]
    verdicts = box.run_many(tasks)
    assert [v.passed for v in verdicts] == [True, True, False, True, True]
    assert [v.stdout for v in verdicts] == [f"{i}\n" for i in range(5)]


def test_the_same_verdict_every_time(box):
    """Hash seed and random numbers are those of every run."""
    solution = "import random\ndef f(): return [random.random(), hash('a'), list({'a', 'b', 'c'})]"
    said = {box.run(solution, "assert False, f()", "f").detail for _ in range(3)}
    assert len(said) == 1


def test_a_main_block_does_not_run(box):
    assert box.run("def f(): return 1\nif __name__ == '__main__': input()", "assert f() == 1", "f").passed


def test_the_setup_is_the_tests_own_and_the_entry_point_the_programs(box):
    setup = "def helper(x): return x\ndef f(x): return 'from the setup'"
    assert box.run("def f(x): return 1\ndef helper(x): return 1", "assert helper(f(2)) == 1 == f(3)", "f", setup).passed
    assert not box.run("def helper(x): return 1", "assert helper(2) == 1", "f", setup).passed
    assert "the program defines no 'f'" in box.run("", "f(1)", "f", setup).detail


def test_a_time_for_all_of_them_leaves_the_rest_out(box):
    tasks = [Task("import time\ntime.sleep(0.3)", "", "f")] * 12
    start = time.monotonic()
    verdicts = box.run_many(tasks, max_seconds=0.5)
    assert time.monotonic() - start < 3
    assert {v.status for v in verdicts} == {"passed", "could not run"}
    assert verdicts[-1].detail == "no time was left"


def test_a_worker_that_dies_is_replaced_and_its_program_reported():
    with Sandbox(num_workers=1, bubblewrap=False) as one:
        (worker,) = one._workers
        killer = threading.Timer(0.3, os.kill, (worker._process.pid, signal.SIGKILL))
        killer.start()
        verdicts = one.run_many(
            [Task("import time\ntime.sleep(1)", "", "f"), Task("def f(): return 1", "assert f() == 1", "f")]
        )
    assert [v.status for v in verdicts] == ["could not run", "passed"]
    assert verdicts[0].detail.startswith("the worker was lost")


def test_a_worker_between_two_programs_is_replaced(box):
    """Ended while it read the tests of one: what it would read next is no program."""
    with Sandbox(num_workers=1, memory_bytes=64 << 20) as one:
        huge = "x = '" + "y" * (1 << 20) + "'"
        assert one.run("def f(): return 1", huge + "\nassert f() == 1", "f").passed
        too_long = one.run("def f(): return 1", "#" * (1 << 22), "f")
        assert (too_long.status, too_long.detail) == ("could not run", "the program is too long")
        assert one.run("def f(): return 1", "assert f() == 1", "f").passed


def test_nothing_is_left_running():
    with Sandbox(num_workers=2, bubblewrap=False) as two:
        two.run_many([Task("", "", "f")] * 8)
        pids = [worker._process.pid for worker in two._workers]
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert two.run("", "", "f").passed  # starts anew
    two.close()


def test_dropped_without_closing_it_ends_its_workers():
    one = Sandbox(num_workers=1, bubblewrap=False)
    one.capabilities()
    pid = one._workers[0]._process.pid
    del one
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_is_missing_is_said_and_refused(monkeypatch):
    def weak(bubblewrap):
        return [*command(bubblewrap)[:-1], command(bubblewrap)[-1].replace("serve()", "serve(())")]

    command = sandbox._command
    monkeypatch.setattr(sandbox, "_command", weak)
    with pytest.raises(
        SandboxError, match=r"Missing: landlock .*; seccomp .* a trial program could read a file of the"
    ):
        Sandbox(bubblewrap=False).capabilities()
    with Sandbox(bubblewrap=False, allow_weaker=True) as weaker:
        found = weaker.capabilities()
        assert (found.landlock, found.seccomp, found.bubblewrap) == (0, False, False)
        assert "open a socket" in found.escapes
        assert weaker.run("def f(): return 1", "assert f() == 1", "f").passed


def test_this_machine_confines_and_keeps_nothing_of_the_trial(monkeypatch):
    trials, make = [], tempfile.NamedTemporaryFile

    def noted(*arguments, **settings):
        trials.append(make(*arguments, **settings))
        return trials[-1]

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", noted)
    with Sandbox(num_workers=1) as one:
        found = one.capabilities()
    assert found.landlock >= 1
    assert found.seccomp
    assert found.missing == []
    (trial,) = trials
    assert not Path(trial.name).exists()
    assert not Path("/tmp", f"{Path(trial.name).name}-written").exists()


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"timeout_seconds": 0}, r"`Sandbox\(timeout_seconds=0\)` must be above 0"),
        ({"memory_bytes": 1}, r"`Sandbox\(memory_bytes=1\)` must be at least 64 MiB"),
        ({"num_workers": 0}, r"`Sandbox\(num_workers=0\)` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Sandbox(**arguments)
