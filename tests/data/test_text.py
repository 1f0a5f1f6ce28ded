import json

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.data import DataFileError, TextData


def test_text_is_cut_into_blocks_with_a_loss_on_every_token(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100)
    data = TextData(str(path), block_size=32, batch_size=4, val_fraction=0.2)
    data.setup()
    assert (len(data._sets["train"]), len(data._sets["val"])) == (20, 5)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 32)
    assert (batch["labels"] == batch["input_ids"]).all()
    assert data.tokenizer.decode(batch["input_ids"][0]) == "abcdefgh" * 4


def test_jsonl_documents_and_a_validation_file(tmp_path):
    train, val = tmp_path / "t.jsonl", tmp_path / "v.txt"
    train.write_text("".join(json.dumps({"text": "word " * 20}) + "\n" for _ in range(3)))
    val.write_text("other " * 20)
    data = TextData(str(train), val_path=str(val), block_size=16)
    data.setup()
    assert data.tokenizer.decode(data._sets["val"].examples[0].input_ids).startswith("other")


def test_errors_name_file_and_field(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"content": "x"}\n')
    with pytest.raises(DataFileError, match=r"t.jsonl, line 1: field 'text' is missing"):
        TextData(str(path)).setup()
    short = tmp_path / "s.txt"
    short.write_text("short")
    with pytest.raises(MisconfigurationException, match="s.txt is too short for a train block of block_size=256"):
        TextData(str(short)).setup()
    with pytest.raises(MisconfigurationException, match="Cannot read the data file"):
        TextData(str(tmp_path)).setup()


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"block_size": 1}, {"batch_size": 0}])
def test_bad_arguments_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"`TextData\({name}="):
        TextData("x", **options)
