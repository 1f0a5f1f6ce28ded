import pytest
import torch
from torch import nn

from forge_lightning.core.layers import blocks, output_width, select_layers


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.small = nn.ModuleList([nn.Linear(1, 1)])
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))


def test_blocks_are_the_largest_list_the_largest_sequence_or_the_children():
    assert list(blocks(Transformer())) == [f"layers.{i}" for i in range(5)]
    assert list(blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == ["0", "1"]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.second = nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)

    assert list(blocks(Two())) == ["first", "second"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [f"layers.{i}" for i in range(5)]),
        ([0.0, 0.5, 1.0], ["layers.0", "layers.2", "layers.4"]),
        ([0.99, 1.0], ["layers.4"]),
        (["layers.3", "embed"], ["embed", "layers.3"]),
        ("layers.*", [f"layers.{i}" for i in range(5)]),
        ([1.0, "embed"], ["embed", "layers.4"]),
    ],
)
def test_selection_comes_in_the_order_of_the_model(layers, expected):
    model = Transformer()
    found = select_layers(model, layers)
    assert list(found) == expected
    assert all(found[name] is model.get_submodule(name) for name in found)


def test_a_star_is_one_part_of_a_name():
    model = nn.Sequential(nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "b": nn.Linear(2, 2)}))
    assert list(select_layers(model, "0.*")) == ["0.a", "0.b"]
    assert list(select_layers(model, "0.*.*")) == ["0.a.0", "0.a.1"]


def test_names_are_free_of_wrappers():
    compiled = nn.ModuleDict({"model": torch.compile(Transformer(), backend="eager")})
    assert list(select_layers(compiled, [1.0])) == ["model.layers.4"]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["layer.3"], "'layers.3'"),
        (["nonsense_entirely"], "Found by depth: .*layers.0"),
        ([1.5], r"in \[0, 1\], not 1.5"),
    ],
)
def test_what_is_not_there_is_explained(layers, says):
    with pytest.raises(ValueError, match=says):
        select_layers(Transformer(), layers)


def test_no_layers_at_all():
    with pytest.raises(ValueError, match="no layers that could be found by depth"):
        select_layers(nn.ReLU(), [0.5])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("module", "width"), [(nn.LSTM(4, 6), 6), (nn.GRU(4, 6, bidirectional=True), 12), (nn.LSTM(4, 6, proj_size=3), 3)]
)
def test_width_of_recurrent_layers(module, width):
    model = nn.Sequential(nn.Linear(3, 4), module)
    assert output_width(model, module) == width
    assert module(torch.zeros(2, 5, 4))[0].shape[-1] == width
