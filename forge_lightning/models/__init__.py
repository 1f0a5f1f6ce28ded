"""LightningModules: any Hugging Face causal language model, and a small reference model."""

from forge_lightning.models.algorithmic import AlgorithmicModule as AlgorithmicModule
from forge_lightning.models.forge_module import ForgeModule as ForgeModule

__all__ = ["AlgorithmicModule", "ForgeModule"]
