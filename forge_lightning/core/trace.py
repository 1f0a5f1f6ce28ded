"""The trace of a run: one JSON object a line, appended as training goes."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

VERSION = 1
FILE_NAME = "trace.jsonl"


class TraceWriter:
    """Append rows to a trace. They are handed to the system by `flush`, and by a row that comes a second later.

    The file grows with the logarithm of the number of rows: after each ``max_rows`` plain rows, only every second of
    those that would have come is kept. Rows that hold sparse values are all kept.

    Args:
        path: File to write.
        keep_until: Step that training resumes from. Rows of ``earlier`` up to it stay; later ones, which will come
            again, do not.
        earlier: Trace to continue; ``None`` starts a new one. May be ``path`` itself.
        header: What to say in the first row of a new trace.
        max_rows: Plain rows until rows are thinned out.
        written: Plain rows written before, where a trace is continued.
        num_rows: Rows of ``earlier`` that existed when the state that training resumes from was saved. Events after
            them are left out: they will be found again. Default: all.
        on_failure: Told once when the system takes no more, as a full disk does; the trace ends there.
    """

    def __init__(
        self,
        path: Path,
        keep_until: int,
        earlier: Path | None,
        header: Mapping[str, Any],
        max_rows: int,
        written: int = 0,
        num_rows: int | None = None,
        on_failure: Callable[[OSError], None] | None = None,
    ) -> None:
        self.path = path
        self._on_failure = on_failure
        self.max_rows = max_rows
        rows = []
        if earlier is not None and keep_until > 0:
            for index, row in enumerate(read_rows(earlier)):
                again = num_rows is not None and index >= num_rows and row.get("kind") == "event"
                if number(row.get("step", 0)) <= keep_until and not again:
                    rows.append(row)
        self.offered = written if rows else 0
        rows.append({"kind": "header", "version": VERSION, "step": keep_until, **header})  # also of what goes on
        self.seconds = max((number(row.get("seconds", 0.0)) for row in rows), default=0.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(_line(row) for row in rows))
        os.replace(temporary, path)
        self.num_rows = len(rows)
        self._waiting: list[Mapping[str, Any]] = []
        self._flushed = time.monotonic()
        self._file: IO[bytes] | None = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as training goes

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        if self._file is None:
            return
        self._waiting.append(row)
        self.num_rows += 1
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self) -> None:
        """Hand what was appended to the system."""
        left = memoryview("".join(map(_line, self._waiting)).encode())
        self._waiting, self._flushed = [], time.monotonic()
        if self._file is None:
            return
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            self._file = None
            if self._on_failure is not None:
                self._on_failure(error)

    def write_plain(self, row: Mapping[str, Any]) -> None:
        """Append a row that may be thinned out."""
        stride = 2 ** self._doublings()
        if self.offered % stride == 0:
            self.write(row)
        self.offered += 1

    def _doublings(self) -> int:
        """How often the stride has doubled: after ``max_rows`` rows, then after twice as many steps each time."""
        return max(0, math.floor(math.log2(self.offered / self.max_rows + 1))) if self.offered else 0

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a trace that can be read; what a kill cut off, or is no object, is passed over."""
    if not path.is_file():
        return
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def number(value: Any) -> float:
    """A number of a row; NaN if it is missing or no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _line(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, separators=(",", ":"), allow_nan=False, default=str) + "\n"
    except ValueError:
        return json.dumps(_plain(row), separators=(",", ":"), default=str) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
