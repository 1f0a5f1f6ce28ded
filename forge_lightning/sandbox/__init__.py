"""Judges generated programs by their tests. Knows nothing of training."""

from forge_lightning.sandbox.sandbox import NO_TIME as NO_TIME
from forge_lightning.sandbox.sandbox import Capabilities as Capabilities
from forge_lightning.sandbox.sandbox import Sandbox as Sandbox
from forge_lightning.sandbox.sandbox import SandboxError as SandboxError
from forge_lightning.sandbox.sandbox import Task as Task
from forge_lightning.sandbox.sandbox import Verdict as Verdict

__all__ = ["NO_TIME", "Capabilities", "Sandbox", "SandboxError", "Task", "Verdict"]
