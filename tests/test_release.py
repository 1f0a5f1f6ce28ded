"""What is published: the wheel and the source archive, built here."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")  # of the extra "dev"
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel's files, away from the repository."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def run(folder, code, cwd):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)


def test_wheel_has_every_module_config_and_the_types(installed):
    for path in [*ROOT.glob("forge_lightning/**/*.py"), ROOT / "forge_lightning/py.typed"]:
        assert (installed / path.relative_to(ROOT)).exists(), path
    for path in ROOT.glob("configs/**/*.yaml"):
        assert (installed / "forge_lightning" / path.relative_to(ROOT)).exists(), path
    assert not [p for p in installed.iterdir() if not p.name.startswith("forge_lightning")]


def test_wheel_lists_and_checks_its_configs(installed, tmp_path):
    code = f"""
from pathlib import Path
import forge_lightning
from forge_lightning.cli.main import main
assert Path(forge_lightning.__file__).is_relative_to({str(installed)!r}), forge_lightning
assert main(["list"]) == 0
assert main(["check", "grokking_fast.yaml"]) == 0
"""
    result = run(installed, code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "grokking_fast" in result.stdout
    assert "valid. AlgorithmicModule" in result.stdout


def test_source_archive_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(tmp_path / "again"),
        str(source),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    names = [set(zipfile.ZipFile(next(f.glob("*.whl"))).namelist()) for f in (built, tmp_path / "again")]
    assert names[0] == names[1]


def test_every_dependency_has_its_licence_written_down():
    """`LICENSES.md` names what is installed with the package, as their metadata says."""
    page = (ROOT / "LICENSES.md").read_text()
    for requirement in requires("forge-lightning"):
        name = re.match(r"[\w.-]+", requirement)[0]
        if name == "forge-lightning":  # an extra that is made of others
            continue
        assert re.search(rf"^\| {re.escape(name)} \| [^|]+ \|", page, re.MULTILINE), name
