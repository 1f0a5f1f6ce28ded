"""Compress a model stage by stage, each behind the gate."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_lightning.compression.codecs import Codec, Dense, EntropyGPTQ, Packed, decode, relative_error
from forge_lightning.compression.gate import Gate, Verdict, upper_bound
from forge_lightning.compression.layers import Matrix, matrices, select
from forge_lightning.compression.packed_files import digest, read_packed, write_packed
from forge_lightning.compression.search import Candidate, Choice, frontier, size
from forge_lightning.compression.statistics import Batch, Statistics, by_block, output_weights, statistics_of
from forge_lightning.core.layers import plain_name
from forge_lightning.core.mistakes import UsageError
from forge_lightning.core.tokens import IGNORED
from forge_lightning.core.validate import require

_TRIALS = 6
"""Choices that are measured to find the smallest one within a loss."""


def default_codecs() -> list[Codec]:
    """The default portfolio: what won somewhere where it was measured (benchmarks/compression.md)."""
    return [*(EntropyGPTQ(bits) for bits in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)), Dense()]


@dataclass
class Stage:
    """Some matrices and the codecs that may write them.

    Several codecs are candidates: each matrix gets the one that fits the budget of all of them together.

    Args:
        targets: Patterns of the names of weights, as ``"*.mlp.*"``; a star stands for anything.
        codecs: Candidates. Default: `EntropyGPTQ` at rates from 2 to 6 bits, and 16 bits.
        target_bits: Bits a weight of the matrices together, at most. Default: as few as ``max_rel_ppl`` allows.
        max_rel_ppl: Rise of the perplexity to aim at, as a share of it. Default: what the gate allows.
        name: For the report. Default: its place.

    Raises:
        ValueError: If both budgets are given, or one is out of range.
    """

    targets: list[str] = field(default_factory=lambda: ["*"])
    codecs: list[Codec] | None = None
    target_bits: float | None = None
    max_rel_ppl: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        bits, rise = self.target_bits, self.max_rel_ppl
        require("Stage", bits is None or 0 < bits <= 32, "target_bits", bits, "in (0, 32]")
        require("Stage", rise is None or rise > 0, "max_rel_ppl", rise, "above 0")
        require("Stage", bits is None or rise is None, "max_rel_ppl", rise, "left out beside `target_bits`")
        require("Stage", self.codecs is None or len(self.codecs) > 0, "codecs", self.codecs, "one codec or more")
        require("Stage", len(self.targets) > 0, "targets", self.targets, "one pattern or more")


@dataclass(frozen=True)
class Data:
    """Batches that a model is compressed with: ``{"input_ids", "attention_mask", "labels": (B, T)}`` each.

    Args:
        calibration: For statistics.
        tuning: For choices between candidates.
        held_out: For the gate alone.
        problems: Share of programming problems that a model solves; ``None`` where there are none.
    """

    calibration: Sequence[Batch]
    tuning: Sequence[Batch]
    held_out: Sequence[Batch]
    problems: Callable[[Any], float] | None = None


@torch.no_grad()
def sequence_losses(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Mean loss of each sequence over its labelled tokens, in nats: ``(N,)``, float64. Those without any are left out.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        batches: Labels are not shifted; -100 where no loss is taken.
    """
    found = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED
        )
        count = (labels != IGNORED).sum(1)
        found.append((losses.double().sum(1) / count)[count > 0].cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


class Compressor:
    """Compress a model, one stage after another.

    Args:
        model: A causal language model of transformers. It is changed in place, to what will be read from the file.
        data: Calibration, tuning and held-out batches.
        gate: What a stage has to prove; ``None`` to accept every stage.
        bytes_per_weight: Bytes of a weight before, as it is stored; or of each parameter, by name.
        folder: Where finished candidates are kept until the end, so that a run that was killed goes on.
        serial: Encode what earlier stages have left, and each codec of a stage what the one before has left. Worse in
            every way that was measured; to show it.
        progress: Called with a text and the share that is done.
    """

    def __init__(
        self,
        model: Any,
        data: Data,
        gate: Gate | None = None,
        bytes_per_weight: float | Mapping[str, int] = 2,
        folder: Path | None = None,
        serial: bool = False,
        progress: Callable[[str, float], None] = lambda text, share: None,
    ) -> None:
        if not data.calibration:
            raise UsageError("There is no calibration data: the training data has no rows.")
        self.model, self.data, self.gate, self.serial = model.eval(), data, gate, serial
        self.folder, self.progress = folder, progress
        self._stored = {
            plain_name(name): param.numel()
            * (bytes_per_weight[name] if isinstance(bytes_per_weight, Mapping) else bytes_per_weight)
            for name, param in model.named_parameters()
        }
        self.matrices = matrices(model)
        _refuse_bad_weights(model)
        self.packed: dict[str, Packed] = {}
        self.stages: list[dict[str, Any]] = []
        self._changed: dict[str, Tensor | None] = {}  # by name, values as they came; none where they are in the folder
        self._num_weights = sum(value.numel() for value in model.parameters())  # shared ones come once
        rows = {
            f"{place} {name}": value for place, batch in enumerate(data.calibration) for name, value in batch.items()
        }
        self._fingerprint = digest({**model.state_dict(), **rows})
        self._outputs: dict[str, Tensor] | None = None
        self._tuning_losses: Tensor | None = None
        self._key = ""
        self._memory: dict[tuple[int, str, int], Packed] = {}
        self._solved_before: float | None = None
        self._cpu = time.process_time()
        self.losses_before = sequence_losses(model, data.held_out) if gate is not None else torch.zeros(0)
        if not bool(self.losses_before.isfinite().all()):
            raise UsageError("The model's own loss on the held-out data is not finite.")
        if gate is not None and len(self.losses_before) < 2:
            raise UsageError("The gate needs two held-out sequences at least: the validation data has fewer.")
        if gate is not None and gate.max_pass_drop is not None and data.problems is None:
            raise UsageError("`gate.max_pass_drop` needs data of programming problems, as `CodeTasks`.")

    @property
    def num_weights(self) -> int:
        """Weights of the model, shared ones once."""
        return int(self._num_weights)

    def num_bytes(self, packed: Mapping[str, Packed]) -> int:
        """Bytes of the model with these weights packed, without the file's header."""
        rest = sum(size for name, size in self._stored.items() if name not in packed)
        return int(rest) + sum(each.num_bytes for each in packed.values())

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run stages in order. What the gate refuses is undone.

        Returns:
            Whether all were accepted.

        Raises:
            UsageError: If a stage's targets match nothing, before any work is done.
        """
        try:
            chosen = [select(self.matrices, stage.targets) for stage in stages]
        except ValueError as error:
            raise UsageError(str(error)) from None
        for number, (stage, found) in enumerate(zip(stages, chosen, strict=True)):
            self._run(number, stage, found)
        return all(record["accepted"] for record in self.stages)

    def _run(self, number: int, stage: Stage, found: dict[str, Matrix]) -> None:
        held = digest({name: matrix.param for name, matrix in found.items()})
        self._key = self._fingerprint
        if self.serial:
            self._key = digest({name: matrix.param for name, matrix in self.matrices.items()}) + " serial"
        self._key = hashlib.sha256(self._key.encode()).hexdigest()[:16]
        codecs = default_codecs() if stage.codecs is None else stage.codecs
        candidates, measured = self._encode_all(number, codecs, found)
        if self.serial:
            codecs = [codecs[-1]]
        choice, trials = self._choose(number, stage, candidates)
        packed = {name: self._read(number, name, candidate) for name, candidate in choice.items()}
        self._show(packed, packed)
        after = self.packed | packed
        verdict = self._judge(after)
        count = sum(self.matrices[name].param.numel() for name in choice)
        record: dict[str, Any] = {
            "name": stage.name or f"stage {number + 1}",
            "targets": list(stage.targets),
            "codecs": [codec.label for codec in codecs],
            "left_alone": sorted(found.keys() - candidates.keys()),
            "target_bits": stage.target_bits,
            "serial": self.serial,
            "target_missed": bool(stage.target_bits and 8 * size(choice) > stage.target_bits * count),
            "bits_per_weight": 8 * size(choice) / count,
            "verdict": None if verdict is None else verdict.as_dict(),
            "accepted": verdict is None or verdict.accepted,
            "trials": trials,
            "tensors": {
                name: {
                    "codec": codecs[candidate.codec].label,
                    "bits_per_weight": packed[name].bits_per_weight,
                    "num_bytes": candidate.num_bytes,
                    "expected_loss": candidate.error,
                    "relative_error": relative_error(self._original(name), decode(packed[name])),
                    "candidates": measured[name],
                }
                for name, candidate in choice.items()
            },
        }
        if record["accepted"]:
            self.packed = after
        else:
            self._show(self.packed, found)
            now = digest({name: matrix.param for name, matrix in found.items()})
            assert now == held, "weights were not restored bit by bit"
        self.stages.append(record)

    # What the model holds: packed weights, or those that it came with, which are kept in the folder

    def _show(self, packed: Mapping[str, Packed], names: Iterable[str]) -> None:
        """Let some matrices hold what was packed, and those that were not packed what they came with."""
        for name in names:
            if name in packed:
                self._keep_original(name)
                self.matrices[name].write(decode(packed[name]))
            elif name in self._changed:
                self.matrices[name].write(self._original(name))

    def _keep_original(self, name: str) -> None:
        if name in self._changed:
            return
        values = self.matrices[name].read()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_packed(self._path_of_original(name), Packed({"values": values}, {}))
        self._changed[name] = values if self.folder is None else None

    def _original(self, name: str) -> Tensor:
        """Values of a matrix as it came, ``(out, in)``, float32."""
        if name not in self._changed:
            return self.matrices[name].read()
        values = self._changed[name]
        return read_packed(self._path_of_original(name)).tensors["values"] if values is None else values

    def _path_of_original(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._fingerprint[:16]}_original_{name}.safetensors"

    def _judge(self, packed: Mapping[str, Packed]) -> Verdict | None:
        if self.gate is None:
            return None
        self.progress("Judging on held-out sequences", 1.0)
        after = sequence_losses(self.model, self.data.held_out)
        rates = None
        if self.gate.max_pass_drop is not None and self.data.problems is not None:
            if self._solved_before is None:
                self._solved_before = self._solved_without(packed)
            rates = (self._solved_before, self.data.problems(self.model))
        return self.gate.judge(self.losses_before, after, self.num_bytes(self.packed), self.num_bytes(packed), rates)

    def _solved_without(self, packed: Mapping[str, Packed]) -> float:
        """Share of problems that the model solves with the weights that it came with."""
        assert self.data.problems is not None
        self._show({}, packed)
        solved = self.data.problems(self.model)
        self._show(packed, packed)
        return solved

    # Candidates

    def _encode_all(
        self, number: int, codecs: Sequence[Codec], found: Mapping[str, Matrix]
    ) -> tuple[dict[str, list[Candidate]], dict[str, list[dict[str, Any]]]]:
        """Encode each matrix by each codec, block by block. Finished ones are read from the folder."""
        groups = list(by_block(found))
        total = sum(matrix.param.numel() for matrix in found.values())
        done, begun, fresh = 0, time.monotonic(), 0
        candidates: dict[str, list[Candidate]] = {}
        measured: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            known = {matrix.name: self._finished(number, matrix.name, codecs) for matrix in group}
            gathered: dict[str, Statistics] = {}
            if any(each is None for each in known.values()):
                gathered = self._statistics(group)
            for matrix in group:
                rows = known[matrix.name]
                if rows is None:
                    rows = self._encode(number, matrix, codecs, gathered.get(matrix.name))
                    fresh += matrix.param.numel()
                if rows:  # otherwise no calibration data has reached it
                    measured[matrix.name] = rows
                    candidates[matrix.name] = [
                        Candidate(row["place"], row["num_bytes"], row["expected_loss"]) for row in rows
                    ]
                done += matrix.param.numel()
                left = (time.monotonic() - begun) / max(fresh, 1) * (total - done)
                self.progress(f"{matrix.name} ({left:.0f} s left)", done / total)
        if not candidates:
            raise UsageError("No calibration data has reached any of the stage's weights.")
        return candidates, measured

    def _statistics(self, group: Sequence[Matrix]) -> dict[str, Statistics]:
        with self._original_weights():
            if self._outputs is None:
                self.progress("Gradients of the calibration data", 0.0)
                self._outputs = output_weights(self.model, self.matrices, self.data.calibration)
            return statistics_of(self.model, group, self._outputs, self.data.calibration)

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        """The model as it came, for a while."""
        self._show({}, self.packed)
        try:
            yield
        finally:
            self._show(self.packed, self.packed)

    def _encode(
        self, number: int, matrix: Matrix, codecs: Sequence[Codec], statistics: Statistics | None
    ) -> list[dict[str, Any]]:
        weight, original = matrix.read(), self._original(matrix.name)
        if not self.serial:
            weight = original
        known = (statistics.hessian, statistics.row_weights) if statistics is not None else (None, None)
        rows = []
        for place, codec in enumerate(codecs if statistics is not None else ()):
            begun = time.process_time()
            try:
                packed = codec.encode(weight, *known)
            except ValueError:  # weights too large for its scales: the others are left
                continue
            decoded = decode(packed)
            if self.serial:
                weight = decoded
                if place < len(codecs) - 1:
                    continue
            assert statistics is not None
            expected = statistics.error(original, decoded)
            if not math.isfinite(expected):
                continue
            kept = 0 if self.serial else place
            row = {
                "place": kept,
                "codec": codec.label,
                "num_bytes": packed.num_bytes,
                "bits_per_weight": packed.bits_per_weight,
                "expected_loss": expected,
                "relative_error": relative_error(original, decoded),
                "cpu_seconds": time.process_time() - begun,
            }
            self._keep(number, matrix.name, kept, packed)
            rows.append(row)
        if statistics is not None and not rows:
            raise UsageError(f"No codec of the stage can write {matrix.name}: its weights are too large.")
        if self.folder is not None:
            _write_json(self._path(number, matrix.name, "json"), [codec.label for codec in codecs], rows)
        return rows

    # Finished candidates, in the folder or in memory

    def _path(self, number: int, name: str, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._key}_{number}_{name}.{ending}"

    def _keep(self, number: int, name: str, place: int, packed: Packed) -> None:
        if self.folder is None:
            self._memory[number, name, place] = packed
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_packed(self._path(number, name, f"{place}.safetensors"), packed)

    def _read(self, number: int, name: str, candidate: Candidate) -> Packed:
        if self.folder is None:
            return self._memory[number, name, candidate.codec]
        return read_packed(self._path(number, name, f"{candidate.codec}.safetensors"))

    def _finished(self, number: int, name: str, codecs: Sequence[Codec]) -> list[dict[str, Any]] | None:
        if self.folder is None:
            return None
        path = self._path(number, name, "json")
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        if known["codecs"] != [codec.label for codec in codecs]:
            return None
        return list(known["candidates"])

    # The choice

    def _choose(
        self, number: int, stage: Stage, candidates: Mapping[str, Sequence[Candidate]]
    ) -> tuple[Choice, list[dict[str, float]]]:
        choices = frontier(candidates)
        count = sum(self.matrices[name].param.numel() for name in candidates)
        if stage.target_bits is not None:
            fitting = [choice for choice in choices if 8 * size(choice) <= stage.target_bits * count]
            return (fitting or choices[:1])[-1], []
        if len(choices) == 1:
            return choices[0], []
        rise = stage.max_rel_ppl or (self.gate.max_rel_ppl if self.gate is not None else 0.02)
        return self._smallest_within(number, choices, math.log1p(rise), count)

    def _smallest_within(
        self, number: int, choices: Sequence[Choice], limit: float, count: int
    ) -> tuple[Choice, list[dict[str, float]]]:
        """The smallest choice whose loss on tuning data, its upper bound, is below a limit; else the most exact one.

        Sizes are halved between one that fits and one that does not.
        """
        gate = self.gate or Gate()
        if self._tuning_losses is None:
            with self._original_weights():
                self._tuning_losses = sequence_losses(self.model, self.data.tuning)
        base = self._tuning_losses
        if len(base) < 2 or not bool(base.isfinite().all()):
            raise UsageError("The choice needs two tuning sequences at least, on which the model's loss is finite.")
        low, high = -1, len(choices) - 1  # the last one is taken to fit
        trials = []
        sizes = [size(choice) for choice in choices]
        for trial in range(_TRIALS):
            if high - low < 2:
                break
            aim = (sizes[max(low, 0)] + sizes[high]) / 2
            middle = min(range(low + 1, high), key=lambda place: abs(sizes[place] - aim))
            self.progress(f"Measuring a choice of {8 * sizes[middle] / count:.2f} bits", trial / _TRIALS)
            packed = {name: self._read(number, name, each) for name, each in choices[middle].items()}
            self._show(packed, packed)
            difference = sequence_losses(self.model, self.data.tuning) - base
            upper = upper_bound(difference, gate.confidence, gate.method, gate.seed)
            trials.append(
                {
                    "bits_per_weight": 8 * sizes[middle] / count,
                    "expected_loss": sum(each.error for each in choices[middle].values()),
                    "loss": float(difference.mean()),
                    "upper": upper,
                }
            )
            low, high = (low, middle) if upper < limit else (middle, high)
        self._show(self.packed, choices[0])
        return choices[high], trials

    def report(self) -> dict[str, Any]:
        """What was done, as plain numbers and texts."""
        return {
            "num_weights": self._num_weights,
            "num_in_matrices": sum(matrix.param.numel() for matrix in self.matrices.values()),
            "bytes_before": self.num_bytes({}),
            "bytes_after": self.num_bytes(self.packed),
            "gate": None if self.gate is None else asdict(self.gate),
            "num_held_out": len(self.losses_before),
            "loss_before": float(self.losses_before.mean()) if len(self.losses_before) else None,
            "stages": self.stages,
            "cpu_seconds": time.process_time() - self._cpu,
        }

    @property
    def transposed(self) -> dict[str, bool]:
        """Whether the model holds a weight as ``(in, out)``, by name."""
        return {name: matrix.transposed for name, matrix in self.matrices.items()}


def _write_json(path: Path, codecs: list[str], rows: list[dict[str, Any]]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"codecs": codecs, "candidates": rows}))
    part.replace(path)


def _refuse_bad_weights(model: Any) -> None:
    bad = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if bad:
        raise UsageError(f"The model's weights are not finite in {', '.join(bad[:3])}{', …' if bad[3:] else ''}.")
