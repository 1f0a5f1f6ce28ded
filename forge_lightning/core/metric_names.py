"""Names under which projects log loss and success."""

_SPLITS = ("val", "valid", "validation", "eval")
_NAMES = tuple((split, mark) for split in _SPLITS for mark in "/_")
VAL_LOSS = tuple(f"{split}{mark}loss" for split, mark in _NAMES)
VAL_SUCCESS = tuple(f"{split}{mark}{what}" for what in ("accuracy", "acc") for split, mark in _NAMES)
"""Ours first."""
TRAIN_SUCCESS = tuple(f"train{mark}{what}" for what in ("accuracy", "acc") for mark in "/_")


def plain_metric(name: str) -> str:
    """Without the ``name`` of an instance: ``forge/grokfast/second/lamb`` to ``forge/grokfast/lamb``."""
    parts = name.split("/")
    named = len(parts) == 4 and parts[0] == "forge" and parts[1] in ("telemetry", "grokfast", "stage", "edge")
    return "/".join((*parts[:2], parts[3])) if named else name
