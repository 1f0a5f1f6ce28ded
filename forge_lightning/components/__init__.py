"""Stateful parts that know no Trainer: usable in any training loop."""

from forge_lightning.components.dream_augmenter import DreamAugmenter as DreamAugmenter
from forge_lightning.components.replay_buffer import ReplayBuffer as ReplayBuffer
from forge_lightning.components.self_model import SelfModelHead as SelfModelHead

__all__ = ["DreamAugmenter", "ReplayBuffer", "SelfModelHead"]
