"""Programming problems with tests: MBPP to train on, HumanEval to be measured on."""

import ast
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from forge_lightning.core.extras import require_extra
from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.core.tokens import pad_id
from forge_lightning.data.records import read_jsonl
from forge_lightning.data.tokens import Example, ExampleDataset, TokenDataModule, encode_example
from forge_lightning.edge.complexity import ast_complexity, lempel_ziv_complexity, mean_rank, shannon_entropy
from forge_lightning.edge.sampler import DifficultySampler
from forge_lightning.sandbox import Task

Benchmark = Literal["mbpp", "humaneval"]

MBPP_SPLITS = {"train": range(601, 975), "val": range(511, 601), "test": range(11, 511)}
"""MBPP's conventional split by ``task_id``; 1 to 10 are for few-shot prompts. Austin et al., 2021, arXiv 2108.07732."""

MBPP_PROMPT = '"""\n{text}\n{tests}\n"""\n'
"""The task and the tests that the program must pass, as a docstring."""

_FIELDS: dict[Benchmark, dict[str, type]] = {
    "mbpp": {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
    "humaneval": {"task_id": str, "prompt": str, "entry_point": str, "canonical_solution": str, "test": str},
}
_HUB: dict[Benchmark, tuple[str, ...]] = {
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "humaneval": ("openai/openai_humaneval",),
}
_VARIABLE = {"mbpp": "FORGE_MBPP", "humaneval": "FORGE_HUMANEVAL"}


@dataclass(frozen=True)
class Problem:
    """A prompt, a right answer, and the tests that tell one.

    Args:
        task_id: Number or name in its benchmark.
        prompt: What the model continues.
        solution: The reference completion.
        before: Program text that goes in front of a completion.
        tests: Statements that fail where the completion is wrong.
        entry_point: Names of the completion's that the tests use.
        setup: Statements that the tests need before: imports and helpers.
        stops: Texts that end a completion of a model that does not stop by itself.
    """

    task_id: str
    prompt: str
    solution: str
    before: str
    tests: str
    entry_point: tuple[str, ...]
    setup: str = ""
    stops: tuple[str, ...] = ()

    def task(self, completion: str) -> Task:
        """What a `Sandbox` runs. A problem without tests is solved by no program."""
        ends = [end for stop in self.stops if (end := completion.find(stop)) >= 0]
        solution = f"{self.before}{completion[: min(ends, default=None)]}\n"
        tests = self.tests if self.has_tests else "raise AssertionError('the problem has no tests')"
        return Task(solution, tests, self.entry_point, self.setup)

    @property
    def has_tests(self) -> bool:
        """Whether there is a statement that a wrong program could fail."""
        lines = (line.strip() for line in self.tests.splitlines())
        return any(line and not line.startswith("#") for line in lines)


def mbpp_problem(record: dict[str, Any], template: str = MBPP_PROMPT) -> Problem:
    """A record of MBPP, its line ends made Unix's."""
    tests = "\n".join(record["test_list"]).replace("\r", "")
    prompt = template.format(text=record["text"].strip(), tests=tests)
    if tests.strip():  # a setup alone is no test
        tests = f"{record['test_setup_code']}\n{tests}".replace("\r", "")
    code = record["code"].replace("\r", "")
    entry_point, imports = _used_by(tests, code)
    return Problem(str(record["task_id"]), prompt, code, "", tests, entry_point, imports, ('\n"""', "\nassert "))


def _used_by(tests: str, solution: str) -> tuple[tuple[str, ...], str]:
    """What tests use of a solution: names that it defines, and its imports, which the tests can make themselves."""
    used = {node.id for node in ast.walk(_parsed(tests)) if isinstance(node, ast.Name)}
    defined: list[str] = []
    imports: list[str] = []
    for statement in _parsed(solution).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            if used & {(alias.asname or alias.name).split(".")[0] for alias in statement.names}:
                imports.append(ast.unparse(statement))
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.append(statement.name)
        else:
            defined += [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return tuple(name for name in dict.fromkeys(defined) if name in used), "\n".join(imports)


def _parsed(source: str) -> ast.Module:
    """The syntax tree; empty for text that is no Python, which will fail where it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def humaneval_problem(record: dict[str, Any]) -> Problem:
    """A record of HumanEval, with the stop texts of its authors."""
    prompt, entry_point = record["prompt"], record["entry_point"]
    tests = f"{record['test']}\ncheck({entry_point})"
    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    helpers = f"{prompt.rstrip()}\n    pass\n"  # the prompt's, which are the tests' own
    helpers = helpers if _parsed(helpers).body else ""
    solution = record["canonical_solution"]
    return Problem(record["task_id"], prompt, solution, prompt, tests, (entry_point,), helpers, stops)


class CodeTasks(TokenDataModule):
    """MBPP, split by task number as its authors do, or HumanEval, which is for evaluation only.

    Batches are ``{"input_ids", "attention_mask", "labels": (B, T), "sample_id": (B,)}``; the loss is on the completion
    only. `CodeEvaluation` runs the tests of the problems in ``problems("val")`` and ``problems("test")``.

    Args:
        dataset: "mbpp" or "humaneval".
        path: Its ``.jsonl`` or ``.jsonl.gz`` file. Default: the environment variable ``FORGE_MBPP`` or
            ``FORGE_HUMANEVAL``, else the Hugging Face hub.
        generated: Where neither ``path`` nor the variable names MBPP's file, small generated functions take its place,
            with a warning: for trying things out offline.
        test_dataset: Another benchmark for ``forge-fit test``. Default: ``dataset``.
        test_path: Its file, as ``path``.
        tokenizer: Hub name or local folder of a Hugging Face tokenizer, or "bytes" (one token a byte, no file needed).
            "auto": that of the model's ``pretrained``, else "bytes".
        batch_size: Examples a batch and process.
        max_length: Longest example in tokens, at least 8. Longer ones are left out, with a warning that counts them.
        prompt_template: MBPP's prompt, with ``{text}`` and ``{tests}``.
        difficulty: How hard training problems are, for `EdgeController` to choose by: a numeric field of the file;
            "tokens", "entropy", "lempel_ziv", "nodes", "depth", "cyclomatic" or "nesting" of the reference program;
            "complexity" (all of these: combined by rank, and each a feature of policy "item"); or "learned". Default:
            training problems come in a seeded shuffle, and nothing can choose.
        seed: Seed of the order of training examples.
        num_workers: Loader processes.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If training on HumanEval is asked for, or the data cannot be had.
        DataFileError: If the file is malformed.
    """

    def __init__(
        self,
        dataset: Benchmark = "mbpp",
        path: str | None = None,
        generated: bool = False,
        test_dataset: Benchmark | None = None,
        test_path: str | None = None,
        tokenizer: str = "auto",
        batch_size: int = 8,
        max_length: int = 1024,
        prompt_template: str = MBPP_PROMPT,
        difficulty: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        if max_length < 8:
            raise ValueError(f"`CodeTasks(max_length={max_length})` must be at least 8.")
        if "{text}" not in prompt_template or "{tests}" not in prompt_template:
            raise ValueError(f"`CodeTasks(prompt_template={prompt_template!r})` must hold {{text}} and {{tests}}.")
        try:
            prompt_template.format(text="", tests="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"`CodeTasks(prompt_template={prompt_template!r})` has other braces than {{text}} and {{tests}}"
                f" ({error}). Write a brace of the text itself twice: '{{{{' and '}}}}'."
            ) from None
        for argument, name in (("dataset", dataset), ("test_dataset", test_dataset or dataset)):
            if name not in get_args(Benchmark):
                raise ValueError(f"`CodeTasks({argument}={name!r})` must be one of {list(get_args(Benchmark))}.")
        self.dataset = dataset
        self.path = path
        self.generated = generated
        self.test_dataset = test_dataset or dataset
        self.test_path = test_path if test_dataset else test_path or path
        self.max_length = max_length
        self.prompt_template = prompt_template
        self.difficulty_by = difficulty
        self._difficulty: Tensor | None = None
        self._records: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
        self._kept: dict[str, list[int]] = {}
        self._by_id: dict[int, Problem] = {}

    @property
    def offers_choice(self) -> bool:
        """Whether an `EdgeController` can choose training examples."""
        return self.difficulty_by is not None

    def file_of(self, split: str) -> tuple[str, str] | None:
        """Setting or environment variable, and the file that it names; ``None`` for data of the hub, or generated."""
        setting, dataset, path = self._source(split)
        file = _file(dataset, path)
        return None if file is None else (_VARIABLE[dataset] if path is None else f"--data.{setting}", file)

    def from_hub(self, split: str) -> str | None:
        """For data that comes from the hub, what could name a file instead; ``None`` for other data."""
        setting, dataset, path = self._source(split)
        generated = self.generated and dataset == "mbpp"
        return None if generated or _file(dataset, path) else f"`--data.{setting}` nor {_VARIABLE[dataset]}"

    def load(self, split: str) -> None:
        """Read the file of a split, or fetch it from the hub; nothing where a subclass has problems of its own.

        Raises:
            MisconfigurationException: If the hub cannot be reached.
            DataFileError: If the file is malformed.
        """
        kind = type(self)
        if kind.problems is CodeTasks.problems and kind._problems is CodeTasks._problems:
            _, dataset, path = self._source(split)
            self._records_of(dataset, path)

    def _source(self, split: str) -> tuple[str, Benchmark, str | None]:
        if split != "test":
            return "path", self.dataset, self.path
        own = (self.test_dataset, self.test_path) != (self.dataset, self.path)
        return ("test_path" if own else "path"), self.test_dataset, self.test_path

    def refuse_training(self) -> None:
        """Raise if this data must not be trained on."""
        if self.dataset == "humaneval":
            raise MisconfigurationException(
                "`CodeTasks(dataset='humaneval')` cannot be trained on: HumanEval is the yardstick, and a model that"
                " saw it can no longer be measured by it. Train on dataset='mbpp', and measure with"
                " test_dataset='humaneval'."
            )

    def problems(self, split: str) -> list[Problem]:
        """The problems of "train", "val" or "test". HumanEval has no split: "val" and "test" are all of it.

        Of "train", once set up, those that are trained on: the ``i``-th is example ``i`` of the data set.
        """
        problems = self._problems(split)
        return [problems[i] for i in self._kept[split]] if split == "train" and split in self._kept else problems

    def problem_of(self, row: Mapping[str, Tensor]) -> Problem | None:
        """The problem that a training row was made of, by its ``sample_id``; ``None`` for one without tests."""
        if not self._by_id:
            self._by_id = {i: problem for i, problem in enumerate(self._problems("train")) if problem.has_tests}
        return self._by_id.get(int(row["sample_id"]))

    def row_of(self, prompt: str, completion: str) -> dict[str, Tensor] | None:
        """A row of a batch, ``(1, T)`` each, without ``sample_id``; ``None`` if longer than ``max_length``."""
        row = self._row_of(prompt, completion)
        return row if row["input_ids"].shape[1] <= self.max_length else None

    def _problems(self, split: str) -> list[Problem]:
        _, dataset, path = self._source(split)
        records = self._records_of(dataset, path)
        if dataset == "humaneval":
            return [humaneval_problem(record) for record in records]
        chosen = self._of_split(records, split)
        if not chosen:
            wanted = MBPP_SPLITS[split]
            raise MisconfigurationException(
                f"`CodeTasks(path={path!r})` has no problem of the {split} split, task_id {wanted[0]} to {wanted[-1]}."
            )
        return [mbpp_problem(record, self.prompt_template) for record in chosen]

    def _records_of(self, dataset: Benchmark, path: str | None) -> list[dict[str, Any]]:
        key = (dataset, path)
        if key not in self._records:
            missing = dataset == "mbpp" and _file(dataset, path) is None
            self._records[key] = generated_records() if self.generated and missing else _load(dataset, path)
        return self._records[key]

    def _of_split(self, records: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
        return [record for record in records if record["task_id"] in MBPP_SPLITS[split]]

    @property
    def difficulty(self) -> Tensor | None:
        """What predicts how hard each training problem is, ``(N, F)``; ``None`` where it is to be learned."""
        return self._difficulty

    def _sampler(self, dataset: ExampleDataset) -> DifficultySampler | None:
        if self.difficulty_by is None:
            return None
        order = None
        if self.difficulty_by != "learned":
            self._difficulty = self._measure(dataset)
            order = mean_rank(self._difficulty) if self._difficulty.shape[1] > 1 else self._difficulty[:, 0]
        try:
            return DifficultySampler(dataset, order, batch_size=self.batch_size, seed=self.seed)
        except ValueError as error:
            raise MisconfigurationException(f"`CodeTasks(difficulty={self.difficulty_by!r})`: {error}") from None

    def _measure(self, dataset: ExampleDataset) -> Tensor:
        """Complexity of the problems in the data set, whose examples are numbered by their position in the split."""
        wanted = self.difficulty_by
        assert wanted is not None
        records = self._of_split(self._records[(self.dataset, self.path)], "train")
        kept = [records[example.id] for example in dataset.examples]
        if wanted != "complexity" and wanted not in MEASURES:
            missing = [r["task_id"] for r in kept if not isinstance(r.get(wanted), int | float)]
            if missing:
                raise MisconfigurationException(
                    f"`CodeTasks(difficulty={wanted!r})` is no measure, and {len(missing)} of {len(kept)} problems"
                    f" have no number of that name (task {missing[0]} is the first). Measures: {list(MEASURES)},"
                    " 'complexity', 'learned'."
                )
            return torch.tensor([[float(record[wanted])] for record in kept], dtype=torch.float64)
        names = list(MEASURES) if wanted == "complexity" else [wanted]
        tokens = [len(example.input_ids) - example.num_prompt_tokens for example in dataset.examples]
        found = torch.tensor([_measures(r["code"], n) for r, n in zip(kept, tokens, strict=True)], dtype=torch.float64)
        found = torch.where(found.isfinite(), found, found.nanmedian(0).values)  # what cannot be parsed
        return found[:, [MEASURES.index(name) for name in names]]

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.refuse_training()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage or "", ("test",)):
            if split not in self._sets:
                self._sets[split] = self._encode(split)

    def _encode(self, split: str) -> ExampleDataset:
        encoded: list[Example] = []
        self._kept.pop(split, None)
        problems = self.problems(split)
        for number, problem in enumerate(problems):
            example = encode_example(self.tokenizer, number, problem.prompt, problem.solution)
            if len(example.input_ids) <= self.max_length:
                encoded.append(example)
        if len(encoded) < len(problems):
            dropped = len(problems) - len(encoded)
            message = (
                f"{dropped} of {len(problems)} {split} examples are longer than max_length={self.max_length} tokens"
            )
            if not encoded:
                raise MisconfigurationException(f"`CodeTasks`: {message}. Raise `max_length`.")
            rank_zero_warn(f"{message} and are left out.")
        self._kept[split] = [example.id for example in encoded]
        return ExampleDataset(encoded, pad_id(self.tokenizer))

    def test_dataloader(self) -> StatefulDataLoader:
        return self._loader("test")

    predict_dataloader = test_dataloader


MEASURES = ("tokens", "entropy", "lempel_ziv", "nodes", "depth", "cyclomatic", "nesting")
"""Measures of a reference program: see `forge_lightning.functional`."""


def _measures(code: str, tokens: int) -> list[float]:
    tree = ast_complexity(code)
    text = [float(tokens), shannon_entropy(code), lempel_ziv_complexity(code)]
    return [*text, tree.nodes, tree.depth, tree.cyclomatic, tree.nesting]


def generated_records(seed: int = 0) -> list[dict[str, Any]]:
    """Small functions in MBPP's format, 180 to train on and 30 for each of its other splits.

    Their tests are what running them gave.
    """
    rank_zero_warn("`CodeTasks(generated=True)`: FORGE_MBPP is not set, and generated functions take MBPP's place.")
    numbers = [*range(11, 41), *range(511, 541), *range(601, 781)]
    return [_generated(number, random.Random(f"{seed}/{number}")) for number in numbers]


def _generated(number: int, rng: random.Random) -> dict[str, Any]:
    """One function on a list of numbers: which count, what is done to each, and how they are put together."""
    bound, factor = rng.randint(-3, 9), rng.randint(2, 9)
    condition, which = rng.choice(
        [(f"item > {bound}", f"above {bound}"), (f"item < {bound}", f"below {bound}"), ("item % 2 == 0", "even")]
    )
    change, what = rng.choice([(f"item * {factor}", f"times {factor}"), (f"item + {factor}", f"plus {factor}")])
    start, join, how = rng.choice([("0", "total += {}", "sum"), ("[]", "total.append({})", "list")])
    name = f"{how}_{number}"
    lines = [f"def {name}(items):", f"    total = {start}", "    for item in items:", f"        if {condition}:"]
    code = "\n".join([*lines, f"            {join.format(change)}", "    return total"])
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # made of the pieces above
    inputs = [[rng.randint(-9, 9) for _ in range(rng.randint(2, 5))] for _ in range(3)]
    tests = [f"assert {name}({given}) == {namespace[name](list(given))}" for given in inputs]
    text = f"Write a function to find the {how} of the numbers of a list that are {which}, {what}."
    return {"task_id": number, "text": text, "code": code, "test_list": tests, "test_setup_code": ""}


def _file(dataset: Benchmark, path: str | None) -> str | None:
    """The file that a benchmark is read from: the one that was named, or that its environment variable names."""
    return path or os.environ.get(_VARIABLE[dataset]) or None


def _load(dataset: Benchmark, path: str | None) -> list[dict[str, Any]]:
    path = _file(dataset, path)
    if path:
        return read_jsonl(path, _FIELDS[dataset])
    require_extra("datasets", "hf", "`CodeTasks` without a file")
    from datasets import concatenate_datasets, load_dataset

    try:
        splits = load_dataset(*_HUB[dataset])
    except (OSError, ValueError) as error:
        raise MisconfigurationException(
            f"`CodeTasks(dataset={dataset!r})`: the hub cannot be reached ({str(error).splitlines()[0]}). Point `path`,"
            f" or the environment variable {_VARIABLE[dataset]}, to the benchmark's .jsonl or .jsonl.gz file."
        ) from None
    return list(concatenate_datasets(list(splits.values())))
