"""From text to batches of tokens, and the tokenizer that does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from forge_lightning.core.extras import require_extra
from forge_lightning.core.protocols import SupportsPretrained
from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.tokens import IGNORED, completion_ids, has_vocabulary, pad_id, prompt_ids


def build_tokenizer(name: str, **options: Any) -> Any:
    """A Hugging Face tokenizer by hub name or local folder, or "bytes": one token a byte, without any file.

    Args:
        name: Hub name, folder, or "bytes".
        **options: For ``AutoTokenizer.from_pretrained``, as ``revision``.

    Raises:
        MisconfigurationException: If it cannot be had, saying what can.
    """
    require_extra("transformers", "hf", "A tokenizer")
    if name == "bytes":
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer(split_special_tokens=True)  # `</s>` in a text is four bytes, not the end of it
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if not has_vocabulary(tokenizer):
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        reason = "the folder holds none" if Path(name).is_dir() else str(error).splitlines()[0]
        raise MisconfigurationException(
            f"`tokenizer={name!r}` is neither a local folder with a tokenizer nor to be had from the hub"
            f" ({reason}). Point `tokenizer` to a folder, or use 'bytes', which needs no file."
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def batch_of(rows: Sequence[tuple[int, Any, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right: ``input_ids``, ``attention_mask`` and ``labels``, ``(B, T)``; ``sample_id``, ``(B,)``.

    Args:
        rows: Number, tokens and labels of each.
        pad_token_id: Fills the shorter rows; masked out of attention and loss.
    """
    shape = (len(rows), max(len(ids) for _, ids, _ in rows))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, (_, ids, labels) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.as_tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.as_tensor(labels)
    return batch | {"sample_id": torch.tensor([number for number, _, _ in rows])}


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn.

    Args:
        id: Stays with the example through shuffling.
        input_ids: Tokens of both, and the end token.
        num_prompt_tokens: How many of them are prompt, and get no loss.
    """

    id: int
    input_ids: Sequence[int]
    num_prompt_tokens: int

    @property
    def labels(self) -> list[int]:
        """Its tokens, those of the prompt masked."""
        return [IGNORED] * self.num_prompt_tokens + list(self.input_ids[self.num_prompt_tokens :])


def encode_example(tokenizer: Any, id: int, prompt: str, completion: str) -> Example:
    """Tokens of prompt, completion and the end token; no token lies across the seam.

    Raises:
        MisconfigurationException: If the tokenizer has no end token: the model would not learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise MisconfigurationException(
            f"The tokenizer {tokenizer.name_or_path!r} has no end token (`eos_token`), and a model cannot learn where a"
            " completion ends. Set one in its tokenizer_config.json, or use another tokenizer."
        )
    start = prompt_ids(tokenizer, prompt)
    ids = [*start, *completion_ids(tokenizer, prompt, completion), tokenizer.eos_token_id]
    return Example(id, ids, len(start))


class ExampleDataset(Dataset[dict[str, Any]]):
    """Examples as batches, right-padded: ``input_ids``, ``attention_mask`` and ``labels``, ``(B, T)``; ``sample_id``.

    Args:
        examples: What to serve.
        pad_token_id: Fills the shorter rows; masked out of attention and loss.
    """

    def __init__(self, examples: Sequence[Example], pad_token_id: int) -> None:
        self.examples = examples
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.examples[index]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One batch, as long as its longest row."""
        return batch_of([(example.id, example.input_ids, example.labels) for example in examples], self.pad_token_id)


class TokenDataModule(LightningDataModule):
    """What datamodules over token examples share: a tokenizer built on first use, and loaders that resume.

    Args:
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes". "auto": that of the model's
            ``pretrained``, else "bytes".
        batch_size: Examples a batch and process, at least 1.
        seed: Seed of the order of training examples.
        num_workers: Loader processes.
    """

    def __init__(self, tokenizer: str, batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`{type(self).__name__}(batch_size={batch_size})` must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"`{type(self).__name__}(num_workers={num_workers})` must be at least 0.")
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._tokenizer: Any = None
        self._model: Any = None
        self._sets: dict[str, ExampleDataset] = {}

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, built on first use."""
        if self._tokenizer is None:
            name: str = self.tokenizer_name
            options: dict[str, Any] = {}
            if name == "auto":
                model = self._model if self.trainer is None else self.trainer.lightning_module
                found = model.pretrained_tokenizer if isinstance(model, SupportsPretrained) else None
                name, options = ("bytes", {}) if found is None else found
            self._tokenizer = build_tokenizer(name, **options)
        return self._tokenizer

    def serve(self, model: Any) -> None:
        """Name the model that this data is for, where no Trainer does, so that "auto" takes its tokenizer."""
        self._model = model

    def use(self, tokenizer: Any) -> None:
        """Take a tokenizer in place of the one that the settings name."""
        self._tokenizer = tokenizer

    def _row_of(self, prompt: str, completion: str) -> dict[str, Tensor]:
        """A row of a batch, ``(1, T)`` each, without ``sample_id``."""
        example = encode_example(self.tokenizer, 0, prompt, completion)
        row = ExampleDataset([], pad_id(self.tokenizer)).collate([example])
        del row["sample_id"]
        return row

    def _sampler(self, dataset: ExampleDataset) -> Any:
        """Draws training examples; ``None`` for a seeded shuffle."""
        return None

    def _loader(self, split: str) -> StatefulDataLoader:
        dataset = self._sets[split]
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            sampler=self._sampler(dataset) if split == "train" else None,
            num_workers=self.num_workers,
            collate_fn=dataset.collate,
        )

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> StatefulDataLoader:
        return self._loader("val")
