"""Every enhancement is one callback: add it to any Trainer, in any Lightning project."""

from forge_lightning.calibration.callback import Calibration as Calibration
from forge_lightning.compression.regression_gate import RegressionGate as RegressionGate
from forge_lightning.compression.ternary_qat import TernaryQAT as TernaryQAT
from forge_lightning.dream.callback import DreamReplay as DreamReplay
from forge_lightning.dream.options import BatchFields as BatchFields
from forge_lightning.dream.options import Mix as Mix
from forge_lightning.dream.options import ProgramReplay as ProgramReplay
from forge_lightning.dream.options import Sleep as Sleep
from forge_lightning.dream.options import Storage as Storage
from forge_lightning.edge.callback import EdgeController as EdgeController
from forge_lightning.evaluation.callback import CodeEvaluation as CodeEvaluation
from forge_lightning.geometry.callback import GeometryProbe as GeometryProbe
from forge_lightning.grokfast.callback import Grokfast as Grokfast
from forge_lightning.run.interrupt_checkpoint import InterruptCheckpoint as InterruptCheckpoint
from forge_lightning.run.rng_state import RNGState as RNGState
from forge_lightning.run.run_summary import RunSummary as RunSummary
from forge_lightning.self_model.callback import SelfModel as SelfModel
from forge_lightning.stages.callback import StageClassifier as StageClassifier
from forge_lightning.stages.classifier import TrainingStage as TrainingStage
from forge_lightning.telemetry.callback import Telemetry as Telemetry
from forge_lightning.temperature.callback import TemperatureCurriculum as TemperatureCurriculum

__all__ = [
    "BatchFields",
    "Calibration",
    "CodeEvaluation",
    "DreamReplay",
    "EdgeController",
    "GeometryProbe",
    "Grokfast",
    "InterruptCheckpoint",
    "Mix",
    "ProgramReplay",
    "RNGState",
    "RegressionGate",
    "RunSummary",
    "SelfModel",
    "Sleep",
    "StageClassifier",
    "Storage",
    "Telemetry",
    "TemperatureCurriculum",
    "TernaryQAT",
    "TrainingStage",
]
