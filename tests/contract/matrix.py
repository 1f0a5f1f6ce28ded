"""Every case × precision × accumulation × how it was stopped, in one launch.

``python -m tests.contract.matrix KIND OUT``, where ``KIND`` is "single", "ddp" or "fsdp2". Lightning starts the second
process by running this file again. With ``--kill CASE`` the launch is a victim: its last process kills itself with
signal 9 inside the second epoch, and the launch after it goes on from what lies on the disk.
"""

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from forge_lightning.callbacks import RNGState
from tests.contract.cases import CASES
from tests.contract.distributed import STATEFUL, scaler, two
from tests.contract.modules import Stateful
from tests.contract.rows import ADAPT, fit, weights

PRECISIONS = {"32": {}, "bf16": {"precision": "bf16-mixed"}, "fp16": {}}
ACCUMULATE = (1, 3)
EPOCHS = 2  # of 8 batches on one process, or 4 on each of two: 3 leaves a remainder
KILLED = ("bf16", 3)  # what a victim runs with, of several processes


class Killed(Callback):
    """Kills its process once a step of the second epoch is saved."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        last = batch_idx == trainer.num_training_batches - 1
        if trainer.current_epoch == 1 and last and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind, case, precision, accumulate, folder=None, ckpt_path=None, more=()):
    """Weights after all epochs, and the callback's state. Saves every step and epoch in ``folder``."""
    callbacks = [case.build(), *([] if case.id == "rng-state" else [RNGState()]), *more]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
        callbacks.append(ModelCheckpoint(folder, "end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1))
    kwargs = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
        "limit_val_batches": 0,
        "log_every_n_steps": 2,
        "enable_checkpointing": folder is not None,
        "ckpt_path": ckpt_path,
        # Smaller: Lightning cannot resume under FSDP2 where every step so far was dropped.
        "plugins": [scaler(2.0**18)] if precision == "fp16" else None,
        **PRECISIONS[precision],
    }
    run = fit if kind == "single" else partial(two, kind)
    model, _ = run(callbacks, {"single": Stateful, **STATEFUL}[kind], **kwargs)
    return weights(model), callbacks[0].state_dict()


def last_checkpoint(folder):
    """Of the steps; one that was being written when the process died does not count."""
    for path in sorted(folder.glob("step=*.ckpt"), key=lambda path: -int(path.stem.split("=")[1])):
        try:
            torch.load(path, weights_only=True)
        except (RuntimeError, EOFError):
            continue
        return path
    raise AssertionError(f"no checkpoint in {folder}")


def flat(tree, path=""):
    """Numbers and tensors by their place."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def same(weights, state, other_weights, other_state, when):
    """The weights, and all that the callback knows; but for how long it took."""
    assert torch.equal(weights, other_weights), when
    one, other = flat(state), flat(other_state)
    assert one.keys() == other.keys(), f"{when}: {one.keys() ^ other.keys()}"
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert equal or value != value or "seconds" in key, f"{when}: {key} is {value} and {other[key]}"


def check(kind, case, precision, accumulate, folder):
    straight, state = train(kind, case, precision, accumulate, folder)
    step = 5 if accumulate == 1 else 2 if kind == "single" else 3
    inside = folder / f"step={step}.ckpt"
    loop = torch.load(inside, weights_only=True)["loops"]["fit_loop"]
    assert not loop["epoch_loop.batch_progress"]["is_last_batch"]
    for path in (folder / "end-epoch=0.ckpt", inside):
        same(straight, state, *train(kind, case, precision, accumulate, ckpt_path=path), path.stem)
    if kind == "single":
        if (child := os.fork()) == 0:
            train(kind, case, precision, accumulate, folder / "killed", more=[Killed()])
            os._exit(0)  # not reached
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found = last_checkpoint(folder / "killed")
    elif (precision, accumulate) == KILLED:
        found = last_checkpoint(folder.parent / f"killed-{case.id}")
    else:
        return
    same(straight, state, *train(kind, case, precision, accumulate, ckpt_path=found), "kill -9")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["single", "ddp", "fsdp2"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill", metavar="CASE")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = {}
    for case in CASES:
        if exempt := case.exempt.get(args.kind):
            results[case.id] = f"exempt: {exempt}"
            continue
        if args.only and case.id not in args.only:
            continue
        ADAPT.set(case.adapt)
        if args.kill:
            if case.id == args.kill:
                train(args.kind, case, *KILLED, args.out / args.kind / f"killed-{case.id}", more=[Killed()])
            continue
        for precision in PRECISIONS:
            for accumulate in ACCUMULATE:
                name = f"{case.id}-{precision}-{accumulate}"
                try:
                    check(args.kind, case, precision, accumulate, args.out / args.kind / name)
                    results[name] = "passed"
                except Exception:  # reported to the test that waits for it
                    results[name] = traceback.format_exc()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (args.out / f"{args.kind}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
