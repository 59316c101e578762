"""What no notebook can check of the engine: memory after a stream is closed, waits for the device, other devices, faults of the disk."""
import copy, functools, gc, json, math, os, re, subprocess, sys, warnings, weakref

import numpy as np
import pytest
import torch

import textgen
from textgen import gpt as gpt_module
from textgen.choosing import choose, settings_of
from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT, engine_for, write
from textgen.kernels import compiler
from textgen.native import native_library
from textgen.rows import windows
from textgen.scoring import document_nll, token_nll
from textgen.slots import decode_one, lay_out, prefill
from textgen.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
L = 16
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\n")
V = TOKENIZER.vocab_size


@pytest.fixture(scope="module")
def model():
    "Random weights, large enough that logits differ clearly."
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=L, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() == 2: p.mul_(10)
    return GPT(decoder, TOKENIZER)


def slow(decoder, ids, count, choose):
    "Everything again for each token; the context slides by half."
    ids, start = list(ids), 0
    with torch.no_grad():
        for t in range(count):
            if len(ids) - start > decoder.config.n_positions: start = len(ids) - max(1, decoder.config.n_positions // 2)
            ids.append(choose(decoder(torch.tensor([ids[start:]]))[:, -1], t).item())
    return ids


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request):
    "Both kinds of slots."
    if request.param and compiler() is None: pytest.skip("no C compiler")
    return request.param


def made(decoder, compile):
    gpt = GPT(decoder, TOKENIZER)
    gpt.compile = compile
    return gpt


LLAMA = dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=1, tie_word_embeddings=False)
FAMILIES = {"gpt2": {}, "llama": LLAMA}


@functools.cache
def slid(context, family):
    "A decoder, ragged prompts, and by temperature what the slow loop writes after them; for both kinds of slots."
    torch.manual_seed(context)
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=context, n_embd=16, n_layer=2, n_head=2, dropout=0.5, **FAMILIES[family])).eval()
    with torch.no_grad(): decoder.transformer.wte.weight.mul_(30)
    rng, rows = np.random.default_rng(context), {}
    prompts = [rng.integers(0, V, rng.integers(1, context + 1)).tolist() for _ in range(21)]
    for temperature in (0, 1):
        settings = settings_of([GenerationConfig(temperature=temperature, top_k=9)], V, [set()], "cpu")
        darts = [torch.from_numpy(textgen.core.uniforms(seed, 30)) for seed in range(21)]
        rows[temperature] = [slow(decoder, prompt, 30, lambda logits, t: choose(logits, u[t:t + 1], settings))[len(prompt):] for prompt, u in zip(prompts, darts)]
    return decoder, prompts, rows


@pytest.mark.parametrize("context", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_ragged_rows_than_slots_slide_as_the_slow_loop_does(context, family, compiled):
    decoder, prompts, expected = slid(context, family)
    decoder.train()
    for temperature in (0, 1):
        config, rows = GenerationConfig(temperature=temperature, max_new_tokens=30, top_k=9), [[] for _ in prompts]
        for token in write(made(decoder, compiled), prompts, range(21), config): rows[token.row].append(token.id)
        assert decoder.training and rows == expected[temperature]


SETTINGS = [dict(), dict(temperature=0), dict(top_p=0.8), dict(top_k=3, min_p=0.1), dict(repetition_penalty=1.5), dict(presence_penalty=1.0),
            dict(frequency_penalty=0.7), dict(no_repeat_ngram_size=2), dict(logit_bias={4: 5.0, 7: -100.0}), dict(stop_token_ids=(3, 4)),
            dict(min_new_tokens=9, stop_token_ids=tuple(range(20))), dict(logprobs=3)]


def test_requests_with_settings_of_their_own_share_steps(model, compiled):
    "What each writes is what it writes alone, whoever comes and goes meanwhile, and in whatever order."
    gpt, rng = made(model.decoder, compiled), np.random.default_rng(0)
    wanted = [(rng.integers(0, V, rng.integers(1, L + 1)).tolist(), GenerationConfig(**SETTINGS[i % 12], max_new_tokens=int(rng.integers(1, 40))), i)
              for i in range(36)]
    def play(order, slots, pace):
        engine, events, rest = engine_for(gpt, slots), {i: [] for i in order}, list(order)
        engine.CHUNK = 7  # prompts are read in several parts
        while rest or engine.busy:
            for i in rest[:pace]: engine.add(*wanted[i], name=i)
            del rest[:pace]
            for token in engine.step(): events[token.row].append(token)
        return events
    whole = [play([i], 1, 1)[i] for i in range(36)]
    assert {t.finish_reason for row in whole for t in row} == {None, "stop", "length"}
    for slots, pace in ((2, 1), (5, 3), (16, 36)):
        got = play(rng.permutation(36).tolist(), slots, pace)
        for i in range(36):
            assert [t[:3] for t in got[i]] == [t[:3] for t in whole[i]], SETTINGS[i % 12]
            for a, b in zip(got[i], whole[i]):
                assert a.logprob is None or abs(a.logprob - b.logprob) < 1e-4 and len(a.top) == 3


def test_a_beginning_in_common_is_read_once(model, compiled, monkeypatch):
    engine, read = engine_for(made(model.decoder, compiled), 4), []
    original = type(engine.slots).prefill
    monkeypatch.setattr(type(engine.slots), "prefill", lambda self, chunks: (read.append(sum(len(ids) for *_, ids in chunks)), original(self, chunks))[1])
    prompt = list(range(14))
    for name in range(8): engine.add(prompt + [name], GenerationConfig(max_new_tokens=1), name=name)
    rows = {}
    while engine.busy: rows |= {token.row: token.id for token in engine.step()}
    assert sum(read) == 15 + 7
    for name in range(8):
        alone = engine_for(made(model.decoder, compiled), 1)
        alone.add(prompt + [name], GenerationConfig(max_new_tokens=1))
        assert alone.step()[0].id == rows[name]


def test_cancelling_frees_the_slot(model, compiled):
    engine = engine_for(made(model.decoder, compiled), 1)
    first, second, third = (engine.add([1], GenerationConfig(max_new_tokens=1000), name=name) for name in "abc")
    engine.step(); engine.step()
    engine.cancel(first)
    engine.cancel(third)  # it has not begun
    assert {token.row for _ in range(3) for token in engine.step()} == {"b"}
    engine.cancel(second)
    engine.cancel(second)
    assert engine.step() == [] and not engine.busy and not engine.seats.requests


def test_a_long_prompt_does_not_hold_up_the_others(model):
    engine = engine_for(made(model.decoder, False), 4)
    engine.CHUNK = 2
    engine.add([1], GenerationConfig(max_new_tokens=100), name="short")
    engine.step()
    engine.add([2] * 16, GenerationConfig(max_new_tokens=100), name="long")
    steps = [[token.row for token in engine.step()] for _ in range(8)]
    assert steps == [["short"]] * 7 + [["short", "long"]]


RULES = [dict(regex="(cat|dog)s? (and|or) [a-c]{1,4}"), dict(regex=r"[a-z]+\.", temperature=0), dict(regex=r"a{3}b*c", presence_penalty=1.0, logprobs=2),
         dict(regex="x|y", min_new_tokens=5, stop_token_ids=(3,)), dict(regex="(ab ?){9}", no_repeat_ngram_size=2), dict(regex="[ab]{40}", top_k=1)]


def test_rules_are_obeyed_in_mixed_company(model, compiled):
    "What is constrained matches, or may still be finished; who shares the steps changes nothing for either."
    pytest.importorskip("llguidance")
    gpt = made(model.decoder, compiled)
    wanted = [([1 + i], GenerationConfig(**{"max_new_tokens": 45, **(RULES[i // 2 % 6] if i % 2 else {})}), i) for i in range(24)]
    def play(order, slots):
        engine, rows = engine_for(gpt, slots), {i: [] for i in order}
        for i in order: engine.add(*wanted[i], name=i)
        while engine.busy:
            for token in engine.step(): rows[token.row].append(token[:3])
        return rows
    together = play(range(24), 5)
    for i in range(24): assert play([i], 1)[i] == together[i]
    finished = 0
    for i in range(1, 24, 2):
        text, reason = TOKENIZER.decode([t[1] for t in together[i] if t[1] is not None]), together[i][-1][2]
        if reason == "stop": assert re.fullmatch(RULES[i // 2 % 6]["regex"], text)
        else: assert len(text) == 45
        finished += reason == "stop"
    assert finished >= 6


def test_json_by_a_schema(compiled):
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 1, "maxItems": 3}
    torch.manual_seed(0)
    gpt = GPT(Decoder(DecoderConfig(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=1)), ByteTokenizer(eos_token="<end>"))
    gpt.compile = compiled
    for generation in gpt.generate(["a", "b"], json_schema=schema, n=6, seed=2, temperature=0.7):
        assert generation.finish_reason == "stop" and set(json.loads(generation.text)) <= {1, "two", None}
        assert gpt.tokenizer.eos_id not in generation.token_ids


def test_a_rule_that_cannot_be_obeyed_ends_one_request(model, compiled, monkeypatch):
    pytest.importorskip("llguidance")
    gpt = made(model.decoder, compiled)
    with pytest.raises(UsageError, match="regex '.a': unclosed"): gpt.generate("a", regex="[a")
    with pytest.raises(UsageError, match="can go on after ''"): gpt.generate("a", regex="[0-9]+")
    engine = engine_for(gpt, 2)
    bad = engine.add([1], GenerationConfig(regex="[a-z]{30}"), name="bad")
    good = engine.add([2], GenerationConfig(max_new_tokens=9), name="good")
    engine.step()
    monkeypatch.setattr(bad.constraint, "advance", lambda token: (_ for _ in ()).throw(TextgenError("too much")))
    while engine.busy: engine.step()
    assert (bad.finish_reason, str(bad.error), good.finish_reason, good.written) == ("error", "too much", "length", 9)


def test_a_fault_ends_one_request_and_its_slot_is_clean(model, compiled):
    "One token is poison to the model: only texts that have it end, and whoever takes their slot is not harmed."
    decoder = copy.deepcopy(model.decoder)
    with torch.no_grad(): decoder.transformer.wte.weight[V - 1] = math.nan
    gpt, healthy = made(decoder, compiled), made(model.decoder, compiled)
    def play(gpt, prompts):
        engine = engine_for(gpt, 3)
        engine.vocab = V - 1  # the poison is never written
        asked = [engine.add(prompt, GenerationConfig(max_new_tokens=n), seed=n) for n, prompt in prompts]
        while engine.busy: engine.step()
        return asked
    prompts = [(5 + n % 7, [n % 9, V - 1, 3] * 4 if n % 3 == 1 else [n % 9, 2, 3][:1 + n % 3]) for n in range(20)]
    for broken, whole, (_, prompt) in zip(play(gpt, prompts), play(healthy, prompts), prompts):
        if V - 1 in prompt: assert broken.finish_reason == "error" and "first in the embeddings" in str(broken.error)
        else: assert broken.finish_reason == "length" and broken.ids == whole.ids


def test_an_exception_leaves_the_engine_clearly_dead(model, compiled, monkeypatch):
    engine = engine_for(made(model.decoder, compiled), 2)
    engine.add([1], GenerationConfig(max_new_tokens=50))
    engine.step()
    for name in ("decode", "write"): monkeypatch.setattr(type(engine.slots), name, lambda *a: {}["no such thing"], raising=False)
    with pytest.raises(KeyError): engine.step()
    for call in (engine.step, lambda: engine.add([1])):
        with pytest.raises(TextgenError, match="stopped in the middle of a step .*no such thing.*; make a new one"): call()


def test_a_thousand_requests_over_16_slots(model, compiled):
    engine, rng, ended = engine_for(made(model.decoder, compiled), 16), np.random.default_rng(0), []
    asked = [engine.add(rng.integers(0, V, rng.integers(1, L + 1)).tolist(), GenerationConfig(max_new_tokens=int(rng.integers(1, 12)), stop_token_ids=(5,)),
                        seed=n, name=n) for n in range(1000)]
    for request in asked[::10]: engine.cancel(request)
    while engine.busy:
        for token in engine.step():
            if token.finish_reason: ended.append(token.row)
            if token.row % 10 == 1: engine.cancel(asked[token.row])  # in the middle of the events of a step
    assert {r.finish_reason for r in asked} == {"stop", "length", "cancelled"} and len(ended) == len(set(ended))
    assert {n for n in range(1000) if n % 10 > 1} <= set(ended) and not engine.seats.requests and engine.seats.writing == 0


def test_slides_while_others_read_long_prompts(compiled):
    torch.manual_seed(3)
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=12, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad(): decoder.transformer.wte.weight.mul_(30)
    gpt, rng = made(decoder, compiled), np.random.default_rng(4)
    prompts = [rng.integers(0, V, 12).tolist() for _ in range(10)]
    engine, rows = engine_for(gpt, 4), {n: [] for n in range(10)}
    engine.CHUNK = 3  # so reading a prompt takes four steps
    for n, prompt in enumerate(prompts): engine.add(prompt, GenerationConfig(max_new_tokens=15 + n, temperature=0), name=n)
    while engine.busy:
        for token in engine.step(): rows[token.row].append(token.id)
    for n, prompt in enumerate(prompts):
        assert slow(decoder, prompt, 15 + n, lambda logits, t: logits.argmax(-1))[12:] == rows[n]


@pytest.mark.parametrize("prompt, settings, words", [
    ("text", {}, "prompt: give token ids"), ([], {}, "prompt of 0 tokens"), ([1] * (L + 1), {}, f"prompt of {L + 1} tokens"), ([V], {}, f"token id {V}"),
    ([-1], {}, "token id -1"), ([1], dict(config={"top_k": 3}), "config: give a GenerationConfig"), ([1], dict(seed=-1), "seed: give a whole number"),
    ([1], dict(config=GenerationConfig(stop_token_ids=(V,))), "stop_token_ids:"), ([1], dict(config=GenerationConfig(regex="(")), "regex"),
    ([1], dict(config=GenerationConfig(overflow="error", max_new_tokens=99)), "exceed the model's context")])
def test_bad_requests_are_one_line_and_leave_nothing_behind(model, prompt, settings, words):
    engine = engine_for(made(model.decoder, False), 2)
    with pytest.raises(UsageError) as told: engine.add(prompt, **settings)
    assert words in str(told.value) and "\n" not in str(told.value) and not engine.busy


def test_training_goes_on_after_writing(model, compiled):
    "Packed weights are made anew when the decoder has changed."
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=L, n_embd=32, n_layer=1, n_head=2))
    gpt, settings = made(decoder, compiled), dict(temperature=0, max_new_tokens=5, seed=0)
    gpt.generate("ab", **settings)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.5)
    decoder.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    optimizer.step()
    assert gpt.generate("ab", **settings) == made(decoder, not compiled).generate("ab", **settings)


def test_without_a_compiler_it_is_said_once(model, monkeypatch):
    monkeypatch.setattr("textgen.kernels.compiler", lambda: None)
    native_library.cache_clear()
    gpt = made(model.decoder, True)
    with pytest.warns(UserWarning, match="no C compiler was found"): text = gpt.generate("ab", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpt.generate("ab", seed=1) == text


def test_too_little_memory_says_what_would_fit(model, monkeypatch):
    monkeypatch.setattr("textgen.slots.free_memory", lambda device: 10**6)
    for compile in (False, True):
        with pytest.raises(TextgenError, match=r"16 texts of 10000 tokens need 0.1 GB for keys and values, and 0.0 GB are free: \d+ texts"):
            big = Decoder(DecoderConfig(vocab_size=V, n_positions=10000, n_embd=32, n_layer=2, n_head=4))
            engine_for(made(big, compile), 16)


def test_which_layer_broke(model, compiled):
    decoder = copy.deepcopy(model.decoder)
    with torch.no_grad(): decoder.transformer.h[1].mlp.c_fc.weight[3] = math.nan
    with pytest.raises(TextgenError, match="at new token 1 of row 0: .* first in block 1 .of 0 to 1"): made(decoder, compiled).generate("ab")


def test_which_layer_broke_where_attention_hides_it(model):
    "PyTorch's attention gives 0 for keys that are NaN, the compiled step NaN: the layer is found all the same."
    decoder = copy.deepcopy(model.decoder)
    with torch.no_grad(): decoder.transformer.h[0].attn.c_attn.weight[32:64] = math.nan
    with pytest.raises(TextgenError, match="first in block 0"): made(decoder, True).generate("ab")


def test_a_row_is_the_same_in_any_company(model):
    rng, settings = np.random.default_rng(1), dict(max_new_tokens=50, stop_token_ids=(3, 4), top_p=0.9)
    texts = ["".join(rng.choice(list("abcdefgh ."), rng.integers(1, L + 1))) for _ in range(12)]
    alone = {text: model.generate(text, seed=5, **settings)[0] for text in texts}
    for _ in range(5):
        company = list(rng.choice(texts, 6))
        assert model.generate(company, seed=5, **settings) == [alone[text] for text in company]


def test_laid_out_is_the_same(model):
    turned, ids = lay_out(Decoder(model.decoder.config)), torch.randint(V, (3, 9))
    turned.load_state_dict(model.decoder.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(turned(ids), model.decoder(ids), atol=1e-4, rtol=1e-4)
    turned.loss(ids[:, :-1], ids[:, 1:]).backward()  # and can still learn
    optimizer = torch.optim.AdamW(turned.parameters())
    optimizer.step()


def test_a_closed_stream_frees_its_caches(model, compiled, monkeypatch):
    made_slots, original = [], gpt_module.slots_for
    monkeypatch.setattr(gpt_module, "slots_for", lambda *args: (made_slots.append(weakref.ref(slots := original(*args))), slots)[1])
    gpt = made(model.decoder, compiled)
    try:
        gc.disable()  # freed by the count of references alone
        for end in ("close", "drop", "break"):
            stream = gpt.stream(["ab", "c"], max_new_tokens=10)
            next(stream)
            assert made_slots[-1]() is not None
            if end == "close": stream.close()
            if end == "break":
                for _ in stream: break
            del stream
            assert made_slots[-1]() is None
    finally:
        gc.enable()


def test_the_world_between_two_tokens_is_as_it_was(model):
    decoder = model.decoder
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in model.stream("ab", seed=1, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        decoder.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # somebody trains in between
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    decoder.zero_grad()


def test_two_streams_at_once(model):
    one, two = (model.stream(text, seed=2, max_new_tokens=30) for text in ("ab", "xyz"))
    mixed = list(zip(one, two))
    assert "".join(a.text for a, _ in mixed) == model.generate("ab", seed=2, max_new_tokens=30)[0].text
    assert "".join(b.text for _, b in mixed) == model.generate("xyz", seed=2, max_new_tokens=30)[0].text


def test_an_endless_stream_begins_at_once(model):
    stream = model.stream("ab", max_new_tokens=10**12)
    assert all(next(stream) for _ in range(40))


def test_one_wait_a_step(model, monkeypatch):
    "Python asks the device for values once a step: in `tolist`."
    asked = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name, f=original: (asked.append(name), f(self, *a))[1])
    list(write(made(model.decoder, False), [[1, 2], [3]], [0, 1], GenerationConfig(max_new_tokens=10, top_p=0.9, top_k=5, temperature=0.8)))
    assert asked == ["tolist"] * 10


def test_finished_rows_cost_nothing(model, monkeypatch):
    sizes = []
    monkeypatch.setattr("textgen.slots.decode_one", lambda *args: (sizes.append(len(args[1])), decode_one(*args))[1])
    config = GenerationConfig(max_new_tokens=30, overflow="stop")
    list(write(made(model.decoder, False), [[1] * n for n in (10, 12, 15, 16)], range(4), config))
    assert max(sizes) == 2 and sum(sizes) == 5 + 3  # the rows have room for 6, 4, 1 and 0 tokens; the first come from the prefill


def test_what_a_prompt_costs(model, monkeypatch):
    "The head sees one token of each prompt."
    seen = []
    monkeypatch.setattr(type(model.decoder), "logits", lambda self, x: (seen.append(tuple(x.shape)), x @ self.transformer.wte.weight.T)[1])
    prefill(model.decoder, [[1, 2, 3], [4]], model.decoder.caches(2))
    assert seen == [(2, 32)]


@pytest.mark.parametrize("length, stride, N", [(16, None, 100), (16, 16, 33), (16, 5, 50), (4, 1, 20), (1, 1, 5), (16, 8, 17), (16, 8, 16)])
@pytest.mark.parametrize("prefix", [None, 3])
def test_token_nll_is_the_slow_sum(model, length, stride, N, prefix):
    ids = np.random.default_rng(N).integers(0, V, N)
    ours = token_nll(model.decoder, torch.from_numpy(ids), length, stride, batch_size=3, prefix=prefix)
    ids, stride = ([] if prefix is None else [prefix]) + ids.tolist(), stride or length
    assert ours.dtype == np.float32 and len(ours) == len(ids) - 1
    with torch.no_grad():
        for t in range(1, len(ids)):
            begin = 0 if t <= length else math.ceil((t - length) / stride) * stride
            logits = model.decoder(torch.tensor([ids[begin:t]]))[0, -1]
            assert abs(-logits.log_softmax(-1)[ids[t]].item() - ours[t - 1]) < 1e-3


def test_windows_score_each_token_once():
    for N in range(2, 40):
        for length in range(1, 12):
            for stride in range(1, length + 1):
                scored = [i for begin, first in windows(N, length, stride) for i in range(begin + first, min(begin + length, N - 1))]
                assert scored == list(range(N - 1))


def test_document_nll(model):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, V, n) for n in (5, 0, 1, 70, 16, 17, 15, 2)]
    for prefix in (None, 7):
        ours = document_nll(model.decoder, documents, prefix, batch_size=2)
        for ids, nats in zip(documents, ours):
            expected = token_nll(model.decoder, ids, L, L // 2, prefix=prefix).sum() if len(ids) + (prefix is not None) > 1 else 0
            assert abs(nats - expected) < 1e-3
    assert document_nll(model.decoder, []).shape == (0,)


def test_scoring_keeps_the_mode_and_needs_no_gradient():
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=L, n_embd=8, n_head=1, n_layer=1, dropout=0.9)).train()
    twice = [token_nll(decoder, np.arange(20) % V, L) for _ in range(2)]
    assert decoder.training and np.array_equal(*twice)
    with pytest.raises(UsageError): token_nll(decoder, [1, V], L)
    assert decoder.training


def test_saving_replaces_only_its_own_files(model, tmp_path, monkeypatch):
    place = tmp_path/"run"
    (place/"checkpoints").mkdir(parents=True)
    (place/"config.yaml").write_text("seed: 1\n")
    GPT(model.decoder, TOKENIZER, GenerationConfig(temperature=0.5, top_k=3)).save(place)
    model.save(place)
    again = textgen.load(place)
    assert again.defaults == GenerationConfig() and again.generate("ab", seed=1) == model.generate("ab", seed=1)
    names = ["checkpoints", "config.json", "config.yaml", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(place)) == names
    before = {name: (place/name).read_bytes() for name in names[1:]}
    monkeypatch.setattr("textgen.gpt.write_checkpoint", lambda *arguments, **settings: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TextgenError, match="could not write .*No space left"): GPT(model.decoder, TOKENIZER).save(place)
    assert sorted(os.listdir(place)) == names and before == {name: (place/name).read_bytes() for name in names[1:]}
    (tmp_path/"file").write_text("")
    with pytest.raises(TextgenError, match="could not write"): model.save(tmp_path/"file")


def test_bytes_stream_in_whole_characters(tmp_path):
    "A byte-level model that writes rubbish: what it streams joins to what it generates, and the end-of-text token ends it."
    tokenizer = BPETokenizer.train(["größer é ☃ 🙂 ab"], 300, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    gpt = GPT(Decoder(DecoderConfig(vocab_size=512, n_positions=8, n_embd=8, n_head=1, n_layer=1)), tokenizer)
    assert gpt.eos_id == tokenizer.eos_id
    gpt.save(tmp_path)
    gpt = textgen.load(tmp_path)
    assert gpt.eos_id == tokenizer.eos_id
    whole = gpt.generate(["", "é"], n=4, seed=1, max_new_tokens=300)
    texts = [""] * 8
    for piece in gpt.stream(["", "é"], n=4, seed=1, max_new_tokens=300): texts[piece.row] += piece.text
    assert texts == [g.text for g in whole] and all(g.text == tokenizer.decode(g.token_ids) for g in whole)
    assert any(g.finish_reason == "stop" for g in whole) and all(tokenizer.eos_id not in g.token_ids for g in whole)
    assert all(0 < nats < math.inf for nats in gpt.nll(["é", "🙂☃", "a" * 50]))


def test_settings_of_other_programs(tmp_path, model):
    model.save(tmp_path)
    file = tmp_path/"generation_config.json"
    for values, ours, eos in [
        ({}, {}, None),
        ({"_from_model_config": True, "eos_token_id": 50256, "transformers_version": "5"}, {}, None),  # no token of this model
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [2, 5, 6]},
         dict(temperature=0.6, top_p=0.9, top_k=50, stop_token_ids=(5, 6)), 2),
        ({"do_sample": False, "temperature": 1.0, "top_k": 50, "max_new_tokens": 7}, dict(temperature=0, max_new_tokens=7), None),
        ({"top_k": 0, "top_p": None, "max_length": 50, "eos_token_id": 0}, {}, 0),
    ]:
        file.write_text(json.dumps(values))
        gpt = textgen.load(tmp_path)
        assert (gpt.defaults, gpt.eos_id) == (GenerationConfig(**ours), eos)


def test_importing_textgen_does_not_import_the_engine():
    code = "import sys, textgen; textgen.GenerationConfig; assert 'torch' not in sys.modules and 'textgen.gpt' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_on_a_gpu(model, tmp_path):
    model.save(tmp_path)
    gpt = GPT.load(tmp_path, "cuda")
    settings = dict(seed=3, max_new_tokens=60, n=4, top_p=0.95)
    assert gpt.generate(["ab", "the cat"], **settings) == model.generate(["ab", "the cat"], **settings)
    assert np.allclose(gpt.nll(["ab", "the cat sat on"]), model.nll(["ab", "the cat sat on"]), rtol=1e-4)
    with pytest.raises(UsageError, match="token id 99"): next(write(gpt, [[99]], [0], GenerationConfig()))
