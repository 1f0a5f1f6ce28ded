import gzip
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.data import CodeTasks, DataFileError
from forge_lightning.data.code_tasks import mbpp_problem
from forge_lightning.data.tokens import build_tokenizer
from forge_lightning.sandbox import Sandbox, Task


def test_the_conventional_split_of_the_real_file(mbpp_path):
    data = CodeTasks(path=mbpp_path)
    sizes = {split: len(data.problems(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 374, "val": 90, "test": 500}


def test_the_reference_solutions_of_the_real_files_pass_and_empty_ones_do_not(mbpp_path, humaneval_path):
    mbpp = CodeTasks(path=mbpp_path, test_dataset="humaneval", test_path=humaneval_path)
    problems = mbpp.problems("val") + mbpp.problems("test")
    assert len(problems) == 90 + 164
    with Sandbox(timeout_seconds=20) as sandbox:
        right = sandbox.run_many([p.task(p.solution) for p in problems])
        assert [p.task_id for p, r in zip(problems, right, strict=True) if not r.passed] == []
        wrong = sandbox.run_many([p.task("    return None\n" if "/" in p.task_id else "pass") for p in problems])
        assert [p.task_id for p, r in zip(problems, wrong, strict=True) if r.passed] == []
        always = [p.task(always_equal(p)) for p in problems if "/" not in p.task_id]
        assert not any(verdict.passed for verdict in sandbox.run_many(always))


def always_equal(problem):
    """Every function of the program returns what equals everything."""
    names = [name for name in problem.entry_point if f"class {name}" not in problem.solution]
    lines = ["class Equal:", "    __eq__ = __contains__ = lambda *_: True"]
    return "\n".join([*lines, *(f"def {name}(*_): return Equal()" for name in names)])


def test_a_mutated_solution_fails(mbpp_path):
    """One comparison or constant changed, in the first place where one is: nearly all tests see it."""
    problems = CodeTasks(path=mbpp_path).problems("val")
    mutants = [(p, m) for p in problems if (m := mutated(p.solution)) != p.solution]
    assert len(mutants) > 60
    with Sandbox(timeout_seconds=10) as sandbox:
        verdicts = sandbox.run_many([p.task(m) for p, m in mutants])
    assert sum(v.passed for v in verdicts) < 0.2 * len(mutants)
    assert {v.status for v in verdicts} <= {"passed", "failed", "timeout"}


def mutated(source):
    pairs = ((" < ", " >= "), (" > ", " <= "), ("==", "!="), (" + ", " - "), ("*", "+"), ("return ", "return 1, "))
    for old, new in pairs:
        if old in source:
            return source.replace(old, new, 1)
    return source


def test_the_path_may_come_from_the_environment(small_mbpp, monkeypatch):
    monkeypatch.setenv("FORGE_MBPP", small_mbpp)
    assert len(CodeTasks().problems("train")) == 24


def test_batches_put_the_loss_on_the_completion_only(small_mbpp):
    data = CodeTasks(path=small_mbpp, batch_size=5)
    data.setup("fit")
    problems = data.problems("train")
    for batch in data.train_dataloader():
        for ids, mask, labels, sample in zip(*(batch[k] for k in batch), strict=True):
            problem = problems[sample]
            assert data.tokenizer.decode(labels[labels != -100]) == problem.solution + "</s>"
            prompt = ids[(labels == -100) & (mask == 1)]
            assert data.tokenizer.decode(prompt) == problem.prompt
            assert (labels[mask == 0] == -100).all()
            assert "\r" not in problem.solution
            assert "assert add_" in problem.prompt


def test_completions_are_cut_where_they_stop():
    from forge_lightning.data.code_tasks import Problem

    problem = Problem("0", "", "", before="A", tests="T", entry_point=("f",), stops=("\ndef", "\nassert"))
    assert problem.task("x\nassert y\ndef f") == Task("Ax\n", "T", ("f",))
    assert problem.task("x") == Task("Ax\n", "T", ("f",))


def test_what_the_tests_use_of_a_program_is_told_from_what_they_can_have_themselves():
    """A program's own `isclose` must not decide whether its answer is close."""
    code = "import math\r\nfrom cmath import isclose as near\r\nclass Pair: pass\r\nLIMIT = 3\r\ndef f(x): return x"
    tests = ["assert math.isclose(f(Pair()), LIMIT)", "assert near(f(1), 1)"]
    record = {"task_id": 1, "text": "", "code": code, "test_list": tests, "test_setup_code": ""}
    problem = mbpp_problem(record)
    assert problem.entry_point == ("Pair", "LIMIT", "f")
    assert problem.setup == "import math\nfrom cmath import isclose as near"


def test_training_on_humaneval_is_an_error_that_says_why():
    with pytest.raises(MisconfigurationException, match=r"cannot be trained on: HumanEval is the yardstick"):
        CodeTasks(dataset="humaneval", path="x").setup("fit")


def test_humaneval_is_measured_in_test_while_mbpp_trains(small_mbpp, tmp_path):
    path = tmp_path / "he.jsonl.gz"
    record = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(record) + "\n")
    data = CodeTasks(path=small_mbpp, test_dataset="humaneval", test_path=str(path))
    problem = data.problems("test")[0]
    with Sandbox() as sandbox:
        verdicts = sandbox.run_many([problem.task(problem.solution), problem.task("    return 2\n")])
    assert [verdict.passed for verdict in verdicts] == [True, False]
    data.setup("test")
    assert torch.is_tensor(next(iter(data.test_dataloader()))["labels"])


def test_long_examples_are_left_out_and_counted(small_mbpp):
    data = CodeTasks(path=small_mbpp, max_length=117)
    with pytest.warns(UserWarning, match=r"16 of 24 train examples are longer than max_length=117"):
        data._encode("train")
    with pytest.raises(MisconfigurationException, match=r"24 of 24 train examples are .* Raise `max_length`"):
        CodeTasks(path=small_mbpp, max_length=10).setup("fit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad.jsonl, line 2: not JSON: .* at column 2"),
        ("[1]", r"bad.jsonl, line 2: must be a JSON object, but is list"),
        ('{"task_id": 1}', r"bad.jsonl, line 2: field 'text' is missing. The line has \['task_id'\]"),
        (
            '{"task_id": "a", "text": "", "code": "", "test_list": [], "test_setup_code": ""}',
            r"bad.jsonl, line 2: field 'task_id' must be int, but is str",
        ),
    ],
)
def test_a_malformed_file_is_named_with_line_and_field(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataFileError, match=message):
        CodeTasks(path=str(path)).problems("train")


def test_unreadable_files_say_why(tmp_path):
    with pytest.raises(MisconfigurationException, match="Cannot read the data file .*absent.jsonl: No such file"):
        CodeTasks(path=str(tmp_path / "absent.jsonl")).problems("train")
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataFileError, match="not a complete gzip file"):
        CodeTasks(path=str(tmp_path / "x.jsonl.gz")).problems("train")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataFileError, match="not UTF-8 text"):
        CodeTasks(path=str(tmp_path / "x.jsonl")).problems("train")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataFileError, match="holds no record"):
        CodeTasks(path=str(tmp_path / "empty.jsonl")).problems("train")


def test_without_file_and_hub_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delenv("FORGE_MBPP", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MisconfigurationException, match="the hub cannot be reached .* variable FORGE_MBPP"):
        CodeTasks().problems("train")


def test_an_absent_tokenizer_says_what_to_do():
    with pytest.raises(MisconfigurationException, match=r"`tokenizer='no/such'` is neither .* or use 'bytes'"):
        build_tokenizer("no/such")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`CodeTasks\(batch_size=0\)`"),
        ({"max_length": 1}, r"`CodeTasks\(max_length=1\)`"),
        ({"prompt_template": "{text}"}, r"must hold \{text\} and \{tests\}"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CodeTasks(**options)


def steered(path, **options):
    data = CodeTasks(path=path, batch_size=4, **options)
    data.setup("fit")
    return data, data.train_dataloader().sampler


def test_difficulty_is_measured_on_the_reference_programs(small_mbpp):
    data, sampler = steered(small_mbpp, difficulty="tokens")
    lengths = [len(data.tokenizer(p.solution)["input_ids"]) for p in data.problems("train")]
    assert sampler.difficulty.tolist() == lengths  # the end token is counted in both
    data, sampler = steered(small_mbpp, difficulty="complexity")
    assert data.difficulty.shape == (24, 7)
    assert data.difficulty.isfinite().all()
    assert 0 <= sampler.difficulty.min() < sampler.difficulty.max() <= 1


def test_difficulty_may_be_a_field_of_the_file_or_learned(small_mbpp, tmp_path):
    records = [json.loads(line) | {"hard": n / 7} for n, line in enumerate(open_lines(small_mbpp))]
    path = tmp_path / "graded.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    data, sampler = steered(str(path), difficulty="hard")
    train = [r["hard"] for r in records if r["task_id"] >= 601]
    assert sampler.difficulty.tolist() == pytest.approx(train)
    data, sampler = steered(small_mbpp, difficulty="learned")
    assert sampler.difficulty is None
    assert data.difficulty is None
    with pytest.raises(
        MisconfigurationException, match=r"`CodeTasks\(difficulty='hard'\)` is no measure, and 24 of 24"
    ):
        steered(small_mbpp, difficulty="hard")


def open_lines(path):
    with open(path) as file:
        return file.read().splitlines()


def test_problems_to_train_on_are_numbered_as_the_data_set(small_mbpp):
    """Those too long to be trained on are no examples."""
    everything = CodeTasks(path=small_mbpp)
    sizes = [len(everything.tokenizer(p.prompt + p.solution)["input_ids"]) for p in everything.problems("train")]
    data = CodeTasks(path=small_mbpp, max_length=max(sizes) - 1)
    with pytest.warns(UserWarning, match="are left out"):
        data.setup("fit")
    problems, examples = data.problems("train"), data.train_dataloader().dataset.examples
    assert 0 < len(problems) == len(examples) < 24
    for problem, example in zip(problems, examples, strict=True):
        assert problem.solution in data.tokenizer.decode(example.input_ids)


def test_data_is_loaded_ahead_of_a_run_unless_a_subclass_has_its_own(monkeypatch):
    class Own(CodeTasks):
        def problems(self, split):
            return []

    monkeypatch.delenv("FORGE_MBPP", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Own().load("train")
    with pytest.raises(MisconfigurationException, match="the hub cannot be reached"):
        CodeTasks().load("train")
    data = CodeTasks(generated=True)
    with pytest.warns(UserWarning, match="generated functions take MBPP's place"):
        data.load("train")
    assert len(data.problems("train")) == 180


@pytest.mark.parametrize("setup", ["", "import math"])
def test_a_problem_without_tests_is_solved_by_no_program(tmp_path, setup):
    record = {"task_id": 511, "text": "Add two.", "code": "def add(a, b):\n    return a + b"}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record | {"test_list": [], "test_setup_code": setup}) + "\n")
    problem = CodeTasks(path=str(path)).problems("val")[0]
    with Sandbox(num_workers=1) as sandbox:
        verdicts = sandbox.run_many([problem.task(text) for text in ("", "x = 1", problem.solution)])
    assert [verdict.passed for verdict in verdicts] == [False] * 3
    assert "the problem has no tests" in verdicts[0].detail
