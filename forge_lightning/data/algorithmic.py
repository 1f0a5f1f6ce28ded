"""Tasks small enough to watch a model grok: modular arithmetic, permutations, parity."""

from functools import partial
from itertools import permutations
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.validate import require

Operation = Literal["add", "subtract", "multiply", "divide", "s5", "sparse_parity"]


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Rows of tokens whose last one is to be predicted, fetched a batch at a time.

    Args:
        rows: ``(N, T)``, integer; the last column is the answer.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = self.rows[indices]
        return {"input_ids": rows[:, :-1], "target": rows[:, -1]}


def _identity(batch: Any) -> Any:
    return batch


class AlgorithmicData(LightningDataModule):
    """Equations of a binary operation, or parities, split at random into training and validation. No file, no download.

    Batches are ``{"input_ids": (B, T), "target": (B,)}``. Equations read ``a op b = c`` and c is the target.

    Args:
        operation: "add", "subtract", "multiply" or "divide" modulo ``modulus`` (for the last two, b is not 0), "s5"
            (composition of permutations of five things), or "sparse_parity" (parity of the first
            ``num_relevant_bits`` of ``num_bits`` random bits).
        modulus: Modulus of the arithmetic, at least 3; a prime for "divide".
        train_fraction: Share of all examples to train on, in (0, 1). The rest validates.
        batch_size: Training examples a batch and process.
        num_bits: Length of a "sparse_parity" input.
        num_relevant_bits: Bits that count, in [1, num_bits].
        num_examples: Examples of "sparse_parity", which cannot list all inputs.
        random_labels: Shuffle the answers among the training examples: they can be memorised, and nothing generalises.
        seed: Seed of the split, of the order, and of random inputs.
        num_workers: Loader processes. 0 is the fastest for these tasks.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Power et al., `Grokking <https://arxiv.org/abs/2201.02177>`_, 2022. "multiply" with the defaults is the task of
        Lee et al., `Grokfast <https://arxiv.org/abs/2405.20233>`_, 2024: 9,312 equations, half of them to train on.
    """

    def __init__(
        self,
        operation: Operation = "multiply",
        modulus: int = 97,
        train_fraction: float = 0.5,
        batch_size: int = 512,
        num_bits: int = 40,
        num_relevant_bits: int = 3,
        num_examples: int = 2000,
        random_labels: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()

        check = partial(require, "AlgorithmicData")
        check(operation in get_args(Operation), "operation", operation, f"one of {list(get_args(Operation))}")
        check(num_workers >= 0, "num_workers", num_workers, "at least 0")
        check(modulus >= 3, "modulus", modulus, "at least 3")
        if operation == "divide":
            prime = all(modulus % d for d in range(2, int(modulus**0.5) + 1))
            check(prime, "modulus", modulus, "a prime for operation='divide', where every b needs an inverse")
        check(0 < train_fraction < 1, "train_fraction", train_fraction, "in (0, 1)")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        check(1 <= num_relevant_bits <= num_bits, "num_relevant_bits", num_relevant_bits, f"in [1, {num_bits}]")
        check(num_examples >= 2, "num_examples", num_examples, "at least 2")
        self.operation = operation
        self.modulus = modulus
        self.train_fraction = train_fraction
        self.batch_size = batch_size
        self.num_bits = num_bits
        self.num_relevant_bits = num_relevant_bits
        self.num_examples = num_examples
        self.random_labels = random_labels
        self.seed = seed
        self.num_workers = num_workers
        self._splits: tuple[TokenDataset, TokenDataset] | None = None

    @property
    def offers_choice(self) -> bool:
        """Whether an `EdgeController` can choose training examples."""
        return False

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary: values, then ``=`` and the operation."""
        return {"s5": 120, "sparse_parity": 2}.get(self.operation, self.modulus) + 2

    @property
    def seq_len(self) -> int:
        """Tokens of an example, the answer included."""
        return self.num_bits + 2 if self.operation == "sparse_parity" else 5

    def examples(self) -> Tensor:
        """All examples, ``(N, seq_len)``, before the split."""
        if self.operation == "sparse_parity":
            generator = torch.Generator().manual_seed(self.seed)
            bits = torch.randint(0, 2, (self.num_examples, self.num_bits), generator=generator)
            parity = bits[:, : self.num_relevant_bits].sum(1, keepdim=True) % 2
            return torch.cat([bits, torch.full_like(parity, 2), parity], 1)
        a, b, c = self._table()
        equals = torch.full_like(a, self.num_tokens - 2)
        return torch.stack([a, equals + 1, b, equals, c], 1)

    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.operation == "s5":
            elements = torch.tensor(list(permutations(range(5))))  # (120, 5)
            a, b = torch.cartesian_prod(torch.arange(120), torch.arange(120)).T
            composed = elements[a].gather(1, elements[b])  # a after b
            place = 5 ** torch.arange(5)
            order = torch.empty(5**5, dtype=torch.long)
            order[elements @ place] = torch.arange(120)
            return a, b, order[composed @ place]
        p = self.modulus
        first = 1 if self.operation in ("multiply", "divide") else 0
        a, b = torch.cartesian_prod(torch.arange(p), torch.arange(first, p)).T
        if self.operation == "add":
            return a, b, (a + b) % p
        if self.operation == "subtract":
            return a, b, (a - b) % p
        if self.operation == "multiply":
            return a, b, a * b % p
        return a * b % p, b, a  # every quotient once: (a * b) / b = a

    def setup(self, stage: str | None = None) -> None:
        if self._splits is not None:
            return
        rows = self.examples()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        num_train = round(self.train_fraction * len(rows))
        if not 0 < num_train < len(rows):
            raise MisconfigurationException(
                f"`AlgorithmicData(train_fraction={self.train_fraction})` leaves one side of the split empty:"
                f" there are {len(rows)} examples."
            )
        train, val = rows[order[:num_train]], rows[order[num_train:]]
        if self.random_labels:
            train[:, -1] = train[torch.randperm(num_train, generator=torch.Generator().manual_seed(self.seed)), -1]
        self._splits = TokenDataset(train), TokenDataset(val)

    def _loader(self, split: int, batch_size: int, shuffle: bool) -> StatefulDataLoader:
        assert self._splits is not None, "`setup` comes first"
        return StatefulDataLoader(
            self._splits[split],
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=_identity,
        )

    def train_dataloader(self) -> StatefulDataLoader:
        return self._loader(0, self.batch_size, shuffle=True)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._loader(1, max(4096, self.batch_size), shuffle=False)

    test_dataloader = predict_dataloader = val_dataloader
