"""Receipts of every kind of model: they replay alone, they are JSON, their numbers are the model's, and what was changed is found."""
import contextlib, copy, html.parser, json, math, os, re, shlex, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings, strategies as st

import textgen
from textgen.cli import main
from textgen.core import GenerationConfig, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.generator import TextGenerator, Token
from textgen.gpt import GPT
from textgen.kernels import compiler
from textgen.receipts import (FORMAT, Recorder, Replay, as_json, checked, digest, digests, read_receipts, replay, save_receipts, show_tokens,
                              texts_of, visible)
from textgen.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from textgen.tokenizer_io import HFTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys; from textgen.cli import main; sys.exit(main())"
TEXT, L = "the fox sings and the moon sleeps.\n", 40
CHARS = CharTokenizer(sorted({*TEXT}))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a fox cat moon sings sleeps sees and .".split()]


def write_gpt(path, seed=0, tokenizer=CHARS):
    torch.manual_seed(seed)
    model = GPT(Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size + 3, n_positions=L, n_embd=24, n_head=3, n_layer=2)).eval(), tokenizer)
    with torch.no_grad():
        for weight in model.decoder.parameters(): weight.mul_(3 if weight.ndim == 2 else 1)
    model.save(path)


def write_rnn(path):
    pytest.importorskip("tensorflow", reason="needs the extra lstm")
    from textgen.lstm import RNNShape, build_network, load_tensorflow
    from textgen.rnn import RNN
    load_tensorflow()
    import keras
    keras.utils.set_random_seed(0)
    network = build_network(RNNShape(units=16, n_embd=8), CHARS.vocab_size)
    network.set_weights([3 * weight for weight in network.get_weights()])
    RNN(network, RNNShape(units=16, n_embd=8), CHARS).save(path)


def write_hf(path):
    from textgen.hf import HF
    torch.manual_seed(1)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, max_position_embeddings=L)
    config = transformers.AutoConfig.for_model("gpt_neox", vocab_size=CHARS.vocab_size, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                                               initializer_range=0.3, **shape)
    HF(transformers.AutoModelForCausalLM.from_config(config).eval(), CHARS).save(path)


def write_masked(path):
    backend = hf.Tokenizer(hf.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    backend.add_special_tokens(WORDS[:5])
    backend.post_processor = hf.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=len(WORDS) + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                     max_position_embeddings=L, initializer_range=0.3)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    HFTokenizer(backend, settings={"mask_token": "[MASK]"}).save(path)


WRITERS = {"gpt": write_gpt, "rnn": write_rnn, "hf": write_hf, "masked": write_masked}
OPENED = {"gpt": {"compile": False}, "gpt, compiled": {"compile": True}, "gpt, int8": {"dtype": "int8"}, "rnn": {}, "hf": {}, "masked": {"rounds": 4}}
PROMPTS = ["the fox", "a", "sleeps and the moon"]
SETTINGS = [dict(temperature=0), dict(temperature=1.3, top_k=9), dict(top_p=0.9, n=2), dict(stop=["o", "ee", "moon"]), dict(repetition_penalty=1.4),
            dict(logprobs=2, logit_bias={6: 2.5})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("receipts")


@pytest.fixture(scope="module")
def path_of(folder):
    def path(kind):
        if not (made := folder/kind).exists(): WRITERS[kind](made)
        return made
    return path


@pytest.fixture(scope="module", params=OPENED)
def model(request, path_of):
    if request.param == "gpt, compiled" and not compiler(): pytest.skip("no C compiler")
    return textgen.load(path_of(request.param.partition(",")[0]), device="cpu", **OPENED[request.param])


@pytest.fixture(scope="module")
def gpt(path_of): return textgen.load(path_of("gpt"), device="cpu")


@pytest.fixture(scope="module")
def receipt(gpt): return gpt.generate("the fox", seed=3, max_new_tokens=30, receipt=True)[0].receipt


def copied(receipt, **values): return {**copy.deepcopy(receipt), **values}


def told(receipt, model, **options): return str(replay(receipt, model, **options)).splitlines()


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(UsageError) as caught: yield
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


# Every kind of model

@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_a_row_of_a_batch_replays_alone(model, asked):
    "Through JSON, by the model that wrote it: the same tokens, numbers within rounding; and `receipt` changes no text."
    asked = {"seed": 7, "max_new_tokens": 12, **asked}
    made = model.generate(PROMPTS, receipt=True, **asked)
    plain = model.generate(PROMPTS, **asked)
    assert [(one.text, one.token_ids, one.seed, one.finish_reason) for one in made] == [(one.text, one.token_ids, one.seed, one.finish_reason) for one in plain]
    for number, one in enumerate(made):
        receipt = json.loads(json.dumps(one.receipt, allow_nan=False))
        assert receipt == one.receipt == checked(receipt, "this") and receipt["prompt"] == PROMPTS[number // asked.get("n", 1)]
        assert (receipt["text"], receipt["token_ids"], receipt["seed"]) == (one.text, one.token_ids, one.seed)
        assert receipt["settings"]["n"] == 1 and receipt["settings"]["seed"] == one.seed and receipt["tokens"][0]["rank"] >= 1
        assert {len(token["top"]) for token in receipt["tokens"]} == {asked.get("logprobs", 5)}
        found = replay(receipt, model)
        assert found.same and found.place is None and found.largest[0] < 1e-4 and not found.changes, str(found)


def test_by_its_path_alone(model):
    "The receipt says where the model is and how it was opened; nothing else is needed."
    receipt = model.generate("the fox", seed=5, max_new_tokens=8, receipt=True)[0].receipt
    found = replay(receipt)
    assert found.same and not found.changes and found.again == receipt
    assert receipt["model"]["generator"].split(":")[1] == type(model).__name__ and len(receipt["model"]["files"]) >= 3
    weights = [name for name in receipt["model"]["files"] if name.startswith("model.")]
    assert len(weights) == 1 and receipt["model"]["files"][weights[0]] == digest(model.origin.path/weights[0])
    assert receipt["versions"].keys() >= ({"tensorflow", "keras"} if type(model).__name__ == "RNN" else {"torch"})
    assert ("transformers" in receipt["versions"]) == (type(model).__name__ in ("HF", "Masked"))
    assert receipt["tokenizer"] == model.tokenizer.fingerprint() and receipt["model"]["device"].lower().strip("/:0") in ("cpu", "cpu:0")


def test_beyond_the_context(path_of):
    "Where the context slides, and with a prompt of which only the end is seen."
    gpt = textgen.load(path_of("gpt"), device="cpu", compile=False)
    for prompt in ("the fox", TEXT.strip() * 3):
        one, = gpt.generate(prompt, max_new_tokens=3 * L, seed=1, overflow="slide", receipt=True)
        assert replay(one.receipt, gpt).same and len(one.receipt["tokens"]) == 3 * L and len(one.receipt["prompt_ids"]) <= L


def logits_after(model, ids):  # (T, V)
    "What the model makes of a text, by one pass over all of it."
    if hasattr(model, "decoder"):
        with torch.no_grad(): return model.decoder(torch.tensor([ids])).float()[0].numpy()
    from textgen.lstm import no_state
    logits, *_ = model.network([np.array([ids], "int32"), *no_state(model.shape, 1)])
    return np.array(logits)[0]


@pytest.mark.parametrize("temperature", [0, 1.0, 2.0])
def test_rank_and_entropy_are_the_models_own(model, temperature):
    "Against the logits of one pass, in float64; whatever the temperature was."
    if type(model).__name__ == "Masked": pytest.skip("its numbers are of the looks at which the gaps were filled")
    one, = model.generate("the fox", seed=2, max_new_tokens=20, temperature=temperature, logprobs=3, top_k=None)
    start = len(model.tokenizer.encode("the fox"))
    z = logits_after(model, [*model.tokenizer.encode("the fox"), *one.token_ids]).astype(np.float64)[start - 1 : -1]
    tolerance = 0.05 if getattr(model, "weights", "") == "int8" else 1e-4
    for row, id, (logprob, top, rank, entropy) in zip(z, one.token_ids, one.logprobs):
        nats = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(nats[id], abs=tolerance) and entropy == pytest.approx(-(np.exp(nats) * nats).sum(), abs=tolerance)
        known = nats[: model.tokenizer.vocab_size]
        if min(abs(np.delete(known, id) - nats[id])) > 2 * tolerance: assert rank == 1 + (known > nats[id]).sum()
        assert rank > 3 or top[rank - 1][0] == id
        assert type(rank) is int and type(entropy) is float


def test_masked_numbers_are_of_the_last_look(path_of):
    "With one look every gap is filled at once, so one pass tells all."
    model = textgen.load(path_of("masked"), device="cpu", rounds=1)
    one, = model.generate("the fox", max_new_tokens=6, seed=1, logprobs=9)
    before, after = model.marks
    ids = torch.tensor([[*before, *model.tokenizer.encode("the fox"), *[model.mask] * 6, *after]])
    with torch.no_grad(): logits = model.model(ids).logits[0].masked_fill(model.out, -torch.inf)
    nats = logits[len(before) + 2 : len(before) + 8].double().log_softmax(-1)
    for row, id, (logprob, _, rank, entropy) in zip(nats, one.token_ids, one.logprobs):
        assert logprob == pytest.approx(row[id].item(), abs=1e-4) and rank == 1 + (row > row[id]).sum().item()
        assert entropy == pytest.approx(torch.special.entr(row.exp()).sum().item(), abs=1e-4)
    made = model.generate("the fox", max_new_tokens=4, seed=1, logprobs=20, receipt=True)[0].receipt  # more than can be written
    assert replay(made, model).same and {len(token["top"]) for token in made["tokens"]} == {10}


# What is found

def test_another_model_another_number_of_bytes_another_way(path_of, folder, receipt, gpt):
    if not (folder/"gpt-2").exists(): write_gpt(folder/"gpt-2", seed=5)
    lines = told(receipt, folder/"gpt-2")
    assert lines[0].startswith("model.safetensors: ") and re.search(r"token \d+ of 30 differs: '.+' was expected, '.+' came", "\n".join(lines))
    found = replay(receipt, folder/"gpt-2")
    assert not found.same and found.place is not None and found.receipt["token_ids"][: found.place] == found.again["token_ids"][: found.place]
    found = replay(receipt, dtype="int8")
    assert "dtype: float32 then, int8 now" in found.changes and found.largest[0] > 1e-4
    assert replay(receipt, path_of("gpt")).same and replay(receipt, str(path_of("gpt")), compile=False).changes == ["compile: auto then, False now"]
    shutil.copytree(path_of("gpt"), folder/"moved", dirs_exist_ok=True)
    assert replay(receipt, folder/"moved").changes == []  # the same bytes elsewhere are the same model


def test_one_weight(path_of, receipt):
    "Its file is another, and the first token that comes out differently is named with both probabilities."
    model = textgen.load(path_of("gpt"), device="cpu")
    assert replay(receipt, model).largest[0] == 0
    for change in (1e-4, 2.0):
        with torch.no_grad(): model.decoder.transformer.h[0].attn.c_attn.weight[0, 0] += change
        found = replay(receipt, model)
        assert [line.split(":")[0] for line in found.changes] == ["model.safetensors"] and found.largest[0] > 0
    assert not found.same
    place, lines = found.place, str(found).splitlines()
    assert f"token {place + 1} of 30 differs: {receipt['tokens'][place]['text']!r} was expected, {found.again['tokens'][place]['text']!r} came" in lines
    then, now = (next(line for line in lines if line.startswith(f"  {when}: ")) for when in ("then", "now"))
    assert f"{100 * math.exp(receipt['tokens'][place]['logprob']):.2f}%" in then
    assert f"{100 * math.exp(found.again['tokens'][place]['logprob']):.2f}%" in now


EDITS = {
    "seed": ({"seed": 3}, True),  # what counts stands in the settings
    "text": ({"text": "the moon"}, False), "reason": ({"finish_reason": "stop"}, False), "prompt": ({"prompt": "a cat"}, None),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_receipt(name, gpt, receipt):
    values, same = EDITS[name]
    if name == "prompt":
        with refused("c"): replay(copied(receipt, **values), gpt)  # no such character
        values, same = {"prompt": "the moon"}, False
    found = replay(copied(receipt, **values), gpt)
    assert found.same is same and bool(found.changes) == (name == "prompt")
    assert same or name == "prompt" or "edited" in str(found)


@pytest.mark.parametrize("place", [0, 11, 29])
def test_an_edited_token_is_found(place, gpt, receipt):
    "Its id, its end, its probability."
    other = copied(receipt)
    other["tokens"][place]["id"] = other["token_ids"][place] = (receipt["token_ids"][place] + 1) % CHARS.vocab_size
    assert replay(other, gpt).place == place
    cut = copied(receipt, token_ids=receipt["token_ids"][:place], tokens=receipt["tokens"][:place])
    found = replay(cut, gpt)
    assert found.place == place and "the end of the text was expected" in str(found)
    other = copied(receipt)
    other["tokens"][place]["logprob"] -= 0.5
    found = replay(other, gpt)
    assert found.same and found.largest == (pytest.approx(0.5, abs=1e-5), place) and f"at token {place + 1}" in str(found)


def test_edited_settings_are_another_text(gpt, receipt):
    for name, value in dict(seed=4, temperature=0.1, max_new_tokens=29, stop=["e", "o", "a"]).items():
        assert not replay(copied(receipt, settings={**receipt["settings"], name: value}), gpt).same, name


# What is no receipt

DAMAGED = [
    (lambda r: [], "no receipt"), (lambda r: None, "no receipt"), (lambda r: {"prompt": "a"}, "no receipt"), (lambda r: "receipt", "no receipt"),
    (lambda r: {**r, "receipt": 2}, "format '2'"), (lambda r: {**r, "receipt": None}, "format 'None'"), (lambda r: {"receipt": FORMAT}, "damaged"),
    (lambda r: {**r, "token_ids": r["token_ids"][1:]}, "not those of token_ids"), (lambda r: {**r, "tokens": r["tokens"] + [{}]}, "tokens.30.id"),
    (lambda r: {**r, "text": None}, "text: "), (lambda r: {**r, "model": {}}, "model.name"), (lambda r: {**r, "finish_reason": "error"}, "finish_reason"),
    (lambda r: {k: v for k, v in r.items() if k != "settings"}, "settings"), (lambda r: {**r, "seed": "x"}, "seed"),
]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_receipts_are_refused(number, receipt, gpt):
    damage, word = DAMAGED[number]
    with refused("this", word): checked(damage(receipt), "this")
    with refused("the receipt", word): replay(damage(receipt), gpt)


def test_what_cannot_be_replayed(receipt, gpt, path_of, tmp_path):
    for wrong, word in (({"temperature": -1}, "temperature"), ({"heat": 1}, "unknown key 'heat'")):
        with refused(word): replay(copied(receipt, settings=wrong), gpt)
    with refused("cannot be opened with {'speed': 3}"): replay(copied(receipt, model={**receipt["model"], "options": {"speed": 3}}))
    nowhere = copied(receipt, model={**receipt["model"], "name": "runs/gone"})
    with refused("'runs/gone' is not there", "--model"): replay(nowhere)
    assert replay(nowhere, path_of("gpt")).same
    with refused("in memory only", "--model"): replay(copied(receipt, model={**receipt["model"], "name": None, "here": False}))
    with refused("no device 'cuda:7'"): replay(receipt, device="cuda:7")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["receipt", "prompt", "tokens", "model"]), inner, max_size=4), max_leaves=9))
@example({"receipt": True})
def test_any_json_is_answered_in_one_line(values):
    with pytest.raises(UsageError) as caught: checked(values, "this")
    assert "\n" not in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([1e9, -1e9, "7", "-0.5"]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
@given(st.data())
def test_an_edited_value_is_refused_or_does_no_harm(receipt, data):
    "Any value anywhere: one line says what is wrong, or it can be compared and shown."
    other = copied(receipt)
    where = data.draw(st.sampled_from(["", "tokens", "model", "versions", "beside"]))
    inside = {"": other, "model": other["model"], "versions": other["versions"], "tokens": other["tokens"][3], "beside": other["tokens"][3]["top"][1]}[where]
    key = data.draw(st.sampled_from([*(range(3) if where == "beside" else inside)]))
    inside[key] = data.draw(JSON)
    try: found = checked(other, "this")
    except UsageError as error: return check_line(error)
    assert str(Replay(found, receipt)) and str(Replay(receipt, found)) and show_tokens(found)._repr_html_()
    json.dumps(found)


def check_line(error): assert "\n" not in str(error) and len(str(error)) < 1000


# What is in the files

def test_digests_follow_the_model_and_its_files(tmp_path):
    "The file's while the model is as it was loaded; else what it would save. A copy made by save is the same model."
    write_gpt(tmp_path/"m")
    model = textgen.load(tmp_path/"m", device="cpu")
    first = digests(model)
    assert set(first) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert first == {name: digest(tmp_path/"m"/name) for name in first} and digests(model) is first  # once
    (tmp_path/"m"/"metrics.jsonl").write_text("{}")
    assert digests(model) is first
    write_gpt(tmp_path/"m", seed=3)  # another model in its place
    assert digests(model) == first != digests(textgen.load(tmp_path/"m", device="cpu"))
    with torch.no_grad(): model.decoder.transformer.wte.weight[0, 0] += 1
    assert {name for name, sum in digests(model).items() if sum != first[name]} == {"model.safetensors"}
    write_gpt(tmp_path/"n")
    assert digests(GPT.load(tmp_path/"n", device="cpu")) == first  # nobody noted where it is from
    assert digests(GPT.load(tmp_path/"n", device="cpu", dtype="int8", compile=False)) == {}  # which cannot be saved
    assert digests(textgen.load(tmp_path/"n", device="cpu", dtype="int8")) == first


def test_digests_of_a_recurrent_model(path_of, tmp_path):
    "The archive says when it was saved, and is the same model all the same; other weights are another."
    model = textgen.load(path_of("rnn"))
    model.save(tmp_path/"again")
    again = textgen.load(tmp_path/"again")
    assert digests(again) == digests(model) and (tmp_path/"again"/"model.keras").read_bytes() != (path_of("rnn")/"model.keras").read_bytes()
    again.network.set_weights([weight + 1e-3 for weight in again.network.get_weights()])
    assert {name for name, sum in digests(again).items() if sum != digests(model)[name]} == {"model.keras"}


def test_names_of_models(path_of, folder, monkeypatch):
    "As it was asked for, by a path from here, with the generator where one was named; of a kind of run, the run."
    monkeypatch.chdir(folder)
    path_of("gpt"), path_of("hf")
    name = lambda asked: textgen.load(asked, device="cpu").origin.name
    assert [name("gpt"), name("./gpt/"), name(Path("gpt")), name("hf:hf")] == ["gpt", "gpt", "gpt", "hf:hf"]
    shutil.copytree("gpt", "runs/one")
    monkeypatch.chdir(folder/"runs"/"..")
    (folder/"gpt").rename(folder/"kept")
    try: assert name("gpt") == str(Path("runs/one"))
    finally: (folder/"kept").rename(folder/"gpt")
    assert GPT.load("gpt").origin is None


# A model of somebody else

class Recite(TextGenerator):
    "Writes its text, and tells nothing about it."
    tokenizer = ByteTokenizer()
    def __init__(self, text): self.ids = self.tokenizer.encode(text)
    def nll(self, texts): raise NotImplementedError
    def load(cls, path): raise NotImplementedError
    def tokens(self, prompts, seeds, config, closed):
        for row in range(len(prompts)):
            for n, id in enumerate(self.ids[: config.max_new_tokens], 1): yield Token(row, id, "length" if n == len(self.ids) else None)


def test_a_model_that_tells_nothing():
    one, = Recite("né ☃").generate("a", receipt=True, seed=1)
    assert one.logprobs is None and one.receipt["model"] == {"name": None, "here": False, "options": {}, "generator": f"{__name__}:Recite", "files": {}}
    assert [token["text"] for token in one.receipt["tokens"]] == ["n", "", "é", " ", "", "", "☃"] and one.receipt["versions"].keys() == {"textgen", "python", "numpy"}
    assert {token["logprob"] for token in one.receipt["tokens"]} == {None}
    found = replay(json.loads(as_json(one.receipt)), Recite("né ☃"))
    assert found.same and found.largest is None and found.changes == ["nothing says what is in the model's files"]
    assert replay(one.receipt, Recite("né!☃")).place == 3 and replay(one.receipt, Recite("n")).place == 1
    assert show_tokens(one.receipt)._repr_html_().count("title=") == 7


class Saved(Recite):
    "Counts how often it is saved."
    saved = 0
    def save(self, path):
        self.saved += 1
        Path(path).mkdir()
        Path(path, "config.json").write_text("{}")


def test_a_model_in_memory_is_saved_once_for_all_rows():
    model = Saved("abc")
    made = model.generate(["a"] * 9, n=2, receipt=True)
    assert model.saved == 1 and {*made[0].receipt["model"]["files"]} == {"config.json"}


class Infinite(Recite):
    "Takes what it holds for impossible."
    honours = frozenset({"logprobs"})
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token._replace(logprob=np.float32(-np.inf), top=((token.id, 0.0), (66, -np.inf))[: config.logprobs], rank=np.int64(2), entropy=np.float32("nan"))


def test_numbers_that_json_lacks():
    one, = Infinite("ab").generate("a", receipt=True)
    line = json.loads(json.dumps(one.receipt, allow_nan=False))["tokens"][0]
    assert line == {"id": 97, "text": "a", "logprob": None, "rank": 2, "entropy": None, "top": [[97, "a", 0.0]]}


@given(st.text(max_size=12), st.integers(0, 6))
@example("\udc80", 0)
@example("é☃🙂", 1)
def test_texts_join_to_the_whole(text, before):
    text = text.encode("utf-8", "ignore").decode()
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        texts = texts_of(tokenizer, ids[:before], ids[before:])
        assert len(texts) == len(ids[before:])
        if before == 0: assert "".join(texts) == text


BPE = BPETokenizer.train(["the fox é☃🙂 " * 4], 290)


def test_a_recorder_is_a_stream(gpt):
    "Piece by piece as without; mistakes at once; a stream that is left leaves no slot open; settings of a config count."
    plain, recorder = list(gpt.stream(PROMPTS, seed=1, max_new_tokens=9)), Recorder(gpt)
    strip = lambda pieces: [(piece.row, piece.text, piece.token_ids, piece.finish_reason) for piece in pieces]
    assert strip(recorder.stream(iter(PROMPTS), seed=1, max_new_tokens=9)) == strip(plain)
    with refused("prompts"): recorder.stream(3)
    with refused("prompts"): gpt.generate(b"ab", receipt=True)
    with refused("max_new_tokens"): recorder.stream("the", max_new_token=3)
    with refused("give a GenerationConfig"): gpt.generate("the", {"n": 2}, receipt=True)
    with refused("unknown key 'receipt'"): gpt.stream("the", receipt=True)
    stream = recorder.stream("the", seed=1)
    next(stream)
    stream.close()
    assert next(stream, None) is None
    one, = gpt.generate("the", GenerationConfig(max_new_tokens=3, logprobs=0, seed=1), receipt=True)
    assert one.receipt["tokens"][0]["top"] == [] and one.receipt["tokens"][0]["rank"] >= 1 and one.receipt["settings"]["logprobs"] == 0
    assert gpt.generate("the", max_new_tokens=3)[0].receipt is None


# On disk

@pytest.mark.parametrize("text", ["the fox", "\udc80 half", 'a "quote"\n\t\\', "☃🙂é\u2028"])
def test_files(text, receipt, tmp_path):
    "What is read is what was written, also of characters that are none; one receipt is an object, several a list."
    odd = copied(receipt, prompt=text)
    save_receipts(tmp_path/"one.json", [odd])
    assert read_receipts(tmp_path/"one.json") == [odd] == [json.loads((tmp_path/"one.json").read_bytes())]
    save_receipts(tmp_path/"two.json", [odd, receipt])
    assert read_receipts(tmp_path/"two.json") == [odd, receipt]
    assert len((tmp_path/"one.json").read_text(encoding="utf-8").split("\n")) == len(receipt) + len(receipt["tokens"]) + 4
    with refused("is a folder"): Recorder(None, tmp_path)


def test_files_that_are_none(tmp_path):
    for name, data, word in [("a", b"", "not JSON"), ("b", b"\xff\xfe", "not JSON"), ("c", b"[" * 10**5, "not JSON"), ("d", b"[]", "no receipt"), ("e", b'{"receipt": 1}', "damaged")]:
        (tmp_path/name).write_bytes(data)
        with refused(str(tmp_path/name), word): read_receipts(tmp_path/name)
    with refused("cannot read"): read_receipts(tmp_path/"gone")
    with refused("cannot read"): read_receipts(tmp_path)


# The picture

class Tags(html.parser.HTMLParser):
    "Every tag is closed, and in order; text and titles as a reader sees them."
    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.titles, self.tags = [], "", [], set()
        self.feed(page), self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs): self.open.append(tag), self.tags.add(tag), self.titles.append(dict(attrs).get("title"))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


@given(st.lists(st.text(max_size=6), min_size=1, max_size=6), st.floats(-30, 0), st.integers(1, 10**5))
@example(["<script>", "</div>", '" onclick="x', "&amp;", " ", "\n", "\t", "\0", "", "\udc80"], -1.0, 3)
def test_any_text_can_be_shown(texts, nats, rank):
    tokens = [{"id": 1, "text": text, "logprob": nats, "rank": rank, "entropy": 1.0, "top": [[2, text, -1.0]]} for text in texts]
    shown = show_tokens({"prompt": texts[0], "tokens": tokens})
    page = Tags(shown._repr_html_())
    assert page.tags == {"div", "span", "small"} and repr(shown).startswith(f"{len(texts)} token")
    shown._repr_html_().encode("utf-8")
    titles = [title for title in page.titles if title]
    assert len(titles) == len(texts) and all(f"rank {rank}" in title for title in titles)
    assert "probability" in page.text and "beyond" in page.text  # the legend


def test_white_space_can_be_seen():
    assert [visible(text) for text in (" ", "  ", " a", "\n", "\t", "\r\n", "\u00a0", "", "\x07", "\x7f", "<&>")] == [
        "·", "··", " a", "↵\n", "→\t", "␍↵\n", "⍽", "▯", "␇", "␡", "&lt;&amp;&gt;"]


# At a terminal

def run(line, cwd, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *shlex.split(line)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def desk(path_of, folder):
    path_of("gpt")
    if not (folder/"gpt-2").exists(): write_gpt(folder/"gpt-2", seed=5)
    code, out, err = run("generate --model gpt --prompt 'the fox' --max-new-tokens 30 --seed 3 --receipt one.json --device cpu", folder)
    assert code == 0 and out.startswith("the fox") and "receipt in one.json" in err and "textgen replay one.json" in err
    return folder


def test_the_command_line_writes_what_python_does(desk, gpt, receipt):
    made, = read_receipts(desk/"one.json")
    rest = lambda receipt: {name: value for name, value in receipt.items() if name != "model"}
    assert rest(made) == rest(receipt) and made["model"] == {**receipt["model"], "name": "gpt"}


def test_replay_says_the_same(desk):
    assert run("replay one.json", desk) == (0, "the same 30 tokens\nlog-probabilities are the same to the last digit\n", "")
    code, out, _ = run("replay one.json --model gpt-2", desk)
    assert code == 1 and "model.safetensors: " in out and " differs: " in out
    code, out, _ = run("replay one.json --dtype bfloat16 --json", desk)
    found = json.loads(out)
    assert code == (0 if found["same"] else 1) and found["changes"] == ["dtype: float32 then, bfloat16 now"] and found["largest_difference"] > 0


def test_replay_of_several(desk, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    assert main(shlex.split("generate --model gpt --prompt a --n 3 --max-new-tokens 5 --seed 1 --logprobs 1 --output a.txt --receipt three.json")) == 0
    assert capsys.readouterr().err.count("%") == 2 * 15  # what --logprobs prints, of a token and of the likeliest
    receipts = read_receipts("three.json")
    assert [one["settings"]["logprobs"] for one in receipts] == [1] * 3 and len({one["seed"] for one in receipts}) == 3
    assert main(["replay", "three.json"]) == 0 and capsys.readouterr().out.splitlines()[::3] == ["[1]", "[2]", "[3]"]
    receipts[1]["text"] = "edited"
    save_receipts("three.json", receipts)
    assert main(["replay", "three.json", "--json"]) == 1
    assert [one["same"] for one in json.loads(capsys.readouterr().out)] == [True, False, True]


BAD = [("gone.json", "cannot read gone.json"), ("text.txt", "not JSON"), ("list.json", "no receipt"), ("new.json", "format '2'"), ("cut.json", "not JSON"),
       ("one.json --model gone", "gone"), ("one.json --model text.txt", "it is a file"), ("lost.json", "is not there"), ("one.json --device warp", "warp"), (".", "cannot read .")]


@pytest.mark.parametrize("words, said", BAD)
def test_replay_refuses_in_one_line(words, said, desk, receipt, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    Path("text.txt").write_text("the fox"), Path("list.json").write_text("[[]]")
    Path("new.json").write_text(json.dumps({**receipt, "receipt": 2})), Path("cut.json").write_text(as_json(receipt)[:900])
    Path("lost.json").write_text(as_json(copied(receipt, model={**receipt["model"], "name": "runs/lost"})))
    assert main(["replay", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_generate_refuses_a_folder_before_it_writes(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    assert main(shlex.split("generate --model gpt --prompt a --receipt gpt")) == 2
    out, err = capsys.readouterr()
    assert not out and "gpt is a folder" in err and (desk/"gpt"/"config.json").is_file()


WATCHED = """import sys
import textgen.engine as engine
from textgen.cli import main
real, steps = engine.step, []
def step(one):
    steps.append(1)
    if len(steps) == 5: print("begun", file=sys.stderr, flush=True)
    return real(one)
engine.step = step
sys.exit(main())
"""


@pytest.mark.parametrize("line", ["replay long.json", "generate --model gpt --prompt a --max-new-tokens 1000000 --overflow slide --receipt never.json"])
def test_ctrl_c_ends_it(line, desk, receipt):
    "With one line, exit code 130, and no receipt of half a text."
    (desk/"long.json").write_text(as_json(copied(receipt, settings={**receipt["settings"], "max_new_tokens": 10**6, "overflow": "slide"})))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WATCHED, *line.split()], cwd=desk, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert not (desk/"never.json").exists()


def test_recurrent_models_need_no_torch(path_of, folder):
    path_of("rnn")
    program = PROGRAM.replace("sys.exit(main())", "code = main(); assert 'torch' not in sys.modules; sys.exit(code)")
    for line in ("generate --model rnn --prompt the --max-new-tokens 9 --receipt rnn.json", "replay rnn.json"):
        done = subprocess.run([sys.executable, "-c", program, *line.split()], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the same 9 tokens")
