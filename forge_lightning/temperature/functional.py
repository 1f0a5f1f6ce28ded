"""The divergence between two models at a temperature."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forge_lightning.calibration.functional import log_probabilities
from forge_lightning.core.token_loss import row_chunks


def temperature_kl(student: Tensor, teacher: Tensor, temperature: float, places: Tensor | None = None) -> Tensor:
    r"""Divergence of a student from its teacher at a temperature, scaled so that high ones do not weaken gradients.

    .. math:: \tau^2\, \mathrm{KL}\big(p^{T}_\tau \,\|\, p^{S}_\tau\big), \qquad p_\tau = \mathrm{softmax}(z / \tau)

    At one temperature it is 0 only where it is at all: a temperature chooses which differences of logits count. Large
    ones compare all logits, and ``τ²`` keeps their gradient from falling as ``1/τ²``; small ones compare the margin of
    the likeliest, with a gradient that falls as τ.

    The gradient, ``τ (softmax(z_S / τ) - softmax(z_T / τ))``, is made on the way, a few rows at a time, and is the one
    copy of them that is held. It has no derivative of its own: no second backward pass through the first, no
    `torch.func`, and `torch.compile` goes round it.

    Args:
        student: Logits ``(..., V)``.
        teacher: Logits of the same shape; no gradient goes there.
        temperature: τ, above 0.
        places: Which rows of the logits, flattened to ``(M, V)``, count: ``(N,)``. Default: all.

    Returns:
        ``(N,)``, without ``places`` ``(...)``; at least 0 up to rounding; finite as `log_probabilities` is.

    Raises:
        ValueError: If ``temperature`` is not above 0, or the shapes differ.
        RuntimeError: In a backward pass with ``create_graph=True``.

    References:
        Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> temperature_kl(z, z, 0.5), temperature_kl(z, -z, 2.0)
        (tensor([0.]), tensor([1.8485]))
    """
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}` must be above 0.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"`student` is {tuple(student.shape)} and `teacher` {tuple(teacher.shape)}; both must be alike."
        )
    shape, width = student.shape[:-1], student.shape[-1]
    student, teacher = student.reshape(-1, width), teacher.detach().reshape(-1, width)
    wanted = student.requires_grad and torch.is_grad_enabled()
    if places is not None:
        shape = places.shape
    divergence: Tensor = _TemperatureKL.apply(student, teacher, temperature, places, wanted)
    return divergence.reshape(shape)


class _TemperatureKL(torch.autograd.Function):
    """Divergence of rows ``(M, V)``, as many at a time as the processor's cache holds."""

    @staticmethod
    def parts(logits: Tensor, places: Tensor | None) -> Iterator[tuple[slice, slice | Tensor]]:
        """Rows of the result, and the rows of the logits that they are of."""
        for rows in row_chunks(logits, None if places is None else len(places)):
            yield rows, rows if places is None else places[rows]

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, places: Tensor | None, wanted: bool
    ) -> Tensor:
        # Not in fp16: a loss scale only comes to it in the backward pass.
        wide = torch.promote_types(student.dtype, torch.float32)
        count = len(student) if places is None else len(places)
        kept = student.dtype if student.dtype == torch.bfloat16 else wide
        gradient = student.new_empty(count, student.shape[-1], dtype=kept) if wanted else None
        divergence = student.new_empty(count, dtype=wide)
        with torch.autocast(student.device.type, enabled=False):
            for rows, part in _TemperatureKL.parts(student, places):
                log_student = log_probabilities(student[part], temperature)
                log_teacher = log_probabilities(teacher[part], temperature)
                probs = log_teacher.exp()
                divergence[rows] = (probs * (log_teacher - log_student)).sum(-1)
                if gradient is not None:
                    gradient[rows] = log_student.exp_().sub_(probs).mul_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.places = places
            ctx.like = student.new_empty(0)
            ctx.rows = len(student)
        return divergence.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`temperature_kl` (`TemperatureCurriculum`) cannot be differentiated twice, as `create_graph=True`"
                " asks. Leave it out, or the second derivative."
            )
        (gradient,) = ctx.saved_tensors
        found: Tensor = ctx.like.new_zeros(ctx.rows, gradient.shape[-1])
        for rows, part in _TemperatureKL.parts(gradient, ctx.places):
            grad = (gradient[rows] * grad_output[rows, None]).to(found.dtype)
            if isinstance(part, Tensor):
                found.index_add_(0, part, grad)
            else:  # a row that weighs nothing may hold what is not finite
                found[part] = torch.where(grad_output[rows, None] == 0, 0, grad)
        return found, None, None, None, None
