import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from forge_lightning.core.tokens import continuation_text, prompt_ids
from forge_lightning.data import TextData
from forge_lightning.data.tokens import build_tokenizer, encode_example


def llama_like(merges=()):
    """A tokenizer that begins every text with a space, and drops it in decoding, as SentencePiece's do."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *"def(x):=\nrtun", *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges), unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


PROMPT, BODY = "def f(x):\n", "    x = x\n    return x"


@pytest.mark.parametrize("merges", [(), [("\n", "▁"), ("▁", "▁")]])
def test_completion_tokens_are_those_of_a_text_that_goes_on(merges):
    tokenizer = llama_like(merges)
    example = encode_example(tokenizer, 0, PROMPT, BODY)
    text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
    assert text == PROMPT + BODY
    start = example.input_ids[: example.num_prompt_tokens]
    assert start == prompt_ids(tokenizer, PROMPT)
    assert continuation_text(tokenizer, start, example.input_ids[len(start) : -1]) == BODY
    if not merges:
        assert example.input_ids[:-1] == tokenizer(PROMPT + BODY)["input_ids"]


@pytest.mark.parametrize("text", ["<s>old</s> price", "x = '<pad>'", "<extra_id_0>", "close with </s>", "é</s>"])
def test_bytes_take_special_tokens_in_a_text_as_text(text):
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert prompt_ids(tokenizer, text) == ids


def test_an_end_token_in_the_prompt_itself_stays():
    tokenizer = llama_like()
    assert prompt_ids(tokenizer, "d</s>")[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_end_token_serves_text_and_refuses_examples(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / "t.txt").write_text("a b " * 99)
    data = TextData(str(tmp_path / "t.txt"), tokenizer=str(tmp_path), block_size=8)
    data.setup()
    assert next(iter(data.train_dataloader()))["input_ids"].tolist()[0] == [0, 1] * 4
    with pytest.raises(MisconfigurationException, match=r"has no end token \(`eos_token`\)"):
        encode_example(data.tokenizer, 0, "a", "b")
