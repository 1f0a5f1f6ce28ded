"""Grokfast gradient filters: amplify the slow component of a gradient signal.

Three filters share one idea and differ in what "slow" is and how it is added back:

- `ema_filter`: the slow part is an exponential moving average; it is added whole, ``g + lamb * ema``.
- `ma_filter`: the slow part is the plain mean of the last ``window_size`` gradients; it is added whole.
- `projection_filter`: the slow part is the EMA, but only ``g``'s own component along it is added. The change is at most
  ``lamb * |g|``, and where ``g`` opposes the EMA, the motion *against* the EMA is amplified.

The functions without a trailing underscore are pure and state the formulas. The ones with it work in place on lists of
tensors, stream large tensors through the cache block by block, and are what `Grokfast` and the optimizers run.

Shapes: every gradient keeps its own shape, written ``(*)``; ``W`` is the window size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements: 1 MiB of fp32, so that a block of the gradient and of its EMA stay in a core's L2 cache


def ema_filter(grad: Tensor, ema: Tensor | None, *, alpha: float, lamb: float) -> tuple[Tensor, Tensor]:
    r"""Add the exponential moving average of a gradient to it, amplified (Grokfast-EMA).

    .. math:: \mu_t = \alpha \mu_{t-1} + (1 - \alpha) g_t, \qquad \hat g_t = g_t + \lambda \mu_t

    Args:
        grad: Gradient :math:`g_t`, ``(*)``.
        ema: :math:`\mu_{t-1}`, shaped like ``grad``; ``None`` on the first call, which starts at ``grad``.
        alpha: EMA decay, in [0, 1). The memory is about ``1 / (1 - alpha)`` steps.
        lamb: Amplification factor, at least 0. 0 returns the gradient unchanged.

    Returns:
        ``(filtered, ema)``, both shaped like ``grad``; the EMA is at least fp32. No input is modified.

    Raises:
        ValueError: If ``ema`` and ``grad`` differ in shape.

    References:
        Lee et al., `Grokfast: Accelerated Grokking by Amplifying Slow Gradients <https://arxiv.org/abs/2405.20233>`_,
        2024.

    Example:
        >>> filtered, ema = ema_filter(torch.tensor([1.0, -2.0]), None, alpha=0.98, lamb=2.0)
        >>> filtered
        tensor([ 3., -6.])
    """
    ema = _next_ema(grad, ema, alpha)
    return torch.add(grad, ema, alpha=lamb).to(grad.dtype), ema


def ma_filter(grad: Tensor, window: Tensor | None, *, window_size: int, lamb: float) -> tuple[Tensor, Tensor]:
    r"""Add the mean of the last ``window_size`` gradients, amplified, once there are that many (Grokfast-MA).

    .. math:: \hat g_t = g_t + \frac{\lambda}{W} \sum_{i=0}^{W-1} g_{t-i} \quad \text{for } t \ge W, \text{ else } g_t

    Args:
        grad: Gradient :math:`g_t`, ``(*)``.
        window: The gradients so far, oldest first, ``(n, *)`` with ``n <= W``; ``None`` on the first call.
        window_size: ``W``, at least 1.
        lamb: Amplification factor, at least 0.

    Returns:
        ``(filtered, window)``: shaped like ``grad``, and ``(min(n + 1, W), *)``. No input is modified.

    Raises:
        ValueError: If ``window`` does not hold gradients of this shape.

    References:
        Lee et al., 2024, as in `ema_filter`. This pure form copies the window; `ma_filter_` costs the same for every
        ``window_size``.

    Example:
        >>> _, window = ma_filter(torch.tensor([1.0]), None, window_size=2, lamb=5.0)
        >>> ma_filter(torch.tensor([3.0]), window, window_size=2, lamb=5.0)[0]  # 3 + 5 * (1 + 3) / 2
        tensor([13.])
    """
    row = grad.to(_state_dtype(grad)).unsqueeze(0)
    if window is not None:
        _check_shape("window", window.shape[1:], grad)
        row = torch.cat([window, row])[-window_size:]
    if len(row) < window_size:
        return grad.clone(), row
    return torch.add(grad, row.mean(0), alpha=lamb).to(grad.dtype), row


def projection_filter(grad: Tensor, ema: Tensor | None, *, alpha: float, lamb: float) -> tuple[Tensor, Tensor]:
    r"""Amplify the gradient's own component along its exponential moving average, per tensor.

    .. math::
        \mu_t = \alpha \mu_{t-1} + (1 - \alpha) g_t, \qquad
        \hat g_t = g_t + \lambda \frac{g_t \cdot \mu_t}{\lVert \mu_t \rVert^2} \mu_t

    Not the published Grokfast (`ema_filter`): the EMA gives a direction only, its length cancels.

    Args:
        grad: Gradient :math:`g_t`, ``(*)``.
        ema: :math:`\mu_{t-1}`, shaped like ``grad``; ``None`` on the first call, which starts at ``grad``.
        alpha: EMA decay, in [0, 1).
        lamb: Amplification factor, at least 0.

    Returns:
        ``(filtered, ema)``, both shaped like ``grad``. Where the EMA is zero, the gradient is unchanged.

    Raises:
        ValueError: If ``ema`` and ``grad`` differ in shape.

    Example:
        >>> ema = torch.tensor([1.0, 0.0])
        >>> filtered, _ = projection_filter(torch.tensor([3.0, 4.0]), ema, alpha=0.999999, lamb=1.0)
        >>> filtered.round(decimals=3)  # the first component doubles
        tensor([6., 4.])
    """
    ema = _next_ema(grad, ema, alpha)
    along = torch.sum(grad * ema) / torch.sum(ema * ema).clamp_min(torch.finfo(ema.dtype).tiny)
    return (grad + lamb * along * ema).to(grad.dtype), ema


def cosine_lamb(cosine: float, *, lamb_init: float, lamb: float) -> float:
    """λ that grows with the agreement of gradient and slow gradient, and is 0 where they do not agree.

    Args:
        cosine: Smoothed cosine between the gradient and its moving average before the update, in [-1, 1]. Independent
            gradients give about 0, which is why the average must not contain the gradient yet.
        lamb_init: λ for a cosine just above 0.
        lamb: λ for a cosine of 1.

    Returns:
        ``lamb_init + (lamb - lamb_init) * cosine``; 0 (filter off) for a cosine of 0 or less.

    Example:
        >>> cosine_lamb(0.5, lamb_init=0.0, lamb=2.0), cosine_lamb(-0.5, lamb_init=0.0, lamb=2.0)
        (1.0, 0.0)
    """
    return lamb_init + (lamb - lamb_init) * min(cosine, 1.0) if cosine > 0 else 0.0


def warmup_lamb(step: int, *, warmup_steps: int, lamb_init: float, lamb: float) -> float:
    """λ on a straight line from ``lamb_init`` at step 0 to ``lamb`` at ``warmup_steps``, constant after.

    Example:
        >>> warmup_lamb(50, warmup_steps=100, lamb_init=0.0, lamb=2.0)
        1.0
    """
    return lamb_init + (lamb - lamb_init) * min(1.0, step / warmup_steps)


@torch.no_grad()
def ema_filter_(grads: Sequence[Tensor], emas: Sequence[Tensor], *, alpha: float, lamb: float) -> None:
    """`ema_filter` in place on ``grads`` and ``emas``: four memory streams, the minimum, for tensors beyond the cache.

    Args:
        grads: Gradients, each ``(*)``, of any float type.
        emas: Their EMAs, of the same shapes, fp32 or wider. Start with a copy of the first gradients.
        alpha: EMA decay, in [0, 1).
        lamb: Amplification factor. 0 updates the EMAs and leaves the gradients alone.
    """
    small, large = _by_size(grads, emas)
    for grad, ema in large:
        ema.lerp_(grad.to(ema.dtype), 1 - alpha)
        if lamb:
            grad.add_(ema, alpha=lamb)
    if small:
        few_grads, few_emas = map(list, zip(*small, strict=True))
        torch._foreach_lerp_(few_emas, _like(few_grads, few_emas), 1 - alpha)
        _add_scaled_(few_grads, few_emas, lamb)


@torch.no_grad()
def ma_filter_(
    grads: Sequence[Tensor],
    rings: Sequence[Tensor],
    totals: Sequence[Tensor],
    counts: Sequence[int],
    *,
    lamb: float,
) -> None:
    """`ma_filter` in place, on ring buffers with running sums: the cost does not depend on the window.

    A running sum collects rounding errors; each one is summed afresh from its ring once per window, in turns, so that
    no error is older than a window and no step pays for all.

    Args:
        grads: Gradients, each ``(*)``.
        rings: The last gradients, each ``(W, *)``, zero at first.
        totals: Sum of each ring over its first dimension, each ``(*)``, fp32 or wider.
        counts: Gradients that each ring took before this call.
        lamb: Amplification factor.
    """
    window_size = len(rings[0])
    rows = [ring[count % window_size] for ring, count in zip(rings, counts, strict=True)]
    totals = list(totals)
    torch._foreach_sub_(totals, _like(rows, totals))
    torch._foreach_copy_(rows, list(grads))
    # What the ring kept, which a narrow `ring_dtype` has rounded, is what will be subtracted a window later.
    torch._foreach_add_(totals, _like(rows, totals))
    for index, (ring, total, count) in enumerate(zip(rings, totals, counts, strict=True)):
        if count % window_size == index % window_size and count >= window_size:
            torch.sum(ring, 0, dtype=total.dtype, out=total)
    full = [i for i, count in enumerate(counts) if count + 1 >= window_size]
    if full:
        _add_scaled_([grads[i] for i in full], [totals[i] for i in full], lamb / window_size)


@torch.no_grad()
def ema_products_(grads: Sequence[Tensor], emas: Sequence[Tensor], *, alpha: float) -> tuple[Tensor, Tensor]:
    """Update EMAs in place, and take the inner products that `project_` needs while the data is in the cache.

    Returns:
        ``(g·ema, ‖ema‖²)``, each ``(len(grads),)`` and at least fp32: sums over what this process holds, so that shards
        can be added up before `project_`.
    """
    dots, squares = [], []
    for grad, ema in zip(grads, emas, strict=True):
        dot, square = [], []
        for g, e in _split(grad, ema):
            g = g.to(e.dtype)
            e.lerp_(g, 1 - alpha)
            dot.append(_dot(g, e))
            square.append(_dot(e, e))
        dots.append(dot[0] if len(dot) == 1 else torch.stack(dot).sum())
        squares.append(square[0] if len(square) == 1 else torch.stack(square).sum())
    return torch.stack(dots), torch.stack(squares)


@torch.no_grad()
def project_(grads: Sequence[Tensor], emas: Sequence[Tensor], dots: Tensor, squares: Tensor, *, lamb: float) -> None:
    """Second half of `projection_filter` in place: add ``lamb * dots / squares`` times its EMA to every gradient."""
    if not lamb:
        return
    scales = lamb * dots / squares.clamp_min(torch.finfo(squares.dtype).tiny)
    if scales.device.type == "cpu":
        for grad, ema, scale in zip(grads, emas, scales.tolist(), strict=True):
            grad.add_(ema, alpha=scale)
    else:  # reading the scales would stall the device
        torch._foreach_add_(list(grads), torch._foreach_mul(list(emas), list(scales.unbind())))


@torch.no_grad()
def ema_where_(grads: Sequence[Tensor], emas: Sequence[Tensor], ok: Tensor, *, alpha: float) -> None:
    """Update EMAs in place where ``ok``, a boolean scalar, is true. Nothing is read from the device.

    Args:
        grads: Gradients, each ``(*)``.
        emas: Their EMAs, of the same shapes.
        ok: Whether the gradients are finite; if not, the EMAs stay what they are.
        alpha: EMA decay, in [0, 1).
    """
    emas = list(emas)
    torch._foreach_lerp_(emas, [torch.where(ok, g.to(e.dtype), e) for g, e in zip(grads, emas, strict=True)], 1 - alpha)


@torch.no_grad()
def ema_step_(grads: Sequence[Tensor], emas: Sequence[Tensor], ok: Tensor, scale: Tensor, *, alpha: float) -> None:
    """`ema_where_`, and to each gradient ``scale``, a scalar on the device, times its EMA. Compiled, it is one pass."""
    ema_where_(grads, emas, ok, alpha=alpha)
    add_scaled_by_(grads, emas, [scale] * len(grads))


@torch.no_grad()
def ema_products_where_(
    grads: Sequence[Tensor], emas: Sequence[Tensor], ok: Tensor, *, alpha: float
) -> tuple[Tensor, Tensor]:
    """`ema_where_`, and the inner products that `ema_products_` returns."""
    ema_where_(grads, emas, ok, alpha=alpha)
    return inner_products(grads, emas), squared_norms(emas)


@torch.no_grad()
def ma_where_(
    grads: Sequence[Tensor],
    rings: Sequence[Tensor],
    totals: Sequence[Tensor],
    counts: Sequence[Tensor],
    ok: Tensor,
) -> None:
    """First half of `ma_filter_` in place where ``ok`` is true: rings, sums and counts take the gradients.

    Args:
        grads: Gradients, each ``(*)``.
        rings: The last gradients, each ``(W, *)``.
        totals: Sum of each ring over its first dimension, each ``(*)``.
        counts: Gradients that each ring took before this call, each ``(1,)`` int64.
        ok: Whether the gradients are finite, a boolean scalar.
    """
    for grad, ring, total, count in zip(grads, rings, totals, counts, strict=True):
        place = count % len(ring)
        old = ring.index_select(0, place)
        new = torch.where(ok, grad.to(ring.dtype).unsqueeze(0), old)
        ring.index_copy_(0, place, new)
        total.copy_(torch.where(ok, total - old[0].to(total.dtype) + new[0].to(total.dtype), total))
        count.add_(ok)


@torch.no_grad()
def refresh_totals_(rings: Sequence[Tensor], totals: Sequence[Tensor], turn: int) -> None:
    """Sum afresh from its ring every ``W``-th of the sums, those whose turn it is, against rounding errors."""
    for ring, total in list(zip(rings, totals, strict=True))[turn % len(rings[0]) :: len(rings[0])]:
        torch.sum(ring, 0, dtype=total.dtype, out=total)


@torch.no_grad()
def add_scaled_by_(grads: Sequence[Tensor], slow: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Add to each gradient its scale, a scalar on the device, times its slow gradient."""
    for grad, other, scale in zip(grads, slow, scales, strict=True):
        if grad.dtype == other.dtype:
            grad.addcmul_(other, scale.to(other.dtype))
        else:  # add in the wider type, round once
            grad.add_(other * scale.to(other.dtype))


def inner_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product of each pair of tensors, ``(len(a),)``, over what this process holds."""
    return torch.stack([_dot(x.to(y.dtype), y) for x, y in zip(a, b, strict=True)])


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of each tensor, ``(len(tensors),)``, at least fp32. Inf or NaN where the tensor holds one."""
    if tensors[0].device.type == "cpu":
        # On the CPU a dot product runs at memory bandwidth; the norm's kernel is several times slower.
        return torch.stack([_dot(t, t) for t in (t.to(_state_dtype(t)) for t in tensors)])
    return torch.stack([norm.to(_state_dtype(norm)) for norm in torch._foreach_norm(list(tensors))]).square()


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of all tensors together, a scalar. Inf or NaN where one of them holds one."""
    small = [t.reshape(-1) for t in tensors if t.numel() <= _BLOCK]
    large = [t for t in tensors if t.numel() > _BLOCK]
    return squared_norms([torch.cat(small), *large] if small else large).sum()


def _state_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _next_ema(grad: Tensor, ema: Tensor | None, alpha: float) -> Tensor:
    wide = grad.to(_state_dtype(grad))
    if ema is None:
        return wide.clone()
    _check_shape("ema", ema.shape, grad)
    return torch.lerp(ema, wide.to(ema.dtype), 1 - alpha)


def _check_shape(argument: str, shape: torch.Size, grad: Tensor) -> None:
    if shape != grad.shape:
        raise ValueError(f"`{argument}` must fit the shape of `grad`, {tuple(grad.shape)}, but has {tuple(shape)}.")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return torch.sum(a * b)


def _split(grad: Tensor, ema: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Aligned flat blocks of both; the whole pair where it is small, not contiguous, or not on the CPU."""
    if grad.numel() <= _BLOCK or grad.device.type != "cpu" or not (grad.is_contiguous() and ema.is_contiguous()):
        return iter([(grad, ema)])
    return zip(grad.view(-1).split(_BLOCK), ema.view(-1).split(_BLOCK), strict=True)


def _by_size(
    grads: Sequence[Tensor], emas: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Pairs for one multi-tensor call, and blocks of the pairs too large for that."""
    small: list[tuple[Tensor, Tensor]] = []
    large: list[tuple[Tensor, Tensor]] = []
    for grad, ema in zip(grads, emas, strict=True):
        blocks = list(_split(grad, ema))
        (small if len(blocks) == 1 else large).extend(blocks)
    return small, large


def _like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(other.dtype) for t, other in zip(tensors, others, strict=True)]


def _add_scaled_(grads: list[Tensor], slow: list[Tensor], scale: float) -> None:
    if not scale:
        return
    if all(g.dtype == s.dtype for g, s in zip(grads, slow, strict=True)):
        torch._foreach_add_(grads, slow, alpha=scale)
    else:  # add in the wider type, round once
        for grad, other in zip(grads, slow, strict=True):
            grad.add_(other, alpha=scale)
