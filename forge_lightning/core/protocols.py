"""Optional interfaces (`typing.Protocol`) of user modules, datamodules and callbacks. No inheritance is needed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


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
class SupportsPretrained(Protocol):
    """A module that starts from pretrained weights."""

    @property
    def pretrained_tokenizer(self) -> tuple[str, dict[str, Any]] | None:
        """Hub name or folder of the tokenizer that belongs to the weights, and options to load it with.

        ``None`` where the weights are random.
        """


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
class SupportsInterrupt(Protocol):
    """A callback that ends a run between steps when it was asked to."""

    def stop_if_asked(self, trainer: "Trainer") -> None:
        """Called between two steps also by callbacks that make several steps in one hook, on all ranks."""


@runtime_checkable
class SupportsAugmentation(Protocol):
    """A datamodule whose training examples are programs."""

    def problem_of(self, row: Any) -> Any:
        """The problem behind an example of a batch, from the example's fields; ``None`` if there is no problem.

        An object with ``prompt``, ``solution``, ``before``, ``tests``, ``entry_point`` and ``setup``.
        """

    def row_of(self, prompt: str, completion: str) -> dict[str, Any] | None:
        """A row as in its batches, ``(1, ...)``, without numbers of its own; ``None`` where it would be too long."""


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


@runtime_checkable
class SupportsOutcomes(Protocol):
    """A callback that measures how the model does on training examples."""

    @property
    def outcomes(self) -> Sequence[dict[str, Any]]:
        """Its last measurement: ``example`` (index in the data set) and ``success`` in [0, 1], alike on all ranks."""


@runtime_checkable
class SupportsDifficulty(Protocol):
    """A datamodule that knows how hard its training examples are."""

    @property
    def difficulty(self) -> Any:
        """Numbers that predict it, ``(N,)`` or ``(N, F)``, in the order of the data set.

        ``None`` if it has to be learned.
        """


@runtime_checkable
class OffersChoice(Protocol):
    """A datamodule that says whether its training examples can be chosen."""

    @property
    def offers_choice(self) -> bool:
        """Whether its training loader has a sampler that a policy can steer."""


@runtime_checkable
class SupportsChoice(Protocol):
    """A sampler that asks a policy what to draw next, as `forge_lightning.data.DifficultySampler`."""

    policy: Any
    """Chooses arms, once set."""
    difficulty: Any
    """Difficulty of the arms, ``(K,)``; ``None`` if it has to be learned."""
    num_arms: int
    """Examples of the data set, or levels that examples can be made of."""
    makes_examples: bool
    """Whether arms are levels."""
    ordered: bool
    """Whether levels are in an order of difficulty."""
    batch_size: int
    """Examples of a batch on one rank."""

    restored: bool
    """Whether a state was loaded since this was last set to False."""
    iteration: int
    """Epochs begun."""
    first: int
    """Batch that the running epoch began at; above 0 after a resume."""

    def arms_of(self, batch: int) -> list[int] | None:
        """Arms drawn for a batch of the epoch, over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""

    def load_state_dict(self, state: Any) -> None:
        """Restore from `state_dict`."""
