"""Every enhancement is one callback: add it to any Trainer, in any Lightning project."""

from forge_lightning.callbacks.grokfast import Grokfast as Grokfast
from forge_lightning.callbacks.rng_state import RNGState as RNGState

__all__ = ["Grokfast", "RNGState"]
