"""Pure functions on tensors. Imports nothing but torch and NumPy."""

from forge_lightning.functional.grokfast import ema_filter as ema_filter
from forge_lightning.functional.grokfast import ma_filter as ma_filter
from forge_lightning.functional.grokfast import projection_filter as projection_filter
from forge_lightning.functional.intrinsic_dimension import DimensionEstimate as DimensionEstimate
from forge_lightning.functional.intrinsic_dimension import GrideEstimate as GrideEstimate
from forge_lightning.functional.intrinsic_dimension import PointCloud as PointCloud
from forge_lightning.functional.intrinsic_dimension import correlation_dimension as correlation_dimension
from forge_lightning.functional.intrinsic_dimension import gride_dimension as gride_dimension
from forge_lightning.functional.intrinsic_dimension import levina_bickel_dimension as levina_bickel_dimension
from forge_lightning.functional.intrinsic_dimension import participation_ratio as participation_ratio
from forge_lightning.functional.intrinsic_dimension import pca_dimension as pca_dimension
from forge_lightning.functional.intrinsic_dimension import two_nn_dimension as two_nn_dimension
from forge_lightning.functional.pass_at_k import pass_at_k as pass_at_k

__all__ = [
    "DimensionEstimate",
    "GrideEstimate",
    "PointCloud",
    "correlation_dimension",
    "ema_filter",
    "gride_dimension",
    "levina_bickel_dimension",
    "ma_filter",
    "participation_ratio",
    "pass_at_k",
    "pca_dimension",
    "projection_filter",
    "two_nn_dimension",
]
