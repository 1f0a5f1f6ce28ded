"""A baseline of `RegressionGate` for the modules of the contract, and modules that return what it reads."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch

from forge_lightning.compression.regression_gate import _hashes
from tests.contract.modules import examples


@cache
def baseline():
    """A file with a loss of 0.7 for each of the examples."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "baseline.json"
    x, y = examples().tensors
    losses = dict.fromkeys(_hashes([x, y], len(x)), 0.7)
    path.write_text(json.dumps({"format": 1, "losses": losses, "step_seconds": 0.01, "step_seconds_spread": 0.0}))
    baseline.folder = folder  # removed with it
    return str(path)


def with_example_losses(base):
    """The module with a loss of each example among what `validation_step` returns."""

    class Returns(base):
        def validation_step(self, batch, batch_idx):
            returned = super().validation_step(batch, batch_idx)
            if not isinstance(batch, list | tuple) or len(batch) < 2 or batch[1].is_floating_point():
                return returned
            logits = self.net(batch[0].to(self.dtype))
            if logits.ndim != 2 or logits.shape[1] < 2:
                return returned
            losses = torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")
            return {"example_loss": losses.detach()} | (returned if isinstance(returned, dict) else {})

    Returns.__name__ = base.__name__
    return Returns
