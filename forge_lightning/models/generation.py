"""Continue prompts with a Hugging Face model, each prompt as if it were alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge_lightning.core.tokens import continuation_text, pad_id, prompt_ids


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as in `ForgeModule.complete`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """`ForgeModule.complete` for a model in evaluation mode.

    What a prompt gets depends on the prompt, its occurrence among equal prompts and ``seed``, not on its neighbours:
    each has the room that it has alone, and draws from a random generator of its own.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None)
    draws_at_all = sampling.temperature > 0
    seeds = _seeds(encoded, sampling.seed) if draws_at_all else [0] * len(prompts)
    rooms: dict[int, list[int]] = defaultdict(list)  # prompts by the number of tokens that they have room for
    for index, ids in enumerate(encoded):
        room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
        if ids and room > 0:
            rooms[room].append(index)
    texts = [""] * len(prompts)
    for room, indices in rooms.items():
        draws = _Draws(sampling, [seeds[index] for index in indices]) if draws_at_all else None
        streamer = None if on_text is None else _Pieces(tokenizer, encoded[indices[0]], on_text)
        new = _continued(model, tokenizer, [encoded[index] for index in indices], room, draws, streamer)
        for index, ids in zip(indices, new, strict=True):
            texts[index] = continuation_text(tokenizer, encoded[index], ids)
    return texts


def _continued(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    room: int,
    draws: "_Draws | None",
    streamer: "_Pieces | None",
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
        if streamer is not None:
            streamer.ends = set(ends)
        out = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            do_sample=False,
            streamer=streamer,
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
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]  # an adapter hands it on
    kept = [(holder, getattr(holder, "generation_config", None)) for holder in holders]
    before = next((config for _, config in kept if config is not None), None)
    if before is None:
        yield []
        return
    from transformers import GenerationConfig

    ends = before.eos_token_id
    try:
        for holder, _ in kept:
            holder.generation_config = GenerationConfig()
        yield ends if isinstance(ends, list) else [] if ends is None else [ends]
    finally:
        for holder, config in kept:
            holder.generation_config = config


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


class _Pieces:
    """What `transformers` gives tokens to as they are made: hands on the text that they add, once it is sure."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._prompt, self._on_text = tokenizer, list(prompt), on_text
        self._new: list[int] | None = None  # the first call brings the prompt
        self._shown = 0
        self.ends: set[int] = set()
        """Tokens after which nothing is text any more."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after another."""
        if self._new is None:
            self._new = []
            return
        for token in value.flatten().tolist():
            if self._new and self._new[-1] in self.ends:
                return
            self._new.append(token)
        if self._new[-1] in self.ends:
            return
        self._show(continuation_text(self._tokenizer, self._prompt, self._new).rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Hand on the rest."""
        self._show(continuation_text(self._tokenizer, self._prompt, [t for t in self._new or [] if t not in self.ends]))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)


class _Draws:
    """A logits processor that makes the likeliest token a draw from ``softmax(logits / temperature)``.

    With ``top_p`` below 1, tokens beyond the likeliest ones that add up to it cannot be drawn.

    Adds Gumbel noise to each row from its own generator (the Gumbel-max trick), so that no row's draw depends on its
    neighbours, and the global random stream is left alone.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._temperature, self._top_p, self._seeds = sampling.temperature, sampling.top_p, seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        scaled = scores.float() / self._temperature
        if self._top_p < 1:
            probs, order = scaled.softmax(-1).sort(descending=True)
            beyond = probs.cumsum(-1) - probs >= self._top_p  # the likeliest stays, whatever its probability
            scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        return scaled - noise.clamp(min=torch.finfo(torch.float32).tiny).log()
