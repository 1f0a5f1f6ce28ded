import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    random_split,
)

from forge_lightning.callbacks import GeometryProbe, RNGState
from forge_lightning.geometry.estimators import estimate
from forge_lightning.models import ForgeModule
from tests import processes
from tests.accelerator import ACCELERATOR
from tests.contract.modules import LossOnly, Plain, Stateful, examples, with_batches_of
from tests.contract.rows import fit, weights

ROOT = Path(__file__).parents[2]
NAMES = ("two_nn", "levina_bickel", "correlation", "participation_ratio")


class Collects(Callback):
    """Everything that the probe logs, by step; place it behind."""

    def __init__(self):
        self.logged = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if "geometry" in k and "overhead" not in k}
        if found and found not in self.logged.values():
            self.logged[trainer.global_step] = found


def probed(module=Plain, trainer=None, **options):
    collects = Collects()
    probe = GeometryProbe(**{"every_n_steps": 2, "num_points": 32, "max_overhead": None} | options)
    model, _ = fit([probe, collects], module, **trainer or {})
    return collects.logged, probe, model


def close(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for step in a:
        assert a[step].keys() == b[step].keys()
        for key, value in a[step].items():
            assert value == pytest.approx(b[step][key], rel=tolerance, nan_ok=True), (step, key)


class Keeps(with_batches_of(64)):
    """Keeps the outputs of its layers."""

    kept = []

    def training_step(self, batch, batch_idx):
        self.kept.append(self.net[0](batch[0]).detach().clone())
        return super().training_step(batch, batch_idx)


def test_logs_the_estimates_of_the_tapped_rows():
    Keeps.kept = []
    options = {"num_points": 64, "every_n_steps": 1, "estimators": (*NAMES, "pca")}
    logged, *_ = probed(Keeps, layers=["net.0"], trainer={"max_epochs": 2}, **options)
    assert list(logged) == [1, 2]
    for step, rows in zip(logged, Keeps.kept, strict=True):
        for name, expected in estimate(rows, (*NAMES, "pca")).items():
            key = f"forge/geometry/net.0/{name}"
            assert logged[step][key] == pytest.approx(expected.dimension, rel=1e-5, nan_ok=True)
            assert logged[step][key + "_se"] == pytest.approx(expected.standard_error, rel=1e-5, nan_ok=True)
        assert logged[step]["forge/geometry/net.0/num_points"] == 64


@pytest.mark.parametrize(("size", "accumulated"), [(48, 1), (16, 4)])
def test_there_are_never_more_rows_than_asked_for(size, accumulated):
    options = {"num_points": 40, "every_n_steps": 4 // accumulated, "estimators": ("two_nn",)}
    kwargs = {"accumulate_grad_batches": accumulated, "max_epochs": 6}
    logged, *_ = probed(with_batches_of(size), layers=["net.0"], trainer=kwargs, **options)
    counts = {values["forge/geometry/net.0/num_points"] for values in logged.values()}
    assert max(counts) == 40


def test_accumulated_batches_are_one_step():
    one, *_ = probed(with_batches_of(32), layers=["net.0"], every_n_steps=1)
    two, *_ = probed(with_batches_of(16), layers=["net.0"], every_n_steps=1, trainer={"accumulate_grad_batches": 2})
    close(one, two)


class Reshuffled(LossOnly):
    """Twelve dimensions in batches of 16, shuffled; large steps, which move the clouds of two steps apart."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2))

    def train_dataloader(self):
        x = torch.randn(512, 12, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03)


class Runs(Reshuffled):
    def forward(self, x):
        assert not self.training
        return self.net(x)


class AtFixedWeights(Callback):
    """The layer's output for all examples, when a probe is logged."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        x = trainer.train_dataloader.dataset.tensors[0].to(pl_module.device)
        with torch.no_grad():
            self.found[trainer.global_step] = estimate(pl_module.net[:2](x), ("levina_bickel",))["levina_bickel"]


def test_batches_too_small_are_probed_on_examples_at_fixed_weights():
    """Not on points of many steps, which read another dimension, and follow the learning rate."""
    fixed = AtFixedWeights()
    collects, probe = Collects(), GeometryProbe(["net.1"], 10, num_points=512, max_overhead=None)
    fit([probe, collects, fixed], Runs, max_epochs=2, limit_val_batches=0)
    assert len(collects.logged) == 6
    for step, values in collects.logged.items():
        assert values["forge/geometry/net.1/num_points"] == 512
        expected = fixed.found[step].dimension
        assert values["forge/geometry/net.1/levina_bickel"] == pytest.approx(expected, rel=1e-4)


def test_a_module_without_forward_is_probed_on_one_step_and_says_so():
    with pytest.warns(UserWarning, match="a step has 16 points .*Reshuffled has no `forward`") as told:
        logged, *_ = probed(
            Reshuffled, {"max_epochs": 3, "limit_val_batches": 0}, num_points=128, estimators=["two_nn"]
        )
    assert {values["forge/geometry/net.0/num_points"] for values in logged.values()} == {16}
    assert len([w for w in told if "GeometryProbe: a step" in str(w.message)]) == 1


def test_a_step_with_few_points_is_passed_over_for_one_with_enough():
    """As the last batch of an epoch: the series stays one of whole batches."""

    class Uneven(Forwards):
        def train_dataloader(self):
            return DataLoader(examples(40), batch_size=32)

    logged, probe, _ = probed(Uneven, {"max_epochs": 8}, num_points=32, every_n_steps=2)
    assert {values["forge/geometry/net.0/num_points"] for values in logged.values()} == {32}
    assert list(logged) == [3, 5, 7, 9, 11, 13, 15]
    assert probe._taps_batches


def test_a_held_out_probe_of_a_batch_that_forward_does_not_take_says_so():
    class Two(Forwards):
        def forward(self, x, y):
            return self.net(x)

    with pytest.raises(MisconfigurationException, match=r"calls `Two.forward\(x, y\)`.*`probe_forward"):
        probed(Two, source="train")


@pytest.mark.parametrize("argument", ["source", "positions"])
def test_a_misspelt_choice_is_refused(argument):
    with pytest.raises(ValueError, match=rf"`GeometryProbe\({argument}='trian'\)` must be one of"):
        GeometryProbe(**{argument: "trian"})


def test_scikit_dimension_is_a_backend():
    both = ("skdim:MLE", "levina_bickel")
    logged, *_ = probed(with_batches_of(64), layers=["net.0"], num_points=64, estimators=both, every_n_steps=1)
    values = logged[1]
    ours = values["forge/geometry/net.0/levina_bickel"]
    assert values["forge/geometry/net.0/skdim:MLE"] == pytest.approx(ours, rel=1e-4)


def test_bf16_activations_give_about_the_same():
    reference, *_ = probed(with_batches_of(32), layers=["net.0"])
    bf16, *_ = probed(with_batches_of(32), layers=["net.0"], trainer={"precision": "bf16-mixed"})
    for name in ("levina_bickel", "participation_ratio"):
        key = f"forge/geometry/net.0/{name}"
        assert bf16[2][key] == pytest.approx(reference[2][key], rel=0.05)


def test_weight_averaging_does_not_disturb():
    reference, *_ = probed(with_batches_of(32), trainer={"max_epochs": 2})
    collects, probe = Collects(), GeometryProbe(every_n_steps=2, num_points=32, max_overhead=None)
    fit([EMAWeightAveraging(), probe, collects], with_batches_of(32), max_epochs=2)
    close(reference, collects.logged)


@pytest.mark.parametrize("called_before", [False, True])
def test_compiled_modules_are_probed_the_same_and_stay_whole(called_before):
    """Every operation is in one graph, which is made once."""
    graphs = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return self.head(x)

    def backend(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    class Whole(with_batches_of(32)):
        def __init__(self):
            super().__init__()
            self.net = Net()

    class Compiled(Whole):
        def __init__(self):
            super().__init__()
            torch.compiler.reset()
            graphs.clear()
            self.net.compile(backend=backend, fullgraph=True)
            if called_before:
                self.net(torch.randn(32, 8))

    reference, *_ = probed(Whole)
    without, _ = fit([], Compiled)
    alone = list(graphs)
    compiled, _, model = probed(Compiled)
    close(reference, compiled)
    assert graphs == alone
    assert torch.equal(weights(model), weights(without))


def tiny(**options):
    torch.manual_seed(0)
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 50}
    return ForgeModule(config=config | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, **options)


def texts(padding=0):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (16, 16), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[:, -padding:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    rows = [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(ids, mask, labels, strict=True)]
    return DataLoader(rows, batch_size=8)


def language_model(data=None, **options):
    collects, probe = Collects(), GeometryProbe(every_n_steps=1, num_points=64, max_overhead=None)
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        max_steps=2,
        callbacks=[probe, collects],
        logger=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tiny(**options), data or texts(), texts())
    return collects.logged, probe


def test_language_models_are_probed_by_block_and_gradient_checkpointing_changes_nothing():
    logged, _ = language_model()
    assert {key.split("/")[2] for key in logged[1]} == {"model.transformer.h.0", "model.transformer.h.1"}
    assert all(math.isfinite(v) for v in logged[1].values())
    close(logged, language_model(gradient_checkpointing=True)[0])


def test_padding_changes_no_estimate():
    """What stands in the padding is not looked at: other tokens there, the same dimensions."""
    logged, _ = language_model(texts(padding=6))
    loader = texts(padding=6)
    for row in loader.dataset:
        row["input_ids"][-6:] = 3
    close(logged, language_model(loader)[0])
    assert logged[1]["forge/geometry/model.transformer.h.0/num_points"] == 64


def test_an_unknown_layer_lists_near_ones():
    with pytest.raises(MisconfigurationException, match=r"No layer is called 'net\.7'. Close: \['net"):
        probed(layers=["net.7"])


def test_activations_that_are_not_finite_give_nan_and_one_warning():
    class Breaks(Plain):
        def loss(self, batch):
            return self.net(batch[0] * math.nan).sum()

    with pytest.warns(UserWarning, match="the points are not finite") as caught:
        logged, *_ = probed(Breaks, num_points=8, estimators=("two_nn",), trainer={"max_epochs": 2})
    assert sum("not finite" in str(w.message) for w in caught) == 1
    (values, *_) = logged.values()
    assert math.isnan(values["forge/geometry/net.0/two_nn"])


def test_overhead_is_the_fastest_probe_over_the_steps_between():
    probe = GeometryProbe()
    probe._pace.probe_seconds.extend([0.3, 0.1, 0.2])
    probe._pace.step_seconds.extend([0.01, 0.02, 0.06])
    assert probe._pace.overhead(10) == pytest.approx(0.1 / (10 * 0.02))


class Forwards(Plain):
    def forward(self, x):
        assert not self.training
        return self.net(x)


def test_a_held_out_probe_is_the_same_points_each_time_in_evaluation_mode():
    class Frozen(Forwards):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    for source in ("train", "val"):
        logged, _, model = probed(Frozen, source=source, trainer={"max_epochs": 2})
        assert len(logged) == 1  # never another value
        assert model.training
    logged, *_ = probed(Forwards, source="val", trainer={"max_epochs": 2})
    assert len(logged) == 8


def test_a_held_out_probe_leaves_training_as_it_was():
    class Random(Stateful):
        def forward(self, x):
            return self.net(x + torch.rand_like(x))

    plain, _ = fit([], Random, max_epochs=2)
    _, _, observed = probed(Random, source="train", trainer={"max_epochs": 2})
    assert torch.equal(weights(plain), weights(observed))


class _Noisy(Dataset):
    """Draws from generators of its own, one of them in a list of transforms."""

    def __init__(self):
        self.own = torch.Generator().manual_seed(0)
        self.transforms = [SimpleNamespace(random=np.random.default_rng(0)), SimpleNamespace(random=random.Random(0))]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        noise = [transform.random.random() for transform in self.transforms]
        return torch.randn(8, generator=self.own) + sum(noise), index % 2


class LeavesTraces(Plain):
    """Logs and counts in `forward`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        self.log("in training" if self.training else "of the probe", x.mean())
        return self.net(x)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        return DataLoader(_Noisy(), batch_size=8)


@pytest.mark.parametrize("source", ["train", "auto"])
def test_a_held_out_probe_undoes_what_forward_and_data_set_leave(source):
    options = {"max_epochs": 2, "limit_val_batches": 0}
    plain, _ = fit([], LeavesTraces, **options)
    logged, _, observed = probed(LeavesTraces, source=source, trainer=options)
    assert any(values["forge/geometry/net.0/num_points"] == 32 for values in logged.values()), "it has run examples"
    assert torch.equal(weights(plain), weights(observed))
    assert torch.equal(plain.calls, observed.calls)
    assert torch.equal(plain.last, observed.last)
    assert "in training" in observed.trainer.callback_metrics
    assert "of the probe" not in observed.trainer.callback_metrics


def test_a_held_out_probe_says_what_it_needs():
    with pytest.raises(MisconfigurationException, match="has no `forward`"):
        probed(LossOnly, source="val")


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


def test_a_stream_cannot_be_drawn_from():
    class Streams(Forwards):
        def val_dataloader(self):
            return DataLoader(_Stream(), batch_size=8)

    with pytest.raises(MisconfigurationException, match="Use `source='batch'`"):
        probed(Streams, source="val")


def test_a_module_may_say_how_it_is_probed():
    class Says(Plain):
        def probe_forward(self, batch):
            self.net(batch[0])

    logged, *_ = probed(Says, source="val")
    assert logged


def test_too_costly_a_probe_comes_less_often_and_says_so():
    with pytest.warns(UserWarning, match=r"It comes every \d+ steps from here on, not every 2, to stay within"):
        logged, probe, _ = probed(max_overhead=1e-5, num_points=8, estimators=("two_nn",), trainer={"max_epochs": 4})
    assert probe._pace.interval > 100
    assert len(logged) < 8


def test_a_cheap_probe_keeps_its_interval():
    logged, *_ = probed(with_batches_of(32), max_overhead=1e3, trainer={"max_epochs": 2})
    assert list(logged) == [2, 4]


def test_resume_probes_what_would_have_been_probed(tmp_path):
    def run(**kwargs):
        options = {"layers": ["net.0"], "estimators": ("two_nn", "participation_ratio"), "max_overhead": None}
        collects, probe = Collects(), GeometryProbe(every_n_steps=3, num_points=8, **options)
        fit([probe, collects, RNGState(), *kwargs.pop("more", [])], Stateful, **kwargs)
        return collects.logged, probe

    straight, probe = run(max_epochs=3)
    run(max_epochs=1, more=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    resumed, again = run(max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    close({step: straight[step] for step in resumed}, resumed, tolerance=1e-9)
    assert list(resumed) == [step for step in straight if step > 8]
    assert again.state_dict()["detectors"] == probe.state_dict()["detectors"]


def test_a_fall_of_the_dimension_is_an_event_that_survives():
    """Activations that lose their directions one after another."""

    class Collapses(with_batches_of(32)):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Identity(), nn.Linear(8, 2))

        def loss(self, batch):
            scale = torch.ones(8, device=self.device)
            scale[1:] = 1.0 if self.global_step < 60 else 1e-3
            return super().loss((batch[0] * scale, batch[1])) * (1.0 if self.global_step < 3 else 0.01)

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    logged, probe, _ = probed(Collapses, layers=["net.0"], every_n_steps=1, trainer={"max_epochs": 50})
    (event,) = probe.events
    assert 60 < event["step"] <= 75
    assert (event["layer"], event["direction"], event["kind"]) == ("net.0", "down", "geometry")
    assert logged[event["step"]]["forge/geometry/net.0/change"] == pytest.approx(-event["confidence"])
    fresh = GeometryProbe(every_n_steps=1)
    fresh.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    assert fresh.events == probe.events


def test_a_layer_that_is_not_called_gives_nan_and_is_named():
    class Idle(with_batches_of(32)):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 8)

    with pytest.warns(UserWarning, match="'idle' was not called"):
        logged, *_ = probed(Idle, layers=["net.0", "idle"])
    assert math.isnan(logged[2]["forge/geometry/idle/two_nn"])
    assert math.isfinite(logged[2]["forge/geometry/net.0/two_nn"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"num_points": 2}, "num_points=2"),
        ({"max_overhead": 0.0}, "max_overhead=0.0"),
        ({"estimators": ()}, "at least one"),
        ({"estimators": ("twonn",)}, "Close: .*two_nn"),
        ({"estimators": ("skdim:Nothing",)}, "skdim:MLE"),
        ({"change_estimator": "pca"}, "change_estimator='pca'"),
        ({"relative_change": 1.0}, "relative_change=1.0"),
    ],
)
def test_bad_arguments_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        GeometryProbe(**options)


def test_two_processes_give_the_estimates_of_one(tmp_path):
    """The same rows, half of them on each rank: relative difference at most 1e-6, as one table on both ranks."""
    one, *_ = probed(with_batches_of(32), num_points=32, every_n_steps=1)
    process = processes.run_module("tests.geometry.two_processes", tmp_path, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    tables = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert tables[0] == tables[1]
    close({int(step): values for step, values in tables[0].items()}, one, tolerance=1e-6)


class _Opens(Dataset):
    """Opens its file in whatever process asks first."""

    opened = None

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.opened = os.getpid() if self.opened is None else self.opened
        return torch.randn(8, generator=torch.Generator().manual_seed(index)), index % 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_held_out_probe_of_data_with_workers_opens_nothing_here():
    class Worked(Forwards):
        def train_dataloader(self):
            self.data = _Opens()
            return DataLoader(self.data, batch_size=8, num_workers=1)

    logged, _, model = probed(Worked, source="train", trainer={"limit_train_batches": 2, "limit_val_batches": 0})
    assert len(logged) == 1
    assert model.data.opened is None


class SplitsInHook(Forwards):
    """Makes validation data with the global random stream."""

    def val_dataloader(self):
        return DataLoader(random_split(super().val_dataloader().dataset, [32, 32])[0], batch_size=8)


def test_a_validation_probe_waits_for_validation_data():
    options = {"max_epochs": 3, "check_val_every_n_epoch": 2}
    logged, _, observed = probed(SplitsInHook, source="val", trainer=options)
    assert next(iter(logged)) == 17
    plain, _ = fit([], SplitsInHook, **options)
    assert torch.equal(weights(plain), weights(observed))


def test_a_loader_with_a_batch_sampler_is_drawn_from_in_batches():
    class Sampled(Forwards):
        def val_dataloader(self):
            data = examples(256)
            return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 32, False))

    logged, *_ = probed(Sampled, source="val", num_points=200, layers=["net.0"])
    assert logged[2]["forge/geometry/net.0/num_points"] == 200


def test_a_layer_that_cannot_be_tapped_is_refused():
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.net.insert(0, nn.Flatten(0))
            self.net.insert(1, nn.Unflatten(0, (-1, 8)))

    with pytest.raises(MisconfigurationException, match=r"`GeometryProbe`: Layer 'net.0' returns \(64,\)"):
        probed(Odd, layers=["net.0"])


@pytest.mark.filterwarnings("ignore:GeometryProbe. a probe takes .* It comes every:UserWarning")
def test_a_costly_probe_takes_fewer_points_and_keeps_them_over_a_resume(monkeypatch):
    monkeypatch.setattr("forge_lightning.geometry.pace._FEWEST", 8)
    monkeypatch.setattr("forge_lightning.geometry.pace.ProbePace.overhead", lambda self, interval=None: 0.32)
    with pytest.warns(UserWarning, match="It takes 16 points from here on, not 32"):
        logged, probe, _ = probed(
            with_batches_of(32), max_overhead=0.02, estimators=("two_nn",), trainer={"max_epochs": 8}
        )
    counts = [values["forge/geometry/net.0/num_points"] for values in logged.values()]
    assert counts[:2] == [32, 32]
    assert set(counts[2:]) == {16}
    again = GeometryProbe(num_points=32)
    again.load_state_dict(probe.state_dict())
    assert again._points == 16
    again.reset()
    assert again._points == 32
