"""Stateful parts that know no Trainer: usable in any training loop."""

from forge_lightning.dream.augmenter import DreamAugmenter as DreamAugmenter
from forge_lightning.dream.buffer import ReplayBuffer as ReplayBuffer
from forge_lightning.dream.code_augmentation import CodeExample as CodeExample
from forge_lightning.dream.code_augmentation import Variant as Variant
from forge_lightning.dream.code_augmentation import register_augmentation as register_augmentation
from forge_lightning.self_model.head import SelfModelHead as SelfModelHead

__all__ = ["CodeExample", "DreamAugmenter", "ReplayBuffer", "SelfModelHead", "Variant", "register_augmentation"]
