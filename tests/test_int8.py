"""What chapter 6j's notebook cannot check: int8 weights in decoders of any shape, without a compiler, on the command line, and on a GPU."""
import copy, os, subprocess, sys, warnings, weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

import textgen
from textgen.core import UsageError
from textgen.decoder import Decoder
from textgen.gpt import GPT, slots_for
from textgen.graphs import GraphSlots
from textgen.int8 import Int8Matrix, compiled_multiply, in_floats, in_int8, multiply, to_int8
from textgen.kernels import Arena, build, compiler, linear, pack
from textgen.native import NativeSlots, Packed
from textgen.scoring import document_nll
from textgen.slots import Slots
from textgen.speculative import DraftModel
from textgen.tokenizer import CharTokenizer
from conftest import KNOWN, needs_known
from test_native import configs, decoder_of, made_anew, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")
CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]


def matrices_of(decoder): return [layer for layer in decoder.modules() if isinstance(layer, nn.Linear) or layer is decoder.transformer.wte]


def rounded(decoder):
    "A copy whose floats are what int8 keeps of them."
    decoder = copy.deepcopy(decoder)
    with torch.no_grad():
        for layer in matrices_of(decoder): layer.weight.copy_(Int8Matrix(*to_int8(layer.weight)).detach())
    return decoder


@settings(max_examples=40, deadline=None)
@given(configs(), st.data())
def test_a_decoder_in_bytes_is_the_one_with_the_rounded_floats(config, data):
    "Read at once, in slots of both kinds, and scored."
    floats, ids = decoder_of(config), tokens(config, data.draw(st.integers(1, config.n_positions)))
    other = tokens(config, data.draw(st.integers(1, config.n_positions)), 5)
    bytes_, floats = in_int8(copy.deepcopy(floats)), rounded(floats)
    with torch.no_grad(): wanted = floats(torch.tensor([ids]))[0]
    near = dict(atol=2e-4 * max(1.0, float(wanted.abs().max())), rtol=0)
    assert_close(bytes_(torch.tensor([ids]))[0], wanted, **near)
    for kind in (Slots, GraphSlots):
        slots = kind(bytes_, 2, config.n_positions)
        first = slots.prefill([(0, 0, ids[:1]), (1, 0, other)])
        rows = [first[0]]
        for t, i in enumerate(ids[1:], 1):
            rows.append(slots.decode(torch.tensor([[i], [other[-1]]]), torch.tensor([t, len(other) - 1]), [t + 1, len(other)])[0, 0].clone())
        assert_close(torch.stack(rows), wanted, **near)
    if len(ids) > 1: assert_close(*(torch.tensor(document_nll(decoder, [ids])) for decoder in (bytes_, floats)), rtol=1e-3, atol=1e-3)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.0, 1e-35, 1e-3, 1.0, 1e8]), st.booleans())
def test_the_rounding_is_that_of_the_compiled_step(O, I, size, halves):
    "Each input alone shows a column of the matrix; halves of a step go to the even number."
    w = size * torch.randn(O, I, generator=torch.Generator().manual_seed(O * 71 + I))
    if halves: w = torch.cat([torch.full((O, 1), 127.0), torch.randint(-253, 254, (O, I - 1)) / 2], 1)
    columns = linear(build(), pack(Arena(2**18), w, kind="int8"), torch.eye(I, (I + 15) // 16 * 16))[:, :O]
    matrix = Int8Matrix(*to_int8(w))
    assert_close(columns, matrix.detach().t(), rtol=1e-6, atol=0)
    if halves: assert matrix.numbers.tolist() == [[round(x) for x in row] for row in w.tolist()]  # Python rounds so, too
    again = pack(Arena(2**18), matrix, kind="int8")  # the compiled step may be given bytes
    assert_close(linear(build(), again, torch.eye(I, (I + 15) // 16 * 16))[:, :O], columns, rtol=1e-6, atol=0)


def test_the_floats_are_gone():
    config = textgen.decoder.DecoderConfig(vocab_size=500, n_positions=8, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=False)
    decoder = Decoder(config).eval()
    alive = [weakref.ref(layer.weight) for layer in matrices_of(decoder)]
    count = sum(layer.weight.numel() for layer in matrices_of(decoder))
    outputs = sum(len(layer.weight) for layer in matrices_of(decoder))
    others = sum(p.numel() for p in decoder.parameters()) - count
    assert in_int8(decoder) is decoder and not any(ref() is not None for ref in alive)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*decoder.parameters(), *decoder.buffers())}
    assert sum(storages.values()) == count + 4 * outputs + 4 * others
    matrix = decoder.transformer.h[0].mlp.c_fc.weight
    assert matrix.t().numbers.data_ptr() == matrix.numbers.data_ptr()  # turned, it is the same memory
    again = copy.deepcopy(decoder)
    assert_close(again(torch.tensor([[1, 2]])), decoder(torch.tensor([[1, 2]])))
    with pytest.raises(UsageError, match="token ids from 600"): decoder(torch.tensor([[600]]))
    with pytest.raises(UsageError, match="token ids from -1"): decoder(torch.tensor([[-1]]))


def test_other_types_and_functions():
    matrix, x = Int8Matrix(*to_int8(torch.randn(6, 4))).to(torch.bfloat16), torch.randn(3, 4)
    assert matrix.numbers.dtype == torch.int8 and (x.bfloat16() @ matrix.t()).dtype == matrix.detach().dtype == torch.bfloat16
    decoder = in_int8(decoder_of(textgen.decoder.DecoderConfig(vocab_size=9, n_embd=8, n_layer=1)).bfloat16())
    assert decoder(torch.tensor([[1, 2]])).dtype == decoder.caches(1)[0].k.dtype == torch.bfloat16
    matrix = matrix.float()
    square = Int8Matrix(*to_int8(torch.randn(4, 4)))
    for one in (square, square.t()):  # either way round, and on either side
        for function in (lambda w: x @ w, lambda w: w @ x.t(), lambda w: x[0] @ w, lambda w: F.linear(x, w), lambda w: F.linear(w, w),
                         lambda w: torch.addmm(x[0], x, w), lambda w: x.clone().addmm_(x, w), lambda w: F.linear(x[0], w), lambda w: F.linear(x[:0], w, x[0]), lambda w: F.linear(x[None, None], w),
                         lambda w: F.embedding(torch.tensor([2]), w), lambda w: torch.embedding(w, torch.tensor([[0, 3]])), lambda w: F.linear(w, x)):
            assert_close(function(one), function(one.detach()), atol=1e-5, rtol=1e-5)
    for function, *arguments in [(torch.mv, x[0]), (torch.add, 1), (torch.mul, matrix)]:
        assert_close(function(matrix, *arguments), function(matrix.detach(), *in_floats(arguments)))
    assert_close(F.linear(x[None], weight=matrix, bias=torch.ones(6)), x[None] @ matrix.detach().t() + 1)


def test_what_is_broken_shows():
    weight = torch.randn(3, 4)
    weight[0, 1], weight[1, 2] = torch.nan, torch.inf
    y = F.linear(torch.ones(1, 4), Int8Matrix(*to_int8(weight)))[0]
    assert not y[:2].isfinite().any() and y[2].isfinite()


def test_a_compiler_that_fails(monkeypatch):
    def broken(*arguments, **settings): return lambda *x: (_ for _ in ()).throw(RuntimeError("Cannot find a working triton\nmore"))
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="PyTorch's own kernels, more slowly, for Cannot find a working triton$"):
        assert compiled_multiply(CPU, torch.float32) is multiply
    monkeypatch.setattr(torch, "compile", lambda function, **settings: lambda *x: function(*x) + 1)  # or makes something else
    with pytest.warns(UserWarning, match="more slowly"): assert compiled_multiply(CPU, torch.float32) is multiply


# Whole models

RHYME = "the cat is counting clouds like sheep. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A model that knows a line by heart."
    tokenizer, place = CharTokenizer.train([RHYME]), tmp_path_factory.mktemp("int8")/"model"
    torch.manual_seed(0)
    decoder = Decoder(textgen.decoder.DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    ids, optimizer = torch.tensor([tokenizer.encode(RHYME * 2)[:61]]), torch.optim.AdamW(decoder.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad(); decoder.loss(ids[:, :-1], ids[:, 1:]).backward(); optimizer.step()
    GPT(decoder.eval(), tokenizer).save(place)
    return place


@pytest.mark.parametrize("compile", [False, "auto", True])
def test_a_model_in_int8(place, compile):
    if compile and compiler() is None: pytest.skip("no C compiler")
    model, plain = (GPT.load(place, "cpu", dtype, compile=compile) for dtype in ("int8", "float32"))
    assert type(slots_for(model, 1, 40, 10)) is (NativeSlots if compile else Slots)
    assert model.generate("the", temperature=0, max_new_tokens=36)[0].text == (RHYME * 2)[3:39]
    for settings in (dict(temperature=2.0, n=3), dict(regex="[a-z ]{5}\\."), dict(repetition_penalty=1.3)):
        alone = model.generate("the ", seed=1, max_new_tokens=20, **settings)
        assert model.generate(["cat", "the "], seed=1, max_new_tokens=20, **settings)[-len(alone):] == alone
    assert model.nll(RHYME)[0] == pytest.approx(plain.nll(RHYME)[0], abs=0.5)
    assert model.nll(RHYME)[0] != plain.nll(RHYME)[0]  # it scores what it writes with
    with pytest.raises(UsageError, match="weights in int8 have lost"): model.save(place)


def test_without_a_compiler(place, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    made_anew()
    try:
        model = GPT.load(place, "cpu", "int8")
        with pytest.warns(UserWarning, match="written by PyTorch, more slowly, for no C compiler") as said: text = model.generate("the", temperature=0)[0].text
        assert len(said) == 1 and text[:36] == (RHYME * 2)[3:39]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            assert model.generate("the", temperature=0)[0].text == text
    finally:
        monkeypatch.undo()
        made_anew()


@pytest.mark.parametrize("flags, path", [(["--no-compile"], os.environ["PATH"]), ([], "/nowhere")])
def test_on_the_command_line(place, flags, path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "CC": "/no/such/cc"}
    command = [sys.executable, "-c", "from textgen.cli import main; main()", "generate", "--model", str(place), "--dtype", "int8", *flags,
               "--prompt", "the", "--temperature", "0", "--max-new-tokens", "36"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith((RHYME * 2)[:39]), done.stderr
    assert ("no C compiler was found" in done.stderr) == (not flags) and "Traceback" not in done.stderr


@needs_compiler
def test_a_decoder_in_bytes_can_be_packed_and_guess(place):
    model, plain = GPT.load(place, "cpu", "int8"), GPT.load(place, "cpu")
    ids = torch.tensor([plain.tokenizer.encode(RHYME)])
    wanted = rounded(plain.decoder)(ids)[0].detach()
    for kind, near in (("float32", 1e-4), ("int8", 0.2)):
        assert_close(NativeSlots(Packed(model.decoder, kind), 1, 64).decode(ids, torch.tensor([0]), [ids.shape[1]])[0], wanted, atol=near, rtol=0)
    text = plain.generate("the", temperature=0, max_new_tokens=40, seed=1)
    for compile in (True, False):
        plain.compile, plain.drafts = compile, DraftModel(model.decoder)
        assert plain.generate("the", temperature=0, max_new_tokens=40, seed=1) == text


# A real model

@needs_known
def test_a_trained_llama(one_thread):
    path = Path(KNOWN, "stories260K-hf")
    plain, model = (GPT.load(path, "cpu", dtype, compile=False) for dtype in ("float32", "int8"))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = torch.tensor([[*plain.tokenizer.prefix, *plain.tokenizer.encode(text)]])
    with torch.no_grad(): wanted, got = plain.decoder(ids)[0], model.decoder(ids)[0]
    error = (got - wanted).square().mean().sqrt() / wanted.std()
    assert 1e-4 < error < 0.03 and (got.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
    per_token = [one.nll(text)[0] / (ids.shape[1] - 1) for one in (plain, model)]
    assert per_token[1] == pytest.approx(per_token[0], abs=0.02)
    surprise = F.cross_entropy(wanted[:-1], ids[0, 1:], reduction="sum")  # after the token that begins a text
    assert ids[0, 0] == plain.tokenizer.prefix[0] == 1 and plain.nll(text)[0] == pytest.approx(surprise.item(), rel=1e-4)
