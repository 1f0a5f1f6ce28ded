"""A user's own text, as a language model's training data."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.tokens import pad_id
from forge_lightning.data.records import read_text
from forge_lightning.data.tokens import Example, ExampleDataset, TokenDataModule


class TextData(TokenDataModule):
    """Text files, or jsonl files with a ``text`` field, cut into blocks of tokens; the loss is on every token.

    Batches are ``{"input_ids", "attention_mask", "labels": (B, T), "sample_id": (B,)}``.

    Args:
        path: Training file: ``.jsonl`` or ``.jsonl.gz`` with a field ``text``, or anything else as plain UTF-8 text.
        val_path: Validation file. Default: the last ``val_fraction`` of the training file.
        val_fraction: Share of the training file's blocks that validates, in (0, 1), where there is no ``val_path``.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes" (one token a byte, no file needed).
            "auto": that of the model's ``pretrained``, else "bytes".
        block_size: Tokens of a block, at least 2. A last, shorter piece is left out.
        batch_size: Blocks a batch and process.
        seed: Seed of the order of training blocks.
        num_workers: Loader processes.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If a file cannot be read, or is shorter than a block.
        DataFileError: If a file is malformed.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        tokenizer: str = "auto",
        block_size: int = 256,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        if not 0 < val_fraction < 1:
            raise ValueError(f"`TextData(val_fraction={val_fraction})` must be in (0, 1).")
        if block_size < 2:
            raise ValueError(f"`TextData(block_size={block_size})` must be at least 2.")
        self.path, self.val_path, self.val_fraction = path, val_path, val_fraction
        self.block_size = block_size

    @property
    def offers_choice(self) -> bool:
        """Whether an `EdgeController` can choose training examples."""
        return False

    def file_of(self, split: str) -> tuple[str, str]:
        """Setting, and the file that it names. Tests are made of validation data."""
        if split == "train" or self.val_path is None:
            return "--data.path", self.path
        return "--data.val_path", self.val_path

    def setup(self, stage: str | None = None) -> None:
        if self._sets:
            return
        train = self._blocks(self.path)
        if self.val_path is None:
            num_val = max(1, round(self.val_fraction * len(train)))
            train, val = train[:-num_val], train[-num_val:]
        else:
            val = self._blocks(self.val_path)
        for split, blocks, path in (("train", train, self.path), ("val", val, self.val_path or self.path)):
            if not blocks:
                raise MisconfigurationException(
                    f"`TextData`: {path} is too short for a {split} block of block_size={self.block_size} tokens."
                )
            self._sets[split] = ExampleDataset(blocks, pad_id(self.tokenizer))

    def _blocks(self, path: str) -> list[Example]:
        ids = self.tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
        starts = range(0, len(ids) - self.block_size + 1, self.block_size)
        return [Example(number, ids[start : start + self.block_size], 0) for number, start in enumerate(starts)]

    def test_dataloader(self) -> StatefulDataLoader:
        return self._loader("val")

    predict_dataloader = test_dataloader
