"""CodeEvaluation: success on programming problems, measured by running what the model writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from forge_lightning.callbacks.base import ForgeCallback, run_directory
from forge_lightning.components.pass_at_k import PassAtK
from forge_lightning.protocols import SupportsGenerate, SupportsProblems
from forge_lightning.sandbox import run_programs


class CodeEvaluation(ForgeCallback):
    """Generate programs for the validation or test problems, run their tests, and log pass@k.

    Hook: the end of every ``every_n_validations``-th validation, and of testing. Costs a generation of up to
    ``num_samples × max_new_tokens`` tokens a problem, and ``timeout`` seconds at most a program. Problems are split
    over the processes. Generated programs are kept in ``programs.jsonl`` in the run directory.

    Programs run with limits on time, memory, files and processes, which is no jail: see `forge_lightning.sandbox`.

    Reads: the problems of the datamodule (or module); the module's completions.
    Changes: nothing.
    Logs: after each evaluation, ``forge/code_evaluation/pass_at_1`` (and one such key for every other ``k``), in
    [0, 1], and ``forge/code_evaluation/timeout_rate``, the share of programs that ran out of time.

    Args:
        k: The k of pass@k, each at least 1 and at most ``num_samples``.
        num_samples: Programs to generate for each problem.
        temperature: Sampling temperature; 0 takes the likeliest token, and then all samples are the same.
        max_new_tokens: Tokens of a program at most.
        limit_problems: Evaluate only that many problems in validation, the first. Testing takes all. Default: all.
        every_n_validations: Validations between evaluations.
        batch_size: Programs to generate at a time.
        timeout: Seconds of a program.
        memory_mb: Memory of a program, in MiB.
        num_workers: Programs to run at a time. Default: the number of cores.
        seed: Seed of the sampling.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if the module cannot complete prompts, neither datamodule nor module has
            problems, or the weights are sharded.

    References:
        Chen et al., `Evaluating Large Language Models Trained on Code <https://arxiv.org/abs/2107.03374>`_, 2021.
    """

    namespace: ClassVar[str] = "code_evaluation"

    def __init__(
        self,
        k: Sequence[int] = (1,),
        num_samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        limit_problems: int | None = None,
        every_n_validations: int = 1,
        batch_size: int = 16,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        num_workers: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)

        def require(ok: bool, argument: str, value: object, allowed: str) -> None:
            if not ok:
                raise ValueError(f"`CodeEvaluation({argument}={value!r})` must be {allowed}.")

        require(num_samples >= 1, "num_samples", num_samples, "at least 1")
        require(bool(k) and all(1 <= n <= num_samples for n in k), "k", k, f"in [1, num_samples={num_samples}] each")
        require(temperature >= 0, "temperature", temperature, "at least 0")
        if num_samples > 1:
            require(temperature > 0, "temperature", temperature, "above 0 for num_samples > 1, or all are equal")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        require(limit_problems is None or limit_problems >= 1, "limit_problems", limit_problems, "at least 1")
        require(every_n_validations >= 1, "every_n_validations", every_n_validations, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(timeout > 0, "timeout", timeout, "above 0")
        require(memory_mb >= 64, "memory_mb", memory_mb, "at least 64")
        self.k = sorted(set(k))
        self.num_samples = num_samples
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.limit_problems = limit_problems
        self.every_n_validations = every_n_validations
        self.batch_size = batch_size
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.num_workers = num_workers
        self.seed = seed
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        if not isinstance(pl_module, SupportsGenerate):
            raise self.refuse(type(pl_module).__name__, "it has no method `complete(prompts, ...)`", "Use ForgeModule.")
        if self._source(trainer, pl_module) is None:
            raise self.refuse("this data", "neither datamodule nor module has `problems(split)`", "Use CodeTasks.")
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise self.refuse(
                "sharded weights",
                "the processes would generate out of step",
                "Leave it out of the training, and run `forge-fit test` on the checkpoint with one process.",
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0 or getattr(trainer, "fast_dev_run", False):
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def _source(self, trainer: Trainer, pl_module: LightningModule) -> SupportsProblems | None:
        sources = (getattr(trainer, "datamodule", None), pl_module)
        return next((source for source in sources if isinstance(source, SupportsProblems)), None)

    def _evaluate(self, trainer: Trainer, pl_module: Any, split: str) -> None:
        source = self._source(trainer, pl_module)
        assert source is not None, "`setup` refuses this"
        limit = self.limit_problems if split == "val" else None
        problems = source.problems(split)[: 2 if getattr(trainer, "fast_dev_run", False) else limit]
        mine = problems[trainer.global_rank :: trainer.world_size]
        tasks = [problem for problem in mine for _ in range(self.num_samples)]
        completions: list[str] = []
        for start in range(0, len(tasks), self.batch_size):
            prompts = [problem.prompt for problem in tasks[start : start + self.batch_size]]
            completions += pl_module.complete(
                prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed + start
            )
        programs = [problem.program(text) for problem, text in zip(tasks, completions, strict=True)]
        results = run_programs(programs, timeout=self.timeout, memory_mb=self.memory_mb, num_workers=self.num_workers)
        passed = torch.tensor([int(result.passed) for result in results], dtype=torch.long, device=pl_module.device)
        passed = passed.view(len(mine), self.num_samples).sum(1)
        timeouts = torch.tensor([float(result.status == "timeout") for result in results], device=pl_module.device)
        counts = torch.stack([timeouts.sum(), torch.tensor(float(len(results)), device=pl_module.device)])
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        quantities = {"timeout_rate": counts[0] / counts[1]}
        for k in self.k:
            metric = PassAtK(k).to(pl_module.device)
            metric.update(torch.full_like(passed, self.num_samples), passed)
            quantities[f"pass_at_{k}"] = metric.compute()
        for quantity, value in quantities.items():
            pl_module.log(self.metric_name(quantity), value, on_step=False, on_epoch=True, rank_zero_only=False)
        folder = run_directory(trainer)
        if trainer.is_global_zero and folder is not None:
            self._keep(folder, trainer.global_step, split, tasks, completions, results)

    def _keep(
        self, folder: Path, step: int, split: str, tasks: Sequence[Any], completions: list[str], results: Sequence[Any]
    ) -> None:
        """Rank 0's programs of the last evaluation, a line each."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "programs.jsonl", "w") as file:
            for task, completion, result in zip(tasks, completions, results, strict=True):
                line = {"step": step, "split": split, "task_id": task.task_id, "status": result.status}
                file.write(json.dumps(line | {"completion": completion, "output": result.output}) + "\n")
