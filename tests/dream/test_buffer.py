import math
import tracemalloc

import pytest
import torch

from forge_lightning.dream.buffer import CATEGORIES, STRATEGIES, ReplayBuffer


def numbers(first, count):
    return {"x": torch.arange(first, first + count)}


def push(buffer, first, count, **kwargs):
    ids = torch.arange(first, first + count)
    return buffer.push({"x": ids.clone()}, sample_id=ids, **kwargs)


def judged(buffer, count=2000, seed=0, first=0, size=20):
    """Losses and outcomes that go together, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(first, first + count, size):
        loss = 3 * torch.rand(size, generator=generator)
        right = loss < 1.5 + 0.5 * torch.randn(size, generator=generator)
        surprise = torch.rand(size, generator=generator) < 0.1
        success = (right ^ surprise).float()
        push(buffer, start, size, loss=loss, success=success, step=start)


def tokens(size=6, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (size, width), generator=generator)
    lengths = torch.randint(2, width + 1, (size,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = torch.where(mask.bool() & (torch.arange(width) > 1), ids, -100)
    return {"input_ids": torch.where(mask.bool(), ids, 7), "attention_mask": mask, "labels": labels}


def test_what_is_read_is_what_was_pushed():
    rows = tokens() | {"weight": torch.rand(6).bfloat16(), "level": torch.arange(6), "flag": torch.arange(6) > 2}
    rows |= {"picture": torch.rand(6, 2, 3, dtype=torch.float64)}
    buffer = ReplayBuffer(10)
    slots = buffer.push(rows)
    found = buffer.read(slots).rows
    longest = int(rows["attention_mask"].sum(1).max())
    for name, tensor in rows.items():
        expected = tensor[:, :longest] if name in ("input_ids", "attention_mask", "labels") else tensor
        assert torch.equal(found[name], expected), name
        assert found[name].dtype == tensor.dtype
    assert buffer._store.num_bytes < sum(t.nbytes for t in rows.values()), "padding and halves of integers are left out"


def test_numbers_too_large_for_half_the_bits_are_kept_whole():
    buffer = ReplayBuffer(10)
    buffer.push({"x": torch.tensor([[1, 2], [3, 4]])}, sample_id=torch.tensor([0, 1]))
    slots = buffer.push({"x": torch.tensor([[1 << 40, -5]])}, sample_id=torch.tensor([2]))
    assert buffer.read([0, 1, *slots]).rows["x"].tolist() == [[1, 2], [3, 4], [1 << 40, -5]]
    assert buffer.num_bytes == buffer._members.reservoir.num_bytes == 3 * (2 * 8 + 400)


def test_extras_keep_their_own_lengths():
    buffer = ReplayBuffer(10)
    extras = {"logits": [torch.randn(n, 3).half() for n in (2, 0, 4)]}
    slots = buffer.push(numbers(0, 3), extras=extras)
    for found, given in zip(buffer.read(slots).extras["logits"], extras["logits"], strict=True):
        assert torch.equal(found, given)


def test_the_reservoir_is_a_fair_sample_of_everything():
    counts = torch.zeros(400)
    for seed in range(60):
        buffer = ReplayBuffer(40, frontier=0, seed=seed)
        for start in range(0, 400, 8):
            push(buffer, start, 8)
        assert len(buffer) == buffer.num_in_reservoir == 40
        counts[buffer.column("sample_id")] += 1
    by_age = counts.view(4, 100).sum(1) / 60  # ten of each quarter are expected
    assert by_age.min() > 8.8
    assert by_age.max() < 11.2


def test_families_have_equal_shares():
    buffer = ReplayBuffer(90, frontier=0)
    push(buffer, 0, 1000, family=torch.zeros(1000, dtype=torch.long))
    assert buffer.families == {0: 90}
    push(buffer, 1000, 60, family=torch.arange(60) % 2 + 1)
    assert buffer.families == {0: 30, 1: 30, 2: 30}
    push(buffer, 2000, 1000, family=torch.zeros(1000, dtype=torch.long))
    assert buffer.families == {0: 30, 1: 30, 2: 30}
    assert (buffer.column("sample_id") >= 2000).sum() > 5, "the first family is still a sample of all of its own"


def test_families_without_end_take_no_memory_without_end():
    buffer = ReplayBuffer(10, frontier=0)
    for start in range(0, 6000, 1000):
        push(buffer, start, 1000, family=torch.arange(start, start + 1000))
    assert buffer.num_seen == 6000
    assert len(buffer._members.reservoir.seen) == 4096


def test_the_frontier_holds_what_is_barely_right_or_wrong():
    buffer = ReplayBuffer(300, frontier=0.3)
    judged(buffer)
    assert buffer.categories == dict.fromkeys(CATEGORIES, 30)
    loss, success, category = (buffer.column(name) for name in ("loss", "success", "category"))
    right, wrong, odd = (loss[category == n] for n in (1, 2, 3))
    everyone = loss[buffer.column("in_reservoir")]
    assert right.min() > everyone.quantile(0.25)
    assert wrong.max() < everyone.quantile(0.85)
    assert (success[category == 1] == 1).all()
    assert (success[category == 2] == 0).all()
    tails = (odd > everyone.quantile(0.8)) | (odd < everyone.quantile(0.2))
    assert tails.all()
    assert ((odd > 1.5) == (success[category == 3] == 1)).all(), "right in spite of the loss, wrong in spite of it"


def test_quantiles_follow_the_losses():
    buffer = ReplayBuffer(300, frontier=0.3)
    judged(buffer)
    before = buffer.threshold
    generator = torch.Generator().manual_seed(1)
    for start in range(5000, 7000, 20):
        loss = 0.1 * torch.rand(20, generator=generator)
        push(buffer, start, 20, loss=loss, success=(loss < 0.05).float())
    assert 1 < before < 2
    assert 0.02 < buffer.threshold < 0.08


def test_without_success_there_is_no_frontier_and_no_guess():
    buffer = ReplayBuffer(300, frontier=0.3)
    for start in range(0, 1000, 20):
        push(buffer, start, 20, loss=torch.rand(20))
    assert sum(buffer.categories.values()) == 0
    assert math.isnan(buffer.threshold)
    assert len(buffer.sample(5, "near_threshold")) == 5, "filled up from the reservoir"


def test_a_known_sample_is_refreshed_and_not_stored_twice():
    buffer = ReplayBuffer(100, frontier=0.3)
    (slot,) = push(buffer, 5, 1, loss=torch.tensor([2.0]), success=torch.tensor([0.0]))
    assert push(buffer, 5, 1, loss=torch.tensor([0.5]), success=torch.tensor([1.0])) == [slot]
    assert len(buffer) == 1
    assert buffer.num_seen == 2
    scores = {name: buffer.column(name).item() for name in ("loss", "best_loss", "success", "best_success")}
    assert scores == {"loss": 0.5, "best_loss": 0.5, "success": 1.0, "best_success": 1.0}
    buffer.update(buffer.read([slot]), torch.tensor([3.0]), torch.tensor([0.0]))
    assert buffer.column("best_loss").item() == 0.5
    assert buffer.column("loss").item() == 3.0
    assert buffer.column("best_success").item() == 1.0


def test_success_may_be_true_or_false_and_stays_where_it_is_not_told_again():
    buffer = ReplayBuffer(10)
    (slot,) = buffer.push({"x": torch.ones(1)}, loss=[1], success=torch.tensor([True]))
    assert buffer.column("success").item() == 1
    buffer.update(buffer.read([slot]), torch.tensor([0.5]))
    assert buffer.column("success").item() == 1
    assert buffer.column("loss").item() == 0.5


def test_what_was_mastered_leaves_the_frontier():
    buffer = ReplayBuffer(300, frontier=0.9)
    judged(buffer)
    before = buffer.categories["near_success"]
    near = [s for s in buffer.slots() if buffer._scores.arrays["category"][s] == 1]
    replay = buffer.read(near)
    buffer.update(replay, torch.full((len(near),), 0.001), torch.ones(len(near)))
    assert before > 50
    assert buffer.categories["near_success"] == 0
    still = [slot for slot, id in zip(replay.slots, replay.sample_id.tolist(), strict=True) if id in buffer]
    assert all(buffer._scores.arrays["in_reservoir"][slot] for slot in still)


def test_scores_of_a_row_that_left_are_passed_over():
    buffer = ReplayBuffer(4, frontier=0)
    push(buffer, 0, 4, loss=torch.ones(4))
    replay = buffer.sample(4)
    for start in range(4, 4000, 4):
        push(buffer, start, 4, loss=torch.ones(4))
    buffer.update(replay, torch.full((4,), 9.0))
    assert buffer.column("loss").max() == 1


def test_content_tells_rows_apart_where_they_have_no_number():
    buffer = ReplayBuffer(10)
    buffer.push({"x": torch.tensor([[1, 2], [1, 3], [1, 2]])})
    assert len(buffer) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_draws_are_without_replacement_and_counted(strategy):
    buffer = ReplayBuffer(300, frontier=0.3)
    judged(buffer)
    for _ in range(5):
        replay = buffer.sample(32, strategy)
        assert len(set(replay.slots)) == 32
        assert torch.equal(replay.rows["x"], replay.sample_id)
    assert buffer.column("replays").sum() == 5 * 32
    assert len(buffer.sample(1000, strategy)) == len(buffer)


def test_strategies_draw_what_they_say():
    buffer = ReplayBuffer(300, frontier=0.3)
    judged(buffer, count=4000)
    category = {s: int(buffer._scores.arrays["category"][s]) for s in buffer.slots()}
    assert {category[s] for s in buffer.sample(40, "near_threshold").slots} == {1, 2}
    assert {category[s] for s in buffer.sample(20, "edge_cases").slots} == {3}
    assert all(buffer._scores.arrays["in_reservoir"][s] for s in buffer.sample(100, "uniform").slots)


def test_balanced_gives_families_the_same_chance():
    buffer = ReplayBuffer(100, frontier=0)
    push(buffer, 0, 100, family=(torch.arange(100) >= 95).long())
    drawn = torch.cat([buffer.sample(8, "balanced").sample_id for _ in range(20)])
    assert (drawn >= 95).float().mean() == 0.5


def test_priority_prefers_the_edge_and_its_weights_correct_for_it():
    buffer = ReplayBuffer(300, frontier=0.3, alpha=1.0, beta=1.0)
    judged(buffer)
    edge, weights = [], []
    for _ in range(30):
        replay = buffer.sample(16, "priority")
        edge.append((replay.loss - buffer.threshold).abs().mean())
        weights.append(replay.weights)
    everyone = (buffer.column("loss") - buffer.threshold).abs().mean()
    assert torch.stack(edge[:5]).mean() < 0.9 * everyone
    assert all(w.max() == 1 and (w > 0).all() for w in weights)
    assert torch.cat(weights).min() < 0.5


def test_a_row_that_was_replayed_often_gives_way_to_others():
    buffer = ReplayBuffer(200, frontier=0)
    judged(buffer, count=200)
    drawn = torch.stack([torch.tensor(sorted(buffer.sample(100, "priority").slots)) for _ in range(40)])
    counts = torch.bincount(drawn.flatten(), minlength=200)
    assert counts.min() >= 5, "nothing is left out for ever"


def test_max_bytes_bounds_the_memory_that_is_used():
    tracemalloc.start()
    buffer = ReplayBuffer(100_000, max_bytes=8_000_000)
    for start in range(0, 40_000, 1000):
        loss = torch.rand(1000)
        buffer.push({"x": torch.randint(0, 9, (1000, 4))}, loss, loss.round(), torch.arange(start, start + 1000))
    used = tracemalloc.get_traced_memory()[0] - 100_000 * 60  # columns that are there from the start
    tracemalloc.stop()
    assert 6_000_000 < buffer.num_bytes <= 8_000_000
    assert 0.7 * buffer.num_bytes < used < 1.2 * buffer.num_bytes


@pytest.fixture
def only_data(monkeypatch):
    """Count the rows' own bytes alone, so that a test can say what fits."""
    monkeypatch.setattr("forge_lightning.dream.buffer._ROW_OVERHEAD", 0)


@pytest.mark.usefixtures("only_data")
def test_bytes_are_bounded_and_the_rest_stays_a_fair_sample():
    buffer = ReplayBuffer(1000, frontier=0.3, max_bytes=4000)
    for start in range(0, 5000, 10):
        rows = {"x": torch.full((10, 50), start)}
        loss = torch.rand(10) * 3
        buffer.push(rows, loss, (loss < 1.5).float(), sample_id=torch.arange(start, start + 10))
        assert buffer.num_bytes <= 4000
    assert 15 <= len(buffer) <= 20
    assert ReplayBuffer(10, max_bytes=100).push({"x": torch.zeros(1, 26)}) == [-1], "one that fills it all"
    ages = []
    for seed in range(30):
        one = ReplayBuffer(1000, frontier=0, max_bytes=400, seed=seed)
        for start in range(0, 400, 4):
            one.push({"x": torch.zeros(4, 5, dtype=torch.long)}, sample_id=torch.arange(start, start + 4))
        ages.append(one.column("sample_id").float())
    assert 150 < torch.cat(ages).mean() < 250


@pytest.mark.usefixtures("only_data")
def test_bytes_are_shared_out_as_rows_are():
    """Neither part takes the other's room, where bytes are what is short."""
    buffer = ReplayBuffer(10_000, frontier=0.3, max_bytes=300 * 8)
    judged(buffer, count=3000)
    in_frontier = sum(buffer.categories.values())
    assert buffer.num_bytes <= 300 * 8
    assert 150 <= buffer.num_in_reservoir <= 420
    assert 50 <= in_frontier <= 180


@pytest.mark.usefixtures("only_data")
def test_rows_of_different_lengths_stay_a_fair_sample_where_bytes_are_short():
    counts, lengths = torch.zeros(4), []
    for seed in range(30):
        buffer = ReplayBuffer(1000, frontier=0, max_bytes=8000, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, 800, 8):
            real = torch.where(torch.rand(8, 1, generator=generator) < 0.1, 100, 10)
            mask = (torch.arange(100) < real).long()
            buffer.push({"x": mask.clone(), "attention_mask": mask}, sample_id=torch.arange(start, start + 8))
        ids = buffer.column("sample_id")
        counts += torch.bincount(ids // 200, minlength=4)
        lengths.append(buffer.num_bytes)
        assert buffer.num_bytes <= 8000
    assert min(lengths) > 5000, "room that a long row leaves is used again"
    assert counts.max() / counts.min() < 1.35


def test_more_families_than_room_are_a_fair_sample_together():
    first = []
    for seed in range(20):
        buffer = ReplayBuffer(50, frontier=0, seed=seed)
        for start in range(0, 2000, 200):
            push(buffer, start, 200, family=torch.arange(200))
        assert len(buffer) == 50
        first.append((buffer.column("family") < 50).float().mean())
    assert torch.stack(first).mean() == pytest.approx(0.25, abs=0.05)


def test_labels_are_filled_up_with_what_takes_no_loss_whatever_they_are_called():
    buffer = ReplayBuffer(10, labels=("targets",))
    for width in (3, 5):
        full = torch.ones(1, width, dtype=torch.long)
        buffer.push({"x": full * width, "targets": full, "attention_mask": full})
    rows = buffer.read(buffer.slots()).rows
    assert rows["targets"].tolist() == [[1, 1, 1, -100, -100], [1] * 5]


def test_rows_padded_at_the_front_are_filled_up_there():
    buffer = ReplayBuffer(10)
    for width, start in ((4, 1), (6, 2)):
        mask = torch.ones(2, width, dtype=torch.long)
        mask[0, :start] = 0
        buffer.push({"ids": mask * 5 + 1, "attention_mask": mask, "labels": torch.where(mask > 0, 5, -100)})
    rows = buffer.read(buffer.slots()).rows
    assert (rows["attention_mask"][:, -1] == 1).all()
    assert (rows["ids"][:, -1] == 6).all()
    assert rows["labels"].tolist()[0] == [-100, -100, -100, 5, 5, 5]


def test_features_as_many_as_there_are_tokens_are_no_sequence():
    buffer = ReplayBuffer(10)
    mask = torch.tensor([[1, 1, 0, 0]])
    features = torch.rand(1, 4)
    slots = buffer.push({"ids": mask * 3, "attention_mask": mask, "features": features})
    assert torch.equal(buffer.read(slots).rows["features"], features)
    assert buffer.read(slots).rows["ids"].shape == (1, 2)
    with pytest.raises(
        ValueError, match="'ids' was as long as the mask 'attention_mask', and now is 3 long and the mask 4"
    ):
        buffer.push({"ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": mask, "features": features})


def test_content_is_the_same_however_it_is_kept():
    buffer = ReplayBuffer(10)
    small = {"x": torch.tensor([[1, 2]])}
    before = buffer.ids_of(small)
    buffer.push({"x": torch.tensor([[1 << 40, 0]])})
    assert torch.equal(buffer.ids_of(small), before)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_saved_buffer_goes_on_exactly(mapped, tmp_path):
    def made():
        return ReplayBuffer(60, frontier=0.5, memory_map=tmp_path / "map" if mapped else None, seed=3)

    buffer = made()
    for seed in range(10):
        buffer.push(
            tokens(8, seed=seed),
            torch.rand(8) * 3,
            (torch.rand(8) < 0.5).float(),
            family=torch.arange(8) % 3,
            extras={"logits": [torch.randn(n % 3, 2).half() for n in range(8)]},
        )
        buffer.sample(4, "priority")
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = made()
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for round_ in range(6):
        for one in (buffer, other):
            generator = torch.Generator().manual_seed(round_)
            loss = torch.rand(8, generator=generator) * 3
            more = {"logits": [torch.ones(1, 2).half()] * 8}
            one.push(tokens(8, seed=100 + round_), loss, (loss < 1).float(), family=torch.arange(8), extras=more)
        for strategy in STRATEGIES:
            a, b = buffer.sample(5, strategy), other.sample(5, strategy)
            assert a.slots == b.slots
            assert all(torch.equal(a.rows[name], b.rows[name]) for name in a.rows)
            assert all(torch.equal(x, y) for x, y in zip(a.extras["logits"], b.extras["logits"], strict=True))
            assert torch.equal(a.weights, b.weights)
    if mapped:
        assert list((tmp_path / "map").iterdir()) == [], "the file goes with the process"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_rows_are_shared_out_anew_when_the_number_of_processes_changes(before, after):
    buffers = [ReplayBuffer(100, frontier=0.3, seed=rank) for rank in range(before)]
    for rank, buffer in enumerate(buffers):
        judged(buffer, count=60, seed=rank, first=1000 * rank)
    states = [buffer.state_dict() for buffer in buffers]
    shards = [ReplayBuffer(100, frontier=0.3, seed=rank) for rank in range(after)]
    for rank, shard in enumerate(shards):
        shard.load_shard(states, rank, after)
    every = sorted(id for buffer in buffers for id in buffer.column("sample_id").tolist())
    now = [shard.column("sample_id").tolist() for shard in shards]
    assert len({id for ids in now for id in ids}) == sum(map(len, now)), "nobody has what another has"
    if after >= before:
        assert sorted(id for ids in now for id in ids) == every
    assert max(map(len, now)) - min(map(len, now)) <= 1
    for shard in shards:
        assert torch.equal(shard.read(shard.slots()).rows["x"], shard.column("sample_id"))
        judged(shard, count=40, first=9000)
        shard.sample(10, "priority")


def test_a_state_of_another_capacity_is_taken_over_as_far_as_it_fits():
    buffer = ReplayBuffer(100, frontier=0.3)
    judged(buffer, count=400)
    smaller = ReplayBuffer(30, frontier=0.3)
    smaller.load_state_dict(buffer.state_dict())
    assert len(smaller) <= 30
    assert smaller.column("sample_id").max() > 200, "not the oldest alone"
    assert set(smaller.column("sample_id").tolist()) <= set(buffer.column("sample_id").tolist())
    judged(smaller, count=100, first=9000)


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    buffer = ReplayBuffer(50)
    judged(buffer, count=200)
    for strategy in STRATEGIES:
        buffer.sample(4, strategy)
    assert torch.equal(torch.rand(1), expected)


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"capacity": 0}, r"`ReplayBuffer\(capacity=0\)` must be at least 1"),
        ({"frontier": 1.0}, r"`ReplayBuffer\(frontier=1.0\)` must be in \[0, 1\)"),
        ({"max_bytes": 0}, r"`ReplayBuffer\(max_bytes=0\)` must be at least 1"),
        ({"alpha": -1}, r"`ReplayBuffer\(alpha=-1\)` must be at least 0"),
        ({"beta": 2}, r"`ReplayBuffer\(beta=2\)` must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(**arguments)
    buffer = ReplayBuffer(10)
    with pytest.raises(ValueError, match="nothing is stored"):
        buffer.sample(3)
    buffer.push({"x": torch.zeros(2, 3), "y": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"stores rows of \['x', 'y'\], and got \['x'\]"):
        buffer.push({"x": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"'y' was float32 of \(B\), and now is int64 of \(2,\)"):
        buffer.push({"x": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(
        ValueError, match="rows of 'x' were 3 long and now are 4. Where lengths differ, batches need a mask"
    ):
        buffer.push({"x": torch.zeros(2, 4), "y": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"differ in their number of examples: \{'x': 2, 'y': 3\}"):
        buffer.push({"x": torch.zeros(2, 3), "y": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"`loss` must be \(2,\) for 2 examples, not \(1,\)"):
        buffer.push({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, loss=torch.zeros(1))
    with pytest.raises(ValueError, match=r"`sample_id` must be integers, not float32"):
        buffer.push({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, sample_id=torch.tensor([1.2, 1.7]))
    with pytest.raises(ValueError, match=r"entry 'x' of the batch is a list"):
        buffer.push({"x": [1, 2]})
    with pytest.raises(ValueError, match="the batch is empty"):
        buffer.push({})
    with pytest.raises(ValueError, match=r"sample\(batch_size=0\)` must be at least 1"):
        buffer.sample(0)
    with pytest.raises(ValueError, match=r"memory_map='/nowhere/at/all'\)` must be a folder in one that exists"):
        ReplayBuffer(10, memory_map="/nowhere/at/all")
    with pytest.raises(ValueError, match=r"`sample\(strategy='best'\)` must be one of \['uniform'"):
        buffer.sample(1, "best")
