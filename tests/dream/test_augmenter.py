import ast
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from forge_lightning.data import CodeTasks
from forge_lightning.dream.augmenter import DreamAugmenter
from forge_lightning.dream.code_augmentation import AUGMENTATIONS, CodeExample, Material, Variant, register_augmentation
from forge_lightning.dream.code_trees import mutants, parsed, perturbed
from forge_lightning.sandbox import Sandbox, Task

MBPP = CodeExample(
    prompt=(
        '"""\nCount the numbers of a list above a bound, by count_above.\n'
        'assert count_above([1, 5, 9], 4) == 2\nassert count_above([2, 2], 1) == 2\n"""\n'
    ),
    solution=(
        "def count_above(numbers, bound):\n    # one by one\n    total = 0\n    for number in numbers:\n"
        "        if number > bound:\n            total += 1\n        else:\n            total += 0\n    return total"
    ),
    before="",
    tests="\nassert count_above([1, 5, 9], 4) == 2\nassert count_above([2, 2], 1) == 2",
    entry_point=("count_above",),
)
SIGNATURE = (
    "from typing import List\n\n\ndef keep_long(strings: List[str], length: int) -> List[str]:\n"
    '    """Those of strings that are longer than length.\n    >>> keep_long(["a", "bcd"], 2)\n    [\'bcd\']\n    """\n'
)
HUMANEVAL = CodeExample(
    prompt=SIGNATURE,
    solution="    return [s for s in strings if len(s) > length]\n",
    before=SIGNATURE,
    tests='def check(candidate):\n    assert candidate(["a", "bc", "bcd"], 2) == ["bcd"]\ncheck(keep_long)',
    entry_point=("keep_long",),
    setup=SIGNATURE + "    pass\n",
)
OTHER = replace(
    MBPP, prompt='"""\nDouble.\n"""\n', solution="def double(x):\n    return 2 * x", entry_point=("double",)
)


@pytest.fixture(scope="module")
def run():
    with Sandbox(timeout_seconds=2.0, num_workers=2) as box:
        yield lambda examples: box.run_many([Task(e.program, e.tests, e.entry_point, e.setup) for e in examples])


def made(kind, example, run, seed=0):
    return DreamAugmenter([kind]).augment([example], run, seed, others=[example, OTHER])[0]


@pytest.mark.parametrize("example", [MBPP, HUMANEVAL], ids=["mbpp", "humaneval"])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_what_a_kind_does_not_change_stays(kind, example, run):
    """And what it makes holds: the augmenter has run it."""
    variants = made(kind, example, run)
    if not variants:
        assert example is HUMANEVAL, f"{kind} must apply to this"
        assert kind in ("restyle", "tighten_specification", "flip_comparisons", "swap_branches", "loops_to_while")
        return
    (variant,) = variants
    new, changes = variant.example, AUGMENTATIONS[kind].changes
    if not example.before:  # otherwise the prompt is part of the program
        for name, value in (("prompt", "prompt"), ("target", "solution"), ("tests", "tests")):
            assert getattr(new, value) == getattr(example, value) or name in changes, name
    assert variant.kind == kind
    assert new != example
    assert parsed(new.program) is not None


def test_variables_get_other_names_wherever_they_are(run):
    (variant,) = made("rename_variables", MBPP, run)
    names = {node.id for node in ast.walk(parsed(variant.example.solution)) if isinstance(node, ast.Name)}
    assert not names & {"numbers", "bound", "total", "number"}
    (variant,) = made("rename_variables", HUMANEVAL, run)
    assert "of strings " not in variant.example.prompt, "the docstring follows"
    assert variant.example.program.startswith(variant.example.prompt), "and is still the program's beginning"
    assert variant.example.entry_point == ("keep_long",)


def test_names_that_mean_more_than_a_variable_stay(run):
    solution = (
        "import math\nLIMIT = 3\n\nclass Box:\n    size = 2\n\n    def grow(self, size=1):\n        self.size += size\n"
        "        return self.size\n\ndef f(x, LIMIT=LIMIT):\n    def inner(y):\n        nonlocal x\n        x = y\n"
        "        return x\n    inner(x + 1)\n    try:\n        return Box().grow(size=x) + LIMIT + math.floor(0.5)\n"
        "    except TypeError as error:\n        return error"
    )
    example = CodeExample("p", solution, "", "assert f(1) == 7\nassert f(x=2) == 8", ("f",))
    (variant,) = made("rename_variables", example, run)
    text = variant.example.solution
    for kept in ("LIMIT", "self.size", "size=", "math.floor", "class Box", "def inner(", "def f(x"):
        assert kept in text, kept
    assert not re.search(r"\berror\b", text)


def test_the_entry_point_is_renamed_in_prompt_program_and_tests_alike(run):
    (variant,) = made("rename_entry_point", MBPP, run)
    new = variant.example
    assert new.entry_point == ("countAbove",)
    assert "countAbove([1, 5, 9], 4) == 2" in new.prompt
    assert "by count_above." in new.prompt, "prose is not code"
    assert "count_above" not in new.solution + new.tests
    assert "# one by one" in new.solution, "comments stay"
    (variant,) = made("rename_entry_point", HUMANEVAL, run)
    assert ">>> keepLong(" in variant.example.prompt
    assert "check(keepLong)" in variant.example.tests


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("flip_comparisons", "return a < b", "return b > a"),
        ("flip_comparisons", "return a == b", "return b == a"),
        ("swap_branches", "if a:\n        return 1\n    else:\n        return b", "if not a:\n        return b"),
        (
            "loops_to_while",
            "for i in range(b):\n        a += i\n    return a",
            "while True:\n        try:\n            i = next(",
        ),
        ("api_equivalents", "return [i for i in range(a)]", "return list((i for i in range(a)))"),
        ("api_equivalents", "return str(a)", "return f'{a}'"),
        ("api_equivalents", "a += 2\n    return a", "a = a + 2"),
    ],
)
def test_programs_become_what_means_the_same(kind, before, after):
    example = replace(MBPP, solution=f"def f(a, b):\n    {before}")
    (variant,) = AUGMENTATIONS[kind].make(example, Material(random.Random(0)))
    assert after in variant.example.solution


def test_a_list_is_still_changed_in_place():
    example = replace(MBPP, solution="def f(a, b):\n    a += b\n    return a")
    assert AUGMENTATIONS["api_equivalents"].make(example, Material(random.Random(0))) == []


def test_examples_in_a_docstring_are_not_about_variables(run):
    signature = 'def f(text):\n    """Length of text.\n    >>> f("text")\n    4\n    """\n'
    example = CodeExample(signature, "    return len(text)", signature, 'assert f("text") == 4', ("f",))
    for seed in range(6):
        (variant,) = made("rename_variables", example, run, seed=seed)
        assert 'f("text")' in variant.example.prompt.replace("'", '"')
        assert "Length of text." not in variant.example.prompt


def test_an_entry_point_that_is_handed_on_is_renamed_in_the_prompts_assertions_too(run):
    test = "assert list(map(add_one, [1])) == [2]"
    prompt = f'"""\nAdd one (and only one).\n{test}\n"""\n'
    example = CodeExample(prompt, "def add_one(x):\n    return x + 1", "", test, ("add_one",))
    (variant,) = made("rename_entry_point", example, run)
    assert "map(addOne, [1])" in variant.example.prompt
    example = replace(
        example, prompt='"""\nfirst (of all).\n"""\n', solution="def first(x): return x", entry_point=("first",)
    )
    (variant,) = made("rename_entry_point", replace(example, tests="assert first(1) == 1"), run)
    assert "\nfirst (of all)" in variant.example.prompt


def test_what_cannot_be_written_back_is_counted_and_passed_over(run):
    program = 'def count_above(a, b):\n    import re\n    return str(re.sub(r"\\d", "", a))'
    augmenter = DreamAugmenter(["api_equivalents"])
    (variants,) = augmenter.augment(
        [replace(MBPP, solution=program, tests='assert count_above("a1", 0) == "a"')], run, 0
    )
    assert augmenter.tried == {"api_equivalents": 1}
    assert len(variants) == augmenter.kept.get("api_equivalents", 0)


def test_inputs_are_changed_only_within_what_they_mean():
    call = ast.parse("f([1, 5, 9], 3, -2, 'ab')").body[0].value
    seen = {ast.unparse(perturbed(call, random.Random(seed))) for seed in range(40)}
    assert len(seen) > 3
    for text in seen:
        numbers, size, negative, letters = (ast.literal_eval(arg) for arg in ast.parse(text).body[0].value.args)
        assert len(numbers) == size == 3
        assert negative == -2
        assert sorted(letters) == ["a", "b"]


def test_chains_and_lazy_conditions_are_left_alone():
    for program in ("return a < b < 3", "return a in b", "if a:\n        return 1\n    elif b:\n        return 2"):
        example = replace(MBPP, solution=f"def f(a, b):\n    {program}")
        for kind in ("flip_comparisons", "swap_branches"):
            assert AUGMENTATIONS[kind].make(example, Material(random.Random(0))) == []


def test_another_layout_is_the_same_tree_and_asked_for(run):
    layouts = {made("restyle", MBPP, run, seed=seed)[0].example for seed in range(12)}
    assert len(layouts) == 3
    for new in layouts:
        assert ast.dump(parsed(new.solution)) == ast.dump(parsed(MBPP.solution))
        assert new.prompt.startswith(MBPP.prompt + "# ")
    assert any("\n\t" in new.solution and "tabs" in new.prompt for new in layouts)


def test_a_layout_that_would_change_a_text_is_not_made():
    text = replace(MBPP, solution='def f():\n    x = """\n        eight\n"""\n    # why\n    return x')
    for seed in range(10):
        for variant in AUGMENTATIONS["restyle"].make(text, Material(random.Random(seed))):
            assert ast.dump(parsed(variant.example.solution)) == ast.dump(parsed(text.solution))


def test_a_tightened_specification_holds_of_the_target_and_stands_in_prompt_and_tests(run):
    assertions = set()
    for seed in range(6):
        (variant,) = made("tighten_specification", MBPP, run, seed=seed)
        (more,) = set(variant.example.tests.splitlines()) - set(MBPP.tests.splitlines())
        assert f"\n{more}\n" in variant.example.prompt
        assertions.add(more)
    assert len(assertions) > 1


def test_a_repair_task_has_tests_that_fail_before_and_pass_after(run):
    (variant,) = made("repair", MBPP, run)
    assert variant.must_fail in variant.example.prompt
    assert variant.example.solution == MBPP.solution
    before = replace(variant.example, solution=variant.must_fail)
    assert [verdict.status for verdict in run([before, variant.example])] == ["failed", "passed"]


def test_mutants_are_small_and_all_different():
    found = mutants(MBPP.solution, random.Random(0), most=20)
    assert len(found) == len(set(found)) > 5
    plain = ast.unparse(parsed(MBPP.solution)).splitlines()
    for mutant in found:
        lines = mutant.splitlines()
        assert sum(a != b for a, b in zip(plain, lines, strict=True)) == 1
    assert mutants("not python (", random.Random(0)) == []


def test_the_context_is_another_problem_or_comments(run):
    shifted = [made("shift_context", MBPP, run, seed=seed)[0].example for seed in range(8)]
    prompts = {new.prompt for new in shifted}
    assert any(prompt.startswith("# Count the numbers") for prompt in prompts)
    assert any("def double(x)" in prompt and prompt.endswith(MBPP.prompt) for prompt in prompts)
    assert {new.solution for new in shifted} == {MBPP.solution}


def test_what_does_not_hold_is_counted_and_left_out(run):
    @register_augmentation("spoil", changes=["target"])
    def spoil(example, material):
        bad = replace(example, solution=example.solution.replace("total += 1", "total += 2"))
        return [Variant("spoil", bad)]

    try:
        augmenter = DreamAugmenter(["spoil", "flip_comparisons"], per_problem=2)
        (variants,) = augmenter.augment([MBPP], run, seed=0)
        assert [variant.kind for variant in variants] == ["flip_comparisons"]
        assert augmenter.tried == {"spoil": 1, "flip_comparisons": 1}
        assert augmenter.kept == {"spoil": 0, "flip_comparisons": 1}
        assert augmenter.success_rate == 0.5
        other = DreamAugmenter()
        other.load_state_dict(augmenter.state_dict())
        assert other.success_rate == 0.5
    finally:
        del AUGMENTATIONS["spoil"]


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda e: None, TypeError, "The augmentation 'mine' must return a list of `Variant`, and returned None"),
        (lambda e: [e], TypeError, "must return a list of `Variant`, and returned"),
        (
            lambda e: [Variant("mine", replace(e, prompt="other"))],
            ValueError,
            r"'mine' was registered to change \['target'\], and changed \['prompt'\]",
        ),
    ],
)
def test_a_kind_that_does_not_do_what_it_says_is_named(made, error, message):
    register_augmentation("mine", changes="target")(lambda example, material: made(example))
    try:
        with pytest.raises(error, match=message):
            DreamAugmenter(["mine"]).augment([MBPP], lambda examples: [], seed=0)
    finally:
        del AUGMENTATIONS["mine"]


def test_a_mutant_that_its_tests_do_not_catch_is_no_repair_task(run):
    weak = replace(MBPP, tests="assert count_above([], 0) == 0")
    for seed in range(4):
        for variant in made("repair", weak, run, seed=seed):
            assert run([replace(weak, solution=variant.must_fail)])[0].status == "failed"
    none = replace(MBPP, tests="assert callable(count_above)")
    assert made("repair", none, run) == []


def test_the_same_seed_makes_the_same_variants(run):
    first, second, third = (DreamAugmenter().augment([MBPP, HUMANEVAL, OTHER], run, seed) for seed in (1, 1, 2))
    assert first == second
    assert first != third


def test_nothing_is_made_of_what_is_no_program(run):
    broken = replace(MBPP, solution="def count_above(:")
    for kind in AUGMENTATIONS:
        assert made(kind, broken, run) == [], kind


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`DreamAugmenter\(kinds=\['rot13'\]\)` must be of \['api_equivalents', "):
        DreamAugmenter(["rot13"])
    with pytest.raises(ValueError, match=r"`DreamAugmenter\(kinds=\[\]\)`"):
        DreamAugmenter([])
    with pytest.raises(ValueError, match=r"`DreamAugmenter\(per_problem=0\)` must be at least 1"):
        DreamAugmenter(per_problem=0)
    with pytest.raises(ValueError, match=r"changes=\['style'\]\)` must be of 'prompt', 'target', 'tests'"):
        register_augmentation("x", changes=["style"])


@pytest.mark.skipif("FORGE_MBPP" not in os.environ, reason="needs the real MBPP file")
def test_real_problems_have_variants_that_hold(run):
    problems = CodeTasks(path=os.environ["FORGE_MBPP"]).problems("val")[:40]
    assert Path(os.environ["FORGE_MBPP"]).exists()
    examples = [CodeExample.of(problem) for problem in problems]
    for kind, least in (("rename_variables", 0.95), ("flip_comparisons", 0.95), ("repair", 0.8)):
        augmenter = DreamAugmenter([kind])
        variants = augmenter.augment(examples, run, seed=0)
        if kind == "repair":
            assert sum(map(bool, variants)) >= least * len(examples)
        else:
            assert augmenter.success_rate >= least
            assert augmenter.tried[kind] >= 10
