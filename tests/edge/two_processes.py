"""A steered fit on one process and on two: ``python -m tests.edge.two_processes FOLDER``."""

import sys
from pathlib import Path

from forge_lightning.callbacks import EdgeController
from tests.contract.ranks import BATCH, check_draws, module
from tests.contract.rows import fit, weights


def main(folder):
    alone = {}
    for policy in ("skill", "item"):  # before there is a process group
        one = module(BATCH)
        alone[policy] = (one, weights(fit([EdgeController(policy=policy)], one, max_epochs=3)[0]))
    trainer = check_draws(2, alone)
    if trainer.is_global_zero:
        (Path(folder) / "done").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
