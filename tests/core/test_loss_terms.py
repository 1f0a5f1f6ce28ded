"""The wrapper around somebody else's training step."""

import gc
import inspect
import weakref

import pytest
import torch

from forge_lightning.core.loss_terms import add_loss_term, own_loss, remove_loss_term


class Module:
    automatic_optimization = True
    backward_of = ()

    def training_step(self, batch, batch_idx):
        loss = 2.0 * batch
        if batch_idx == 1:
            return {"loss": loss, "kept": "as it was"}
        if batch_idx == 2:
            return None
        if batch_idx == 3:
            raise RuntimeError("raised on purpose")
        return loss

    def manual_backward(self, loss, **kwargs):
        self.backward_of = (*self.backward_of, (float(loss), kwargs))


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(batch, retain_graph=True)
        self.manual_backward(batch)


class Term:
    def __init__(self, share):
        self.share, self.calls = share, []

    def begin(self, batch):
        self.calls.append("begin")

    def added(self, loss):
        self.calls.append("added")
        return None if self.share is None else self.share * loss

    def end(self):
        self.calls.append("end")


def test_terms_add_to_the_modules_own_loss_in_any_order():
    x = torch.tensor(3.0)
    for shares in ((0.5, None, 2.0), (2.0, 0.5, None)):
        module = Module()
        terms = [Term(share) for share in shares]
        for term in terms:
            add_loss_term(module, term)
        assert module.training_step(x, 0) == 6.0 * 3.5
        assert module.training_step(x, 1) == {"loss": 21.0, "forge_task_loss": 6.0, "kept": "as it was"}
        assert own_loss(module) == 6.0
        assert module.training_step(x, 2) is None
        with pytest.raises(RuntimeError, match="on purpose"):
            module.training_step(x, 3)
        assert terms[0].calls == ["begin", "added", "end"] * 2 + ["begin", "end"] * 2
        for term in terms:
            remove_loss_term(module, term)
        assert vars(module) == {}


def test_terms_see_the_task_where_the_module_says_what_it_is():
    class Adds(Module):
        def training_step(self, batch, batch_idx):
            return {"loss": batch + 10.0, "forge_task_loss": batch}

    module = Adds()
    add_loss_term(module, Term(0.5))
    assert module.training_step(torch.tensor(3.0), 0) == {"loss": 13.0 + 1.5, "forge_task_loss": 3.0}


def test_manual_backward_gets_the_sum():
    module = Manual()
    term = Term(1.0)
    add_loss_term(module, term)
    module.training_step(torch.tensor(3.0), 0)
    assert module.backward_of == ((6.0, {"retain_graph": True}), (6.0, {}))
    assert term.calls == ["begin", "added", "begin", "added", "begin", "end"]  # anew after each backward pass
    remove_loss_term(module, term)
    assert "manual_backward" not in vars(module)


def test_signature_is_the_modules_own():
    module = Module()
    term = Term(None)
    add_loss_term(module, term)
    add_loss_term(module, term)  # once is enough
    assert list(inspect.signature(module.training_step).parameters) == ["batch", "batch_idx"]
    assert module.training_step(torch.tensor(1.0), 0) == 2.0
    assert term.calls == ["begin", "added", "end"]


def test_what_was_patched_before_is_put_back_and_what_came_after_stays():
    module = Module()
    module.training_step = patched = lambda batch, batch_idx: 10.0 * batch
    term = Term(1.0)
    add_loss_term(module, term)
    assert module.training_step(torch.tensor(1.0), 0) == 20.0
    remove_loss_term(module, term)
    assert module.training_step is patched
    add_loss_term(module, term)
    inner = module.training_step
    module.training_step = later = lambda *args: inner(*args) + 100.0
    remove_loss_term(module, term)
    assert module.training_step is later
    remove_loss_term(module, term)


def test_wrapper_that_somebody_took_off_is_put_on_anew_and_modules_are_freed():
    module = Module()
    first, second = Term(1.0), Term(1.0)
    add_loss_term(module, first)
    inner = module.training_step
    module.training_step = lambda *args, inner=inner: inner(*args)
    remove_loss_term(module, first)
    del module.training_step
    add_loss_term(module, second)
    assert module.training_step(torch.tensor(1.0), 0) == 4.0
    ref = weakref.ref(module)
    del module, inner
    gc.collect()
    assert ref() is None


def test_removing_a_term_that_wraps_no_more():
    """Somebody wrapped the wrapper: it still finds its term, and calls it no more."""
    module = Module()
    term = Term(1.0)
    add_loss_term(module, term)
    inner = module.training_step
    module.training_step = lambda *args: inner(*args)
    remove_loss_term(module, term)
    assert module.training_step(torch.tensor(1.0), 0) == 2.0
