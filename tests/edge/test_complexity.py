import math
import random

import pytest
import torch

from forge_lightning.functional import ast_complexity, lempel_ziv_complexity, mean_rank, shannon_entropy


def test_entropy_is_that_of_the_symbols():
    assert shannon_entropy("aaaa") == 0
    assert shannon_entropy("abcd") == 2
    assert shannon_entropy("aab") == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert shannon_entropy(bytes(range(256))) == 8
    assert shannon_entropy([70_000, 3, 70_000, 3]) == 1 == shannon_entropy(torch.tensor([5, 5, -1, -1]))
    assert math.isnan(shannon_entropy(""))
    assert shannon_entropy(["aaaa", "abcd"]).tolist() == [0, 2]


def test_entropy_does_not_depend_on_order_or_names():
    rng = random.Random(0)
    text = "".join(rng.choices("abcdef", weights=range(1, 7), k=500))
    shuffled = "".join(rng.sample(text, len(text)))
    assert shannon_entropy(shuffled) == pytest.approx(shannon_entropy(text))
    assert shannon_entropy(text.translate(str.maketrans("abcdef", "fbadce"))) == pytest.approx(shannon_entropy(text))


def phrases(text):
    """Lempel and Ziv's definition, word by word."""
    start = count = 0
    while start < len(text):
        length = 1
        while start + length <= len(text) and text.find(text[start : start + length], 0, start + length - 1) >= 0:
            length += 1
        start, count = start + length, count + 1
    return count


@pytest.mark.parametrize("seed", range(200))
def test_lempel_ziv_counts_the_phrases_of_the_definition(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abcdefgh"[: rng.randint(1, 8)], k=rng.randint(1, 80)))
    assert lempel_ziv_complexity(text, normalize=False) == phrases(text)


def test_lempel_ziv_of_known_texts():
    assert lempel_ziv_complexity("0001101001000101", normalize=False) == 6  # 0·001·10·100·1000·101
    assert lempel_ziv_complexity("a" * 1000, normalize=False) == 2
    assert math.isnan(lempel_ziv_complexity(""))
    assert lempel_ziv_complexity("a") == 1


def test_normalised_lempel_ziv_tells_random_from_repeated_whatever_the_alphabet():
    for size in (2, 16, 256):
        text = bytes(random.Random(1).choices(range(size), k=20_000))
        assert 0.8 < lempel_ziv_complexity(text) < 1.2
        assert lempel_ziv_complexity(text[:100] * 200) < 0.05
    both = lempel_ziv_complexity(["ab" * 500, "".join(random.Random(0).choices("ab", k=1000))])
    assert both[0] < 0.05 < 0.8 < both[1]


def test_ast_complexity_counts():
    found = ast_complexity("x = 1")
    # Module, Assign, Name, Store, Constant
    assert found == (5, 4, pytest.approx(4 / 3), 1, 0)
    code = """
def f(x):
    for i in range(x):
        if x > 1 and i < 3 or x == 2:
            return [a for a in x if a]
    try:
        pass
    except ValueError:
        pass
    return 1 if x else 2
"""
    found = ast_complexity(code)
    assert found.cyclomatic == 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1  # for, if, and, or, comprehension, except, ternary
    assert found.nesting == 4  # def, for, if, comprehension


@pytest.mark.parametrize("code", ["def f(:", "x = '", "\0", "(" * 500])
def test_what_is_no_python_has_no_complexity(code):
    assert all(math.isnan(value) for value in ast_complexity(code))
    assert not math.isnan(ast_complexity("").nodes)


def test_renaming_changes_no_complexity_and_nesting_raises_it():
    assert ast_complexity("def f(a): return a") == ast_complexity("def other(name): return name")
    flat, deep = "if a: x\nif b: y", "if a:\n  if b: y"
    assert ast_complexity(deep).nesting > ast_complexity(flat).nesting
    assert ast_complexity(deep).depth > ast_complexity(flat).depth


def test_ranks_are_combined_whatever_the_units():
    measures = torch.tensor([[1.0, 5e6], [2.0, 5e5], [3.0, 5e4]])
    assert mean_rank(measures).tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(mean_rank(measures), mean_rank(measures * torch.tensor([1e-9, 1e9])))
    ties = mean_rank(torch.tensor([[1.0], [1.0], [2.0], [float("nan")]]))
    assert ties[:3].tolist() == [0.25, 0.25, 1.0]
    assert math.isnan(ties[3])
