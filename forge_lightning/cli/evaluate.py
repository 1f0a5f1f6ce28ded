"""`forge-fit evaluate`: benchmarks of lm-eval on the model of a run, or on an exported one."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_lightning.core.extras import require_extra
from forge_lightning.core.mistakes import UsageError


def evaluate(
    model: Path | None,
    run: Path | None,
    ckpt_path: Path | None,
    tasks: Sequence[str],
    include_path: Path | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Results of lm-eval: of each task its metrics, with standard errors.

    Args:
        model: Folder of a model as Hugging Face has it.
        run: In its place, a run directory.
        ckpt_path: Checkpoint of the run; ``None`` for its newest.
        tasks: Names of tasks of lm-eval, or paths of YAML files that describe one.
        include_path: Folder with such files.
        options: For ``lm_eval.simple_evaluate``: ``limit``, ``num_fewshot``, ``batch_size``, ``device``.

    Raises:
        MissingExtraError: If lm-eval is not installed.
        UsageError: If a task is unknown.
    """
    lm_eval = require_extra("lm_eval", "evaluate", "`forge-fit evaluate`")
    known = require_extra("lm_eval.tasks", "evaluate", "`forge-fit evaluate`")
    files = [Path(task) for task in tasks if Path(task).is_file()]
    folders = [str(folder) for folder in (include_path, *(file.parent for file in files)) if folder is not None]
    manager = known.TaskManager(include_path=folders or None)
    names = [_name_in(Path(task)) if Path(task).is_file() else task for task in tasks]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {unknown[0]!r}. `lm_eval --tasks list` names them all; a YAML file of your own is"
            " given by its path."
        )
    from forge_lightning.cli.runs import load_model, load_run
    from forge_lightning.compression.container import is_compressed

    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            assert run is not None
            module, *_ = load_run(run, ckpt_path)
            module.export(folder)
            model = Path(folder)
        elif is_compressed(model):
            load_model(str(model))[0].export(folder)
            model = Path(folder)
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model)},
            tasks=names,
            task_manager=manager,
            log_samples=False,
            **options,
        )
    return {name: _plain(metrics) for name, metrics in found["results"].items()}


def _name_in(path: Path) -> str:
    """The name of the task that a file describes."""
    found = re.search(r"^task:\s*(\S+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise UsageError(f"`--tasks {path}`: the file has no line `task: NAME`, so it describes no task of lm-eval.")
    return found[1].strip("'\"")


def _plain(metrics: Mapping[str, Any]) -> dict[str, float | str]:
    """Metrics by name, without the word that lm-eval puts behind it where nothing filters."""
    return {key.replace(",none", ""): value for key, value in metrics.items() if key not in ("alias", " ")}


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Task, metric, value and standard error, as text."""
    found = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            if "_stderr" in name or not isinstance(value, int | float):
                continue
            base, _, kind = name.partition(",")
            error = metrics.get(f"{base}_stderr" + (f",{kind}" if kind else ""))
            found.append((task, name, f"{value:.4g}", f"{error:.2g}" if isinstance(error, float) else "–"))
    return found


def write(results: Mapping[str, Any], path: Path) -> None:
    """Results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=str) + "\n")
