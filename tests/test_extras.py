"""What works without the packages that only some uses need, and what is said where they are needed."""

import subprocess
import sys
import textwrap

import pytest

HIDDEN = ("transformers", "datasets", "wandb", "skdim", "peft", "lm_eval", "IPython")


def without(code, tmp_path):
    """Run code in a process in which the packages are not installed."""
    head = f"""
        import importlib.metadata, sys, warnings
        warnings.simplefilter("ignore")
        there, hidden = importlib.metadata.distribution, {HIDDEN!r}
        def distribution(name):
            if name.lower().replace("-", "_") in hidden + ("scikit_dimension",):
                raise importlib.metadata.PackageNotFoundError(name)
            return there(name)
        importlib.metadata.distribution = distribution
        for name in hidden:
            sys.modules[name] = None
        sys.argv = ["forge-fit"]
    """
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_the_core_trains_without_them(tmp_path):
    done = without(
        """
        from forge_lightning.cli.main import main
        quick = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        assert main(["check", "grokking_observed"]) == 0
        assert main(["fit", "--config=grokking_observed", *quick]) == 0
        assert main(["analyze", "runs/grokking_observed/version_0"]) == 0
        import forge_lightning.callbacks, forge_lightning.functional, forge_lightning.optim, forge_lightning.data
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/grokking_observed/version_0/analysis/report.html").exists()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("check grokfast_text --data.path=text.txt", "transformers", "hf"),
        ("check grokking_observed --config loggers/wandb", "wandb", "wandb"),
        ("check skdim.yaml", "skdim", "geometry"),
        ("evaluate --run absent --tasks x", "lm_eval", "evaluate"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(tmp_path, command, package, extra):
    (tmp_path / "text.txt").write_text("words " * 500)
    probe = "trainer:\n  callbacks:\n    - class_path: GeometryProbe\n      init_args: {estimators: ['skdim:MLE']}\n"
    config = "model: {class_path: AlgorithmicModule}\ndata: {class_path: AlgorithmicData}\n" + probe
    (tmp_path / "skdim.yaml").write_text(config)
    done = without(f"from forge_lightning.cli.main import main\nsys.exit(main({command.split()!r}))", tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"`{package}`" in done.stderr
    assert f"pip install 'forge-lightning[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
