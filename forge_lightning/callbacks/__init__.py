"""Every enhancement is one callback: add it to any Trainer, in any Lightning project."""

from forge_lightning.callbacks.calibration import Calibration as Calibration
from forge_lightning.callbacks.code_evaluation import CodeEvaluation as CodeEvaluation
from forge_lightning.callbacks.dream_replay import DreamReplay as DreamReplay
from forge_lightning.callbacks.edge_controller import EdgeController as EdgeController
from forge_lightning.callbacks.geometry_probe import GeometryProbe as GeometryProbe
from forge_lightning.callbacks.grokfast import Grokfast as Grokfast
from forge_lightning.callbacks.interrupt_checkpoint import InterruptCheckpoint as InterruptCheckpoint
from forge_lightning.callbacks.rng_state import RNGState as RNGState
from forge_lightning.callbacks.run_summary import RunSummary as RunSummary
from forge_lightning.callbacks.self_model import SelfModel as SelfModel
from forge_lightning.callbacks.stage_classifier import StageClassifier as StageClassifier
from forge_lightning.callbacks.telemetry import Telemetry as Telemetry
from forge_lightning.callbacks.temperature_curriculum import TemperatureCurriculum as TemperatureCurriculum
from forge_lightning.components.stage_classifier import TrainingStage as TrainingStage

__all__ = [
    "Calibration",
    "CodeEvaluation",
    "DreamReplay",
    "EdgeController",
    "GeometryProbe",
    "Grokfast",
    "InterruptCheckpoint",
    "RNGState",
    "RunSummary",
    "SelfModel",
    "StageClassifier",
    "Telemetry",
    "TemperatureCurriculum",
    "TrainingStage",
]
