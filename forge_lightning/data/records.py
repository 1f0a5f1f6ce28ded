"""Reading a user's files. They are parsed, never executed."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

_CODE = "utf-8-sig"
"""UTF-8, with or without a mark in front, as some editors write it."""
BEGINS, ENDS = "_forge_begins", "_forge_ends"
"""Columns of `iterate_text`."""


class DataFileError(ValueError):
    """A data file that does not hold what it should; the message names file, line and field."""


def read_jsonl(path: str | Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` or ``.jsonl.gz`` file, one JSON object a line; empty lines are skipped.

    Args:
        path: The file.
        fields: Fields that each record must have, with their types; a ``list`` is one of texts. Others are kept as
            they are.

    Raises:
        DataFileError: If a line is not a JSON object, or a field is missing or of another type.
        MisconfigurationException: If the file cannot be read.
    """
    records = list(iterate_jsonl(path, fields))
    if not records:
        raise DataFileError(f"{path}: holds no record.")
    return records


def iterate_jsonl(path: str | Path, fields: Mapping[str, type], of_texts: bool = True) -> Iterator[dict[str, Any]]:
    """`read_jsonl`, one record at a time; nothing is raised for a file without records.

    Args:
        path: The file.
        fields: Fields that each record must have.
        of_texts: Whether lists must hold texts.
    """
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFileError(f"{where}: not JSON: {error.msg} at column {error.colno}.") from None
        except ValueError as error:  # a number of thousands of digits
            raise DataFileError(f"{where}: {error}.") from None
        except RecursionError:
            raise DataFileError(f"{where}: nested too deeply.") from None
        if not isinstance(record, dict):
            raise DataFileError(f"{where}: must be a JSON object, but is {type(record).__name__}.")
        for field, kind in fields.items():
            if field not in record:
                raise DataFileError(f"{where}: field {field!r} is missing. The line has {sorted(record)}.")
            if not isinstance(record[field], kind):
                found = type(record[field]).__name__
                raise DataFileError(f"{where}: field {field!r} must be {kind.__name__}, but is {found}.")
            texts = record[field] if kind is list and of_texts else [record[field]] if kind is str else []
            for text in texts:
                if not isinstance(text, str):
                    raise DataFileError(
                        f"{where}: field {field!r} must be a list of texts, but holds a {type(text).__name__}."
                    )
                if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise DataFileError(
                        f"{where}: field {field!r} holds half of a character (a lone surrogate), as of an emoji that"
                        " was cut. It cannot be written as UTF-8: mend the text, or leave the record out."
                    )
        yield record


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding=_CODE) if path.suffix == ".gz" else open(path, encoding=_CODE) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataFileError(f"{path}: not a complete gzip file: {error}.") from None
    except OSError as error:
        raise MisconfigurationException(f"Cannot read the data file {path}: {error.strerror}.") from None


def iterate_text(path: str | Path, size: int = 1 << 16) -> Iterator[dict[str, Any]]:
    """The text of a file, or of a gzipped one, in pieces of whole lines, so that a large file fits into memory.

    Args:
        path: The file, one document.
        size: Characters of a piece, at least; a piece ends before a line that begins with a letter or digit.

    Yields:
        ``text``, and whether it is the first piece, `BEGINS`, and the last, `ENDS`.

    Raises:
        DataFileError: If the file is not UTF-8.
        MisconfigurationException: If it cannot be read.
    """
    piece: list[str] = []
    length, begins = 0, True
    for line in _lines(Path(path)):
        if length >= size and line[:1].isalnum():
            yield {"text": "".join(piece), BEGINS: begins, ENDS: False}
            piece, length, begins = [], 0, False
        piece.append(line)
        length += len(line)
    yield {"text": "".join(piece), BEGINS: begins, ENDS: True}
