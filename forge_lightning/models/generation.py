"""Continue prompts with a Hugging Face model, each prompt as if it were alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from forge_lightning.core.tokens import continuation_text, pad_id, prompt_ids


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """`ForgeModule.complete` for a model in evaluation mode.

    What a prompt gets depends on the prompt, its occurrence among equal prompts and ``seed``, not on its neighbours:
    each has the room that it has alone, and draws from a random generator of its own.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None)
    seeds = _seeds(encoded, seed) if temperature else [0] * len(prompts)
    rooms: dict[int, list[int]] = defaultdict(list)  # prompts by the number of tokens that they have room for
    for index, ids in enumerate(encoded):
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if ids and room > 0:
            rooms[room].append(index)
    texts = [""] * len(prompts)
    for room, indices in rooms.items():
        draws = _Draws(temperature, [seeds[index] for index in indices]) if temperature else None
        new = _continued(model, tokenizer, [encoded[index] for index in indices], room, draws)
        for index, ids in zip(indices, new, strict=True):
            texts[index] = continuation_text(tokenizer, encoded[index], ids)
    return texts


def _continued(
    model: Any, tokenizer: Any, encoded: Sequence[list[int]], room: int, draws: "_Draws | None"
) -> list[list[int]]:
    """New tokens of prompts that all have the same room."""
    longest, pad = max(map(len, encoded)), pad_id(tokenizer)
    input_ids = torch.full((len(encoded), longest), pad)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(encoded):  # padded on the left, so that every row ends where it goes on
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    with _only_our_settings(model) as own_ends:
        ends = [*dict.fromkeys([end for end in (tokenizer.eos_token_id, *own_ends) if end is not None])]
        out = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            do_sample=False,
            **({} if draws is None else {"logits_processor": [draws]}),
        )
    found: list[list[int]] = []
    for ids in out[:, longest:].tolist():
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        found.append(ids[:stop])
    return found


@contextmanager
def _only_our_settings(model: Any) -> Iterator[list[int]]:
    """Leave out the model's own generation settings: a repetition penalty makes greedy decoding something else.

    Yields the model's own end tokens, which still end a completion.
    """
    before = getattr(model, "generation_config", None)
    if before is None:
        yield []
        return
    from transformers import GenerationConfig

    ends = before.eos_token_id
    model.generation_config = GenerationConfig()
    try:
        yield ends if isinstance(ends, list) else [] if ends is None else [ends]
    finally:
        model.generation_config = before


def _seeds(encoded: Sequence[list[int]], seed: int) -> list[int]:
    """A seed for each prompt: the same wherever it stands. Equal prompts count up from ``seed``."""
    earlier: Counter[bytes] = Counter()
    seeds = []
    for ids in encoded:
        content = torch.tensor(ids, dtype=torch.int64).numpy().tobytes()
        number = seed + earlier[content]
        earlier[content] += 1
        digest = hashlib.blake2b(content + str(number).encode(), digest_size=8).digest()
        seeds.append(int.from_bytes(digest, "little") >> 1)
    return seeds


class _Draws:
    """A logits processor that makes the likeliest token a draw from ``softmax(logits / temperature)``.

    Adds Gumbel noise to each row from its own generator (the Gumbel-max trick), so that no row's draw depends on its
    neighbours, and the global random stream is left alone.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature, self._seeds = temperature, seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.clamp(min=torch.finfo(torch.float32).tiny).log()
