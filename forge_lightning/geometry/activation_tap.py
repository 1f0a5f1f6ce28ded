"""Copy a few rows of chosen layers' activations, without keeping the rest alive."""

import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forge_lightning.core.activations import activation_of, is_positions_first
from forge_lightning.core.batch import PositionFields
from forge_lightning.core.hooks import Hook

Positions = Literal["auto", "labelled", "all", "last"]


class _Eager:
    """Runs compiled modules as they are written while any tap is on. Taps end in any order, torch's stances do not."""

    def __init__(self) -> None:
        self._taps: set[int] = set()
        self._stance: Any = None

    def enter(self, tap: object) -> None:
        self._taps.add(id(tap))
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()

    def leave(self, tap: object) -> None:
        self._taps.discard(id(tap))
        if self._stance is not None and not self._taps:
            self._stance.__exit__(None, None, None)
            self._stance = None


_eager = _Eager()


class ActivationTap:
    """Forward hooks that copy sampled rows of activations while switched on, once per layer and forward pass.

    A layer's output may be a tensor, a tuple or list (its first tensor), or a mapping (``output_key``, else its first
    tensor). ``(N, D)`` is rows; of ``(B, T, D)`` every chosen position is a row; anything with more dimensions is one
    row per example. ``(T, B, D)`` is known by the batch's fields. Rows are drawn by a generator of their own. What
    cannot be tapped is kept in ``error``. While it is switched on, compiled modules run as they are written.

    Args:
        modules: Layers by name.
        positions: Which of ``T`` count: "labelled" those with a label, "last" the last one that is not padding, "all"
            every one that is not padding, "auto" the labelled ones where labels are ``(B, T)``, else all. Position 0 is
            left out by "labelled" and "auto" where others remain: it is nearly the same for all texts.
        unique_tokens: Take each token at most once: repeated tokens make a cloud look thinner than it is.
        output_key: Key of the activation, if a layer returns a mapping.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        positions: Positions = "auto",
        unique_tokens: bool = False,
        output_key: str | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.positions = positions
        self.unique_tokens = unique_tokens
        self.output_key = output_key
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        self.seconds = 0.0
        self.error: ValueError | None = None
        self._tokens_taken: set[int] = set()  # of earlier batches, for `unique_tokens`
        self._tokens_now: set[int] = set()
        self._handles: list[Any] = []
        self._active = False

    def attach(self) -> None:
        """Register the hooks; off until `start`."""
        hooks = {name: Hook(partial(self._copy_rows, name)) for name in self.modules}
        self._handles = [module.register_forward_hook(hooks[name]) for name, module in self.modules.items()]

    def detach(self) -> None:
        """Remove the hooks and drop the rows."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()
        self.clear()

    def start(self, fields: PositionFields, limit: int, seed: int) -> None:
        """Copy at most ``limit`` rows of each layer from the next forward pass.

        Args:
            fields: Mask, labels and tokens of the batch.
            limit: Number of rows.
            seed: Random seed for their choice.
        """
        self._fields, self._limit, self._seed = fields, limit, seed
        self._seen: set[str] = set()
        self._index: dict[tuple[int, ...], Tensor] = {}
        self._active = True
        _eager.enter(self)

    def stop(self) -> None:
        """Stop copying until the next `start`."""
        self._active = False
        _eager.leave(self)
        self._fields, self._index = PositionFields(), {}
        self._tokens_taken |= self._tokens_now
        self._tokens_now = set()

    def clear(self) -> None:
        """Drop the rows."""
        self.rows = {name: [] for name in self.modules}
        self.seconds = 0.0
        self._tokens_taken.clear()

    def num_rows(self) -> int:
        """Number of rows of the layer with the most: a layer that is never called must not hold up the others."""
        return max((sum(len(part) for part in parts) for parts in self.rows.values()), default=0)

    def _copy_rows(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._active:  # all that a compiled module's graph holds of this hook
            return
        if name not in self._seen:
            start = time.perf_counter()
            self._seen.add(name)  # gradient checkpointing comes by twice
            try:
                self._copy(name, output)
            except ValueError as error:  # kept for the one who started the tap
                self.error = self.error or error
            self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def _copy(self, name: str, output: Any) -> None:
        x = activation_of(output, name, self.output_key).detach()
        if x.ndim < 2:
            raise ValueError(f"Layer {name!r} returns {tuple(x.shape)}; a probe needs (N, D), (B, T, D) or more.")
        if is_positions_first(x, self._fields):
            x = x.transpose(0, 1)
        shape = tuple(x.shape[:2]) if x.ndim == 3 else (len(x),)
        x = x.flatten(0, 1) if x.ndim == 3 else x.flatten(1)
        if shape not in self._index:
            self._index[shape] = self._choose(shape, x.device)
        parts = self.rows[name]
        if parts and parts[-1].shape[1] != x.shape[1]:
            parts.clear()  # inputs of another size: rows of two widths make no cloud
        parts.append(x.index_select(0, self._index[shape]))

    def _choose(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Indices of the rows to keep, in the flattened activations."""
        candidates = self._candidates(shape)
        tokens = self._fields.tokens
        generator = torch.Generator().manual_seed(self._seed)
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        if self.unique_tokens and tokens is not None and tokens.numel() == math.prod(shape):
            ids = tokens.detach().cpu().flatten()[order]
            first: dict[int, int] = {}
            for position, token in enumerate(ids.tolist()):
                if token not in self._tokens_taken:
                    first.setdefault(token, position)
            places = list(first.values())[: self._limit]
            self._tokens_now.update(ids[places].tolist())
            order = order[places]
        return order[: self._limit].to(device)

    def _candidates(self, shape: tuple[int, ...]) -> Tensor:
        everything = torch.arange(math.prod(shape))
        mask, labels = (None if t is None else t.detach().cpu() for t in (self._fields.mask, self._fields.labels))
        if mask is not None and math.prod(shape) not in (mask.numel(), len(mask)) and not bool(mask.all()):
            raise ValueError(
                f"The batch's mask is {tuple(mask.shape)} and a layer returns {shape} positions: cannot infer which are"
                " padding. Name layers that keep the positions, or set `mask` to null."
            )
        if len(shape) == 1:
            return everything if mask is None or mask.numel() != shape[0] else everything[mask.flatten().bool()]
        if shape[1] == 1:
            return everything
        valid = torch.ones(shape, dtype=torch.bool)
        if mask is not None and tuple(mask.shape) == shape:
            valid = mask.bool()
        if self.positions == "last":
            last = torch.where(valid, torch.arange(shape[1]), -1).amax(1)
            return (torch.arange(shape[0]) * shape[1] + last)[last >= 0]
        per_token = labels is not None and tuple(labels.shape) == shape
        if self.positions == "labelled" and not per_token:
            raise ValueError(
                "`positions='labelled'` needs labels of shape (B, T) in the batch. Name them with `labels`, or set"
                " `positions` to 'all' or 'last'."
            )
        if self.positions == "all" or not per_token:
            return everything[valid.flatten()]
        assert labels is not None
        labelled = valid & (labels >= 0)  # what is no token gets no loss: -100, or -1
        later = labelled.clone()
        later[:, 0] = False
        return everything[(later if bool(later.any()) else labelled).flatten()]
