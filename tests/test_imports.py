"""What importing a part must not load."""

import json
import subprocess
import sys

import pytest


def new_modules(before, module):
    code = f"import sys, json{before}; old = set(sys.modules); import {module}"
    code += "; print(json.dumps(list(set(sys.modules) - old)))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "module",
    [
        "forge_lightning.functional",
        "forge_lightning.optim",
        "forge_lightning.sandbox",
        "forge_lightning.geometry.estimators",
    ],
)
def test_the_core_is_plain_torch(module):
    loaded = new_modules("", module)
    assert not loaded & {"lightning", "transformers", "datasets", "torchmetrics", "wandb", "matplotlib"}


@pytest.mark.parametrize("module", ["forge_lightning.callbacks", "forge_lightning.cli"])
def test_callbacks_add_nothing_heavy_to_lightning(module):
    """Lightning itself loads torchmetrics, which loads whatever of transformers is installed."""
    loaded = new_modules(", lightning.pytorch.cli", module)
    assert not loaded & {"transformers", "datasets", "skdim", "wandb", "matplotlib", "pandas"}
