"""Capture the last call of a network, and align its logits with labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from forge_lightning.core.batch import LABEL_NAMES, field_of
from forge_lightning.core.hooks import Hook
from forge_lightning.core.layers import plain_name
from forge_lightning.core.token_loss import token_loss
from forge_lightning.core.tokens import IGNORED

_COMMON = ("model", "net", "network")
SHIFT_DOUBT = "the labels fit the positions before them much better. If your loss shifts them, set `shift=True`."


def find_network(module: nn.Module, name: str | None = None) -> nn.Module:
    """The submodule of a LightningModule that returns the logits.

    Args:
        module: Where to look.
        name: Its name. Default: the only child that has parameters, else "model", "net" or "network".

    Raises:
        ValueError: If no submodule has that name, or it cannot be inferred.
    """
    if name is not None:
        modules: dict[str, nn.Module] = {plain_name(key): m for key, m in module.named_modules() if key}
        if name not in modules:
            raise ValueError(f"no submodule is called {name!r}. There are {list(modules)[:8]}.")
        return modules[name]
    children = {
        key: child
        for key, child in module.named_children()
        if not getattr(child, "is_auxiliary", False) and any(True for _ in child.parameters())
    }
    if len(children) == 1:
        return next(iter(children.values()))
    found = next((children[key] for key in _COMMON if key in children), None)
    if found is None:
        candidates = ", ".join(map(repr, children)) or "none"
        raise ValueError(
            f"cannot infer which submodule returns the logits (candidates: {candidates}). Set `network='<name>'`."
        )
    return found


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output: a tensor, ``.logits`` or "logits", or the first tensor of a tuple.

    Raises:
        ValueError: If the output holds no logits.
    """
    found: Any = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list):
        found = next((value for value in output if isinstance(value, Tensor)), None)
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 1:
        return found.unsqueeze(-1)  # of a head with one output
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim not in (2, 3):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(f"the network returns {shape}; logits are (B, V) or (B, T, V). Set `network='<name>'`.")
    return found


class LogitTap:
    """A forward hook that remembers the last call of a network while switched on.

    In training only calls with a gradient count: a call under ``no_grad`` is not the one that is trained.

    Args:
        network: Returns logits.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._calls: list[tuple[Any, Any, Any]] = []  # a list: a compiler follows what is put into it
        self._active = self._with_gradient = False
        self._handle = network.register_forward_hook(Hook(self._remember), with_kwargs=True)

    def _remember(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._active and (torch.is_grad_enabled() or not self._with_gradient):
            self._calls[:] = [(args, kwargs, output)]

    @property
    def is_active(self) -> bool:
        """Whether calls are remembered."""
        return self._active

    def start(self, with_gradient: bool = False) -> None:
        """Remember calls, or only those with a gradient, until `stop`."""
        self._calls, self._active, self._with_gradient = [], True, with_gradient

    def stop(self) -> None:
        """Drop the call, and remember no more."""
        self._calls, self._active = [], False

    def detach(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self.stop()

    def take(self) -> tuple[Any, Any, Tensor] | None:
        """Arguments and logits of the last call, once; ``None`` where there was none.

        Raises:
            ValueError: If the network returned no logits.
        """
        calls, self._calls = self._calls, []
        if not calls:
            return None
        args, kwargs, output = calls[0]
        return args, kwargs, logits_of(output)


def given_labels(
    batch: Any, key: str | int | None, shifted: bool = False, mask: str | int | None = "attention_mask"
) -> Tensor | None:
    """A batch's labels by key or position, as they are; "auto" takes the usual keys, and the last of a tuple.

    Args:
        batch: The batch of a step.
        key: A key or position, "auto", or ``None`` for no labels.
        shifted: Whether the labels are the tokens themselves: then "auto" takes "input_ids" where the batch has
            no labels and a mask says which tokens are real. Without a mask, padding cannot be distinguished from text.
        mask: Key or position of that mask.

    Raises:
        ValueError: If the batch has nothing under a key that was named.
    """
    if key != "auto":
        found = field_of(batch, key)
        if found is None and key is not None:
            there = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"`labels={key!r}`: the batch has no such entry. It is {there}.")
        return found
    if isinstance(batch, Mapping):
        found = next((field_of(batch, name) for name in LABEL_NAMES if name in batch), None)
        if found is None and shifted:
            tokens, real = field_of(batch, "input_ids"), field_of(batch, mask)
            if tokens is not None and real is not None and real.shape == tokens.shape:
                found = tokens.long().masked_fill(real == 0, IGNORED)
        return found
    return field_of(batch, -1) if not isinstance(batch, Sequence) or len(batch) > 1 else None


def by_position(logits: Tensor, places: Tensor) -> Tensor:
    """Logits that a network flattens to ``(B · T, V)``, batch first, as ``(B, T, V)``; ``places`` is ``(B, T)``."""
    flat = logits.ndim == 2 and places.ndim == 2 and len(logits) == places.numel()
    return logits.unflatten(0, places.shape) if flat else logits


def labels_of_places(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The label of each position of the logits, and which positions count. Waits for no device.

    Args:
        logits: ``(B, V)``, ``(B, T, V)``, or the latter flattened to ``(B · T, V)``.
        labels: ``(B,)`` or ``(B, T)``, -100 where a position has none.
        mask: ``(B, T)``, true at real tokens; of use where there are no labels for each token.
        shift: Whether the label of a position is what the position before it predicts; the logits may have one position
            less, of inputs without the last.

    Returns:
        Labels ``(M,)`` of the ``M`` rows that the logits flatten to, -100 where there is none, or ``None`` without
        labels; and which rows count, ``(M,)`` booleans, or ``None`` for all.

    Raises:
        ValueError: If there are labels, and they do not fit.
    """
    if labels is not None:
        shape = by_position(logits, labels).shape[:-1]
        if shift and len(shape) == 2 and labels.shape == (shape[0], shape[1] + 1):
            labels, shift = labels[:, 1:], False  # the module has cut its inputs
        if labels.shape != shape:
            raise ValueError(
                f"the labels are {tuple(labels.shape)}, the logits {tuple(logits.shape)}, which without the classes,"
                " their last dimension, must be alike, or with `shift=True` one position shorter. Name the labels with"
                " `labels`, and the submodule that returns the logits with `network`."
            )
        if shift and labels.shape[-1] == 1 and labels.ndim == 2:
            raise ValueError("labels of one position each cannot be shifted. Set `shift=False`.")
        if shift and labels.ndim == 2:
            labels = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
        labels = labels.flatten()
        return labels, labels != IGNORED
    if mask is not None and by_position(logits, mask).shape[:-1] == mask.shape and mask.ndim == 2:
        return None, mask.flatten() != 0
    return None, None


def predicted_places(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor | None]:
    """Positions of the logits that count, and their labels; arguments and errors of `labels_of_places`.

    Waits for the device, as their number depends on the labels.

    Returns:
        Places in the logits flattened to rows, ``(N,)``, and labels ``(N,)``, or ``None`` without labels.
    """
    labels, counts = labels_of_places(logits, labels, mask, shift)
    if counts is None:
        return torch.arange(logits.shape[:-1].numel(), device=logits.device), None
    places = counts.nonzero().squeeze(1)
    return places, None if labels is None else labels[places]


def share_of_rows(
    call: tuple[Any, Any, Tensor], labels: Tensor | None, mask: Tensor | None, fraction: float, step: int
) -> tuple[tuple[Any, Any, Tensor], Tensor | None, Tensor | None]:
    """A call of a network with some of its rows, which go round from step to step.

    Args:
        call: Arguments, keyword arguments and logits; rows of the arguments are those of the first tensor in them, and
            what has another number of rows stays as it is. Logits may be flattened over positions.
        labels: ``(B,)``, ``(B, T)`` or ``(B · T,)``.
        mask: As the labels.
        fraction: Share of the rows, in (0, 1]; at least one is taken.
        step: Number of the step.

    Returns:
        The call, labels and mask, of these rows.

    Raises:
        ValueError: If it is unclear which numbers belong to which example.
    """
    args, kwargs, logits = call
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not inputs:
        raise ValueError("the network is called without a tensor, and its rows are not known. Set `fraction=1`.")
    size = len(inputs[0])
    count = math.ceil(fraction * size)
    chosen = (step * count + torch.arange(count, device=logits.device)) % size

    def of(tensor: Tensor) -> Tensor:
        if len(tensor) == size:
            return tensor[chosen]
        if len(tensor) % size:
            raise ValueError(
                f"the network is called with {size} rows, and what belongs to them is {tuple(tensor.shape)}. Set"
                " `fraction=1`."
            )
        rows: Tensor = tensor.unflatten(0, (size, -1))[chosen].flatten(0, 1)
        return rows

    def of_argument(leaf: Any) -> Any:
        return leaf[chosen.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    args, kwargs = tree_map(of_argument, (args, kwargs))
    return (
        (args, kwargs, of(logits)),
        None if labels is None else of(labels),
        None if mask is None or labels is not None else of(mask),
    )


def predicted_rows(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor | None]:
    """The logits that count, as rows ``(N, V)``, and labels ``(N,)``; arguments and errors of `labels_of_places`."""
    places, labels = predicted_places(logits, labels, mask, shift)
    return logits.flatten(0, -2)[places], labels


@torch.no_grad()
def scores_of_rows(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """How each example of a batch did: mean loss over its labels, and whether all of them were the likeliest.

    Args:
        logits: ``(B, V)`` or ``(B, T, V)``.
        labels: ``(B,)`` or ``(B, T)``, -100 where a position has none.
        shift: Whether the label of a position is what the position before it predicts.

    Returns:
        Loss and success, ``(B,)`` fp32 each; NaN for an example without labels.
    """
    if logits.ndim == 2:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
        shift = False
    if shift:  # labels, as logits without the last position would be a copy of them all
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    known = labels != IGNORED
    count = known.sum(1)
    losses, likeliest = token_loss(logits, labels)
    losses = losses[:, :-1] if shift else losses
    right = ((likeliest == labels) | ~known).all(1).float()
    nothing = torch.full_like(right, torch.nan)
    return torch.where(count > 0, losses.sum(1) / count, nothing), torch.where(count > 0, right, nothing)


@torch.no_grad()
def fits_better_shifted(logits: Tensor, labels: Tensor | None) -> bool:
    """Whether labels taken as aligned fit clearly better when they are shifted, by half a nat and a quarter."""
    if labels is None:
        return False
    logits = by_position(logits, labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or logits.shape[1] < 2:
        return False
    losses = []
    for shift in (False, True):
        rows, targets = predicted_rows(logits, labels, None, shift)
        losses.append(float(F.cross_entropy(rows.float(), targets)) if targets is not None and len(targets) else 0.0)
    return losses[1] < min(losses[0] - 0.5, 0.75 * losses[0])


def is_shifted(network: nn.Module) -> bool:
    """Whether a network's labels are those of Hugging Face's causal language models: the tokens themselves."""
    decoder_only = not getattr(getattr(network, "config", None), "is_encoder_decoder", False)
    return decoder_only and getattr(network, "generation_config", None) is not None
