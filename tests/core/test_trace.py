import json
import time
from itertools import pairwise

import pytest

from forge_lightning.core.trace import VERSION, TraceWriter, read_rows


@pytest.fixture
def writer():
    """Makes writers, and closes them in the end."""
    made = []

    def make(path, keep_until=0, earlier=None, max_rows=100_000, written=0):
        made.append(TraceWriter(path, keep_until, earlier, {"module": "Test"}, max_rows, written))
        return made[-1]

    yield make
    for trace in made:
        trace.close()


def steps(path):
    return [row["step"] for row in read_rows(path) if row["kind"] == "step"]


def row(step):
    return {"kind": "step", "step": step, "metrics": {"loss": 1.0}}


def test_rows_are_on_disk_within_a_second_or_when_flushed(tmp_path, writer, monkeypatch):
    trace = writer(tmp_path / "trace.jsonl")
    trace.write(row(0))
    assert steps(tmp_path / "trace.jsonl") == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
    trace.write(row(1))
    assert steps(tmp_path / "trace.jsonl") == [0, 1]
    trace.write(row(2))
    trace.flush()
    assert steps(tmp_path / "trace.jsonl") == [0, 1, 2]


def test_the_first_row_says_what_the_trace_is(tmp_path, writer):
    trace = writer(tmp_path / "trace.jsonl")
    trace.write(row(1))
    trace.flush()
    header, first = read_rows(tmp_path / "trace.jsonl")
    assert (header["version"], header["module"], first) == (VERSION, "Test", row(1))


def test_a_cut_last_row_is_passed_over_and_replaced(tmp_path, writer):
    path = tmp_path / "trace.jsonl"
    trace = writer(path)
    for step in range(1, 4):
        trace.write(row(step))
    trace.flush()
    path.write_text(path.read_text()[:-9])
    assert steps(path) == [1, 2]
    again = writer(path, keep_until=1, earlier=path)
    again.write(row(2))
    again.flush()
    assert steps(path) == [1, 2]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_trace_continues_in_another_folder_without_the_rows_that_will_come_again(tmp_path, writer):
    first = writer(tmp_path / "a" / "trace.jsonl")
    for step in range(1, 6):
        first.write(row(step))
    first.flush()
    second = writer(tmp_path / "b" / "trace.jsonl", keep_until=3, earlier=tmp_path / "a" / "trace.jsonl")
    second.write(row(4))
    second.flush()
    assert steps(tmp_path / "b" / "trace.jsonl") == [1, 2, 3, 4]
    assert steps(tmp_path / "a" / "trace.jsonl") == [1, 2, 3, 4, 5]


def test_a_new_run_starts_a_new_trace(tmp_path, writer):
    path = tmp_path / "trace.jsonl"
    first = writer(path)
    first.write(row(1))
    first.flush()
    writer(path, keep_until=0, earlier=path)
    assert steps(path) == []


def test_rows_are_thinned_to_the_logarithm_of_the_steps(tmp_path, writer):
    """100 rows at most for each doubling: 100 · log2(2000 / 100 + 1) is 440."""
    trace = writer(tmp_path / "trace.jsonl", max_rows=100)
    for step in range(2000):
        trace.write_plain(row(step))
    trace.flush()
    kept = steps(tmp_path / "trace.jsonl")
    assert kept[:100] == list(range(100))
    assert len(kept) < 450
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) == 16
    resumed = writer(tmp_path / "trace.jsonl", 1999, tmp_path / "trace.jsonl", 100, trace.offered)
    for step in range(2000, 2100):
        resumed.write_plain(row(step))
    resumed.flush()
    assert len(steps(tmp_path / "trace.jsonl")) <= len(kept) + 8


def test_numbers_that_are_not_finite_stay_readable_json(tmp_path, writer):
    trace = writer(tmp_path / "trace.jsonl")
    trace.write({"kind": "step", "step": 1, "metrics": {"loss": float("nan"), "norm": float("inf")}})
    trace.flush()
    assert "NaN" not in (tmp_path / "trace.jsonl").read_text()
    *_, last = read_rows(tmp_path / "trace.jsonl")
    assert [float(v) for v in last["metrics"].values()][1] == float("inf")


def test_no_file_is_no_rows(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []


def test_a_full_disk_ends_the_trace_and_is_told_once(tmp_path):
    told = []
    trace = TraceWriter(tmp_path / "trace.jsonl", 0, None, {}, 100, on_failure=told.append)
    trace.write(row(1))
    trace.flush()
    trace._file.close()
    with open("/dev/full", "ab", buffering=0) as full:
        trace._file = full
        for step in range(2, 5):
            trace.write(row(step))
            trace.flush()
        trace.close()
    assert [type(error) for error in told] == [OSError]
    assert "space" in str(told[0])
    assert steps(tmp_path / "trace.jsonl") == [1]
