"""Which examples stay, decided without their scores."""

import numpy as np
import pytest

from forge_lightning.dream.reservoir import Reservoir, SlotLists, draw


class Kept:
    """A reservoir whose examples are their slots, each of a length of its own."""

    def __init__(self, limit, budget=1 << 30, capacity=4000, seed=0):
        self.lengths = {}
        self.family = {}
        self.rng = np.random.default_rng(seed)
        self.reservoir = Reservoir(limit, budget, capacity, self.lengths.__getitem__)

    def offer(self, slot, family=0, length=1):
        reservoir = self.reservoir
        family = reservoir.count(family)
        self.lengths[slot], self.family[slot] = length, family
        reservoir.lengths = [reservoir.lengths[0] + length, reservoir.lengths[1] + 1]
        chance, place = self.rng.random(2)
        enters = reservoir.make_room(family, chance, place, length, self.rng, self.evict)
        if enters:
            reservoir.join(slot, family)
        return enters

    def evict(self, slot):
        self.reservoir.leave(slot, self.family[slot])


def test_every_example_is_kept_with_the_same_chance():
    counts = np.zeros(30)
    for seed in range(600):
        kept = Kept(limit=6, seed=seed)
        for slot in range(30):
            kept.offer(slot)
        assert kept.reservoir.num_held == 6
        counts[kept.reservoir.slots()] += 1
    # 600 draws at a chance of 1/5: a standard deviation of 9.8.
    assert abs(counts - 120).max() < 40
    assert abs(counts[:10].mean() - counts[20:].mean()) < 12


def test_families_share_alike_once_it_is_full():
    kept = Kept(limit=9)
    for slot in range(300):
        kept.offer(slot, family=0 if slot % 10 else slot % 3)
    for slot in range(300, 400):
        kept.offer(slot, family=slot % 3)
    assert sorted(map(len, kept.reservoir.held.values())) == [3, 3, 3]


def test_more_families_than_room_are_one():
    kept = Kept(limit=4)
    entered = [kept.offer(slot, family=slot) for slot in range(400)]
    assert kept.reservoir.num_held == 4
    assert all(entered[:4])
    assert 5 < sum(entered[4:]) < 60, "4 / n each: 18 on average"


def test_families_beyond_the_most_are_one():
    kept = Kept(limit=2, capacity=5000)
    for family in range(4100):
        kept.reservoir.count(family)
    assert len(kept.reservoir.seen) == 4096
    assert kept.reservoir.seen[0] == 1 + 4


def test_bytes_are_a_limit_too():
    kept = Kept(limit=100, budget=10)
    assert not kept.offer(0, length=11)
    assert all(kept.offer(slot, length=5) for slot in (1, 2))
    assert kept.reservoir.num_bytes == 10
    for slot in range(3, 60):
        kept.offer(slot, length=1 + slot % 5)
        assert kept.reservoir.num_bytes <= 10
    assert kept.reservoir.num_bytes == sum(kept.lengths[slot] for slot in kept.reservoir.slots())


def test_long_examples_are_not_favoured_where_bytes_run_out():
    long = 0
    for seed in range(300):
        kept = Kept(limit=100, budget=40, seed=seed)
        for slot in range(60):
            kept.offer(slot, length=2 if slot % 2 else 6)
        long += sum(kept.lengths[slot] == 6 for slot in kept.reservoir.slots()) / kept.reservoir.num_held
    assert 0.25 < long / 300 < 0.55


@pytest.mark.parametrize(("limit", "budget", "length", "fits"), [(2, 9, 4, True), (1, 9, 4, False), (2, 8, 4, False)])
def test_room_ends_at_limit_and_budget(limit, budget, length, fits):
    kept = Kept(limit, budget)
    kept.offer(0, length=5)
    assert kept.reservoir.has_room(length) == fits


def test_no_room_at_all():
    assert not Kept(limit=0).offer(0)


def test_samples_are_without_replacement_and_uniform():
    kept = Kept(limit=20)
    for slot in range(20):
        kept.offer(slot, family=slot % 3)
    counts, rng = np.zeros(20), np.random.default_rng(1)
    for _ in range(1000):
        chosen = kept.reservoir.sample(5, rng)
        assert len(set(chosen)) == 5
        counts[chosen] += 1
    assert abs(counts - 250).max() < 60
    balanced = kept.reservoir.balanced_sample(6, rng)
    assert sorted(slot % 3 for slot in balanced) == [0, 0, 1, 1, 2, 2]
    assert len(set(kept.reservoir.balanced_sample(20, rng))) == 20


def test_lists_stay_whole_whoever_leaves():
    lists, members, rng = SlotLists(50), [], np.random.default_rng(0)
    expected = set()
    for slot in rng.permutation(50).tolist():
        lists.append(members, slot)
        expected.add(slot)
        if len(expected) > 10:
            gone = sorted(expected)[int(rng.integers(len(expected)))]
            lists.remove(members, gone)
            expected.discard(gone)
        assert set(members) == expected
        assert len(members) == len(expected)


def test_a_saved_reservoir_goes_on_alike():
    kept, other = Kept(limit=5), Kept(limit=5)
    for slot in range(40):
        kept.offer(slot, family=slot % 2, length=1 + slot % 3)
    one, two = kept.reservoir, other.reservoir
    other.lengths.update(kept.lengths)
    two.load(one.held, one.seen, [*one.lengths, one.was_full])
    assert (two.num_held, two.num_bytes, two.seen, two.lengths) == (one.num_held, one.num_bytes, one.seen, one.lengths)
    gone = one.slots()[1]
    two.leave(gone, kept.family[gone])
    assert gone not in two.slots()
    assert two.num_bytes == one.num_bytes - kept.lengths[gone]


def test_draws_of_nothing_and_of_all():
    rng = np.random.default_rng(0)
    assert draw([], 3, rng) == []
    assert sorted(draw([4, 5, 6], 5, rng)) == [4, 5, 6]
    assert len(draw([4, 5, 6], 2, rng)) == 2


def test_a_family_leaves_in_proportion_to_its_number():
    kept = Kept(limit=10)
    for slot in range(5):
        kept.offer(slot, family=int(slot >= 2))
    chosen = [kept.reservoir._any_family(place) for place in (0.0, 0.39, 0.4, 0.99)]
    assert chosen == [[0, 1], [0, 1], [2, 3, 4], [2, 3, 4]]


@pytest.mark.parametrize(("chance", "enters"), [(0.49, True), (0.5, False)])
def test_the_second_of_two_enters_with_a_chance_of_one_half(chance, enters):
    kept = Kept(limit=1)
    kept.offer(0)
    kept.reservoir.count(0)
    gone = []
    assert (
        kept.reservoir.make_room(0, chance, 0.0, 1, kept.rng, lambda slot: (gone.append(slot), kept.evict(slot)))
        == enters
    )
    assert gone == ([0] if enters else [])


@pytest.mark.parametrize(("family", "enters"), [(0, False), (1, False), (2, True)])
def test_only_a_family_below_its_share_takes_from_the_largest(family, enters):
    """Six places, two for each family; a chance of 0.5 is too high to take the place of one of one's own."""
    kept = Kept(limit=6)
    kept.lengths.update(dict.fromkeys(range(6), 1))
    kept.family.update({0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1})
    kept.reservoir.load({0: [0, 1, 2, 3], 1: [4, 5], 2: []}, {0: 40, 1: 20, 2: 20}, [80, 80, False])
    gone = []
    found = kept.reservoir.make_room(family, 0.5, 0.0, 1, kept.rng, lambda slot: (gone.append(slot), kept.evict(slot)))
    assert found == enters
    assert gone == ([0] if enters else [])


def test_where_bytes_run_out_early_and_late_examples_stay_alike():
    """Ten of sixty fit, long before a limit of a thousand comes into it."""
    late, held = 0.0, 0
    for seed in range(300):
        kept = Kept(limit=1000, budget=40, seed=seed)
        for slot in range(60):
            kept.offer(slot, length=4)
        late += sum(slot >= 30 for slot in kept.reservoir.slots())
        held += kept.reservoir.num_held
    assert held == 3000
    assert 0.45 < late / held < 0.55


def test_a_new_reservoir_has_counted_nothing():
    reservoir = Kept(limit=5).reservoir
    assert (reservoir.lengths, reservoir.num_held, reservoir.num_bytes, reservoir.seen) == ([0, 0], 0, 0, {})
    assert not reservoir.was_full


def test_short_examples_of_two_families_gain_nothing_where_bytes_run_out():
    long = 0
    for seed in range(400):
        kept = Kept(limit=100, budget=40, seed=seed)
        for slot in range(60):
            kept.offer(slot, family=slot // 2 % 2, length=1 if slot % 2 else 9)
        long += sum(kept.lengths[slot] == 9 for slot in kept.reservoir.slots()) / kept.reservoir.num_held
    assert 0.43 < long / 400 < 0.52


@pytest.mark.parametrize(("length", "enters"), [(4, True), (5, False)])
def test_an_example_may_be_as_large_as_all_there_is(length, enters):
    assert Kept(limit=5, budget=4).offer(0, length=length) == enters
