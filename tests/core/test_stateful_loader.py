import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.core.stateful_loader import ResumableSampler
from forge_lightning.data import StatefulDataLoader


def loader(**kwargs):
    return StatefulDataLoader(list(range(23)), batch_size=4, shuffle=True, seed=1, **kwargs)


def epoch(made, number):
    made.sampler.set_epoch(number)
    return [batch.tolist() for batch in made]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_a_resumed_epoch_gives_the_batches_not_yet_seen(num_workers, stop):
    straight = loader()
    expected = [epoch(straight, 0), epoch(straight, 1)]
    assert expected[0] != expected[1]
    assert sorted(sum(expected[0], [])) == list(range(23))

    stopped = loader(num_workers=num_workers)
    stopped.sampler.set_epoch(0)
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    del iterator
    if stop == 6:
        assert epoch(resumed, 1) == expected[1]
    else:
        assert epoch(resumed, 0) == expected[0][stop:]
        assert epoch(resumed, 1) == expected[1]


def test_an_epoch_counted_twice_is_set_right_and_stays_right():
    """Lightning's counter runs ahead by one after each resume at an epoch's end."""
    expected = [epoch(loader(), number) for number in range(6)]
    first = loader()
    assert epoch(first, 0) == expected[0]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch(second, 2) == expected[1]  # told 2, is 1
    second.sampler.set_epoch(3)
    iterator = iter(second)
    assert [next(iterator).tolist() for _ in range(2)] == expected[2][:2]
    third = loader()
    third.load_state_dict(second.state_dict())
    assert epoch(third, 4) == expected[2][2:]  # told 4, but still inside 2: as after `max_steps`
    assert epoch(third, 5) == expected[3]
    fourth = loader()
    fourth.load_state_dict(third.state_dict())
    fourth.sampler.set_epoch(5)
    assert epoch(fourth, 6) == expected[4]


def test_an_epoch_cut_short_is_not_taken_up():
    """As by `limit_train_batches`: after three batches the next epoch begins."""
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "delivered": 3})
    resumed.sampler.set_epoch(0)  # Lightning ends the old epoch,
    assert epoch(resumed, 1) == epoch(loader(), 1)


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch(loader(num_workers=1), 0)
    assert torch.equal(torch.rand(1), expected)


def test_processes_share_an_epoch(monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = ResumableSampler(list(range(10)), shuffle=True)
        assert len(sampler) == 5
        seen.append(list(sampler))
    assert sorted(seen[0] + seen[1]) == list(range(10))


def stopped_after(count, **kwargs):
    made = StatefulDataLoader(list(range(24)), **{"batch_size": 4, "shuffle": True, "seed": 1} | kwargs)
    made.sampler.set_epoch(0)
    iterator = iter(made)
    for _ in range(count):
        next(iterator)
    return made.state_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "examples of a batch, over all ranks: 4, now 8"),
        ({"batch_size": 2}, "examples of a batch, over all ranks: 4, now 2"),
        ({"seed": 2}, "seed: 1, now 2"),
        ({"shuffle": False}, "shuffle: True, now False"),
    ],
)
def test_resume_inside_an_epoch_of_another_order_is_refused(change, named):
    resumed = StatefulDataLoader(list(range(24)), **{"batch_size": 4, "shuffle": True, "seed": 1} | change)
    resumed.load_state_dict(stopped_after(2))
    resumed.sampler.set_epoch(0)
    with pytest.raises(MisconfigurationException, match=named):
        next(iter(resumed))
    resumed.load_state_dict(stopped_after(6))  # at an epoch's end nothing is left of it
    seen = [number for batch in epoch(resumed, 1) for number in batch]
    assert sorted(seen) == list(range(24))


def test_resume_on_more_processes_with_smaller_batches_goes_on_exactly(monkeypatch):
    straight = StatefulDataLoader(list(range(24)), batch_size=4, shuffle=True, seed=1)
    expected = [sorted(batch) for batch in epoch(straight, 0)[2:]]
    state, parts = stopped_after(2), []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        half = StatefulDataLoader(list(range(24)), batch_size=2, shuffle=True, seed=1)
        half.load_state_dict(state)
        parts.append(epoch(half, 0))
    assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == expected
