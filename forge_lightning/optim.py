"""Optimizers: with Grokfast built in, and Muon beside AdamW."""

from forge_lightning.grokfast.optim import GrokfastAdamW as GrokfastAdamW
from forge_lightning.grokfast.optim import GrokfastSGD as GrokfastSGD
from forge_lightning.muon.optim import MuonAdamW as MuonAdamW

__all__ = ["GrokfastAdamW", "GrokfastSGD", "MuonAdamW"]
