"""Text quality: each metric beside a slow and obvious version or a library, its properties, and what it refuses."""
import json, math, os, random, re, subprocess, sys
from collections import Counter
from itertools import product
from statistics import fmean, median

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from textgen import quality
from textgen.core import REGISTRY, UsageError
from textgen.corpus import nats, stories
from textgen.quality import (NotGiven, bleu, chrf, distinct, features, grammar, lengths, loop, mauve, measure, rep,
                             repetition, self_bleu, zipf, zipf_exponent)
from textgen.tokenizer import CharTokenizer

TRUE = stories(40, seed=1)
OTHERS = stories(40, seed=2)
WORDS = st.lists(st.sampled_from(["a", "b", "kite.", "Über", "drum"]), min_size=1, max_size=12).map(" ".join)
TEXTS = st.lists(WORDS, min_size=2, max_size=6)
CHARACTERS = st.lists(st.text("ab \n", min_size=1, max_size=24), min_size=1, max_size=4)
few = settings(max_examples=60, deadline=None, derandomize=True)


# BLEU and chrF

def slow_bleu(samples, references):
    "Papineni et al. 2002 without smoothing, words between spaces."
    runs = lambda text, n: Counter(zip(*(text.split()[i:] for i in range(n))))
    logs = []
    for n in range(1, 5):
        own = [runs(text, n) for text in samples]
        right = sum((one & runs(text, n)).total() for one, text in zip(own, references))
        logs.append(math.log(right / sum(one.total() for one in own)))
    s, r = (sum(len(text.split()) for text in texts) for texts in (samples, references))
    return 100 * min(1, math.exp(1 - r / s)) * math.exp(fmean(logs))


def slow_chrf(samples, references):
    "Popović 2015: precision and recall averaged over orders 1 to 6, recall twice as important, spaces left out."
    runs = lambda text, n: Counter(text[i:i + n] for i in range(len(text) - n + 1))
    tight = lambda text: "".join(text.split())
    shares = []
    for n in range(1, 7):
        pairs = [(runs(tight(a), n), runs(tight(b), n)) for a, b in zip(samples, references)]
        right = sum((a & b).total() for a, b in pairs)
        shares.append((right / sum(a.total() for a, _ in pairs), right / sum(b.total() for _, b in pairs)))
    precision, recall = (fmean(column) for column in zip(*shares))
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_bleu_and_chrf_beside_slow_versions():
    spaced = [re.sub(r"([.,!\"])", r" \1 ", text) for text in TRUE + OTHERS]  # as sacreBLEU cuts words
    found = bleu(TRUE, OTHERS)
    assert math.isclose(found["bleu"], slow_bleu(spaced[:40], spaced[40:]), rel_tol=1e-9)
    assert re.fullmatch(r"nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:[\d.]+", found["bleu signature"])
    found = chrf(TRUE, OTHERS)
    assert math.isclose(found["chrf"], slow_chrf(TRUE, OTHERS), rel_tol=1e-9)
    assert re.fullmatch(r"nrefs:1\|case:mixed\|eff:yes\|nc:6\|nw:0\|space:no\|version:[\d.]+", found["chrf signature"])


@pytest.mark.parametrize("metric", [bleu, chrf], ids=["bleu", "chrf"])
def test_identical_and_foreign(metric):
    name = metric.__name__
    assert math.isclose(metric(TRUE, TRUE)[name], 100)
    assert metric(["xyz"] * 40, TRUE)[name] < 1
    assert metric(TRUE, OTHERS)[name] == pytest.approx(metric(TRUE[::-1], OTHERS[::-1])[name])  # the order of pairs says nothing
    shuffled = [" ".join(random.Random(0).sample(text.split(), len(text.split()))) for text in TRUE]
    assert metric(shuffled, TRUE)[name] < 100


def test_a_hundred_texts_with_spaced_dots_are_no_remark(capfd, caplog):
    bleu(["a kite ."] * 120, ["a drum ."] * 120), self_bleu(["a kite ."] * 120)
    assert capfd.readouterr() == ("", "") and not caplog.records


@few
@given(TEXTS)
def test_self_bleu_beside_sacrebleu(texts):
    from sacrebleu.metrics import BLEU
    metric = BLEU(effective_order=True)
    each = [metric.sentence_score(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts)]
    found = self_bleu(texts)
    assert found["self-bleu"] == pytest.approx(fmean(each), abs=1e-9)
    assert found["self-bleu signature"] == str(metric.get_signature())


def test_self_bleu_of_stories():
    from sacrebleu.metrics import BLEU
    each = [BLEU(effective_order=True).sentence_score(text, TRUE[:i] + TRUE[i + 1:]).score for i, text in enumerate(TRUE)]
    assert math.isclose(self_bleu(TRUE)["self-bleu"], fmean(each))
    assert math.isclose(self_bleu(TRUE[:1] * 9)["self-bleu"], 100)
    assert self_bleu(["a b c d", "e f g h"])["self-bleu"] < 20


# Runs and loops

def slow_runs(text, n):
    words = text.split()
    return [tuple(words[i:i + n]) for i in range(len(words)) if i + n <= len(words)]


@few
@given(TEXTS)
def test_distinct_and_repeated_beside_slow_versions(texts):
    together, within = distinct(texts), repetition(texts)
    for n in range(1, 5):
        every = [run for text in texts for run in slow_runs(text, n)]
        shares = [1 - len(set(runs)) / len(runs) for text in texts if (runs := slow_runs(text, n))]
        assert together.get(f"distinct-{n}") == (len(set(every)) / len(every) if every else None)
        assert within.get(f"rep-{n}") == (pytest.approx(fmean(shares)) if shares else None)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_one_word(count):
    found = distinct(["kite " * count])
    assert found["distinct-1"] == 1 / count and found.get("distinct-4") == (1 / (count - 3) if count > 3 else None)
    assert rep([["kite"] * count], 1) == pytest.approx(1 - 1 / count)
    assert distinct(["kite"] * count)["distinct-1"] == 1 / count and repetition(["kite"] * count)["rep-1"] == 0


def test_tokens_instead_of_words():
    tokenizer = CharTokenizer.train(["abc "])
    assert distinct(["abca", "b"], tokenizer=tokenizer)["distinct-1"] == 3 / 5
    assert repetition(["aab"], tokenizer=tokenizer)["rep-1"] == pytest.approx(1 / 3)
    assert zipf(["aab"], tokenizer=tokenizer)["zipf exponent"] == pytest.approx(1)  # 2 and 1: twice as often
    assert lengths(["ab c"], tokenizer=tokenizer)["tokens mean"] == 4


def slow_loop(text):
    "The longest stretch of a text with a period that it holds twice: its length, or 0."
    stretches = [end - begin for begin, end in product(range(len(text)), range(len(text) + 1)) for period in range(1, (end - begin) // 2 + 1)
                 if text[begin + period:end] == text[begin:end - period]]
    return max(stretches, default=0)


@few
@given(CHARACTERS)
def test_loop_beside_slow_version(texts):
    found = loop(texts)
    assert found.get("longest loop", 0) == max(map(slow_loop, texts))
    if found:
        period, length, sample = found["loop text"], found["longest loop"], texts[found["loop sample"]]
        assert len(period) == found["loop period"] <= length / 2
        assert (period * length)[:length] in sample
        assert not any((period[:p] * length)[:length] == (period * length)[:length] for p in range(1, len(period)))  # the shortest


@pytest.mark.parametrize("period, times, place", [(1, 2, 0), (7, 40, 1), (99, 3, 2), (400, 2, 0), (13, 75, 2),
                                                  *[(period, 2, 1) for period in range(16, 240, 16)]])
def test_a_planted_loop_is_found(period, times, place):
    rng = random.Random(period)
    noise = lambda count: "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(count))
    part, texts = noise(period), [noise(1000) for _ in range(3)]
    texts[place] = noise(rng.randrange(50)) + part * times + part[:period // 2] + noise(50)
    assert loop(texts) == {"longest loop": period * times + period // 2, "loop period": period, "loop sample": place, "loop text": part}


def test_loops_do_not_cross_texts():
    assert loop(["ab", "ab", "ab"]) == {} == loop(["a"]) and repetition(["ab", "ab"])["longest loop"] == 0
    assert loop(["\ud800\ud800", "x"])["longest loop"] == 2  # half of a character, as a broken file may have
    assert loop(["x\U0010ffff", "\U0010ffff" * 3]) == {"longest loop": 3, "loop period": 1, "loop sample": 1, "loop text": "\U0010ffff"}


# Zipf's law, lengths

@pytest.mark.parametrize("s", [0.5, 1.0, 1.5])
def test_zipf_finds_the_exponent_and_is_likeliest(s):
    ranks = np.arange(1, 501)
    assert zipf_exponent(1e6 * ranks ** -s) == pytest.approx(s, abs=1e-9)
    counts = np.sort(np.random.default_rng(1).multinomial(20_000, ranks ** -s / (ranks ** -s).sum()))[::-1]
    counts = counts[counts > 0]
    logs = np.log(np.arange(1, len(counts) + 1))
    likelihood = lambda s: -s * counts @ logs - counts.sum() * np.log(np.exp(-s * logs).sum())
    best = zipf_exponent(counts)
    assert best == pytest.approx(s, abs=0.05) and likelihood(best) > max(likelihood(best - 1e-3), likelihood(best + 1e-3))


@few
@given(TEXTS.filter(lambda texts: len({*" ".join(texts).split()}) > 1))
def test_zipf_knows_no_order(texts):
    words = " ".join(texts).split()
    assert zipf(texts) == zipf([" ".join(sorted(words))]) and zipf(texts)["zipf ranks"] == len({*words})
    assert zipf(texts)["zipf exponent"] >= 0


@few
@given(TEXTS)
def test_lengths(texts):
    sizes = [len(text.split()) for text in texts]
    found = lengths(texts)
    assert [found[f"words {way}"] for way in ("mean", "median", "min", "max")] == [fmean(sizes), median(sizes), min(sizes), max(sizes)]
    assert found["characters max"] == max(map(len, texts)) and len(found) == 8


# The grammar

def test_grammar_accepts_stories_only():
    assert grammar(TRUE) == {"grammar accepted": 1.0, "grammar lines": 40}
    assert grammar(["".join(TRUE), "no story\n\n"]) == {"grammar accepted": 40 / 41, "grammar lines": 41}
    assert grammar([TRUE[0].strip()])["grammar accepted"] == 1 and grammar([TRUE[0][:-9]])["grammar accepted"] == 0
    assert grammar([TRUE[0].replace(".", "!", 1)])["grammar accepted"] == 0


def test_exact_excess():
    floor = [nats(text) for text in OTHERS]
    found = grammar(TRUE, OTHERS, nats=[size + 3 for size in floor])
    characters = sum(map(len, OTHERS))
    assert found["floor nats/char"] == pytest.approx(sum(floor) / characters)
    assert found["excess nats/char"] == pytest.approx(3 * 40 / characters) and found["excess error nats/char"] == pytest.approx(0, abs=1e-9)
    assert found["model nats/char"] == pytest.approx(found["floor nats/char"] + found["excess nats/char"])


# MAUVE

@pytest.fixture(scope="module")
def reader(one_thread):
    "A small decoder with random weights."
    import torch
    from textgen.decoder import Decoder, DecoderConfig
    from textgen.gpt import GPT
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(TRUE)
    return GPT(Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=96, n_embd=32, n_layer=1, n_head=2)).eval(), tokenizer)


def test_features_are_those_of_each_text_alone(reader):
    import torch
    rows = [reader.tokenizer.encode(text)[:96] for text in TRUE[:5] + ["A kite"]]
    with torch.inference_mode():
        slow = np.stack([reader.decoder.transformer(torch.tensor([row]))[0].mean(0).numpy() for row in rows])
    np.testing.assert_allclose(features(reader, TRUE[:5] + ["A kite"], batch_size=4), slow, atol=1e-5)


def test_features_of_a_model_of_transformers(reader):
    import torch, transformers
    from textgen.hf import HF
    for config in (transformers.GPT2Config(vocab_size=reader.vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=64),
                   transformers.LlamaConfig(vocab_size=reader.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                            intermediate_size=64, max_position_embeddings=64)):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.tensor([reader.tokenizer.encode(TRUE[0])[:64]])
        with torch.inference_mode():
            last = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0).numpy()
        found = features(HF(model, reader.tokenizer), [TRUE[0], "A kite"])
        np.testing.assert_allclose(found[0], last, atol=1e-5)


def test_features_leave_a_prefix_out(reader):
    import torch
    from textgen.gpt import GPT
    class Prefixed:
        prefix = (3,)
        vocab_size, eos_id = reader.tokenizer.vocab_size, None
        encode_batch = staticmethod(reader.tokenizer.encode_batch)
    row = [3, *reader.tokenizer.encode("A kite")]
    with torch.inference_mode():
        slow = reader.decoder.transformer(torch.tensor([row]))[0, 1:].mean(0).numpy()
    np.testing.assert_allclose(features(GPT(reader.decoder, Prefixed()), ["A kite"])[0], slow, atol=1e-5)


def test_mauve_beside_the_library_and_silent(reader, capfd):
    from mauve import compute_mauve
    found = mauve(TRUE, OTHERS, model=reader)
    assert capfd.readouterr() == ("", "")
    theirs = compute_mauve(features(reader, OTHERS), features(reader, TRUE), seed=25)
    assert found["mauve"] == pytest.approx(theirs.mauve) and 0 < found["mauve"] <= 1 + 1e-9
    assert found == mauve(TRUE, OTHERS, model=reader)
    assert re.fullmatch(r"features:mean\|dim:32\|buckets:4\|seed:25\|version:[\d.]+", found["mauve signature"])
    other = mauve(TRUE, OTHERS, model=reader, seed=7)
    theirs = compute_mauve(features(reader, OTHERS), features(reader, TRUE), seed=7)
    assert "seed:7" in other["mauve signature"] and other["mauve"] == pytest.approx(theirs.mauve) != found["mauve"]


def test_mauve_of_the_same_and_of_others(reader):
    assert mauve(TRUE, TRUE, model=reader)["mauve"] == pytest.approx(1)
    assert mauve(["a"] * 20, ["a"] * 30, model=reader)["mauve"] == 1  # the library's area is 0.75 here
    shuffled = [" ".join(sorted(text.split())) for text in TRUE]
    assert mauve(["a"] * 40, OTHERS, model=reader)["mauve"] < 0.1 < mauve(TRUE, OTHERS, model=reader)["mauve"]
    assert mauve(shuffled, OTHERS, model=reader)["mauve"] < mauve(TRUE, OTHERS, model=reader)["mauve"]


def test_mauve_opens_a_directory(reader, tmp_path):
    reader.save(tmp_path/"model")
    for place in (tmp_path/"model", str(tmp_path/"model")):
        assert mauve(TRUE, OTHERS, model=place)["mauve"] == pytest.approx(mauve(TRUE, OTHERS, model=reader)["mauve"])
    with pytest.raises(UsageError, match="no model in"): mauve(TRUE, OTHERS, model=tmp_path/"nothing")


# All of them

def test_measure_is_what_the_metrics_say():
    names = ["bleu", "chrf", "self-bleu", "distinct", "repetition", "zipf", "lengths", "grammar"]
    every = {}
    for metric in (bleu, chrf, self_bleu, distinct, repetition, zipf, lengths, grammar): every |= metric(TRUE, OTHERS)
    assert measure(TRUE, OTHERS, names) == every
    assert {**measure(TRUE, OTHERS), "not measured": ""} == {**every, "not measured": ""}
    assert json.loads(json.dumps(every)) == every
    assert measure(TRUE, metrics="zipf") == zipf(TRUE)


def test_what_is_lacking_is_left_out_and_said():
    assert measure(TRUE, OTHERS)["not measured"].startswith("mauve: a model's hidden states place the texts; give one as model=; originality: ")
    left_out = measure(["kite"])["not measured"]
    assert [part.split(":")[0] for part in left_out.split("; ") if ":" in part] == ["bleu", "chrf", "zipf", "self-bleu", "mauve", "originality"]
    for name in ("bleu", "self-bleu", "zipf", "mauve"):
        with pytest.raises(NotGiven, match=f"^{name}: .*; give "): measure(["kite"], metrics=[name])


def test_options_reach_those_that_know_them(reader):
    assert measure(TRUE, OTHERS, ["mauve", "zipf"], model=reader) == mauve(TRUE, OTHERS, model=reader) | zipf(TRUE)
    assert measure(TRUE, metrics=["distinct", "grammar"], tokenizer=reader.tokenizer) == \
        distinct(TRUE, tokenizer=reader.tokenizer) | grammar(TRUE)
    with pytest.raises(UsageError, match="there is no option 'tokeniser'; did you mean 'tokenizer'"): measure(TRUE, tokeniser=1)
    with pytest.raises(UsageError, match="grammar, lengths: there is no option 'model'"): measure(TRUE, metrics=["grammar", "lengths"], model=reader)


# What is refused

PAIRED = [bleu, chrf]
ALONE = [self_bleu, distinct, repetition, zipf, lengths, grammar]


@pytest.mark.parametrize("metric", PAIRED + ALONE + [mauve, measure], ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("samples, said", [
    (["a b", "", "c"], "sample 1, counted from 0, is empty; leave"),
    (["a b", " \n", "\t"], "sample 1, counted from 0, is empty, and 1 more;"),
    ([], "there are no samples"),
    ("a b", "samples: give a list of strings"),
    (["a b", None], "samples: give a list of strings"),
    (iter(["a b"]), "samples: give a list of strings"),
])
def test_bad_samples(metric, samples, said):
    with pytest.raises(UsageError, match=said) as caught: metric(samples, ["a", "b", "c"])
    assert "\n" not in str(caught.value) and type(caught.value) is UsageError


@pytest.mark.parametrize("metric", PAIRED + [grammar, mauve, measure], ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("references, said", [
    (["a", ""], "reference 1, counted from 0, is empty;"),
    ([], "there are no references"),
    ("a b", "references: give a list of strings"),
    ([b"a", b"b"], "references: give a list of strings"),
])
def test_bad_references(metric, references, said):
    with pytest.raises(UsageError, match=said) as caught: metric(["a b", "c d"], references)
    assert "\n" not in str(caught.value) and type(caught.value) is UsageError


@pytest.mark.parametrize("metric", PAIRED + [measure], ids=lambda metric: metric.__name__)
def test_unequal_counts(metric):
    with pytest.raises(UsageError, match="there are 3 samples and 2 references$"): metric(["a"] * 3, ["a"] * 2)


def test_unequal_counts_are_fine_where_nothing_is_paired(reader):
    assert measure(TRUE, OTHERS[:30], ["mauve", "lengths"], model=reader)["mauve"] > 0


def test_unknown_metrics_are_listed():
    with pytest.raises(UsageError, match="unknown metric 'blue'; did you mean 'bleu'"): measure(TRUE, metrics=["blue"])
    with pytest.raises(UsageError, match="choose from bleu, chrf, distinct, grammar, lengths, mauve, originality, repetition, self-bleu, zipf"):
        measure(TRUE, metrics=["perplexity"])


@pytest.mark.parametrize("wrong, said", [
    (dict(nats=[1.0]), "surprise at each of the references, and there are 1 of 0 references"),
    (dict(references=OTHERS, nats=[1.0]), "there are 1 of 40 references"),
    (dict(references=["Once"], nats=[1.0]), "text 0 is no story"),
])
def test_nats_without_their_stories(wrong, said):
    with pytest.raises(UsageError, match=said): grammar(TRUE, **wrong)


def test_mauve_refuses(reader):
    with pytest.raises(NotGiven, match="at least 20 samples and references, not 19"): mauve(TRUE[:19], OTHERS, model=reader)
    with pytest.raises(NotGiven, match="model="): mauve(TRUE, OTHERS)
    with pytest.raises(NotGiven, match="no references"): mauve(TRUE, model=reader)
    with pytest.raises(UsageError, match="object shows no hidden states"): mauve(TRUE, OTHERS, model=object())


@pytest.mark.parametrize("module, extra, name", [("sacrebleu.metrics", "eval", "bleu"), ("sacrebleu.metrics", "eval", "chrf"),
                                                 ("sacrebleu.metrics", "eval", "self-bleu"), ("mauve", "mauve", "mauve")])
def test_a_missing_package(monkeypatch, reader, module, extra, name):
    monkeypatch.setitem(sys.modules, module, None)
    said = re.escape(f'{name}: the package {module.partition(".")[0]} is not installed; pip install "textgen[{extra}]"')
    options = {"model": reader} if name == "mauve" else {}
    with pytest.raises(NotGiven, match=f"^{said}$"): measure(TRUE, OTHERS, [name], **options)
    found = measure(TRUE, OTHERS, model=reader)
    assert name not in found and re.search(said, found["not measured"]) and "distinct-1" in found


# Other packages

@pytest.fixture
def shouting(tmp_path, monkeypatch):
    "An installed distribution with a metric of its own."
    info = tmp_path/"shouting-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info/"entry_points.txt").write_text("[textgen.metrics]\nshouting = shouting_metric:measure\n")
    (tmp_path/"shouting_metric.py").write_text(
        "def measure(samples, references=None, **options):\n"
        "    return {'shouting': sum(text.isupper() for text in samples) / len(samples), 'loudness': options.get('loudness', 'none')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("shouting_metric", None)


def test_a_metric_by_entry_point(shouting):
    assert measure(["A KITE", "a kite"], metrics=["shouting"]) == {"shouting": 0.5, "loudness": "none"}
    assert measure(["A KITE"], metrics="shouting", loudness="11")["loudness"] == "11"
    assert measure(["A KITE", "a kite"])["shouting"] == 0.5  # and with all the others
    with pytest.raises(UsageError, match="choose from .*shouting"): measure(TRUE, metrics=["?"])


def test_every_name_stands_for_a_metric():
    for name, target in REGISTRY["metrics"].items():
        module, _, attribute = target.partition(":")
        if name == "originality": assert module == "textgen.originality"
        else: assert module == "textgen.quality" and attribute == name.replace("-", "_") and callable(getattr(quality, attribute))


def test_measuring_words_loads_no_framework():
    code = ("import sys; from textgen.quality import measure; measure(['a kite', 'a drum'], ['a kite', 'a drum']); "
            "print(*(name for name in ['torch', 'transformers', 'mauve', 'faiss'] if name in sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_texts_without_a_word_that_bleu_knows():
    assert self_bleu(["<skipped>", "a kite", "<skipped> "])["self-bleu"] == 0 == bleu(["<skipped>"], ["a kite"])["bleu"]
