"""Where text comes from: local files and folders, and data sets of the Hugging Face hub."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.core.extras import require_extra
from forge_lightning.data.records import BEGINS, ENDS, DataFileError, iterate_jsonl, iterate_text

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json"}
_OWN = (".txt", ".md", ".jsonl", ".ndjson")


@dataclass
class Source:
    """Where documents or examples come from.

    Args:
        path: A file (``.jsonl``, ``.jsonl.gz``, ``.parquet``, ``.arrow``, ``.csv``, ``.tsv``, ``.json``, or anything
            else as plain UTF-8 text), a folder of such files or of a data set that ``save_to_disk`` wrote, or the name
            of a data set on the Hugging Face hub.
        val_path: Validation data.
        name: Configuration of a data set on the hub, as in ``wikitext-2-raw-v1``.
        split: Split to train on, of a folder or of the hub. Slices are possible: ``train[:10%]``.
        val_split: Split to validate on.
        weight: How often the source is drawn beside the others, above 0. Without weights every example is drawn once.
        revision: Branch, tag or commit on the hub.
        columns: Names of the columns in this source, where they are not the usual ones: ``{text: body}``.

    Raises:
        ValueError: If ``weight`` is not above 0.
    """

    path: str
    val_path: str | None = None
    name: str | None = None
    split: str = "train"
    val_split: str | None = None
    weight: float | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)
        self.val_path = self.val_path and os.path.expanduser(self.val_path)
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"`Source(path={self.path!r}, weight={self.weight})` must be above 0, and finite.")

    @property
    def has_validation(self) -> bool:
        """Whether it names data to validate on."""
        return self.val_path is not None or self.val_split is not None

    def file_of(self, split: str) -> str | None:
        """The local file or folder that a split is read from; ``None`` on the hub. Tests are made of validation."""
        path = self._place(split)[0]
        return path if is_local(path) else None

    def open(self, split: str, fields: dict[str, type], streaming: bool) -> Any:
        """Records of a split, as a `datasets.Dataset`, or an `IterableDataset` if streamed.

        Args:
            split: "train" or "val".
            fields: Columns that are needed, by their usual names, with the type of their values.
            streaming: Read while training, in place of a cached table.

        Raises:
            MisconfigurationException: If it cannot be had, or a column is missing.
            DataFileError: If a file is malformed.
        """
        require_extra("datasets", "hf", f"Data of `path={self.path}`")
        path, part = self._place(split)
        wanted = {self.columns.get(name, name): kind for name, kind in fields.items()}
        option = "val_path" if split != "train" and self.val_path is not None else "path"
        found = _own_file(path, wanted, streaming, option) if is_local(path) else None
        if found is not None:
            found = _part_of(found, part, path)
        if found is None:
            found = self._of_datasets(path, part, streaming)
        columns = found.column_names
        missing = [name for name in wanted if columns is not None and name not in columns]
        if missing:
            raise missing_column(path, missing[0], next(iter(fields)), columns)
        return found

    def columns_of(self, split: str) -> list[str] | None:
        """Names of the columns, where they are known without reading the data."""
        path, part = self._place(split)
        if is_local(path) and _reads_itself(Path(path)):
            return _first_fields(Path(path))
        names: list[str] | None = self._of_datasets(path, part, streaming=True).column_names
        return names

    def _place(self, split: str) -> tuple[str, str]:
        """Path and split to read."""
        if split == "train" or not self.has_validation:
            return self.path, self.split
        whole = self.split.split("[")[0]  # a part of the training data says nothing of other data
        return self.val_path or self.path, self.val_split or (whole if self.val_path else "validation")

    def _of_datasets(self, path: str, part: str, streaming: bool) -> Any:
        import datasets

        place = Path(path)
        _refuse_mixed(place)
        try:
            if is_local(path):
                if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
                    found = datasets.load_from_disk(path)
                    if isinstance(found, datasets.DatasetDict):
                        name = part.split("[")[0]
                        found = _part_of(found[name], part.replace(name, "train", 1), path)
                    else:
                        found = _part_of(found, part, path)
                    return found.to_iterable_dataset() if streaming else found
                if place.is_file():
                    options = {"delimiter": "\t"} if _kind(place) == ".tsv" else {}
                    builder = _BUILDERS[_kind(place)]
                    return datasets.load_dataset(
                        builder, data_files={part.split("[")[0]: path}, split=part, streaming=streaming, **options
                    )
            return datasets.load_dataset(path, self.name, split=part, revision=self.revision, streaming=streaming)
        except DataFileError:
            raise
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
            where = f"The data of `path={path}`" + (f", split {part!r}," if part != "train" else "")
            hint = "" if is_local(path) else " It is no local file or folder, so it was looked for on the hub."
            raise MisconfigurationException(f"{where} cannot be read: {reason}.{hint}") from None


def missing_column(path: str, name: str, usual: str, columns: Iterable[str]) -> MisconfigurationException:
    """What to say of data that lacks a column."""
    known = sorted(columns)
    of_answers = {"prompt", "completion"} <= set(known) or "messages" in known
    if usual == "text" and of_answers:
        hint = "`InstructionData` reads prompts with completions, and chats."
    else:
        hint = (
            f"Say which is meant by `columns` of the source: `sources: [{{path: {path}, columns: {{{usual}:"
            f" {known[0] if known else 'NAME'}}}}}]`."
        )
    return MisconfigurationException(f"The data of `path={path}` has no column {name!r}, but {known}. {hint}")


def is_local(path: str) -> bool:
    """Whether a path means this machine, not the hub: it is there, or is spelled like a file."""
    place = Path(path)
    return (
        place.exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or place.suffix in (*_BUILDERS, *_OWN, ".gz")
    )


def refuse_absent_file(option: str, path: str) -> None:
    """Raise if a local file or folder does not exist, or the folder is empty.

    Raises:
        MisconfigurationException: As said.
    """
    place = Path(path)
    if not place.exists():
        raise MisconfigurationException(f"Cannot read the data file `{option}={path}`: no such file.")
    if place.is_dir() and not any(place.iterdir()):
        raise MisconfigurationException(f"Cannot read the data of `{option}={path}`: the folder is empty.")


def _refuse_mixed(place: Path) -> None:
    """Raise if a folder holds files of several kinds, of which `datasets` would read one and pass over the others."""
    if not place.is_dir():
        return
    names = {".jsonl": ".json", ".ndjson": ".json", ".tsv": ".csv"}
    found = {_kind(file) for file in place.rglob("*") if file.is_file() and not file.name.startswith(".")}
    kinds = {names.get(kind, kind) for kind in found if kind in (*_BUILDERS, ".jsonl", ".ndjson", ".txt")}
    internal = (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()
    if len(kinds) > 1 and not internal:
        raise MisconfigurationException(
            f"The folder `path={place}` holds files of several kinds ({', '.join(sorted(kinds))}). Give each kind a"
            " source of its own: `sources: [{path: a.jsonl}, {path: texts}]`."
        )


def _reads_itself(place: Path) -> bool:
    """Whether the file is one that this package reads: text, or JSON by lines, whose errors name the line."""
    return place.is_file() and _kind(place) not in _BUILDERS


def _kind(place: Path) -> str:
    """The suffix that says what a file holds: the last, or the one before ``.gz``."""
    suffixes = [suffix for suffix in place.suffixes if suffix != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def _is_jsonl(place: Path) -> bool:
    return _kind(place) in (".jsonl", ".ndjson")


def _part_of(found: Any, part: str, path: str) -> Any:
    """The slice of a table that a split like ``train[:50%]`` means. A file is all one split, "train"."""
    from datasets import IterableDataset, ReadInstruction

    if part == "train":
        return found
    name = part.split("[")[0]
    if name != "train":
        raise MisconfigurationException(
            f"`path={path}` has no split {name!r}: it is all one split, 'train', of which a part is `train[:90%]`. Name"
            " validation data by `val_path`."
        )
    if isinstance(found, IterableDataset):
        raise MisconfigurationException(f"`split={part}`: a stream of the file {path} has no parts. Make two files.")
    try:
        slices = ReadInstruction.from_spec(part).to_absolute({"train": len(found)})
    except (ValueError, AssertionError) as error:
        raise MisconfigurationException(f"`split={part}` of {path}: {error}") from None
    return found.select(range(slices[0].from_, slices[0].to))


def _first_fields(place: Path) -> list[str]:
    if not _is_jsonl(place):
        return ["text"]
    return sorted(next(iterate_jsonl(place, {}), {}))


def _own_file(path: str, fields: dict[str, type], streaming: bool, option: str) -> Any:
    """The records of a file that this package reads itself; ``None`` for another kind."""
    from datasets import Dataset, Features, IterableDataset, Value
    from datasets.exceptions import DatasetGenerationError

    place = Path(path)
    refuse_absent_file(option, path)
    if place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        if not files or any(file.suffix not in (".txt", ".md") for file in files):
            return None
    else:
        files = [place]
    if not place.is_dir() and not _reads_itself(place):
        return None
    if _is_jsonl(place) and list in fields.values():
        features = None  # of chats: found by `datasets`
    elif _is_jsonl(place):
        features = Features({name: Value("string") for name in fields})
    elif set(fields) != {"text"}:
        raise MisconfigurationException(f"`path={path}` is plain text, which has no column {sorted(fields)[0]!r}.")
    else:
        features = Features({"text": Value("string"), BEGINS: Value("bool"), ENDS: Value("bool")})
    read = _Records([str(file) for file in files], dict(fields))
    if streaming:
        # One shard, so that every rank takes documents, not files.
        return IterableDataset.from_generator(read, features=features)
    stamp = hashlib.blake2b(digest_size=8)
    for file in files:
        stat = file.stat()
        stamp.update(f"3 {file.resolve()} {stat.st_size} {stat.st_mtime_ns} {sorted(fields)}".encode())
    try:
        return Dataset.from_generator(read, features=features, fingerprint=stamp.hexdigest())
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataFileError | MisconfigurationException):
            raise error.__cause__ from None
        raise
    except ValueError as error:  # `datasets` says so of a generator that yields nothing
        if "empty" in str(error).lower() or "instruction" in str(error).lower():
            raise DataFileError(f"{path}: holds no record.") from None
        raise


class _Records:
    """Records of files, as a generator function that `datasets` can copy to its workers."""

    def __init__(self, files: list[str], fields: dict[str, type]) -> None:
        self.files, self.fields = files, fields

    def __call__(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            if _is_jsonl(Path(file)):
                for record in iterate_jsonl(file, self.fields, of_texts=False):
                    yield {name: record[name] for name in self.fields}
            else:
                yield from iterate_text(file)
