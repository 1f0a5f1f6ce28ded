"""Pure functions on tensors. Imports nothing but torch."""

from forge_lightning.functional.grokfast import ema_filter as ema_filter
from forge_lightning.functional.grokfast import ma_filter as ma_filter
from forge_lightning.functional.grokfast import projection_filter as projection_filter
from forge_lightning.functional.pass_at_k import pass_at_k as pass_at_k

__all__ = ["ema_filter", "ma_filter", "pass_at_k", "projection_filter"]
