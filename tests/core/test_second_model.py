"""One callback used for several models, as for folds or seeds: the second is fitted as with a new callback."""

import copy
import pickle

import pytest
import torch

from forge_lightning.callbacks import (
    Calibration,
    GeometryProbe,
    Grokfast,
    RunSummary,
    SelfModel,
    StageClassifier,
    Telemetry,
    TemperatureCurriculum,
)
from tests.contract.modules import LossOnly
from tests.contract.rows import fit, weights

MAKE = {
    "Calibration": Calibration,
    "GeometryProbe": lambda: GeometryProbe(every_n_steps=2, num_points=8, estimators=["two_nn"], max_overhead=None),
    "Grokfast": Grokfast,
    "RunSummary": lambda: RunSummary(monitor="val/loss", mode="min"),
    "SelfModel": SelfModel,
    "StageClassifier": lambda: StageClassifier(cross_entropy=True),
    "Telemetry": Telemetry,
    "TemperatureCurriculum": TemperatureCurriculum,
}


class Worse(LossOnly):
    def loss(self, batch):
        return super().loss(batch) + 1.0


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            equal(a[k], b[k]) for k in a if k not in ("seconds", "interval", "next_due")
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MAKE)
def test_a_second_model_is_fitted_as_with_a_new_callback(name):
    used, fresh = MAKE[name](), MAKE[name]()
    fit([used], LossOnly, max_epochs=3, log_every_n_steps=1)
    second, trainer = fit([used], Worse, max_epochs=3, log_every_n_steps=1)
    expected, reference = fit([fresh], Worse, max_epochs=3, log_every_n_steps=1)
    assert torch.equal(weights(second), weights(expected))
    assert equal(used.state_dict(), fresh.state_dict())
    for key, value in reference.callback_metrics.items():
        if not key.endswith(("seconds", "per_second", "overhead", "memory")):
            torch.testing.assert_close(trainer.callback_metrics[key], value, equal_nan=True)


def test_the_same_model_goes_on():
    callback = Grokfast(schedule="constant")
    model, _ = fit([callback], LossOnly)
    fit([callback], model)
    assert callback._filters[0].steps == 16


@pytest.mark.parametrize("name", MAKE)
def test_a_used_callback_can_be_copied_and_pickled(name):
    callback = MAKE[name]()
    fit([callback], LossOnly, limit_val_batches=0, max_steps=1)
    copy.deepcopy(callback)
    pickle.loads(pickle.dumps(callback))
