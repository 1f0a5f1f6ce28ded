"""DreamReplay from options in one list, as tests vary one at a time."""

from typing import Any

from forge_lightning.callbacks import BatchFields, DreamReplay, Mix, ProgramReplay, Sleep, Storage

_RENAMED = {"augmented_fraction": (ProgramReplay, "fraction"), "save_buffer": (Storage, "in_checkpoints")}


def dream_replay(mode: str = "mix", kind: type[DreamReplay] = DreamReplay, **options: Any) -> DreamReplay:
    """Give each option to the object that takes it; those of the other schedule are dropped."""
    schedule, other = (Mix, Sleep) if mode == "mix" else (Sleep, Mix)
    groups: dict[Any, dict[str, Any]] = {schedule: {}, other: {}, Storage: {}, ProgramReplay: {}, BatchFields: {}}
    own = {}
    for name, value in options.items():
        taker, name = _RENAMED.get(name) or (next((g for g in groups if name in g.__annotations__), None), name)
        (own if taker is None else groups[taker])[name] = value
    programs = groups[ProgramReplay]
    return kind(
        schedule=schedule(**groups[schedule]),
        buffer=Storage(**groups[Storage]),
        programs=ProgramReplay(**programs) if programs else None,
        fields=BatchFields(**groups[BatchFields]),
        **own,
    )
