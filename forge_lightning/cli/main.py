"""forge-fit: Lightning's commands, with our callbacks, data and models by short name, and a few more.

Lightning takes seconds to import, so only what needs it does: help, lists, the version and typos are answered at once.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

from forge_lightning import __version__
from forge_lightning.cli.commands import COMMANDS
from forge_lightning.cli.configs import (
    RESUME_HELP,
    find_modules_beside,
    refuse_doubled_keys,
    resolve_name,
    resume_arguments,
)
from forge_lightning.core.mistakes import UsageError

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_GROUPS = {
    "Begin": ("init", "list", "check"),
    "Train": (*TRAINER_COMMANDS, "resume"),
    "Look": ("analyze", "compare", "watch"),
    "Use": ("generate", "evaluate", "compress", "export"),
    "More": ("completion",),
}
_OF_LIGHTNING = {
    "fit": "Train",
    "validate": "Measure on validation data",
    "test": "Measure on test data",
    "predict": "Predict",
    "resume": "Go on with a run from its newest checkpoint: resume RUN",
}


def _usage() -> str:
    lines = ["usage: forge-fit COMMAND ...", ""]
    for group, names in _GROUPS.items():
        lines.append(f"{group}:")
        for name in (found for found in names if found in _OF_LIGHTNING or found in COMMANDS):
            about = _OF_LIGHTNING.get(name) or (COMMANDS[name].__doc__ or "").split(".")[0].split(":")[0]
            lines.append(f"  {name:10}  {about.replace('``', '`')}")
    lines += ["", "`forge-fit COMMAND --help` says more; `forge-fit --version` the version."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Mistakes of the user end in one message and exit code 2, never in a traceback of ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Lightning 2.6 on torch 2.13: nothing a user could act on
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    except SystemExit as error:  # the Trainer ends so, with 1, what was interrupted
        if type(error).__name__ == "SIGTERMException":  # Lightning's
            return 143  # 128 + SIGTERM
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise
    except BrokenPipeError:  # as of `forge-fit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        return 141  # 128 + SIGPIPE
    except (UsageError, OSError) as error:
        return _explain(str(error))
    except Exception as error:
        from forge_lightning.cli.errors import explanation

        found = explanation(error, argv)
        if found is None:
            raise
        return _explain(found)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"forge-lightning {__version__}")
        return 0
    if argv[0] == "resume" and argv[1:2] in (["-h"], ["--help"]):
        print(RESUME_HELP, end="")
        return 0
    if argv[0] == "resume":
        argv = resume_arguments(argv[1:])
    if argv[0] not in (*COMMANDS, *TRAINER_COMMANDS):
        close = get_close_matches(argv[0], [*COMMANDS, *TRAINER_COMMANDS, "resume"], n=1)
        raise UsageError(
            f"`forge-fit {argv[0]}`: no such command.{f' Close: {close[0]}.' if close else ''}\n{_usage()}"
        )
    find_modules_beside(argv)
    if argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    variable = f"FORGE_{argv[0].upper()}__CONFIG"
    if variable in os.environ:
        os.environ[variable] = resolve_name(os.environ[variable])
        refuse_doubled_keys([argv[0], "--config", os.environ[variable]])
    refuse_doubled_keys(argv)
    from forge_lightning.cli.forge_cli import run_trainer

    run_trainer(argv)
    return 0


def _explain(message: str) -> int:
    if os.environ.get("FORGE_TRACEBACK"):
        raise
    print(f"forge-fit: {message}", file=sys.stderr)
    return 2
