"""What no notebook can check of the engine: memory after a stream is closed, waits for the device, other devices, faults of the disk."""
import gc, json, math, os, subprocess, sys, weakref

import numpy as np
import pytest
import torch

import textgen
from textgen import engine
from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.engine import GPT, Batch, decode_one, document_nll, flat, lay_out, leave, prefill, step, token_nll, windows, write
from textgen.tokenizer import BPETokenizer, CharTokenizer

L = 16
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\n")
V = TOKENIZER.vocab_size


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models so small are slowed down by a second one."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("context", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("temperature", [0, 1])
def test_ragged_batches_slide_as_the_slow_loop_does(context, temperature):
    torch.manual_seed(context)
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=context, n_embd=16, n_layer=2, n_head=2, dropout=0.5))
    with torch.no_grad(): decoder.transformer.wte.weight.mul_(30)
    rng = np.random.default_rng(context)
    prompts = [rng.integers(0, V, rng.integers(1, context + 1)).tolist() for _ in range(7)]
    config, seeds = GenerationConfig(temperature=temperature, max_new_tokens=40, top_k=9), list(range(7))
    rows = [[] for _ in prompts]
    for row, token, *_ in write(decoder, prompts, seeds, config): rows[row].append(token)
    assert decoder.training
    decoder.eval()
    for prompt, seed, row in zip(prompts, seeds, rows):
        u = torch.from_numpy(textgen.core.uniforms(seed, 40))
        assert slow(decoder, prompt, 40, lambda logits, t: engine.choose(logits, u[t:t + 1], config))[len(prompt):] == row


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


def test_a_closed_stream_frees_its_caches(model):
    caches = []
    class Watched(Batch):
        def __init__(self, *args):
            super().__init__(*args)
            caches.extend(weakref.ref(cache.k) for cache in self.caches)
    engine.Batch = Watched
    try:
        gc.disable()  # freed by the count of references alone
        for end in ("close", "drop", "break"):
            stream = model.stream(["ab", "c"], max_new_tokens=10)
            next(stream)
            assert len(caches) == 2 and all(ref() is not None for ref in caches)
            if end == "close": stream.close()
            if end == "break":
                for _ in stream: break
            del stream
            assert all(ref() is None for ref in caches)
            caches.clear()
    finally:
        engine.Batch = Batch
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
    list(write(model.decoder, [[1, 2], [3]], [0, 1], GenerationConfig(max_new_tokens=10, top_p=0.9, top_k=5, temperature=0.8)))
    assert asked == ["tolist"] * 10


def test_finished_rows_cost_nothing(model, monkeypatch):
    sizes = []
    monkeypatch.setattr(engine, "decode_one", lambda *args: (sizes.append(len(args[2])), decode_one(*args))[1])
    config = GenerationConfig(max_new_tokens=30, overflow="stop")
    list(write(model.decoder, [[1] * n for n in (10, 12, 15, 16)], range(4), config))
    assert sizes == [2] * 3 + [1] * 2  # the rows have room for 6, 4, 1 and 0 tokens; the first come from the prefill


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
    monkeypatch.setattr("textgen.engine.write_checkpoint", lambda decoder, path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
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
    code = "import sys, textgen; textgen.GenerationConfig; assert 'torch' not in sys.modules and 'textgen.engine' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_on_a_gpu(model, tmp_path):
    model.save(tmp_path)
    gpt = GPT.load(tmp_path, "cuda")
    settings = dict(seed=3, max_new_tokens=60, n=4, top_p=0.95)
    assert gpt.generate(["ab", "the cat"], **settings) == model.generate(["ab", "the cat"], **settings)
    assert np.allclose(gpt.nll(["ab", "the cat sat on"]), model.nll(["ab", "the cat sat on"]), rtol=1e-4)
    with pytest.raises(UsageError, match="token id 99"): next(write(gpt.decoder, [[99]], [0], GenerationConfig()))
    batch = Batch(gpt.decoder, [[1, 2], [3]], [1, 2], GenerationConfig(max_new_tokens=20))
    step(batch)
    tolist = torch.Tensor.tolist
    def allowed(self):
        torch.cuda.set_sync_debug_mode("default")
        try: return tolist(self)
        finally: torch.cuda.set_sync_debug_mode("error")
    torch.Tensor.tolist = allowed
    torch.cuda.set_sync_debug_mode("error")  # anything else that waits is an error
    try:
        for _ in range(5): step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.Tensor.tolist = tolist
    leave(batch, 0)
    step(batch)
