"""A user's own text, instructions and chats, as a language model's training data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.tokens import pad_id
from forge_lightning.core.validate import require
from forge_lightning.data.encoding import ChatEncoder, Encoder, PairEncoder, TextEncoder, encode_table
from forge_lightning.data.rows import Mixture, MixtureSampler, Row, TokenRows, TokenTable
from forge_lightning.data.sources import Source, missing_column
from forge_lightning.data.streams import RowStream, StreamLoader
from forge_lightning.data.tokens import TokenDataModule


@dataclass
class Streaming:
    """Read while training, for data that is larger than the disk or comes from the network.

    Tokens are made in the main process, and the state of the streams is in every checkpoint: a resume is exact.

    Args:
        steps_per_epoch: Batches of an epoch, after which it is validated; at least 1.
        buffer: Rows to draw from at random, at least 1. They are in the checkpoint: 4 bytes a token.
        num_val: Rows of validation data that are read, from the beginning of it; at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    steps_per_epoch: int = 1000
    buffer: int = 1000
    num_val: int = 256

    def __post_init__(self) -> None:
        for name in ("steps_per_epoch", "buffer", "num_val"):
            require("Streaming", getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class SourceData(TokenDataModule, ABC):
    """What datamodules over sources share: tables or streams of tokens, cut into rows.

    Args:
        path: One source.
        sources: In place of ``path``, one source or several.
        val_path: Validation data beside ``path``.
        val_fraction: Share that validates, of the rows of a source without validation data of its own.
        length: Tokens of a row, at most.
        packing: Rows are blocks across documents; otherwise each document by itself.
        streaming: Read while training.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, "bytes", or "auto".
        batch_size: Rows a batch and process.
        seed: Seed of the order.
        num_workers: Loader processes.
        num_proc: Processes that tokenize.
    """

    def __init__(
        self,
        path: str | None,
        sources: Sequence[Source] | None,
        val_path: str | None,
        val_fraction: float,
        length: int,
        packing: bool,
        streaming: Streaming | bool | None,
        tokenizer: str,
        batch_size: int,
        seed: int,
        num_workers: int,
        num_proc: int | None,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        check = partial(require, type(self).__name__)
        check(0 < val_fraction < 1, "val_fraction", val_fraction, "in (0, 1)")
        check(num_proc is None or num_proc >= 1, "num_proc", num_proc, "at least 1")
        check((path is None) != (not sources), "path", path, "given where there are no `sources`, and only there")
        check(path is not None or val_path is None, "val_path", val_path, "in each of the `sources`")
        self.sources = list(sources or []) if path is None else [Source(path, val_path)]
        self.path = path
        unweighted = next((source.path for source in self.sources if source.weight is None), None)
        if unweighted is not None and any(source.weight for source in self.sources):
            raise ValueError(
                f"`{type(self).__name__}(sources=...)`: all have a `weight`, or none; {unweighted} has none."
            )
        self.streaming: Streaming | None = Streaming() if streaming is True else streaming or None
        if self.streaming is not None:
            lacking = next((source.path for source in self.sources if not source.has_validation), None)
            if lacking is not None:
                raise ValueError(
                    f"`{type(self).__name__}(streaming=...)` needs validation data, of which a stream has no last part:"
                    f" {lacking} has none (`val_path` or `val_split`)."
                )
            check(num_workers == 0, "num_workers", num_workers, "0 where data is streamed")
        self.val_fraction, self.length, self.packing = val_fraction, length, packing
        self.num_proc = num_proc
        self._mixtures: dict[str, Mixture] = {}
        self._stream_loader: StreamLoader | None = None

    @property
    def offers_choice(self) -> bool:
        """Whether an `EdgeController` can choose training examples."""
        return False

    def files_of(self, split: str) -> list[tuple[str, str]]:
        """Settings and the local files or folders that they name, of "train" or "val"."""
        option = "--data.path" if self.path is not None else "--data.sources"
        if split != "train" and self.path is not None and self.sources[0].val_path is not None:
            option = "--data.val_path"
        found = [source.file_of(split) for source in self.sources]
        return [(option, file) for file in found if file is not None]

    @abstractmethod
    def encoder_of(self, source: Source) -> Encoder:
        """What makes tokens of the source's records."""

    def preflight(self) -> None:
        """Raise what can be known of the columns without reading more than the first line of a file."""
        for source in self.sources:
            encoder = self.encoder_of(source)
            path = source.file_of("train")
            columns = source.columns_of("train") if path is not None and Path(path).is_file() else None
            if columns is None:
                continue
            for usual in encoder.fields:
                name = source.columns.get(usual, usual)
                if name not in columns:
                    raise missing_column(source.path, name, usual, columns)

    def prepare_data(self) -> None:
        """Fill the caches, before the other ranks of the machine look there."""
        if self.streaming is None:
            for source in self.sources:
                for split in ("train", "val") if source.has_validation else ("train",):
                    self._table(source, split)

    def setup(self, stage: str | None = None) -> None:
        if self._mixtures:
            return
        parts: dict[str, list[Any]] = {"train": [], "val": []}
        for source in self.sources:
            if self.streaming is not None:
                parts["val"].append(self._first_rows(source, self.streaming.num_val))
                continue
            rows = TokenRows(self._table(source, "train"), self.length, self.packing)
            if source.has_validation:
                val = TokenRows(self._table(source, "val"), self.length, self.packing)
            else:
                num_val = max(1, round(self.val_fraction * len(rows)))
                rows, val = rows.part(0, max(0, len(rows) - num_val)), rows.part(max(0, len(rows) - num_val), len(rows))
            for split, found in (("train", rows), ("val", val)):
                self._refuse_short(found, source, split)
                parts[split].append(found)
        weights = None if self.sources[0].weight is None else [source.weight or 0.0 for source in self.sources]
        for split, kept in parts.items():
            if kept:
                self._mixtures[split] = Mixture(kept, weights if split == "train" else None, pad_id(self.tokenizer))

    def _refuse_short(self, rows: Any, source: Source, split: str) -> None:
        if not len(rows):
            path = source._place(split)[0]
            what = f"block of block_size={self.length} tokens" if self.packing else "row"
            raise MisconfigurationException(f"`{type(self).__name__}`: {path} is too short for a {split} {what}.")

    def _table(self, source: Source, split: str) -> TokenTable:
        encoder = self.encoder_of(source)
        records = source.open(split, encoder.fields, streaming=False)
        return TokenTable(encode_table(records, encoder, self.num_proc, source._place(split)[0]))

    def _stream(self, source: Source, split: str) -> RowStream:
        encoder = self.encoder_of(source)
        records = source.open(split, encoder.fields, streaming=True)
        return RowStream(records, encoder, self.length, self.packing, source.path)

    def _first_rows(self, source: Source, count: int) -> list[Row]:
        """The first rows of a validation stream; the whole of it on every rank, which the sampler then splits."""
        rows = [Row(i, *pair) for i, pair in zip(range(count), self._whole(source), strict=False)]
        self._refuse_short(rows, source, "val")
        return rows

    def _whole(self, source: Source) -> Any:
        stream = self._stream(source, "val")
        stream.open_for(0, 1)
        return stream.pairs(once=True)

    def train_dataloader(self) -> StatefulDataLoader | StreamLoader:
        pad = pad_id(self.tokenizer)
        if self.streaming is not None:
            if self._stream_loader is None:  # kept: with `reload_dataloaders_every_n_epochs` the Trainer asks again
                self._stream_loader = self._new_stream_loader(self.streaming, pad)
            return self._stream_loader
        mixture = self._mixtures["train"]
        return self._rows_loader(mixture, MixtureSampler(mixture, self.seed) if mixture.weights is not None else None)

    def _new_stream_loader(self, streaming: Streaming, pad: int) -> StreamLoader:
        return StreamLoader(
            [self._stream(source, "train") for source in self.sources],
            weights=[source.weight or 1.0 for source in self.sources],
            batch_size=self.batch_size,
            steps_per_epoch=streaming.steps_per_epoch,
            buffer=streaming.buffer,
            seed=self.seed,
            pad_token_id=pad,
        )

    def teardown(self, stage: str | None = None) -> None:
        """The next fit reads streams from their beginning."""
        self._stream_loader = None

    def val_dataloader(self) -> StatefulDataLoader:
        return self._rows_loader(self._mixtures["val"], None, shuffle=False)

    test_dataloader = predict_dataloader = val_dataloader

    def _rows_loader(self, mixture: Mixture, sampler: Any, shuffle: bool = True) -> StatefulDataLoader:
        return StatefulDataLoader(
            mixture,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=mixture.collate,
        )


class TextData(SourceData):
    """Documents for a language model: files, folders or data sets of the hub; the loss is on every token.

    Tokens are made once and kept in the cache of `datasets`, and are read from disk while training, however large they
    are. Batches are ``{"input_ids", "attention_mask", "labels": (B, T), "sample_id": (B,)}``.

    Args:
        path: A file (``.txt``, ``.jsonl``, ``.parquet``, ``.arrow``, ``.csv``, ``.json``; of all but plain text the
            column ``text``), a folder of them, or the name of a data set on the hub.
        val_path: Validation data. Default: the last ``val_fraction`` of the training data.
        val_fraction: Share of the rows that validates, in (0, 1), where there is no validation data.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes" (one token a byte, no file needed).
            "auto": that of the model's ``pretrained``, else "bytes".
        block_size: Tokens of a row, at least 2.
        packing: Cut documents, with an end token behind each, into blocks that begin and end anywhere; the last,
            shorter one is left out. Otherwise each row is one document, or a piece of one, and shorter ones are padded.
        streaming: Read while training, in place of a table on disk: true, or its settings.
        sources: In place of ``path``: one source or several, with splits, names of columns and weights.
        batch_size: Rows a batch and process.
        seed: Seed of the order of training rows.
        num_workers: Loader processes.
        num_proc: Processes that tokenize.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If data cannot be had, or is shorter than a block.
        DataFileError: If a file is malformed.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        tokenizer: str = "auto",
        block_size: int = 256,
        packing: bool = True,
        streaming: Streaming | bool | None = None,
        sources: list[Source] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        require("TextData", block_size >= 2, "block_size", block_size, "at least 2")
        super().__init__(
            path,
            sources,
            val_path,
            val_fraction,
            block_size,
            packing,
            streaming,
            tokenizer,
            batch_size,
            seed,
            num_workers,
            num_proc,
        )

    def encoder_of(self, source: Source) -> Encoder:
        return TextEncoder(self.tokenizer, source.columns)


class InstructionData(SourceData):
    """Prompts with completions, or chats, for fine-tuning: the loss is on the answers alone.

    Records have columns ``prompt`` and ``completion``, or ``messages``: a chat of turns with ``role`` and ``content``,
    which is written in the tokenizer's chat template. Batches are as of `TextData`.

    Args:
        path: A file (``.jsonl``, ``.parquet``, ``.arrow``, ``.csv``, ``.json``), a folder of them, or the name of a
            data set on the hub.
        val_path: Validation data. Default: the last ``val_fraction`` of the training data.
        val_fraction: Share of the rows that validates, in (0, 1), where there is no validation data.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes". "auto": that of the model's
            ``pretrained``, else "bytes".
        max_length: Longest example in tokens, at least 8. Longer ones are left out, with a warning that counts them.
        packing: Rows are blocks of ``max_length`` tokens across examples; otherwise one example each, padded.
        streaming: Read while training, in place of a table on disk: true, or its settings.
        sources: In place of ``path``: one source or several, with splits, names of columns and weights.
        batch_size: Rows a batch and process.
        seed: Seed of the order of training rows.
        num_workers: Loader processes.
        num_proc: Processes that tokenize.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If data cannot be had, a chat does not fit the template, or no example is left.
        DataFileError: If a file is malformed.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        tokenizer: str = "auto",
        max_length: int = 1024,
        packing: bool = False,
        streaming: Streaming | bool | None = None,
        sources: list[Source] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        require("InstructionData", max_length >= 8, "max_length", max_length, "at least 8")
        super().__init__(
            path,
            sources,
            val_path,
            val_fraction,
            max_length,
            packing,
            streaming,
            tokenizer,
            batch_size,
            seed,
            num_workers,
            num_proc,
        )

    def encoder_of(self, source: Source) -> Encoder:
        kind: Callable[..., Encoder] = ChatEncoder if self._is_chat(source) else PairEncoder
        return kind(self.tokenizer, source.columns, self.length)

    @property
    def is_chat(self) -> bool:
        """Whether its records are chats."""
        return self._is_chat(self.sources[0])

    def _is_chat(self, source: Source) -> bool:
        if source.columns:
            return "messages" in source.columns
        columns = source.columns_of("train")
        return columns is not None and "messages" in columns and "completion" not in columns

    def row_of(self, prompt: str, completion: str) -> dict[str, Tensor] | None:
        """A row of a batch, ``(1, T)`` each, without ``sample_id``; ``None`` if longer than ``max_length``."""
        row = self._row_of(prompt, completion)
        return row if row["input_ids"].shape[1] <= self.length else None
