"""Stateful parts that know no Trainer: usable in any training loop."""
