"""Tasks made when they are asked for, as hard as they are asked for, with answers found by running them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.tokens import pad_id
from forge_lightning.core.validate import require
from forge_lightning.data.code_tasks import Problem
from forge_lightning.data.tokens import Example, ExampleDataset, TokenDataModule, encode_example
from forge_lightning.edge.sampler import DifficultySampler

Family = Literal["addition", "expression", "python"]


@dataclass(frozen=True)
class GeneratedTask:
    """A prompt, its answer, and how hard it was asked to be.

    Args:
        prompt: What the model continues.
        answer: The completion.
        family: The kind of task.
        level: How hard, at least 1.
        width: How large in the other way: see the family.
        tests: For a function, assertions that it meets.
    """

    prompt: str
    answer: str
    family: str
    level: int
    width: int = 1
    tests: str = ""


def addition(rng: random.Random, level: int, width: int = 1) -> GeneratedTask:
    """``width + 1`` numbers up to ``3 · 1.5^level``, all written from the last digit to the first, as carries go."""
    numbers = [rng.randint(0, round(3 * 1.5**level)) for _ in range(width + 1)]
    total = eval(" + ".join(map(str, numbers)))
    prompt = "+".join(str(number)[::-1] for number in numbers)
    return GeneratedTask(f"{prompt}=", str(total)[::-1], "addition", level, width)


def expression(rng: random.Random, level: int, width: int = 1) -> GeneratedTask:
    """``level`` operations on numbers of ``width`` digits, with brackets; the answer modulo 100, last digit first."""

    def build(operations: int) -> str:
        if operations == 0:
            return str(rng.randint(0 if width == 1 else 10 ** (width - 1), 10**width - 1))
        left = rng.randrange(operations)
        parts = [build(left), build(operations - 1 - left)]
        parts = [part if part.isdigit() else f"({part})" for part in parts]
        return rng.choice("+-*").join(parts)

    text = build(level)
    value = eval(text, {"__builtins__": {}})  # of digits and operators made above
    return GeneratedTask(f"{text}%100=", str(value % 100)[::-1], "expression", level, width)


def python(rng: random.Random, level: int, width: int = 1) -> GeneratedTask:
    """A function of one number in ``level`` operations with numbers of up to ``width`` digits.

    Asked for by what it gives; its tests are what it gave.
    """
    body = "x"
    for _ in range(level):
        operator, constant = rng.choice("+-*"), rng.randint(1, 10**width - 1)
        body = f"({body}) {operator} {constant}" if operator == "*" and " " in body else f"{body} {operator} {constant}"
    function = eval(f"lambda x: {body}", {"__builtins__": {}})  # of the operators made above
    tests = [f"assert f({x}) == {function(x)}" for x in (0, 1, rng.randint(2, 9), -rng.randint(1, 9))]
    prompt = "".join(f"# f({x}) = {function(x)}\n" for x in (0, 1, 2)) + "def f(x): return "
    return GeneratedTask(prompt, body, "python", level, width, "\n".join(tests))


FAMILIES: dict[str, Callable[[random.Random, int, int], GeneratedTask]] = {
    "addition": addition,
    "expression": expression,
    "python": python,
}


def _problem(name: str, task: GeneratedTask) -> Problem:
    return Problem(name, task.prompt, task.answer, task.prompt, task.tests, ("f",), stops=("\n",))


class GeneratedDataset(Dataset[Any]):
    """Tasks by ``(serial, arm)``: the same pair is the same task, everywhere and always.

    Args:
        families: Kinds of tasks.
        levels: Levels of each.
        widths: Widths of each. Arms are all combinations: ``arms`` lists family, level and width.
        tokenizer: Makes tokens of them.
        seed: Another seed makes other tasks.
    """

    def __init__(
        self, families: Sequence[str], levels: Sequence[int], widths: Sequence[int], tokenizer: Any, seed: int
    ) -> None:
        self.arms = [(family, level, width) for family in families for width in widths for level in levels]
        self.tokenizer, self.seed = tokenizer, seed
        self._batches = ExampleDataset([], pad_id(tokenizer))

    def task(self, serial: int, arm: int) -> GeneratedTask:
        """The task itself."""
        family, level, width = self.arms[arm]
        return FAMILIES[family](random.Random(f"{self.seed}/{serial}/{arm}"), level, width)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Example, int]:
        serial, arm = key
        task = self.task(serial, arm)
        return encode_example(self.tokenizer, serial, task.prompt, task.answer), arm

    def collate(self, items: Sequence[tuple[Example, int]]) -> dict[str, Tensor]:
        """One batch, with the ``level`` and the ``arm`` of each row."""
        batch = self._batches.collate([example for example, _ in items])
        arms = torch.tensor([arm for _, arm in items])
        return batch | {"arm": arms, "level": torch.tensor([self.arms[arm][1] for arm in arms.tolist()])}


class _Fixed(Dataset[Any]):
    def __init__(self, data: GeneratedDataset, each: int) -> None:
        self.data = data
        self.keys = [(-1 - i, arm) for arm in range(len(data.arms)) for i in range(each)]  # serials never trained on

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Example, int]:
        return self.data[self.keys[index]]


class GeneratedTasks(TokenDataModule):
    """Tasks of chosen difficulty without end: additions, expressions, small Python functions.

    Batches are ``{"input_ids", "attention_mask", "labels": (B, T), "sample_id", "level", "arm": (B,)}``; the loss is on
    the answer only. Answers are found by running the task. Every training example is drawn anew, and validation, the
    same number of tasks of every level, apart from them; of low levels, where there are few tasks, both have the same.
    With one family of one width `EdgeController` has levels in an order; with several, arms of a bandit.

    Args:
        families: "addition" (numbers up to ``3 · 1.5^level``), "expression" (``level`` operations), "python" (functions
            of ``level`` operations; an answer is one of many that its tests accept).
        max_level: Levels are 1 to this, at least 2.
        widths: A second way to be hard, each at least 1: one number less than "addition" adds; digits of the numbers in
            "expression" and "python". Several make arms of all combinations.
        batch_size: Examples a batch and process.
        steps_per_epoch: Batches of an epoch, over all ranks.
        num_val: Validation tasks of each level and family.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes". "auto": that of the model's
            ``pretrained``, else "bytes".
        order: Levels while nothing steers the sampler: "uniform" draws from all; "easy_to_hard" raises the level evenly
            over ``ramp_steps`` and then draws from all: the usual curriculum, to compare with.
        ramp_steps: Batches until "easy_to_hard" has reached all levels.
        seed: Seed of tasks and choices.
        num_workers: Loader processes. 0 keeps the choices fresh.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        families: Sequence[Family] = ("addition",),
        max_level: int = 8,
        widths: Sequence[int] = (1,),
        batch_size: int = 32,
        steps_per_epoch: int = 200,
        num_val: int = 64,
        tokenizer: str = "auto",
        order: Literal["uniform", "easy_to_hard"] = "uniform",
        ramp_steps: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)

        check = partial(require, "GeneratedTasks")
        check(bool(families) and set(families) <= set(FAMILIES), "families", families, f"of {list(FAMILIES)}")
        check(order in ("uniform", "easy_to_hard"), "order", order, "'uniform' or 'easy_to_hard'")
        check(max_level >= 2, "max_level", max_level, "at least 2")
        check(bool(widths) and min(widths) >= 1, "widths", widths, "at least 1 each")
        for argument, value in (("steps_per_epoch", steps_per_epoch), ("num_val", num_val), ("ramp_steps", ramp_steps)):
            check(value >= 1, argument, value, "at least 1")
        self.families, self.max_level, self.widths = list(families), max_level, list(widths)
        self.steps_per_epoch, self.num_val = steps_per_epoch, num_val
        self.order, self.ramp_steps = order, ramp_steps
        self._data: GeneratedDataset | None = None

    @property
    def offers_choice(self) -> bool:
        """Whether an `EdgeController` can choose training examples."""
        return True

    def setup(self, stage: str | None = None) -> None:
        if self._data is None:
            self._data = GeneratedDataset(
                self.families, range(1, self.max_level + 1), self.widths, self.tokenizer, self.seed
            )

    @property
    def data(self) -> GeneratedDataset:
        """The tasks, by ``(serial, arm)``."""
        self.setup()
        assert self._data is not None
        return self._data

    def problems(self, split: str) -> list[Problem]:
        """The Python functions of "train", "val" or "test", to be judged by their tests."""
        arms = [arm for arm, (family, _, _) in enumerate(self.data.arms) if family == "python"]
        first = {"train": 0, "val": -self.num_val, "test": -2 * self.num_val}[split]
        tasks = [self.data.task(first + i, arm) for arm in arms for i in range(self.num_val)]
        return [_problem(f"{t.family}/{t.level}/{i}", t) for i, t in enumerate(tasks)]

    def problem_of(self, row: Mapping[str, Tensor]) -> Problem | None:
        """The problem that a row was made of, by its ``sample_id`` and ``arm``; ``None`` of what is no program."""
        task = self.data.task(int(row["sample_id"]), int(row["arm"]))
        return _problem(f"{task.family}/{task.level}", task) if task.tests else None

    def row_of(self, prompt: str, completion: str) -> dict[str, Tensor] | None:
        """A row of a batch, ``(1, T)`` each, without ``sample_id``, ``level`` and ``arm``."""
        return self._row_of(prompt, completion)

    def train_dataloader(self) -> StatefulDataLoader:
        if getattr(self.trainer, "overfit_batches", 0):
            raise MisconfigurationException(
                "`GeneratedTasks` cannot work with `overfit_batches`: its examples are made when they are drawn, and"
                " none comes twice. Lower `max_level`, or use a data set with a length."
            )
        levels = [float(level) for _, level, _ in self.data.arms]
        ordered = len(self.families) == len(self.widths) == 1
        sampler_type = _EasyToHard if self.order == "easy_to_hard" else DifficultySampler
        sampler = sampler_type(
            self.data,
            levels=levels if ordered else range(len(levels)),
            batch_size=self.batch_size,
            num_samples=self.steps_per_epoch * self.batch_size,
            seed=self.seed,
        )
        sampler.ordered = ordered
        if isinstance(sampler, _EasyToHard):
            sampler.ramp = self.ramp_steps * self.batch_size
        return StatefulDataLoader(
            self.data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.data.collate,
        )

    def val_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(_Fixed(self.data, self.num_val), batch_size=256, collate_fn=self.data.collate)

    test_dataloader = predict_dataloader = val_dataloader


class _EasyToHard(DifficultySampler):
    """Levels up to one that rises evenly with the examples drawn, while nothing steers the sampler."""

    ramp = 1

    def _draw(self, count: int, order: list[int], begin: int) -> list[int]:
        if self.policy is not None:
            return super()._draw(count, order, begin)
        assert self.difficulty is not None
        reached = min(1.0, (self._serial + count) / self.ramp)
        top = self.difficulty.min() + reached * (self.difficulty.max() - self.difficulty.min())
        open_arms = [arm for arm, level in enumerate(self.difficulty) if level <= top]
        return [open_arms[i] for i in self._rng.integers(0, len(open_arms), count)]
