import pytest
import torch

from forge_lightning.functional import ema_filter, ma_filter, projection_filter
from forge_lightning.grokfast import functional as F

SHAPES = [(7,), (3, 5), (2, 3, 4)]


def gradients(steps, shapes=SHAPES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]


def relative_error(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def published_ema(steps, alpha, lamb):
    """The paper's formulas in float64, as its code starts them: with the first gradient."""
    emas, out = [g.double() for g in steps[0]], []
    for grads in steps:
        emas = [alpha * e + (1 - alpha) * g.double() for e, g in zip(emas, grads, strict=True)]
        out.append([g.double() + lamb * e for e, g in zip(emas, grads, strict=True)])
    return out


def published_ma(steps, window, lamb):
    out = []
    for t, grads in enumerate(steps):
        if t + 1 < window:
            out.append([g.double() for g in grads])
            continue
        means = [torch.stack([s[i].double() for s in steps[t + 1 - window : t + 1]]).mean(0) for i in range(len(grads))]
        out.append([g.double() + lamb * m for g, m in zip(grads, means, strict=True)])
    return out


def published_projection(steps, alpha, lamb):
    emas, out = [g.double() for g in steps[0]], []
    for grads in steps:
        emas = [alpha * e + (1 - alpha) * g.double() for e, g in zip(emas, grads, strict=True)]
        pairs = zip(emas, (g.double() for g in grads), strict=True)
        out.append([g + lamb * ((g * e).sum() / (e * e).sum()) * e for e, g in pairs])
    return out


@pytest.mark.parametrize(
    ("pure", "options", "reference"),
    [
        (ema_filter, {"alpha": 0.98, "lamb": 2.0}, published_ema),
        (projection_filter, {"alpha": 0.98, "lamb": 0.25}, published_projection),
    ],
)
def test_pure_ema_filters_equal_the_published_formulas(pure, options, reference):
    steps = gradients(50)
    expected = reference(steps, **options)
    states = [None] * len(SHAPES)
    for grads, wanted in zip(steps, expected, strict=True):
        for i, grad in enumerate(grads):
            before = grad.clone()
            filtered, states[i] = pure(grad, states[i], **options)
            assert torch.equal(grad, before), "the input was modified"
            assert relative_error(filtered, wanted[i]) <= 1e-6


def test_pure_ma_filter_equals_the_published_formula():
    steps = gradients(50)
    expected = published_ma(steps, window=8, lamb=5.0)
    windows = [None] * len(SHAPES)
    for grads, wanted in zip(steps, expected, strict=True):
        for i, grad in enumerate(grads):
            filtered, windows[i] = ma_filter(grad, windows[i], window_size=8, lamb=5.0)
            assert relative_error(filtered, wanted[i]) <= 1e-6
    assert len(windows[0]) == 8


@pytest.mark.parametrize("pure", [ema_filter, projection_filter])
def test_a_state_of_another_shape_is_refused(pure):
    with pytest.raises(ValueError, match=r"`ema` must fit the shape of `grad`, \(2,\), but has \(3,\)"):
        pure(torch.zeros(2), torch.zeros(3), alpha=0.9, lamb=1.0)
    with pytest.raises(ValueError, match=r"`window` must fit the shape of `grad`"):
        ma_filter(torch.zeros(2), torch.zeros(1, 3), window_size=2, lamb=1.0)


def test_projection_amplifies_only_along_the_average():
    grad, ema = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    filtered, _ = projection_filter(grad, ema, alpha=1 - 1e-9, lamb=1.0)
    torch.testing.assert_close(filtered, torch.tensor([6.0, 4.0]))
    against, _ = projection_filter(-grad, ema, alpha=1 - 1e-9, lamb=1.0)
    torch.testing.assert_close(against, torch.tensor([-6.0, -4.0]))  # amplified against the average, as documented


def test_projection_is_scale_free_in_the_average_and_safe_at_zero():
    grad, ema = torch.randn(9), torch.randn(9)
    one, _ = projection_filter(grad, ema, alpha=1.0, lamb=0.5)
    tenth, _ = projection_filter(grad, ema / 10, alpha=1.0, lamb=0.5)
    torch.testing.assert_close(one, tenth)
    unchanged, _ = projection_filter(torch.zeros(3), torch.zeros(3), alpha=0.9, lamb=0.5)
    assert torch.equal(unchanged, torch.zeros(3))


def test_blocks_of_large_tensors_equal_the_pure_filter():
    grad = torch.randn(F._BLOCK * 2 + 17)
    small = torch.randn(5)
    ema, small_ema = torch.randn_like(grad), torch.randn(5)
    expected, expected_ema = ema_filter(grad, ema, alpha=0.9, lamb=2.0)
    expected_small, _ = ema_filter(small, small_ema, alpha=0.9, lamb=2.0)
    F.ema_filter_([grad, small], [ema, small_ema], alpha=0.9, lamb=2.0)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(ema, expected_ema)
    torch.testing.assert_close(small, expected_small)


def test_projection_blocks_equal_the_pure_filter():
    grad = torch.randn(F._BLOCK + 3)
    ema = torch.randn_like(grad)
    expected, _ = projection_filter(grad, ema, alpha=0.9, lamb=0.25)
    F.project_([grad], [ema], *F.ema_products_([grad], [ema], alpha=0.9), lamb=0.25)
    torch.testing.assert_close(grad, expected)


def test_gradients_that_are_not_contiguous_are_filtered():
    grad = torch.randn(600, 700).t()
    ema = torch.randn(700, 600)
    expected, _ = ema_filter(grad, ema, alpha=0.9, lamb=2.0)
    F.ema_filter_([grad], [ema], alpha=0.9, lamb=2.0)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_gradients_keep_a_wide_average(dtype):
    """A bf16 EMA stalls: constant gradient 1, alpha 0.98 reaches 0.9 and stays."""
    grad, ema = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=torch.promote_types(dtype, torch.float32))
    for _ in range(2000):
        F.ema_filter_([grad], [ema], alpha=0.98, lamb=0.0)
    assert grad.dtype == dtype
    torch.testing.assert_close(ema, torch.ones_like(ema))


def test_running_sum_does_not_drift():
    """Ten windows of large, then small gradients: what the large ones left in the sum is gone a window later."""
    window, shape = 10, (64,)
    ring, total = torch.zeros(window, *shape), torch.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    for count in range(10 * window):
        scale = 1e6 if count < 5 * window else 1e-3
        grad = scale * torch.randn(shape, generator=generator)
        F.ma_filter_([grad], [ring], [total], [count], lamb=0.0)
    assert relative_error(total, ring.double().sum(0)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_average_ring_equals_the_pure_filter(dtype):
    ring, total, window = torch.zeros(4, 3, dtype=dtype), torch.zeros(3), None
    for count, (grad,) in enumerate(gradients(15, [(3,)])):
        expected, window = ma_filter(grad, window, window_size=4, lamb=5.0)
        F.ma_filter_([grad], [ring], [total], [count], lamb=5.0)
        tolerance = {"atol": 0.03, "rtol": 0.03} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(grad, expected, **tolerance)


def test_squared_norms_show_what_is_not_finite():
    squares = F.squared_norms([torch.tensor([3.0, 4.0]), torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan])])
    assert squares[0] == 25
    parts = [torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.float64), torch.ones(F._BLOCK + 1)]
    assert F.squared_norm(parts).item() == pytest.approx(25 + F._BLOCK + 1)
    assert not F.squared_norm([*parts, torch.tensor([torch.nan])]).isfinite()
    assert squares.isfinite().tolist() == [True, False, False]


def test_cosine_schedule_is_off_without_agreement_and_never_leaves_its_range():
    values = [F.cosine_lamb(c, lamb_init=0.05, lamb=0.25) for c in (-1.0, -0.1, 0.0, 0.01, 0.5, 1.0, 1.0001)]
    assert values[:3] == [0.0, 0.0, 0.0]
    assert values == sorted(values)
    assert all(0.05 <= v <= 0.25 for v in values[3:])


def test_inner_products_of_tensors_that_are_not_contiguous():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert F.inner_products([a.t(), a, a], [b, b, b.t()]).tolist() == [69.0, 70.0, 69.0]
    assert F.squared_norms([a.t(), a]).tolist() == [30.0, 30.0]
    assert F.squared_norm([a.t(), b]).item() == 204.0
