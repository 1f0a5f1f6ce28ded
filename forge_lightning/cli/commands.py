"""The commands of `forge-fit` beside those of the Trainer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning import cards, data, models
from forge_lightning.cli.checks import (
    builds_network,
    refuse_absent,
    refuse_cut_off,
    refuse_missing_files,
    refuse_optimizer,
    refuse_trainer,
)
from forge_lightning.cli.configs import (
    config_of_run,
    newest_checkpoint,
    refuse_doubled_keys,
    resolve_configs,
    shipped_configs,
)
from forge_lightning.cli.forge_cli import CheckCLI
from forge_lightning.core.callback import ForgeCallback
from forge_lightning.data.tokens import TokenDataModule
from forge_lightning.models.forge_module import refuse_config


def check(argv: Sequence[str]) -> int:
    """Types and ranges of a config, its wiring, and whether what it names is there; no data read, no weights made."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: forge-fit check CONFIG [--config CONFIG ...] [arguments as for fit]\n\n" + (check.__doc__ or ""))
        return 0 if argv else 2
    named = argv[0].split("=")[0] in ("--config", "-c")  # as `fit` takes it
    refuse_doubled_keys(["check", *argv])
    cli = CheckCLI(["fit", *resolve_configs([*(() if named else ("--config",)), *argv])])
    trainer = cli.config_init["fit"]["trainer"]
    if isinstance(cli.datamodule, data.CodeTasks):
        cli.datamodule.refuse_training()
    refuse_missing_files(cli.datamodule, "train", "val", "test")
    refuse_optimizer(cli.model)
    refuse_absent(cli.model, cli.datamodule)
    if builds_network(cli.model) and cli.model.pretrained is not None and isinstance(cli.datamodule, TokenDataModule):
        cli.model.refuse_other_tokenizer(cli.datamodule.tokenizer)
    cli.refuse_checkpoint()
    made = True
    if builds_network(cli.model) and cli.model.config is not None:
        made = refuse_config(cli.model.config, getattr(cli.datamodule, "tokenizer", None))
    found = trainer.get("callbacks") or []
    found = found if isinstance(found, list) else [found]
    refuse_trainer(trainer, [c for c in found if isinstance(c, pl.callbacks.Checkpoint)])
    keys = [callback.state_key for callback in found if _is_stateful(callback)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise MisconfigurationException(
            f"`trainer.callbacks` holds {', '.join(twice)} twice, and their states would collide in a checkpoint."
            " Give one of them a `name`, or drop it."
        )
    for callback in found:
        if isinstance(callback, ForgeCallback):
            callback.preflight(cli.model, cli.datamodule)
    names = ", ".join(type(callback).__name__ for callback in found) or "none"
    config = argv[0] if not named else argv[0].partition("=")[2] or argv[1]
    print(f"{config}: valid. {type(cli.model).__name__} on {type(cli.datamodule).__name__}; callbacks: {names}.")
    if not made:
        print("Whether its model can be made is not known: it cannot be without memory for its weights.")
    if isinstance(cli.datamodule, data.CodeTasks):
        for split, what in (("train", "Its data comes"), ("test", "Its test data comes")):
            if (unset := cli.datamodule.from_hub(split)) is not None:
                print(f"{what} from the Hugging Face hub, since neither {unset} names a file.")
                break
    return 0


def _is_stateful(callback: pl.Callback) -> bool:
    return type(callback).state_dict is not pl.Callback.state_dict


def list_configs(argv: Sequence[str]) -> int:
    """Every shipped config with its one-line description; or the callbacks, and what one of them says of itself."""
    parser = argparse.ArgumentParser("forge-fit list", description=list_configs.__doc__)
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
    wanted = parser.parse_args(argv).callbacks
    if wanted in every:
        print(cards.card(wanted).text)
        print(f"\nIts arguments: forge-fit fit --trainer.callbacks.help={wanted}")
        return 0
    rows = shipped_configs()
    if wanted == "all":
        rows = [(name, cards.card(name).summary) for name in cards.ORDER]
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        print(f"{name:{width}}  {about}")
    return 0


def _load_run(run: Path, ckpt_path: Path | None) -> tuple[Any, Any]:
    """The module and datamodule of a run directory, with the weights of a checkpoint."""
    config = config_of_run(run)
    ckpt_path = newest_checkpoint(run) if ckpt_path is None else ckpt_path
    cli = CheckCLI(["fit", "--config", str(config)])
    module, datamodule = cli.model, cli.datamodule
    if not isinstance(module, models.ForgeModule):
        raise MisconfigurationException(
            f"`--run {run}` trained {type(module).__name__}, which does not continue text: only ForgeModule does."
        )
    if isinstance(datamodule, TokenDataModule):
        datamodule.serve(module)
    module.build(datamodule.tokenizer)
    refuse_cut_off(ckpt_path)
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    print(f"Weights: {ckpt_path}, of step {checkpoint['global_step']:,}", file=sys.stderr)
    # Without modules that callbacks added for training.
    parts = {name for name, part in module.named_children() if not getattr(part, "is_auxiliary", False)}
    weights = {name: weight for name, weight in checkpoint["state_dict"].items() if name.split(".")[0] in parts}
    module.load_state_dict(weights)
    module.on_load_checkpoint(checkpoint)
    return module.eval(), datamodule


def generate(argv: Sequence[str]) -> int:
    """Continue a prompt with the model of a run."""
    parser = argparse.ArgumentParser("forge-fit generate", description=generate.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, as the summary of a fit prints it")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    args = parser.parse_args(argv)
    module, _ = _load_run(args.run, args.ckpt_path)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    print(module.complete([args.prompt], **options)[0])
    return 0


def export(argv: Sequence[str]) -> int:
    """Write the model and tokenizer of a run as a Hugging Face folder."""
    parser = argparse.ArgumentParser("forge-fit export", description=export.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, as the summary of a fit prints it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; default: the run's newest")
    args = parser.parse_args(argv)
    if (args.output / "config.json").exists():
        raise MisconfigurationException(f"`--output {args.output}` holds a model already. Name another, or remove it.")
    module, _ = _load_run(args.run, args.ckpt_path)
    module.export(args.output)
    print(
        f"Wrote {args.output}: load it with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained of"
        " transformers. A prompt to continue takes tokenizer(prompt, add_special_tokens=False): byte tokenizers put an"
        " end token behind it otherwise."
    )
    return 0


def analyze(argv: Sequence[str]) -> int:
    """Draw and sum up what runs recorded: one page, its pictures, and a JSON of the same numbers."""
    from forge_lightning.reports.analysis import analyze as report
    from forge_lightning.reports.analysis import analyze_checkpoint

    parser = argparse.ArgumentParser("forge-fit analyze", description=analyze.__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="run directory, or its trace.jsonl; several are compared, those with one parent directory as one group,"
        " a run that was resumed as one with its beginning",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint alone, in place of runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write; default: `analysis` in the run,"
        " beside the checkpoint, or for several runs in the working directory",
    )
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.checkpoint):
        parser.error("name one or more runs, or a checkpoint with --checkpoint")
    if args.checkpoint:
        if not args.checkpoint.is_file():
            raise MisconfigurationException(f"`--checkpoint {args.checkpoint}`: no such file.")
        output = args.output or args.checkpoint.parent / f"{args.checkpoint.stem}_analysis"
        page = analyze_checkpoint(args.checkpoint, output)
    else:
        for run in args.runs:
            if not run.exists():
                raise MisconfigurationException(f"`forge-fit analyze {run}`: no such file or directory.")
        first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
        page = report(args.runs, args.output or (first if len(args.runs) == 1 else Path()) / "analysis")
    print(f"Wrote {page}")
    return 0


COMMANDS = {"list": list_configs, "check": check, "analyze": analyze, "generate": generate, "export": export}
