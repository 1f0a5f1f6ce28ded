from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from forge_lightning.data.tokens import build_tokenizer
from forge_lightning.models import ForgeModule
from forge_lightning.models.generation import Sampling, _Draws, generate

BYTES = build_tokenizer("bytes")
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 2, "max_position_embeddings": 64, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    made = ForgeModule(config=LLAMA)
    made.build(BYTES)
    with torch.no_grad():
        made.model.lm_head.weight[:3] = 0  # no end token
        made.model.lm_head.weight[40:110] *= 4
        made.model.lm_head.weight[259:] = 0
    return made


class Writes:
    """Writes the letter "a" wherever there is room."""

    config, device = SimpleNamespace(max_position_embeddings=64), torch.device("cpu")

    def generate(self, input_ids, max_new_tokens, **_):
        assert input_ids.shape[1] + max_new_tokens <= 64
        return torch.cat([input_ids, torch.full((len(input_ids), max_new_tokens), 100)], 1)


@pytest.mark.parametrize("order", [1, -1])
def test_generate_long_neighbour_leaves_the_room_of_others(order):
    prompts = ["ab", "x" * 60, "x" * 64, "x" * 50, ""][::order]
    texts = generate(Writes(), BYTES, prompts, Sampling(20, 0.0, 1.0, 0))
    assert [len(text) for text in texts[::order]] == [20, 4, 0, 14, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_complete_does_not_depend_on_batch_and_order(module, temperature):
    prompts = ["def f(x):", "a", "#" * 60, "b = 3", "def f(x):"]
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    together = module.complete(prompts, **options)
    assert module.complete(prompts[::-1], **options)[1:4] == together[3:0:-1]
    assert [module.complete([prompt], **options)[0] for prompt in prompts[:4]] == together[:4]
    again = module.complete(["def f(x):"], max_new_tokens=12, temperature=temperature, seed=4)
    assert again[0] == together[4]  # the second of two equal prompts
    assert (together[0] == together[4]) == (temperature == 0)


def test_samples_follow_the_softmax_and_leave_the_global_stream(module):
    state = torch.get_rng_state()
    found = Counter(module.complete(["ab"] * 4000, max_new_tokens=1, temperature=0.7, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.tensor([BYTES("ab", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        likely = (module.eval().model(ids).logits[0, -1] / 0.7).softmax(-1).topk(5)
    for chance, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        error = (chance * (1 - chance) / 4000) ** 0.5
        assert abs(found[BYTES.decode([token])] / 4000 - chance) < 4 * error


def test_greedy_ignores_the_models_own_generation_settings(module):
    plain = module.complete(["def f(x):"], max_new_tokens=20)
    before = module.model.generation_config
    module.model.generation_config = type(before)(repetition_penalty=1.5, min_new_tokens=3, no_repeat_ngram_size=1)
    changed = module.model.generation_config
    try:
        assert module.complete(["def f(x):"], max_new_tokens=20) == plain
        assert module.model.generation_config is changed
        third = BYTES(plain[0], add_special_tokens=False)["input_ids"][2]
        module.model.generation_config.eos_token_id = [1, third]
        ended = module.complete(["def f(x):"], max_new_tokens=20)[0]
        assert ended == plain[0][: plain[0].index(BYTES.decode([third]))]
    finally:
        module.model.generation_config = before


def test_complete_leaves_frozen_parts_in_evaluation_mode(module):
    module.model.train()
    module.model.model.layers[0].eval()
    module.complete(["a"], max_new_tokens=2)
    assert not module.model.model.layers[0].training
    assert not module.model.model.layers[0].mlp.training
    assert module.model.training
    assert module.model.model.norm.training
    module.model.train()


def test_top_p_draws_from_the_likeliest_alone(module):
    """A uniform model but for two letters, which together have nine tenths of the probability."""
    scores = torch.full((1, 384), -30.0)
    scores[0, :10] = torch.tensor([0.01] * 10).log()
    scores[0, 100], scores[0, 101] = torch.tensor(0.6).log(), torch.tensor(0.3).log()
    found = {}
    for top_p in (1.0, 0.85, 0.5):
        draws = [int(_Draws(Sampling(1, 1.0, top_p, 0), [seed])(None, scores.clone()).argmax()) for seed in range(400)]
        found[top_p] = Counter(draws)
    assert len(found[1.0]) > 4
    assert set(found[0.85]) == {100, 101}
    assert abs(found[0.85][100] / 400 - 2 / 3) < 0.08
    assert set(found[0.5]) == {100}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_pieces_of_text_add_up(module, temperature):
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 1}
    pieces = []
    whole = module.complete(["def f"], **options, on_text=pieces.append)[0]
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert whole == module.complete(["def f"], **options)[0]


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        (["a"], {"top_p": 0.0}, "top_p=0.0"),
        (["a"], {"top_p": 1.5}, "top_p=1.5"),
        (["a", "b"], {"on_text": print}, "one prompt"),
    ],
)
def test_complete_refuses(module, prompts, options, named):
    with pytest.raises(ValueError, match=named):
        module.complete(prompts, **options)


def test_nothing_is_shown_behind_an_end_of_the_models_own(module):
    """An end token of the model that is a letter to the tokenizer: what follows it is no text."""
    before = module.model.generation_config.eos_token_id
    module.model.generation_config.eos_token_id = [1, *range(60, 80)]
    try:
        for seed in range(6):
            pieces = []
            options = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
            assert module.complete(["ab"], **options, on_text=pieces.append)[0] == "".join(pieces)
    finally:
        module.model.generation_config.eos_token_id = before
