"""Generate programs from stored ones: augmented variants, and samples of the model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from forge_lightning.dream.augmenter import DreamAugmenter, Run
from forge_lightning.dream.code_augmentation import CodeExample

Dream = tuple[int, str, str]
"""Number of the problem behind it, prompt, and completion."""


class ProgramDreams:
    """Generates programs, and counts those that passed.

    Args:
        augmenter: Makes variants; ``None`` for no variants.
        temperatures: Sampling temperatures of programs that the model writes, above 0 each.
        max_new_tokens: Tokens of such a program at most.
    """

    def __init__(self, augmenter: DreamAugmenter | None, temperatures: Sequence[float], max_new_tokens: int) -> None:
        self.augmenter, self.temperatures, self.max_new_tokens = augmenter, list(temperatures), max_new_tokens
        self.clear()

    def clear(self) -> None:
        """Reset all counts."""
        self.rounds = 0
        self.written, self.passed = 0, 0
        if self.augmenter is not None:
            self.augmenter.load_state_dict({"tried": {}, "kept": {}})

    def make(
        self,
        problems: Mapping[int, Any],
        run: Run,
        run_tasks: Callable[[Sequence[Any]], Sequence[Any]],
        complete: Callable[..., Sequence[str]] | None,
        seed: int,
    ) -> Iterator[Dream]:
        """Variants that pass, then programs of the model that pass.

        Args:
            problems: `forge_lightning.data.Problem` by number.
            run: Runs programs on their tests in a sandbox.
            run_tasks: Runs tasks, as ``problem.task(completion)`` returns them, in a sandbox.
            complete: Continues prompts; needed for ``temperatures``.
            seed: Random seed for all choices.
        """
        if not problems:
            return
        yield from self._variants(problems, run, seed)
        if complete is not None:
            yield from self._written(problems, run_tasks, complete, seed)

    def _variants(self, problems: Mapping[int, Any], run: Run, seed: int) -> Iterator[Dream]:
        if self.augmenter is None:
            return
        examples = [CodeExample.of(problem) for problem in problems.values()]
        for i, variants in zip(problems, self.augmenter.augment(examples, run, seed), strict=True):
            yield from ((i, variant.example.prompt, variant.example.solution) for variant in variants)

    def _written(
        self,
        problems: Mapping[int, Any],
        run_tasks: Callable[[Sequence[Any]], Sequence[Any]],
        complete: Callable[..., Sequence[str]],
        seed: int,
    ) -> Iterator[Dream]:
        """Programs of the model that pass and differ from the known answer."""
        prompts = [problem.prompt for problem in problems.values()]
        for temperature in self.temperatures:
            options = {"max_new_tokens": self.max_new_tokens, "temperature": temperature, "seed": seed % (1 << 31)}
            texts = complete(prompts, **options)
            tasks = [problem.task(text) for problem, text in zip(problems.values(), texts, strict=True)]
            for (i, problem), task, verdict in zip(problems.items(), tasks, run_tasks(tasks), strict=True):
                completion = task.solution[len(problem.before) :].rstrip()
                self.written += 1
                if verdict.passed and completion != problem.solution.rstrip():
                    self.passed += 1
                    yield i, problem.prompt, completion

    def counts(self) -> list[float]:
        """Numbers of variants made and passed, of programs written and passed; they can be summed over ranks."""
        tried, kept = ({}, {}) if self.augmenter is None else (self.augmenter.tried, self.augmenter.kept)
        return [*(float(sum(each.values())) for each in (tried, kept)), float(self.written), float(self.passed)]

    def metrics(self, counts: Sequence[float]) -> dict[str, float]:
        """Numbers to log from `counts`; NaN before the first program."""
        tried, kept, written, passed = counts
        found: dict[str, float] = {}
        if self.augmenter is not None:
            found |= {"augmented": kept, "yield": kept / tried if tried else math.nan}
        if self.temperatures:
            found |= {"sampled": passed, "sampled_yield": passed / written if written else math.nan}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and dicts."""
        of_augmenter = {} if self.augmenter is None else {"augmenter": self.augmenter.state_dict()}
        return {"rounds": self.rounds, "written": self.written, "passed": self.passed, **of_augmenter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict`."""
        self.rounds, self.written, self.passed = (int(state[key]) for key in ("rounds", "written", "passed"))
        if self.augmenter is not None and "augmenter" in state:
            self.augmenter.load_state_dict(state["augmenter"])
