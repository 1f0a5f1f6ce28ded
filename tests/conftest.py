import logging
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite runs in as many processes as there are cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 still calls what 5.0 will rename
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="forge_datasets_"))
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


def pytest_addoption(parser):
    parser.addoption("--accelerator", choices=("cpu", "gpu"), help="where the tests train; default: the CPU")


def pytest_configure(config):
    chosen = config.getoption("--accelerator", None)
    if chosen:
        os.environ["FORGE_TEST_ACCELERATOR"] = chosen  # before `tests.accelerator` is imported


def benchmark_file(variable):
    """The path in an environment variable that names a data set, which the repository does not ship."""
    path = os.environ.get(variable)
    if not path or not Path(path).exists():
        pytest.skip(f"{variable} does not name the real file")
    return path


@pytest.fixture(autouse=True)
def no_stance_left():
    """A test that leaves the compiler switched off would leave it so for all after it."""
    yield
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    left = "default" if compiler is None else compiler._stance.stance
    if left != "default":
        sys.modules["torch"].compiler.set_stance("default")  # for the tests after it
    assert left == "default"


@pytest.fixture
def mbpp_path():
    return benchmark_file("FORGE_MBPP")


@pytest.fixture
def humaneval_path():
    return benchmark_file("FORGE_HUMANEVAL")


@pytest.fixture
def small_mbpp(tmp_path):
    """A file in MBPP's form, made here: additions and products, in all three splits."""
    import json

    rng = random.Random(0)
    lines = []
    for task_id in [*range(505, 509), *range(511, 517), *range(601, 625)]:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        name = f"add_{task_id}"
        lines.append(
            {
                "task_id": task_id,
                "text": f"Write a function to add {a}.",
                "code": f"def {name}(x):\r\n  return x + {a}",
                "test_list": [f"assert {name}({b}) == {a + b}", f"assert {name}(0) == {a}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
        )
    path = tmp_path / "small_mbpp.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
