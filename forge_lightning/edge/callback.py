"""EdgeController: difficulty at the edge of what the model can do."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from forge_lightning.core.callback import ForgeCallback, is_logging_step, is_skipped
from forge_lightning.core.device import HostCopy, reads_are_free, to_device
from forge_lightning.core.protocols import OffersChoice, SupportsChoice, SupportsDifficulty, SupportsOutcomes
from forge_lightning.edge.trackers import ItemTracker, SkillTracker

_SMOOTHING = 128  # outcomes that the logged success rate is a mean of, about


class EdgeController(ForgeCallback):
    """Choose the difficulty of training examples so that the model succeeds on about two of three.

    Needs a `DifficultySampler` in the training loader: `GeneratedTasks` has one, and over a data set of yours it is two
    lines. What was drawn is compared with how it went, an estimate of skill is kept, and the sampler asks it what to
    draw next.

    Hook: the start and end of every training batch.

    Reads: ``signal`` in what ``training_step`` returns; the datamodule's ``difficulty``, where it has one, as features.
    Changes: which examples are drawn.
    Logs: every ``log_every_n_steps``: ``forge/edge/success_rate`` (mean over about the last 128 outcomes),
    ``forge/edge/expected_success`` (what the policy believed of the last batch), ``forge/edge/in_band`` (share of steps
    so far whose success rate was in ``target_range``, after the first 128 outcomes), ``forge/edge/difficulty``,
    ``forge/edge/difficulty_p10`` and ``forge/edge/difficulty_p90`` (mean and deciles over the last batch; without
    declared difficulties the number of the arm), ``forge/edge/skill`` and ``forge/edge/skill_se`` (difficulty at which
    half succeed; for "bandit" and "item" the logit of an average arm), ``forge/edge/target_low`` and
    ``forge/edge/target_high``; with "item" also ``forge/edge/mastered`` (share of examples expected to succeed more
    often than the band allows).

    Cost: 0.5 to 0.8 ms of CPU a step, and one small exchange between ranks. On an accelerator the outcomes of a batch
    are learned one step later, when they can be read without waiting for it.

    When to use: examples differ much in difficulty, the hard ones teach nothing yet and the easy ones nothing more, and
    no ramp from easy to hard has been tuned.

    Examples of a data set come again. With "skill", one is drawn three times at most in as many draws as there are
    examples. Where none is at the edge, all are drawn alike, and a warning says so.

    When it does not help: where an easy-to-hard ramp of the right length is known (`benchmarks/edge.md`), and on a
    small data set that is soon mastered whole: ``forge/edge/mastered`` says so. Success of one batch of 32 wavers by
    8 %; judge by the mean.

    Args:
        target_range: Band of success, low and high within (0, 1). The aim is its middle.
        policy: "skill": one skill for all difficulties, which must be in an order. "bandit": arms without an order, as
            families of tasks. "item": a skill, and a difficulty for each example of a data set, which declared ones
            help to know. "auto": "item" for a data set; for levels "skill" if they are in an order, else "bandit".
        signal: Entry of what ``training_step`` returns: for each example success in [0, 1], or a loss with
            ``loss_threshold``, or with ``soft`` the log-likelihood of the right answer. `ForgeModule` returns
            "example_success", "example_token_accuracy", "example_loss" and "example_log_likelihood". "outcomes" takes
            success from another callback that measured it, as `CodeEvaluation(every_n_steps=...)` does on examples of a
            data set; ``success_rate`` is then that of the measured ones.
        loss_threshold: Count a ``signal`` up to this as success. A single loss counts for the whole batch.
        soft: For "item": learn from log-likelihoods, which carry much more information than right and wrong.
        epsilon: Share of examples drawn from all difficulties, in [0, 1], so that none is forgotten or out of date.
        spread: Spread of difficulties in logits of success, for "skill", at least 0.
        steer: Choose examples. If false, the callback only measures, and changes nothing.
        seed: Random seed for the choices.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if no training loader has a `DifficultySampler`, it has another batch size,
            or the policy cannot choose from its data; after the first batch, if there is no ``signal``.

    References:
        Wilson et al., `The Eighty Five Percent Rule for optimal learning
        <https://doi.org/10.1038/s41467-019-12552-4>`_, 2019, and Rutherford et al., `No Regrets
        <https://arxiv.org/abs/2408.15099>`_, 2024, whose score is ``p (1 - p)``, on why the middle teaches most.
    """

    namespace: ClassVar[str] = "edge"

    def __init__(
        self,
        target_range: tuple[float, float] = (0.55, 0.75),
        policy: Literal["auto", "skill", "bandit", "item"] = "auto",
        signal: str = "example_success",
        loss_threshold: float | None = None,
        soft: bool = False,
        epsilon: float = 0.05,
        spread: float = 0.8,
        steer: bool = True,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not isinstance(target_range, Sequence) or len(target_range) != 2:
            raise ValueError(f"`EdgeController(target_range={target_range!r})` must be two numbers, low and high.")
        low, high = target_range
        if not 0 < low < high < 1:
            raise ValueError(f"`EdgeController(target_range={tuple(target_range)})` must be low < high within (0, 1).")
        if policy not in ("auto", "skill", "bandit", "item"):
            raise ValueError(f"`EdgeController(policy={policy!r})` must be 'auto', 'skill', 'bandit' or 'item'.")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"`EdgeController(epsilon={epsilon})` must be in [0, 1].")
        if not spread >= 0:
            raise ValueError(f"`EdgeController(spread={spread})` must be at least 0.")
        if soft and (policy not in ("auto", "item") or loss_threshold is not None):
            raise ValueError("`EdgeController(soft=True)` goes with policy='item', and without `loss_threshold`.")
        if signal == "loss" and loss_threshold is None:
            raise ValueError(
                "`EdgeController(signal='loss')` needs `loss_threshold`: a loss at or below it counts as success."
            )
        self.target_range, self.policy, self.signal = (low, high), policy, signal
        self.loss_threshold, self.soft = loss_threshold, soft
        self.epsilon, self.spread, self.steer, self.seed = epsilon, spread, steer, seed
        self._tracker: SkillTracker | ItemTracker | None = None
        self._sampler: SupportsChoice | None = None
        self._sampler_state: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self._arms: list[int] | None = None
        self._iteration, self._batch = -1, 0
        self._rate, self._weight = 0.0, 0.0
        self._steps_in_band, self._steps_counted = 0, 0
        self._seen, self._batches = 0, 0
        self._last_outcomes: list[dict[str, Any]] = []
        self._told = False
        self._unread: tuple[list[int], HostCopy] | None = None  # arms and outcomes of the batch before

    @property
    def success_rate(self) -> float:
        """Mean over about the last 128 outcomes; NaN before the first."""
        return self._rate / self._weight if self._weight else math.nan

    def preflight(self, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        source: Any = datamodule
        if isinstance(source, OffersChoice) and not source.offers_choice:
            raise MisconfigurationException(
                f"`EdgeController` has nothing to choose from in this {type(datamodule).__name__}. Use GeneratedTasks,"
                " or CodeTasks with `difficulty`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        sampler = self._find_sampler(trainer)
        self._sampler = sampler
        self._tracker = self._new_tracker(trainer, sampler)
        self._clear()
        if self._restored is not None:
            self._take_up(self._restored)
            self._restored = None
        sampler.restored = False
        self._steer()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sampler is None or any(self._sampler is sampler for sampler, _ in _samplers(trainer)):
            return
        before, self._sampler = self._sampler, self._find_sampler(trainer)  # the loader was made anew
        self._sampler.load_state_dict(before.state_dict())
        self._sampler.restored, before.policy, self._iteration = False, None, -1
        self._steer()

    def _find_sampler(self, trainer: Trainer) -> SupportsChoice:
        found = next(iter(_samplers(trainer)), None)
        if found is None:
            raise self._no_sampler(trainer)
        sampler, loader = found
        dataset = getattr(sampler, "dataset", loader.dataset)
        if dataset is not loader.dataset and len(dataset) != len(loader.dataset):
            raise self.refuse(
                f"a loader of {len(loader.dataset)} examples",
                f"its sampler was made for {len(dataset)}",
                "Give `DifficultySampler` the loader's data set.",
            )
        if loader.batch_size != sampler.batch_size:
            raise self.refuse(
                f"a loader of batch_size={loader.batch_size}",
                f"its sampler draws batches of {sampler.batch_size}",
                "Give `DifficultySampler` the loader's `batch_size`.",
            )
        if self.steer and sampler.policy is not None:
            raise self.refuse(
                "a sampler that another `EdgeController` steers",
                "one must decide",
                "Set `steer: false` in one of them.",
            )
        return sampler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._sampler is not None
        if self._iteration != self._sampler.iteration:
            self._iteration, self._batch = self._sampler.iteration, self._sampler.first
        self._arms = self._sampler.arms_of(self._batch)
        self._batch += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._arms is None or self._tracker is None or self._sampler is None:
            return
        known = self._known_outcomes(trainer, pl_module, outputs)
        self._batches += 1
        logs = is_logging_step(trainer)
        expected = self._expected(np.array(self._arms)) if logs else math.nan  # before it knows
        for arms, success in known:
            self._learn(arms, success)
            self._steer()
        if logs:
            self.log_metrics(trainer, {"expected_success": expected, **self._quantities(np.array(self._arms))})

    def _known_outcomes(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> list[tuple[Any, Any]]:
        """Arms and their success, of this batch; on an accelerator of the one before, so that nothing waits."""
        assert self._arms is not None
        if self.signal == "outcomes":
            arms, success = self._measured_elsewhere(trainer)
            return [(arms, success)] if len(arms) else []
        success = self._gather_success(trainer, pl_module, outputs, len(self._arms))
        readable = [] if self._unread is None else [self._unread]
        self._unread = (self._arms, HostCopy({"success": success}))
        if reads_are_free(success.device):
            readable.append(self._unread)
            self._unread = None
        return [(np.array(arms), self._checked(copy.read()["success"])) for arms, copy in readable]

    def state_dict(self) -> dict[str, Any]:
        if self._tracker is None:
            return self._restored or {}
        if self._sampler is not None:
            self._sampler_state = self._sampler.state_dict()
        unread = None
        if self._unread is not None:
            arms, copy = self._unread
            unread = {"arms": list(arms), "success": copy.read()["success"].tolist()}
        return {
            "tracker": self._tracker.state_dict(),
            "rate": [self._rate, self._weight],
            "band": [self._steps_in_band, self._steps_counted, self._seen],
            "sampler": self._sampler_state,
            "unread": unread,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _take_up(self, state: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        assert self._sampler is not None
        try:
            self._tracker.load_state_dict(state["tracker"])
        except (KeyError, ValueError) as error:
            raise MisconfigurationException(
                f"`EdgeController`: the checkpoint's state is of another policy or data set ({error})."
            ) from None
        self._rate, self._weight = state["rate"]
        self._steps_in_band, self._steps_counted, self._seen = state["band"]
        unread = state.get("unread")
        if unread is not None:
            self._unread = (unread["arms"], HostCopy({"success": torch.tensor(unread["success"])}))
        if not self._sampler.restored:  # as by a loader that has no state, or one that Lightning passes over
            self._sampler.load_state_dict(state["sampler"])

    def detach(self) -> None:
        if self._sampler is not None:
            if self._sampler.policy is self._tracker:
                self._sampler.policy = None
            self._sampler_state = self._sampler.state_dict()
            self._sampler = None
        self._arms, self._iteration = None, -1

    def _no_sampler(self, trainer: Trainer) -> MisconfigurationException:
        loaders = list(_flattened(trainer.train_dataloader))
        if any(isinstance(getattr(loader, "batch_sampler", None), SupportsChoice) for loader in loaders):
            return self.refuse(
                "a `DifficultySampler` as `batch_sampler`",
                "it yields one example at a time",
                "Give it to the loader as `sampler`, with `batch_size`.",
            )
        kinds = ", ".join(type(loader).__name__ for loader in loaders) or "nothing"
        return self.refuse(
            f"this training data ({kinds})",
            "no loader has a `DifficultySampler`, so that there is nothing to choose with",
            "Use `GeneratedTasks`, or for a data set of yours: `sampler = DifficultySampler(dataset, difficulty,"
            " batch_size=32)` and `DataLoader(dataset, batch_size=32, sampler=sampler)`.",
        )

    def _new_tracker(self, trainer: Trainer, sampler: SupportsChoice) -> SkillTracker | ItemTracker:
        target, policy = sum(self.target_range) / 2, self.policy
        if policy == "auto":
            policy = "item" if not sampler.makes_examples else "skill" if sampler.ordered else "bandit"
        if self.signal == "outcomes" and policy != "item":
            raise self.refuse(
                f"signal='outcomes' and policy={policy!r}",
                "outcomes are of examples of a data set",
                "Use policy='item'.",
            )
        if policy == "skill":
            if sampler.difficulty is None:
                raise self.refuse(
                    "policy='skill' on data without difficulties",
                    "one skill needs them in an order",
                    "Give `DifficultySampler` a `difficulty` for each example, or use policy='item'.",
                )
            low, high = float(sampler.difficulty.min()), float(sampler.difficulty.max())
            return SkillTracker(low, high, target, self.spread, self.epsilon, seed=self.seed)
        if policy == "item" and sampler.makes_examples:
            raise self.refuse(
                "policy='item' on examples that are generated on the fly",
                "none comes twice",
                "Use 'skill' or 'bandit'.",
            )
        features: Any = np.zeros((sampler.num_arms, 0))
        if policy == "item":
            data = getattr(trainer, "datamodule", None)
            known = data.difficulty if isinstance(data, SupportsDifficulty) else None
            known = sampler.difficulty if known is None or len(known) != sampler.num_arms else known
            features = features if known is None else np.asarray(known, dtype=float)
        options: dict[str, Any] = {"target": target, "epsilon": self.epsilon, "seed": self.seed}
        if policy == "bandit":
            return ItemTracker(features, replace=True, item_std=4.0, **options)
        together = sampler.batch_size * trainer.world_size
        if sampler.num_arms < together:
            raise self.refuse(
                f"policy='item' on {sampler.num_arms} examples",
                f"a batch over all ranks holds {together} different ones",
                "Use a smaller batch.",
            )
        return ItemTracker(features, **options)

    def _learn(self, arms: Any, success: Any) -> None:
        tracker, sampler = self._tracker, self._sampler
        assert tracker is not None
        assert sampler is not None
        if isinstance(tracker, SkillTracker):
            assert sampler.difficulty is not None
            tracker.update(sampler.difficulty[arms], success)
        else:
            is_log = self.soft and self.signal != "outcomes"
            tracker.update(arms, success, self.soft, is_log)
            success = np.exp(success) if is_log else success
        there = success[np.isfinite(success)]
        if not len(there):
            return
        keep = max(0.0, 1 - len(there) / _SMOOTHING)
        self._rate = keep * self._rate + float(there.sum())
        self._weight = keep * self._weight + len(there)
        self._seen += len(there)
        if self._seen >= _SMOOTHING:
            low, high = self.target_range
            self._steps_counted += 1
            self._steps_in_band += low <= self.success_rate <= high

    def _gather_success(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, count: int) -> Tensor:
        """Success of every example of the batch, over all ranks, ``(count,)`` fp32; NaN where a rank has none."""
        mine = self._success(trainer, outputs)
        world = trainer.world_size
        if not self._told:
            known, skipped = mine is not None, is_skipped(trainer, outputs)
            if world > 1:
                known = trainer.strategy.reduce_boolean_decision(known, all=False)
                skipped = trainer.strategy.reduce_boolean_decision(skipped, all=False)
            if not known and not skipped:
                raise self._no_signal(outputs)
            self._told = known
        each = torch.full((1,), math.nan, device="cpu") if mine is None else mine.detach().float().flatten()
        if len(each) not in (1, count // world):
            raise MisconfigurationException(
                f"`EdgeController(signal={self.signal!r})`: `training_step` returned {len(each)} numbers for a"
                f" batch of {count // world} examples. Return one for each."
            )
        each = each.expand(count // world)
        if world == 1:
            return each
        gathered: Tensor = trainer.strategy.all_gather(to_device(each.contiguous(), pl_module.device))
        return gathered.T.flatten()

    def _checked(self, success: Tensor) -> Any:
        """What was read, as float64, if it can be what ``signal`` is said to be."""
        values: Any = success.double().numpy()
        if self.soft:
            possible = (values <= 1e-4) | np.isnan(values)  # NaN: an example without labels
            self._require(values, possible.all(), "log-likelihoods are at most 0")
        elif self.loss_threshold is None:
            right = ((values > -1e-4) & (values < 1 + 1e-4))[np.isfinite(values)].all()
            self._require(values, right, "success is in [0, 1]; for a loss set `loss_threshold`")
        return values

    def _success(self, trainer: Trainer, outputs: Any) -> Tensor | None:
        value = outputs.get(self.signal) if isinstance(outputs, Mapping) else None
        key = self.signal
        if value is None and self.loss_threshold is not None:  # a bare loss
            value, key = (outputs.get("loss") if isinstance(outputs, Mapping) else outputs), "loss"
        if isinstance(value, list | tuple | np.ndarray):
            value = torch.as_tensor(np.asarray(value, dtype=float))
        if not isinstance(value, Tensor):
            return None
        value = value.detach()
        if key == "loss" and trainer.lightning_module.automatic_optimization:
            value = value * trainer.accumulate_grad_batches  # Lightning has divided it
        if self.loss_threshold is not None:
            return torch.where(value.isnan(), torch.nan, (value <= self.loss_threshold).float())
        return value

    def _require(self, values: Any, ok: Any, allowed: str) -> None:
        if not bool(ok):
            raise MisconfigurationException(
                f"`EdgeController(signal={self.signal!r})`: `training_step` returned {values[:3]} ..., and {allowed}."
            )

    def _no_signal(self, outputs: Any) -> MisconfigurationException:
        found = sorted(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
        return MisconfigurationException(
            f"`EdgeController(signal={self.signal!r})`: `training_step` returned no such entry, only {found}. Return a"
            " dict with 'loss' and, for each example of the batch, its success in [0, 1]; or set `loss_threshold` to"
            " count losses below it as success."
        )

    def _measured_elsewhere(self, trainer: Trainer) -> tuple[Any, Any]:
        """New outcomes of another callback; the same on all ranks."""
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [callback for callback in callbacks if isinstance(callback, SupportsOutcomes)]
        sources.sort(key=lambda callback: not callback.outcomes)
        if not sources:
            raise self.refuse(
                "signal='outcomes'", "no callback measures outcomes", "Add `CodeEvaluation(every_n_steps=...)`."
            )
        found = list(sources[0].outcomes)
        if not found or found == self._last_outcomes:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        self._last_outcomes = found
        examples = np.array([o["example"] for o in found])
        assert self._sampler is not None
        if examples.min() < 0 or examples.max() >= self._sampler.num_arms:
            raise MisconfigurationException(
                f"`EdgeController(signal='outcomes')`: `{type(sources[0]).__name__}` measured example {examples.max()},"
                f" and there are {self._sampler.num_arms}. The problems of 'train' must be the data set's examples."
            )
        return examples, np.array([o["success"] for o in found], dtype=float)

    def _expected(self, arms: Any) -> float:
        assert self._tracker is not None
        assert self._sampler is not None
        at = self._sampler.difficulty[arms] if isinstance(self._tracker, SkillTracker) else arms
        return float(self._tracker.expected(at).mean())

    def _quantities(self, arms: Any) -> dict[str, float]:
        tracker, sampler = self._tracker, self._sampler
        assert tracker is not None
        assert sampler is not None
        difficulty = arms.astype(float) if sampler.difficulty is None else sampler.difficulty[arms]
        p10, p90 = np.quantile(difficulty, [0.1, 0.9])
        metrics = {
            "success_rate": self.success_rate,
            "in_band": self._steps_in_band / self._steps_counted if self._steps_counted else math.nan,
            "difficulty": float(difficulty.mean()),
            "difficulty_p10": float(p10),
            "difficulty_p90": float(p90),
            "skill": tracker.skill,
            "skill_se": tracker.skill_error,
            "target_low": self.target_range[0],
            "target_high": self.target_range[1],
        }
        if isinstance(tracker, ItemTracker) and not tracker.replace:
            every = tracker.expected(np.arange(sampler.num_arms))
            metrics["mastered"] = float((every > self.target_range[1]).mean())
            if metrics["mastered"] > 0.8:
                self.warn_once(
                    f"{100 * metrics['mastered']:.0f} % of the examples are mastered; there is little left to choose"
                    " from. Add data, or augment it.",
                    key="mastered",
                )
        if self._seen == 0 and self._batches >= 20 and self.signal != "outcomes":
            self.warn_once(f"no outcome so far is a number: `signal={self.signal!r}` is NaN. Nothing is steered by it.")
        return metrics

    def _steer(self) -> None:
        """Let the tracker choose where some examples are at the edge; otherwise draw all alike."""
        tracker, sampler = self._tracker, self._sampler
        assert tracker is not None
        assert sampler is not None
        if not self.steer:
            return
        sampler.policy = tracker
        if self._seen < (_SMOOTHING // 4 if self.signal == "outcomes" else 4 * _SMOOTHING):
            return  # programs that were run are dear, and few
        arms: Any = np.arange(sampler.num_arms)
        if isinstance(tracker, SkillTracker):
            assert sampler.difficulty is not None
            arms = [sampler.difficulty.min(), sampler.difficulty.max()]  # the chance falls with difficulty
        chance, (low, high) = tracker.expected(arms), self.target_range
        # Examples of a data set come again: those nearest to an edge that is out of reach would come all the time.
        alike = "" if sampler.makes_examples else " Until then, all are drawn alike."
        if chance.min() > high and self.success_rate > high:
            if not (isinstance(tracker, ItemTracker) and not tracker.replace):  # "mastered" says so there
                self.warn_once(
                    f"even the hardest examples are mastered, and success is above the band. Add harder ones.{alike}"
                )
        elif chance.max() < low and self.success_rate < low:
            self.warn_once(f"even the easiest examples fail, and success is below the band. Add easier ones.{alike}")
        else:
            return
        if not sampler.makes_examples:
            sampler.policy = None


def _samplers(trainer: Trainer) -> list[tuple[SupportsChoice, Any]]:
    """Samplers of the training loaders that choose, each with its loader."""
    loaders = list(_flattened(trainer.train_dataloader))
    found = [(getattr(loader, "sampler", None), loader) for loader in loaders]
    return [(sampler, loader) for sampler, loader in found if isinstance(sampler, SupportsChoice)]


def _flattened(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _flattened(loader)
    elif loaders is not None:
        yield loaders
