"""Optimizers with Grokfast built in, Muon beside AdamW, and schedules with a warm-up."""

from forge_lightning.grokfast.optim import GrokfastAdamW as GrokfastAdamW
from forge_lightning.grokfast.optim import GrokfastSGD as GrokfastSGD
from forge_lightning.muon.optim import MuonAdamW as MuonAdamW
from forge_lightning.schedules import WarmupCosine as WarmupCosine
from forge_lightning.schedules import WarmupLinear as WarmupLinear

__all__ = ["GrokfastAdamW", "GrokfastSGD", "MuonAdamW", "WarmupCosine", "WarmupLinear"]
