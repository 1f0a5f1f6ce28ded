"""Continuing prompts with a Hugging Face model, whatever their lengths."""

from typing import Any

import torch

from forge_lightning.components.tokens import prompt_ids


def generate(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """`ForgeModule.complete` for a model in evaluation mode."""
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None) or max(map(len, encoded)) + max_new_tokens
    fitting = [index for index, ids in enumerate(encoded) if 0 < len(ids) < context]
    texts = [""] * len(prompts)
    if not fitting:
        return texts
    longest = max(len(encoded[index]) for index in fitting)
    input_ids = torch.full((len(fitting), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, index in enumerate(fitting):  # padded on the left, so that every row ends where it goes on
        input_ids[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index])
        mask[row, longest - len(encoded[index]) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with torch.random.fork_rng(enabled=bool(temperature)):
        if temperature:
            torch.manual_seed(seed)
        out = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=min(max_new_tokens, context - longest),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **(sampling or {"do_sample": False}),
        )
    for row, index in enumerate(fitting):
        texts[index] = tokenizer.decode(out[row, longest:], skip_special_tokens=True)
    return texts
