"""A language model of a few thousand weights, and text for it."""

import torch


def tiny_model(seed=0, tied=True, kind="llama"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "tie_word_embeddings": tied}
    if kind == "llama":
        shape |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    else:
        shape |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def written_by(model, count, length=24, seed=0, size=4):
    """Text that the model has written itself, so that it is the best model of it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (count, 1), generator=generator)
    for _ in range(length - 1):
        shares = model(input_ids=tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    return _batches(tokens, size)


def _batches(tokens, size):
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in tokens.split(size)]


def batches(count, length=24, seed=0, size=4):
    tokens = torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in tokens.split(size)]
