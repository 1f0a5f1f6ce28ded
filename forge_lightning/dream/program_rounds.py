"""Make new programs from stored ones, run them in a sandbox, and store those that hold."""

from collections.abc import Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from forge_lightning.core.callback import uses_strategy
from forge_lightning.core.distributed import sum_over_ranks
from forge_lightning.core.protocols import SupportsAugmentation, SupportsGenerate
from forge_lightning.dream.code_augmentation import CodeExample
from forge_lightning.dream.memory import SEED_STEP
from forge_lightning.dream.options import ProgramReplay
from forge_lightning.dream.programs import ProgramDreams
from forge_lightning.dream.session import Session, refusing
from forge_lightning.sandbox import Sandbox, SandboxError, Task, Verdict


class ProgramRounds:
    """Rounds of new programs.

    Args:
        options: What to make, and how often.
    """

    def __init__(self, options: ProgramReplay) -> None:
        self.options = options
        self.programs = ProgramDreams(options.augmenter, options.temperatures, options.max_new_tokens)

    def why_not(self, trainer: Trainer, module: LightningModule) -> tuple[str, str, str] | None:
        """What this cannot work with, why, and what to do; ``None`` where it can.

        Raises:
            MisconfigurationException: If there is no sandbox on this machine.
        """
        if self.options.temperatures and not isinstance(module, SupportsGenerate):
            return type(module).__name__, "it has no method `complete(prompts, ...)`", "Use ForgeModule."
        if self.options.temperatures and uses_strategy(trainer, "ModelParallelStrategy"):
            return "`temperatures` and sharded weights", "ranks would generate out of step", "Leave `temperatures` out."
        if _source(trainer, module) is None:
            return (
                "`ProgramReplay` and this data",
                "neither datamodule nor module has `problem_of` and `row_of`, which map examples to programs",
                "Use CodeTasks, or leave `programs` out.",
            )
        try:
            with self._sandbox():
                pass
        except SandboxError as error:
            raise MisconfigurationException(f"`DreamReplay`: {error}") from None
        return None

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.options.timeout, allow_weaker=self.options.allow_weaker)

    def run(self, session: Session) -> None:
        """One round: problems near the threshold of success, new programs for them, and a check of each."""
        trainer, module, memory = session.trainer, session.module, session.memory
        source = _source(trainer, module)
        if source is None or len(memory.buffer) == 0:
            return
        parents = memory.buffer.sample(self.options.problems_per_cycle, "near_threshold", counted=False)
        with_none = ((i, source.problem_of(_row(parents.rows, i))) for i in range(len(parents)))
        problems = {i: problem for i, problem in with_none if problem is not None}
        self.programs.rounds += 1
        seed = (memory.seed * SEED_STEP + self.programs.rounds) * SEED_STEP + trainer.global_rank
        complete = module.complete if isinstance(module, SupportsGenerate) else None
        with self._sandbox() as sandbox:

            def run(examples: Sequence[CodeExample]) -> list[Verdict]:
                return sandbox.run_many([Task(e.program, e.tests, e.entry_point, e.setup) for e in examples])

            programs = [*self.programs.make(problems, run, sandbox.run_many, complete, seed)]
        network = session.step.scores.network
        longest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
        for i, prompt, completion in programs:
            row = source.row_of(prompt, completion)
            if row is not None and all(longest is None or t.shape[1] <= longest for t in row.values()):
                with refusing():
                    memory.admit_program(_row(parents.rows, i, keep=True), row)

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Counts and shares to log, over all ranks."""
        return self.programs.metrics(sum_over_ranks(trainer, torch.tensor(self.programs.counts())).tolist())


def _source(trainer: Trainer, module: LightningModule) -> SupportsAugmentation | None:
    sources = (getattr(trainer, "datamodule", None), module)
    return next((source for source in sources if isinstance(source, SupportsAugmentation)), None)


def _row(rows: Mapping[str, Tensor], i: int, keep: bool = False) -> dict[str, Tensor]:
    """One example, with the batch dimension or without."""
    return {name: tensor[i : i + 1] if keep else tensor[i] for name, tensor in rows.items()}
