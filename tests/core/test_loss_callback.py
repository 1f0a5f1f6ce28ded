"""The bases of callbacks that add to the loss."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from forge_lightning.core import loss_callback
from forge_lightning.core.loss_callback import LogitLossCallback, LossCallback
from tests.contract.modules import LossOnly, Plain, Regression, TwoOptimizers, examples
from tests.contract.rows import fit, weights


class NegativeEntropy(LogitLossCallback):
    namespace = "entropy"

    def __init__(self, **options):
        super().__init__(**options)
        self.rows = []

    def logit_loss(self, logits, labels):
        self.rows.append((logits.detach(), labels))
        p = logits.softmax(-1)
        self.record("mean", -(p * p.log()).sum(-1))
        return (p * p.log()).sum(-1).mean()


class Strict(NegativeEntropy):
    needs_labels = True


class Unlabelled(Plain):
    def train_dataloader(self):
        return torch.utils.data.DataLoader([{"x": x} for x, _ in zip(*examples().tensors, strict=True)], batch_size=8)

    def loss(self, batch):
        return self.net(batch["x"] if isinstance(batch, dict) else batch[0]).square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_number_is_the_mean_over_micro_batches(accumulate):
    logged = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(float(trainer.callback_metrics.get("forge/entropy/mean", torch.nan)))

    callback = NegativeEntropy()
    fit([callback, Reads()], Plain, log_every_n_steps=1, accumulate_grad_batches=accumulate)
    entropies = [float(-(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()) for x, _ in callback.rows]
    assert logged[accumulate - 1] == pytest.approx(sum(entropies[:accumulate]) / accumulate, rel=1e-5)
    assert logged[-1] == pytest.approx(sum(entropies[-accumulate:]) / accumulate, rel=1e-5)


def test_term_is_added_to_the_loss():
    """With the term scaled by 0 the weights are those of a run without; with it they are not."""

    class Nothing(NegativeEntropy):
        def logit_loss(self, logits, labels):
            return 0 * super().logit_loss(logits, labels)

    without, with_nothing, with_term = (weights(fit(c, Plain)[0]) for c in ([], [Nothing()], [NegativeEntropy()]))
    torch.testing.assert_close(without, with_nothing)
    assert not torch.allclose(without, with_term)


def test_manual_optimization_gets_the_term():
    callback = NegativeEntropy()
    fit([callback], TwoOptimizers)
    assert callback.rows


def test_batches_without_labels_are_refused_where_labels_are_needed():
    fit([callback := NegativeEntropy()], Unlabelled)
    assert callback.rows[0][1] is None
    with pytest.raises(MisconfigurationException, match="`Strict`: the batch has no labels of the usual names"):
        fit([Strict()], Unlabelled)


def test_term_that_is_no_scalar_is_refused():
    class Vector(NegativeEntropy):
        def logit_loss(self, logits, labels):
            return logits.sum(-1)

    with pytest.raises(MisconfigurationException, match=r"`Vector`: `logit_loss` returned \(8,\), and must return a"):
        fit([Vector()], Plain)


def test_regressions_are_refused():
    with pytest.raises(MisconfigurationException, match="This loss term compares distributions over classes"):
        fit([NegativeEntropy()], Regression)


def test_network_that_is_not_called_is_refused():
    class Elsewhere(LossOnly):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match="did not call Linear with a gradient. Set `network`"):
        fit([NegativeEntropy(network="unused")], Elsewhere)


def test_term_of_no_logits_is_refused_where_it_never_acts():
    class Idle(LossCallback):
        namespace = "idle"

        def added(self, loss):
            return None

    with pytest.raises(MisconfigurationException, match="`Idle` cannot work with Plain: its"):
        fit([Idle()], Plain)


def test_a_subclass_without_its_method_is_named():
    class Empty(LossCallback):
        namespace = "empty"

    class NoTerm(LogitLossCallback):
        namespace = "no_term"

    for callback, method in ((Empty(), "added"), (NoTerm(), "logit_loss")):
        with pytest.raises(NotImplementedError, match=f"`{type(callback).__name__}` has to define `{method}`"):
            fit([callback], Plain)


def test_a_number_that_is_nan_in_some_micro_batches_or_on_some_ranks_is_left_out(monkeypatch):
    class Sometimes(NegativeEntropy):
        def logit_loss(self, logits, labels):
            self.record("some", torch.tensor(float("nan") if self._trainer.global_step % 2 else 3.0))
            self.record("never", torch.tensor(float("nan")))
            return 0.0 * logits.sum()

    given = []
    monkeypatch.setattr(loss_callback, "mean_over_ranks", lambda trainer, numbers: given.append(numbers) or numbers)
    _, trainer = fit([Sometimes()], max_steps=2, log_every_n_steps=1)
    assert given == [{"some": 3.0}, {}], "no NaN goes into the mean over ranks"
    key = Sometimes.namespace
    assert math.isnan(trainer.callback_metrics[f"forge/{key}/never"])
    assert math.isnan(trainer.callback_metrics[f"forge/{key}/some"])
