"""Add loss terms to a module's ``training_step``, reversibly."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

TASK_LOSS = "forge_task_loss"
"""Key in the outputs of a step: the module's own loss, without what callbacks add."""
_STEP, _BACKWARD, _KEPT = "training_step", "manual_backward", "_forge_loss_terms"


class LossTerm(Protocol):
    """A term that is added to the loss of a training step."""

    def begin(self, batch: Any) -> None:
        """Called before the step, and after each backward pass inside it."""

    def added(self, loss: Tensor) -> Tensor | None:
        """Return what to add to the step's loss, once per backward pass; ``None`` for nothing."""

    def end(self) -> None:
        """Called after the step, also when it raised."""


@runtime_checkable
class SeesOutputs(Protocol):
    """A term that also sees the outputs of the step."""

    def returned(self, outputs: Any) -> Any:
        """Called after a step that did not raise. Returns the outputs that the rest of training sees."""


class LossTerms:
    """Wraps ``training_step`` of one module, so that its loss is its own plus every term.

    Inside the step, so that precision, gradient scaling, accumulation and the strategies treat the sum as they treat
    the module's own loss. Under manual optimization the loss that is given to ``manual_backward`` gets it. Several
    callbacks share one wrapper: each term sees the module's own loss, in whatever order they came.

    Args:
        module: A LightningModule.
    """

    def __init__(self, module: "LightningModule") -> None:
        self.module = module
        self.terms: list[LossTerm] = []
        self.own_loss: Tensor | None = None
        """What the last step gave before anything was added."""
        self._batch: Any = None
        self._before = {name: vars(module).get(name) for name in (_STEP, _BACKWARD)}
        self._step, self._backward = module.training_step, module.manual_backward

        @functools.wraps(self._step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        @functools.wraps(self._backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._backward(self._sum(loss), *args, **kwargs)
            for term in self.terms:  # what is computed again in the backward pass belongs to no new one
                term.begin(self._batch)

        self._wrappers = {_STEP: training_step, _BACKWARD: manual_backward}
        for name, wrapper in self._wrappers.items():
            setattr(module, name, wrapper)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._batch = args[0] if args else kwargs.get("batch")
        try:
            for term in self.terms:
                term.begin(self._batch)
            returned = self._with_terms(self._step(*args, **kwargs))
            for term in self.terms:
                if isinstance(term, SeesOutputs):
                    returned = term.returned(returned)
            return returned
        finally:
            self._batch = None
            for term in self.terms:
                term.end()

    def _with_terms(self, returned: Any) -> Any:
        if not self.module.automatic_optimization or returned is None:
            return returned
        if not isinstance(returned, Mapping):
            self.own_loss = returned.detach()
            return self._sum(returned)
        loss = returned.get("loss")
        if loss is None:
            return returned
        task = returned.get(TASK_LOSS, loss)  # without what the module itself has added to it
        self.own_loss = task.detach()
        return {**returned, "loss": sum(self._added(task), loss), TASK_LOSS: self.own_loss}

    def _added(self, loss: Tensor) -> list[Tensor]:
        return [added for term in self.terms if (added := term.added(loss)) is not None]

    def _sum(self, loss: Tensor) -> Tensor:
        return sum(self._added(loss), loss)

    def restore(self) -> bool:
        """Restore the module's own methods. Returns whether nothing of this is left on it."""
        if any(vars(self.module).get(name) is not wrapper for name, wrapper in self._wrappers.items()):
            return False  # other code has wrapped it since, and keeps calling it: without terms it adds nothing
        for name, before in self._before.items():
            if before is None:
                delattr(self.module, name)
            else:
                setattr(self.module, name, before)
        return True


def _found(module: "LightningModule") -> LossTerms | None:
    """The wrapper of a module; ``None`` also where other code has removed it."""
    return vars(module).get(_KEPT) if _STEP in vars(module) else None


def own_loss(module: "LightningModule") -> Tensor | None:
    """The loss of a module's last training step before terms were added; ``None`` without terms."""
    found = _found(module)
    return None if found is None else found.own_loss


def no_backward(module: "LightningModule") -> str:
    """Advice for a step in which no term was asked for its part; empty under automatic optimization."""
    manual = "Under manual optimization the loss must go through `self.manual_backward`. "
    return "" if module.automatic_optimization else manual


def add_loss_term(module: "LightningModule", term: LossTerm) -> None:
    """Add a term to a module's loss until `remove_loss_term`."""
    found = _found(module)
    if found is None:
        found = vars(module)[_KEPT] = LossTerms(module)
    if term not in found.terms:
        found.terms.append(term)


def remove_loss_term(module: "LightningModule", term: LossTerm) -> None:
    """Undo `add_loss_term`. Does nothing if the term was not added."""
    found = vars(module).get(_KEPT)
    if found is not None and term in found.terms:
        found.terms.remove(term)
        if not found.terms and found.restore():
            del vars(module)[_KEPT]


@contextmanager
def only_loss_term(module: "LightningModule", term: LossTerm) -> Iterator[None]:
    """Suspend all other loss terms inside the block."""
    found = vars(module)[_KEPT]
    terms, found.terms = found.terms, [term]
    own_loss = found.own_loss
    try:
        yield
    finally:
        found.terms, found.own_loss = terms, own_loss
