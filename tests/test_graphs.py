"""Recordings of a step: as far as a CPU can tell, and what only a GPU can: equal texts, no waiting, memory, int8, other devices, other threads."""
import gc, threading, weakref
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from textgen import gpt as gpt_module
from textgen.core import GenerationConfig, TextgenError
from textgen.decoder import Decoder, DecoderConfig
from textgen.engine import Engine
from textgen.gpt import GPT, engine_for, graph_slots, slots_for
from textgen.graphs import GraphSlots, Replay
from textgen.int8 import Int8Matrix, compiled_multiply, in_int8, multiply, to_int8
from textgen.slots import Slots, free_memory
from textgen.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\n")
V, L = TOKENIZER.vocab_size, 128
GPT2 = {}
LLAMA = dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=2, tie_word_embeddings=False)
SETTINGS = [dict(temperature=0), dict(top_p=0.9), dict(temperature=1.7, top_k=5), dict(min_p=0.1), dict(logit_bias={3: 2.0}), dict(repetition_penalty=1.2),
            dict(logprobs=2, temperature=0.5)]


def model_of(family=GPT2, device="cpu", dtype=torch.float32, context=L):
    "Random weights, large enough that logits differ clearly."
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=V, n_positions=context, n_embd=64, n_layer=2, n_head=4, **family)).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() == 2: p.mul_(10)
    return GPT(decoder.to(device, dtype), TOKENIZER)


def texts(model, slots, settings=SETTINGS, tokens=30):
    "Ragged prompts, one for each setting, of which some wait until others have left."
    engine = Engine(slots, model.decoder.config, V, TOKENIZER)
    for name, setting in enumerate(settings):
        engine.add([1 + name] * (1 + 7 * name % 20), GenerationConfig(max_new_tokens=tokens + name, **setting), seed=name, name=name)
    rows = [[] for _ in settings]
    while engine.busy:
        for token in engine.step(): rows[token.row].append(token.id)
    return rows


@pytest.mark.parametrize("family", [GPT2, dict(mlp="gelu_erf"), LLAMA], ids=["gpt2", "exact gelu", "llama"])
@pytest.mark.parametrize("context", [24, L])  # in the shorter one texts slide
def test_replayed_rows_are_those_of_plain_slots(family, context, monkeypatch):
    monkeypatch.setattr(GraphSlots, "STRIDE", 16)
    model = model_of(family, context=context)
    slots = GraphSlots(model.decoder, 3, context)
    assert texts(model, slots) == texts(model, Slots(model.decoder, 3, context))
    assert {B for B, _ in slots.steps} == {1, 2, 3} and len({upto for _, upto in slots.steps}) > 1 and slots.choices
    made = dict(slots.steps), dict(slots.choices)
    assert texts(model, slots) == texts(model, Slots(model.decoder, 3, context))  # the second time nothing is recorded
    assert (slots.steps, slots.choices) == made


def test_slots_are_handed_on(monkeypatch):
    "From text to text, unless they are in use, too small, or the weights have changed."
    model, settings = model_of(), dict(seed=1, max_new_tokens=20)
    wanted = model.generate(["ab", "c"], n=2, **settings)
    monkeypatch.setattr(gpt_module, "slots_for", lambda model, rows, length, tokens: graph_slots(model, rows, min(length, L)))
    assert model.generate(["ab", "c"], n=2, **settings) == wanted
    kept = model.idle[1]
    assert kept.slots == 4 and kept.length == L and model.generate(["ab", "c"], n=2, **settings) == wanted and model.idle[1] is kept
    for _ in range(2):
        assert model.generate("c", **settings) == wanted[2:3] and model.idle[1] is kept
    stream = model.stream("ab", **settings)
    next(stream)
    assert not hasattr(model, "idle") and model.generate("c", **settings) == wanted[2:3]  # with others
    stream.close()
    assert model.idle[1] is kept
    assert model.generate("c", n=5, **settings)[0] == wanted[2] and model.idle[1].slots == 5
    gone, kept = weakref.ref(kept), None
    gc.collect()
    assert gone() is None
    with torch.no_grad(): model.decoder.transformer.wte.weight[0] += 1
    old = model.idle[1]
    model.generate("c", **settings)
    assert model.idle[1] is not old
    with torch.no_grad(): model.decoder.transformer.wte.weight[:] = torch.nan
    with pytest.raises(TextgenError, match="no numbers"): model.generate("c", **settings)
    assert all(cache.k.isfinite().all() for cache in model.idle[1].caches)


def test_a_recording_that_fails_says_what_to_do(monkeypatch):
    def fail(*arguments): raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"): monkeypatch.setattr(torch.cuda, name, MagicMock())
    with pytest.raises(TextgenError) as told: Replay(fail, torch.device("cuda", 99))
    assert "capturing); go on without by compile=False" in str(told.value) and "\n" not in str(told.value)


# On a GPU

@pytest.fixture
def no_waiting():
    "A function from work to what it gives; whatever waits for the GPU in it is an error."
    def run(work):
        torch.cuda.set_sync_debug_mode("error")
        try: return work()
        finally: torch.cuda.set_sync_debug_mode("default")
    return run


@pytest.mark.gpu
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gpu_texts_are_those_of_the_cpu(family):
    cpu, gpu = model_of(family), model_of(family, "cuda")
    assert type(slots_for(gpu, 2, 40, 40)) is GraphSlots
    for setting in SETTINGS[:-1]:
        settings = dict(seed=3, max_new_tokens=60, n=4, **setting)
        cpu.compile = False
        assert gpu.generate(["ab", "the cat"], **settings) == cpu.generate(["ab", "the cat"], **settings)
    slots = GraphSlots(gpu.decoder, 3, L)
    assert texts(gpu, slots) == texts(cpu, Slots(cpu.decoder, 3, L)) == texts(gpu, slots)
    gpu.compile = False
    assert type(slots_for(gpu, 2, 40, 40)) is Slots
    assert texts(gpu, Slots(gpu.decoder, 3, L)) == texts(cpu, Slots(cpu.decoder, 3, L))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("replayed", [True, False])
def test_gpu_no_step_waits(kind, replayed, no_waiting):
    "Rows with settings of all kinds, once they are being written."
    model = model_of(LLAMA, "cuda", torch.float32 if kind == "float32" else torch.bfloat16)
    if kind == "int8": in_int8(model.decoder)
    model.compile = replayed
    engine = engine_for(model, len(SETTINGS), L)
    for name, setting in enumerate(SETTINGS): engine.add([1, 2, name], GenerationConfig(max_new_tokens=90, **setting), seed=name, name=name)
    for _ in range(8): engine.step()
    events = no_waiting(lambda: [token for _ in range(70) for token in engine.step()])
    assert len(events) == 70 * len(SETTINGS) and all(token.id is not None for token in events)
    while engine.busy: engine.step()


@pytest.mark.gpu
def test_gpu_one_copy_a_step():
    "What a step sends to the host is its tokens, and what it gets from there is nothing."
    from torch.profiler import ProfilerActivity, profile
    model = model_of(GPT2, "cuda")
    engine = engine_for(model, 4, L)
    for name in range(4): engine.add([1, 2, name], GenerationConfig(max_new_tokens=60, **SETTINGS[name]), seed=name, name=name)
    for _ in range(8): engine.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(20): engine.step()
        torch.cuda.synchronize()
    copies = [event.name for event in seen.events() if "Memcpy" in event.name]
    assert sum("DtoH" in name for name in copies) == 20 and not any("HtoD" in name for name in copies), copies


@pytest.mark.gpu
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gpu_bfloat16_and_int8_logits(family):
    exact, ids = model_of(family).decoder, torch.randint(V, (1, 50))
    for kind, near in (("bfloat16", 0.05), ("int8", 0.05)):
        decoder = model_of(family).decoder
        decoder = (in_int8(decoder) if kind == "int8" else decoder).to("cuda", torch.bfloat16)
        wanted, got = exact(ids)[0, -1].detach(), []
        for slots in (Slots(decoder, 2, L), GraphSlots(decoder, 2, L)):
            slots.prefill([(0, 0, ids[0, :-1].tolist()), (1, 0, [1])])
            got.append(slots.decode(ids[:, -1:].cuda().expand(2, 1), torch.tensor([49, 1], device="cuda"), [50, 2])[0, 0].float().cpu())
        assert (got[0] - wanted).norm() < near * wanted.norm()
        assert_close(*got, atol=0.02 * float(wanted.abs().max()), rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["auto", True, False])
def test_gpu_int8(tmp_path, compile):
    "A model of which little but bytes is on the GPU, with and without a kernel of its own."
    model_of(GPT2).save(tmp_path)
    before = torch.cuda.memory_allocated()
    model = GPT.load(tmp_path, "cuda", "int8", compile)
    matrices = [x for x in model.decoder.modules() if isinstance(x, Int8Matrix)]
    assert all(x.numbers.is_cuda and x.numbers.dtype == torch.int8 for x in matrices)
    count = sum(p.numel() for p in model_of(GPT2).decoder.parameters())
    assert torch.cuda.memory_allocated() - before < 2 * count
    cpu = GPT.load(tmp_path, "cpu", "int8", False)
    assert all(torch.equal(a.numbers.cpu(), b.numbers) for a, b in zip(matrices, (x for x in cpu.decoder.modules() if isinstance(x, Int8Matrix))))
    first = model.generate("the cat", seed=1, max_new_tokens=40)
    assert first == model.generate("the cat", seed=1, max_new_tokens=40)
    assert np.allclose(model.nll(["the cat sat on a mat"]), cpu.nll(["the cat sat on a mat"]), rtol=0.05)
    assert model.decoder.transformer.wte.weight.dtype in (torch.bfloat16, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_a_compiled_product(dtype, recwarn):
    "One row by a kernel of Triton's, of matrices of any size, also replayed."
    device = torch.device("cuda", 0)
    quick = compiled_multiply(device, dtype)
    assert quick is not multiply and not recwarn.list, [str(warning.message) for warning in recwarn.list]
    for O, I in ((1, 1), (5, 3), (300, 70), (2304, 768), (50257, 768)):
        w, x = torch.randn(O, I, device=device), torch.randn(1, I, device=device, dtype=dtype)
        numbers, scale = to_int8(w)
        with torch.inference_mode():
            wanted = multiply(x.float(), numbers, scale)
            assert_close(quick(x, numbers, scale.to(dtype)).float(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
            replay = Replay(lambda: quick(x, numbers, scale.to(dtype)), device)
            x.mul_(2)
            assert_close(replay(), quick(x, numbers, scale.to(dtype)))


@pytest.mark.gpu
def test_gpu_recordings_share_memory():
    "Those of many numbers of rows need little more than the largest."
    model = model_of(GPT2, "cuda")
    slots = GraphSlots(model.decoder, 32, L)
    taken = []
    for B in (32, *range(31, 0, -1)):
        slots.decode(torch.zeros(B, 1, dtype=torch.int64, device="cuda"), torch.arange(B, device="cuda") % 5, [5] * B)
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_reserved())
    assert len(slots.steps) == 32 and taken[-1] - taken[0] < 8 * 2**20
    results = [slots.decode(torch.zeros(B, 1, dtype=torch.int64, device="cuda"), torch.zeros(B, dtype=torch.int64, device="cuda"), [1] * B).clone() for B in (3, 7, 3)]
    assert_close(results[0], results[2], rtol=0, atol=0)
    assert_close(results[1][:3], results[0])


@pytest.mark.gpu
def test_gpu_another_thread_may_work_meanwhile():
    model, stop, failed = model_of(GPT2, "cuda"), threading.Event(), []

    def busy():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set(): torch.empty(2**20 + np.random.randint(2**20), device="cuda").zero_().sum().item()
        except Exception as error: failed.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for n in range(1, 6): assert len(model.generate("ab", n=n, seed=1, max_new_tokens=10)) == n
    finally:
        stop.set()
        thread.join()
    assert not failed


@pytest.mark.gpu
def test_gpu_memory_of_what_was_let_go_is_free():
    device = torch.device("cuda", 0)
    before = free_memory(device)
    x = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_memory(device) < before - 2**27
    del x
    assert free_memory(device) > before - 2**24


@pytest.mark.gpu
def test_gpu_the_second_of_two():
    if torch.cuda.device_count() < 2: pytest.skip("one GPU")
    cpu, gpu = model_of(LLAMA), model_of(LLAMA, "cuda:1")
    cpu.compile = False
    for setting in SETTINGS[:4]:
        settings = dict(seed=3, max_new_tokens=60, n=3, **setting)
        assert gpu.generate("ab", **settings) == cpu.generate("ab", **settings)
