"""The head without a Trainer."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from forge_lightning.components import SelfModelHead
from forge_lightning.core.layers import select_layers

FORMS = ("paper", "next_latent", "forward")


def gpt2(layers=4, width=32):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_layer=layers, n_embd=width, n_head=2, n_positions=64)
    return AutoModelForCausalLM.from_config(config).eval()  # without dropout


def llama():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=50, num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).eval()  # without dropout


def tokens(batch=4, length=7):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def head_on(model, **kwargs):
    head = SelfModelHead(**{"warmup_steps": 0} | kwargs)
    head.attach(model)
    return head


def loss_of(head, model, ids, mask=None, step=0):
    head.start()
    model(input_ids=ids, attention_mask=mask)
    loss = head.loss(step=step, mask=mask)
    head.stop()
    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_batch_of_four_by_seven_and_padding_that_does_not_count(form, make):
    model = make()
    head = head_on(model, form=form)
    ids = tokens()
    plain = loss_of(head, model, ids)
    padded = torch.cat([ids, torch.zeros(4, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(4, 7), torch.zeros(4, 3)], 1).long()
    assert torch.allclose(loss_of(head, model, padded, mask), plain, atol=1e-5)
    padded[:, 7:] = 9
    assert torch.allclose(loss_of(head, model, padded, mask), plain, atol=1e-5)


def test_one_token_is_enough_for_the_published_form():
    model = gpt2()
    loss = loss_of(head_on(model), model, tokens(1, 1))
    assert loss.isfinite()
    assert loss > 0


def test_all_padding_costs_nothing():
    model = gpt2()
    loss = loss_of(head_on(model), model, tokens(2, 4), torch.zeros(2, 4).long())
    assert loss.item() == 0


def test_gradient_reaches_every_layer_before_the_features():
    model = gpt2()
    loss_of(head_on(model), model, tokens()).backward()
    for name, block in select_layers(model, "all").items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()), name
    assert model.transformer.wte.weight.grad.abs().sum() > 0


def test_targets_get_no_gradient_unless_asked():
    """Of the last layer alone, predicted from the one before it."""
    for stop_gradient in (True, False):
        model = gpt2()
        options = {"form": "forward", "layers": ["transformer.h.2", "transformer.h.3"]}
        loss_of(head_on(model, stop_gradient=stop_gradient, **options), model, tokens()).backward()
        grads = [p.grad for p in model.transformer.h[3].parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in grads) != stop_gradient


class Noise(nn.Module):
    """Two layers whose outputs are fresh noise at each step; one of them can be made easy or empty."""

    def __init__(self, second="noise"):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.stem, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.blocks[0].register_forward_hook(lambda *_: torch.randn(8, 16))
        outputs = {
            "noise": lambda: torch.randn(8, 16),
            "empty": lambda: torch.zeros(8, 16),
            "easy": lambda: torch.arange(16.0).expand(8, 16),
        }
        self.blocks[1].register_forward_hook(lambda *_: outputs[second]())

    def forward(self, x):
        for block in self.blocks:
            block(x)
        return self.out(self.stem(x))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("second", ["noise", "empty", "easy"])
def test_loss_on_noise_cannot_fall(adaptive, second):
    """By learning, or by moving its weight to a slot that is easy or empty."""
    torch.manual_seed(0)
    model = Noise(second)
    head = head_on(model, layers="all", adaptive=adaptive)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
    reported, of_noise = [], []
    for step in range(400):
        head.start()
        model(torch.randn(8, 16))
        loss = head.loss(step=step)
        head.stop()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = head.end_step(step=step + 1, measure=True)
        reported.append(metrics["loss"])
        of_noise.append(1 - metrics["blocks.0/explained_variance"])
    start, end = sum(reported[:20]) / 20, sum(reported[-100:]) / 100
    share = 0.5 if second == "easy" else 1.0  # what the easy one, rightly learned, leaves of the mean
    assert end >= 0.95 * share * min(start, 1.0)
    assert sum(of_noise[-100:]) / 100 >= 0.95
    assert max(head.layer_weights()) / min(head.layer_weights()) <= 4


def test_what_can_be_predicted_is_learned_and_explained():
    model = gpt2()
    head = head_on(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        loss_of(head, model, tokens(), step=step).backward()
        optimizer.step()
        metrics = head.end_step(step=step + 1, measure=True)
        if step == 0:
            before = dict(metrics)
    assert metrics["loss"] < 0.5 * before["loss"]
    for target in head.targets:
        assert metrics[f"{target}/explained_variance"] > 0.8 > before[f"{target}/explained_variance"]


def test_collapse_lowers_the_weight_once_and_says_so():
    model = gpt2()
    head = head_on(model, watch_every_n_steps=1, collapse_below=0.5)
    loss_of(head, model, tokens(4, 16), step=0)
    first = head.end_step(step=1)
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_()
        model.transformer.wte.weight[:] = torch.randn(50, 1) * torch.randn(32)
        model.transformer.wpe.weight.zero_()
    loss_of(head, model, tokens(4, 16), step=1)
    with pytest.warns(UserWarning, match=r"SelfModelHead: at step 2 the effective rank of 'transformer.h.1' is 1.0"):
        second = head.end_step(step=2)
    assert second["transformer.h.1/effective_rank"] < 1.1 < 0.5 * first["transformer.h.1/effective_rank"]
    assert head.current_weight(5) == 0.25
    loss_of(head, model, tokens(4, 16), step=2)
    head.end_step(step=3)
    assert head.current_weight(5) == 0.25


def test_what_a_new_network_loses_before_the_warm_up_ends_is_no_collapse():
    model = gpt2()
    head = head_on(model, watch_every_n_steps=1, warmup_steps=2)
    loss_of(head, model, tokens(4, 16), step=0)
    head.end_step(step=1)
    with torch.no_grad():
        model.transformer.wte.weight[:] = torch.randn(50, 1) * torch.randn(32)
        model.transformer.wpe.weight.zero_()
    for step in (1, 2, 3):
        loss_of(head, model, tokens(4, 16), step=step)
        head.end_step(step=step + 1)
    assert head.current_weight(9) == 1.0


def test_weight_rises_over_the_warm_up():
    head = SelfModelHead(weight=2.0, warmup_steps=4)
    assert [head.current_weight(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_nothing_is_kept_after_a_step_and_hooks_go():
    model = gpt2()
    head = head_on(model)
    loss_of(head, model, tokens())
    head.start()
    model(input_ids=tokens())
    head.stop()
    assert head.loss(step=0) is None
    head.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(list(head.parameters())) > 0


def test_checkpointed_layers_are_predicted_too():
    losses = []
    for checkpointing in (False, True):
        model = gpt2().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = loss_of(head_on(model), model, tokens())
        loss.backward()
        losses.append((loss.item(), model.transformer.h[0].mlp.c_fc.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][1] > 0


@pytest.mark.parametrize("form", FORMS)
def test_compiled_model_gives_the_same_loss(form):
    ids = tokens()
    plain = gpt2().eval()
    expected = loss_of(head_on(plain, form=form), plain, ids)
    compiled = gpt2().eval()
    head = head_on(compiled, form=form)
    compiled.compile(backend="eager")
    for _ in range(2):
        assert torch.allclose(loss_of(head, compiled, ids), expected, rtol=1e-4)
    compiled(input_ids=ids)  # closed: nothing is kept
    assert head.loss(step=0) is None


def test_global_random_stream_is_left_alone_and_the_seed_decides():
    first, second = (head_on(gpt2()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    head = SelfModelHead()
    model = gpt2()
    torch.manual_seed(0)
    head.attach(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_small_batches_are_no_collapse():
    """A cloud of few points has a small rank: measurements compare only at the same number."""
    model = gpt2()
    head = head_on(model, watch_every_n_steps=1, collapse_below=0.9)
    ranks = []
    for step, batch in enumerate((8, 8, 1, 2, 8)):
        loss_of(head, model, tokens(batch, 8), step=step)
        ranks.append(head.end_step(step=step + 1)["transformer.h.1/effective_rank"])
    assert [math.isnan(rank) for rank in ranks] == [False, False, True, True, False]
    assert head.current_weight(9) == 1.0


def test_rank_is_of_the_whole_step():
    """Four batches of accumulation are one batch."""
    ids, ranks = tokens(8, 8), []
    for parts in (1, 4):
        model = gpt2()
        head = head_on(model, watch_every_n_steps=1)
        for part in ids.chunk(parts):
            loss_of(head, model, part)
        ranks.append(head.end_step(step=1)["transformer.h.1/effective_rank"])
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-4)


def test_watch_comes_also_when_steps_are_counted_in_twos():
    model = gpt2()
    head = head_on(model, watch_every_n_steps=3)
    seen = []
    for step in range(0, 24, 2):
        loss_of(head, model, tokens(), step=step)
        seen.append("transformer.h.1/effective_rank" in head.end_step(step=step + 2))
    assert sum(seen) >= 4


def test_in_place_changes_are_told():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    head = head_on(network, layers=["0"])
    head.start()
    network(torch.randn(3, 4))
    with pytest.raises(ValueError, match="the output of '0' was changed in place by a later layer"):
        head.loss(step=0)
    head = head_on(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), layers=["1"])


def test_one_vector_for_each_example_is_the_last_real_token():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids, mask):
            x = self.layer(self.embed(ids))
            return self.out(x[torch.arange(len(ids)), mask.sum(1) - 1])

    torch.manual_seed(0)
    network = Pools()
    head = head_on(network, layers=["layer"])
    ids, mask = torch.randint(0, 5, (3, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    head.start()
    network(ids, mask)
    head.loss(step=0, mask=mask)
    metrics = head.end_step(step=1, measure=True)
    assert metrics["layer/copy_explained_variance"] == 1.0  # the very same rows
    head.start()
    network(ids, mask)
    assert head.loss(step=0, mask=mask) > 0


def test_recomputed_activations_are_not_the_next_pass():
    """Manual optimization with checkpointing: the backward pass computes layers again."""
    model = gpt2()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    head = head_on(model)
    ids = tokens(8)
    expected = [loss_of(head, model, part).item() for part in ids.chunk(2)]
    found = []
    for part in ids.chunk(2):
        head.start()
        model(input_ids=part)
        loss = head.loss(step=0)
        loss.backward()
        found.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_copy_has_hooks_of_its_own_and_a_head_has_one_network():
    pair = nn.ModuleDict({"network": gpt2(), "head": SelfModelHead(warmup_steps=0)})
    pair["head"].attach(pair["network"])
    other = copy.deepcopy(pair)
    loss = loss_of(other["head"], other["network"], tokens())
    assert torch.allclose(loss, loss_of(pair["head"], pair["network"], tokens()))
    with pytest.raises(ValueError, match="predicts another network already"):
        pair["head"].attach(gpt2())


def test_settings_are_taken_over_where_they_can_be():
    head = head_on(gpt2())
    head.take_settings(SelfModelHead(weight=7.0, adaptive=True))
    assert (head.weight, head.adaptive) == (7.0, True)
    with pytest.raises(ValueError, match=r"SelfModelHead\(form='forward'\)`: the module has a head already"):
        head.take_settings(SelfModelHead(form="forward"))


def test_running_state_goes_on():
    model = gpt2()
    head = head_on(model, adaptive=True)
    loss_of(head, model, tokens())
    head.end_step(step=1)
    other = head_on(gpt2(), adaptive=True)
    other.load_running_state(head.running_state())
    assert other.layer_weights() == head.layer_weights() != [1.0] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"form": "latent"}, r"SelfModelHead\(form='latent'\)` must be one of"),
        ({"weight": -1}, "weight=-1.*at least 0"),
        ({"weight": math.inf}, "weight=inf.*finite"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"collapse_below": 1.0}, r"collapse_below=1.0.*\(0, 1\)"),
        ({"watch_every_n_steps": 0}, "watch_every_n_steps=0"),
        ({"form": "next_latent", "layers": "all"}, "layers='all'.*left out"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SelfModelHead(**kwargs)


def test_what_does_not_fit_a_network_is_said_when_attached():
    with pytest.raises(ValueError, match=r"`SelfModelHead\(layers=\['h.9'\]\)`: No layer is called 'h.9'"):
        head_on(gpt2(), layers=["h.9"])
    with pytest.raises(ValueError, match="names 1 layers of GPT2LMHeadModel, and needs at least 2"):
        head_on(gpt2(), form="forward", layers=[0.5])
    with pytest.raises(ValueError, match="Sequential has no `nn.Embedding`"):
        head_on(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), form="next_latent")
    with pytest.raises(ValueError, match="No module is called 'lm'. Close: "):
        SelfModelHead().attach(gpt2(), reads="lm")
    with pytest.raises(ValueError, match="no `nn.Linear` outside its blocks"):
        head_on(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)))


def test_width_that_cannot_be_told():
    class Own(nn.Module):
        def forward(self, x):
            return x[..., :3]

    network = nn.Sequential(Own(), nn.Linear(3, 3))
    x = torch.randn(5, 8, requires_grad=True)
    with pytest.raises(ValueError, match="cannot infer the output width of '0'"):
        head_on(network, layers=["0"])
    head = SelfModelHead(layers=["0"], warmup_steps=0)
    head.attach(network, width=3)
    head.start()
    network(x)
    assert head.loss(step=0).isfinite()


def test_shapes_that_do_not_fit_are_said_at_the_loss():
    network = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2))
    head = head_on(network, layers=["0"])
    head.start()
    network(torch.randn(3, 2, 4))
    assert head.loss(step=0).isfinite()  # the last position of the layer against the flattened features
    images = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    head = SelfModelHead(layers=["0"])
    head.attach(images, width=16)
    head.start()
    images(torch.randn(3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"Layer '0' returns \(3, 4, 2, 2\); a head needs \(N, D\) or \(B, T, D\)"):
        head.loss(step=0)
    model = gpt2()
    head = head_on(model)
    head.start()
    model(input_ids=tokens())
    with pytest.raises(ValueError, match=r"the mask is \(4, 3\), the activations 4 × 7"):
        head.loss(step=0, mask=torch.ones(4, 3))


def test_layer_that_is_never_called():
    network = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    head = head_on(network, layers=["a"])
    head.start()
    network["b"](torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"the forward pass did not go through \['a'\]"):
        head.loss(step=0)


def test_next_latent_needs_a_next_position():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.out(self.embed(x)[:, -1])

    network = Last()
    head = head_on(network, form="next_latent")
    head.start()
    network(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="reads one position only"):
        head.loss(step=0)


def test_positions_first_activations_are_turned():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.out(self.layer(self.embed(x).transpose(0, 1)))

    torch.manual_seed(0)
    network = Turned()
    head = head_on(network, layers=["layer"])
    ids, mask = torch.randint(0, 5, (3, 6)), torch.ones(3, 6)
    head.start()
    network(ids)
    full = head.loss(step=0, mask=mask)
    mask[:, 4:] = 0
    head.start()
    network(ids)
    part = head.loss(step=0, mask=mask)
    head.start()
    network(ids[:, :4])
    assert torch.allclose(part, head.loss(step=0))
    assert not torch.allclose(part, full)


@pytest.mark.parametrize("form", ["paper", "forward", "next_latent"])
def test_choosing_real_tokens_and_weighing_them_give_the_same_loss(form, monkeypatch):
    """On an accelerator rows that do not count are predicted too, and have no gradient, whatever they hold."""
    ids, mask = tokens(), torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:], mask[2, 1:], mask[3] = 0, 0, 0
    found = []
    for free in (True, False):
        monkeypatch.setattr("forge_lightning.self_model.head.reads_are_free", lambda device, free=free: free)
        model = gpt2()
        head = head_on(model, form=form, warmup_steps=0, watch_every_n_steps=1)
        loss = loss_of(head, model, ids, mask)
        loss.backward()
        gradient = [p.grad.flatten() for p in (*head.parameters(), *model.parameters()) if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradient), head.end_step(step=1, measure=True)))
    for ours, theirs in zip(*(part[:2] for part in found), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert found[0][2].keys() == found[1][2].keys()
    for key, value in found[0][2].items():
        assert found[1][2][key] == pytest.approx(value, rel=1e-4, nan_ok=True), key
