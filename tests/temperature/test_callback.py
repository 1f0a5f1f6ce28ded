"""Agreement at temperatures, on LightningModules; what holds for every callback is in tests/contract."""

import math
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from forge_lightning.callbacks import SelfModel, TemperatureCurriculum
from forge_lightning.models import ForgeModule
from forge_lightning.temperature.functional import temperature_kl
from tests.contract.modules import Binary, LossOnly, Plain, Stateful, examples
from tests.contract.rows import fit, weights
from tests.self_model.test_callback import GPT2, train
from tests.self_model.test_callback import text as text  # a fixture

FIXED = {"bins": [(2.0, 2.0001)], "overlap": 0.0, "warmup_steps": 0}


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 8), (0.3, 3)])
def test_steps_are_those_of_the_formula(fraction, count):
    """Against a loop written out: (1 - w) · CE + w · τ² KL, with a mean of the weights that follows each step.

    Of the eight rows of a batch some are compared, from where those of the step before ended.
    """
    temperatures = []

    class Looks(TemperatureCurriculum):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            temperatures.append(self.temperature)

    logged = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(float(trainer.callback_metrics["forge/temperature/kl"]))

    callback = Looks(weight=0.4, teacher_decay=0.9, fraction=fraction, **FIXED)
    ours, _ = fit([callback, Reads()], Plain, log_every_n_steps=1)
    start, _ = fit((), Plain, max_steps=0)
    student, teacher = start.net, type(start)().net
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for n, (x, y) in enumerate(start.train_dataloader(), start=1):
        rows = [(count * (n - 1) + place) % 8 for place in range(count)]
        logits = student(x)
        with torch.no_grad():
            goal = teacher(x)
        kl = temperature_kl(logits[rows], goal[rows], temperatures[n - 1]).mean()
        assert logged[n - 1] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
        loss = 0.6 * F.cross_entropy(logits, y) + 0.4 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.9, (1 + n) / (10 + n))
        with torch.no_grad():
            for mean, p in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
    assert all(2.0 <= t <= 2.0001 for t in temperatures)
    torch.testing.assert_close(weights(ours), weights(start), atol=1e-6, rtol=1e-5)


def test_a_fraction_of_a_language_model_costs_that_share_of_rows(text):
    sizes = []

    class Counts(ForgeModule):
        def configure_model(self):
            super().configure_model()
            self.model.register_forward_pre_hook(
                lambda module, args, kwargs: sizes.append((module.training, len(kwargs["input_ids"]))), with_kwargs=True
            )

    train(Counts(config=GPT2), text(), [TemperatureCurriculum(fraction=0.25)], max_steps=3, limit_val_batches=0)
    (whole,) = {count for training, count in sizes if training}
    assert [count for training, count in sizes if not training] == 3 * [whole // 4]


def test_rows_that_cannot_be_told_apart_are_refused():
    class Half(nn.Linear):
        """Puts out half as many rows as come in."""

        def forward(self, x):
            return super().forward(x[: len(x) // 2])

    class Halved(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = Half(8, 2)

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.net(x), y[: len(y) // 2])

    refused = r"called with 8 rows, and what belongs to them is \(4, 2\). Set `fraction=1`"
    with pytest.raises(MisconfigurationException, match=refused):
        fit([TemperatureCurriculum(fraction=0.5, labels=None)], Halved, limit_val_batches=0)


def test_only_labelled_tokens_count(text):
    """What the labels leave out changes nothing, whatever stands there."""

    class Half(ForgeModule):
        noise = 0

        def training_step(self, batch, batch_idx):
            batch["labels"][:, 8:] = -100
            batch["input_ids"][:, 9:] = (batch["input_ids"][:, 9:] + self.noise) % 50  # after all that has a label
            return super().training_step(batch, batch_idx)

    found = []
    for noise in (0, 7):
        module = Half(config=GPT2)
        module.noise = noise
        found.append(weights(train(module, text(), [TemperatureCurriculum(**FIXED)])[0]))
    torch.testing.assert_close(*found)


def test_no_generation_and_one_teacher_call_a_step(text, monkeypatch):
    calls = {"forward": 0, "generate": 0}
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(
        GPT2LMHeadModel, "forward", lambda *a, **k: calls.update(forward=calls["forward"] + 1) or forward(*a, **k)
    )
    monkeypatch.setattr(GPT2LMHeadModel, "generate", lambda *a, **k: calls.update(generate=calls["generate"] + 1))
    train(ForgeModule(config=GPT2), text(), [TemperatureCurriculum()], max_steps=5, limit_val_batches=0)
    assert calls == {"forward": 10, "generate": 0}


def test_self_model_beside_it_in_any_order(text):
    """The teacher's activations are not the network's own, and each term sees the module's own loss."""
    results = []
    for order in (1, -1):
        callbacks = [SelfModel(warmup_steps=0), TemperatureCurriculum(warmup_steps=0)][::order]
        module, trainer = train(ForgeModule(config=GPT2), text(), callbacks, log_every_n_steps=1)
        results.append((weights(module), float(trainer.callback_metrics["forge/self_model/loss"])))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_walks_the_bins_by_validation_then_draws_from_all():
    seen = []

    class Looks(TemperatureCurriculum):
        def on_validation_epoch_end(self, *args):
            super().on_validation_epoch_end(*args)
            seen.append((self._schedule.round, self._schedule.index, self.temperature))

    class Worsens(LossOnly):
        """No learning: no bin improves."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = Looks(bins=[(2, 4), (0.5, 1)], patience=2, max_steps_per_bin=1000)
    _, trainer = fit([callback], Worsens, max_epochs=7)
    assert [place[:2] for place in seen] == [(1, 0), (1, 0), (1, 1), (1, 1), (1, 1), (2, 1), (2, 1)]
    assert float(trainer.callback_metrics["forge/temperature/2-4/nll"]) > 0


def test_round_one_takes_half_the_training_at_most():
    rounds = []

    class Looks(TemperatureCurriculum):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            rounds.append(self._schedule.round)

    fit([Looks(patience=1000)], max_epochs=6)  # 48 steps, three bins
    assert rounds.index(2) == 24 - 1


def test_measures_are_those_of_the_whole_validation_set():
    model, trainer = fit([TemperatureCurriculum(bins=[(2, 8)], patience=1000)], limit_val_batches=None)
    with torch.no_grad():
        batches = [(model.eval().net(x), y) for x, y in model.val_dataloader()]
        logits, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert float(trainer.callback_metrics["forge/temperature/2-8/nll"]) == pytest.approx(
        float(F.cross_entropy(logits / 4, y)), rel=1e-5
    )
    accuracy = float((logits.argmax(-1) == y).float().mean())
    assert float(trainer.callback_metrics["forge/temperature/accuracy"]) == pytest.approx(accuracy)


def test_labels_that_do_not_fit_are_told():
    with pytest.warns(UserWarning, match="validation has no labels that fit the logits, and the bins move on by steps"):
        fit([TemperatureCurriculum(labels=None)])


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("sanity", [0, 1])
def test_regressions_are_refused(outputs, sanity):
    class Regression(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, outputs)

        def loss(self, batch):
            return nn.functional.mse_loss(self.net(batch[0]), 3 * batch[1])

        def train_dataloader(self):
            x, _ = examples().tensors
            return DataLoader(TensorDataset(x, x[:, :outputs]), batch_size=8)

        val_dataloader = train_dataloader

    with pytest.raises(
        MisconfigurationException, match="no classes. This loss term compares distributions over classes"
    ):
        fit([TemperatureCurriculum()], Regression, num_sanity_val_steps=sanity)


def test_a_loss_that_is_no_cross_entropy_is_doubted():
    class Squares(LossOnly):
        def loss(self, batch):
            return nn.functional.mse_loss(self.net(batch[0]).mean(1), 9.0 * batch[1])

    with pytest.warns(UserWarning, match="the cross-entropy of its logits and labels is .*the loss of the step is"):
        fit([TemperatureCurriculum()], Squares, log_every_n_steps=1)


def test_network_that_is_not_called_is_refused_and_one_by_name_acts():
    class Two(LossOnly):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 2)

    named, _ = fit([TemperatureCurriculum(network="net", **FIXED)], Two)
    without, _ = fit((), Two)
    assert not torch.equal(weights(named), weights(without))
    refused = pytest.raises(MisconfigurationException, match="`training_step` did not call Linear with a gradient. Set")
    told = pytest.warns(UserWarning, match="Linear holds 18 of the module's 196 trained weights, and only these have")
    with refused, told:
        fit([TemperatureCurriculum(network="other", **FIXED)], Two)


def test_calls_without_a_gradient_do_not_count():
    """A reference policy, a metric: the network is run again after the loss."""

    class Looks(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net(torch.zeros(3, 8, device=self.device))
            return loss

    looks, _ = fit([TemperatureCurriculum(**FIXED)], Looks)
    plain, _ = fit([TemperatureCurriculum(**FIXED)], Plain)
    assert torch.equal(weights(looks), weights(plain))


def test_two_of_them_are_one_of_their_sum():
    options = FIXED | {"teacher_decay": 0.9}
    two, trainer = fit(
        [TemperatureCurriculum(weight=0.3, **options), TemperatureCurriculum(weight=0.2, name="b", **options)],
        Plain,
        log_every_n_steps=1,
    )
    one, _ = fit([TemperatureCurriculum(weight=0.5, **options)], Plain)
    torch.testing.assert_close(weights(two), weights(one), atol=1e-5, rtol=1e-3)  # τ differs by 1e-4
    kl = [float(trainer.callback_metrics[f"forge/temperature/{name}kl"]) for name in ("", "b/")]
    assert kl[0] == pytest.approx(kl[1], rel=1e-2)
    assert kl[0] > 0
    with pytest.raises(MisconfigurationException, match=r"2 instances with \[0.5, 0.5\] together leave nothing"):
        fit([TemperatureCurriculum(), TemperatureCurriculum(name="b")])


def test_network_without_trained_weights_is_refused():
    class Frozen(LossOnly):
        def __init__(self):
            super().__init__()
            self.net.requires_grad_(False)
            self.bias = nn.Parameter(torch.zeros(2))

        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0]) + self.bias, batch[1])

    with pytest.raises(MisconfigurationException, match="`TemperatureCurriculum`: Sequential has no weights that are"):
        fit([TemperatureCurriculum(network="net")], Frozen)


def test_labels_on_the_wrong_axis_are_refused():
    class ChannelsFirst(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0], batch[1][:, None].repeat(1, 3)]

    with pytest.raises(MisconfigurationException, match=r"the labels are \(8, 3\), the logits \(8, 2, 3\)"):
        fit([TemperatureCurriculum()], ChannelsFirst)


def test_it_travels_to_other_processes():
    settings = {"bins": [(1, 2)], "warmup_steps": 0}
    sent = pickle.loads(pickle.dumps(TemperatureCurriculum(**settings)))
    assert torch.equal(weights(fit([sent])[0]), weights(fit([TemperatureCurriculum(**settings)])[0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": 1.0}, r"weight=1.0\)` must be in \[0, 1\)"),
        ({"weight": -0.1}, "weight=-0.1"),
        ({"teacher_decay": 1.0}, r"teacher_decay=1.0\)` must be in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"fraction": 0.0}, r"fraction=0.0\)` must be in \(0, 1\]"),
        ({"bins": [(1, 0.5)]}, r"`TemperatureCurriculum\(bins=.*low < high"),
        ({"patience": 0}, r"`TemperatureCurriculum\(patience=0\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TemperatureCurriculum(**kwargs)


def test_what_it_cannot_serve():
    with pytest.raises(
        MisconfigurationException, match=r"network='head'\)`: no submodule is called 'head'.*into one module"
    ):
        fit([TemperatureCurriculum(network="head")])

    class Sums(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 2), nn.Flatten(0))

        def loss(self, batch):
            return self.net(batch[0]).square().mean()

    with pytest.raises(MisconfigurationException, match=r"`TemperatureCurriculum`: the network returns \(16,\)"):
        fit([TemperatureCurriculum()], Sums)

    from lightning.pytorch.strategies import FSDPStrategy

    class Fake:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(MisconfigurationException, match="cannot work with FSDPStrategy: weights cannot be exchanged"):
        TemperatureCurriculum().setup(Fake(), nn.Identity(), "fit")


class StartsAtZero(Binary):
    """Puts out 0 before the first step."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net[3].weight)
        nn.init.zeros_(self.net[3].bias)


class TwoOutputs(StartsAtZero):
    """The same as two logits, of which one is always 0."""

    def __init__(self):
        super().__init__()
        self.net.append(Second())

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), (batch[1] > 0).long())


class Second(nn.Module):
    def forward(self, logit):
        return torch.cat([torch.zeros_like(logit), logit], -1)


def test_one_logit_that_starts_at_zero_trains_as_two_logits_do():
    ours = [
        weights(fit([TemperatureCurriculum(warmup_steps=0)], module, max_epochs=3)[0])
        for module in (StartsAtZero, TwoOutputs)
    ]
    torch.testing.assert_close(*ours)


def test_second_fit_of_one_instance_begins_afresh():
    callback = TemperatureCurriculum(**FIXED)
    fit([callback], Stateful)
    again, _ = fit([callback], Stateful)
    fresh, _ = fit([TemperatureCurriculum(**FIXED)], Stateful)
    assert torch.equal(weights(again), weights(fresh))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
def test_compiled_network_gives_the_same_steps():
    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.net.compile(backend="eager")

    plain, _ = fit([TemperatureCurriculum(**FIXED)], Plain)
    compiled, _ = fit([TemperatureCurriculum(**FIXED)], Compiled)
    without, _ = fit((), Plain)
    torch.testing.assert_close(weights(plain), weights(compiled), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(weights(plain), weights(without), atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("edges", [(0.01, 0.0101), (0.05, 0.0501), (3.99, 4.0)])
def test_every_temperature_trains(edges, precision):
    model, trainer = fit(
        [TemperatureCurriculum(bins=[edges], overlap=0.0)], precision=precision, log_every_n_steps=1, max_epochs=2
    )
    assert weights(model).isfinite().all()
    assert math.isfinite(trainer.callback_metrics["forge/temperature/kl"])
    assert float(trainer.callback_metrics["forge/temperature/kl"]) > 0


class Labelled(Plain):
    """Some rows have no label, and one batch has none at all."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, y) if (y != -100).any() else 0.0 * logits.sum()

    def train_dataloader(self):
        x, y = (part.clone() for part in examples().tensors)
        y[::3] = -100
        y[8:16] = -100
        return DataLoader(TensorDataset(x, y), batch_size=8)


def test_choosing_rows_and_weighing_them_give_the_same_steps(monkeypatch):
    """On an accelerator all rows are compared, and those without a label weigh nothing."""
    found = []
    for reads_are_free in (True, False):
        monkeypatch.setattr("forge_lightning.temperature.callback.reads_are_free", lambda device, to=reads_are_free: to)
        model, trainer = fit(
            [TemperatureCurriculum(weight=0.4, teacher_decay=0.9, **FIXED)], Labelled, log_every_n_steps=1
        )
        found.append((weights(model), float(trainer.callback_metrics["forge/temperature/kl"])))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_rows_that_weigh_nothing_pass_no_gradient_whatever_they_hold():
    student = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]], requires_grad=True)
    divergences = temperature_kl(student, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1.0)
    torch.where(torch.tensor([True, False]), divergences, 0.0).sum().backward()
    assert student.grad[0].abs().sum() > 0
    assert torch.equal(student.grad[1], torch.zeros(2))
