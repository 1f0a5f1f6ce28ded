"""Counters that a checkpoint holds."""

import math
from dataclasses import fields

import torch

from forge_lightning.dream.progress import Progress


def test_a_new_fit_has_done_nothing():
    progress = Progress()
    numbers = {f.name: getattr(progress, f.name) for f in fields(progress)}
    nothing = (
        "steps",
        "last_sleep",
        "remaining",
        "cycles",
        "extra_steps",
        "carry",
        "dream_carry",
        "size",
        "offered",
        "fits",
    )
    assert {name: numbers[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert progress.most_rows == 1
    assert progress.computed == [0, 0]
    assert progress.replayed == [0.0] * 4
    assert all(math.isnan(value) for value in (*progress.before, progress.lowest))
    assert progress.stage is None
    assert not progress.probe_closed


def test_state_is_restored_and_not_shared():
    one, two = Progress(steps=3, computed=[1, 2], stage=4), Progress()
    state = one.state_dict()
    two.load_state_dict(state)
    assert two.state_dict().items() >= {"steps": 3, "computed": [1, 2], "stage": 4}.items()
    two.computed[0] = 9
    assert one.computed == state["computed"] == [1, 2]


def test_entries_of_an_earlier_release_may_be_missing():
    progress = Progress(cycles=7)
    progress.load_state_dict({"steps": 2, "distilled": [0, 0]})
    assert (progress.steps, progress.cycles) == (2, 7)
    assert not hasattr(progress, "distilled")


def test_means_are_of_examples_since_the_last_call():
    progress = Progress()
    progress.note_replayed(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([1.0, 0.0, 0.0]))
    progress.note_replayed(torch.tensor([6.0]), torch.tensor([math.nan]))
    assert progress.take_replayed() == (3.0, 1 / 3)
    assert all(math.isnan(value) for value in progress.take_replayed())


def test_replayed_examples_are_averaged_until_they_are_taken():
    progress = Progress()
    progress.note_replayed(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([1.0, torch.nan, torch.nan]))
    progress.note_replayed(torch.tensor([6.0]), torch.tensor([0.0]))
    assert progress.replayed == [9.0, 3, 1.0, 2]
    assert progress.take_replayed() == (3.0, 0.5)
    assert all(math.isnan(value) for value in progress.take_replayed())
