"""forge-fit: Lightning's commands, with our callbacks, data and models by short name, and a few more."""

import os
import pickle
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from forge_lightning import __version__
from forge_lightning.cli.commands import COMMANDS
from forge_lightning.cli.configs import (
    find_modules_beside,
    refuse_doubled_keys,
    resolve_configs,
    resolve_name,
    resume_arguments,
)
from forge_lightning.cli.errors import is_of_parser, is_of_trainer, parser_error, with_place
from forge_lightning.cli.forge_cli import ForgeCLI
from forge_lightning.data.records import DataFileError

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def _usage() -> str:
    lines = [f"  {name:9} Lightning's {name}; `forge-fit {name} --help`" for name in TRAINER_COMMANDS]
    lines += ["  resume    Go on with a run from its newest checkpoint: `forge-fit resume RUN [arguments as for fit]`"]
    lines += [f"  {name:9} {(run.__doc__ or '').splitlines()[0].replace('``', '`')}" for name, run in COMMANDS.items()]
    return "usage: forge-fit COMMAND ...\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Mistakes of the user end in one message and exit code 2, never in a traceback of ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Lightning 2.6 on torch 2.13: nothing a user could act on
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"forge-lightning {__version__}")
            return 0
        if argv[0] == "resume":
            argv = resume_arguments(argv[1:])
        find_modules_beside(argv)
        if argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if argv[0] not in TRAINER_COMMANDS:
            raise MisconfigurationException(f"`forge-fit {argv[0]}`: no such command.\n{_usage()}")
        variable = f"FORGE_{argv[0].upper()}__CONFIG"
        if variable in os.environ:
            os.environ[variable] = resolve_name(os.environ[variable])
            refuse_doubled_keys([argv[0], "--config", os.environ[variable]])
        refuse_doubled_keys(argv)
        # In `sys.argv`, because that is what a strategy's launcher runs again on the other ranks.
        sys.argv[1:] = resolve_configs(argv)
        ForgeCLI()
    except ArgumentError as error:
        return _explain(parser_error(str(error), argv))
    except SIGTERMException:
        return 143  # 128 + SIGTERM, as a shell says it
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    except SystemExit as error:  # the Trainer ends so, with 1, what was interrupted
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise
    except (MisconfigurationException, DataFileError, OSError) as error:
        return _explain(with_place(str(error), argv))
    except EOFError:
        return _explain("A file that was to be read is empty or cut off: the checkpoint, perhaps.")
    except pickle.UnpicklingError:
        return _explain("The file given as checkpoint is none, or holds more than weights and plain settings.")
    except ValueError as error:
        if argv[0] not in COMMANDS and not is_of_trainer(error):
            raise
        return _explain(str(error))
    except RuntimeError as error:
        if isinstance(error, RecursionError) and is_of_parser(error):
            return _explain("The config is nested too deep, or a part of it holds itself.")
        if "more than one stateful callback" in str(error):
            return _explain(f"{error} (`forge-fit check` says which.)")
        if "PytorchStreamReader" in str(error):
            return _explain(f"A checkpoint is cut off, or none: {str(error).splitlines()[0]}")
        if is_of_trainer(error):
            return _explain(str(error))
        if "loading state_dict" not in str(error):
            raise
        return _explain(
            "The checkpoint does not fit the model of this config. A callback that adds weights to the model, as"
            f" `SelfModel` does, belongs in both runs, or in neither.\n{error}"
        )
    return 0


def _explain(message: str) -> int:
    if os.environ.get("FORGE_TRACEBACK"):
        raise
    print(f"forge-fit: {message}", file=sys.stderr)
    return 2
