"""Evaluation against slow definitions, against transformers and lm-eval, and at the command line."""
import json, logging, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import textgen
from textgen.cli import main
from textgen.core import UsageError
from textgen.corpus import stories
from textgen.decoder import Decoder, DecoderConfig
from textgen.evaluate import (FIGURES, PROTOCOLS, Evaluation, Protocol, detokenized, evaluate, find_protocol, held_out, interval, pages, paired,
                              settled, sizes, token_surprises)
from textgen.generator import Judge
from textgen.gpt import GPT
from textgen.harness import continuations, harness_model, rolling, settings_of, write_until
from textgen.tokenizer import BPETokenizer, CharTokenizer

from conftest import KNOWN, needs_known

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
TEXTS = stories(30, seed=5)


def made(eos=None, L=24, seed=0):
    "A decoder of random weights, large enough to be of two minds."
    torch.manual_seed(seed)
    tokenizer = BPETokenizer.train(TEXTS, 300, eos_token=eos)
    decoder = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=L, n_embd=16, n_layer=2, n_head=2))
    with torch.no_grad():
        for weight in decoder.parameters(): weight.mul_(3)
    return GPT(decoder, tokenizer)


@pytest.fixture(scope="module")
def model(): return made("<|endoftext|>")


@pytest.fixture(scope="module")
def blind(): return made()  # nothing to begin a text with


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    "Two models and a text, as a user has them."
    where = tmp_path_factory.mktemp("evaluate")
    model.save(where/"one")
    made("<|endoftext|>", seed=1).save(where/"two")
    (where/"text.txt").write_text("".join(TEXTS))
    return where


# By definition

def slow(model, texts, protocol):
    "Nats of every token that a protocol asks for, one prediction at a time."
    begin, c = [] if model.start_id is None else [model.start_id], protocol
    rows = [[*begin, *model.tokenizer.encode(detokenized(text) if c.detokenizer else text)] for text in texts]
    if c.unit == "text": rows = [[*begin, *(i for row in rows for i in row[len(begin):])]]
    nats = []
    for row in rows:
        for t in range(1, len(row)):
            # the first window that scores token t: it begins at a multiple of the stride, or is the full last one
            start = 0 if t <= c.context else -(-(t - c.context)//c.stride)*c.stride
            if c.full and start and start + c.context > len(row) - 1: start = len(row) - 1 - c.context
            with torch.no_grad(): logits = model.decoder(torch.tensor([row[start:t]]))[0, -1]
            nats.append(-logits.log_softmax(-1)[row[t]].item())
    return sum(nats), len(nats)


@pytest.mark.parametrize("name", ["token", "sliding", "word", "byte", "char"])
@pytest.mark.parametrize("texts", [TEXTS[:4], ["".join(TEXTS[:3])], ["a", "", "bc"]], ids=["stories", "longer than the context", "short"])
def test_every_protocol_by_its_definition(model, blind, name, texts):
    for one in (model, blind):
        found, protocol = evaluate(one, texts, name), settled(PROTOCOLS[name], one)
        nats, count = slow(one, [text for text in texts if text], protocol)
        assert found.nats.sum() == pytest.approx(nats, rel=1e-4) and found.sizes["tokens"].sum() == count
        assert found.protocol == protocol and found.protocol.context == 24
        assert found.figure("token") == pytest.approx(math.exp(nats/count), rel=1e-4)


@pytest.mark.parametrize("changes", [dict(context=7), dict(context=9, stride=4), dict(stride=1), dict(context=5, stride=2, full=True),
                                     dict(unit="document", context=10, full=True), dict(context=24, stride=24)])
def test_protocols_of_ones_own(model, changes):
    protocol = settled(find_protocol("token", **changes), model)
    nats, count = slow(model, TEXTS[:3], protocol)
    found = evaluate(model, TEXTS[:3], protocol)
    assert found.nats.sum() == pytest.approx(nats, rel=1e-4) and found.sizes["tokens"].sum() == count


def test_what_a_figure_is_divided_by(model):
    one, text = evaluate(model, TEXTS, "word"), "".join(TEXTS)
    assert [one.sizes[key].sum() for key in ("bytes", "chars")] == [len(text.encode()), len(text)]
    assert one.sizes["words"].sum() == sum(len(re.split(r"\s+", story)) for story in TEXTS)
    nats = one.nats.sum()
    assert one.figure() == pytest.approx(math.exp(nats/one.sizes["words"].sum())) and one.figure("byte") == pytest.approx(nats/len(text)/math.log(2))
    assert [*FIGURES] == ["token", "word", "byte", "char"] and "perplexity" in str(evaluate(model, TEXTS, "token"))


def test_characters_of_many_bytes(model):
    texts = ["Ünïcödé 🙂 ☃ ", "日本語のテキスト。"] * 6
    one = evaluate(model, texts, "char")
    assert one.sizes["bytes"].sum() > one.sizes["chars"].sum() == sum(map(len, texts)) and one.figure("byte") < one.figure("char")


def test_a_text_that_no_model_likes(model):
    "The perplexity of the impossible is large and not an error."
    hard = Evaluation("", Protocol(), np.full(12, 1e6), {"tokens": np.ones(12)})
    assert hard.figure() == math.exp(700) and interval(hard) == (math.exp(700),)*2


# What others say

def test_the_loss_of_transformers(model, folder):
    from transformers import AutoModelForCausalLM
    theirs, hf = AutoModelForCausalLM.from_pretrained(folder/"one"), textgen.load(f"hf:{folder/'one'}", device="cpu")
    ids = torch.tensor([[model.start_id, *model.tokenizer.encode(TEXTS[0])[:23]]])
    with torch.no_grad(): loss = theirs(input_ids=ids, labels=ids).loss.item()
    for one in (model, hf):
        [nats] = one.surprises(ids.tolist())
        assert nats.mean() == pytest.approx(loss, rel=1e-5)
    assert evaluate(hf, TEXTS, "sliding").nats == pytest.approx(evaluate(model, TEXTS, "sliding").nats, rel=1e-4)


@given(st.text(alphabet="ab =@-,.:;!?()[]{}\"' \n°Ns5/", max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_detokenizer_is_lm_evals(page):
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
    assert detokenized(page) == wikitext_detokenizer({"page": page})
    assert sizes(page)[:2] == (process_results({"page": page}, [0.0])["word_perplexity"][1], len(page.encode()))


@needs_known
def test_wikitext_has_the_pages_of_lm_eval():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    for split, count, words, bytes in [("valid", 60, 214_006, 1_146_785), ("test", 62, 241_335, 1_290_527)]:
        found = pages(Path(KNOWN, f"wikitext-2-raw/wiki.{split}.raw").read_text(encoding="utf-8"))
        assert (len(found), *np.sum([sizes(page)[:2] for page in found], axis=0)) == (count, words, bytes)
        assert all(detokenized(page) == wikitext_detokenizer({"page": page}) for page in found)
    assert pages("no heading\nat all") == [] and pages("") == [] and pages("before\n = A = \nb\n") == ["before", " = A = \nb\n"]


TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {validation: pages.jsonl}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: !function rules.wikitext_detokenizer
process_results: !function rules.process_results
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def by_lm_eval(lm, texts, where):
    "The figures of lm-eval's task `wikitext` on pages at hand."
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    logging.disable(logging.WARNING)
    (where/"pages.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    (where/"rules.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer\n")
    (where/"local.yaml").write_text(TASK)
    before = os.getcwd()
    os.chdir(where)
    try: found = simple_evaluate(lm, tasks=["local"], task_manager=TaskManager(include_path=str(where), include_defaults=False), verbosity="ERROR")
    finally: os.chdir(before); logging.disable(logging.NOTSET)
    return {name: found["results"]["local"][f"{name},none"] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets.config
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")


def compare_with_lm_eval(model, path, texts, where):
    from lm_eval.models.huggingface import HFLM
    ours, hf = evaluate(model, texts, "word"), HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=8, add_bos_token=False,
                                                            prefix_token_id=model.start_id)
    told = {"word_perplexity": ours.figure("word"), "byte_perplexity": 2**ours.figure("byte"), "bits_per_byte": ours.figure("byte")}
    for lm in (hf, harness_model()(pretrained=str(path), device="cpu")):
        assert by_lm_eval(lm, texts, where) == pytest.approx(told, rel=1e-6)


@pytest.fixture(scope="module")
def run_of_ours(tmp_path_factory):
    from textgen.recipe import load_recipe
    from textgen.runs import train
    where = tmp_path_factory.mktemp("trained")
    changes = {"tokenizer": "bpe:512", "steps": 20, "length": 32, "batch_size": 4, "device": "cpu", "rows": "chunks", "evaluate_every": 20,
               "data_options": {"train": 300, "validation": 20}, "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2, "model.n_positions": 32,
               "sample.stories": 2, "sample.prompts": 1, "sample.settings": {"max_new_tokens": 5}}
    return train(load_recipe("demo", changes), where/"run", root=where/"data")[0]


def test_lm_eval_agrees_on_a_run_of_ours(run_of_ours, tmp_path, own_cache):
    heads = [f" = Story {n} = \n {text}" for n, text in enumerate(TEXTS)]
    compare_with_lm_eval(textgen.load(run_of_ours, device="cpu"), run_of_ours, heads, tmp_path)


@needs_known
def test_lm_eval_agrees_on_stories260k(tmp_path, own_cache):
    path = Path(KNOWN, "stories260K-hf")
    texts = sorted(pages(Path(KNOWN, "wikitext-2-raw/wiki.valid.raw").read_text(encoding="utf-8")), key=len)[:3]
    compare_with_lm_eval(textgen.load(path, device="cpu"), path, texts, tmp_path)


@needs_known
@pytest.mark.slow
def test_lm_eval_agrees_on_all_of_wikitext(tmp_path, own_cache):
    path = Path(KNOWN, "stories260K-hf")
    texts = pages(Path(KNOWN, "wikitext-2-raw/wiki.valid.raw").read_text(encoding="utf-8"))
    compare_with_lm_eval(textgen.load(path, device="cpu"), path, texts, tmp_path)


def test_the_protocol_word_reads_the_corpus_as_it_comes(model, folder):
    "Rows of the hub, where a blank line is an empty row; the whole file; and pages: all the same."
    text = " \n = One = \n \n Some words , and more . \n \n = = Part = = \n \n More . \n \n = Two = \n \n The end . \n"
    rows = ["" if line.strip() == "" else line for line in text.splitlines(keepends=True)]
    found = [evaluate(model, given, "word") for given in (rows, [text], pages(text))]
    assert len({one.nats.sum() for one in found}) == 1 and len(pages(text)) == 2
    assert found[0].sizes["words"].sum() == sum(sizes(page)[0] for page in pages(text))


# Other models

def test_a_recurrent_model_reads_without_a_limit():
    pytest.importorskip("tensorflow")
    from textgen.lstm import RNNShape, build_network
    from textgen.rnn import RNN, surprises
    tokenizer, shape = CharTokenizer.train(TEXTS), RNNShape(units=12, n_embd=8)
    model = RNN(build_network(shape, tokenizer.vocab_size), shape, tokenizer)
    ids = tokenizer.encode("".join(TEXTS))
    [nats] = surprises(model.network, shape, [ids])
    found = evaluate(model, TEXTS, "token")
    assert found.nats.sum() == pytest.approx(nats.sum(), rel=1e-5) and found.sizes["tokens"].sum() == len(ids) - 1
    assert found.sizes["chars"].sum() == len(ids) - 1  # the first one is given
    windows = evaluate(model, TEXTS, find_protocol("token", context=20, stride=5))
    assert windows.protocol.stride == 5 and windows.nats.sum() != found.nats.sum()
    [[also, places]] = model.surprises([ids[:50]], ranks=True)
    assert np.array_equal(also, model.surprises([ids[:50]])[0]) and places.min() >= 1 and places.max() <= tokenizer.vocab_size


def test_a_masked_model_has_a_pseudo_likelihood_and_no_other():
    from test_masked import tiny
    bert, texts = tiny("bert"), ["the fox sings and the moon", "a cat sleeps ."] * 6
    for name in set(PROTOCOLS) - {"pseudo"}:
        with pytest.raises(UsageError, match="sees both sides of a token.*protocol 'pseudo'"): evaluate(bert, texts, name)
    with pytest.raises(UsageError, match="protocol 'pseudo'"): bert.surprises([[1, 2]])
    found = evaluate(bert, texts, "pseudo")
    assert found.nats == pytest.approx(bert.nll(texts), rel=1e-5) and found.figure() == pytest.approx(math.exp(sum(bert.nll(texts))/found.sizes["tokens"].sum()))


def test_ranks_are_places(model):
    rows = [[model.start_id, *model.tokenizer.encode(text)][:24] for text in TEXTS[:5]]
    for row, (nats, places) in zip(rows, model.surprises(rows, ranks=True)):
        with torch.no_grad(): logits = model.decoder(torch.tensor([row[:-1]]))[0]
        wanted = [1 + (scores > scores[i]).sum().item() + (scores[:i] == scores[i]).sum().item() for scores, i in zip(logits, row[1:])]
        assert places.tolist() == wanted and np.array_equal(nats, model.surprises([row])[0])


@pytest.mark.skipif(not __import__("textgen.kernels").kernels.compiler(), reason="no C compiler")
@pytest.mark.parametrize("shape", [dict(n_head=4), dict(n_head=6, n_kv_head=2, position="rotary"), dict(n_head=13, head_size=4, n_kv_head=1, position="rotary")],
                         ids=["GPT-2", "grouped heads", "one head of keys"])
def test_the_compiled_step_reads_the_same(shape):
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(TEXTS)
    decoder = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=40, n_embd=48, n_layer=2, **shape))
    with torch.no_grad():
        for weight in decoder.parameters(): weight.mul_(3)
    plain, compiled = GPT(decoder, tokenizer), GPT(decoder, tokenizer)
    plain.compile, compiled.compile = False, True
    rows = [tokenizer.encode("".join(TEXTS))[i : i + length] for i, length in enumerate([2, 17, 40, 41, 41, 3])]
    for one, other in zip(plain.surprises(rows, ranks=True), compiled.surprises(rows, ranks=True)):
        assert np.allclose(one[0], other[0], atol=1e-4) and (one[1] == other[1]).mean() > 0.95


# How sure

def test_intervals_are_reproducible_and_shrink():
    numbers = np.random.default_rng(0)
    few, many = (Evaluation("m", Protocol(), numbers.gamma(4, 10, n), {"tokens": np.full(n, 40)}) for n in (20, 2000))
    assert interval(few) == interval(few) != interval(few, seed=1)
    width = lambda one: np.subtract(*interval(one)[::-1])
    assert width(many) < width(few)/4 and interval(few)[0] < few.figure() < interval(few)[1]
    assert interval(few, share=0.5)[0] > interval(few)[0]


def test_a_paired_difference_sees_what_intervals_do_not():
    numbers = np.random.default_rng(1)
    hard = numbers.gamma(4, 10, 200)  # some documents are hard for both
    one, other = (Evaluation(name, Protocol(), nats, {"tokens": np.full(200, 40)}) for name, nats in (("a", hard), ("b", hard + numbers.normal(1, 1, 200))))
    assert interval(one)[1] > interval(other)[0]  # they overlap
    value, low, high = paired(one, other)
    assert low <= value <= high < 0 and value == one.figure() - other.figure()
    value, low, high = paired(one, one)
    assert value == low == high == 0


# Bad input

@pytest.mark.parametrize("texts, protocol, said", [
    ([], "token", "nothing to evaluate"), (["", " \n"], "word", "nothing to evaluate"), (TEXTS, "tokens", "no protocol 'tokens'; did you mean 'token'"),
    (TEXTS, "zzz", "choose from byte, char, pseudo, sliding, token, word"), (TEXTS, "pseudo", "reads from left to right"),
    (TEXTS, Protocol(context=25), "windows of 25 tokens, and the model looks at 24; set context to at most 24"),
    (TEXTS, Protocol(context=8, stride=9), "a stride of 9 leaves out tokens")])
def test_what_cannot_be_evaluated(model, texts, protocol, said):
    with pytest.raises(UsageError, match=re.escape(said)): evaluate(model, texts, protocol)


@pytest.mark.parametrize("changes, said", [(dict(stride=0), "stride"), (dict(stride=1.5), "stride"), (dict(context=0), "context"), (dict(per="line"), "per"),
                                           (dict(unit="line"), "unit"), (dict(contxt=5), "did you mean 'context'")])
def test_protocols_that_there_are_not(changes, said):
    with pytest.raises(UsageError, match=said): find_protocol("token", **changes)


def test_a_model_that_only_knows_whole_texts():
    class Sums(Judge):
        tokenizer, nll = CharTokenizer.train(TEXTS), lambda self, texts: [1.0]*len(texts)
    with pytest.raises(UsageError, match="Sums gives no likelihood of each token"): evaluate(Sums(), TEXTS, "token")


# lm-eval's other questions

class Request:
    def __init__(self, *args): self.args = args


def test_continuations_by_definition(model):
    encode = model.tokenizer.encode
    pairs = [(encode("Long ago"), encode(" there was")), (encode(TEXTS[0])[:40], encode(" and more")), ([model.start_id], encode("a"))]
    for (context, new), (logprob, greedy) in zip(pairs, continuations(model, pairs)):
        row = (context + new)[-25:]
        with torch.no_grad(): nats = model.decoder(torch.tensor([row[:-1]]))[0].log_softmax(-1)[-len(new):]
        assert logprob == pytest.approx(nats.gather(1, torch.tensor(new)[:, None]).sum().item(), rel=1e-4)
        assert greedy == (nats.argmax(-1).tolist() == new)
    written = model.generate("Long ago", temperature=0, max_new_tokens=4)[0].token_ids
    assert continuations(model, [(encode("Long ago"), written)])[0][1]


def test_texts_until(model):
    asked = [Request("Long ago", {"until": ["e"], "max_gen_toks": 12}), Request("There", {"until": [], "max_gen_toks": 3}), Request("A", {"until": ["e"], "max_gen_toks": 12})]
    texts = write_until(model, asked)
    assert "e" not in texts[0] + texts[2] and texts[1] == model.generate("There", temperature=0, max_new_tokens=3)[0].text
    assert settings_of({"until": "\n", "temperature": 0.7, "do_sample": True, "top_p": 0.9}).top_p == 0.9 and settings_of({"temperature": 0.7, "do_sample": False}).temperature == 0
    with pytest.raises(UsageError, match="beam"): settings_of({"num_beams": 4})
    with pytest.raises(UsageError, match="unknown key 'top_q'"): settings_of({"top_q": 4})


def test_rolling_of_nothing(model): assert rolling(model, [Request(""), Request("a")])[0] == 0.0 > rolling(model, [Request("a")])[0]


def test_lm_eval_at_the_command_line(folder, tmp_path, own_cache):
    (tmp_path/"pages.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in TEXTS[:4]))
    (tmp_path/"rules.py").write_text("from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer\n")
    (tmp_path/"local.yaml").write_text(TASK)
    words = ["lm-eval", "--model", "textgen", "--model_args", f"pretrained={folder/'one'}", "--tasks", "local", "--include_path", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path/"cache")}
    done = subprocess.run([sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())", *words], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    value = evaluate(textgen.load(folder/"one", device="cpu"), TEXTS[:4], "word").figure()
    assert float(re.search(r"word_perplexity\|.*?\|\s*([\d.]+)\|", done.stdout)[1]) == pytest.approx(value, rel=1e-3)


# The command

def test_two_models_side_by_side(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    code = main(["evaluate", "--model", "one", "--model", "two", "--data", "text.txt", "--lines", "--split", "all", "--protocol", "token", "--protocol", "byte",
                 "--device", "cpu", "--json", str(tmp_path/"f.json"), "--plot", str(tmp_path/"f.png")])
    said = capsys.readouterr()
    assert code == 0 and "bits_per_byte" in said.out and "all; one text" in said.out and "━" not in said.err
    rows = json.loads((tmp_path/"f.json").read_text())["evaluations"]
    assert [(row["model"], row["protocol"]["name"]) for row in rows] == [(m, f"{p}, split all") for m in ("one", "two") for p in ("token", "byte")]
    model = textgen.load("one", device="cpu")
    for row, protocol in zip(rows, ("token", "byte")):
        one = evaluate(model, TEXTS, protocol)
        assert row["value"] == pytest.approx(one.figure()) and row["interval"] == pytest.approx([*interval(one)]) and row["documents"] == len(TEXTS)
        assert row["figure"] == FIGURES[protocol] and row["all"][row["figure"]] == row["value"] and row["tokens"] == one.sizes["tokens"].sum()
        assert "less the first" not in row and "less the first" in rows[2]
    assert (tmp_path/"f.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_judged_by_what_it_has_not_learnt(run_of_ours, capsys, monkeypatch):
    monkeypatch.chdir(run_of_ours.parent)
    assert main(["evaluate", "--model", str(run_of_ours), "--protocol", "char"]) == 0
    texts = held_out("stories", root="data", train=300, validation=20)
    one = evaluate(textgen.load(run_of_ours, device="cpu"), texts, "char")
    assert f"{one.figure():.4g}" in capsys.readouterr().out
    told = json.loads((run_of_ours/"result.json").read_text())  # long stories are cut in windows there, too
    assert one.figure()*math.log(2) == pytest.approx(told["nats_per_char"], rel=1e-4)


@pytest.mark.parametrize("words, said", [
    (["--model", "one"], "no text to evaluate on"), (["--model", "none", "--data", "text.txt"], "no such directory"),
    (["--model", "one", "--data", "text.txt", "--protocol", "perplexity"], "no protocol 'perplexity'; choose from"),
    (["--model", "one", "--data", "missing.txt"], "is no file or folder"), (["--model", "one", "--data", "text.txt", "--split", "dev"], "no split 'dev'"),
    (["--model", "one", "--data", "empty.txt"], "nothing to evaluate"), (["--model", "one", "--data", "text.txt", "--context", "99"], "set context to at most 24"),
    (["--data", "text.txt"], "Missing option")])
def test_the_command_says_what_is_wrong(folder, capsys, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    Path("empty.txt").write_text(" \n")
    assert main(["evaluate", *words, *(["--device", "cpu"] if "--model" in words else [])]) == 2
    errors = capsys.readouterr().err
    assert said in errors and "Traceback" not in errors


def test_one_model_that_fails_takes_nothing_from_the_others(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    words = ["evaluate", "--model", "one", "--model", "nobody/here", "--data", "text.txt", "--device", "cpu", "--json", str(tmp_path/"f.json")]
    assert main(words) in (1, 2)
    said = capsys.readouterr()
    assert "nobody/here" in said.err and "perplexity" in said.out and len(json.loads((tmp_path/"f.json").read_text())["evaluations"]) == 1


def test_a_recurrent_model_is_evaluated_without_torch(tmp_path):
    pytest.importorskip("tensorflow")
    from textgen.lstm import RNNShape, build_network
    from textgen.rnn import RNN
    tokenizer, shape = CharTokenizer.train(TEXTS), RNNShape(units=8, n_embd=4)
    RNN(build_network(shape, tokenizer.vocab_size), shape, tokenizer).save(tmp_path/"rnn")
    (tmp_path/"text.txt").write_text("".join(TEXTS))
    code = ("import sys; from textgen.cli import main; code = main(['evaluate', '--model', 'rnn', '--data', 'text.txt', '--protocol', 'byte', '--lines']); "
            "print('torch' in sys.modules, code)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr[-2000:]


def test_ctrl_c_keeps_what_was_found(folder, tmp_path):
    (tmp_path/"long.txt").write_text("".join(stories(6000, seed=2)))
    words = ["evaluate", "--model", str(folder/"one"), "--data", str(folder/"text.txt"), "--data", str(tmp_path/"long.txt"), "--split", "all", "--lines",
             "--protocol", "token", "--protocol", "sliding", "--stride", "1", "--json", str(tmp_path/"f.json"), "--device", "cpu"]
    code = ("import sys, textgen.evaluation as e\nwhole = e.evaluate\n"
            "def told(*given, **more):\n    found = whole(*given, **more)\n    print('read', file=sys.stderr, flush=True)\n    return found\n"
            "e.evaluate = told\nfrom textgen.cli import main\nsys.exit(main())")
    process = subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("read"): break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    finally: process.kill()
    assert process.returncode == 130, errors[-2000:]
    assert "interrupted" in errors and len(json.loads((tmp_path/"f.json").read_text())["evaluations"]) == 1
