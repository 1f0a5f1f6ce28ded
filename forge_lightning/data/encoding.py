"""From records of text, pairs and chats to tokens with labels, and tables of them on disk."""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from forge_lightning.core.tokens import IGNORED, completion_ids, prompt_ids
from forge_lightning.data.records import BEGINS, ENDS
from forge_lightning.data.tokens import encode_example

Columns = dict[str, list[Any]]


class Encoder(ABC):
    """Makes tokens of a batch of records: columns in, ``input_ids`` out, and ``labels`` where they differ.

    Args:
        tokenizer: A Hugging Face tokenizer.
        columns: Names of the source's columns, where they are not those of ``fields``.
        max_length: Longest example in tokens; longer ones are left out. ``None`` keeps all.
    """

    fields: ClassVar[dict[str, type]] = {}
    """Columns that are read, by their usual names."""
    has_labels = False

    def __init__(self, tokenizer: Any, columns: dict[str, str] | None = None, max_length: int | None = None) -> None:
        self.tokenizer, self.columns, self.max_length = tokenizer, dict(columns or {}), max_length
        unknown = [name for name in self.columns if name not in self.fields]
        if unknown:
            raise MisconfigurationException(
                f"`columns` of a source names {unknown[0]!r}, but what is read is {list(self.fields)}: write the usual"
                f" name first, `columns: {{{next(iter(self.fields))}: {self.columns[unknown[0]]}}}`."
            )

    @property
    def identity(self) -> str:
        """Differs where the tokens would."""
        settings = [type(self).__name__, "2", sorted(self.columns.items()), self.max_length]
        return json.dumps([*settings, tokenizer_identity(self.tokenizer)])

    def _column(self, batch: Columns, name: str) -> list[Any]:
        column = batch[self.columns.get(name, name)]
        for value in column:
            if not isinstance(value, self.fields[name]):
                raise MisconfigurationException(
                    f"Column {self.columns.get(name, name)!r} must hold {self.fields[name].__name__}, but holds"
                    f" {value!r:.60}. Leave such records out of the data."
                )
        return column

    @abstractmethod
    def __call__(self, batch: Columns) -> Columns:
        """Tokens of a batch of records; fewer than there are records, where some are left out."""


class TextEncoder(Encoder):
    """Whole documents, each with the tokenizer's start token, if it sets one, and its end token. All of it is learned.

    Columns `BEGINS` and `ENDS`, where they are, say which pieces of text are the first and the last of a document.
    """

    fields: ClassVar[dict[str, type]] = {"text": str}

    def __call__(self, batch: Columns) -> Columns:
        texts = self._column(batch, "text")
        whole = [True] * len(texts)
        begins, ends = batch.get(BEGINS, whole), batch.get(ENDS, whole)
        start, end = prompt_ids(self.tokenizer, ""), self.tokenizer.eos_token_id
        behind = [] if end is None else [end]
        if is_bytes(self.tokenizer):
            tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3 for text in texts]
        else:
            tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for place in (place for place, first in enumerate(begins) if not first):
                # Some tokenizers begin every text with a space: a piece goes on behind the end of a line.
                tokens[place] = completion_ids(self.tokenizer, "\n", texts[place])
        pieces = zip(begins, tokens, ends, strict=True)
        return {
            "input_ids": [
                np.concatenate([start if first else [], ids, behind if last else []]).astype(np.int32)
                for first, ids, last in pieces
            ]
        }


class AnswerEncoder(Encoder):
    """Examples of which only the answers are learned."""

    has_labels = True

    def __call__(self, batch: Columns) -> Columns:
        found: Columns = {"input_ids": [], "labels": []}
        for ids, labels in self._examples(batch):
            if self.max_length is None or len(ids) <= self.max_length:
                found["input_ids"].append(ids)
                found["labels"].append(labels)
        return found

    @abstractmethod
    def _examples(self, batch: Columns) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        """Tokens and labels of each record."""


class PairEncoder(AnswerEncoder):
    """Prompts with completions; the loss is on the completion and the end token."""

    fields: ClassVar[dict[str, type]] = {"prompt": str, "completion": str}

    def _examples(self, batch: Columns) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        found = []
        for prompt, completion in zip(self._column(batch, "prompt"), self._column(batch, "completion"), strict=True):
            example = encode_example(self.tokenizer, 0, prompt, completion)
            found.append((example.input_ids, example.labels))
        return found


class ChatEncoder(AnswerEncoder):
    """Chats in the form of the tokenizer's chat template; the loss is on what the assistant says."""

    fields: ClassVar[dict[str, type]] = {"messages": list}

    def __init__(self, tokenizer: Any, columns: dict[str, str] | None = None, max_length: int | None = None) -> None:
        super().__init__(tokenizer, columns, max_length)
        refuse_no_template(tokenizer)

    def _examples(self, batch: Columns) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        return [encode_chat(self.tokenizer, messages) for messages in self._column(batch, "messages")]


def refuse_no_template(tokenizer: Any) -> None:
    """Raise if a tokenizer does not say how a chat is written."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise MisconfigurationException(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, so it is not known how a chat is written."
            " Take one of a chat model, or give columns `prompt` and `completion`."
        )


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens of a chat, and labels: those of what the assistant says, with what the template puts behind it.

    A token across the seam of question and answer is learned. A turn that the template writes otherwise once more turns
    follow it, as one whose reasoning is left out later, is not.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: Turns with ``role`` and ``content``.

    Raises:
        MisconfigurationException: If there is no template, the chat is malformed, or nothing of it could be learned.
    """
    refuse_no_template(tokenizer)
    from jinja2 import TemplateError

    def written(turns: Sequence[dict[str, Any]], open_turn: bool) -> str:
        if not turns and not open_turn:
            return ""
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))

    spans = []
    try:
        whole = written(messages, False)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = written(messages[:number], True) if number else ""
            upto = written(messages[: number + 1], False)
            if not whole.startswith(upto):
                continue
            if not upto.startswith(before):
                before = written(messages[:number], False) if number else ""
            if upto.startswith(before):
                spans.append((len(before) + _header(upto[len(before) :], message), len(upto)))
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"A chat does not fit the template of the tokenizer: {error}. Messages are"
            ' `[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]`; this one is'
            f" {messages!r:.200}."
        ) from None
    ids, places = _placed(tokenizer, whole)
    learned = [any(start < end_ and end > begin for begin, end_ in spans) for start, end in places]
    if not any(learned):
        raise MisconfigurationException(
            "A chat has no turn of the assistant that its tokenizer's template keeps as it was said, so nothing of it"
            f" could be learned: {messages!r:.200}."
        )
    return ids, [token if known else IGNORED for token, known in zip(ids, learned, strict=True)]


def _header(turn: str, message: dict[str, Any]) -> int:
    """Letters in front of what is said, of a template that does not write them as the beginning of a turn."""
    content = message.get("content")
    if not isinstance(content, str) or message.get("reasoning_content") or message.get("tool_calls"):
        return 0
    said = content if content in turn else content.strip()
    return turn.find(said) if said and said in turn else 0


def _placed(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, and where each stands in it."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [tuple(place) for place in found["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if is_bytes(tokenizer):
        letters = [place for place, letter in enumerate(text) for _ in letter.encode()]
        return ids, [(place, place + 1) for place in letters]
    ends = [0]  # of a tokenizer that does not say: by the length of what the tokens before it spell
    for number in range(1, len(ids) + 1):
        ends.append(max(ends[-1], min(len(text), len(tokenizer.decode(ids[:number])))))
    return ids, list(itertools.pairwise(ends))


def is_bytes(tokenizer: Any) -> bool:
    """Whether it is the tokenizer that ``tokenizer: bytes`` makes."""
    return type(tokenizer).__name__ == "ByT5Tokenizer" and bool(tokenizer.split_special_tokens)


def tokenizer_identity(tokenizer: Any) -> str:
    """A digest that differs where two tokenizers would give other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    more = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(getattr(tokenizer, "chat_template", ""))]
    return hashlib.blake2b("\n".join([core, *more]).encode(), digest_size=16).hexdigest()


def encode_table(records: Any, encoder: Encoder, num_proc: int | None, what: str) -> Any:
    """A `datasets.Dataset` of tokens, from its cache where it was made before.

    Args:
        records: A `datasets.Dataset` of records.
        encoder: Makes the tokens.
        num_proc: Processes.
        what: The data, for messages.

    Raises:
        MisconfigurationException: If no example is left.
    """
    from datasets import Features, List, Value

    names = ("input_ids", "labels") if encoder.has_labels else ("input_ids",)
    identity = hashlib.blake2b(f"{records._fingerprint} {encoder.identity}".encode(), digest_size=8).hexdigest()
    table = records.map(
        encoder,
        batched=True,
        num_proc=num_proc,
        remove_columns=records.column_names,
        features=Features({name: List(Value("int32")) for name in names}),
        new_fingerprint=identity,
        desc=f"Tokenising {what}",
    )
    left_out = len(records) - len(table)
    if left_out:
        message = f"{left_out:,} of {len(records):,} examples of {what} are longer than {encoder.max_length} tokens"
        if not len(table):
            raise MisconfigurationException(f"{message}, so none is left. Raise `max_length`.")
        rank_zero_warn(f"{message} and are left out.")
    return table
