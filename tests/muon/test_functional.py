import pytest
import torch

from forge_lightning.muon.functional import COEFFICIENTS, newton_schulz, product_dtype


def by_singular_values(matrix, steps):
    """The same by what it means: the polynomial on the singular values of the matrix divided by its norm."""
    u, s, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (1, 7)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_maps_the_singular_values(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(matrix, steps)
    assert result.shape == shape
    torch.testing.assert_close(result.double(), by_singular_values(matrix, steps), atol=1e-5, rtol=1e-5)


def test_newton_schulz_of_a_stack_is_that_of_each():
    stack = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(stack), torch.stack([newton_schulz(matrix) for matrix in stack]))


def test_newton_schulz_of_zeros_is_zeros():
    assert torch.equal(newton_schulz(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_newton_schulz_leaves_its_input_alone():
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    newton_schulz(matrix)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("device", "multiplies", "expected"),
    [
        ("cpu", True, torch.float32),
        ("mps", True, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("xpu", False, torch.bfloat16),
    ],
)
def test_products_are_in_16_bits_only_where_an_accelerator_multiplies_them(monkeypatch, device, multiplies, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: multiplies)
    assert product_dtype(torch.device(device)) == expected


def test_newton_schulz_works_in_the_type_asked_for():
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    coarse = newton_schulz(matrix, dtype=torch.bfloat16)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), newton_schulz(matrix), atol=0.05, rtol=0.05)


def test_defaults_are_five_steps_and_a_norm_that_counts_down_to_tiny_gradients():
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(newton_schulz(matrix), newton_schulz(matrix, 5))
    torch.testing.assert_close(newton_schulz(1e-6 * matrix), newton_schulz(matrix), rtol=1e-4, atol=1e-4)
