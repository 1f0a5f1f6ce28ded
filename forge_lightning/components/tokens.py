"""What data and models must agree on about tokens."""

from typing import Any

IGNORED = -100
"""Label of tokens that no loss is taken on."""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on: with the start token the tokenizer puts, without an end token."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
