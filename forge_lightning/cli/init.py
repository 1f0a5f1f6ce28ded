"""`forge-fit init`: a commented config to begin with."""

import json
from pathlib import Path
from typing import Any

import yaml

from forge_lightning.core.mistakes import UsageError

GOALS = {
    "finetune": "a pretrained model on your own text, pairs or chats",
    "pretrain": "a language model from random weights on your own text",
    "observe": "your own LightningModule, with callbacks that show what it does",
    "grok": "a small model that generalises late, in a minute and a half",
}
_SEEN = (".jsonl", ".ndjson", ".json", ".csv")
"""Files whose first line shows their columns."""
_LOGGER = """\
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args:
        save_dir: runs
        name: @NAME@"""
_ENDING = """\
    - class_path: ModelCheckpoint  # the best
      init_args:
        monitor: @MONITOR@
        mode: @MODE@
        filename: best
        enable_version_counter: false
    - class_path: ModelCheckpoint  # the last, which `forge-fit resume` goes on from
      init_args:
        filename: last
        save_on_train_epoch_end: true
        enable_version_counter: false
    - class_path: InterruptCheckpoint  # Ctrl-C ends the step, saves, and stops
    - class_path: RunSummary
      init_args:
        monitor: @MONITOR@
        mode: @MODE@
    - class_path: Telemetry  # what `forge-fit analyze` and `forge-fit watch` draw
    - class_path: RichProgressBar"""
_TEXT = """\
  class_path: TextData
  init_args:
    path: @PATH@  # @CHANGE@a file, a folder, or a data set on the hub, with a column `text`
    block_size: @LENGTH@
    batch_size: 8"""
_PAIRS = """\
  class_path: InstructionData  # the loss is on the answers
  init_args:
    path: @PATH@  # @CHANGE@@WHAT@
    max_length: @LENGTH@
    batch_size: 8"""
_CODE = """\
  class_path: CodeTasks
  init_args:
    dataset: mbpp
    path: @PATH@
    max_length: @LENGTH@
    batch_size: 8"""
_PEFT = (
    "peft: {peft_type: LORA, r: 16, lora_alpha: 32, target_modules: all-linear}  # pip install 'forge-lightning[peft]'"
)


def starter(goal: str, model: str | None, data: str | None, name: str, lora: bool) -> str:
    """The text of a config.

    Args:
        goal: One of `GOALS`.
        model: Pretrained model, or for "observe" the class of the module.
        data: File, folder or hub name, or for "observe" the class of the datamodule.
        name: Name of the runs and of the file.
        lora: Train adapters.

    Raises:
        UsageError: If an option does not belong to the goal, or a file is malformed.
    """
    if lora and goal != "finetune":
        raise UsageError(f"`forge-fit init {goal} --lora`: adapters need pretrained weights, as in `init finetune`.")
    if ((model or data) and goal == "grok") or (model and goal == "pretrain"):
        raise UsageError(f"`forge-fit init {goal}` takes no {'--data' if data and not model else '--model'}.")
    text = (Path(__file__).parent / "starters" / f"{goal}.yaml").read_text()
    length = _context(model) if goal == "finetune" else 512
    kept = [_data(data, min(length, 1024 if goal == "finetune" else 512))] if "@DATA@" in text else []
    filled = {
        "DATA": "\n".join(kept),
        "LOGGER": _LOGGER,
        "ENDING": _ENDING,
        "PEFT": _PEFT if lora else "# " + _PEFT,
        "LR": "2.0e-4" if lora else "2.0e-5",
        "MODEL": _quoted(model or ("gpt2" if goal == "finetune" else "mymodule.MyModule")),
        "DATACLASS": _quoted(data or "mymodule.MyData"),
        "MONITOR": "val/accuracy" if goal == "grok" else "val/loss",
        "MODE": "max" if goal == "grok" else "min",
        "NAME": _quoted(name),
        "FILE": f"{name}.yaml",
    }
    for key, value in filled.items():
        text = text.replace(f"@{key}@", value)
    return text


def _data(path: str | None, length: int) -> str:
    columns = _columns(path)
    if {"task_id", "test_list", "code"} <= set(columns):
        text, what = _CODE, ""
    elif "messages" in columns:
        text, what = _PAIRS, "chats: a column `messages`"
    elif {"prompt", "completion"} <= set(columns):
        text, what = _PAIRS, "columns `prompt` and `completion`"
    else:
        text, what = _TEXT, ""
        if columns and "text" not in columns:
            raise UsageError(
                f"`--data {path}` has columns {columns}, and none is `text`, `messages`, or `prompt` with `completion`."
                " Rename them, or write `sources: [{path: ..., columns: {text: ...}}]` in the config by hand."
            )
    change = "" if path else "change: "
    values = {"PATH": _quoted(path or "data.txt"), "CHANGE": change, "WHAT": what, "LENGTH": str(length)}
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _columns(path: str | None) -> list[str]:
    """Columns of a local file, or of the first of a folder, where they can be seen at its beginning."""
    place = Path(path or "")
    if path and place.is_dir():
        place = min((file for file in place.rglob("*") if file.suffix in _SEEN), default=place)
    if not path or not place.is_file():
        return []
    try:
        with open(place, encoding="utf-8-sig") as file:
            head = file.read(1 << 20)
    except UnicodeDecodeError:
        return []
    first = next((line for line in head.splitlines() if line.strip()), "")
    if place.suffix in (".jsonl", ".ndjson", ".json"):
        if not first:
            raise UsageError(f"`--data {path}`: {place.name} holds no record.")
        try:
            lines = place.suffix != ".json"
            record, _ = json.JSONDecoder().raw_decode(first if lines else head.lstrip().removeprefix("[").lstrip())
        except ValueError:
            raise UsageError(f"`--data {path}`: the first record of {place.name} is not JSON.") from None
        return sorted(record) if isinstance(record, dict) else []
    return [name.strip().strip('"') for name in first.split(",")] if place.suffix == ".csv" else []


def _context(model: str | None) -> int:
    """Positions that a local model has, by its config; 1,024 where that is not known."""
    try:
        config: dict[str, Any] = json.loads((Path(model or "") / "config.json").read_text())
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 1024)
    except (OSError, ValueError, TypeError, AttributeError):
        return 1024


def _quoted(value: str) -> str:
    """A text as YAML writes it, so that it stays a text."""
    written: str = yaml.safe_dump(value, allow_unicode=True, width=10_000)
    return written.removesuffix("...\n").strip()
