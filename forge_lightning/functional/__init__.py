"""Pure functions on tensors. Imports nothing but torch and NumPy."""

from forge_lightning.functional.complexity import AstComplexity as AstComplexity
from forge_lightning.functional.complexity import ast_complexity as ast_complexity
from forge_lightning.functional.complexity import lempel_ziv_complexity as lempel_ziv_complexity
from forge_lightning.functional.complexity import mean_rank as mean_rank
from forge_lightning.functional.complexity import shannon_entropy as shannon_entropy
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
    "AstComplexity",
    "DimensionEstimate",
    "GrideEstimate",
    "PointCloud",
    "ast_complexity",
    "correlation_dimension",
    "ema_filter",
    "gride_dimension",
    "lempel_ziv_complexity",
    "levina_bickel_dimension",
    "ma_filter",
    "mean_rank",
    "participation_ratio",
    "pass_at_k",
    "pca_dimension",
    "projection_filter",
    "shannon_entropy",
    "two_nn_dimension",
]
