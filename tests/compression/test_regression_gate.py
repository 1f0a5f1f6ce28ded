"""RegressionGate: what is compared, and what follows."""

import json
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from forge_lightning.callbacks import RegressionGate
from tests.compression.baseline import with_example_losses
from tests.contract.modules import LossOnly, examples
from tests.contract.rows import fit, weights

Module = with_example_losses(LossOnly)


class Reordered(Module):
    """The same validation examples, in another order and in larger batches."""

    def val_dataloader(self):
        data = examples()
        return DataLoader([data[place] for place in reversed(range(64))], batch_size=16)


def run(gate, module=Module, **options):
    return fit([gate], module, limit_val_batches=1.0, **options)


def shifted(path, by):
    content = json.loads(path.read_text())
    content["losses"] = {key: value + by for key, value in content["losses"].items()}
    path.write_text(json.dumps(content))


def test_the_first_run_writes_a_baseline(tmp_path):
    path = tmp_path / "kept" / "baseline.json"
    model, trainer = run(RegressionGate(str(path)))
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert len(content["losses"]) == 64
    x, y = examples().tensors
    losses = torch.nn.functional.cross_entropy(model.eval().net(x), y, reduction="none")
    assert sorted(content["losses"].values()) == pytest.approx(sorted(losses.tolist()), abs=1e-6)
    assert content["step_seconds"] > 0
    assert math.isnan(trainer.callback_metrics["forge/regression/loss_upper"])


def test_an_equal_run_differs_by_nothing(tmp_path):
    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    before = path.read_text()
    for module in (Module, Reordered):
        _, trainer = run(RegressionGate(str(path), action="fail"), module)
        assert float(trainer.callback_metrics["forge/regression/loss_difference"]) == pytest.approx(0, abs=1e-6)
        assert float(trainer.callback_metrics["forge/regression/loss_upper"]) == pytest.approx(0, abs=1e-6)
        assert float(trainer.callback_metrics["forge/regression/step_ratio"]) > 0
    assert path.read_text() == before


def test_what_is_logged_by_value(tmp_path):
    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    content = json.loads(path.read_text())
    keys = list(content["losses"])
    for key in keys[:32]:
        content["losses"][key] -= 0.2
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"RegressionGate: perplexity may be 12\.\d% above the baseline's"):
        _, trainer = run(RegressionGate(str(path)), logger=CSVLogger(tmp_path, name="", version=""))
    assert float(trainer.callback_metrics["forge/regression/loss_difference"]) == pytest.approx(0.1, abs=1e-5)
    deviation = 0.1 * math.sqrt(64 / 63)
    expected = 0.1 + 1.6694 * deviation / 8
    assert float(trainer.callback_metrics["forge/regression/loss_upper"]) == pytest.approx(expected, abs=1e-4)


def test_actions(tmp_path):
    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    shifted(path, -0.5)
    with pytest.warns(UserWarning, match="training stops"):
        _, trainer = run(RegressionGate(str(path), action="stop"), max_epochs=5)
    assert trainer.current_epoch == 1
    with pytest.raises(MisconfigurationException, match=r"RegressionGate`: perplexity may be 6\d\.\d% above"):
        run(RegressionGate(str(path), action="fail"))
    shifted(path, +1.0)  # better than the baseline
    run(RegressionGate(str(path), action="fail"))


class Diverges(Module):
    def validation_step(self, batch, batch_idx):
        losses = super().validation_step(batch, batch_idx)["example_loss"]
        return {"example_loss": torch.where(torch.arange(len(losses)) < 4, torch.nan, losses)}


def test_losses_that_are_not_finite_are_worse(tmp_path):
    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    with pytest.raises(MisconfigurationException, match="some are not finite"):
        run(RegressionGate(str(path), action="fail"), Diverges)
    with pytest.warns(UserWarning, match="is not written"):
        run(RegressionGate(str(tmp_path / "new.json")), Diverges)
    assert not (tmp_path / "new.json").exists()


def test_a_failing_gate_lets_other_callbacks_end(tmp_path):
    ended = []

    class Later(Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append(True)

    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    shifted(path, -0.5)
    with pytest.raises(MisconfigurationException, match="above the baseline"):
        fit([RegressionGate(str(path), action="fail"), Later()], Module, limit_val_batches=1.0)
    assert ended == [True]


def test_slow_steps_are_judged_where_asked(tmp_path):
    path = tmp_path / "baseline.json"
    run(RegressionGate(str(path)))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"step_seconds": 1e-9}))
    run(RegressionGate(str(path), action="fail"))
    with pytest.raises(MisconfigurationException, match="times the baseline's CPU time"):
        run(RegressionGate(str(path), max_slowdown=0.5, action="fail"))


def test_other_data_is_said(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"format": 1, "losses": {"x": 1.0}, "step_seconds": None}))
    with pytest.warns(UserWarning, match="other validation data: 0 of its 1 examples occur|cannot be compared"):
        _, trainer = run(RegressionGate(str(path)))
    assert math.isnan(trainer.callback_metrics["forge/regression/loss_difference"])


def test_a_module_without_losses_is_said(tmp_path):
    with pytest.warns(UserWarning, match="returns no `example_loss`"):
        run(RegressionGate(str(tmp_path / "baseline.json")), LossOnly)
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2, "losses": {}, "step_seconds": 1}', '{"losses": 3}'])
def test_bad_baselines_are_refused_before_training(tmp_path, text):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=r"is no baseline.*Remove the file"):
        run(RegressionGate(str(path)))


@pytest.mark.parametrize("options", [{"max_rel_ppl": 0}, {"max_slowdown": 0}, {"confidence": 1.0}, {"action": "shout"}])
def test_arguments_are_refused(options):
    with pytest.raises(ValueError, match=rf"RegressionGate\({next(iter(options))}="):
        RegressionGate(**options)


def test_fast_dev_run_writes_nothing(tmp_path):
    run(RegressionGate(str(tmp_path / "baseline.json")), fast_dev_run=True)
    assert not (tmp_path / "baseline.json").exists()


def test_it_changes_no_weight(tmp_path):
    with_gate, _ = run(RegressionGate(str(tmp_path / "baseline.json")))
    without, _ = fit([], Module, limit_val_batches=1.0)
    assert torch.equal(weights(with_gate), weights(without))
