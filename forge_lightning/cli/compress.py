"""`forge-fit compress`: a smaller model, and what that cost."""

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from forge_lightning import __version__, models
from forge_lightning.cli.checks import load_data, quiet, refuse_absent
from forge_lightning.cli.configs import resolve_configs
from forge_lightning.cli.runs import load_run
from forge_lightning.compression.compressor import Compressor, Data, Stage
from forge_lightning.compression.container import FILE_NAME, REPORT_NAME, is_compressed, save
from forge_lightning.compression.gate import Gate
from forge_lightning.core.mistakes import UsageError
from forge_lightning.core.protocols import SupportsProblems
from forge_lightning.core.tokens import IGNORED
from forge_lightning.core.validate import require
from forge_lightning.data.tokens import TokenDataModule
from forge_lightning.reports.compression import write_page
from forge_lightning.sandbox import Sandbox

_WORK = ".forge-compress"


def compress(
    model: Path | str,
    output: Path,
    data: LightningDataModule,
    stages: list[Stage] | None = None,
    gate: Gate | None = Gate(),  # noqa: B008  frozen
    calibration_sequences: int = 64,
    tuning_sequences: int = 64,
    serial: bool = False,
    strict: bool = False,
    ckpt_path: Path | None = None,
) -> int:
    """Make a model small by codecs chosen for each weight, and prove on held-out text what it cost.

    Writes a folder with ``model.forge.safetensors``, config and tokenizer, ``compression.json`` and ``report.html``.
    ``forge-fit generate --model FOLDER``, ``ForgeModule(pretrained=FOLDER)`` and `forge_lightning.compression.load`
    take it. A run that was interrupted goes on with the same command.

    Args:
        model: Folder of a Hugging Face model, a run directory of `ForgeModule`, or a hub name.
        output: Folder to write.
        data: Datamodule: calibration from its training data, choices and the gate from its validation data.
        stages: What to compress, how, and how far. Default: one stage, all weights, the default portfolio, as small as
            the gate allows.
        gate: What each stage has to prove; ``null`` to accept all.
        calibration_sequences: Sequences of training data for statistics of the layers, at least 1.
        tuning_sequences: Sequences of validation data to choose by, at least 2; the gate takes others.
        serial: Encode what earlier codecs have left, the literal chain. It is worse in every way that was measured.
        strict: End with exit code 1 if the gate refuses a stage.
        ckpt_path: Checkpoint of a run directory. Default: the newest.

    Returns:
        The exit code.

    Raises:
        UsageError: If the model, the data or a target cannot be used as given.
    """
    require("compress", calibration_sequences >= 1, "calibration_sequences", calibration_sequences, "at least 1")
    require("compress", tuning_sequences >= 2, "tuning_sequences", tuning_sequences, "at least 2")
    _refuse_output(output, model)
    if is_compressed(model):
        raise UsageError(f"`--model {model}` is compressed already. Compress the model that it was made from.")
    module, dtypes = _module(model, ckpt_path, data)
    tokens, network = module.tokenizer, module.model
    bytes_per_weight = {name: dtype.itemsize for name, dtype in dtypes.items()}
    needed = tuning_sequences + (gate.sequences if gate is not None else 0)
    calibration = list(_sequences(data.train_dataloader(), calibration_sequences))
    if not calibration:
        raise UsageError("There is no calibration data: the training data has no row with a label.")
    rows = list(_sequences(data.val_dataloader(), 8 * needed))
    if len(rows) < 4:
        raise UsageError(f"The validation data has {len(rows)} sequences; the gate and the choice need four at least.")
    # The first part and the rest: blocks of one document are not in both.
    border = min(max(2, len(rows) * tuning_sequences // needed), len(rows) - 2)
    tuned, judged = _spread(rows[:border], tuning_sequences), _spread(rows[border:], needed - tuning_sequences)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    batches = partial(_batches, device=device)
    folder = output / _WORK
    with _Progress() as show:
        work = Compressor(
            network,
            Data(
                batches(calibration),
                batches(tuned),
                batches(judged),
                _solver(module, data, gate),
            ),
            gate,
            bytes_per_weight,
            folder,
            serial,
            show,
        )
        accepted = work.run(stages or [Stage()])
    network.to("cpu")
    if tokens is not None:
        tokens.save_pretrained(output)
    num_bytes = save(output, network, work.packed, work.transposed, dtypes)
    report = {
        "model": str(model),
        "data": type(data).__name__,
        "calibration_sequences": len(calibration),
        "tuning_sequences": len(tuned),
        "file_bytes": num_bytes,
        "bits_per_parameter": 8 * num_bytes / work.num_weights,
        "versions": {"forge_lightning": __version__, "torch": torch.__version__},
        **work.report(),
    }
    (output / REPORT_NAME).write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    _print_results(report, output)
    try:
        print(f"Wrote {write_page(output)}")
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"forge-fit: the page could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return 0 if accepted or not strict else 1


def _refuse_output(output: Path, model: Path | str) -> None:
    """Make the folder, before there is work to lose.

    Raises:
        UsageError: If it holds a model, or is the model's own.
    """
    if is_compressed(output):
        raise UsageError(f"`--output {output}` holds a compressed model already. Name another folder, or remove it.")
    if output.resolve() == Path(model).resolve() or (output / "config.json").exists():
        raise UsageError(f"`--output {output}` holds a model. Name another folder.")
    try:
        (output / _WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`--output {output}` cannot be written: {error.strerror}.") from None


def _plain(value: Any) -> Any:
    """Numbers that JSON has: null for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _module(model: Path | str, ckpt_path: Path | None, datamodule: Any) -> tuple[Any, dict[str, torch.dtype]]:
    """The module in float32, with the data's tokenizer, and the type in which each weight is stored."""
    if not isinstance(datamodule, TokenDataModule):
        raise UsageError(
            f"`--data {type(datamodule).__name__}`: calibration needs batches of tokens, as from TextData,"
            " InstructionData or CodeTasks."
        )
    if (Path(model) / "config.yaml").is_file():
        module, _, _ = load_run(Path(model), ckpt_path)
        if module.peft is not None:
            raise UsageError(
                f"`--model {model}` has adapters. `forge-fit export --run {model} --output FOLDER` adds them into the"
                " weights; compress that."
            )
        datamodule.use(module.tokenizer)
    else:
        module = models.ForgeModule(pretrained=str(model), dtype="auto")
        refuse_absent(module, datamodule)
        module.build(datamodule.tokenizer)
    dtypes = {name: value.dtype for name, value in module.model.state_dict().items()}
    load_data(datamodule, "train")
    with quiet():
        datamodule.setup("fit")
    module.model.float()
    module.eval()
    return module, dtypes


def _sequences(loader: Any, number: int) -> Iterable[dict[str, torch.Tensor]]:
    """Single rows with a label to predict, without their padding."""
    loaders = loader if isinstance(loader, list) else [loader]

    def rows() -> Iterable[dict[str, torch.Tensor]]:
        for loaded in (batch for each in loaders for batch in each):
            for place in range(len(loaded["input_ids"])):
                row = {name: loaded[name][place] for name in ("input_ids", "attention_mask", "labels")}
                length = _length(row)
                row = {name: value[:length] for name, value in row.items()}
                if bool((row["labels"][1:] != IGNORED).any()):
                    yield row

    return islice(rows(), number)


def _spread(rows: list[Any], number: int) -> list[Any]:
    """Some of the rows, drawn from all over them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:number]
    return [rows[place] for place in order.tolist()]


def _length(row: dict[str, torch.Tensor]) -> int:
    real = row["attention_mask"].nonzero()
    return int(real.max()) + 1 if len(real) else 0


def _batches(rows: Sequence[dict[str, torch.Tensor]], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Batches of up to 8 sequences of the same length: nothing is padded."""
    of_length: dict[int, list[dict[str, torch.Tensor]]] = {}
    for row in rows:
        of_length.setdefault(len(row["input_ids"]), []).append(row)
    return [
        {name: torch.stack([row[name] for row in group[start : start + 8]]).to(device) for name in group[0]}
        for group in of_length.values()
        for start in range(0, len(group), 8)
    ]


def _solver(module: Any, datamodule: Any, gate: Gate | None) -> Any:
    """What measures the share of validation problems that the model solves, greedily."""
    if gate is None or gate.max_pass_drop is None or not isinstance(datamodule, SupportsProblems):
        return None
    problems = list(datamodule.problems("val"))[: gate.problems]
    if not problems:
        raise UsageError("`gate.max_pass_drop`: the validation data has no problems.")

    def solved(_: Any) -> float:
        completions = module.complete([problem.prompt for problem in problems], max_new_tokens=256)
        with Sandbox() as sandbox:
            programs = [problem.task(text) for problem, text in zip(problems, completions, strict=True)]
            verdicts = sandbox.run_many(programs)
        return sum(verdict.passed for verdict in verdicts) / len(problems)

    return solved


class _Progress:
    """A progress bar on a terminal; lines elsewhere, one for each tenth."""

    def __enter__(self) -> Any:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        task = self._bar.add_task("Compressing", total=1.0)
        live = console.is_terminal
        if live:
            self._bar.start()
        said: set[int] = set()

        def show(text: str, share: float) -> None:
            if live:
                self._bar.update(task, description=text, completed=share)
            elif int(10 * share) not in said:
                said.add(int(10 * share))
                print(f"{share:4.0%}  {text}", file=sys.stderr, flush=True)

        return show

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def _print_results(report: dict[str, Any], output: Path) -> None:
    share = report["num_in_matrices"] / report["num_weights"]
    if share < 0.9:
        print(
            f"Only {share:.0%} of the weights are in linear layers and embeddings. The others, as experts that are one"
            " tensor, stay as they are."
        )
    for stage in report["stages"]:
        verdict = stage["verdict"]
        state = "accepted" if stage["accepted"] else "refused"
        if stage["target_missed"]:
            print(f"{stage['name']}: no choice has {stage['target_bits']} bits a weight; the smallest is taken.")
        print(f"{stage['name']}: {state}. {verdict['reason'] if verdict else 'There is no gate'}.")
    print(
        f"{output / FILE_NAME}: {report['file_bytes'] / 1e6:.2f} MB, {report['bits_per_parameter']:.2f} bits a"
        f" parameter; before {report['bytes_before'] / 1e6:.2f} MB."
    )


def main(argv: Sequence[str]) -> int:
    """Parse arguments and a config, and run `compress`."""
    parser = ArgumentParser(
        "forge-fit compress",
        description="Make a model small by codecs chosen for each weight, and prove on held-out text what it cost.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML with the arguments below")
    parser.add_function_arguments(compress, fail_untyped=True)
    if any(argument in ("-h", "--help") for argument in argv):
        parser.print_help()
        return 0
    parsed = parser.parse_args(resolve_configs(argv))
    made = parser.instantiate_classes(parsed)
    made.pop("config", None)
    try:
        return compress(**vars(made))
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error
