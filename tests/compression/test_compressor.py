"""Stages, the gate, restoring, resuming, and the file."""

import json

import pytest
import torch

from forge_lightning.compression import load
from forge_lightning.compression.codecs import GPTQ, VPTQ, Dense, EntropyGPTQ, Hyper, SeedLM, Ternary, decode
from forge_lightning.compression.compressor import Compressor, Data, Stage, sequence_losses
from forge_lightning.compression.container import FILE_NAME, fill, save
from forge_lightning.compression.gate import Gate
from forge_lightning.compression.packed_files import digest
from forge_lightning.core.mistakes import UsageError
from tests.compression.tiny import batches, tiny_model, written_by

pytest.importorskip("transformers")
DATA = Data(*(written_by(tiny_model(), count, seed=count) for count in (8, 16, 32)))
GRIDS = [EntropyGPTQ(bits) for bits in (2.0, 3.0, 4.0, 6.0)]


def compressor(gate=Gate(max_rel_ppl=0.5, min_byte_gain=0.0), data=DATA, model=None, **options):  # noqa: B008
    return Compressor(model or tiny_model(), data, gate, 4, **options)


def test_losses_are_means_over_labels():
    model = tiny_model()
    data = batches(4)
    data[0]["labels"] = data[0]["labels"].clone()
    data[0]["labels"][0, :20] = -100
    data[0]["labels"][1] = -100  # none at all: left out
    logits = model(input_ids=data[0]["input_ids"]).logits.log_softmax(-1)
    expected = [-logits[0, t - 1, data[0]["input_ids"][0, t]].detach() for t in range(20, 24)]
    found = sequence_losses(model, data)
    assert len(found) == 3
    assert float(found[0]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_an_accepted_stage_is_in_the_weights():
    work = compressor()
    original = {name: matrix.read() for name, matrix in work.matrices.items()}
    assert work.run([Stage(["*.mlp.*"], [EntropyGPTQ(4.0)])])
    assert len(work.packed) == 6
    for name, matrix in work.matrices.items():
        now = matrix.read()
        assert torch.equal(now, decode(work.packed[name]) if name in work.packed else original[name])
    report = work.report()
    assert report["bytes_after"] == 4 * (work.num_weights - 6 * 48 * 32) + sum(
        p.num_bytes for p in work.packed.values()
    )
    assert json.dumps(report, allow_nan=False)


def test_a_bad_stage_is_restored_bit_by_bit():
    work = compressor(Gate(max_rel_ppl=0.02))
    before = digest(dict(work.model.state_dict()))
    assert not work.run([Stage(codecs=[VPTQ(8, 2)])])
    assert digest(dict(work.model.state_dict())) == before
    assert work.packed == {}
    (stage,) = work.stages
    assert "may rise" in stage["verdict"]["reason"]
    assert stage["verdict"]["upper"] > stage["verdict"]["limit"]


def test_a_stage_that_saves_nothing_is_refused():
    work = compressor(Gate(max_rel_ppl=0.5, min_byte_gain=0.01))
    assert not work.run([Stage(codecs=[Dense("float32")])])
    assert "saves 0.0%" in work.stages[0]["verdict"]["reason"]


def test_a_refused_stage_leaves_the_one_before():
    work = compressor(Gate(max_rel_ppl=0.3, min_byte_gain=0.0))
    assert not work.run([Stage(codecs=[EntropyGPTQ(6.0)]), Stage(["*.mlp.*"], codecs=[VPTQ(8, 2)])])
    assert [stage["accepted"] for stage in work.stages] == [True, False]
    for name, matrix in work.matrices.items():
        assert torch.equal(matrix.read(), decode(work.packed[name]))


def test_a_later_stage_starts_from_the_original_weights():
    once, twice = compressor(None), compressor(None)
    once.run([Stage(codecs=[GPTQ(4, 16)])])
    twice.run([Stage(codecs=[Dense("float32")]), Stage(codecs=[GPTQ(4, 16)])])
    assert digest(dict(once.model.state_dict())) == digest(dict(twice.model.state_dict()))


def test_a_budget_of_bits_is_kept():
    for bits in (2.7, 3.5, 5.0):
        work = compressor(None)
        work.run([Stage(codecs=GRIDS, target_bits=bits)])
        assert bits - 0.5 < work.stages[0]["bits_per_weight"] <= bits
        assert not work.stages[0]["target_missed"]
    assert len({row["codec"] for row in work.stages[0]["tensors"].values()}) > 1
    work = compressor(None)
    work.run([Stage(codecs=GRIDS, target_bits=1.0)])
    assert work.stages[0]["target_missed"]


def test_a_budget_of_loss_is_used():
    """The smallest choice that tuning data allows: a smaller one was measured and did not fit, or there is none."""
    small = compressor(Gate(max_rel_ppl=0.3, min_byte_gain=0.0))
    assert small.run([Stage(codecs=GRIDS)])
    strict = compressor(Gate(max_rel_ppl=0.01, min_byte_gain=0.0))
    strict.run([Stage(codecs=GRIDS)])
    assert small.stages[0]["bits_per_weight"] < strict.stages[0]["bits_per_weight"]
    for trial in small.stages[0]["trials"]:
        fits = trial["upper"] < small.gate.limit
        assert fits == (trial["bits_per_weight"] >= small.stages[0]["bits_per_weight"])


def test_the_literal_chain_is_worse_than_its_first_codec():
    alone, chain = compressor(None), compressor(None, serial=True)
    alone.run([Stage(["*.mlp.*"], [Ternary()])])
    chain.run([Stage(["*.mlp.*"], [Ternary(), SeedLM(4), VPTQ(2, 16, 16), Hyper(128, entropy=False)])])
    (one,), (four,) = alone.stages, chain.stages
    assert four["bits_per_weight"] > 2 * one["bits_per_weight"]
    for name, row in four["tensors"].items():
        assert row["expected_loss"] > one["tensors"][name]["expected_loss"]
        assert row["codec"].startswith("Hyper")


def test_an_interrupted_run_goes_on(tmp_path):
    class Broken(EntropyGPTQ):
        left = 5

        def encode(self, *args):
            if Broken.left == 0:
                raise KeyboardInterrupt
            Broken.left -= 1
            return super().encode(*args)

    del Broken.registry["Broken"]
    stage = Stage(["*.mlp.*", "*.self_attn.*"], [EntropyGPTQ(3.0), EntropyGPTQ(4.0)])
    whole = compressor(folder=tmp_path / "whole")
    whole.run([stage])
    broken = Broken(3.0)
    type(broken).label = property(lambda self: EntropyGPTQ(3.0).label)
    with pytest.raises(KeyboardInterrupt):
        compressor(folder=tmp_path / "part").run([Stage(stage.targets, [broken, EntropyGPTQ(4.0)])])
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.json")}
    assert len(finished) == 5
    again = compressor(folder=tmp_path / "part")
    again.run([stage])
    assert digest(dict(again.model.state_dict())) == digest(dict(whole.model.state_dict()))
    assert {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.parametrize("serial", [False, True])
def test_two_stages_go_on_as_they_would_have(tmp_path, serial):
    """Also where the first stage is read from the folder: statistics are those of the original weights."""
    stages = [Stage(["*.mlp.*"], [EntropyGPTQ(3.0)]), Stage(["*.self_attn.*"], [Hyper(64), EntropyGPTQ(4.0)])]
    runs = [compressor(None, folder=tmp_path, serial=serial) for _ in range(2)]
    runs[0].run(stages[:1])
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    runs[1].run(stages)
    whole = compressor(None, serial=serial)
    whole.run(stages)
    assert digest(dict(runs[1].model.state_dict())) == digest(dict(whole.model.state_dict()))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == written


def test_a_serial_run_is_not_gone_on_with_by_another(tmp_path):
    stage = Stage(["*.mlp.*"], [GPTQ(8, 16), EntropyGPTQ(2.0)], target_bits=9.0)
    compressor(None, folder=tmp_path, serial=True).run([stage])
    plain = compressor(None, folder=tmp_path)
    plain.run([stage])
    assert all(len(row["candidates"]) == 2 for row in plain.stages[0]["tensors"].values())
    assert plain.stages[0]["bits_per_weight"] > 8


def test_the_smallest_choice_can_win():
    work = compressor(Gate(max_rel_ppl=50, min_byte_gain=0.0))
    work.run([Stage(["lm_head"], [GPTQ(4, 16), Dense("float32")])])
    assert work.stages[0]["bits_per_weight"] == 5.0
    assert len(work.stages[0]["trials"]) == 1


def test_each_stage_is_measured_against_the_model_that_came():
    work = compressor(Gate(max_rel_ppl=0.3, min_byte_gain=0.0))
    work.run([Stage(["*.mlp.*"], GRIDS), Stage(["*.self_attn.*"], GRIDS)])
    base = sequence_losses(tiny_model(), DATA.tuning)
    torch.testing.assert_close(work._tuning_losses, base)


def test_weights_that_no_codec_can_write_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e7)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-7)
    with pytest.raises(UsageError, match="too large"):
        compressor(None, model=model).run([Stage(["*.up_proj"], [GPTQ(4, 16)])])


def test_other_data_does_not_go_on_with_a_run(tmp_path):
    compressor(folder=tmp_path).run([Stage(["*.mlp.*"], [EntropyGPTQ(3.0)])])
    number = len(list(tmp_path.glob("*.json")))
    other = Data(batches(8, seed=9), DATA.tuning, DATA.held_out)
    compressor(folder=tmp_path, data=other).run([Stage(["*.mlp.*"], [EntropyGPTQ(3.0)])])
    assert len(list(tmp_path.glob("*.json"))) == 2 * number


def test_problems_are_a_floor():
    rates = iter([0.5, 0.2])
    data = Data(DATA.calibration, DATA.tuning, DATA.held_out, lambda model: next(rates))
    work = compressor(Gate(max_rel_ppl=0.9, min_byte_gain=0.0, max_pass_drop=0.1), data)
    assert not work.run([Stage(codecs=[EntropyGPTQ(6.0)])])
    assert work.stages[0]["verdict"]["pass_rates"] == (0.5, 0.2)
    with pytest.raises(UsageError, match="needs data of programming problems"):
        compressor(Gate(max_pass_drop=0.1))


def test_mistakes_are_named_before_work():
    with pytest.raises(UsageError, match="no weight matches 'nothing'"):
        compressor().run([Stage(), Stage(["nothing"])])
    with pytest.raises(UsageError, match="no calibration data"):
        compressor(data=Data([], [], []))
    with pytest.raises(UsageError, match="two held-out sequences"):
        compressor(data=Data(DATA.calibration, DATA.tuning, batches(1)))
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="not finite in model.layers.0.mlp.up_proj.weight"):
        compressor(model=model)


@pytest.mark.parametrize(
    "options",
    [{"target_bits": 0}, {"max_rel_ppl": 0.0}, {"target_bits": 3, "max_rel_ppl": 0.1}, {"codecs": []}, {"targets": []}],
)
def test_stages_refuse(options):
    with pytest.raises(ValueError, match="Stage"):
        Stage(**options)


# The file


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_a_file_gives_the_same_model(tmp_path, kind, tied):
    work = compressor(None, model=tiny_model(tied=tied, kind=kind))
    work.run([Stage(codecs=[GPTQ(4, 16)])])
    number = save(tmp_path, work.model, work.packed, work.transposed, torch.float32)
    assert number == (tmp_path / FILE_NAME).stat().st_size
    model = load(tmp_path)
    assert not model.training
    for name, value in work.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    if tied:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(sequence_losses(model, DATA.held_out), sequence_losses(work.model, DATA.held_out))
    assert load(tmp_path, torch.bfloat16).dtype == torch.bfloat16


@pytest.fixture
def folder(tmp_path):
    work = compressor(None)
    work.run([Stage(codecs=[EntropyGPTQ(4.0)])])
    save(tmp_path, work.model, work.packed, work.transposed, torch.float32)
    return tmp_path


def test_a_flipped_byte_is_named(folder):
    content = bytearray((folder / FILE_NAME).read_bytes())
    content[-100] ^= 1
    (folder / FILE_NAME).write_bytes(content)
    with pytest.raises(UsageError, match=r"the bytes of model\.\S+ are not those that were written \(SHA-256 \w{16}"):
        load(folder)


def test_a_flipped_byte_of_the_header_is_named(folder):
    content = (folder / FILE_NAME).read_bytes()
    place = content.index(b"lowest") + 11
    digit = content[place : place + 1]
    assert digit.isdigit()
    (folder / FILE_NAME).write_bytes(content[:place] + (b"1" if digit != b"1" else b"2") + content[place + 1 :])
    with pytest.raises(UsageError, match="the header is not what was written"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_named(folder, share):
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=rf"{FILE_NAME} is damaged or cut off"):
        load(folder)


def test_the_config_of_another_model_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UsageError, match="different models: 'intermediate_size' is 40, and was 48"):
        load(folder)
    # One with weights of the same shapes.
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "head_dim": 8}))
    with pytest.raises(UsageError, match="different models: 'head_dim' is 8, and was 16"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        load(folder)


def test_weights_of_another_model_are_named():
    with pytest.raises(UsageError, match=r"different models \(no lm_head\.weight, .*, …\)"):
        fill(tiny_model(), {"model.norm.weight": torch.zeros(3)}, "folder")


def test_end_tokens_come_along(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load(folder).generation_config.eos_token_id == [1, 2]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"holds no {FILE_NAME}"):
        load(tmp_path)
