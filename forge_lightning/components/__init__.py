"""Stateful parts that know no Trainer: usable in any training loop."""

from forge_lightning.compression.codecs import GPTQ as GPTQ
from forge_lightning.compression.codecs import VPTQ as VPTQ
from forge_lightning.compression.codecs import Dense as Dense
from forge_lightning.compression.codecs import EntropyGPTQ as EntropyGPTQ
from forge_lightning.compression.codecs import Hyper as Hyper
from forge_lightning.compression.codecs import RoundToNearest as RoundToNearest
from forge_lightning.compression.codecs import SeedLM as SeedLM
from forge_lightning.compression.codecs import Ternary as Ternary
from forge_lightning.dream.augmenter import DreamAugmenter as DreamAugmenter
from forge_lightning.dream.buffer import ReplayBuffer as ReplayBuffer
from forge_lightning.dream.code_augmentation import CodeExample as CodeExample
from forge_lightning.dream.code_augmentation import Variant as Variant
from forge_lightning.dream.code_augmentation import register_augmentation as register_augmentation
from forge_lightning.self_model.head import SelfModelHead as SelfModelHead

__all__ = [
    "GPTQ",
    "VPTQ",
    "CodeExample",
    "Dense",
    "DreamAugmenter",
    "EntropyGPTQ",
    "Hyper",
    "ReplayBuffer",
    "RoundToNearest",
    "SeedLM",
    "SelfModelHead",
    "Ternary",
    "Variant",
    "register_augmentation",
]
