import math

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from forge_lightning.calibration import metrics as calibration
from forge_lightning.calibration.metrics import CalibrationMetric, FittedTemperature
from tests.calibration.test_functional import draw


def test_batches_add_up_to_the_whole_and_to_torchmetrics():
    logits, target = draw(300)
    whole, parts = CalibrationMetric(), CalibrationMetric()
    theirs = MulticlassCalibrationError(7, n_bins=15, norm="l1")
    whole.update(logits, target)
    for part, labels in zip(logits.split(37), target.split(37), strict=True):
        parts.update(part, labels)
        theirs.update(part.softmax(-1), labels)
    for name, value in whole.compute().items():
        assert float(value) == pytest.approx(float(parts.compute()[name]), rel=1e-6)
    assert float(parts.compute()["ece"]) == pytest.approx(float(theirs.compute()), abs=1e-6)
    assert {tuple(state.shape) for state in (parts.bins, parts.sums)} == {(3, 15), (4,)}  # however many came


def test_values_against_torch():
    logits, target = draw(300)
    metric = CalibrationMetric(temperature=2.0)
    metric.update(logits, target)
    found = metric.compute()
    probs = (logits / 2).softmax(-1)
    assert float(found["nll"]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits / 2, target)), rel=1e-5)
    assert float(found["entropy"]) == pytest.approx(float(-(probs * probs.log()).sum(-1).mean()), rel=1e-5)
    assert float(found["p_correct"]) == pytest.approx(float(probs.gather(1, target[:, None]).mean()), rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx(float((probs.argmax(-1) == target).float().mean()))
    assert float(found["confidence"]) == pytest.approx(float(probs.amax(-1).mean()), rel=1e-5)


def test_logits_are_worked_on_in_pieces(monkeypatch):
    logits, target = draw(300)
    metrics = [CalibrationMetric(), FittedTemperature()]
    for metric in metrics:
        metric.update(logits, target)
    expected = [metric.compute() for metric in metrics]
    monkeypatch.setattr(calibration, "_CHUNK", 7 * 11)
    for metric, values in zip([CalibrationMetric(), FittedTemperature()], expected, strict=True):
        metric.update(logits, target)
        for name, value in metric.compute().items():
            assert float(value) == pytest.approx(float(values[name]), rel=1e-6)


def test_entropy_of_a_certain_model_is_zero():
    metric = CalibrationMetric()
    metric.update(torch.tensor([[0.0, -math.inf], [0.0, -math.inf]]), torch.tensor([0, 0]))
    assert float(metric.compute()["entropy"]) == 0
    assert float(metric.compute()["nll"]) == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_nothing_gives_nan():
    assert all(math.isnan(value) for value in CalibrationMetric().compute().values())
    assert all(math.isnan(value) for value in FittedTemperature().compute().values())
    assert CalibrationMetric().is_empty


def test_broken_logits_give_no_plausible_number():
    logits, target = draw(50)
    logits[3, 2] = math.nan
    metric, fitted = CalibrationMetric(), FittedTemperature()
    metric.update(logits, target)
    fitted.update(logits, target)
    assert all(math.isnan(value) for value in metric.compute().values())
    assert math.isnan(fitted.compute()["temperature"])
    logits, target = draw(50)
    logits[3, target[3]] = -math.inf
    metric, fitted = CalibrationMetric(), FittedTemperature()
    metric.update(logits, target)
    fitted.update(logits, target)
    assert float(metric.compute()["nll"]) == math.inf
    assert math.isfinite(metric.compute()["ece"])
    assert math.isnan(fitted.compute()["temperature"])


def test_sharp_model_gets_a_temperature_above_one():
    logits, _ = draw(4000)
    target = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    fitted = {}
    for factor in (0.5, 1.0, 3.0):
        metric = FittedTemperature(max_rows=None)
        metric.update(factor * logits, target)
        fitted[factor] = metric.compute()
    for factor, found in fitted.items():
        assert float(found["temperature"]) == pytest.approx(factor, rel=0.05)
        assert float(found["nll"]) == pytest.approx(float(fitted[1.0]["nll"]), rel=1e-4)


def test_at_most_so_many_rows_of_a_batch():
    logits, target = draw(300)
    metric = FittedTemperature(max_rows=10)
    metric.update(logits, target)
    assert float(metric.rows) == 10


def test_sums_over_processes():
    logits, target = draw(300)
    whole, mine, theirs = (CalibrationMetric() for _ in range(3))
    whole.update(logits, target)
    mine.update(logits[:100], target[:100])
    theirs.update(logits[100:], target[100:])
    states = {tuple(t.shape): t for t in (theirs.bins, theirs.sums)}
    mine.sum_over_processes(lambda t: t + states[tuple(t.shape)])
    for name, value in whole.compute().items():
        assert float(value) == pytest.approx(float(mine.compute()[name]), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationMetric(temperature=0), "temperature=0.*above 0"),
        (lambda: CalibrationMetric(num_bins=0), "num_bins=0.*at least 1"),
        (lambda: FittedTemperature(low=2, high=1), "0 < low < high"),
        (lambda: FittedTemperature(grid=2), "grid=2.*at least 3"),
        (lambda: FittedTemperature(max_rows=0), "max_rows=0.*at least 1, or None"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
