"""Other programs, prompts and tests made of a programming problem, so that they still belong together.

Everything is done on syntax trees or tokens. That a variant is right is not believed but run: see `DreamAugmenter`.
"""

import ast
import copy
import keyword
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge_lightning.dream.code_trees import (
    Counting,
    Equivalents,
    Flip,
    Renamer,
    Swap,
    Unroll,
    asserted_calls,
    attributes_of,
    camel_case,
    is_docstring,
    is_literal,
    keywords_of,
    local_names,
    mutants,
    names_elsewhere,
    parsed,
    perturbed,
    type_asserted,
    with_token,
)


@dataclass(frozen=True)
class CodeExample:
    """A programming problem with a correct answer.

    Args:
        prompt: Text that the model continues.
        solution: Completion that is correct.
        before: Program text in front of a completion, if the prompt starts the program.
        tests: Statements that fail if the program is wrong.
        entry_point: Names in the program that the tests use.
        setup: Statements that the tests need first.
    """

    prompt: str
    solution: str
    before: str
    tests: str
    entry_point: tuple[str, ...]
    setup: str = ""

    @classmethod
    def of(cls, problem: Any) -> "CodeExample":
        """Copy from any object with these attributes, such as `forge_lightning.data.Problem`."""
        parts = (problem.prompt, problem.solution, problem.before, problem.tests)
        return cls(*parts, tuple(problem.entry_point), problem.setup)

    @property
    def program(self) -> str:
        """The whole program."""
        return f"{self.before}{self.solution}\n"


@dataclass(frozen=True)
class Variant:
    """A new example, which still has to be verified.

    Args:
        kind: Name of the kind.
        example: The example; its program must pass its tests.
        must_fail: A program that the tests must catch.
    """

    kind: str
    example: CodeExample
    must_fail: str | None = None


@dataclass(frozen=True)
class Material:
    """What a transformation may use.

    Args:
        rng: Random generator.
        others: Other examples.
        evaluate: Runs a program and returns the `repr` of expressions after it; ``None`` for one that fails.
    """

    rng: random.Random
    others: Sequence[CodeExample] = ()
    evaluate: Callable[[CodeExample, Sequence[str]], list[str | None]] | None = None


Transformation = Callable[[CodeExample, Material], Sequence[Variant]]


@dataclass(frozen=True)
class Augmentation:
    """A kind of variant.

    Args:
        make: Makes candidates, the best first; empty if it does not apply.
        changes: Parts that may differ from the original: "prompt", "target", "tests".
    """

    make: Transformation
    changes: frozenset[str]


AUGMENTATIONS: dict[str, Augmentation] = {}
"""All kinds, by name. `register_augmentation` adds to them."""


def register_augmentation(name: str, changes: Iterable[str]) -> Callable[[Transformation], Transformation]:
    """Add a kind of variant, for `DreamAugmenter` to use by name.

    Args:
        name: Name of the kind. A kind of the same name is replaced.
        changes: Parts that may differ from the original: "prompt", "target", "tests". The rest must stay.

    Raises:
        ValueError: If ``changes`` names anything else.

    Example:
        >>> @register_augmentation("shout", changes=["prompt"])
        ... def shout(example, material):
        ...     return [Variant("shout", replace(example, prompt=example.prompt.upper()))]
        >>> AUGMENTATIONS.pop("shout").changes
        frozenset({'prompt'})
    """
    changed = frozenset([changes] if isinstance(changes, str) else changes)
    if not changed or not changed <= {"prompt", "target", "tests"}:
        raise ValueError(f"`register_augmentation(changes={sorted(changed)})` must be of 'prompt', 'target', 'tests'.")

    def add(make: Transformation) -> Transformation:
        AUGMENTATIONS[name] = Augmentation(make, changed)
        return make

    return add


@register_augmentation("rename_variables", ["prompt", "target"])
def rename_variables(example: CodeExample, material: Material) -> list[Variant]:
    """Rename local variables and parameters, in one of three styles; docstrings follow."""
    tree = parsed(example.program)
    if tree is None:
        return []
    called = parsed(f"{example.setup}\n{example.tests}")
    local = local_names(ast.unparse(tree)) - names_elsewhere(tree) - (keywords_of(called) if called else set())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | local | set(dir(__builtins__))
    style, names = material.rng.choice(("short", "camel", "long")), {}
    for number, name in enumerate(sorted(local)):
        new = {"short": f"v{number}", "camel": camel_case(name), "long": f"the_{name.strip('_').lower()}"}[style]
        new = f"{new}Value" if new == name else new
        while new in used or keyword.iskeyword(new):
            new += "_"
        names[name] = new
        used.add(new)
    if not names:
        return []
    return _of_tree("rename_variables", example, Renamer(names).visit(copy.deepcopy(tree)))


@register_augmentation("rename_entry_point", ["prompt", "target", "tests"])
def rename_entry_point(example: CodeExample, material: Material) -> list[Variant]:
    """Rename the function that the tests call, in prompt, program and tests."""
    tree = parsed(example.program)
    if tree is None or len(example.entry_point) != 1:
        return []
    (old,) = example.entry_point
    new = camel_case(old) if "_" in old else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", old).lower()
    new = new if new != old else f"{material.rng.choice(('compute', 'get', 'find'))}_{old}"
    words = {word for text in (example.program, example.tests, example.setup) for word in re.findall(r"\w+", text)}
    if new in words or keyword.iskeyword(new) or old in local_names(ast.unparse(tree)) or old in attributes_of(tree):
        return []
    called = re.compile(rf"(?<![\w.]){re.escape(old)}(?=\()")

    def in_prose(text: str) -> str:
        """Rename in calls, and everywhere in lines that are Python, such as assertions."""
        lines = text.splitlines(keepends=True)
        return "".join(
            (with_token(line, old, new) if parsed(line.strip()) else None) or called.sub(new, line) for line in lines
        )

    tests, setup = with_token(example.tests, old, new), with_token(example.setup, old, new)
    program = with_token(example.program, old, new)
    if program is None or tests is None or setup is None:
        return []
    start = program.splitlines(keepends=True)[: example.before.count("\n")]  # a name holds no line end
    before = "".join(start)
    solution = program[len(before) : -1]
    before = in_prose(before)  # docstrings too
    prompt = before if example.prompt == example.before else in_prose(example.prompt)
    if example.before and not example.before.endswith("\n"):
        return []
    return [Variant("rename_entry_point", CodeExample(prompt, solution, before, tests, (new,), setup))]


@register_augmentation("flip_comparisons", ["target"])
def flip_comparisons(example: CodeExample, material: Material) -> list[Variant]:
    """``a < b`` becomes ``b > a``."""
    return _by_visitor("flip_comparisons", example, Flip())


@register_augmentation("swap_branches", ["target"])
def swap_branches(example: CodeExample, material: Material) -> list[Variant]:
    """``if a: b else: c`` becomes ``if not a: c else: b``."""
    return _by_visitor("swap_branches", example, Swap())


@register_augmentation("loops_to_while", ["target"])
def loops_to_while(example: CodeExample, material: Material) -> list[Variant]:
    """``for`` becomes ``while`` with an iterator."""
    return _by_visitor("loops_to_while", example, Unroll())


@register_augmentation("api_equivalents", ["target"])
def api_equivalents(example: CodeExample, material: Material) -> list[Variant]:
    """Equivalent calls and displays: ``[]`` and ``list()``, comprehensions and generators, ``+=`` written out."""
    return _by_visitor("api_equivalents", example, Equivalents())


@register_augmentation("restyle", ["prompt", "target"])
def restyle(example: CodeExample, material: Material) -> list[Variant]:
    """The same program in another layout, which the prompt asks for."""
    tree = parsed(example.solution)
    if tree is None or example.before:
        return []
    plain = ast.unparse(tree)
    layouts = {
        "Indent with two spaces.": re.sub(r"^(?:    )+", lambda m: m[0][: len(m[0]) // 2], plain, flags=re.MULTILINE),
        "Indent with tabs.": re.sub(r"^(?:    )+", lambda m: "\t" * (len(m[0]) // 4), plain, flags=re.MULTILINE),
        "No comments, no blank lines.": "\n".join(line for line in plain.splitlines() if line.strip()),
    }
    wanted, text = material.rng.choice(sorted(layouts.items()))
    new = parsed(text)
    if text.strip() == example.solution.strip() or new is None or ast.dump(new) != ast.dump(tree):
        return []
    return [Variant("restyle", replace(example, prompt=f"{example.prompt}# {wanted}\n", solution=text))]


@register_augmentation("tighten_specification", ["prompt", "tests"])
def tighten_specification(example: CodeExample, material: Material) -> list[Variant]:
    """Add an assertion to prompt and tests: the correct program's result for another input, or its type."""
    calls = asserted_calls(example.tests, example.entry_point)
    if not calls:
        return []
    material.rng.shuffle(calls)
    changed = [call for call in (perturbed(call, material.rng) for call in calls[:3]) if call is not None]
    expressions = [ast.unparse(call) for call in changed]
    found = material.evaluate(example, expressions) if material.evaluate and expressions else [None] * len(expressions)
    assertions = [
        f"assert {expression} == {value}"
        for expression, value in zip(expressions, found, strict=True)
        if value is not None and len(value) <= 120 and is_literal(value) and expression not in example.tests
    ]
    assertions += [
        f"assert type({ast.unparse(call)}) is {name}"
        for call, name in ((call, type_asserted(example.tests, call)) for call in calls[:1])
        if name is not None
    ]
    last = example.tests.rstrip().splitlines()[-1]
    variants = []
    for assertion in assertions:
        if last in example.prompt:
            start, _, end = example.prompt.rpartition(last)
            prompt = f"{start}{last}\n{assertion}{end}"
            tests = f"{example.tests.rstrip()}\n{assertion}\n"
            variants.append(Variant("tighten_specification", replace(example, prompt=prompt, tests=tests)))
    return variants


@register_augmentation("repair", ["prompt", "target"])
def repair(example: CodeExample, material: Material) -> list[Variant]:
    """Put a wrong program into the prompt, one change away from the answer."""
    variants = []
    for mutant in mutants(example.program, material.rng):
        shown = mutant if example.before and "#" not in example.before else f"{example.prompt}{mutant}"
        prompt = f"{shown.rstrip()}\n\n# The program above is wrong. Repaired:\n"
        fixed = replace(example, prompt=prompt, solution=example.program.rstrip(), before="")
        variants.append(Variant("repair", fixed, must_fail=mutant))
    return variants


@register_augmentation("shift_context", ["prompt"])
def shift_context(example: CodeExample, material: Material) -> list[Variant]:
    """The same task after a solved one, or asked for in comments instead of a docstring."""
    variants = []
    commented = re.fullmatch(r'"""\n(.*)\n"""\n', example.prompt, flags=re.DOTALL)
    if commented and not example.before:
        text = "".join(f"# {line}".rstrip() + "\n" for line in commented[1].splitlines())
        variants.append(Variant("shift_context", replace(example, prompt=text)))
    others = [
        o for o in material.others if o.program != example.program and not set(o.entry_point) & set(example.entry_point)
    ]
    if others:
        other = material.rng.choice(others)
        shown = f"{other.prompt}{other.solution}".rstrip() + "\n\n\n"
        run = f"{other.program.rstrip()}\n\n\n"
        shifted = replace(example, prompt=shown + example.prompt, before=run + example.before)
        variants.append(Variant("shift_context", shifted))
    material.rng.shuffle(variants)
    return variants


def _of_tree(kind: str, example: CodeExample, tree: ast.Module) -> list[Variant]:
    """The example with another program. If the prompt starts the program, it is cut after the docstring."""
    text = ast.unparse(ast.fix_missing_locations(tree))
    if not example.before:
        return [Variant(kind, replace(example, solution=text))]
    if example.prompt != example.before or "#" in example.before:
        return []  # what the prompt says in comments would be lost
    made = parsed(text)
    functions = [node for node in made.body if isinstance(node, ast.FunctionDef)] if made else []
    named = [node for node in functions if node.name in example.entry_point]
    if not named or named[-1] is not functions[-1]:
        return []
    body = [node for node in named[-1].body if not is_docstring(node)]
    if not body:
        return []
    lines = text.splitlines(keepends=True)
    before = "".join(lines[: body[0].lineno - 1])
    return [Variant(kind, replace(example, prompt=before, before=before, solution=text[len(before) :]))]


def _by_visitor(kind: str, example: CodeExample, visitor: "Counting") -> list[Variant]:
    tree = parsed(example.program)
    if tree is None:
        return []
    new = visitor.visit(tree)
    return _of_tree(kind, example, new) if visitor.count else []
