"""Runs generated programs. Knows nothing of training."""

from forge_lightning.sandbox.runner import ProgramResult as ProgramResult
from forge_lightning.sandbox.runner import run_programs as run_programs

__all__ = ["ProgramResult", "run_programs"]
