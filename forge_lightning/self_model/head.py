"""SelfModelHead: predicts the network's own activations, which makes them more predictable."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from forge_lightning.core.activations import activation_of, is_positions_first
from forge_lightning.core.batch import PositionFields
from forge_lightning.core.device import HostCopy, reads_are_free
from forge_lightning.core.hooks import Hook, compile_anew
from forge_lightning.core.layers import network_modules, output_layer, output_width, select_layers
from forge_lightning.core.validate import require
from forge_lightning.geometry.functional import participation_ratio
from forge_lightning.self_model.functional import (
    explained_variance,
    normalized_target,
    prediction_sums,
    uncertainty_weights,
)

Form = Literal["paper", "next_latent", "forward"]
Reduce = Callable[[Tensor], Tensor]

FEATURES = "features"
"""Name of the features that the output layer reads."""
_WATCHED_ROWS, _LEAST_ROWS = 512, 4
_LAYER_LOSS_DECAY = 0.99


class SelfModelHead(nn.Module):
    """Predicts activations of the network that it is attached to; the error, times ``weight``, is added to the loss.

    The gradient reaches the network through what is predicted *from*. Targets are detached and normalised to mean 0 and
    variance 1 over the units of each row, so that the loss of a layer is 1 for a prediction of 0, whatever the layer's
    scale. Only real tokens count. Used by ``ForgeModule(self_model=...)``; `forge_lightning.callbacks.SelfModel`
    attaches the same to any LightningModule.

    Memory: ``hidden_size × (D + Σ D of the targets)`` weights, and the captured activations of one step.

    Args:
        form: "paper": what the output layer reads (the final features) predicts every layer of ``layers`` at the same
            position (the last real token, where it reads one vector for each example). "next_latent": the final
            features and the embedding of the next token predict the final features at the next position. "forward":
            every layer of ``layers`` predicts the one after it.
        layers: Names and patterns of modules, and fractions of the depth in [0, 1], or "all". "next_latent" takes none.
            Default: a quarter, half, three quarters and all of the depth, without the output layer.
        weight: Factor of the error in the loss, at least 0; 0 turns the head off. Where it was measured, 3 held back
            over-fitting, and 10 learning.
        stop_gradient: Detach the targets. Without it they move towards the prediction too.
        warmup_steps: Optimizer steps over which the weight rises from 0.
        hidden_size: Width inside the predictor, at most that of what it predicts from.
        adaptive: Weigh layers in inverse proportion to their running errors, between 0.5 and 2, mean 1, in place of
            alike. What is logged as loss stays the plain mean.
        collapse_below: Divide the weight by 4 when the effective rank of a target falls below this share of the
            largest it had since the warm-up, in (0, 1); ``None`` never does. The rank falls by itself when a network
            finds a small circuit: to a quarter in runs that grok.
        watch_every_n_steps: Optimizer steps between measurements of the rank.

    Raises:
        ValueError: If an argument is out of range; when attached, if layers are not found or do not fit.

    References:
        Premakumar et al., `Unexpected Benefits of Self-Modeling in Neural Systems <https://arxiv.org/abs/2407.10188>`_,
        2024 ("paper": an output layer widened by the targets there, a small network of its own here, because a
        transformer's output layer is shared with its embeddings). Teoh et al., `Next-Latent Prediction Transformers
        Learn Compact World Models <https://arxiv.org/abs/2511.05963>`_, 2025 ("next_latent", without its second loss on
        decoded distributions).
    """

    is_auxiliary = True
    """No layer of the network: see `forge_lightning.core.layers.network_modules`."""
    owner = "SelfModelHead"
    """Name in error messages."""

    def __init__(
        self,
        form: Form = "paper",
        layers: Sequence[float | str] | str | None = None,
        weight: float = 1.0,
        stop_gradient: bool = True,
        warmup_steps: int = 100,
        hidden_size: int = 256,
        adaptive: bool = False,
        collapse_below: float | None = 0.25,
        watch_every_n_steps: int = 50,
    ) -> None:
        super().__init__()

        check = partial(require, self.owner)
        check(form in get_args(Form), "form", form, f"one of {list(get_args(Form))}")
        check(0 <= weight < math.inf, "weight", weight, "at least 0 and finite")
        check(warmup_steps >= 0, "warmup_steps", warmup_steps, "at least 0")
        check(hidden_size >= 1, "hidden_size", hidden_size, "at least 1")
        check(collapse_below is None or 0 < collapse_below < 1, "collapse_below", collapse_below, "in (0, 1) or None")
        check(watch_every_n_steps >= 1, "watch_every_n_steps", watch_every_n_steps, "at least 1")
        if form == "next_latent":
            check(layers is None, "layers", layers, "left out with form='next_latent', which predicts the features")
        self.form = form
        self.layers = layers
        self.weight = weight
        self.stop_gradient = stop_gradient
        self.warmup_steps = warmup_steps
        self.hidden_size = hidden_size
        self.adaptive = adaptive
        self.collapse_below = collapse_below
        self.watch_every_n_steps = watch_every_n_steps
        self.predictors = nn.ModuleList()
        self.targets: list[str] = []
        self._sources: list[str] = []
        self._handles: list[Any] = []
        self._captured: dict[str, Tensor] = {}
        self._open = False
        self._checked = False
        self._error: ValueError | None = None
        self._layer_losses: list[float] = []
        self._unread: HostCopy | None = None  # errors of the step before
        self._top_ranks: list[float] = []
        self._answer = 1.0
        self._num_watched = 0
        self._next_watch = watch_every_n_steps
        self._network = 0
        self._versions: dict[str, int] = {}
        self._forget_step()

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("form", "layers", "weight", "stop_gradient", "warmup_steps", "hidden_size", "adaptive")
        return {name: getattr(self, name) for name in (*names, "collapse_below", "watch_every_n_steps")}

    @property
    def is_off(self) -> bool:
        """Whether the settings can never change a loss."""
        return self.weight == 0

    # --- to a network ---

    def attach(
        self, network: nn.Module, *, reads: str | None = None, width: int | None = None, otherwise: int | None = None
    ) -> None:
        """Make the predictors for a network, once, and hook its layers. Call it before optimizer and compilation.

        The global seed decides the initial weights; the random streams are left as they were.

        Args:
            network: The module that has the layers.
            reads: Name of the module that reads the final features. Default: the output embedding of a Hugging Face
                model, else the last ``nn.Linear``.
            width: Units of the layers. Default: inferred from the modules.
            otherwise: Units of layers for which they cannot be inferred.

        Raises:
            ValueError: If a layer is not found, there are too few, a width cannot be inferred, or the head is another
                network's.
        """
        if self._handles and self._network == id(network):
            return
        if self._handles:
            raise ValueError(f"`{self.owner}` predicts another network already. Give each its own.")
        self._network = id(network)
        try:
            reader = output_layer(network, reads)
        except ValueError as error:
            raise ValueError(f"`{self.owner}{f'(output_layer={reads!r})' if reads else ''}`: {error}") from None
        chosen = self._choose(network, reader)
        widths = {name: width or output_width(network, module) or otherwise for name, module in chosen.items()}
        if self.form != "forward":
            widths[FEATURES] = width or getattr(reader, "in_features", None) or otherwise
        embedding = None
        if self.form == "next_latent":
            embedding = _token_embedding(network)
            widths["embedding"] = embedding.embedding_dim
        for name, found in widths.items():
            if found is None:
                raise ValueError(
                    f"`{self.owner}`: cannot infer the output width of {name!r} from its module. Set `width`."
                )
        if not self.targets:
            self._plan(chosen, {name: int(found or 0) for name, found in widths.items()})
        # Bound methods: a copy of network and head has hooks of the copy.
        self._handles = [m.register_forward_hook(Hook(partial(self._keep_output, name))) for name, m in chosen.items()]
        if self.form != "forward":
            self._handles.append(reader.register_forward_pre_hook(Hook(self._features_hook), with_kwargs=True))
        if embedding is not None:
            self._handles.append(embedding.register_forward_hook(Hook(partial(self._keep_output, "embedding"))))
        compile_anew()

    def detach(self) -> None:
        """Remove the hooks; the predictors stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()
        self._forget_step()

    def _choose(self, network: nn.Module, reader: nn.Module) -> dict[str, nn.Module]:
        if self.form == "next_latent":
            return {}
        layers = (0.25, 0.5, 0.75, 1.0) if self.layers is None else self.layers
        try:
            chosen = select_layers(network, layers)
        except ValueError as error:
            raise ValueError(f"`{self.owner}(layers={layers!r})`: {error}") from None
        if self.layers is None:  # its output is a function of the features
            chosen = {name: m for name, m in chosen.items() if all(part is not reader for part in m.modules())}
        least = 2 if self.form == "forward" else 1
        if len(chosen) < least:
            raise ValueError(
                f"`{self.owner}(form={self.form!r}, layers={layers!r})` names {len(chosen)} layers of"
                f" {type(network).__name__}, and needs at least {least}."
            )
        return chosen

    def _plan(self, chosen: Mapping[str, nn.Module], widths: Mapping[str, int]) -> None:
        names = list(chosen)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed() % 2**63)  # `torch.manual_seed` is every device's
            if self.form == "paper":
                self.targets, self._sources = names, [FEATURES]
                self.predictors.append(self._predictor(widths[FEATURES], sum(widths[name] for name in names)))
            elif self.form == "next_latent":
                self.targets, self._sources = [FEATURES], [FEATURES]
                self.predictors.append(self._predictor(widths[FEATURES] + widths["embedding"], widths[FEATURES]))
            else:
                self._sources, self.targets = names[:-1], names[1:]
                for source, target in itertools.pairwise(names):
                    self.predictors.append(self._predictor(widths[source], widths[target]))
        self._widths = dict(widths)
        self._layer_losses = self._layer_losses or [math.nan] * len(self.targets)
        self._top_ranks = self._top_ranks or [math.nan] * len(self.targets)

    def running_state(self) -> dict[str, Any]:
        """State in addition to the weights: plain numbers, alike on all ranks."""
        return {
            "layer_losses": [*self._layer_losses],
            "top_ranks": [*self._top_ranks],
            "answer": self._answer,
            "num_watched": self._num_watched,
            "next_watch": self._next_watch,
            "unread": None if self._unread is None else self._unread.read()["losses"].tolist(),
        }

    def load_running_state(self, state: Mapping[str, Any]) -> None:
        """Restore from `running_state`."""
        self._layer_losses, self._top_ranks = list(state["layer_losses"]), list(state["top_ranks"])
        self._answer, self._num_watched = state["answer"], state["num_watched"]
        self._next_watch = state["next_watch"]
        unread = state.get("unread")
        self._unread = None if unread is None else HostCopy.here({"losses": torch.tensor(unread, dtype=torch.float64)})

    def take_settings(self, other: "SelfModelHead") -> None:
        """Take over the settings of another head that is not attached yet.

        Raises:
            ValueError: If its form, layers or size differ: the predictors are made for the ones.
        """
        for name in ("form", "layers", "hidden_size"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"`{self.owner}({name}={theirs!r})`: the module has a head already, made with {name}={mine!r}. Use"
                    " the same, another `name`, or a new module."
                )
        for name in ("weight", "stop_gradient", "warmup_steps", "adaptive", "collapse_below", "watch_every_n_steps"):
            setattr(self, name, getattr(other, name))
        self._next_watch = self.watch_every_n_steps

    def _predictor(self, width: int, predicted: int) -> nn.Module:
        hidden = min(width, self.hidden_size)
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, predicted))

    def _keep_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_open() and name not in self._captured:  # checkpointing computes them twice
            self._keep(name, output)

    def _features_hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_open() and FEATURES not in self._captured:
            self._keep(FEATURES, args if args else tuple(kwargs.values()))

    def _is_open(self) -> bool:
        return self._open and torch.is_grad_enabled()  # not in a forward pass without gradient, such as a teacher's

    def _keep(self, name: str, output: Any) -> None:
        try:
            x = activation_of(output, name)
            if x.ndim not in (2, 3):
                raise ValueError(f"Layer {name!r} returns {tuple(x.shape)}; a head needs (N, D) or (B, T, D).")
        except ValueError as error:  # raised in `loss`, not inside a user's forward pass
            self._error = self._error or error
            return
        self._captured[name] = x
        self._versions[name] = x._version

    # --- one step ---

    def start(self) -> None:
        """Keep the activations of the next forward pass, with their graph, until `loss` takes them."""
        self._captured, self._error = {}, None
        self._open = True

    def stop(self) -> None:
        """Stop capturing, and drop what `loss` did not take."""
        self._open = False
        self._captured, self._error = {}, None

    def loss(self, *, step: int, mask: Tensor | None = None) -> Tensor | None:
        """What to add to the loss of the captured forward pass; ``None`` if none was captured.

        Args:
            step: Optimizer steps done, for the warm-up.
            mask: ``(B, T)``, true at real tokens. Default: all are.

        Raises:
            ValueError: If activations have a shape that a head cannot take, or a width it was not made for.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise ValueError(f"`{self.owner}`: {error}")
        if not self._captured:
            return None
        captured, self._captured = self._captured, {}
        self._open = False  # what the backward pass computes again is not kept; the next `start` is for the next pass
        missing = [name for name in self._widths if name not in captured]
        if missing:
            raise ValueError(
                f"`{self.owner}`: the forward pass did not go through {missing}, or without a gradient, as reentrant"
                " checkpointing does. Name layers that it uses with `layers`, or the module that reads the final"
                " features with `output_layer`."
            )
        for name, x in captured.items():
            if x._version != self._versions[name]:
                raise ValueError(
                    f"`{self.owner}`: the output of {name!r} was changed in place by a later layer. Name that layer in"
                    " `layers`, or use `inplace=False` there."
                )
        captured = {name: self._batch_first(name, x, mask) for name, x in captured.items()}
        sources, targets, counts = self._rows(captured, mask)
        if not self._checked:
            self._checked = True
            if not any(source.requires_grad for source in sources):
                warnings.warn(
                    f"{self.owner}: no gradient reaches the network, because nothing that is trained comes before"
                    f" {self._sources}. The head learns alone, until that changes. If the network is elsewhere, name it"
                    " with `layers`, and the module that reads its final features with `output_layer`.",
                    stacklevel=2,
                )
        predictions = self(sources)
        features = self._widths.get(FEATURES)  # of "next_latent", without the next token's embedding
        starts = [x[:, :features] for x in sources] if self.form == "next_latent" else sources
        copies = [normalized_target(x) for x in starts]  # what a mere copy would predict
        errors = []
        for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            goal = normalized_target(target, self.stop_gradient)
            sums = prediction_sums(prediction, goal, copies[index if self.form == "forward" else 0], counts)
            # A target that is 0 everywhere needs no prediction: it has no loss, and no share in the mean.
            varies = goal.detach() != 0
            weight = (varies if counts is None else varies & counts[:, None]).any().to(goal.dtype)
            errors.append((sums.error / sums.size.clamp(min=1) * weight, weight))
            kept = torch.stack([sums.error.detach(), sums.spread, sums.copy_error, sums.size * weight])
            self._sums[index] = self._sums[index] + kept if index in self._sums else kept
            if step + 1 >= self._next_watch:
                seen = target.detach()
                self._watched.setdefault(index, []).append(seen if counts is None else seen[counts])
        shares = self.layer_weights()
        total = torch.stack([share * error for share, (error, _) in zip(shares, errors, strict=True)]).sum()
        present = torch.stack([share * weight for share, (_, weight) in zip(shares, errors, strict=True)]).sum()
        return self.current_weight(step) * total / present.clamp(min=1e-12)

    def forward(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Map sources, ``(N, D)`` each, to predictions of the targets, ``(N, D)`` each."""
        predictions = [predictor(x) for predictor, x in zip(self.predictors, sources, strict=True)]
        if self.form == "paper":
            return list(predictions[0].split([self._widths[name] for name in self.targets], dim=-1))
        return predictions

    def layer_weights(self) -> list[float]:
        """Weights of the targets in the loss, of mean 1."""
        if not self.adaptive:
            return [1.0] * len(self.targets)
        return uncertainty_weights(self._layer_losses)

    def current_weight(self, step: int) -> float:
        """Factor of the error at a step: ``weight``, scaled by the warm-up and lowered after a collapse."""
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * ramp * self._answer

    def end_step(self, *, step: int, measure: bool = False, reduce: Reduce | None = None) -> dict[str, float]:
        """End an optimizer step: update running errors, and sometimes measure the rank.

        Args:
            step: Optimizer steps done, this one included.
            measure: Return numbers to log.
            reduce: Sums a tensor over ranks, which must all call this method. Default: one rank.

        Returns:
            ``{}``, or "loss" (mean error of the targets, 1 for a prediction of 0), "weight" (its factor in the last
            loss), and for each target "<layer>/explained_variance" (over the best constant),
            "<layer>/copy_explained_variance" (the same of the source, taken unchanged for a prediction) and, where it
            was watched, "<layer>/effective_rank"; NaN where it is unknown.
        """
        metrics: dict[str, float] = {}
        if self._sums and (measure or self.adaptive):
            table = torch.stack([self._sums[index] for index in range(len(self.targets))]).double()
            error, spread, copy_error, count = (reduce(table) if reduce else table).unbind(1)
            losses = torch.where(count > 0, error / count, math.nan)
            if self.adaptive:
                self._learn_losses(losses)
            if measure:
                metrics["loss"] = float(losses.nanmean())
                metrics["weight"] = self.current_weight(step - 1)
                explained, by_copy = explained_variance(error, spread), explained_variance(copy_error, spread)
                for index, name in enumerate(self.targets):
                    metrics[f"{name}/explained_variance"] = float(explained[index])
                    metrics[f"{name}/copy_explained_variance"] = float(by_copy[index])
        if step >= self._next_watch:
            self._next_watch = (step // self.watch_every_n_steps + 1) * self.watch_every_n_steps
            metrics |= {f"{name}/effective_rank": rank for name, rank in self._watch(step, reduce).items()}
        self._forget_step()
        return metrics

    def _forget_step(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._watched: dict[int, list[Tensor]] = {}

    def _learn_losses(self, losses: Tensor) -> None:
        """Let a step's errors enter the running ones; on an accelerator a step later, when they can be read."""
        before, self._unread = self._unread, HostCopy({"losses": losses})
        if before is not None:
            self._take_losses(before.read()["losses"].tolist())
        if reads_are_free(losses.device):
            self._take_losses(losses.tolist())
            self._unread = None

    def _take_losses(self, losses: Sequence[float]) -> None:
        for index, loss in enumerate(losses):
            running = self._layer_losses[index]
            if math.isfinite(loss):
                mixed = _LAYER_LOSS_DECAY * running + (1 - _LAYER_LOSS_DECAY) * loss
                self._layer_losses[index] = loss if math.isnan(running) else mixed

    def _watch(self, step: int, reduce: Reduce | None) -> dict[str, float]:
        """Effective rank of the targets, and the response to a collapse; the same on all ranks."""
        rows = {index: torch.cat(parts) for index, parts in self._watched.items()}
        device = next(self.parameters()).device
        if not self._num_watched:  # of as many rows each time: the rank is at most one less
            least = torch.tensor([float(min((len(x) for x in rows.values()), default=0)), 1.0], device=device)
            total, processes = (reduce(least) if reduce else least).tolist()
            self._num_watched = min(_WATCHED_ROWS, int(total / processes))
        found = [math.nan] * len(self.targets)
        for index, x in rows.items():
            if len(x) >= self._num_watched >= _LEAST_ROWS:
                chosen = torch.linspace(0, len(x) - 1, self._num_watched, device=x.device).round().long()
                found[index] = float(participation_ratio(x[chosen].float())[0])
        if reduce is not None:
            table = torch.tensor([[0.0, 0.0] if math.isnan(rank) else [rank, 1.0] for rank in found])
            total_rank, known = reduce(table.to(device)).unbind(1)
            found = torch.where(known > 0, total_rank / known, math.nan).tolist()
        share = self.collapse_below or 0.0
        fallen = [index for index, rank in enumerate(found) if rank < share * self._top_ranks[index]]
        if fallen:
            self._answer /= 4
            first = fallen[0]
            warnings.warn(
                f"{self.owner}: at step {step} the effective rank of {self.targets[first]!r} is {found[first]:.1f},"
                f" where it has been {self._top_ranks[first]:.1f}. The head's weight is divided by 4.",
                stacklevel=2,
            )
        for index, rank in enumerate(found):
            begins_anew = index in fallen or math.isnan(self._top_ranks[index])  # each fall is answered once
            if not math.isnan(rank) and step > self.warmup_steps:  # what a new network loses at first is no collapse
                self._top_ranks[index] = rank if begins_anew else max(self._top_ranks[index], rank)
        return dict(zip(self.targets, found, strict=True))

    def _batch_first(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, T, D)``; rows ``(N, D)`` are examples of one position."""
        if x.shape[-1] != self._widths[name]:
            raise ValueError(
                f"`{self.owner}`: {name!r} returns {x.shape[-1]} units; {self._widths[name]} were expected from its"
                " module. Set `width`, or name other layers."
            )
        if x.ndim == 2:
            return x[:, None]
        return x.transpose(0, 1) if is_positions_first(x, PositionFields(mask=mask)) else x

    def _rows(
        self, captured: Mapping[str, Tensor], mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Sources and targets, ``(N, D)`` each, at the last positions that all of them have.

        Where choosing rows is free, they are those of real tokens; elsewhere all, and a third result, ``(N,)``
        booleans, says which count.
        """
        length = min(x.shape[1] for x in captured.values())
        if (
            length == 1
            and mask is not None
            and mask.ndim == 2
            and any(x.shape[1] == mask.shape[1] for x in captured.values())
        ):
            captured, mask = _at_last_token(captured, mask), None
        x = {name: value[:, -length:] for name, value in captured.items()}
        batch = next(iter(x.values())).shape[0]
        if any(len(value) != batch for value in x.values()):
            shapes = {name: tuple(value.shape) for name, value in captured.items()}
            raise ValueError(f"`{self.owner}`: layers return different numbers of examples: {shapes}.")
        real = None
        if mask is not None:
            if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < length:
                raise ValueError(
                    f"`{self.owner}`: the mask is {tuple(mask.shape)}, the activations {batch} × {length}. Set `mask`"
                    " to the batch's (B, T) mask, or to null."
                )
            real = mask[:, -length:].bool()
        if self.form != "next_latent":
            sources, targets = ([x[name] for name in names] for names in (self._sources, self.targets))
            return _chosen(sources, targets, real)
        if length < 2:
            raise ValueError(
                f"`{self.owner}(form='next_latent')`: the output layer reads one position only, and there is no next"
                " one to predict. Use form='paper'."
            )
        both = None if real is None else real[:, :-1] & real[:, 1:]
        known = torch.cat([x[FEATURES][:, :-1], x["embedding"][:, 1:]], dim=-1)
        return _chosen([known], [x[FEATURES][:, 1:]], both)


def _chosen(
    sources: list[Tensor], targets: list[Tensor], real: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Rows ``(N, D)`` of activations ``(B, T, D)``: the real ones, or all and which of them are real."""
    if real is not None and reads_are_free(real.device):
        return [x[real] for x in sources], [x[real] for x in targets], None
    if real is not None:  # what stands elsewhere may not be finite
        sources, targets = ([torch.where(real[..., None], x, 0) for x in part] for part in (sources, targets))
    counts = None if real is None else real.flatten()
    return [x.flatten(0, 1) for x in sources], [x.flatten(0, 1) for x in targets], counts


def _at_last_token(captured: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """If some activations have one position per example, take the last real token of the others."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, -1).amax(1).clamp(min=0)
    rows = torch.arange(len(mask), device=mask.device)
    return {name: x[rows, last][:, None] if x.shape[1] == mask.shape[1] else x for name, x in captured.items()}


def _token_embedding(network: nn.Module) -> nn.Embedding:
    found: Any = getattr(network, "get_input_embeddings", lambda: None)()
    if found is None:
        found = next((m for _, m in network_modules(network) if isinstance(m, nn.Embedding)), None)
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            f"form='next_latent' needs the embedding of the next token, and {type(network).__name__} has no"
            " `nn.Embedding`. Use form='paper'."
        )
    return found
