"""What a look at data and modules leaves as it was."""

import functools
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from forge_lightning.core.kept_state import buffers_kept, generators_kept


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return generator.rand() if isinstance(generator, np.random.RandomState) else generator.random()


class Slots:
    __slots__ = ("generator",)

    def __init__(self, generator):
        self.generator = generator

    def method(self):
        return draw(self.generator)


def closure(generator):
    return lambda: draw(generator)


class Proxy:
    """Holds what must not be asked for anything."""

    def __init__(self, generator):
        self.dead = weakref.proxy(nn.Module())
        self.generator = generator


def deep(generator):
    data = SimpleNamespace(transforms=[Slots(generator)])
    return Subset(Subset(ConcatDataset([Subset(data, [0]) for _ in range(70)]), [0]), [0])


@pytest.mark.parametrize(
    "make",
    [torch.Generator, lambda: np.random.default_rng(0), lambda: np.random.RandomState(0), lambda: random.Random(0)],
)
@pytest.mark.parametrize(
    "hold",
    [
        lambda g: g,
        Slots,
        Proxy,
        closure,
        deep,
        lambda g: functools.partial(draw, g),
        lambda g: functools.partial(draw, generator=g),
        lambda g: Slots(g).method,
        lambda g: {"a": (1, [g])},
    ],
)
def test_generators_are_found_and_put_back(make, hold):
    generator = make()
    held = hold(generator)
    with generators_kept(held):
        expected = [draw(generator) for _ in range(3)]
    assert [draw(generator) for _ in range(3)] == expected


def test_long_lists_of_examples_are_passed_over():
    class Counts:
        looked = 0

        def __getattribute__(self, name):
            Counts.looked += 1
            return super().__getattribute__(name)

    with generators_kept(SimpleNamespace(rows=[Counts()] * 100_000, few=[Counts()])):
        pass
    assert Counts.looked == 0


def written(module):
    module.counter += 1
    module.view[0] = 7
    module.grown.resize_(5)
    module.replaced = module.replaced + 1
    module.nothing = torch.ones(2)
    module.through_data.data.add_(1)


def test_buffers_are_put_back_whatever_happened_to_them():
    module = nn.Module()
    for name, value in {
        "counter": torch.zeros((), dtype=torch.long),
        "view": torch.arange(6.0).view(2, 3).t(),
        "grown": torch.arange(3.0),
        "replaced": torch.zeros(2),
        "through_data": torch.zeros(2),
        "expanded": torch.zeros(1).expand(4),
        "meta": torch.zeros(4, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "nothing": None,
    }.items():
        module.register_buffer(name, value, persistent=False)
    with torch.inference_mode():
        module.register_buffer("inference", torch.zeros(2))
    kept = {
        name: (buffer, None if buffer is None or buffer.is_meta else buffer.clone())
        for name, buffer in module._buffers.items()
    }
    with buffers_kept(module):
        written(module)
    for name, (buffer, value) in kept.items():
        assert getattr(module, name) is buffer
        if value is not None:
            assert torch.equal(buffer.to_dense(), value.to_dense()), name
