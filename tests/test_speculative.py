"""Guesses never change a text: every setting, company, end, length and kind of slots, with sources of guesses good and bad."""
import copy, functools, math

import numpy as np
import pytest
import torch

from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT, engine_for
from textgen.kernels import compiler
from textgen.speculative import DraftModel, Drafts, Lookup
from textgen.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
L = 32
TOKENIZER = CharTokenizer("abcdefgh")
V = TOKENIZER.vocab_size
SETTINGS = [dict(), dict(max_new_tokens=2), dict(temperature=0), dict(top_p=0.8), dict(top_k=3, min_p=0.1), dict(temperature=0.3), dict(stop_token_ids=(3,)),
            dict(temperature=0, stop_token_ids=(5,)), dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=2), dict(logprobs=2),
            dict(overflow="stop"), dict(min_new_tokens=9, stop_token_ids=(1, 2, 3)), dict(logit_bias={4: 5.0})]


def decoder_of(seed, vocab=V, context=L, **more):
    "Random weights, large enough that logits differ clearly, and that texts repeat themselves now and then."
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocab_size=vocab, n_positions=context, n_embd=16, n_layer=2, n_head=2, **more)).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() == 2: p.mul_(8)
    return decoder


LLAMA = dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=1, tie_word_embeddings=False)
TARGET, OTHER, SHORT = decoder_of(0), decoder_of(1), decoder_of(2, context=8, **LLAMA)


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(request):
    "Both kinds of slots."
    if request.param and compiler() is None: pytest.skip("no C compiler")
    return request.param


class Hostile(Drafts):
    "Random guesses, of random lengths."
    def fresh(self, engine):
        new = super().fresh(engine)
        new.rng = np.random.default_rng(0)
        return new

    def guess(self, engine, counts): return [self.rng.integers(0, V, self.rng.integers(0, n + 1)).tolist() for n in counts]

    def hear(self, request, guessed, right):
        super().hear(request, guessed, right)
        self.paces[request].most, self.paces[request].due = self.tokens, 0  # it never gives up


class Oracle(Hostile):
    "Guesses that are right at first, and wrong at random from some place on."
    def guess(self, engine, counts):
        rows = []
        for request, n in zip(engine.seats.requests, counts):
            done = len(request.ids) - len(request.prompt)
            row = list(self.known[request.name][done : done + n])
            if row and self.rng.random() < 0.5: row[self.rng.integers(len(row))] = int(self.rng.integers(V))
            rows.append(row)
        return rows


def made(decoder, compile):
    gpt = GPT(decoder, TOKENIZER)
    gpt.compile = compile
    return gpt


def play(gpt, wanted, order, slots, pace=100, drafts=None, cancel=()):
    "What each request gets when so many come a step; some are cancelled after their n-th event."
    engine, events, rest, asked = engine_for(gpt, slots, drafts=drafts), {i: [] for i in order}, list(order), {}
    engine.CHUNK = 7
    while rest or engine.busy:
        for i in rest[:pace]:
            asked[i] = engine.add(*wanted[i], name=i)
            asked[i].prompt = wanted[i][0]
        del rest[:pace]
        for token in engine.step(): events[token.row].append(token)
        for i, n in cancel:
            if len(events.get(i, ())) >= n: engine.cancel(asked[i])
    return events, engine.drafts


def same(got, whole):
    "Ids, reasons and log-probabilities."
    assert [t[:3] for t in got] == [t[:3] for t in whole]
    for a, b in zip(got, whole): assert a.logprob is None and b.logprob is None or abs(a.logprob - b.logprob) < 1e-4


def requests(count=28):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, V, rng.integers(1, L + 1)).tolist(),
             GenerationConfig(**{"max_new_tokens": int(rng.integers(9, 60))} | SETTINGS[i % len(SETTINGS)]), i) for i in range(count)]


SOURCES = {"lookup": lambda: Lookup(), "lookup of one": lambda: Lookup(1, 1), "itself": lambda: DraftModel(TARGET), "another": lambda: DraftModel(OTHER, 3),
           "a short one": lambda: DraftModel(SHORT, 6), "hostile": lambda: Hostile(9), "oracle": lambda: Oracle(5)}


@functools.cache
def without(compiled):
    "What each request gives alone, with no guesses."
    gpt, wanted = made(TARGET, compiled), requests()
    return {i: play(gpt, wanted, [i], 1)[0][i] for i in range(len(wanted))}


@pytest.mark.parametrize("source", SOURCES)
def test_the_text_is_the_text_without(source, compiled):
    gpt, wanted, drafts, whole = made(TARGET, compiled), requests(), SOURCES[source](), without(compiled)
    drafts.known = {i: [t.id for t in whole[i] if t.id is not None] for i in whole}
    assert {t.finish_reason for row in whole.values() for t in row} == {None, "stop", "length"}
    order, used = np.random.default_rng(1).permutation(len(wanted)).tolist(), []
    for slots, pace in ((1, 1), (3, 2), (8, 28)):
        got, done = play(gpt, wanted, order, slots, pace, drafts)
        for i in whole: same(got[i], whole[i])
        used.append((done.guessed, done.right))
    assert all(guessed for guessed, _ in used) and (source == "hostile" or all(right for _, right in used))


@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_small_contexts_slide(context, compiled):
    gpt, config = made(decoder_of(3, context=context, **LLAMA), compiled), GenerationConfig(max_new_tokens=40, top_k=3)
    wanted = [([1] * n, config, n) for n in range(1, context + 1)]
    whole = play(gpt, wanted, range(context), 4)[0]
    for drafts in (Lookup(), DraftModel(gpt.decoder), DraftModel(OTHER), Hostile(4)):
        assert play(gpt, wanted, range(context), 2, 1, drafts)[0] == whole


def test_the_model_itself_is_always_right():
    if compiler() is None: pytest.skip("no C compiler")
    wanted = [([i, 1, 2], GenerationConfig(max_new_tokens=100, temperature=t), i) for i, t in enumerate((0, 0.5, 1, 2) * 2)]
    for slots in (1, 8):
        drafts = play(made(TARGET, True), wanted, range(8), slots, 100, DraftModel(TARGET))[1]
        assert drafts.guessed == drafts.right > 400


def test_cancelled_rows_leave_the_others_alone(compiled):
    gpt, wanted = made(TARGET, compiled), [([i, i, i], GenerationConfig(max_new_tokens=50, temperature=0.4), i) for i in range(6)]
    whole = play(gpt, wanted, range(6), 6)[0]
    for source in SOURCES:
        drafts = SOURCES[source]()
        drafts.known = {i: [t.id for t in whole[i]] for i in whole}
        got, _ = play(gpt, wanted, range(6), 4, 1, drafts, cancel=((0, 5), (3, 1), (2, 11), (5, 20)))
        for i in (1, 4): assert got[i] == whole[i]
        for i in (0, 3, 2, 5): assert len(got[i]) < 50 and got[i] == whole[i][: len(got[i])]


def test_stop_strings_and_streams(compiled):
    gpt, settings = made(TARGET, compiled), dict(seed=4, max_new_tokens=200, stop=["ab", "hg", "ccc"], temperature=0.7)
    whole = gpt.generate(["a", "bcb", "hhh"], n=3, **settings)
    assert "stop" in {g.finish_reason for g in whole}
    for source in ("lookup", "itself", "another", "hostile"):
        gpt.drafts = SOURCES[source]()
        assert gpt.generate(["a", "bcb", "hhh"], n=3, **settings) == whole
        texts = [""] * 9
        for piece in gpt.stream(["a", "bcb", "hhh"], n=3, **settings): texts[piece.row] += piece.text
        assert texts == [g.text for g in whole]


def test_sampled_text_has_the_distribution_of_the_model(compiled):
    "A model whose logits depend on the last token alone: pairs of new tokens against the closed form, by chi-squared at 0.1%."
    decoder = decoder_of(5, vocab=4)
    with torch.no_grad():
        for block in decoder.transformer.h:
            for p in (block.attn.c_proj, block.mlp.c_proj): p.weight.zero_(), p.bias.zero_()
        decoder.transformer.wpe.weight.zero_()
        chances = decoder(torch.arange(4)[:, None])[:, 0].div(2).softmax(-1).double().numpy()  # (4, 4) from, to
    other = decoder_of(6, vocab=4)
    gpt = GPT(decoder, CharTokenizer("abcd"))
    gpt.compile = compiled
    for drafts in (Lookup(), DraftModel(other), Hostile4(4)):
        counts, right = np.zeros((4, 4)), 0
        for seed in range(12):
            engine = engine_for(gpt, 16, drafts=drafts)
            rows = [[0] for _ in range(16)]
            for name in range(16): engine.add([0], GenerationConfig(max_new_tokens=30, temperature=2.0), 16 * seed + name, name=name)
            while engine.busy:
                for token in engine.step(): rows[token.row].append(token.id)
            right += engine.drafts.right
            for row in rows: np.add.at(counts, (row[:-1], row[1:]), 1)
        expected = counts.sum(1, keepdims=True) * chances
        assert right > 100 and expected.min() > 5
        assert ((counts - expected) ** 2 / expected).sum() < 32.91  # 4 rows with 3 degrees of freedom each


class Hostile4(Hostile):
    def guess(self, engine, counts): return [self.rng.integers(0, 4, n).tolist() for n in counts]


def test_guesses_save_steps(compiled):
    "A text that repeats itself takes far fewer steps; one in which nothing was right only a few more reads."
    decoder = decoder_of(0, tie_word_embeddings=False)
    with torch.no_grad():  # what comes next depends on the last token alone: a, b, ... h, a, ...
        for p in (*decoder.transformer.h.parameters(), decoder.transformer.wpe.weight): p.zero_()
        decoder.transformer.wte.weight.copy_(torch.randn(V, 16))
        decoder.lm_head.weight.copy_(torch.nn.functional.normalize(decoder.transformer.ln_f(decoder.transformer.wte.weight)).roll(1, 0))
    gpt, steps, config = made(decoder, compiled), {}, GenerationConfig(max_new_tokens=L - 8, temperature=0)
    for drafts in (None, Lookup()):
        engine = engine_for(gpt, 1, drafts=drafts)
        engine.slots.several = 1
        engine.add(list(range(V)), config)
        events, steps[drafts is None] = [], 0
        while engine.busy: events, steps[drafts is None] = events + engine.step(), steps[drafts is None] + 1
        assert [t.id for t in events] == [n % V for n in range(L - 8)]
    assert steps == {True: L - 8, False: 4}


def test_what_does_not_fit_is_refused(compiled):
    gpt = made(TARGET, compiled)
    for drafts, said in [(DraftModel(decoder_of(0, vocab=V + 1)), "9 tokens and the model 8")]:
        gpt.drafts = drafts
        with pytest.raises(UsageError, match=said): gpt.generate("a")
    for wrong in (lambda: Lookup(0), lambda: Lookup(tokens=0), lambda: DraftModel(TARGET, 0)):
        with pytest.raises(UsageError, match="at least 1"): wrong()


def test_a_draft_model_keeps_its_weights_as_it_is_told():
    if compiler() is None: pytest.skip("no C compiler")
    kinds = [engine_for(made(TARGET, True), drafts=DraftModel(TARGET, weights=kind)).drafts.slots.packed.kind for kind in ("int8", "bfloat16")]
    assert kinds == ["int8", "bfloat16"]


def test_broken_numbers_are_told(compiled):
    decoder = copy.deepcopy(TARGET)
    with torch.no_grad(): decoder.transformer.wpe.weight[9] = math.nan  # what guesses read there is enough
    gpt = made(decoder, compiled)
    gpt.drafts = Hostile(8)
    with pytest.raises(TextgenError, match=r"at new token \d of row 0"): gpt.generate("a", max_new_tokens=20, temperature=0)
    assert gpt.generate("a", max_new_tokens=8, seed=1) == made(decoder, compiled).generate("a", max_new_tokens=8, seed=1)
    gpt.drafts = DraftModel(decoder)  # a broken draft model guesses nonsense, which is refused
    assert made(TARGET, compiled).generate("a", seed=1) == with_drafts(made(TARGET, compiled), gpt.drafts).generate("a", seed=1)


def with_drafts(gpt, drafts):
    gpt.drafts = drafts
    return gpt
