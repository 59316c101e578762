"""What chapter 09b cannot check with a few examples: the suffix array against the slow obvious search, borders, bytes, long copies, real text."""
import itertools, json, random, sys
from pathlib import Path

import pytest
from conftest import KNOWN, needs_known
from hypothesis import example, given, settings, strategies as st

from textgen import originality as chapter
from textgen.core import UsageError, resolve
from textgen.data import prepare
from textgen.originality import AROUND, TrainingText, furthest, marked, origin, originality, originality_metric, stretches
from textgen.sources import documents, read_source

RESULTS = Path(__file__).resolve().parent.parent/"nbs/results/originality.json"
ALPHABETS = ["ab", "abc", "aé👩", "éèê", "\n a", "\x00\x01\x7f\x80\xff", "a\ud800\udfff"]  # of one to four bytes; what UTF-8 shares; halves of UTF-16
LETTERS = st.sampled_from(ALPHABETS).flatmap(lambda letters: st.tuples(st.lists(st.text(letters, max_size=12), min_size=1, max_size=4), st.text(letters + "z", max_size=14)))
MANY = settings(deadline=None, derandomize=True, database=None, max_examples=400)


def slow_pieces(sample, training):
    n = len(sample)
    return {(i, j) for i, j in itertools.combinations(range(n + 1), 2) if any(sample[i:j] in document for document in training)}


def occurrences(piece, training): return [(k, i) for k, document in enumerate(training) for i in range(len(document)) if document.startswith(piece, i)]


@MANY
@given(LETTERS, st.integers(1, 6))
@example((["ab", "ba"], "abba"), 1)
@example((["aaa"], "aaaaaaaa"), 3)
@example((["é"], "è"), 1)  # they share their first byte
@example((["ë", "👩"], "ë👩"), 2)
def test_as_the_slow_search(both, least):
    training, sample = both
    if not any(training): training = [*training, "q"]
    index, pieces = TrainingText(training), slow_pieces(sample, training)
    matches = sorted((i, j) for i, j in pieces if (i - 1, j) not in pieces and (i, j + 1) not in pieces)
    assert index.matches(sample) == matches
    assert index.matches(sample, least) == [(i, j) for i, j in matches if j - i >= least]
    found = index.longest(sample)
    if not pieces:
        assert found == chapter.Overlap(0, "", 0)
        return
    start, end = min(pieces, key=lambda piece: (piece[0] - piece[1], piece[0]))  # the longest; the first of several
    places = occurrences(sample[start:end], training)
    assert (found.start, found.text, found.count) == (start, sample[start:end], len(places))
    assert (found.document, found.offset) == places[0]
    report = originality([sample], index, least)
    covered = {place for i, j in pieces if j - i >= least for place in range(i, j)}
    assert {place for begin, end in report.samples[0].stretches for place in range(begin, end)} == covered
    assert report.samples[0].copied == pytest.approx(len(covered) / len(sample)) and report.samples[0].share == found.length / len(sample)


@MANY
@given(LETTERS)
def test_marks_take_nothing_away(both):
    training, sample = both
    parts = stretches(TrainingText([*training, "q"]).matches(sample, 2))
    assert marked(sample, parts).replace("⟦", "").replace("⟧", "") == sample and marked(sample, parts).count("⟦") == len(parts)
    assert all(before[1] < after[0] for before, after in zip(parts, parts[1:]))


@MANY
@given(st.tuples(*[st.integers(0, 50)] * 3))
def test_furthest(three):
    low, true, high = sorted(three)
    assert furthest(lambda x: x <= true, low, high) == true


def test_borders():
    "No overlap reaches from one document into another, and one that fills a document ends with it."
    index = TrainingText(["one two", "", " three", "one two"])
    assert index.longest("one two three").text == "one two" and index.longest("two three").text == " three"
    found = index.longest("one two")
    assert (found.document, found.offset, found.count, found.before, found.after) == (0, 0, 2, "", "")
    assert [index.longest(text).document for text in (" three", "e t")] == [2, 0]
    assert index.matches("one two three") == [(0, 7), (7, 13)] and TrainingText(["one two three"]).matches("one two three") == [(0, 13)]


@pytest.mark.parametrize("letter", ["a", "é", "€", "👩"])
def test_characters_not_bytes(letter):
    "Places and lengths are in characters, however many bytes each has; surroundings hold none that is cut."
    document = letter * 100 + "copied" + letter * 99
    found = TrainingText(["é", document]).longest("...copied...")
    assert (found.start, found.length, found.document, found.offset) == (3, 6, 1, 100)
    assert (found.before, found.after) == (letter * AROUND, letter * AROUND)
    found = TrainingText(["é", document]).longest(document)
    assert (found.length, found.offset, found.before, found.after) == (205, 0, "", "")


def test_sizes():
    "A sample longer than all training text; a sample that is a document; one that shares nothing."
    index = TrainingText(["abc"])
    assert index.longest("xxabcabcxx" * 3) == chapter.Overlap(2, "abc", 1, 0, 0)
    report = originality(["abc", "xyz", "zab"], index, least=2)
    assert [one.share for one in report.samples] == [1, 0, 2 / 3] and [one.copied for one in report.samples] == [1, 0, 2 / 3]
    assert report.figures() == {"median overlap characters": 2, "longest overlap characters": 3, "median share %": pytest.approx(200 / 3),
                                "copied %": pytest.approx(500 / 9), "wholly copied %": pytest.approx(100 / 3)}
    assert str(report.samples[1].overlap) == "nothing of it" and report.samples[1].overlap.document is None


def test_the_same_twice():
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcd", k=300)) for _ in range(20)]
    assert originality(texts[:5], texts[5:]) == originality(iter(texts[:5]), iter(texts[5:])) == originality(texts[:5], TrainingText(texts[5:]))


@pytest.mark.parametrize("sample, most", [("a" * 100_000, 100), ("ab" * 50_000, 100), ("a" * 50_000 + "ba" * 25_000, 200), ("abc" * 2_000, 4 * 6_000)])
def test_long_copies_take_few_questions(sample, most):
    "What is copied at length is not asked for again at each of its characters; what is not takes some questions for each."
    index, asked = TrainingText(["a" * 120_000, "ab" * 60_000, "c"]), []
    search = index.search
    index.search = lambda *arguments: asked.append(1) or search(*arguments)
    found = index.matches(sample)
    assert len(asked) < most
    asked.clear()
    assert index.longest(sample).length == max(j - i for i, j in found) and len(asked) < most
    asked.clear()
    assert index.matches(sample, 50) == [(i, j) for i, j in found if j - i >= 50] and len(asked) < most


def test_any_corpus(tmp_path):
    "A corpus as it comes and the same one prepared give one report."
    settings = dict(train=40, validation=5)
    source, prepared = read_source("stories", tmp_path, **settings), prepare("stories", "char", tmp_path, **settings)
    held = list(documents(source.blocks("validation")))
    report = originality(held, documents(source.blocks("train")))
    assert report.figures() == originality(held, prepared.texts("train")).figures()
    assert 0 < report.figures()["median share %"] < 100
    own = originality(prepared.texts("train")[:3], prepared.texts("train")).samples
    assert [(one.share, one.overlap.offset) for one in own] == [(1, 0)] * 3


def test_summary_is_short():
    "However long an overlap is, its line is not; a line end in it does not break the line."
    lines = originality(["a\n" * 1000], ["a\n" * 1000]).summary()
    assert all(len(line) < 300 and "\n" not in line for line in lines) and "1,000 characters" not in lines[2] and "2,000 characters" in lines[2]


def test_metric():
    metric = resolve("metrics", "originality")
    training, samples, held = ["the cat sat on the mat"], ["the cat sat", "a dog"], ["mat and dog"]
    figures = metric(samples, training=training, least=5)
    assert metric is originality_metric and figures == originality(samples, training, least=5).figures()
    both = metric(samples, references=held, training=TrainingText(training), least=5)
    assert both == figures | {f"references: {name}": value for name, value in originality(held, training, least=5).figures().items()}
    assert all(type(value) in (int, float) for value in both.values()) and json.loads(json.dumps(both)) == both


@pytest.mark.parametrize("said, call", [
    ("there are no samples", lambda: originality([], ["a"])),
    ("sample 1 is empty", lambda: originality(["a", ""], ["a"])),
    ("samples is of type str", lambda: originality("a", ["a"])),
    ("samples is of type NoneType", lambda: originality(None, ["a"])),
    ("sample 0 is of type bytes", lambda: originality([b"a"], ["a"])),
    ("least must be 1", lambda: originality(["a"], ["a"], least=0)),
    ("training text is empty", lambda: TrainingText([])),
    ("training text is empty", lambda: TrainingText(["", ""])),
    ("the training text is of type str", lambda: TrainingText("abc")),
    ("the training text is of type NoneType", lambda: originality(["a"], None)),
    ("document 2 is of type NoneType", lambda: TrainingText(["a", "b", None])),
    ("give them as training", lambda: originality_metric(["a"])),
    ("there are no samples", lambda: originality_metric(["a"], references=[], training=["a"])),
    ("the sample is of type int", lambda: TrainingText(["a"]).longest(3)),
    ("the text is of type int", lambda: origin(TrainingText(["a"]), 3)),
])
def test_bad_input(said, call):
    with pytest.raises(UsageError) as error: call()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_too_long(monkeypatch):
    "The limit is that of all bytes with the borders between documents; nothing is read beyond it."
    monkeypatch.setattr(chapter, "MOST", 9)
    assert TrainingText(["é" * 2, "abc"]).longest("abc").document == 1
    read = []
    with pytest.raises(UsageError, match="longer than 9 bytes"): TrainingText(read.append(text) or text for text in ["é" * 2, "abcd", "more"])
    assert read == ["é" * 2, "abcd"]


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UsageError, match=r'pip install "textgen\[eval\]"'): originality(["a"], ["a"])


@needs_known
def test_wikitext():
    "In 10 MB of real text: what is found is there, and nothing longer is, says a plain search."
    folder = Path(KNOWN, "wikitext-2-raw")
    train, test = ((folder/f"wiki.{name}.raw").read_text(encoding="utf-8") for name in ("train", "test"))
    lines, index = train.split("\n"), TrainingText(train.split("\n"))
    chance = random.Random(0)
    for sample in [test[i : i + 200] for i in (chance.randrange(len(test)) for _ in range(4))]:
        found = index.longest(sample)
        assert lines[found.document][found.offset :].startswith(found.text) and sample[found.start :].startswith(found.text)
        assert found.count == sum(train.startswith(found.text, i) for i in places(found.text, train))
        longer = {sample[i : i + found.length + 1] for i in range(len(sample) - found.length)}
        assert not [piece for piece in longer if piece in train and "\n" not in piece]
    copy = max(lines, key=len)
    found = originality([copy], index).samples[0]
    assert found.share == found.copied == 1 and lines[found.overlap.document] == copy


def places(piece, text):
    "Where a piece is in a text, overlapping or not."
    place = text.find(piece)
    while place >= 0:
        yield place
        place = text.find(piece, place + 1)


def test_figures_within_their_bounds():
    "The stored figures of a report on 100 samples and 10 MB of training text: under 10 s and 1 GB; 100 MB in seconds."
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    small, large = (measured[size]["ways"]["suffix array of the training text"] for size in ("10 MB", "100 MB"))
    assert measured["samples"] == 100 and measured["10 MB"]["text MB"] > 10 and small["s"] < 10 and small["peak MB"] < 1000
    assert measured["100 MB"]["text MB"] > 98 and large["s"] < 60 and large["peak MB"] < 1000
