"""CodeEvaluation: success on programming problems, measured by running what the model writes."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from forge_lightning.core.callback import ForgeCallback, is_dev_run, run_directory, uses_strategy
from forge_lightning.core.protocols import SupportsGenerate, SupportsProblems
from forge_lightning.core.validate import require
from forge_lightning.evaluation.functional import pass_at_k
from forge_lightning.evaluation.metric import PassAtK
from forge_lightning.sandbox import NO_TIME, Sandbox, SandboxError, Verdict


class CodeEvaluation(ForgeCallback):
    """Generate programs for the validation or test problems, run their tests, and log pass@k.

    Hook: the end of every ``every_n_validations``-th validation, and of testing; or every ``every_n_steps`` optimizer
    steps, on training problems in turn. Problems are split over the ranks. Generated programs
    are kept in ``programs.jsonl`` in the run directory. They run in `forge_lightning.sandbox.Sandbox`. The reference
    solutions of the problems are run once; a warning counts those that fail, as no program can solve such a problem.

    Reads: the problems of the datamodule (or module); the module's completions.
    Changes: nothing.
    Logs: after each evaluation, ``forge/code_evaluation/pass_at_1`` (and one such key for every other ``k``), in
    [0, 1], ``forge/code_evaluation/timeout_rate``, the share of programs that ran out of time, and
    ``forge/code_evaluation/num_problems``, the number of evaluated problems. With ``temperatures``, testing logs all of
    these for each, as ``forge/code_evaluation/at_0.2/pass_at_1``, and writes ``temperature_study.json`` into the run
    directory, with standard errors over the problems.

    Cost: a generation of up to ``num_samples × max_new_tokens`` tokens a problem, and 7 ms of CPU a program, or
    ``timeout`` seconds at most.

    When to use: a model that writes programs.

    When it does not help: a small model may solve no problem for hours, and pass@k stays 0. Watch token accuracy until
    then, or train on easier tasks.

    Args:
        k: The k of pass@k, each at least 1 and at most ``num_samples``.
        num_samples: Programs to generate for each problem.
        temperature: Sampling temperature; 0 takes the likeliest token, and then all samples are the same.
        temperatures: Temperatures that testing compares, above 0 each, in place of ``temperature``.
        max_new_tokens: Tokens of a program at most.
        limit_problems: Evaluate only that many problems in validation, the first; with ``every_n_steps``, that many at
            a time. Testing takes all. Default: all.
        every_n_validations: Validations between evaluations.
        every_n_steps: Optimizer steps between evaluations on training problems, in place of those after validations.
            `EdgeController` reads their outcomes.
        max_seconds: Wall time of one evaluation in validation or training; a batch of programs is written in any case,
            and has ``timeout`` seconds to run. Problems it leaves out do not count.
        batch_size: Programs to generate at a time.
        timeout: Seconds of a program.
        memory_mb: Memory of a program, in MiB.
        num_workers: Programs to run at a time. Default: the number of cores.
        allow_weaker: Run programs also where the system lacks a protection. Only for a model you trust.
        seed: Random seed for the sampling, which does not depend on ``batch_size`` or the other problems, and for the
            order of training problems.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if the module cannot complete prompts, neither datamodule nor module has
            problems, the weights are sharded, or the system lacks a protection and ``allow_weaker`` is not set.

    References:
        Chen et al., `Evaluating Large Language Models Trained on Code <https://arxiv.org/abs/2107.03374>`_, 2021.
    """

    namespace: ClassVar[str] = "code_evaluation"

    def __init__(
        self,
        k: Sequence[int] = (1,),
        num_samples: int = 1,
        temperature: float = 0.0,
        temperatures: Sequence[float] = (),
        max_new_tokens: int = 256,
        limit_problems: int | None = None,
        every_n_validations: int = 1,
        every_n_steps: int | None = None,
        max_seconds: float | None = None,
        batch_size: int = 16,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        num_workers: int | None = None,
        allow_weaker: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)

        check = partial(require, "CodeEvaluation")
        check(num_samples >= 1, "num_samples", num_samples, "at least 1")
        check(bool(k) and all(1 <= n <= num_samples for n in k), "k", k, f"in [1, num_samples={num_samples}] each")
        check(temperature >= 0, "temperature", temperature, "at least 0")
        check(all(t > 0 for t in temperatures), "temperatures", temperatures, "above 0 each")
        check(len(set(temperatures)) == len(temperatures), "temperatures", temperatures, "different from each other")
        if num_samples > 1 and not temperatures:
            check(temperature > 0, "temperature", temperature, "above 0 for num_samples > 1, or all are equal")
        check(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        check(limit_problems is None or limit_problems >= 1, "limit_problems", limit_problems, "at least 1")
        check(every_n_validations >= 1, "every_n_validations", every_n_validations, "at least 1")
        check(every_n_steps is None or every_n_steps >= 1, "every_n_steps", every_n_steps, "at least 1")
        check(max_seconds is None or max_seconds > 0, "max_seconds", max_seconds, "above 0")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        check(timeout > 0, "timeout", timeout, "above 0")
        check(memory_mb >= 64, "memory_mb", memory_mb, "at least 64")
        self.k = sorted(set(k))
        self.num_samples = num_samples
        self.temperature = temperature
        self.temperatures = sorted(temperatures)
        self.max_new_tokens = max_new_tokens
        self.limit_problems = limit_problems
        self.every_n_validations = every_n_validations
        self.every_n_steps = every_n_steps
        self.max_seconds = max_seconds
        self.batch_size = batch_size
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.num_workers = num_workers
        self.allow_weaker = allow_weaker
        self.seed = seed
        self._validations = 0
        self._next_problem = 0  # in the order of training problems
        self._outcomes: list[dict[str, Any]] = []
        self._checked: set[tuple[str, int]] = set()  # problems whose reference solution has run

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """Results of the last evaluation on training problems, over all ranks: ``step``, ``example`` (its index in the
        data set) and ``success``.
        """
        return list(self._outcomes)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            return
        if not isinstance(pl_module, SupportsGenerate):
            raise self.refuse(type(pl_module).__name__, "it has no method `complete(prompts, ...)`", "Use ForgeModule.")
        if self._source(trainer, pl_module) is None:
            raise self.refuse("this data", "neither datamodule nor module has `problems(split)`", "Use CodeTasks.")
        if uses_strategy(trainer, "ModelParallelStrategy", "FSDPStrategy"):
            raise self.refuse(
                "sharded weights",
                "ranks would generate out of step",
                "Leave it out of the training, and run `forge-fit test` on the checkpoint with one process.",
            )
        try:
            with self._sandbox():
                pass
        except SandboxError as error:
            raise MisconfigurationException(f"`CodeEvaluation`: {error}") from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._outcomes = []

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self.every_n_steps and (is_dev_run(trainer) or trainer.global_step % self.every_n_steps == 0):
            self._evaluate(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.every_n_steps is not None:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0 or getattr(trainer, "fast_dev_run", False):
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.temperatures:
            self._evaluate(trainer, pl_module, "test")
            return
        study = [row for t in self.temperatures for row in self._evaluate(trainer, pl_module, "test", t)]
        folder = run_directory(trainer)
        if trainer.is_global_zero and folder is not None and not is_dev_run(trainer):
            with self.reporting("temperature_study.json"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "temperature_study.json").write_text(json.dumps(study, indent=1) + "\n")

    def reset(self) -> None:
        super().reset()
        self._validations, self._next_problem, self._outcomes = 0, 0, []

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "next_problem": self._next_problem}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._next_problem = state_dict["validations"], state_dict["next_problem"]

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.timeout, self.memory_mb << 20, self.num_workers, allow_weaker=self.allow_weaker)

    def _chosen(self, trainer: Trainer, source: SupportsProblems, split: str) -> list[tuple[int, Any]]:
        """Problems, each with its place in the split."""
        problems = list(enumerate(source.problems(split)))
        limit = None if split == "test" else self.limit_problems
        if is_dev_run(trainer):
            limit = 2
        if split != "train" or limit is None:
            return problems[:limit]
        order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(self.seed)).tolist()
        start, self._next_problem = self._next_problem, (self._next_problem + limit) % len(problems)
        return [problems[order[(start + i) % len(problems)]] for i in range(min(limit, len(problems)))]

    def _source(self, trainer: Trainer, pl_module: LightningModule) -> SupportsProblems | None:
        sources = (getattr(trainer, "datamodule", None), pl_module)
        return next((source for source in sources if isinstance(source, SupportsProblems)), None)

    def _evaluate(
        self, trainer: Trainer, pl_module: Any, split: str, compared: float | None = None
    ) -> list[dict[str, float]]:
        """Generate, run, log. Returns a row for each k."""
        temperature = self.temperature if compared is None else compared
        source = self._source(trainer, pl_module)
        assert source is not None, "`setup` refuses this"
        mine = self._chosen(trainer, source, split)[trainer.global_rank :: trainer.world_size]
        self._run_references(split, mine)
        end = math.inf if self.max_seconds is None or split == "test" else time.monotonic() + self.max_seconds
        tasks = [problem for _, problem in mine for _ in range(self.num_samples)]
        completions: list[str] = []
        longest = 0.0
        for start, stop in self._batches(len(tasks)):
            began = time.monotonic()
            if start and began + longest > end:
                break
            prompts = [problem.prompt for problem in tasks[start:stop]]
            completions += pl_module.complete(
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                seed=self.seed + start % self.num_samples,  # of the first; `complete` counts on for equal prompts
            )
            longest = max(longest, time.monotonic() - began)
        mine = mine[: len(completions) // self.num_samples]
        tasks = tasks[: len(mine) * self.num_samples]
        completions = completions[: len(tasks)]
        left = None if end == math.inf else max(self.timeout, end - time.monotonic())
        with self._sandbox() as sandbox:
            programs = [problem.task(text) for problem, text in zip(tasks, completions, strict=True)]
            verdicts = sandbox.run_many(programs, left)
        quantities, rows = self._measure(trainer, pl_module, split, mine, verdicts)
        if split == "train":
            self.log_metrics(trainer, {key: float(value) for key, value in quantities.items()})
        else:
            for quantity, value in quantities.items():
                name = self.metric_name(quantity if compared is None else f"at_{compared:g}/{quantity}")
                pl_module.log(name, value, on_step=False, on_epoch=True, rank_zero_only=False)
        folder = run_directory(trainer)
        if trainer.is_global_zero and folder is not None:
            again = compared is not None and compared != self.temperatures[0]
            facts = {"step": trainer.global_step, "split": split, "temperature": temperature}
            with self.reporting("programs.jsonl"):
                self._keep(folder, facts, tasks, completions, verdicts, append=again)
        return [{"temperature": temperature, **row} for row in rows]

    def _batches(self, count: int) -> Iterator[tuple[int, int]]:
        """Where batches begin and end: at the first sample of a problem, or within those of one problem.

        So the seed of every sample is ``seed`` plus its number among those of its problem, whatever the batch.
        """
        size = self.num_samples
        if size <= self.batch_size:
            together = self.batch_size // size * size
            return ((start, min(start + together, count)) for start in range(0, count, together))
        return (
            (start + first, start + min(first + self.batch_size, size))
            for start in range(0, count, size)
            for first in range(0, size, self.batch_size)
        )

    def _run_references(self, split: str, problems: Sequence[tuple[int, Any]]) -> None:
        """Run the reference solution of each problem once, and warn of problems that it does not solve."""
        new = [(place, problem) for place, problem in problems if (split, place) not in self._checked]
        self._checked |= {(split, place) for place, _ in new}
        given = [problem for _, problem in new if getattr(problem, "solution", None) is not None]
        with self._sandbox() as sandbox:
            verdicts = sandbox.run_many([problem.task(problem.solution) for problem in given])
        failed = [(problem, verdict) for problem, verdict in zip(given, verdicts, strict=True) if not verdict.passed]
        if failed:
            first = "; ".join(f"{p.task_id}: {v.status}, {v.detail or 'no reason given'}" for p, v in failed[:3])
            self.warn_once(
                f"the reference solutions of {len(failed)} of {len(new)} {split} problems do not pass their own tests,"
                f" which may be broken, or need what the sandbox does not have. No program solves them. {first}"
                + (" ..." if len(failed) > 3 else "")
            )
        if len(given) < len(new):
            self.warn_once(
                f"{len(new) - len(given)} of {len(new)} {split} problems have no reference solution (`solution`), and"
                " whether their tests can be passed is not known."
            )

    def _measure(
        self, trainer: Trainer, pl_module: Any, split: str, mine: Sequence[tuple[int, Any]], verdicts: Sequence[Verdict]
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Numbers to log, over all ranks, and pass@k with its standard error.

        A problem of which a program was left out for want of time does not count.
        """
        device = pl_module.device
        rows = []
        for number, (place, _) in enumerate(mine):
            of_it = verdicts[number * self.num_samples : (number + 1) * self.num_samples]
            if not any(verdict.detail == NO_TIME for verdict in of_it):
                rows.append([place, sum(v.passed for v in of_it), sum(v.status == "timeout" for v in of_it)])
        table = torch.tensor(rows, dtype=torch.long, device=device).view(-1, 3)
        if trainer.world_size > 1:
            table = _gathered(trainer, table)
        step, places, passed = trainer.global_step, table[:, 0].tolist(), table[:, 1]
        shares = (passed / self.num_samples).tolist()
        if split == "train":
            self._outcomes = [{"step": step, "example": p, "success": s} for p, s in zip(places, shares, strict=True)]
        quantities = {
            "timeout_rate": table[:, 2].sum() / (len(table) * self.num_samples),  # NaN without any
            "num_problems": torch.tensor(float(len(table))),
        }
        studied = []
        for k in self.k:
            metric = PassAtK(k, sync_on_compute=False).to(device)
            metric.update(torch.full_like(passed, self.num_samples), passed)
            quantities[f"pass_at_{k}"] = metric.compute()
            each = pass_at_k(torch.full_like(passed, self.num_samples), passed, k)
            error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan
            row = {"k": k, "pass_at_k": float(quantities[f"pass_at_{k}"]), "standard_error": error}
            studied.append(row | {"num_problems": len(table), "num_samples": self.num_samples})
        return quantities, studied

    def _keep(
        self,
        folder: Path,
        facts: dict[str, Any],
        tasks: Sequence[Any],
        completions: list[str],
        results: Sequence[Any],
        append: bool,
    ) -> None:
        """Rank 0's programs of the last evaluation, a line each."""
        folder.mkdir(parents=True, exist_ok=True)
        name = "programs.jsonl" if self.name is None else f"programs_{self.name}.jsonl"
        with open(folder / name, "a" if append else "w") as file:
            for task, completion, result in zip(tasks, completions, results, strict=True):
                line = facts | {"task_id": task.task_id, "status": result.status}
                line |= {"completion": completion, "detail": result.detail, "output": result.stdout}
                file.write(json.dumps(line) + "\n")


def _gathered(trainer: Trainer, table: Tensor) -> Tensor:
    """Gather rows from all ranks, which may have different numbers of them, in the same order on all ranks."""
    counts = trainer.strategy.all_gather(torch.tensor(len(table), device=table.device)).flatten().tolist()
    padded = torch.zeros(max(counts), table.shape[1], dtype=table.dtype, device=table.device)
    padded[: len(table)] = table
    everything = trainer.strategy.all_gather(padded)
    return torch.cat([everything[rank, :count] for rank, count in enumerate(counts)])
