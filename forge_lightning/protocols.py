"""What a foreign module or datamodule may offer. Structural: nobody has to inherit."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SupportsTokens(Protocol):
    """A datamodule over a fixed vocabulary."""

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""

    @property
    def seq_len(self) -> int:
        """Tokens of the longest example, answer included."""


@runtime_checkable
class SupportsTokenizer(Protocol):
    """A datamodule that tokenizes text."""

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer."""


@runtime_checkable
class SupportsProblems(Protocol):
    """A datamodule, or module, whose validation examples are programming problems with tests."""

    def problems(self, split: str) -> Sequence[Any]:
        """The problems of "train", "val" or "test".

        Objects with ``task_id``, ``prompt`` and ``task(completion)``, which is a `forge_lightning.sandbox.Task`.
        """


@runtime_checkable
class SupportsGenerate(Protocol):
    """A module that continues prompts."""

    def complete(self, prompts: list[str], **options: Any) -> list[str]:
        """One completion for each prompt."""


@runtime_checkable
class SupportsProbe(Protocol):
    """A module that says how to run it on a batch for its activations alone."""

    def probe_forward(self, batch: Any) -> Any:
        """Run the layers; no loss, no logging."""


@runtime_checkable
class SupportsEvents(Protocol):
    """A callback that finds events in training."""

    @property
    def events(self) -> Sequence[dict[str, Any]]:
        """Plain records with ``step`` and ``kind``, oldest first."""


@runtime_checkable
class SupportsStage(Protocol):
    """A callback that knows the stage of training."""

    @property
    def stage(self) -> str:
        """Its name."""
