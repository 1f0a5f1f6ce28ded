"""DreamAugmenter: variants of programming problems, each checked by running it."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from forge_lightning.dream.code_augmentation import AUGMENTATIONS, CodeExample, Material, Variant

Run = Callable[[Sequence[CodeExample]], Sequence[Any]]
"""Runs programs on their tests in a sandbox. Returns for each an object with ``status`` and ``stdout``."""


class DreamAugmenter:
    """Makes variants of programming problems, and keeps those that pass when they are run.

    Kinds, and what each changes: ``rename_variables`` (target), ``rename_entry_point`` (prompt, target, tests),
    ``flip_comparisons``, ``swap_branches``, ``loops_to_while``, ``api_equivalents`` (target), ``restyle`` (layout of
    the target, and the prompt that asks for it), ``tighten_specification`` (one more assertion in prompt and tests,
    which the target meets), ``repair`` (a wrong program in the prompt; its tests fail before and pass after),
    ``shift_context`` (prompt). More with `register_augmentation`. A variant counts only if its program passes its
    tests, and what must fail fails. A variant that equals the original does not count.

    Args:
        kinds: Names of the kinds to make. Default: all registered kinds.
        per_problem: Variants of a problem at most, of different kinds.

    Raises:
        ValueError: If a kind does not exist, or an argument is out of range.
    """

    def __init__(self, kinds: Sequence[str] | None = None, per_problem: int = 1) -> None:
        unknown = [kind for kind in kinds or () if kind not in AUGMENTATIONS]
        if unknown or (kinds is not None and not kinds):
            raise ValueError(f"`DreamAugmenter(kinds={kinds!r})` must be of {sorted(AUGMENTATIONS)}.")
        if per_problem < 1:
            raise ValueError(f"`DreamAugmenter(per_problem={per_problem})` must be at least 1.")
        self.kinds = None if kinds is None else list(kinds)
        self.per_problem = per_problem
        self.tried: dict[str, int] = {}
        """Number of problems that variants were made for, by kind."""
        self.kept: dict[str, int] = {}
        """Number of problems for which one of them passed, by kind."""

    @property
    def success_rate(self) -> float:
        """Share of the variants that passed; NaN before the first."""
        tried = sum(self.tried.values())
        return sum(self.kept.values()) / tried if tried else float("nan")

    def augment(
        self, examples: Sequence[CodeExample], run: Run, seed: int, others: Sequence[CodeExample] = ()
    ) -> list[list[Variant]]:
        """Variants of each example that pass.

        Args:
            examples: Problems with right answers.
            run: Runs programs. Never without a sandbox, as mutants do whatever they do: with a `Sandbox`, ``lambda
                examples: sandbox.run_many([Task(e.program, e.tests, e.entry_point, e.setup) for e in examples])``.
            seed: Random seed for all choices.
            others: Problems that may be put in front of another one.

        Returns:
            Up to ``per_problem`` of each.
        """

        def evaluate(example: CodeExample, expressions: Sequence[str]) -> list[str | None]:
            return _evaluated(run, example, expressions)

        made: list[list[list[Variant]]] = []
        for number, example in enumerate(examples):
            rng = random.Random(f"{seed}/{number}")
            material = Material(rng, others or examples, evaluate)
            kinds = list(AUGMENTATIONS if self.kinds is None else self.kinds)
            rng.shuffle(kinds)
            made.append([])
            for kind in kinds:
                try:
                    candidates: Any = AUGMENTATIONS[kind].make(example, material)
                except (SyntaxError, ValueError, RecursionError):  # what parses need not compile, nor be written back
                    self.tried[kind] = self.tried.get(kind, 0) + 1
                    continue
                found = [variant for variant in _checked(kind, candidates, example) if _differs(variant, example)]
                if found:
                    made[-1].append(found)
                if len(made[-1]) == self.per_problem:
                    break
        return self._holding(made, run)

    def _holding(self, made: list[list[list[Variant]]], run: Run) -> list[list[Variant]]:
        """The first candidate of each group that passes."""
        flat = [variant for groups in made for group in groups for variant in group]
        wrong = [(i, variant) for i, variant in enumerate(flat) if variant.must_fail is not None]
        verdicts = run(
            [*(variant.example for variant in flat), *(_with_program(variant) for _, variant in wrong)] if flat else []
        )
        holds = [verdict.status == "passed" for verdict in verdicts[: len(flat)]]
        for (i, _), verdict in zip(wrong, verdicts[len(flat) :], strict=True):
            holds[i] &= verdict.status == "failed"  # not by running out of time, which another machine might not
        results: list[list[Variant]] = []
        at = 0
        for groups in made:
            results.append([])
            for group in groups:
                held = [variant for variant, ok in zip(group, holds[at : at + len(group)], strict=True) if ok]
                at += len(group)
                kind = group[0].kind
                self.tried[kind] = self.tried.get(kind, 0) + 1
                self.kept[kind] = self.kept.get(kind, 0) + bool(held)
                results[-1] += held[:1]
        return results

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The counts."""
        return {"tried": dict(self.tried), "kept": dict(self.kept)}

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        """Restore from `state_dict`."""
        self.tried, self.kept = dict(state_dict["tried"]), dict(state_dict["kept"])


def _checked(kind: str, candidates: Any, example: CodeExample) -> Sequence[Variant]:
    """Candidates of a transformation that change only what its kind may change."""
    if not isinstance(candidates, list | tuple) or not all(isinstance(variant, Variant) for variant in candidates):
        raise TypeError(f"The augmentation {kind!r} must return a list of `Variant`, and returned {candidates!r:.80}.")
    parts = {"prompt": "prompt", "target": "solution", "tests": "tests"}
    may = AUGMENTATIONS[kind].changes | ({"prompt"} if example.before else set())  # there it is the program's beginning
    for variant in candidates:
        changed = {part for part, name in parts.items() if getattr(variant.example, name) != getattr(example, name)}
        if not changed <= may:
            raise ValueError(
                f"The augmentation {kind!r} was registered to change {sorted(AUGMENTATIONS[kind].changes)}, and changed"
                f" {sorted(changed)}."
            )
    return candidates


def _differs(variant: Variant, example: CodeExample) -> bool:
    new = variant.example
    return (new.prompt, new.solution, new.tests) != (example.prompt, example.solution, example.tests)


def _with_program(variant: Variant) -> CodeExample:
    example = variant.example
    assert variant.must_fail is not None
    return CodeExample(example.prompt, variant.must_fail, "", example.tests, example.entry_point, example.setup)


def _evaluated(run: Run, example: CodeExample, expressions: Sequence[str]) -> list[str | None]:
    """Values of expressions after a program. Each has its own run, so that one failure does not affect the others."""
    printing = [
        CodeExample("", f"{example.program}\nprint({_MARK!r} + repr({expression}))", "", "pass", (), example.setup)
        for expression in expressions
    ]
    values: list[str | None] = []
    for verdict in run(printing):
        _, mark, value = verdict.stdout.rpartition(_MARK)
        values.append(value.strip() if verdict.status == "passed" and mark else None)
    return values


_MARK = "the value is "
