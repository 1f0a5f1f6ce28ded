"""Run the notebooks, and keep outputs and pictures in them: `python .ci/notebooks.py [NAME ...]`."""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
_VOLATILE = re.compile(r"/tmp/\S+/|\x1b\[[0-9;]*m")
"""Paths of this machine, and colours of a terminal."""


def run(path: Path) -> None:
    """Run one notebook in an empty folder, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = "ignore"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            if "text" in output:
                output["text"] = _VOLATILE.sub("", output["text"])
            for kind in ("text/plain", "text/html"):
                if kind in output.get("data", {}):
                    output["data"][kind] = _VOLATILE.sub("", output["data"][kind])
        cell.outputs = kept
    notebook.metadata = {"language_info": {"name": "python"}, "kernelspec": notebook.metadata.get("kernelspec", {})}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(found.stem for found in FOLDER.glob("*.ipynb")):
        print(name, flush=True)
        run(FOLDER / f"{name}.ipynb")
