"""What goes into the stores of a rank, and what is drawn from them."""

import math

import pytest
import torch

from forge_lightning.dream.memory import NUM_WATCHED, ReplayMemory
from forge_lightning.dream.options import BatchFields, Storage
from forge_lightning.dream.progress import Progress


def memory(capacity=100, probe_size=0, program_fraction=0.0, seed=0, **fields):
    return ReplayMemory(
        Storage(capacity=capacity), BatchFields(**fields), "uniform", probe_size, program_fraction, seed
    )


def offer(memory, start, count, progress=None, **more):
    progress = progress or Progress(probe_closed=memory.probe_size == 0)
    rows = {"x": torch.arange(start, start + count).float()[:, None], **more}
    losses = torch.arange(start, start + count).float()
    memory.admit(rows, losses, torch.full((count,), math.nan), {}, progress, stage=2, step=progress.steps)
    return progress


def held(store):
    return sorted(store.read(store.slots()).rows["x"].flatten().tolist())


def test_every_fourth_goes_to_the_probe_while_it_has_room():
    made = memory(probe_size=3)
    progress = offer(made, 0, 6)
    assert held(made.probe) == [0, 4]
    assert not progress.probe_closed
    offer(made, 6, 10, progress)
    assert held(made.probe) == [0, 4, 8]
    assert progress.probe_closed
    assert progress.offered == 16
    assert held(made.buffer) == [x for x in range(16) if x not in (0, 4, 8)]


def test_what_is_in_the_probe_never_comes_to_the_buffer_nor_the_other_way_round():
    made = memory(probe_size=2)
    progress = offer(made, 0, 4)
    offer(made, 0, 4, progress)  # the fifth offer is example 0 again
    assert held(made.probe) == [0]
    assert held(made.buffer) == [1, 2, 3]
    offer(made, 1, 1, progress)  # the ninth: in the buffer already
    assert held(made.probe) == [0]


def test_scores_stage_and_step_are_stored():
    made = memory()
    offer(made, 5, 3, Progress(steps=7, probe_closed=True))
    assert made.buffer.column("loss").tolist() == [5, 6, 7]
    assert made.buffer.column("stage").tolist() == [2, 2, 2]
    assert made.buffer.column("step").tolist() == [7, 7, 7]


@pytest.mark.parametrize(("key", "families"), [("auto", [3, 4]), ("family", [3, 4]), (None, [0, 0])])
def test_families_are_under_their_key(key, families):
    made = memory(family=key)
    offer(made, 0, 2, family=torch.tensor([3, 4]))
    assert made.buffer.column("family").tolist() == families


def test_a_negative_position_counts_from_the_end():
    made = memory(family=-1)
    rows = {"0": torch.ones(2, 1), "1": torch.tensor([5, 6])}
    made.admit(rows, torch.zeros(2), torch.zeros(2), {}, Progress(probe_closed=True), stage=-1, step=0)
    assert made.buffer.column("family").tolist() == [5, 6]


@pytest.mark.parametrize("rows", [{}, {"mine": torch.tensor([0.5, 1.5])}, {"mine": torch.ones(2, 2).long()}])
def test_a_field_that_was_named_has_to_hold_integers(rows):
    made = memory(family="mine")
    with pytest.raises(ValueError, match=r"`BatchFields\(family='mine'\)`: the batch has no integers \(B,\)"):
        offer(made, 0, 2, **rows)
    offer(memory(), 0, 2, **rows)


def test_programs_come_in_their_share_over_draws():
    made, progress = memory(program_fraction=0.375), Progress()
    offer(made, 0, 10)
    assert [made.draw(4, progress).num_programs for _ in range(3)] == [0, 0, 0]
    assert progress.dream_carry == 0, "nothing is owed from before there were programs"
    parent = made.buffer.read(made.buffer.slots()[:1]).rows
    for number in range(3):
        made.admit_program(parent, {"x": torch.tensor([[100.0 + number]])})
    drawn = [made.draw(4, progress) for _ in range(5)]
    assert [one.num_programs for one in drawn] == [1, 2, 1, 2, 1], "1.5 a draw"
    for one in drawn:
        values = one.rows["x"].flatten()
        assert len(values) == 4
        assert (values[: one.num_programs] >= 100).all()
        assert (values[one.num_programs :] < 100).all()
        assert len(one.stored) == 4 - one.num_programs


def test_a_draw_may_be_of_programs_alone_or_of_examples_alone():
    made, progress = memory(program_fraction=1.0), Progress()
    offer(made, 0, 4)
    alone = made.draw(2, progress)
    assert (alone.num_programs, len(alone.stored)) == (0, 2)
    parent = made.buffer.read(made.buffer.slots()[:1]).rows
    for number in range(5):
        made.admit_program(parent, {"x": torch.tensor([[100.0 + number]])})
    programs = made.draw(2, progress)
    assert (programs.num_programs, programs.stored) == (2, None)


def test_a_program_has_no_fields_that_batches_lack():
    made = memory()
    offer(made, 0, 1)
    parent = made.buffer.read(made.buffer.slots()).rows
    with pytest.raises(ValueError, match=r"`row_of` returns \['y'\], and batches have \['x'\]"):
        made.admit_program(parent, {"y": torch.ones(1, 1)})


@pytest.mark.parametrize("stored", [5, NUM_WATCHED, 3 * NUM_WATCHED + 1])
def test_watched_examples_are_spread_evenly(stored):
    made = memory(capacity=8 * NUM_WATCHED)
    offer(made, 0, stored)
    assert len(made.buffer) == stored
    made.watch()
    step = max(1, stored // NUM_WATCHED)
    slots = made.buffer.slots()[::step][:NUM_WATCHED]
    assert held(made.watched) == sorted(made.buffer.read(slots).rows["x"].flatten().tolist())
    assert made.watched.categories == dict.fromkeys(made.watched.categories, 0)


def test_ranks_and_seeds_draw_their_own_numbers():
    found = []
    for seed, rank in ((0, 0), (0, 0), (0, 1), (1, 0)):
        made = memory(seed=seed)
        made.clear(rank)
        offer(made, 0, 50)
        found.append(made.draw(10, Progress()).rows["x"].flatten().tolist())
    assert found[0] == found[1]
    assert len({tuple(one) for one in found}) == 3
    default, first = memory(), memory()
    first.clear(0)
    for made in (default, first):
        offer(made, 0, 50)
    assert default.draw(10, Progress()).rows["x"].tolist() == first.draw(10, Progress()).rows["x"].tolist()
