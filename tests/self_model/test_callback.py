"""The head on LightningModules; what holds for every callback is in tests/contract."""

import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from forge_lightning.callbacks import GeometryProbe, SelfModel, Telemetry, TemperatureCurriculum
from forge_lightning.components import SelfModelHead
from forge_lightning.data import AlgorithmicData, TextData
from forge_lightning.models import AlgorithmicModule, ForgeModule
from forge_lightning.optim import MuonAdamW
from tests.accelerator import QUIET
from tests.contract.modules import LossOnly, Plain, TwoOptimizers
from tests.contract.rows import fit, weights

GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return lambda: TextData(str(path), block_size=16, batch_size=8)


def train(module, data, callbacks=(), ckpt_path=None, **kwargs):
    seed_everything(0, verbose=False)
    defaults = {
        **QUIET,
        "enable_model_summary": False,
        "max_steps": 10,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }
    trainer = Trainer(**defaults | {"callbacks": list(callbacks)} | kwargs)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("form", ["paper", "next_latent", "forward"])
def test_built_in_and_callback_take_the_same_steps(text, form):
    """One head, two ways to have it."""
    options = {"form": form, "weight": 2.0, "warmup_steps": 3}
    built_in, _ = train(ForgeModule(config=GPT2, self_model=SelfModelHead(**options)), text())
    attached, _ = train(ForgeModule(config=GPT2), text(), [SelfModel(**options)])
    without, _ = train(ForgeModule(config=GPT2), text())
    ours = [p for name, p in built_in.named_parameters() if name.startswith("model.")]
    theirs = [p for name, p in attached.named_parameters() if name.startswith("model.")]
    plain = list(without.model.parameters())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not all(torch.equal(a, c) for a, c in zip(ours, plain, strict=True))


def test_built_in_head_of_weight_zero_is_none(text):
    off, _ = train(ForgeModule(config=GPT2, self_model=SelfModelHead(weight=0.0)), text())
    without, _ = train(ForgeModule(config=GPT2), text())
    assert off.self_model_head is None
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), without.parameters(), strict=True))


def test_built_in_head_resumes_and_logs(text, tmp_path):
    def module():
        return ForgeModule(config=GPT2, self_model=SelfModelHead(adaptive=True, watch_every_n_steps=2))

    straight, _ = train(module(), text(), max_steps=8)
    _, stopped = train(module(), text(), max_steps=4)
    stopped.save_checkpoint(tmp_path / "four.ckpt")
    saved = torch.load(tmp_path / "four.ckpt", weights_only=True)
    assert all(loss > 0 for loss in saved["callbacks"]["SelfModel"]["layer_losses"])
    logger = CSVLogger(tmp_path, name="", version="log")
    options = {"max_steps": 8, "logger": logger, "log_every_n_steps": 2}
    resumed, trainer = train(module(), text(), ckpt_path=tmp_path / "four.ckpt", **options)
    assert torch.equal(weights(straight), weights(resumed))
    names = {"loss", "weight"} | {
        f"transformer.h.{n}/{key}"
        for n in (0, 1)
        for key in ("explained_variance", "copy_explained_variance", "effective_rank")
    }
    assert {f"forge/self_model/{name}" for name in names} <= set(trainer.callback_metrics)
    assert "forge/self_model/loss" in (tmp_path / "log/metrics.csv").read_text()


def test_export_has_no_head(text, tmp_path):
    from transformers import AutoModelForCausalLM

    module, _ = train(ForgeModule(config=GPT2, self_model=SelfModelHead()), text())
    module.export(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in module.model.named_parameters()}
    ids = torch.arange(8)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, module.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("built_in", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_compiled_and_checkpointed_modules(text, compile, built_in, monkeypatch):
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))

    def trained(**options):
        head = SelfModelHead(warmup_steps=0) if built_in else None
        module = ForgeModule(config=GPT2, self_model=head, **options)
        return train(module, text(), [] if built_in else [SelfModel(warmup_steps=0)], max_steps=4)[0]

    found, expected = trained(compile=compile, gradient_checkpointing=not compile), trained()
    torch.testing.assert_close(weights(found), weights(expected), atol=1e-5, rtol=1e-4)


def test_decoder_that_puts_out_its_last_position_only():
    data = AlgorithmicData(modulus=11, batch_size=32)
    _, trainer = train(AlgorithmicModule(dim=32), data, [SelfModel(warmup_steps=0)], log_every_n_steps=1)
    found = {key for key in trainer.callback_metrics if key.endswith("/explained_variance")}
    assert found == {f"forge/self_model/model.layers.{n}/explained_variance" for n in (0, 1)}
    with pytest.raises(MisconfigurationException, match="reads one position only"):
        train(AlgorithmicModule(dim=32), data, [SelfModel(form="next_latent")])


def test_what_an_optimizer_left_out_joins_it():
    class Matrices(LossOnly):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.ndim >= 2], lr=0.1)

    model, trainer = fit([SelfModel(layers=["net.0"])], Matrices)
    known = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert all(id(p) in known for p in model.self_model_head.parameters())


def test_head_joins_an_optimizer_that_left_it_out():
    class OfItsOwn(LossOnly):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    model, trainer = fit([SelfModel(layers=["net.0"])], OfItsOwn, max_epochs=2)
    group = trainer.optimizers[0].param_groups[0]["params"]
    assert {id(p) for p in model.self_model_head.parameters()} <= {id(p) for p in group}
    again, _ = fit([SelfModel(layers=["net.0"])], OfItsOwn, max_steps=0)
    before = list(again.self_model_head.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.self_model_head.parameters(), strict=True))


def test_output_layer_is_not_taken_from_inside_a_block():
    class HeadFirst(LossOnly):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 2)
            self.net = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for _ in range(2)])

        def loss(self, batch):
            x = batch[0]
            for block in self.net:
                x = block(x)
            return nn.functional.cross_entropy(self.out(x), batch[1])

    model, _ = fit([SelfModel()], HeadFirst)
    assert model.self_model_head.predictors[0][0].normalized_shape == (8,)
    assert model.self_model_head.targets == ["net.0", "net.1"]


def test_what_is_reported_is_the_modules_own_loss():
    """Stages, and the training loss beside that of validation, are of the task, not of what is added to it."""
    from forge_lightning.core.callback import loss_of_step

    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((float(loss_of_step(trainer, outputs)), float(trainer.callback_metrics["train/loss"])))

    for accumulate in (1, 2):
        fit([SelfModel(layers=["net.0"], warmup_steps=0), Looks()], Plain, accumulate_grad_batches=accumulate)
    assert all(own == pytest.approx(logged, rel=1e-5) for own, logged in seen)


@pytest.mark.parametrize("built_in", [True, False])
def test_weight_means_the_same_beside_the_curriculum(text, built_in):
    """(1 - w) of the task, and all of the head's error."""
    head = {"warmup_steps": 0}
    module = ForgeModule(config=GPT2, self_model=SelfModelHead(**head) if built_in else None)
    callbacks = [TemperatureCurriculum(weight=0.5, warmup_steps=0), *([] if built_in else [SelfModel(**head)])]
    losses = []

    class Looks(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses.append(loss.item())

    _, trainer = train(module, text(), [*callbacks, Looks()], max_steps=1, log_every_n_steps=1)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    expected = 0.5 * metrics["train/loss"] + 0.5 * metrics["forge/temperature/kl"] + metrics["forge/self_model/loss"]
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_manual_optimization_learns_to_be_predictable():
    options = {"layers": ["net.0"], "warmup_steps": 0}
    _, heavy = fit([SelfModel(weight=10.0, **options)], TwoOptimizers, max_epochs=20, log_every_n_steps=1)
    _, light = fit([SelfModel(weight=1e-6, **options)], TwoOptimizers, max_epochs=20, log_every_n_steps=1)
    key = "forge/self_model/loss"
    assert float(heavy.callback_metrics[key]) < 0.5 * float(light.callback_metrics[key])


def test_other_callbacks_do_not_take_the_head_for_a_layer():
    probe = GeometryProbe(every_n_steps=2, num_points=8, estimators=["participation_ratio"], max_overhead=None)
    names = []

    class Looks(Telemetry):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            names.extend(probe.layer_names)

    fit([SelfModel(layers=["net.0"], hidden_size=512), probe, Looks()], Plain)
    assert set(names) == {f"net.{n}" for n in range(4)}


def test_averaged_weights_beside_it():
    """A mean that forgets at once is the weights themselves: the copy that it is made of disturbs nothing."""
    options = {"layers": ["net.0"], "warmup_steps": 0}
    averaged, _ = fit([EMAWeightAveraging(decay=0.0), SelfModel(**options)], Plain)
    alone, _ = fit([SelfModel(**options)], Plain)
    torch.testing.assert_close(weights(averaged), weights(alone), atol=1e-6, rtol=1e-5)


def test_second_fit_goes_on_with_the_head_and_the_settings_of_now():
    callback = SelfModel(layers=["net.0"])
    model, _ = fit([callback], Plain)
    head = model.self_model_head
    fit([callback], model)
    fit([SelfModel(layers=["net.0"], weight=7.0)], model)
    assert model.self_model_head is head
    assert head.weight == 7.0
    with pytest.raises(MisconfigurationException, match=r"`SelfModel\(layers=\['net.2'\]\)`: the module has a head"):
        fit([SelfModel(layers=["net.2"])], model)


def test_layers_that_are_not_used_are_refused():
    class Unused(LossOnly):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))

    with pytest.raises(MisconfigurationException, match="no forward pass of `training_step` went through the layers"):
        fit([SelfModel(layers=["other.0"])], Unused)


def test_it_travels_to_other_processes():
    settings = {"layers": ["net.0"], "warmup_steps": 0}
    sent = pickle.loads(pickle.dumps(SelfModel(**settings)))
    assert torch.equal(weights(fit([sent])[0]), weights(fit([SelfModel(**settings)])[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfModel(form="best"), r"`SelfModel\(form='best'\)` must be one of"),
        (lambda: SelfModel(weight=-1.0), r"`SelfModel\(weight=-1.0\)` must be at least 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_it_cannot_serve(text):
    with pytest.raises(MisconfigurationException, match=r"`SelfModel\(layers=\['net.9'\]\)`: No layer is called"):
        fit([SelfModel(layers=["net.9"])])
    with pytest.raises(MisconfigurationException, match="No module is called 'head'"):
        fit([SelfModel(output_layer="head")])
    with pytest.raises(MisconfigurationException, match="ForgeModule has a head of its own, `self_model`"):
        train(ForgeModule(config=GPT2, self_model=SelfModelHead()), text(), [SelfModel()])
    with pytest.raises(MisconfigurationException, match="No layer is called 'h.9'"):
        train(ForgeModule(config=GPT2, self_model=SelfModelHead(layers=["h.9"])), text())
    with pytest.raises(MisconfigurationException, match="'net.0' returns 16 units; 5 were expected"):
        fit([SelfModel(layers=["net.0"], width=5)])


def test_frozen_network_is_told():
    class Frozen(LossOnly):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

    with pytest.warns(UserWarning, match="no gradient reaches the network, because nothing that is trained"):
        fit([SelfModel(layers=["net.0"])], Frozen)


def test_flattening_strategies_are_refused():
    from lightning.pytorch.strategies import FSDPStrategy

    class Fake:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(MisconfigurationException, match="`SelfModel` cannot work with FSDPStrategy"):
        SelfModel().setup(Fake(), nn.Identity(), "fit")


class Matrices(LossOnly):
    make = MuonAdamW

    def configure_optimizers(self):
        return type(self).make(self.net.parameters())


def test_vectors_of_the_head_are_not_muons():
    model, trainer = fit([SelfModel()], Matrices, max_epochs=2)
    head = {id(p): p for p in model.self_model_head.parameters()}
    for group in trainer.optimizers[0].param_groups:
        for param in group["params"]:
            assert group["use_muon"] == (param.ndim == 2)
            head.pop(id(param), None)
    assert not head


def test_an_optimizer_of_matrices_alone_is_refused():
    class Alone(Matrices):
        make = staticmethod(lambda params: torch.optim.Muon([p for p in params if p.ndim == 2]))

    with pytest.raises(MisconfigurationException, match="cannot work with an optimizer of matrices alone"):
        fit([SelfModel()], Alone)


def quiet_trainer(**options):
    quiet = {**QUIET, "enable_model_summary": False, "max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 1}
    return Trainer(**quiet | options)


def test_one_trainer_fits_tests_and_fits_again(text):
    module, trainer = ForgeModule(config=GPT2, self_model=SelfModelHead(warmup_steps=0)), quiet_trainer()
    data = text()
    trainer.fit(module, datamodule=data)
    head = module.self_model_head
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=data)
    assert module.self_model_head is head
    assert sum(isinstance(callback, SelfModel) for callback in trainer.callbacks) == 1
    assert "training_step" not in vars(module)


def test_a_head_stays_with_its_module(text):
    trainer, plain = quiet_trainer(), ForgeModule(config=GPT2)
    trainer.fit(ForgeModule(config=GPT2, self_model=SelfModelHead(warmup_steps=0)), datamodule=text())
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(plain, datamodule=text())
    assert not [name for name in plain.state_dict() if "self_model" in name]
    assert not any(isinstance(callback, SelfModel) for callback in trainer.callbacks)


def test_an_off_callback_beside_a_built_in_head_is_no_second_one(text):
    train(ForgeModule(config=GPT2, self_model=SelfModelHead()), text(), [SelfModel(weight=0.0)], max_steps=1)
    module = ForgeModule(config=GPT2, self_model=SelfModelHead())
    SelfModel(weight=0.0).preflight(module, None)
    for name in (None, "second"):
        with pytest.raises(MisconfigurationException, match="this callback would be a second"):
            SelfModel(name=name).preflight(module, None)


def test_a_subclass_that_drops_the_callback_is_refused(text):
    class Forgets(ForgeModule):
        def configure_callbacks(self):
            return []

    with pytest.raises(MisconfigurationException, match="its callback `SelfModel` is missing. A subclass"):
        train(Forgets(config=GPT2, self_model=SelfModelHead()), text())
