import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from forge_lightning.data import DifficultySampler, ResumableSampler, StatefulDataLoader
from forge_lightning.edge.trackers import ItemTracker, SkillTracker
from tests import processes

ROOT = Path(__file__).parents[2]
DATA = TensorDataset(torch.arange(50))


class Made(torch.utils.data.Dataset):
    """Makes an example of a level."""

    def __getitem__(self, key):
        return torch.tensor(key)


def read(loader):
    return [batch[0].tolist() if isinstance(batch, list) else batch.tolist() for batch in loader]


def test_until_somebody_chooses_it_is_the_seeded_shuffle():
    ours, plain = DifficultySampler(DATA, torch.arange(50.0), batch_size=8, seed=3), ResumableSampler(DATA, seed=3)
    for epoch in range(3):
        ours.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert list(ours) == list(plain)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_what_one_would_draw(monkeypatch, world):
    """The ``i``-th of a batch of all goes to process ``i mod W``, and each knows the whole."""
    shares = []
    for rank in range(world):
        sampler = DifficultySampler(DATA, torch.arange(50.0), batch_size=4)
        monkeypatch.setattr(DifficultySampler, "bind", bound(world, rank))
        sampler.policy = SkillTracker(0, 49, seed=1)
        shares.append((list(sampler), [sampler.arms_of(b) for b in range(50 // (4 * world))]))
    for batch, arms in enumerate(shares[0][1]):
        for rank, (mine, known) in enumerate(shares):
            assert known[batch] == arms
            assert mine[4 * batch : 4 * batch + 4] == arms[rank::world]


def bound(world, rank):
    def bind(self):
        self.num_replicas, self.rank = world, rank
        self.num_samples = -(-self.epoch_size // world)
        self.total_size = self.num_samples * world

    return bind


def test_difficulties_are_drawn_as_the_policy_asks():
    difficulty = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).float()
    sampler = DifficultySampler(TensorDataset(difficulty), difficulty, batch_size=100)

    class Asks(SkillTracker):
        def propose(self, count):
            return np.full(count, 1234.0)

    sampler.policy = Asks(0, 4999)
    drawn = difficulty[list(itertools.islice(sampler, 200))]
    assert drawn.mean() == pytest.approx(1234, abs=15)
    assert drawn.unique().numel() > 50  # and not the same few again and again
    assert (drawn - 1234).abs().max() < 5000 / 25


@pytest.mark.parametrize("examples", [4000, 100, 10])
def test_no_example_is_drawn_more_than_three_times_an_epoch(examples):
    """Also where all draws ask for the hardest, as a skill beyond the data does."""
    difficulty = torch.randperm(examples, generator=torch.Generator().manual_seed(0)).float()
    sampler = DifficultySampler(TensorDataset(difficulty), difficulty, batch_size=10)

    class Asks(SkillTracker):
        def propose(self, count):
            return np.full(count, examples - 1.0)

    sampler.policy = Asks(0, examples - 1)
    for _ in range(3):
        times = torch.bincount(torch.tensor(list(sampler)), minlength=examples)
        assert times.max() == 3
        nearest = times[difficulty.argsort(descending=True)]
        assert nearest[: examples // 4].float().mean() > 2.5


@pytest.mark.parametrize(("examples", "different"), [(100, 15), (50, 11), (10, 3)])
def test_of_few_examples_no_few_fill_a_batch(examples, different):
    difficulty = torch.arange(float(examples))
    sampler = DifficultySampler(TensorDataset(difficulty), difficulty, batch_size=100, num_samples=1000)

    class Asks(SkillTracker):
        def propose(self, count):
            return np.full(count, examples / 2)

    sampler.policy = Asks(0, examples - 1)
    drawn = difficulty[list(itertools.islice(sampler, different))]
    assert (drawn - examples / 2).abs().max() <= different / 2 + 0.5
    assert drawn.unique().numel() > different / 2
    assert drawn.mean() == pytest.approx(examples / 2, abs=0.02 * examples)


def test_between_two_levels_chance_decides_so_that_the_mean_is_right():
    sampler = DifficultySampler(Made(), levels=[1.0, 2.0, 3.0, 5.0], batch_size=1000, num_samples=20_000)

    class Asks(SkillTracker):
        def propose(self, count):
            return np.full(count, 3.5)

    sampler.policy = Asks(1, 5)
    levels = sampler.difficulty[[arm for _, arm in sampler]]
    assert set(levels) == {3.0, 5.0}
    assert levels.mean() == pytest.approx(3.5, abs=0.05)


def test_made_examples_have_numbers_of_their_own_for_ever():
    sampler = DifficultySampler(Made(), levels=[1, 2, 3], batch_size=8, num_samples=40)
    serials = [serial for _ in range(3) for serial, _ in sampler]
    assert serials == list(range(120))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("kind", ["skill", "item"])
def test_a_loader_goes_on_with_what_was_drawn_ahead(workers, stop, kind):
    """Choices change with outcomes, and with workers they are made batches before they are used."""

    def make():
        sampler = DifficultySampler(DATA, torch.arange(50.0), batch_size=8, seed=1)
        policy = SkillTracker(0, 49, seed=2) if kind == "skill" else ItemTracker(np.arange(50.0), seed=2)
        sampler.policy = policy
        return StatefulDataLoader(DATA, batch_size=8, sampler=sampler, num_workers=workers), policy

    def learn(policy, batch):
        values = np.array(batch)
        policy.update(values.astype(float) if kind == "skill" else values, values % 3 == 0)

    loader, policy = make()
    straight, saved = [], None
    for number, (batch,) in enumerate(loader, start=1):
        straight.append(batch.tolist())
        learn(policy, batch.tolist())
        if number == stop:
            saved = json.loads(json.dumps([loader.state_dict(), policy.state_dict()]))
    other, second = make()
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed = []
    for (batch,) in other:
        resumed.append(batch.tolist())
        learn(second, batch.tolist())
    assert resumed == straight[stop:]


def test_two_lines_over_a_data_set_of_ones_own():
    dataset = TensorDataset(torch.randn(64, 3), torch.randn(64))
    sampler = DifficultySampler(dataset, dataset.tensors[1], batch_size=16)
    loader = DataLoader(dataset, batch_size=16, sampler=sampler)
    assert [len(batch[0]) for batch in loader] == [16] * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"difficulty": [1.0] * 50}, ValueError, "is the same for all"),
        ({"difficulty": [1.0] * 49 + [float("nan")]}, ValueError, "with 1 that are not finite. Give every example one"),
        ({"difficulty": range(49)}, ValueError, "`difficulty` has 49 numbers, and the data set 50 examples"),
        ({"levels": [1, 2]}, ValueError, "goes with `num_samples`"),
        ({"levels": [2, 2], "num_samples": 9}, ValueError, r"levels=...\)` is the same for all"),
        ({"difficulty": ["easy"] * 50}, ValueError, "must be numbers, one for each, not list of str"),
        ({"difficulty": len}, ValueError, "must be numbers, one for each"),
        ({"batch_size": 0}, ValueError, r"`DifficultySampler\(batch_size=0\)` must be at least 1"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DifficultySampler(DATA, **arguments)


def test_an_iterable_data_set_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="Stream is iterable: its examples come in their own"):
        DifficultySampler(Stream())


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """In training, with `EdgeController` choosing."""
    result = processes.run_module("tests.edge.two_processes", tmp_path, cwd=ROOT)
    assert (tmp_path / "done").exists(), result.stderr[-3000:]
