"""LightningDataModules, and loading that resumes mid-epoch."""

from forge_lightning.core.stateful_loader import ResumableSampler as ResumableSampler
from forge_lightning.core.stateful_loader import StatefulDataLoader as StatefulDataLoader
from forge_lightning.data.algorithmic import AlgorithmicData as AlgorithmicData
from forge_lightning.data.code_tasks import CodeTasks as CodeTasks
from forge_lightning.data.generated_tasks import GeneratedTasks as GeneratedTasks
from forge_lightning.data.records import DataFileError as DataFileError
from forge_lightning.data.sources import Source as Source
from forge_lightning.data.text import InstructionData as InstructionData
from forge_lightning.data.text import Streaming as Streaming
from forge_lightning.data.text import TextData as TextData
from forge_lightning.edge.sampler import DifficultySampler as DifficultySampler

__all__ = [
    "AlgorithmicData",
    "CodeTasks",
    "DataFileError",
    "DifficultySampler",
    "GeneratedTasks",
    "InstructionData",
    "ResumableSampler",
    "Source",
    "StatefulDataLoader",
    "Streaming",
    "TextData",
]
