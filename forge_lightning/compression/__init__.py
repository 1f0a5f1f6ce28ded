"""Compression: codecs for weights, the gate that each stage has to pass, and reading the files."""

from forge_lightning.compression.container import load

__all__ = ["load"]
