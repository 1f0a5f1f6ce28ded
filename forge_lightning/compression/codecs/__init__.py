"""Codecs for weights: each writes a matrix as few bytes, and reads it back."""

from forge_lightning.compression.codecs.base import Codec, Packed, decode, proxy_error, relative_error
from forge_lightning.compression.codecs.chain import in_series
from forge_lightning.compression.codecs.dense import Dense
from forge_lightning.compression.codecs.hyper import Hyper
from forge_lightning.compression.codecs.rounding import GPTQ, EntropyGPTQ, RoundToNearest
from forge_lightning.compression.codecs.seedlm import SeedLM
from forge_lightning.compression.codecs.ternary import Ternary
from forge_lightning.compression.codecs.vptq import VPTQ

__all__ = [
    "GPTQ",
    "VPTQ",
    "Codec",
    "Dense",
    "EntropyGPTQ",
    "Hyper",
    "Packed",
    "RoundToNearest",
    "SeedLM",
    "Ternary",
    "decode",
    "in_series",
    "proxy_error",
    "relative_error",
]
