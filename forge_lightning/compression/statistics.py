"""What a codec should know of a layer: its inputs, and how much an error of each output matters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.compression.codecs.base import proxy_error
from forge_lightning.compression.layers import Matrix
from forge_lightning.core.tokens import IGNORED


class _Stop(Exception):
    """Ends a forward pass behind the layers that are looked at."""


@dataclass
class Statistics:
    r"""How the loss depends on a matrix, to second order: :math:`ΔL ≈ ½ \sum_i r_i\, (E H E^T)_{ii}`.

    A matrix that several layers share has several terms.

    Args:
        terms: ``(H, r)`` of each use, ``(in, in)`` and ``(out,)``.
    """

    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def hessian(self) -> Tensor:
        """One for all uses, ``(in, in)``."""
        return torch.stack([hessian * rows.mean() for hessian, rows in self.terms]).sum(0)

    @property
    def row_weights(self) -> Tensor:
        """One for all uses, ``(out,)``, of mean 1."""
        total = torch.stack([rows * hessian.diagonal().mean() for hessian, rows in self.terms]).sum(0)
        return total / total.mean().clamp(min=1e-30)

    def error(self, weight: Tensor, decoded: Tensor) -> float:
        """Expected rise of the loss, in nats a token."""
        return sum(0.5 * proxy_error(weight, decoded, hessian, rows) for hessian, rows in self.terms)


Batch = Mapping[str, Tensor]


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def output_weights(
    model: Any, found: Mapping[str, Matrix], batches: Sequence[Batch], seed: int = 0
) -> dict[str, Tensor]:
    r"""How much an error of each output of each layer matters: the mean square of the loss's gradient.

    Labels are drawn from the model itself, so that this is the diagonal of the Fisher information, which is the
    Hessian of the loss where the model is right. Of the output layer it is the mean of :math:`p (1 - p)`.

    Args:
        model: A causal language model of transformers.
        found: Its matrices.
        batches: ``{"input_ids", "attention_mask": (B, T)}``, and "labels" to leave out positions without one.
        seed: Random seed for the labels.

    Returns:
        By layer, ``(out,)``; of an embedding layer ``(in, in)``, the mean outer product of the gradient.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    layers = {name: layer for matrix in found.values() for name, layer in matrix.layers.items()}
    head = model.get_output_embeddings()
    sums: dict[str, Tensor] = {}
    places: list[Tensor] = []

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if isinstance(module, nn.Embedding):
                output.requires_grad_(True)
            if module is head:
                return

            def take(gradient: Tensor) -> None:
                rows = _rows(gradient, places[0])
                value = rows.t() @ rows if isinstance(module, nn.Embedding) else rows.square().sum(0)
                sums[name] = sums[name] + value if name in sums else value

            output.register_hook(take)

        return layer.register_forward_hook(hook)

    frozen = [(param, param.requires_grad) for param in model.parameters()]
    handles = [watch(name, layer) for name, layer in layers.items()]
    count = 0
    try:
        for param, _ in frozen:
            param.requires_grad_(False)
        for batch in batches:
            places[:] = [batch["attention_mask"].bool()]
            labelled = _labelled(batch)
            count += int(labelled.sum())
            logits = model(**_inputs(batch)).logits
            chosen = logits[labelled].float()
            probabilities = chosen.detach().softmax(-1)
            labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            for name, layer in layers.items():
                if layer is head:
                    value = (probabilities * (1 - probabilities)).sum(0)
                    sums[name] = sums[name] + value if name in sums else value
            del probabilities
            nn.functional.cross_entropy(chosen, labels, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for param, required in frozen:
            param.requires_grad_(required)
    return {name: value / max(1, count) for name, value in sums.items()}


def _rows(values: Tensor, counted: Tensor) -> Tensor:
    """Vectors at real tokens, ``(B, T, D)`` to ``(N, D)``; all where the shape is another, as that of positions."""
    values = values.detach().float()
    return values[counted] if values.ndim == 3 and values.shape[:2] == counted.shape else values.flatten(0, -2)


def _labelled(batch: Batch) -> Tensor:
    """Positions that predict a label: ``(B, T)``, of "labels" shifted to there, else of the mask."""
    if "labels" in batch:
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return labels != IGNORED
    return batch["attention_mask"].bool()


@contextmanager
def _inputs_of(
    layers: Mapping[str, nn.Module], places: list[Tensor], sums: dict[str, Tensor], counts: dict[str, int]
) -> Iterator[None]:
    """Add up ``x xᵀ`` of the inputs of layers, and how many there were. Layers with the same input share one sum."""
    seen: list[tuple[Tensor, str]] = []  # inputs of this forward pass

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args[0].numel():  # of an expert that no token has reached
                return
            same = next((other for given, other in seen if given is args[0]), None)
            if same is not None and (name not in sums or sums[name] is sums[same]):
                sums[name], counts[name] = sums[same], counts[same]
                return
            seen.append((args[0], name))
            rows = _rows(args[0], places[0])
            counts[name] = counts.get(name, 0) + len(rows)
            if name in sums:
                sums[name].addmm_(rows.t(), rows)
            else:
                sums[name] = rows.t() @ rows

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    clear = next(iter(layers.values())).register_forward_pre_hook(lambda *_: seen.clear(), prepend=True)
    try:
        yield
    finally:
        clear.remove()
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_hessians(model: Any, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean of ``x xᵀ`` over the inputs of linear layers, ``(in, in)`` by name.

    Args:
        model: A causal language model of transformers. A pass ends behind the last of the layers.
        layers: Linear layers, by name, in the order in which they are called.
        batches: Calibration data, as for `output_weights`.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    places: list[Tensor] = []
    last = list(layers.values())[-1]

    def stop(*_: Any) -> None:
        raise _Stop

    with _inputs_of(layers, places, sums, counts):
        handle = last.register_forward_hook(stop)
        try:
            for batch in batches:
                places[:] = [batch["attention_mask"].bool()]
                with suppress(_Stop):
                    model(**_inputs(batch))
        finally:
            handle.remove()
    return {name: value / counts[name] for name, value in sums.items()}


def token_frequencies(num_tokens: int, batches: Iterable[Batch]) -> Tensor:
    """Share of each token among the inputs, ``(V,)``; one that does not occur counts as half an occurrence."""
    counts = torch.full((num_tokens,), 0.5)
    for batch in batches:
        tokens = batch["input_ids"][batch["attention_mask"].bool()]
        counts += torch.bincount(tokens, minlength=num_tokens).cpu()
    return counts / counts.sum()


def by_block(found: Mapping[str, Matrix]) -> Iterator[list[Matrix]]:
    """Matrices whose statistics are gathered together: those of one block, and each other one by itself."""
    group: list[Matrix] = []
    for matrix in found.values():
        if group and (matrix.block is None or matrix.block != group[0].block):
            yield group
            group = []
        group.append(matrix)
    if group:
        yield group


def statistics_of(
    model: Any, group: Sequence[Matrix], outputs: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, Statistics]:
    """Statistics of some matrices.

    Args:
        model: A causal language model of transformers.
        group: Its matrices, of one block.
        outputs: From `output_weights`.
        batches: Calibration data.

    Returns:
        By the matrix's name.
    """
    linear = {
        name: layer for matrix in group for name, layer in matrix.layers.items() if not isinstance(layer, nn.Embedding)
    }
    hessians = input_hessians(model, linear, batches) if linear else {}
    result = {}
    for matrix in group:
        gathered = Statistics()
        for name, layer in matrix.layers.items():
            if isinstance(layer, nn.Embedding):
                if name in outputs:
                    frequencies = torch.full((layer.num_embeddings,), 1 / layer.num_embeddings)
                    if layer is model.get_input_embeddings():
                        frequencies = token_frequencies(layer.num_embeddings, batches)
                    gathered.terms.append((outputs[name].cpu(), frequencies))
            elif name in hessians and name in outputs:
                gathered.terms.append((hessians[name].cpu(), outputs[name].cpu()))
        if gathered.terms:
            result[matrix.name] = gathered
    return result
