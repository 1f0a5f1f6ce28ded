"""Programs made of programs."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from forge_lightning.dream.augmenter import DreamAugmenter
from forge_lightning.dream.programs import ProgramDreams


@dataclass
class Problem:
    prompt: str = "# Add one.\n"
    solution: str = "def f(number):\n    return number + 1"
    before: str = ""
    tests: str = "assert f(1) == 2"
    entry_point: tuple[str, ...] = ("f",)
    setup: str = ""

    def task(self, completion):
        return SimpleNamespace(solution=f"{self.before}{completion}\n")


def run(examples):
    return [SimpleNamespace(status="passed", passed=True, stdout="") for _ in examples]


def run_tasks(tasks):
    return [SimpleNamespace(passed="return" in task.solution) for task in tasks]


def test_writes_at_each_temperature_and_keeps_what_is_new_and_right():
    dreams, asked = ProgramDreams(None, [0.5, 1.0], 7), []
    answers = iter(
        [["def f(n):\n    return 1 + n", Problem().solution], ["nonsense", "def f(a):\n    return a + 1\n\n"]]
    )

    def complete(prompts, **options):
        asked.append(options)
        return next(answers)

    made = list(dreams.make({3: Problem(), 5: Problem()}, run, run_tasks, complete, seed=2**40 + 9))
    assert made == [
        (3, Problem().prompt, "def f(n):\n    return 1 + n"),  # 5 gave the known answer
        (5, Problem().prompt, "def f(a):\n    return a + 1"),
    ]
    assert [options["temperature"] for options in asked] == [0.5, 1.0]
    assert all(options["max_new_tokens"] == 7 and options["seed"] < 2**31 for options in asked)
    assert dreams.counts() == [0, 0, 4, 2]
    assert dreams.metrics(dreams.counts()) == {"sampled": 2, "sampled_yield": 0.5}


def test_variants_are_counted_by_the_augmenter():
    dreams = ProgramDreams(DreamAugmenter(["rename_variables"]), [], 7)
    assert math.isnan(dreams.metrics(dreams.counts())["yield"])
    (made,) = dreams.make({3: Problem()}, run, run_tasks, None, seed=0)
    assert made[0] == 3
    assert made[2] != Problem().solution
    assert dreams.metrics(dreams.counts()) == {"augmented": 1, "yield": 1}


def test_nothing_to_make():
    dreams = ProgramDreams(DreamAugmenter(), [1.0], 7)
    assert list(dreams.make({}, run, run_tasks, None, seed=0)) == []


def test_state(tmp_path):
    dreams = ProgramDreams(DreamAugmenter(["rename_variables"]), [1.0], 7)
    dreams.rounds = 3
    list(dreams.make({3: Problem()}, run, run_tasks, lambda prompts, **_: ["def f(n): return n + 1"], seed=0))
    torch.save(dreams.state_dict(), tmp_path / "state.pt")
    other = ProgramDreams(DreamAugmenter(["rename_variables"]), [1.0], 7)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.rounds, other.counts()) == (3, dreams.counts())
    other.clear()
    assert (other.rounds, other.counts()) == (0, [0, 0, 0, 0])
