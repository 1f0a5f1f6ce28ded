"""Where the tests train: ``pytest --accelerator gpu`` chooses one GPU in place of the CPU."""

import os

VARIABLE = "FORGE_TEST_ACCELERATOR"
"""An environment variable, so that processes which tests start train there too."""
ACCELERATOR = os.environ.get(VARIABLE, "cpu")
DEVICE = "cuda" if ACCELERATOR == "gpu" else "cpu"
QUIET = {
    "accelerator": ACCELERATOR,
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
"""Options of a Trainer that writes nothing."""
