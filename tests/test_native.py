"""What no notebook can check of the compiled step: random shapes of both families, other processors and compilers, threads, sanitizers, faults of the disk."""
import os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from textgen import kernels
from textgen.core import TextgenError, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.kernels import SOURCE, build, compiler, library_path, opened
from textgen.native import NativeSlots, Packed, native_library
from textgen.sampling import sample

pytestmark = [pytest.mark.skipif(compiler() is None, reason="no C compiler"), pytest.mark.usefixtures("one_thread")]


def made_anew():
    for function in (compiler, kernels.version, native_library): function.cache_clear()


@pytest.fixture
def compiled_by(monkeypatch):
    "The kernels as another compiler, or the same for another processor, makes them."
    def change(command):
        monkeypatch.setenv("CC", command)
        made_anew()
        if not shutil.which(command.split()[0]) or compiler() is None or not {*command.split()[1:]} <= {*compiler()}: pytest.skip(f"no {command} here")
    yield change
    monkeypatch.undo()
    made_anew()


# Shapes

@st.composite
def configs(draw):
    "Any mix of the families, of sizes that are no multiple of anything."
    number, yes = lambda low, high: draw(st.integers(low, high)), lambda: draw(st.booleans())
    rotary, groups = yes(), number(1, 3)
    return DecoderConfig(
        vocab_size=number(1, 70), n_positions=number(1, 50), n_layer=number(1, 2), n_embd=number(2, 40), n_kv_head=groups,
        n_head=groups * number(1, 3), head_size=2 * number(1, 20) if rotary else number(1, 40), n_inner=number(1, 50),
        position="rotary" if rotary else "learned", norm="rmsnorm" if yes() else "layernorm", mlp=draw(st.sampled_from(["gelu", "gelu_erf", "swiglu"])),
        bias=yes(), tie_word_embeddings=yes())


def decoder_of(config, seed=0):
    "Random weights, large enough that logits differ clearly."
    torch.manual_seed(seed)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters(): p.copy_(torch.randn_like(p) / (p.shape[-1]**0.5 if p.dim() == 2 else 3) + ("ln_" in name and "weight" in name))
    return decoder


def slots_of(config, slots, threads=1, kind="float32", decoder=None):
    "Slots full of what a broken text may have left in them."
    native = NativeSlots(Packed(decoder or decoder_of(config), kind), slots, config.n_positions, threads)
    for x in (*native.keys, *native.values): x.fill_(torch.nan)
    return native


def tokens(config, count, seed=1): return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=80, deadline=None)
@given(configs(), st.data())
def test_logits_are_the_decoders(config, data):
    decoder = decoder_of(config)
    native = slots_of(config, 3, decoder=decoder)
    texts = [tokens(config, data.draw(st.integers(1, config.n_positions)), seed) for seed in range(3)]
    order = data.draw(st.permutations(range(3)))
    got = native.prefill([(slot, 0, texts[slot]) for slot in order])
    with torch.no_grad():
        for slot, row in zip(order, got): assert_close(row, decoder(torch.tensor([texts[slot]]))[0, -1], atol=1e-3, rtol=1e-4)  # two channels that are nearly equal magnify roundings


@settings(max_examples=80, deadline=None)
@given(configs(), st.sampled_from(["float32", "bfloat16", "int8"]), st.data())
def test_parts_company_and_place_change_no_bit(config, kind, data):
    "A text read in one go; in parts, beside others, in another slot, by several threads; one by one; and after a copy."
    ids, threads = tokens(config, data.draw(st.integers(1, config.n_positions))), data.draw(st.integers(1, 3))
    native = slots_of(config, 4, threads, kind)
    whole = native.prefill([(2, 0, ids)])[0]
    cuts = sorted({0, len(ids), *data.draw(st.lists(st.integers(0, len(ids)), max_size=4))})
    for start, end in zip(cuts, cuts[1:]):
        others = [(slot, 0, tokens(config, data.draw(st.integers(1, config.n_positions)), slot)) for slot in (0, 2)]
        place = data.draw(st.integers(0, 2))
        got = native.prefill([*others[:place], (3, start, ids[start:end]), *others[place:]])[min(place, 2)]
    assert torch.equal(got, whole)
    for t, i in enumerate(ids): one = native.decode(torch.tensor([[i], [0]]), torch.tensor([t, 0]), [t + 1, 1])[0, 0]
    assert torch.equal(one, whole)
    if len(ids) > 1:
        native.copy(3, 1, len(ids) - 1)
        assert torch.equal(native.prefill([(1, len(ids) - 1, ids[-1:])])[0], whole)


@settings(max_examples=60, deadline=None)
@given(configs(), st.data())
def test_several_tokens_a_call_are_those_of_one_at_a_time(config, data):
    "Chosen by chapter 6's own function, each row by settings of its own."
    B, count, V = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), config.vocab_size
    if config.n_positions <= count: return
    vocab = data.draw(st.integers(1, V))
    wish = lambda values: torch.tensor([data.draw(st.sampled_from(values)) for _ in range(B)], dtype=torch.float64)
    temperature, top_k, top_p, min_p = wish([0.0, 0.3, 1.0, 2.5]), wish([0, 1, 3, 200]), wish([1.0, 0.9, 0.2]), wish([0.0, 0.1])
    u = torch.rand(count, B, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    first, native = torch.randint(V, (B,)), slots_of(config, B)
    starts = torch.tensor([data.draw(st.integers(0, config.n_positions - count)) for _ in range(B)])
    for slot, at in enumerate(starts.tolist()):
        if at: native.prefill([(slot, 0, tokens(config, at, slot))])
    ids = first
    got = native.write(first, starts, torch.stack([temperature, top_k, top_p, min_p], 1), u, vocab)
    for t in range(count):
        logits = native.decode(ids[:, None], starts + t, (starts + t + 1).tolist())[:, 0, :vocab]
        ids = sample(logits, u[t], temperature.clamp(min=1e-6).float(), torch.where(top_k == 0, vocab, top_k).long().clamp(max=vocab),
                     top_p, min_p, greedy=temperature == 0)
        assert torch.equal(ids, got[t])
    assert torch.equal(got, native.write(first, starts, torch.stack([temperature, top_k, top_p, min_p], 1), u, vocab))


# Threads

WIDE = DecoderConfig(vocab_size=300, n_positions=300, n_embd=256, n_layer=2, n_head=4)  # large enough that work is shared out


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("groups", [4, 2])
def test_threads_change_no_bit(groups, kind):
    config = WIDE.model_copy(update=dict(n_kv_head=groups))
    ids, seen = tokens(config, 299), []
    for threads in (1, 2, 3):
        native = slots_of(config, 2, threads, kind)
        read = native.prefill([(0, 0, ids), (1, 0, ids[:130])])
        wrote = native.write(read.argmax(1), torch.tensor([299, 130]), torch.tensor([[1.0, 0, 0.9, 0]] * 2, dtype=torch.float64), torch.rand(1, 2, generator=torch.Generator().manual_seed(0)), 300)
        seen.append((read, wrote))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


# Sums of whole numbers

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(["normal", "equal", "one", "outlier", "zero"]), st.floats(1e-20, 1e20))
def test_int8_sums_are_those_of_the_rounded_weights(inputs, seed, kind, size):
    "Off by half a step of x for each weight at most; a step is the smallest with which no sum can leave 31 bits."
    random = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(5, inputs, generator=random), torch.randn(3, inputs, generator=random)
    if kind == "equal": weight, x = torch.full_like(weight, 3), torch.full_like(x, 1)  # the largest sum there is
    if kind == "one": x = torch.zeros_like(x).index_fill(1, torch.tensor([seed % inputs]), 1)
    if kind == "outlier": x[:, seed % inputs] = 1000
    if kind == "zero": x = torch.zeros_like(x)
    x, arena = (x * size).double(), kernels.Arena(2**20)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round()  # (5, I)
    row = torch.nn.functional.pad(x.float(), (0, -inputs % 16))
    got = kernels.linear(build(), kernels.pack(arena, weight, None, "int8"), row)[:, :5].double()
    step = torch.maximum(x.abs().amax(1) / 32700, x.abs().sum(1) / (16.8e6 - inputs))[:, None]  # (3, 1)
    most = 0.5 * step * rounded.abs().sum(1) * scale[:, 0]  # (3, 5)
    wanted = x @ (rounded * scale).double().T
    assert ((got - wanted).abs() <= 1.001 * most + 1e-6 * (x.abs() @ (rounded * scale).abs().double().T)).all()


def test_no_sum_of_whole_numbers_leaves_31_bits():
    for inputs in (768, 3072, 20_000, 100_000):
        weight, x = torch.ones(1, inputs), torch.ones(1, inputs + -inputs % 16)
        assert_close(kernels.linear(build(), kernels.pack(kernels.Arena(2**24), weight, None, "int8"), x)[0, 0].item(), float(inputs), rtol=1e-2, atol=0)


# Numbers that are none

def test_what_is_broken_stays_in_its_row():
    "An embedding of NaN breaks the text that uses it, and neither its neighbours nor the next text in its slot."
    decoder = decoder_of(WIDE)
    with torch.no_grad(): decoder.transformer.wte.weight[7], decoder.transformer.wte.weight[8] = torch.nan, torch.inf
    ids = [i for i in tokens(WIDE, 40) if i not in (7, 8)]
    native, clean = slots_of(WIDE, 3, decoder=decoder), slots_of(WIDE, 3, decoder=decoder)
    columns = [i for i in range(300) if i not in (7, 8)]  # the head is tied
    alone = clean.prefill([(1, 0, ids)])[0, columns]
    beside = native.prefill([(0, 0, [3, 7, 9, 7]), (1, 0, ids), (2, 0, [8] * 50)])
    assert beside[0].isnan().all() and beside[2].isnan().any() and torch.equal(beside[1, columns], alone)
    for slot in (0, 2): assert torch.equal(native.prefill([(slot, 0, ids)])[0, columns], alone)
    for t, i in enumerate(ids): one = native.decode(torch.tensor([[i]]), torch.tensor([t]), [t + 1])[0, 0, columns]
    assert torch.equal(one, alone)
    picked = native.write(torch.tensor([9, 9, 9]), torch.tensor([60, 60, 60]), torch.tensor([[0.0, 0, 1, 0]] * 3, dtype=torch.float64), torch.zeros(2, 3), 300)
    assert (picked == -1).all()  # logits of 7 are NaN


def test_a_token_that_the_model_has_not_is_refused():
    native = slots_of(WIDE, 2)
    for chunk in ((0, 0, [5, 300]), (0, 0, [-1]), (0, 295, [1] * 20), (0, -1, [1]), (2, 0, [1]), (-1, 0, [1])):
        with pytest.raises(UsageError): native.prefill([chunk])


# Other processors and compilers

FAMILIES = [dict(), dict(mlp="gelu_erf", bias=False), dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=2, tie_word_embeddings=False)]


def check_a_build():
    "Logits of all families in all kinds of weights, the promise of equal bits, and a call of several tokens."
    for family in FAMILIES:
        config = DecoderConfig(vocab_size=61, n_positions=70, n_embd=56, n_layer=2, n_head=4, **family)
        decoder, ids = decoder_of(config), tokens(config, 69)
        with torch.no_grad(): wanted = decoder(torch.tensor([ids]))[0]
        for kind, near in (("float32", 1e-4), ("bfloat16", 0.1), ("int8", 0.1)):
            native = slots_of(config, 2, 2, kind, decoder)
            got = native.decode(torch.tensor([ids]), torch.tensor([0]), [69])[0]
            assert (got - wanted).square().mean().sqrt() < near
            for start in range(0, 69, 7): part = native.prefill([(1, start, ids[start:start + 7]), (0, 0, ids[:start + 1])])
            assert torch.equal(part[0], got[-1])
            wrote = native.write(got[-1:].argmax(1), torch.tensor([69]), torch.tensor([[1.0, 5, 0.9, 0.1]], dtype=torch.float64), torch.tensor([[0.5]]), 61)
            assert 0 <= wrote < 61


@pytest.mark.parametrize("command", [
    "gcc", pytest.param("gcc -march=native -mno-avx512f", marks=pytest.mark.slow), "gcc -march=x86-64-v3",   # these two: AVX2
    "gcc -march=skylake-avx512", "gcc -march=x86-64", "clang", "clang -march=x86-64"])
def test_other_processors_and_compilers(compiled_by, command):
    "None of them finds anything to warn of, and what each makes keeps the promises."
    compiled_by(f"{command} -Wall -Wextra -Werror")
    check_a_build()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["gcc", "gcc -march=x86-64"])
def test_sanitizers_find_nothing(command, tmp_path):
    "In a process of its own, into which the sanitizer's library is loaded first; leaks are Python's own."
    if not (path := subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()).startswith("/"):
        pytest.skip("no libasan")
    env = {**os.environ, "CC": f"{command} -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer", "LD_PRELOAD": path,
           "ASAN_OPTIONS": "detect_leaks=0", "TEXTGEN_CACHE": str(tmp_path)}
    code = "import sys; sys.path.insert(0, 'tests'); import test_native as t; t.torch.set_num_threads(1); t.check_a_build(); print('checked')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "checked" in done.stdout, done.stderr[-2000:]


# Building

SMALL = ["int answer(void) { return 42; }"]


@pytest.fixture
def place(tmp_path, monkeypatch, compiled_by):
    "An empty cache, and a folder for compilers."
    monkeypatch.setenv("TEXTGEN_CACHE", str(tmp_path/"cache"))
    (tmp_path/"bin").mkdir()
    return tmp_path


def fake(place, name, script):
    path = place/"bin"/name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_library_is_compiled_once(place, monkeypatch):
    assert build(SMALL).answer() == 42
    before = library_path(SMALL).stat()
    monkeypatch.setattr(kernels, "compiled", None)  # would fail
    assert build(SMALL).answer() == 42 and library_path(SMALL).stat() == before
    assert [path.name for path in (place/"cache").iterdir()] == [library_path(SMALL).name]


@pytest.mark.parametrize("left", [0, 10, 3000, 15000, -1])
def test_half_a_library_is_made_anew(place, left):
    build(SMALL)
    path = library_path(SMALL)
    other = place/"cache"/"other"
    other.write_bytes(path.read_bytes()[:left])
    other.replace(path)  # the open one stays whole
    assert opened(path) is None and build(SMALL).answer() == 42 and opened(path)


def test_what_looks_whole_and_is_no_library_is_made_anew(place):
    build(SMALL)
    path = library_path(SMALL)
    path.unlink()
    path.write_bytes(b"not a library" + kernels.WHOLE)
    assert build(SMALL).answer() == 42


def test_a_cache_that_cannot_be_written_is_done_without(place, monkeypatch):
    (place/"file").write_text("no folder")
    monkeypatch.setenv("TEXTGEN_CACHE", str(place/"file"/"cache"))
    assert build(SMALL).answer() == 42 and not library_path(SMALL).exists()


def test_no_place_to_compile_in(place, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(place/"nowhere"))
    with pytest.raises(TextgenError, match="no room to compile in .*TMPDIR"): build(SMALL)


def test_many_at_once_build_the_same(place):
    with ThreadPoolExecutor(8) as pool: assert [library.answer() for library in pool.map(lambda _: build(SMALL), range(16))] == [42] * 16
    assert len(list((place/"cache").iterdir())) == 1


def test_no_compiler(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place/"bin"))
    made_anew()
    with pytest.raises(UsageError, match="no C compiler was found"): build(SMALL)


def test_a_compiler_that_does_not_work_says_why(place, monkeypatch):
    "As with a full disk: it is there, and must not be said to be missing."
    (place/"broken").mkdir()
    (place/"broken"/"gcc").write_text("#!/bin/sh\necho 'gcc: error: no room for temporary files' >&2\nexit 1\n")
    (place/"broken"/"gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(place/"broken"))
    made_anew()
    with pytest.raises(UsageError, match="gcc could not compile the kernels .gcc: error: no room"): build(SMALL)


def test_a_compiler_that_fails(place, compiled_by):
    compiled_by(str(fake(place, "broken", 'case "$*" in *null*) exit 0;; esac; echo note: hm >&2; echo error: out of luck >&2; exit 1')))
    with pytest.raises(UsageError, match=r"broken could not compile the kernels \(error: out of luck\)"): build(SMALL)


def test_a_compiler_that_makes_nonsense(place, compiled_by):
    compiled_by(str(fake(place, "odd", 'while [ "$1" != -o ]; do shift; done; [ "$2" = /dev/null ] || echo nonsense > "$2"')))
    with pytest.raises(UsageError, match="does not open what .*odd made"): build(SMALL)


def test_a_compiler_without_openmp_or_tuning(place, compiled_by):
    "And with little optimization, which takes a tenth of the time."
    compiled_by(str(fake(place, "plain", 'case "$*" in *-fopenmp*|*=native*) exit 1;; esac; exec gcc "$@" -O1')))
    assert not {"-march=native", "-mcpu=native", "-fopenmp"} & {*compiler()}
    assert build(SMALL).answer() == 42
    check_a_build()


def test_another_version_is_another_library(place, compiled_by):
    paths = set()
    for number in (1, 2):
        compiled_by(str(fake(place, "same", f'[ "$*" = "${{*%--version}}" ] || {{ echo {number}; exit; }}; exec gcc "$@"')))
        paths.add(library_path(SMALL))
    assert len(paths) == 2


def test_a_compiler_in_a_folder_with_a_space(place, compiled_by, monkeypatch):
    (place/"my tools").mkdir()
    path = place/"my tools"/"cc"
    path.write_text('#!/bin/sh\nexec gcc "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    made_anew()
    assert compiler()[0] == str(path) and build(SMALL).answer() == 42
