"""Pure functions on tensors. Imports nothing but torch and NumPy."""

from forge_lightning.edge.complexity import AstComplexity as AstComplexity
from forge_lightning.edge.complexity import ast_complexity as ast_complexity
from forge_lightning.edge.complexity import lempel_ziv_complexity as lempel_ziv_complexity
from forge_lightning.edge.complexity import mean_rank as mean_rank
from forge_lightning.edge.complexity import shannon_entropy as shannon_entropy
from forge_lightning.evaluation.functional import pass_at_k as pass_at_k
from forge_lightning.geometry.functional import DimensionEstimate as DimensionEstimate
from forge_lightning.geometry.functional import GrideEstimate as GrideEstimate
from forge_lightning.geometry.functional import correlation_dimension as correlation_dimension
from forge_lightning.geometry.functional import gride_dimension as gride_dimension
from forge_lightning.geometry.functional import levina_bickel_dimension as levina_bickel_dimension
from forge_lightning.geometry.functional import participation_ratio as participation_ratio
from forge_lightning.geometry.functional import pca_dimension as pca_dimension
from forge_lightning.geometry.functional import two_nn_dimension as two_nn_dimension
from forge_lightning.geometry.point_cloud import PointCloud as PointCloud
from forge_lightning.grokfast.functional import ema_filter as ema_filter
from forge_lightning.grokfast.functional import ma_filter as ma_filter
from forge_lightning.grokfast.functional import projection_filter as projection_filter

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
