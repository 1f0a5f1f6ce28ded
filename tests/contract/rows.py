"""The promises. Each row is a function of a case (and a temporary folder) that raises where the promise is broken."""

import csv
import gc
import math
import pickle
import random
import re
import signal
import types
import warnings
import weakref
from contextvars import ContextVar

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from forge_lightning.core.layers import network_modules
from tests.accelerator import ACCELERATOR, DEVICE
from tests.contract.modules import (
    FOREIGN,
    SHAPES,
    Dummy,
    Given,
    LossOnly,
    Plain,
    RaisesAtStep,
    Stateful,
    with_batches_of,
)
from tests.contract.waiting import Device, no_free_reads

ADAPT = ContextVar("adapt", default=lambda module: module)
"""What the case at hand gives to a module that is fitted; see `Case.adapt`."""


def fit(callbacks=(), module=LossOnly, ckpt_path=None, **kwargs):
    model, trainer = made(callbacks, module, **kwargs)
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


_WITHOUT = {}


def weights_without(module=LossOnly, **kwargs):
    """Those of the same fit without callbacks, which is run once for all cases."""
    key = (module, ADAPT.get(), tuple(sorted(kwargs.items())))
    if key not in _WITHOUT:
        _WITHOUT[key] = weights(fit((), module, **kwargs)[0])
    return _WITHOUT[key]


def made(callbacks=(), module=LossOnly, **kwargs):
    """A model and its trainer, before anything ran."""
    seed_everything(0, verbose=False)  # before the module is built: the same initial weights in every run
    model = ADAPT.get()(module)() if isinstance(module, type) else module
    defaults = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return model, Trainer(**defaults | {"callbacks": list(callbacks)} | kwargs)


def weights(model):
    """The module's own; not those of a head that a callback added."""
    own = (p for _, module in network_modules(model) for p in module.parameters(recurse=False))
    full = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in own)
    return torch.cat([p.detach().double().flatten() for p in full])


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from (t for v in tree.values() for t in tensors(v))
    elif isinstance(tree, list | tuple):
        yield from (t for v in tree for t in tensors(v))


def plain(tree):
    """Whether `torch.load(weights_only=True)` takes it: no view of a larger storage, nothing that carries a graph."""
    if isinstance(tree, dict):
        return all(plain(k) and plain(v) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return all(plain(v) for v in tree)
    if isinstance(tree, torch.Tensor):
        return not tree.requires_grad and tree.untyped_storage().nbytes() <= tree.nbytes
    return tree is None or isinstance(tree, bool | int | float | str | bytes)


def off_is_off(case, tmp_path):
    build = case.build if case.observer else case.inert
    with_callback, _ = fit([build()], max_epochs=2)
    assert torch.equal(weights(with_callback), weights_without(max_epochs=2))


def acts(case, tmp_path):
    """The other half of "off is off": with its own settings, it changes training (an observer does not)."""
    with_callback, _ = fit([case.build()], max_epochs=2)
    assert torch.equal(weights(with_callback), weights_without(max_epochs=2)) == case.observer


def random_stream_untouched(case, tmp_path):
    fit([case.build()])
    with_callback = (torch.rand(1), random.random(), np.random.rand())
    fit()
    assert with_callback == (torch.rand(1), random.random(), np.random.rand())


def foreign_modules(case, tmp_path):
    for module in FOREIGN:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module.warns)
            model, _ = fit([case.build()], module)
        assert weights(model).isfinite().all(), module.__name__
        nothing_to_do = f"foreign_modules: {module.__name__}" in case.exempt
        same = torch.equal(weights(model), weights_without(module))
        assert same == (case.observer or nothing_to_do), module.__name__


def shapes_of_others(case, tmp_path):
    """It works with the batches and modules of other people's projects, or refuses before an epoch is trained."""
    options = {"max_epochs": 2, "num_sanity_val_steps": 1}
    for module in SHAPES:
        saved = ModelCheckpoint(tmp_path / module.__name__, every_n_train_steps=2, save_top_k=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a callback cannot do there, it says
            without = weights_without(module, **options)
            try:
                model, _ = fit([case.build(), saved], module, enable_checkpointing=True, **options)
            except MisconfigurationException as error:
                assert type(case.build()).__name__ in str(error), f"{module.__name__}: {error}"
                late = len(list((tmp_path / module.__name__).glob("*.ckpt"))) >= 4  # of eight steps in an epoch
                assert late == (module is Dummy and "Grokfast" in str(error)), module.__name__
                continue
        assert weights(model).isfinite().all(), module.__name__
        if case.observer:
            assert torch.equal(weights(model), without), module.__name__
        if module is Given:
            kept = torch.load(saved.best_model_path, weights_only=False)["hyper_parameters"]
            assert b"forge_lightning" not in pickle.dumps(kept), "something of ours came with the hyperparameters"


def precisions(case, tmp_path):
    """In each it trains, and acts as it does in 32 bits."""
    for precision in ("32-true", "bf16-mixed", "64-true", "bf16-true"):
        model, _ = fit([case.build()], precision=precision, max_epochs=2)
        assert weights(model).isfinite().all(), precision
        same = torch.equal(weights(model), weights_without(precision=precision, max_epochs=2))
        assert same == (case.observer or "acts" in case.exempt), precision


def fp16_overflow(case, tmp_path):
    """The first steps overflow and the scaler drops them; training recovers, and nothing non-finite stays behind."""
    callback = case.build()
    plugin = MixedPrecision("16-mixed", DEVICE, scaler=torch.amp.GradScaler(DEVICE, init_scale=2.0**20))
    start, _ = fit(max_steps=0)
    model, _ = fit([callback], plugins=[plugin], max_epochs=3)
    assert plugin.scaler.get_scale() < 2.0**20, "no step overflowed: the row tests nothing"
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), weights(start))
    assert all(t.isfinite().all() for t in tensors(callback.state_dict()))


def accumulation(case, tmp_path):
    """4 batches of 8 are one of 32."""
    small, _ = fit([case.build()], with_batches_of(8), accumulate_grad_batches=4, max_epochs=3)
    large, _ = fit([case.build()], with_batches_of(32), max_epochs=3)
    torch.testing.assert_close(weights(small), weights(large), atol=1e-6, rtol=1e-5)


def clipping(case, tmp_path):
    """A callback that edits gradients does it before they are clipped: the clipped norm holds."""

    class Watches(Plain):
        norms = []

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    fit([case.build()], Watches, gradient_clip_val=1e-3)
    assert all(norm <= 1e-3 * (1 + 1e-5) for norm in Watches.norms)


def resume_at_epoch_end(case, tmp_path):
    straight, _ = fit([case.build()], Plain, max_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit([case.build(), checkpoint], Plain, enable_checkpointing=True)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed, _ = fit([case.build()], Plain, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(straight), weights(resumed))


def resume_twice(case, tmp_path):
    """At the end of an epoch, then inside a later one, with a shuffling loader of ours and dropout."""
    straight, _ = fit(_with_random_state(case), Stateful, max_epochs=4)
    end = ModelCheckpoint(tmp_path / "end", save_last=True, save_on_train_epoch_end=True)
    fit([*_with_random_state(case), end], Stateful, max_epochs=1, enable_checkpointing=True)
    inside = ModelCheckpoint(tmp_path / "inside", every_n_train_steps=19, filename="inside")
    kwargs = {"max_epochs": 3, "enable_checkpointing": True, "ckpt_path": tmp_path / "end/last.ckpt"}
    fit([*_with_random_state(case), inside], Stateful, **kwargs)
    resumed, _ = fit(_with_random_state(case), Stateful, max_epochs=4, ckpt_path=tmp_path / "inside/inside.ckpt")
    assert torch.equal(weights(straight), weights(resumed))


def resume_after_max_steps(case, tmp_path):
    """A fit that ended inside an epoch, saved after, goes on in that epoch."""
    kwargs = {"max_epochs": -1, "limit_val_batches": 0}
    straight, _ = fit(_with_random_state(case), Stateful, max_steps=20, **kwargs)
    _, stopped = fit(_with_random_state(case), Stateful, max_steps=11, **kwargs)
    stopped.save_checkpoint(tmp_path / "after.ckpt")
    resumed, _ = fit(_with_random_state(case), Stateful, max_steps=20, ckpt_path=tmp_path / "after.ckpt", **kwargs)
    assert torch.equal(weights(straight), weights(resumed))


def resume_with_short_epochs(case, tmp_path):
    """`limit_train_batches` ends each epoch after 5 of 8 batches."""
    kwargs = {"limit_train_batches": 5, "limit_val_batches": 0}
    straight, _ = fit(_with_random_state(case), Stateful, max_epochs=3, **kwargs)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=7, filename="inside", save_last=True)
    callbacks = [*_with_random_state(case), checkpoint]
    _, stopped = fit(callbacks, Stateful, max_epochs=2, enable_checkpointing=True, **kwargs)
    stopped.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("inside", "last", "after"):
        resumed, _ = fit(
            _with_random_state(case), Stateful, max_epochs=3, ckpt_path=tmp_path / f"{name}.ckpt", **kwargs
        )
        assert torch.equal(weights(straight), weights(resumed)), name


def _with_random_state(case):
    from forge_lightning.callbacks import RNGState

    # `RNGState` itself is the subject where it is the case: two of them would share a key.
    return [case.build()] if case.id == "rng-state" else [case.build(), RNGState()]


def resume_mid_epoch(case, tmp_path):
    """With our loader and random state, dropout on, 8 batches accumulated by 3."""
    kwargs = {"max_epochs": 2, "accumulate_grad_batches": 3}
    straight, _ = fit(_with_random_state(case), Stateful, **kwargs)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit([*_with_random_state(case), checkpoint], Stateful, enable_checkpointing=True, **kwargs)
    for step in (2, 3):  # inside an epoch; after its last batch
        resumed, _ = fit(_with_random_state(case), Stateful, ckpt_path=tmp_path / f"step={step}.ckpt", **kwargs)
        assert torch.equal(weights(straight), weights(resumed)), step


def state_round_trip(case, tmp_path):
    callback = case.build()
    fit([callback])
    saved = callback.state_dict()
    assert plain(saved)
    fresh = case.build()
    if saved:
        fresh.load_state_dict(saved)
    again = fresh.state_dict()
    assert saved.keys() == again.keys()
    for a, b in zip(tensors(saved), tensors(again), strict=True):
        assert torch.equal(a, b)


def checkpoints_cross(case, tmp_path):
    """Our checkpoint loads without the callback, and a checkpoint without our state loads with it."""
    for first, second in (([case.build()], []), ([], [case.build()])):
        folder = tmp_path / str(len(first))
        fit([*first, ModelCheckpoint(folder, save_last=True)], Plain, enable_checkpointing=True)
        model, trainer = fit(second, Plain, max_epochs=2, ckpt_path=folder / "last.ckpt")
        assert trainer.global_step == 16
        assert weights(model).isfinite().all()
        stripped = torch.load(folder / "last.ckpt", weights_only=True) | {"callbacks": {}}
        torch.save(stripped, folder / "stripped.ckpt")
        plain_run, _ = fit((), Plain, max_epochs=2, ckpt_path=folder / "stripped.ckpt")
        acts = bool(second) and not (case.observer or "acts" in case.exempt)
        assert torch.equal(weights(model), weights(plain_run)) != acts, "what it left behind goes on" if first else ""


def two_instances(case, tmp_path):
    callbacks = [case.build(), case.twin()]
    assert len({c.state_key for c in callbacks}) == 2
    fit([*callbacks, ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    for callback in callbacks:
        assert (callback.state_key in saved) == bool(callback.state_dict())


def other_stages(case, tmp_path):
    """`validate`, `test` and `predict` without `fit`, `fast_dev_run`, and one instance fitted twice."""
    callback = case.build()
    results = []
    for callbacks in ([callback], ()):
        model, trainer = made(callbacks, limit_val_batches=2)
        before = weights(model)
        results.append([trainer.validate(model, verbose=False), trainer.test(model, verbose=False)])
        results[-1] = [{k: v for k, v in found.items() if "forge/" not in k} for (found,) in results[-1]]
        results[-1].append(torch.cat(trainer.predict(model)).tolist())
        assert torch.equal(weights(model), before)
    assert results[0] == results[1]
    fit([case.build()], fast_dev_run=2)
    first, _ = fit([callback])
    second, trainer = fit([callback])
    assert trainer.global_step == 8
    assert not case.observer or torch.equal(weights(first), weights(second))


def nothing_left_behind(case, tmp_path):
    callback = case.build()
    for module in (LossOnly, RaisesAtStep):
        model, watches = ADAPT.get()(module)(), Watches()
        before = set(vars(model))
        try:
            fit([watches, callback], model)
        except RuntimeError as error:
            assert "on purpose" in str(error)
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        patched = {k for k in set(vars(model)) - before if callable(vars(model)[k])}
        assert not patched, patched
        trainer = watches.trainer
        assert set(trainer.callbacks) == set(watches.callbacks)
        for part in (trainer, trainer.strategy, trainer.strategy.precision_plugin, *model.modules()):
            assert not shadowed(part), type(part).__name__
        for optimizer in trainer.optimizers:
            assert not {**optimizer._optimizer_step_pre_hooks, **optimizer._optimizer_step_post_hooks}
        assert {number: signal.getsignal(number) for number in watches.signals} == watches.signals


class Watches(Callback):
    """Remembers how things were before a fit."""

    def setup(self, trainer, pl_module, stage):
        self.trainer, self.callbacks = trainer, list(trainer.callbacks)
        self.signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def shadowed(part):
    """Methods of an object that somebody has put others in place of."""
    return {name for name in vars(part) if callable(getattr(type(part), name, None)) and callable(vars(part)[name])}


def reachable_bytes(callback):
    """Of all tensors that a callback keeps alive, apart from those of the model and the trainer."""
    skipped = (Trainer, torch.nn.Module, DataLoader, type, types.ModuleType, types.FunctionType, types.FrameType)
    seen, waiting, size = set(), [vars(callback)], 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen or issubclass(type(found), skipped):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            size += found.nbytes
        else:
            waiting += gc.get_referents(found)
    return size


def memory_is_bounded(case, tmp_path):
    """The state stops growing, as does all else that is kept, and no graph is kept alive."""
    sizes = []

    class Measures(type(case.build())):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            sizes.append((sum(t.nbytes for t in tensors(self.state_dict())), reachable_bytes(self)))

    graphs = []

    class Graphs(LossOnly):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            marker = lambda *_: None  # noqa: E731
            loss.grad_fn.register_hook(marker)  # now lives as long as the graph
            graphs.append(weakref.ref(marker))
            return loss

    callback = case.build()
    callback.__class__ = Measures
    fit([callback], Graphs, max_epochs=4)
    assert sizes[1] == sizes[-1]
    gc.collect()
    assert not any(ref() for ref in graphs)


def logs(case, tmp_path):
    """The keys logged are the keys documented; every one that can vary does; steps are those of the other metrics."""
    fit([case.build()], logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2, max_epochs=3)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if key.startswith("forge/") and value}
    assert logged == case.logs
    documented = type(case.build()).__doc__
    for key in case.logs:
        written = key.replace("forge/", "")
        for pattern, placeholder in case.placeholders.items():
            written = re.sub(pattern, placeholder, written)
        assert written in documented, f"{key} is not in the docstring"
        values = {float(row[key]) for row in rows if row[key] and not math.isnan(float(row[key]))}
        assert values, key
        assert key in case.constant_logs or len(values) > 1, f"{key} never varies"
        steps = {row["step"] for row in rows if row[key]}
        assert steps <= {row["step"] for row in rows if row["train/loss"]}


def no_waiting(case, tmp_path):
    """A step that does not log, after the first few, reads no number of an accelerator: see `waiting.py`."""
    device = Device()

    class There(ADAPT.get()(LossOnly)):
        def on_train_start(self):
            device.place([list(self.parameters()), list(self.buffers())])

        def on_after_batch_transfer(self, batch, dataloader_idx):
            done = self.trainer.global_step  # callbacks with an interval act at even steps
            device.listening = self.trainer.training and done >= 4 and done % 2 == 0
            device.next_step()
            return device.place(batch)

        def on_train_epoch_end(self):
            device.listening = False

        def on_validation_start(self):
            device.listening = False

    token = ADAPT.set(lambda module: module)
    try:
        with no_free_reads(), device:
            fit([case.build()], There, max_epochs=2, log_every_n_steps=100)
    finally:
        ADAPT.reset(token)
    assert not device.waits, "\n".join(f"{count} x {where}" for where, count in device.waits.most_common())
    assert not device.mixes, "\n".join(f"{count} x {where}" for where, count in device.mixes.most_common())


ROWS = [
    off_is_off,
    acts,
    random_stream_untouched,
    foreign_modules,
    shapes_of_others,
    precisions,
    fp16_overflow,
    accumulation,
    clipping,
    resume_at_epoch_end,
    resume_twice,
    resume_after_max_steps,
    resume_with_short_epochs,
    resume_mid_epoch,
    state_round_trip,
    checkpoints_cross,
    two_instances,
    other_stages,
    nothing_left_behind,
    memory_is_bounded,
    logs,
    no_waiting,
]
