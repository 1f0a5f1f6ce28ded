"""The commands of `forge-fit` beside those of the Trainer. What needs Lightning is imported where it is needed."""

import argparse
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge_lightning import cards
from forge_lightning.cli.configs import grouped_configs, shipped_configs
from forge_lightning.core.mistakes import UsageError


def check(argv: Sequence[str]) -> int:
    """Refuse a config that cannot train: types, ranges, wiring, and whether what it names is there.

    No data is read, and no weights are made.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: forge-fit check CONFIG [--config CONFIG ...] [arguments as for fit]\n\n"
            + inspect.cleandoc(check.__doc__ or "")
        )
        return 0 if argv else 2
    from forge_lightning.cli.check import check as run

    return run(argv)


def list_configs(argv: Sequence[str]) -> int:
    """List the shipped configs or the callbacks. One callback is shown whole."""
    parser = _parser("list", list_configs)
    every = sorted(cards.ORDER)
    spelled = {name.lower(): name for name in every}
    parser.add_argument(
        "--callbacks",
        nargs="?",
        const="all",
        metavar="NAME",
        type=lambda name: spelled.get(name.lower(), name),
        choices=["all", *every],
        help=f"of {', '.join(every)}",
    )
    parser.add_argument("--names", action="store_true", help="names of configs alone, for scripts")
    args = parser.parse_args(argv)
    if args.names:
        print("\n".join(name for name, _ in shipped_configs()))
    elif args.callbacks in every:
        print(cards.card(args.callbacks).text)
        print(f"\nIts arguments: forge-fit fit --trainer.callbacks.help={args.callbacks}")
    elif args.callbacks == "all":
        _print_table([(name, cards.card(name).summary) for name in cards.ORDER])
    else:
        for group, rows in grouped_configs().items():
            print(f"{group}:")
            _print_table(rows, indent="  ")
            print()
        print("Run one: `forge-fit fit --config NAME`. Add-ons and loggers go behind it:")
        print("`forge-fit fit --config NAME --config callbacks/telemetry`.")
    return 0


def _print_table(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Names and texts in two columns, as wide as the terminal."""
    width = max(40, min(120, shutil.get_terminal_size().columns))
    first = len(indent) + max(len(name) for name, _ in rows) + 2
    for name, about in rows:
        lines = textwrap.wrap(about.replace("`", ""), width - first) or [""]
        print(f"{indent}{name}".ljust(first) + lines[0])
        for line in lines[1:]:
            print(" " * first + line)


def init(argv: Sequence[str]) -> int:
    """Write a commented config for a goal: fine-tune, pretrain, observe my project, grok."""
    from forge_lightning.cli.init import GOALS, starter

    parser = _parser("init", init)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "goals:\n" + "\n".join(f"  {goal:9} {about}" for goal, about in GOALS.items())
    parser.add_argument("goal", choices=list(GOALS), metavar="GOAL", help=", ".join(GOALS))
    parser.add_argument("--model", help="hub name or folder of the pretrained model; for observe: your module's class")
    parser.add_argument(
        "--data",
        help="file, folder or data set on the hub, whose columns choose its kind; for observe: your datamodule",
    )
    parser.add_argument("--lora", action="store_true", help="fine-tune adapters in place of all weights")
    parser.add_argument("--output", type=Path, help="file to write (default: GOAL.yaml)")
    args = parser.parse_args(argv)
    output: Path = args.output or Path(f"{args.goal}.yaml")
    if output.exists():
        raise UsageError(f"`--output {output}` exists already. Name another file, or remove it.")
    text = starter(args.goal, args.model, args.data, output.stem, args.lora)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    if args.data and args.goal != "observe" and Path(args.data).suffix and not Path(args.data).exists():
        print(f"Note: {args.data} does not exist yet, so the kind of its data was guessed.", file=sys.stderr)
    print(f"Wrote {output}. Read it, change what is marked, then:")
    print(f"  forge-fit check {output}\n  forge-fit fit --config {output}")
    return 0


def completion(argv: Sequence[str]) -> int:
    """Complete commands and configs in a shell: `eval "$(forge-fit completion bash)"`."""
    parser = _parser("completion", completion)
    parser.add_argument("shell", choices=["bash", "zsh"], help="bash or zsh")
    shell = parser.parse_args(argv).shell
    commands = " ".join(sorted([*COMMANDS, "fit", "validate", "test", "predict", "resume"]))
    configs = " ".join(name.removesuffix(".yaml") for name, _ in shipped_configs())
    begin = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    print(begin + _COMPLETION.replace("@COMMANDS@", commands).replace("@CONFIGS@", configs), end="")
    return 0


_COMPLETION = """\
_forge_fit() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@COMMANDS@ --help --version" -- "$word"))
    elif [ "$before" = "--config" ] || { [ "$command" = "check" ] && [ "$COMP_CWORD" -eq 2 ]; }; then
        COMPREPLY=($(compgen -W "@CONFIGS@" -- "$word") $(compgen -f -X '!*.yaml' -- "$word"))
    elif [ "$command" = "init" ] && [ "$COMP_CWORD" -eq 2 ]; then
        COMPREPLY=($(compgen -W "finetune pretrain observe grok" -- "$word"))
    elif [[ "$word" = -* ]]; then
        COMPREPLY=($(compgen -W "--config --help" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -o filenames -F _forge_fit forge-fit
"""


def compress(argv: Sequence[str]) -> int:
    """Make a model small, and prove on held-out text what it cost."""
    from forge_lightning.cli.compress import main

    return main(argv)


def generate(argv: Sequence[str]) -> int:
    """Continue prompts with the model of a run, or of a folder."""
    parser = _parser("generate", generate)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run directory, as the summary of a fit prints it")
    which.add_argument("--model", help="folder of an exported or compressed model, or a hub name")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts: one a line, or .jsonl with a field `prompt`; \\n in a line is a new line",
    )
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (default: %(default)s)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that add up to this probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="go on with the text itself; default: of a run on chats, as what the user says",
    )
    parser.add_argument("--jsonl", action="store_true", help="print a JSON object a prompt: prompt and completion")
    args = parser.parse_args(argv)
    prompts = [*args.prompt, *([] if args.prompts is None else _prompts_of(args.prompts))]
    if not prompts:
        parser.error("give a --prompt, or --prompts FILE")
    for name, value, allowed in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature >= 0, "at least 0"),
        ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
    ):
        if not value:  # before the model is loaded
            raise UsageError(f"`{name}={getattr(args, name)}` must be {allowed}.")
    from forge_lightning.cli.runs import as_chat, load_model, load_run

    if args.model is not None and args.ckpt_path is not None:
        parser.error("--ckpt_path belongs to a --run")
    module, datamodule = load_model(args.model) if args.run is None else load_run(args.run, args.ckpt_path)[:2]
    if getattr(datamodule, "is_chat", False) and not args.raw:
        print(
            "The run trained on chats: prompts are what the user says (`--raw`: text to go on with).", file=sys.stderr
        )
        prompts = [as_chat(module.tokenizer, prompt) for prompt in prompts]
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    if args.jsonl:
        for prompt, completion in zip(prompts, module.complete(prompts, **options), strict=True):
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False))
        return 0
    if sys.stdout.isatty():
        texts = (
            _shown_live(module, prompt, {**options, "seed": args.seed + earlier})
            for prompt, earlier in _numbered(prompts)
        )
    else:
        texts = iter(module.complete(prompts, **options))
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if sys.stdout.isatty():
            print()
        else:
            print(("\n" if number else "") + prompt + text)
        if not text.strip():
            print(
                f"({len(text)} characters of blank space, or an end at once, is all that the model has for this prompt:"
                " it may have trained too little.)",
                file=sys.stderr,
            )
    return 0


def _numbered(prompts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each prompt with the number of equal ones before it."""
    for place, prompt in enumerate(prompts):
        yield prompt, prompts[:place].count(prompt)


def _shown_live(module: Any, prompt: str, options: dict[str, Any]) -> str:
    """Print a prompt, and what follows as it is made."""
    bold, plain = ("\033[1m", "\033[0m") if "NO_COLOR" not in os.environ else ("", "")
    print(f"{bold}{prompt}{plain}", end="", flush=True)
    text: str = module.complete([prompt], **options, on_text=lambda piece: print(piece, end="", flush=True))[0]
    return text


def _prompts_of(path: Path) -> list[str]:
    if ".jsonl" in path.suffixes:
        from forge_lightning.data.records import read_jsonl

        return [record["prompt"] for record in read_jsonl(path, {"prompt": str})]
    return [line.replace("\\n", "\n") for line in path.read_text().splitlines() if line.strip()]


def export(argv: Sequence[str]) -> int:
    """Write a run's model as a Hugging Face folder. Its tokenizer and a model card come with it."""
    parser = _parser("export", export)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run directory, as the summary of a fit prints it")
    which.add_argument("--dense", type=Path, metavar="FOLDER", help="compressed model, to write in bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a model with adapters write these alone (default: added into the weights)",
    )
    parser.add_argument(
        "--ternary",
        choices=["rounded", "packed", "bitnet"],
        help="of a run with TernaryQAT: rounded weights (default), packed as by forge-fit compress, or in the layout of"
        " transformers' own BitNet",
    )
    args = parser.parse_args(argv)
    if any((args.output / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"`--output {args.output}` holds a model already. Name another, or remove it.")
    if args.dense is not None:
        from forge_lightning.cli.runs import write_dense

        if args.adapter or args.ckpt_path or args.ternary:
            parser.error("--adapter, --ternary and --ckpt_path belong to a --run")
        write_dense(args.dense, args.output)
        print(f"Wrote {args.output} in bfloat16: load it with AutoModelForCausalLM.from_pretrained of transformers.")
        return 0
    from forge_lightning.models.model_card import model_card, run_files

    config, summary = run_files(args.run)
    model = (config or {}).get("model") or {}
    if args.adapter and not (model.get("init_args") or {}).get("peft"):
        raise UsageError(f"`--adapter`: {args.run} trained no adapter.")
    from forge_lightning.cli.runs import load_run

    module, datamodule, step = load_run(args.run, args.ckpt_path, rounded=False)
    if args.ternary or _trains_ternary(config):
        from forge_lightning.cli.runs import export_ternary

        export_ternary(module, config or {}, args.output, args.ternary or "rounded")
    else:
        module.export(args.output, adapter=args.adapter)
    if summary is not None and summary.get("steps") != step:
        summary = None  # its results are of other weights
    parts = [param for param in module.model.parameters() if module.peft is None or param.requires_grad == args.adapter]
    num_params = sum(param.numel() for param in parts)
    (args.output / "README.md").write_text(
        model_card(args.output.name, num_params, config, summary, args.adapter, getattr(datamodule, "is_chat", False))
    )
    if args.ternary == "packed":
        print(
            f"Wrote {args.output}, with a model card, README.md: `forge-fit generate --model {args.output}` reads it."
        )
        return 0
    print(
        f"Wrote {args.output}, with a model card, README.md: load it with AutoModelForCausalLM.from_pretrained and"
        " AutoTokenizer.from_pretrained of transformers. A prompt to continue takes tokenizer(prompt,"
        " add_special_tokens=False): byte tokenizers put an end token behind it otherwise."
    )
    return 0


def _trains_ternary(config: dict[str, Any] | None) -> bool:
    from forge_lightning.cli.runs import ternary_settings

    return any((found.get("init_args") or {}).get("lamb") != 0 for found in ternary_settings(config or {}))


def evaluate(argv: Sequence[str]) -> int:
    """Run benchmarks of lm-eval on a run, or on an exported model."""
    parser = _parser("evaluate", evaluate)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run directory, as the summary of a fit prints it")
    which.add_argument("--model", type=Path, help="folder of an exported model")
    parser.add_argument(
        "--tasks", required=True, help="tasks of lm-eval, with commas between: hellaswag,arc_easy; or YAML files"
    )
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    parser.add_argument("--include_path", type=Path, metavar="FOLDER", help="folder with tasks of your own")
    parser.add_argument("--limit", type=float, help="examples of each task; below 1 their share (default: all)")
    parser.add_argument("--num_fewshot", type=int, help="examples in front of each question (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, help="JSON to write (default: evaluation.json in the run or model)")
    args = parser.parse_args(argv)
    from forge_lightning.cli.evaluate import evaluate as run
    from forge_lightning.cli.evaluate import rows, write

    options = {name: getattr(args, name) for name in ("limit", "num_fewshot", "batch_size", "device")}
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    results = run(args.model, args.run, args.ckpt_path, tasks, args.include_path, options)
    output = args.output or (args.run or args.model) / "evaluation.json"
    write(results, output)
    _print_rows(("task", "metric", "value", "standard error"), rows(results))
    print(f"Wrote {output}")
    return 0


def _parser(name: str, command: Callable[..., int]) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"forge-fit {name}", description=command.__doc__)


def analyze(argv: Sequence[str]) -> int:
    """Draw what a run recorded: a page, its pictures, and a JSON of the same numbers. Several runs are compared."""
    parser = _parser("analyze", analyze)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="run directory, or its trace.jsonl; several are compared, those that differ by seeds alone as one group,"
        " a run that was resumed as one with its beginning",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint alone, in place of runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: `analysis` in the run or beside the checkpoint; for several runs a folder of"
        " their names in `comparisons`)",
    )
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.checkpoint):
        parser.error("name one or more runs, or a checkpoint with --checkpoint")
    _refuse_absent("analyze", args.runs)
    if args.checkpoint and not args.checkpoint.is_file():
        raise UsageError(f"`--checkpoint {args.checkpoint}`: no such file.")
    from forge_lightning.reports import analysis

    try:
        if args.checkpoint:
            output = args.output or args.checkpoint.parent / f"{args.checkpoint.stem}_analysis"
            page = analysis.analyze_checkpoint(args.checkpoint, output)
        else:
            page = analysis.analyze(args.runs, args.output or analysis.default_output(args.runs))
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"Wrote {page}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Compare runs: a table of losses here, and a page with the curves and the settings that differ."""
    parser = _parser("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, two or more")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: in `comparisons`)")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("name two runs or more")
    _refuse_absent("compare", args.runs)
    from forge_lightning.reports import analysis
    from forge_lightning.reports.trace import read_run

    try:
        runs = [read_run(path) for path in args.runs]
        header, rows = analysis.summary_table(runs)
        page = analysis.analyze(runs, args.output or analysis.default_output(args.runs))
    except ValueError as error:
        raise UsageError(str(error)) from error
    _print_rows(header, rows)
    print(f"Wrote {page}")
    return 0


def watch(argv: Sequence[str]) -> int:
    """Show a run on the terminal as it goes: curves, stage, speed, time left, warnings."""
    parser = _parser("watch", watch)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of a fit with `Telemetry`")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    args = parser.parse_args(argv)
    _refuse_absent("watch", [args.run])
    if not args.every > 0:
        parser.error("--every must be above 0")
    from forge_lightning.reports.watch import watch as show

    show(args.run, args.every, args.once)
    return 0


def _print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a frame; numbers are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table()
    for column, name in enumerate(header):
        shown.add_column(Text(name), overflow="fold", justify="left" if column == 0 else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)


def _refuse_absent(command: str, runs: Sequence[Path]) -> None:
    for run in runs:
        if not run.exists():
            raise UsageError(f"`forge-fit {command} {run}`: no such file or directory.")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "init": init,
    "list": list_configs,
    "check": check,
    "analyze": analyze,
    "compare": compare,
    "watch": watch,
    "generate": generate,
    "compress": compress,
    "evaluate": evaluate,
    "export": export,
    "completion": completion,
}
