"""Stateful parts that know no Trainer: usable in any training loop."""

from forge_lightning.components.self_model import SelfModelHead as SelfModelHead

__all__ = ["SelfModelHead"]
