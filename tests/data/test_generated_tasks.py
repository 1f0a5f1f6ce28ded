import random

import pytest
import torch

from forge_lightning.data import GeneratedTasks
from forge_lightning.data.generated_tasks import FAMILIES
from forge_lightning.sandbox import Sandbox


def tasks(family, level, count=50):
    return [FAMILIES[family](random.Random(i), level) for i in range(count)]


@pytest.mark.parametrize("level", [1, 5, 12])
def test_additions_are_right_and_as_large_as_asked_for(level):
    largest = round(3 * 1.5**level)
    for task in tasks("addition", level):
        a, b = (int(part[::-1]) for part in task.prompt.removesuffix("=").split("+"))
        assert int(task.answer[::-1]) == a + b
        assert max(a, b) <= largest
    assert max(int(t.answer[::-1]) for t in tasks("addition", level)) > largest


@pytest.mark.parametrize("level", [1, 4])
def test_expressions_are_right_and_have_as_many_operations(level):
    for task in tasks("expression", level):
        text = task.prompt.removesuffix("%100=")
        assert sum(text.count(operator) for operator in "+-*") == level
        assert int(task.answer[::-1]) == eval(f"({text}) % 100")


@pytest.mark.parametrize("level", [1, 3])
def test_functions_meet_their_tests_and_others_do_not(level):
    made = tasks("python", level, 20)
    with Sandbox() as sandbox:
        right = sandbox.run_many([problem(t, t.answer) for t in made])
        wrong = sandbox.run_many([problem(t, f"{t.answer} + 1") for t in made])
    assert all(verdict.passed for verdict in right)
    assert not any(verdict.passed for verdict in wrong)


def problem(task, answer):
    from forge_lightning.sandbox import Task

    return Task(f"{task.prompt}{answer}\n", task.tests, "f")


def test_the_same_key_is_the_same_task_and_no_other():
    data = GeneratedTasks(["addition", "python"], max_level=6).data
    assert data.task(5, 3) == data.task(5, 3)
    assert len({data.task(serial, 5).prompt for serial in range(50)}) > 45
    other = GeneratedTasks(["addition", "python"], max_level=6, seed=1).data
    assert [other.task(i, 5) for i in range(5)] != [data.task(i, 5) for i in range(5)]


def test_batches_carry_level_and_arm_and_the_loss_is_on_the_answer():
    data = GeneratedTasks(["addition", "expression"], max_level=4, batch_size=16, steps_per_epoch=3)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert torch.equal(batch["level"], batch["arm"] % 4 + 1)
        for row in range(16):
            task = data.data.task(int(batch["sample_id"][row]), int(batch["arm"][row]))
            answer = batch["labels"][row][batch["labels"][row] != -100]
            assert data.tokenizer.decode(answer) == task.answer + "</s>"
    assert len({int(i) for batch in batches for i in batch["sample_id"]}) == 48


def test_validation_has_every_level_alike_and_no_training_example():
    data = GeneratedTasks(["addition"], max_level=5, num_val=10)
    rows = [(int(i), int(arm)) for b in data.val_dataloader() for i, arm in zip(b["sample_id"], b["arm"], strict=True)]
    assert len(rows) == 50
    assert sorted(arm for _, arm in rows) == sorted(list(range(5)) * 10)
    assert max(serial for serial, _ in rows) < 0


def test_easy_to_hard_opens_one_level_after_another():
    data = GeneratedTasks(
        ["addition"], max_level=4, batch_size=8, steps_per_epoch=200, order="easy_to_hard", ramp_steps=90
    )
    levels = [batch["level"] for batch in data.train_dataloader()]
    assert max(int(level.max()) for level in levels[:29]) == 1
    assert max(int(level.max()) for level in levels[31:59]) == 2
    later = torch.cat(levels[100:])
    assert torch.bincount(later, minlength=5)[1:].min() > 0.15 * len(later)


def test_problems_are_the_functions():
    data = GeneratedTasks(["addition", "python"], max_level=2, num_val=3)
    problems = data.problems("val")
    assert [p.task_id for p in problems] == [
        f"python/{level}/{i}" for level in (1, 2) for i in range(3 * level - 3, 3 * level)
    ]
    with Sandbox() as sandbox:
        assert all(v.passed for v in sandbox.run_many([p.task(p.solution + "\nprint(") for p in problems]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"families": ["sums"]},
            r"`GeneratedTasks\(families=\['sums'\]\)` must be of \['addition', 'expression', 'python'\]",
        ),
        ({"max_level": 1}, r"`GeneratedTasks\(max_level=1\)` must be at least 2"),
        ({"num_val": 0}, r"`GeneratedTasks\(num_val=0\)` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneratedTasks(**arguments)


def test_widths_are_a_second_way_to_be_hard():
    for width in (1, 2, 3):
        task = FAMILIES["addition"](random.Random(0), 6, width)
        assert task.prompt.count("+") == width
        assert sum(int(part[::-1]) for part in task.prompt.removesuffix("=").split("+")) == int(task.answer[::-1])
        numbers = FAMILIES["expression"](random.Random(0), 2, width).prompt.removesuffix("%100=")
        assert {len(n) for n in numbers.translate(str.maketrans("+-*()", "     ")).split()} == {width}
    data = GeneratedTasks(["addition"], max_level=3, widths=[1, 2])
    assert data.data.arms == [("addition", level, width) for width in (1, 2) for level in (1, 2, 3)]
    sampler = data.train_dataloader().sampler
    assert (sampler.num_arms, sampler.ordered) == (6, False)
    assert GeneratedTasks(["addition"], max_level=3).train_dataloader().sampler.ordered
