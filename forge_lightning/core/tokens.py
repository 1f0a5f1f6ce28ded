"""What data and models must agree on about tokens."""

from collections.abc import Sequence
from typing import Any

IGNORED = -100
"""Label of tokens that no loss is taken on."""

_ANCHORS = ("\n", "a", ".")
"""Texts to put in front of a completion, so that its tokens are those of a continued text."""


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer knows more than special tokens.

    Of a folder that holds a model and no tokenizer, transformers makes one without a vocabulary, by the model's type,
    and every text is empty to it.
    """
    return len(tokenizer.get_vocab()) > len(set(tokenizer.all_special_ids))


def pad_id(tokenizer: Any) -> int:
    """The token that fills up shorter rows; any will do where the tokenizer has none, since padding is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(id) for id in ids if id is not None)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that will be continued: with the tokenizer's start token, without an end token."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    plain = _plain(tokenizer, text)
    for _ in range(_trailing(ids, end) - _trailing(plain, end)):  # an end token in the text itself stays
        ids.pop()
    return ids


def completion_ids(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """Tokens of a completion as they come behind the tokens of its prompt.

    Encoded by itself, a completion gets a space in front from tokenizers that begin every text with one (SentencePiece,
    as Llama's): the model would learn a token that it never saw between two lines.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: Text whose tokens, `prompt_ids`, come before.
        completion: Text to encode.

    Returns:
        Tokens that decode, behind those of the prompt, to the completion; if the tokenizer changes its texts, as by
        lower-casing, the completion's tokens by itself.
    """
    start, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + completion)
    if whole[: len(start)] == start:
        return whole[len(start) :]
    alone = _plain(tokenizer, completion)  # a token of the whole text lies across the seam
    candidates = [alone]
    for anchor in _ANCHORS:
        before, both = _plain(tokenizer, anchor), _plain(tokenizer, anchor + completion)
        if both[: len(before)] == before:
            candidates.append(both[len(before) :])
    return next((ids for ids in candidates if continuation_text(tokenizer, start, ids) == completion), alone)


def continuation_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add to a prompt: decoded by themselves they would lose a first space."""
    before, both = (_decoded(tokenizer, ids) for ids in (prompt, [*prompt, *new]))
    return both[len(before) :] if both.startswith(before) else _decoded(tokenizer, new)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _trailing(ids: Sequence[int], end: int | None) -> int:
    """Number of end tokens at the end."""
    return next((place for place, id in enumerate(reversed(ids)) if id != end), len(ids))
