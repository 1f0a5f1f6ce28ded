import gc
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import ByT5Tokenizer

from forge_lightning.callbacks import RNGState
from forge_lightning.data import DataFileError, InstructionData, Source, Streaming, TextData
from forge_lightning.data.encoding import TextEncoder, encode_chat
from forge_lightning.data.records import BEGINS, ENDS, iterate_text
from forge_lightning.data.tokens import build_tokenizer
from tests import processes

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents(tmp_path, count=40, name="docs.jsonl"):
    return jsonl(tmp_path / name, [{"text": f"document {i} " + "x" * (i % 7)} for i in range(count)])


def rows(data, split):
    return [data._mixtures[split][i] for i in range(len(data._mixtures[split]))]


def decoded(data, batch):
    return [
        data.tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_text_is_cut_into_blocks_with_a_loss_on_every_token(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100)
    data = TextData(str(path), block_size=32, batch_size=4, val_fraction=0.2)
    data.setup()
    assert (len(data._mixtures["train"]), len(data._mixtures["val"])) == (20, 5)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 32)
    assert (batch["labels"] == batch["input_ids"]).all()
    assert data.tokenizer.decode(batch["input_ids"][0]) == "abcdefgh" * 4


def test_documents_end_with_the_end_token(tmp_path):
    data = TextData(jsonl(tmp_path / "t.jsonl", [{"text": "ab"}, {"text": "</s>"}, {"text": "c" * 30}]), block_size=4)
    data.setup()
    ids = np.concatenate([row.input_ids for row in rows(data, "train")])
    assert ids[:8].tolist() == [100, 101, 1, *(byte + 3 for byte in b"</s>"), 1]


def test_a_validation_file_and_unpacked_rows(tmp_path):
    val = tmp_path / "v.txt"
    val.write_text("other " * 20)
    data = TextData(documents(tmp_path), val_path=str(val), block_size=16, packing=False, batch_size=3)
    data.setup()
    assert data.tokenizer.decode(rows(data, "val")[0].input_ids) == ("other " * 20)[:16]
    lengths = [len(f"document {i} " + "x" * (i % 7)) + 1 for i in range(40)]
    assert [len(row.input_ids) for row in rows(data, "train")] == [
        part for length in lengths for part in ([16, length - 16] if length > 16 else [length])
    ]
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 1] == batch["input_ids"][batch["attention_mask"] == 1]).all()


def test_bytes_are_those_of_the_tokenizer():
    tokenizer = build_tokenizer("bytes")
    texts = ["plain", "ä€🙂 </s> <pad>", "", "two\nlines\t"]
    assert isinstance(tokenizer, ByT5Tokenizer)
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert [list(ids) for ids in TextEncoder(tokenizer)({"text": texts})["input_ids"]] == expected


def test_a_large_text_is_read_in_pieces_of_one_document(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    pieces = list(iterate_text(path, size=1000))
    assert len(pieces) > 5
    assert "".join(piece["text"] for piece in pieces) == path.read_text()
    assert [piece[BEGINS] for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece[ENDS] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    data = TextData(str(path), block_size=8)
    data.setup()
    ids = np.concatenate([row.input_ids for split in ("train", "val") for row in rows(data, split)])
    assert data.tokenizer.decode(ids) == path.read_text()[: len(ids)]
    assert (ids == 1).sum() == 0 or ids[-1] == 1


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json", "arrow", "saved", "folder", "texts", "jsonl.gz"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # `datasets`, of a stream that is not read to its end
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_kinds_of_files(tmp_path, kind, streaming):
    texts = [f"document {i}" for i in range(12)]
    table = Dataset.from_dict({"body" if kind == "csv" else "text": texts})
    path = tmp_path / f"data.{kind}"
    if kind in ("parquet", "json"):
        getattr(table, f"to_{kind}")(path)
    elif kind in ("csv", "tsv"):
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "there")
        path = next((tmp_path / "there").glob("*.arrow"))
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        table.select(range(6)).to_parquet(path / "train-0.parquet")
        table.select(range(6, 12)).to_parquet(path / "train-1.parquet")
    elif kind == "texts":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:02}.txt").write_text(text)
    else:
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(str(path), columns={"text": "body"} if kind == "csv" else {}, val_path=str(path))
    options = {"streaming": Streaming(steps_per_epoch=3, buffer=1)} if streaming else {}
    data = TextData(sources=[source], packing=False, block_size=64, batch_size=4, **options)
    data.prepare_data()
    data.setup()
    expected = [f"{text}</s>" for text in texts]
    assert [data.tokenizer.decode(row.input_ids) for row in rows(data, "val")] == expected
    seen = [text for batch in data.train_dataloader() for text in decoded(data, batch)]
    assert sorted(seen) == sorted(expected)
    gc.collect()


def test_tokens_are_made_once(tmp_path, monkeypatch):
    path = documents(tmp_path)
    TextData(path, block_size=16).setup()
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, batch: pytest.fail("made again"))
    again = TextData(path, block_size=8)
    again.setup()
    assert len(again._mixtures["train"]) > 0
    monkeypatch.undo()
    with open(path, "a") as file:
        file.write(json.dumps({"text": "new " * 50}) + "\n")
    changed = TextData(path, block_size=8)
    changed.setup()
    assert len(changed._mixtures["train"]) > len(again._mixtures["train"])


def test_pairs_learn_the_completion_alone(tmp_path):
    path = jsonl(
        tmp_path / "p.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 4 + [{"prompt": "x" * 50, "completion": ""}]
    )
    data = InstructionData(path, max_length=16, batch_size=2, val_fraction=0.25)
    with pytest.warns(UserWarning, match=r"1 of 5 examples of .*p.jsonl are longer than 16 tokens and are left out"):
        data.setup()
    batch = next(iter(data.train_dataloader()))
    assert decoded(data, batch) == ["1+1=2</s>"] * 2
    assert batch["labels"][0].tolist() == [-100] * 4 + [ord("2") + 3, 1]


def test_columns_go_by_other_names(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"question": "a", "answer": "b"}] * 10)
    data = InstructionData(sources=[Source(path, columns={"prompt": "question", "completion": "answer"})])
    data.setup()
    assert data.tokenizer.decode(rows(data, "train")[0].input_ids) == "ab</s>"
    with pytest.raises(DataFileError, match="field 'prompt' is missing"):
        InstructionData(path).setup()
    table = Dataset.from_dict({"question": ["a"]})
    table.to_parquet(tmp_path / "p.parquet")
    with pytest.raises(
        MisconfigurationException, match=r"no column 'prompt', but \['question'\]. Say which is meant by"
    ):
        InstructionData(str(tmp_path / "p.parquet")).setup()


def test_chats_learn_what_the_assistant_says(tmp_path):
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = CHATML
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]
    ids, labels = encode_chat(tokenizer, chat)
    assert tokenizer.decode(ids) == "<user>hi</user><assistant>yes</assistant><user>so</user><assistant>no</assistant>"
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert learned == [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == "yes</assistant>no</assistant>"

    data = InstructionData(jsonl(tmp_path / "c.jsonl", [{"messages": chat}] * 10), batch_size=2)
    data._tokenizer = tokenizer
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"][0].tolist() == labels


def test_a_turn_that_the_template_rewrites_later_is_not_learned():
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role == 'user' else m.content[-1:] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "thought: b"), ("user", "c"), ("assistant", "thought: d")]
    ids, labels = encode_chat(tokenizer, [{"role": role, "content": content} for role, content in turns])
    assert tokenizer.decode(ids) == "<user>a<assistant>b<user>c<assistant>thought: d"
    assert tokenizer.decode([label for label in labels if label != -100]) == "thought: d"


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (None, [{"role": "user", "content": "a"}], "has no chat template"),
        (CHATML, [{"role": "user", "content": "a"}], "no turn of the assistant"),
        (CHATML, [{"from": "gpt", "value": "a"}], "does not fit the template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            [{"role": "assistant", "content": "a"}],
            "roles must alternate",
        ),
    ],
)
def test_chats_that_teach_nothing_are_refused(template, messages, named):
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = template
    with pytest.raises(MisconfigurationException, match=named):
        encode_chat(tokenizer, messages)


def test_sources_are_drawn_by_weight_and_every_row_before_one_comes_again(tmp_path):
    paths = [
        jsonl(tmp_path / f"{letter}.jsonl", [{"text": f"{letter}{i:02}"} for i in range(n)])
        for letter, n in (("a", 34), ("b", 67))
    ]
    data = TextData(sources=[Source(paths[0], weight=3.0), Source(paths[1], weight=1.0)], packing=False, batch_size=5)
    data.setup()
    assert [len(part) for part in data._mixtures["train"].parts] == [31, 60]
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        epochs.append([text for batch in loader for text in decoded(data, batch)])
    assert [sum(text.startswith("a") for text in texts) for texts in epochs] == [68] * 4  # 3/4 of 91 rows
    assert len(set(epochs[0]) & {text for text in epochs[0] if text.startswith("b")}) == 23
    b = [text for texts in epochs for text in texts if text.startswith("b")]
    assert len(set(b[:46])) == 46  # of 60: two epochs without one that comes again,
    assert len(set(b[:69])) == 60  # and three with all of them
    assert epochs[0] != epochs[1]

    plain = TextData(sources=[Source(path) for path in paths], packing=False)
    plain.setup()
    assert sorted(i for batch in plain.train_dataloader() for i in batch["sample_id"].tolist()) == list(range(91))


class Sums(LightningModule):
    """Remembers its batches, and trains on them."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Embedding(400, 4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.net(batch["input_ids"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, tmp_path, ckpt_path=None, save_at=None):
    module = Sums()
    callbacks = [RNGState()]
    if save_at:
        callbacks.append(
            ModelCheckpoint(
                dirpath=tmp_path / "saved", every_n_train_steps=save_at, filename="at", save_weights_only=False
            )
        )
    Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, enable_checkpointing=bool(save_at),
    ).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)  # fmt: skip
    return module.seen


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("form", ["table", "stream", "two streams", "weights"])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_resume_sees_the_batches_not_yet_seen(tmp_path, packing, form, stop):
    val = documents(tmp_path, 5, "val.jsonl")
    paths = [documents(tmp_path), jsonl(tmp_path / "other.jsonl", [{"text": "y" * 9 + str(i)} for i in range(11)])]

    def build():
        options = {"packing": packing, "block_size": 16, "batch_size": 4, "seed": 3}
        if form == "table":
            return TextData(paths[0], **options)
        if form == "weights":
            return TextData(sources=[Source(paths[0], weight=1.0), Source(paths[1], weight=2.0)], **options)
        sources = [Source(path, val_path=val, weight=1.0 + i) for i, path in enumerate(paths)]
        return TextData(
            sources=sources if form == "two streams" else sources[:1],
            streaming=Streaming(steps_per_epoch=5, buffer=7),
            **options,
        )

    whole = fit(build(), 14, tmp_path)
    fit(build(), stop, tmp_path, save_at=stop)
    assert fit(build(), 14, tmp_path, ckpt_path=tmp_path / "saved" / "at.ckpt") == whole[stop:]
    assert len({str(batch) for batch in whole[:5]}) == 5


def test_a_stream_of_other_data_is_refused(tmp_path):
    path = documents(tmp_path)
    source = Source(path, val_path=path)
    loader = TextData(sources=[source], streaming=Streaming(buffer=3), block_size=8)
    loader.setup()
    made = loader.train_dataloader()
    next(iter(made))
    other = TextData(sources=[source], streaming=Streaming(buffer=3), block_size=16)
    other.setup()
    with pytest.raises(MisconfigurationException, match="block size: 8, now 16"):
        other.train_dataloader().load_state_dict(made.state_dict())


def test_ranks_read_different_records_of_a_stream(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "d.jsonl", [{"text": f"{i:02}"} for i in range(20)])
    seen = []
    for rank in range(2):
        monkeypatch.setattr("forge_lightning.data.streams.current_rank", lambda rank=rank: (rank, 2))
        data = TextData(
            sources=[Source(path, val_path=path)],
            packing=False,
            batch_size=5,
            streaming=Streaming(steps_per_epoch=2, buffer=1),
        )
        data.setup()
        assert len(rows(data, "val")) == 20
        batches = list(data.train_dataloader())
        seen.append([text for batch in batches for text in decoded(data, batch)])
        assert [i for batch in batches for i in batch["sample_id"].tolist()] == [2 * i + rank for i in range(10)]
    assert sorted(seen[0] + seen[1]) == [f"{i:02}</s>" for i in range(20)]


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
        TextData(str(tmp_path / "none.txt")).setup()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataFileError, match="empty.jsonl: holds no record"):
        TextData(str(tmp_path / "empty.jsonl")).setup()
    with pytest.raises(
        MisconfigurationException, match="It is no local file or folder, so it was looked for on the hub"
    ):
        TextData("nobody/nothing").setup()
    (tmp_path / "mixed").mkdir()
    with pytest.raises(MisconfigurationException, match="the folder is empty"):
        TextData(str(tmp_path / "mixed")).setup()


def test_sources_that_do_not_go_together_are_named(tmp_path):
    with pytest.raises(ValueError, match="all have a `weight`, or none; b has none"):
        TextData(sources=[Source("a", weight=1.0), Source("b")])
    with pytest.raises(ValueError, match="needs validation data.* a has none"):
        TextData("a", streaming=Streaming())
    with pytest.raises(ValueError, match=r"weight=0.*must be above 0"):
        Source("a", weight=0.0)
    with pytest.raises(ValueError, match=r"`Streaming\(buffer=0\)` must be at least 1"):
        Streaming(buffer=0)


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"block_size": 1}, {"batch_size": 0}])
def test_bad_arguments_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"`TextData\({name}="):
        TextData("x", **options)


@pytest.mark.parametrize("kind", ["jsonl", "saved", "parquet"])
def test_parts_of_a_split(tmp_path, kind):
    texts = [f"document {i:02}" for i in range(20)]
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        jsonl(path, [{"text": text} for text in texts])
    elif kind == "saved":
        Dataset.from_dict({"text": texts}).save_to_disk(path)
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    data = TextData(sources=[Source(str(path), split="train[:75%]", val_split="train[75%:]")], packing=False)
    data.setup()
    shown = {split: [data.tokenizer.decode(row.input_ids) for row in rows(data, split)] for split in ("train", "val")}
    assert shown["train"] == [f"{text}</s>" for text in texts[:15]]
    assert shown["val"] == [f"{text}</s>" for text in texts[15:]]
    if kind != "parquet":
        with pytest.raises(MisconfigurationException, match="has no split 'validation': it is all one split"):
            TextData(sources=[Source(str(path), val_split="validation")]).setup()


def test_columns_of_the_users_mean_nothing_to_us(tmp_path):
    Dataset.from_dict({"text": ["ab"] * 20, "begins": [0] * 20, "ends": [0] * 20}).to_csv(tmp_path / "d.csv")
    data = TextData(str(tmp_path / "d.csv"), block_size=3)
    data.setup()
    assert rows(data, "train")[0].input_ids.tolist() == [100, 101, 1]


OPEN = "{% if add_generation_prompt %}A{% endif %}"


def merging():
    """A byte-level tokenizer that merges two line ends, and a space with the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("Ċ", "Ċ"), ("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="ÿ")


@pytest.mark.parametrize(
    ("template", "answer", "learned"),
    [  # a token across the seam is learned
        (
            "{% for m in messages %}{{ m.role }}\n{{ m.content }};{% endfor %}" + OPEN.replace("A", "assistant\n"),
            "\nyes",
            "\n\nyes;",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}" + OPEN.replace("A", "assistant: "),
            "yes no",
            " yes no;",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}",
            "yes no",
            "yes no;",
        ),  # without an opening
    ],
)
def test_answers_are_learned_whole_and_headers_are_not(template, answer, learned):
    tokenizer = merging()
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] * 2
    ids, labels = encode_chat(tokenizer, chat)
    assert ids == tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([label for label in labels if label != -100]) == 2 * learned


def test_rows_of_a_stream_do_not_keep_their_document(tmp_path):
    path = jsonl(tmp_path / "long.jsonl", [{"text": "x" * 200_000}])
    data = TextData(sources=[Source(path, val_path=path)], block_size=64, streaming=Streaming(buffer=500))
    data.setup()
    loader = data.train_dataloader()
    next(iter(loader))
    assert all(row.base is None or row.base.size <= 64 for pair in loader._rows for row in pair)


def test_streams_go_on_where_loaders_are_made_anew(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"text": f"{i:02}"} for i in range(40)])
    data = TextData(
        sources=[Source(path, val_path=path)],
        packing=False,
        batch_size=4,
        streaming=Streaming(steps_per_epoch=2, buffer=1),
    )
    data.setup()
    first, second = ([text for batch in data.train_dataloader() for text in decoded(data, batch)] for _ in range(2))
    assert not set(first) & set(second)
    data.teardown("fit")
    assert [text for batch in data.train_dataloader() for text in decoded(data, batch)] == first


def test_a_place_in_other_data_is_refused(tmp_path):
    paths = [documents(tmp_path, name=f"{name}.jsonl") for name in "ab"]

    def loader(*sources, **options):
        data = TextData(sources=list(sources), block_size=16, batch_size=2, **options)
        data.setup()
        return data.train_dataloader()

    def after_one(made):
        next(iter(made))
        return made.state_dict()

    stream = {"streaming": Streaming(buffer=3)}
    one, other = (Source(path, val_path=paths[0], weight=1.0) for path in paths)
    with pytest.raises(MisconfigurationException, match="sources: .*a.jsonl.*, now .*b.jsonl"):
        loader(other, **stream).load_state_dict(after_one(loader(one, **stream)))
    with pytest.raises(MisconfigurationException, match="another kind of data, a stream"):
        loader(one).load_state_dict(after_one(loader(one, **stream)))
    with pytest.raises(MisconfigurationException, match="another kind of data than a stream"):
        loader(one, **stream).load_state_dict(after_one(loader(one)))
    before = loader(one, other)
    before.sampler.set_epoch(0)
    resumed = loader(one, Source(paths[1], val_path=paths[0], weight=5.0))
    resumed.load_state_dict(after_one(before))
    resumed.sampler.set_epoch(0)
    with pytest.raises(MisconfigurationException, match=r"weights: \[1.0, 1.0\], now \[1.0, 5.0\]"):
        next(iter(resumed))


def test_pieces_of_a_text_have_no_space_of_their_own(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", "a", "b", "\n", "<unk>"]
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    pieces = {"text": ["ab\n", "ba"], BEGINS: [True, False], ENDS: [False, True]}
    assert [ids.tolist() for ids in encoder(pieces)["input_ids"]] == [[0, 1, 2, 3], [2, 1]]


def test_empty_files_and_marks_of_editors(tmp_path):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataFileError, match="holds no record"):
        InstructionData(str(tmp_path / "e.jsonl")).setup()
    (tmp_path / "bom.jsonl").write_text('{"text": "' + "word " * 30 + '"}\n', encoding="utf-8-sig")
    data = TextData(str(tmp_path / "bom.jsonl"), block_size=8)
    data.setup()
    assert data.tokenizer.decode(rows(data, "train")[0].input_ids) == "word wor"
    (tmp_path / "my.csv.txt").write_text("plain words, " * 30)
    TextData(str(tmp_path / "my.csv.txt"), block_size=8).setup()
    with pytest.raises(MisconfigurationException, match="`val_path=nope.jsonl`"):
        TextData(str(tmp_path / "bom.jsonl"), val_path="nope.jsonl", block_size=8).setup()
    with pytest.raises(ValueError, match="above 0, and finite"):
        Source("a", weight=float("inf"))


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    documents(tmp_path)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(MisconfigurationException, match=r"several kinds \(.json, .txt\)"):
        TextData(str(tmp_path)).setup()


def test_the_other_datamodule_and_wrong_columns_are_named(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(MisconfigurationException, match="`InstructionData` reads prompts with completions, and chats"):
        TextData(path).preflight()
    with pytest.raises(MisconfigurationException, match="names 'txt', but what is read is \\['text'\\]"):
        TextData(sources=[Source(path, columns={"txt": "prompt"})]).preflight()
    chat = jsonl(tmp_path / "c.jsonl", [{"messages": []}])
    assert InstructionData(chat).is_chat
    with pytest.raises(MisconfigurationException, match="has no chat template"):
        InstructionData(chat).preflight()
    assert TextData(path, val_path=path, streaming=True).streaming == Streaming()
    assert TextData(path, streaming=False).streaming is None


def test_two_ranks_resume_inside_an_epoch(tmp_path):
    result = processes.run_module("tests.data.two_processes", tmp_path, cwd=ROOT)
    assert (tmp_path / "done").exists(), result.stderr[-3000:]


def test_a_part_of_the_training_file_leaves_the_validation_file_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    documents(tmp_path, 20)
    documents(tmp_path, 10, "val.jsonl")
    data = TextData(sources=[Source("~/docs.jsonl", split="train[:50%]", val_path="~/val.jsonl")], packing=False)
    data.setup()
    assert [len(rows(data, split)) for split in ("train", "val")] == [10, 10]
