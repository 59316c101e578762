"""Sampling, from logits to ids: each processor against a slow one in plain Python and against transformers' own, the whole of
`choose` against a slow whole, picks against the closed form by χ², and the same ids on every path, in any company, traced or not.
"""
import math
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from textgen import sampling
from textgen.choosing import Settings, choose, logprobs, process, settings_of
from textgen.core import GenerationConfig, uniforms
from textgen.penalties import (History, apply_frequency_penalty, apply_logit_bias, apply_min_new_tokens, apply_no_repeat_ngram,
                               apply_presence_penalty, apply_repetition_penalty, completing, occurrences)
from textgen.sampling import (apply_min_p, apply_temperature, apply_top_k, apply_top_p, pick, rank_keys, sample, shares, shortlist,
                              tail_by_digits, tail_by_pairs, top_ids)

INF = math.inf
often = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# Logits with many equals and -inf, and some that are just numbers.
logit = st.one_of(st.integers(-24, 24).map(lambda x: x / 4), st.integers(-3, 3).map(float), st.just(-INF),
                  st.floats(-30, 30, width=32))
row = lambda low=1, high=12: st.lists(logit, min_size=low, max_size=high).filter(lambda x: max(x) > -INF)
both_sizes = st.one_of(row(), row(sampling.SMALL + 1, sampling.SMALL + 9))  # all pairs, and topk or digits


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Slow and obvious, one row at a time, in Python's own numbers

def in_order(values): return sorted(range(len(values)), key=lambda i: (-values[i], i))


def slow_shares(logits):
    best = max(logits)
    return [int(float(np.float32(math.exp(z - best))) * 2**38) for z in logits]


def slow_top_k(logits, k):
    kept = in_order(logits)[:k]
    return [z if i in kept else -INF for i, z in enumerate(logits)]


def slow_top_p(pieces, p):
    kept, total, so_far = set(), sum(pieces), 0
    budget = min(int((1 - p) * total), total - 1)
    for i in in_order(pieces):
        if so_far < total - budget: kept.add(i)
        so_far += pieces[i]
    return [x if i in kept else 0 for i, x in enumerate(pieces)]


def slow_ngram(ids, n):
    if not n or len(ids) < n: return set()
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == ids[len(ids) - n + 1:]}


def f32(x): return float(np.float32(x))


def slow_process(logits, config, prompt, text, ends):
    z = [f32(x + f32(config.logit_bias.get(i, 0))) for i, x in enumerate(logits)]
    before, penalty = list(z), np.float32(config.repetition_penalty)
    for i in range(len(z)):
        with np.errstate(over="ignore"):
            if i in prompt or i in text: z[i] = float(np.float32(z[i]) / penalty if z[i] >= 0 else np.float32(z[i]) * penalty)
        if i in text: z[i] = f32(z[i] - f32(config.presence_penalty))
        z[i] = f32(z[i] - f32(f32(config.frequency_penalty) * text.count(i)))
        if i in slow_ngram(prompt + text, config.no_repeat_ngram_size): z[i] = -INF
        if i in ends and len(text) < config.min_new_tokens: z[i] = -INF
    return z if max(z) > -INF else before


def slow_pieces(logits, config, prompt=(), text=(), ends=()):
    "The shares that the dart is thrown at, by all settings of a row but greedy."
    z = slow_process(logits, config, list(prompt), list(text), ends)
    z = [float(np.float32(x) / np.float32(config.temperature)) for x in z]
    pieces = slow_shares(slow_top_k(z, config.top_k or len(z)))
    pieces = slow_top_p(pieces, config.top_p) if config.top_p < 1 else pieces
    return [x if x >= config.min_p * 2**38 else 0 for x in pieces]


def slow_choose(logits, u, config, prompt=(), text=(), ends=()):
    if config.temperature == 0: return in_order(slow_process(logits, config, list(prompt), list(text), ends))[0]
    pieces = slow_pieces(logits, config, prompt, text, ends)
    dart, so_far = int(u * 2**24) * sum(pieces) >> 24, 0
    for i, piece in enumerate(pieces):
        so_far += piece
        if so_far > dart: return i


# Each processor

@often
@given(row(), st.floats(0.01, 50))
def test_temperature(z, t):
    from transformers import TemperatureLogitsWarper
    assert torch.equal(apply_temperature(torch.tensor([z]), torch.tensor([t])), TemperatureLogitsWarper(t)(None, torch.tensor([z])))


@often
@given(both_sizes)
def test_shares(z):
    ours = shares(torch.tensor([z]))[0].tolist()
    slow = slow_shares([f32(x) for x in z])
    assert max(ours) == 2**38 and all(a == b or abs(a - b) <= b / 2**23 for a, b in zip(ours, slow))
    finite = [x for x in z if x > -INF]  # what is ruled out changes nothing for the others
    assert shares(torch.tensor([finite]))[0].tolist() == [piece for piece, x in zip(ours, z) if x > -INF]


@often
@given(both_sizes)
def test_order(z):
    z = [f32(x) for x in z]
    assert rank_keys(torch.tensor([z])).argsort(descending=True)[0].tolist() == in_order(z) == top_ids(torch.tensor([z]), len(z))[0].tolist()


@often
@given(both_sizes, st.data())
def test_top_k(z, data):
    from transformers import TopKLogitsWarper
    z = [f32(x) for x in z]
    V, k = len(z), data.draw(st.integers(1, len(z) + 2))
    x = torch.tensor([z])
    ours = apply_top_k(x, k)
    assert ours[0].tolist() == slow_top_k(z, k)
    theirs = TopKLogitsWarper(k)(None, x)  # keeps all that equal the k-th
    border = sorted(z)[-min(k, V)]
    assert torch.equal(ours.where(x != border, -INF), theirs.where(x != border, -INF)) and (theirs >= ours).all()
    if z.count(border) == sum(value == border for value in ours[0].tolist()): assert torch.equal(ours, theirs)
    others = torch.tensor([k, data.draw(st.integers(1, V + 2))])
    two = apply_top_k(torch.tensor([z, z]), others)
    assert torch.equal(two[0], ours[0]) and two[1].tolist() == slow_top_k(z, others[1].item())
    largest = max([k for k in others.tolist() if k < V], default=V)
    assert torch.equal(apply_top_k(torch.tensor([z, z]), others, largest), two)
    values, ids = shortlist(torch.tensor([z, z]), others.clamp(max=V), min(V, others.max().item()))
    assert torch.equal(torch.full_like(two, -INF).scatter(1, ids, values), two) and (ids.diff() > 0).all()


@often
@given(both_sizes, st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.1, 0.5, 0.9, 1.0, 1e-300])))
def test_top_p(z, p):
    from transformers import TopPLogitsWarper
    x = torch.tensor([z])
    pieces = shares(x)
    ours = apply_top_p(pieces, torch.tensor([p], dtype=torch.float64))
    assert ours[0].tolist() == slow_top_p(pieces[0].tolist(), p)
    budget = torch.minimum(((1 - p) * pieces.sum(-1, keepdim=True, dtype=torch.float64)).long(), pieces.sum(-1, keepdim=True) - 1)
    assert torch.equal(tail_by_pairs(pieces, budget), tail_by_digits(pieces, budget))
    chances = pieces[0].sort().values.cumsum(-1) / pieces.sum()
    assume(p < 1 and (chances - (1 - p)).abs().min() > 1e-5)  # nearer than that, float32 decides otherwise
    theirs = shares(TopPLogitsWarper(p)(None, x))
    assert torch.equal(ours.sort().values, theirs.sort().values)  # of equals at the border, others may stay


@often
@given(both_sizes, st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5, 1.0])))
def test_min_p(z, m):
    from transformers import MinPLogitsWarper
    x = torch.tensor([z])
    pieces = shares(x)
    ours = apply_min_p(pieces, torch.tensor([m], dtype=torch.float64))
    assert ours[0].tolist() == [piece if piece >= m * 2**38 else 0 for piece in pieces[0].tolist()]
    assume((pieces / 2**38 - m).abs().min() > 1e-6 or m in (0, 1))
    assert torch.equal(ours, shares(MinPLogitsWarper(m)(None, x)))


past = st.lists(st.integers(0, 5), min_size=1, max_size=14)
six = st.lists(logit, min_size=6, max_size=6)


@often
@given(six, past, st.floats(0.1, 10))
def test_repetition_penalty(z, ids, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor
    x, ids = torch.tensor([z]), torch.tensor([ids])
    seen = occurrences(ids, 0, torch.tensor([[ids.shape[1]]]), 6) > 0
    ours = apply_repetition_penalty(x, seen, torch.tensor([penalty]))
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, x))


@often
@given(six, past, st.integers(0, 14), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency(z, ids, begin, presence, frequency):
    counts = occurrences(torch.tensor([ids]), torch.tensor([[begin]]), torch.tensor([[len(ids)]]), 6)
    assert counts[0].tolist() == [ids[begin:].count(i) for i in range(6)]
    x = torch.tensor([z])
    expected = [f32(f32(a) - f32(presence)) if n else f32(a) for a, n in zip(z, counts[0].tolist())]
    assert apply_presence_penalty(x, counts, torch.tensor([presence]))[0].tolist() == expected
    expected = [f32(f32(a) - f32(f32(frequency) * n)) for a, n in zip(z, counts[0].tolist())]
    assert apply_frequency_penalty(x, counts, torch.tensor([frequency]))[0].tolist() == pytest.approx(expected, rel=1e-6)


@often
@given(st.lists(st.tuples(past, st.integers(0, 6)), min_size=1, max_size=5))
def test_no_repeat_ngram(rows):
    from transformers import NoRepeatNGramLogitsProcessor
    width = max(len(ids) for ids, _ in rows) + 1
    ids = torch.tensor([ids + [5] * (width - len(ids)) for ids, _ in rows])  # filled up with something that counts elsewhere
    lengths, n = torch.tensor([len(ids) for ids, _ in rows]), torch.tensor([n for _, n in rows])
    x = torch.zeros(len(rows), 6)
    ours = apply_no_repeat_ngram(x, ids, lengths, n, largest=max(1, int(n.max())))
    for got, (known, size) in zip(ours, rows):
        assert set(got.isinf().nonzero()[:, 0].tolist()) == slow_ngram(known, size)
        if size: assert torch.equal(got[None], NoRepeatNGramLogitsProcessor(size)(torch.tensor([known]), x[:1]))


@often
@given(six, st.dictionaries(st.integers(0, 5), st.floats(-100, 100), min_size=1))
def test_logit_bias(z, bias):
    from transformers import SequenceBiasLogitsProcessor
    x = torch.tensor([z])
    ours = apply_logit_bias(x, torch.tensor([[*bias, 0, 0]]), torch.tensor([[*bias.values(), 0.0, 0.0]]))
    theirs = SequenceBiasLogitsProcessor([[[i], float(value)] for i, value in bias.items()])(torch.tensor([[1]]), x)
    assert torch.equal(ours, theirs)


@often
@given(six, st.integers(0, 5), st.integers(0, 5), st.sets(st.integers(0, 5), min_size=1))
def test_min_new_tokens(z, written, least, ends):
    from transformers import MinNewTokensLengthLogitsProcessor
    x = torch.tensor([z])
    ours = apply_min_new_tokens(x, torch.tensor([written]), torch.tensor([least]), torch.tensor([[*ends, -1]]))
    theirs = MinNewTokensLengthLogitsProcessor(3, least, sorted(ends), device="cpu")(torch.zeros(1, 3 + written, dtype=torch.long), x)
    assert torch.equal(ours, theirs)


# What a row has written

@often
@given(st.data())
def test_history_is_lists_of_tokens(data):
    "Rows start, grow, and move, as lists in Python would."
    history, rows = History(3, data.draw(st.integers(1, 4)), "cpu"), {}
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["start", "accept", "move"]))
        if what == "start":
            slot, prompt = data.draw(st.integers(0, 2)), data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
            history.start(slot, prompt, count=12)
            rows[slot] = (len(prompt), list(prompt))
        elif what == "accept":
            B = data.draw(st.integers(1, 3))
            history.accept(torch.arange(B) + 10)
            for slot in set(range(B)) & rows.keys(): rows[slot][1].append(slot + 10)
        elif rows:
            source, target = data.draw(st.sampled_from(sorted(rows))), data.draw(st.integers(0, 2))
            history.move(source, target)
            rows[target] = (rows[source][0], list(rows[source][1]))
    for slot, (prompt, ids) in rows.items():
        assert history.ids[slot, :len(ids)].tolist() == ids
        assert (history.prompts[slot].item(), history.lengths[slot].item()) == (prompt, len(ids))


# Many rows, each with settings of its own

def some_config(rng):
    "Settings at random, each of them often off."
    maybe = lambda off, draw: draw() if rng.random() < 0.4 else off
    least = maybe(0, lambda: rng.randint(1, 4))
    return GenerationConfig(
        temperature=maybe(1.0, lambda: rng.choice([0, 0.5, 0.8, 1.5])), top_k=maybe(None, lambda: rng.randint(1, 200)),
        top_p=maybe(1.0, lambda: rng.uniform(0.05, 1)), min_p=maybe(0.0, lambda: rng.uniform(0, 0.5)),
        repetition_penalty=maybe(1.0, lambda: rng.uniform(0.8, 2)), presence_penalty=maybe(0.0, lambda: rng.choice([-1, 0.5, 2])),
        frequency_penalty=maybe(0.0, lambda: rng.choice([-1, 0.5, 2])), no_repeat_ngram_size=maybe(0, lambda: rng.randint(1, 4)),
        logit_bias=maybe({}, lambda: {rng.randrange(12): rng.choice([-100, 3]) for _ in range(3)}), min_new_tokens=least)


def some_rows(seed, B, V, make=some_config):
    "Logits with equals, uniforms, and for each row its settings, prompt, text and ends."
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.where(torch.rand(B, 1, generator=g) < 0.5, torch.randn(B, V, generator=g) * 3, torch.randint(-4, 4, (B, V), generator=g))
    logits[:, :4][torch.rand(B, min(V, 4), generator=g) < 0.2] = -INF
    logits[:, -1] = 1.0
    few = lambda low: [rng.randrange(min(V, 9)) for _ in range(rng.randint(low, 9))]
    rows = [(make(rng), few(1), few(0), {rng.randrange(V) for _ in range(rng.randint(0, 2))}) for _ in range(B)]
    return logits, torch.from_numpy(uniforms(seed, B)), rows


def together(logits, u, rows, device="cpu", run=choose):
    "The ids of all rows in one call."
    wanted = settings_of([config for config, *_ in rows], logits.shape[1], [ends for *_, ends in rows], device)
    history = History(len(rows) + 1, 20, device)
    for slot, (_, prompt, text, _) in enumerate(rows):
        history.start(slot, prompt, len(text))
        history.ids[slot, len(prompt):len(prompt) + len(text)] = torch.tensor(text, dtype=torch.int64)
        history.lengths[slot] += len(text)
    return run(logits.to(device), u.to(device), wanted, history)


@pytest.mark.parametrize("V", [1, 2, 12, 100, 150, 300])
@pytest.mark.parametrize("seed", range(4))
def test_choose_is_the_slow_whole(V, seed):
    logits, u, rows = some_rows(seed, 24, V)
    slow = [slow_choose(z, x, config, prompt, text, ends)
            for z, x, (config, prompt, text, ends) in zip(logits.tolist(), u.tolist(), rows)]
    assert together(logits, u, rows).tolist() == slow


@pytest.mark.parametrize("V", [12, 300])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_the_same_in_any_company(V, seed):
    logits, u, rows = some_rows(seed, 24, V)
    ids = together(logits, u, rows)
    order = random.Random(seed).sample(range(24), 24)
    assert torch.equal(together(logits[order], u[order], [rows[i] for i in order]), ids[order])
    for few in (order[:1], order[1:2], order[:5], order[3:13]):
        assert torch.equal(together(logits[few], u[few], [rows[i] for i in few]), ids[few])


@pytest.mark.parametrize("seed", range(3))
def test_small_or_large_is_the_same(seed, monkeypatch):
    "All pairs, short lists, digits: one text."
    logits, u, rows = some_rows(seed, 24, 60)
    ids = together(logits, u, rows)
    asking = lambda rng: some_config(rng).model_copy(update={"top_k": rng.randint(1, 30)})
    short = some_rows(seed, 24, 60, asking)
    pairs = together(*short)
    monkeypatch.setattr(sampling, "SMALL", 0)
    assert torch.equal(together(logits, u, rows), ids) and torch.equal(together(*short), pairs)


def test_bfloat16_is_read_as_it_is():
    logits, u, rows = some_rows(5, 24, 300)
    half = logits.bfloat16()
    assert torch.equal(together(half, u, rows), together(half.float(), u, rows))


def test_nothing_left_is_the_models_own():
    "Rules that rule out everything are not obeyed, rather than taken for damage."
    config = GenerationConfig(no_repeat_ngram_size=1, temperature=0)
    logits = torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    assert together(logits, torch.zeros(2), [(config, [0, 1, 2], [], set()), (config, [1, 2], [], set())]).tolist() == [2, 0]
    config = GenerationConfig(min_new_tokens=2, temperature=0)
    assert together(logits[:1], torch.zeros(1), [(config, [0], [], {0, 1, 2})]).tolist() == [2]


def test_what_is_off_is_none():
    plain = settings_of([GenerationConfig(), GenerationConfig(top_k=300)], 300, [{1}, {1}], "cpu")
    on = {field.name for field in fields(plain) if getattr(plain, field.name) not in (None, False, 0)}
    assert not on and not plain.looks_back
    greedy = settings_of([GenerationConfig(temperature=0, top_k=5)] * 2, 300, [set()] * 2, "cpu")
    assert greedy.all_greedy and greedy.top_k is None
    mixed = settings_of([GenerationConfig(temperature=0), GenerationConfig(top_k=7)], 300, [set()] * 2, "cpu")
    assert mixed.every_k and mixed.largest_k == 7
    assert settings_of([GenerationConfig(logit_bias={7: 1})], 5, [set()], "cpu").bias is None  # a token that is never written


def test_extreme_settings():
    extreme = [GenerationConfig(temperature=1e300), GenerationConfig(temperature=1e-300), GenerationConfig(repetition_penalty=1e300),
               GenerationConfig(repetition_penalty=1e-300), GenerationConfig(top_p=1e-300), GenerationConfig(top_k=10**30),
               GenerationConfig(no_repeat_ngram_size=10**30), GenerationConfig(min_p=1e-320)]
    logits = torch.tensor([[0.0, 3, -3, 1]] * len(extreme))
    ids = together(logits, torch.full((len(extreme),), 0.6), [(config, [1, 0], [2], set()) for config in extreme])
    assert ((ids >= 0) & (ids < 4)).all() and ids[1] == ids[4] == 1


@pytest.mark.parametrize("V", [3, 300])
def test_broken_rows_are_told(V):
    logits, u, rows = some_rows(7, 12, V)
    logits[2], logits[5], logits[7, 0], logits[9, -1] = math.nan, -INF, math.nan, INF
    ids = together(logits, u, rows)
    assert [i for i, token in enumerate(ids.tolist()) if token == -1] == [2, 5, 7, 9]
    fine = [0, 1, 3, 4]
    assert torch.equal(ids[fine], together(logits[fine], u[fine], [rows[i] for i in fine]))


def test_a_greedy_choice_needs_no_uniforms():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 4], logits[2, 3], logits[3], logits[4, 0] = math.nan, INF, -INF, -INF
    for more in ({}, {"logit_bias": {2: 9.0}}, {"no_repeat_ngram_size": 1}):  # the last rules out what row 2 is broken by
        history, config = History(6, 2, "cpu"), GenerationConfig(temperature=0, **more)
        for slot in range(6): history.start(slot, [3], count=1)
        same = settings_of([config] * 6, 9, [set()] * 6, "cpu")
        kept = process(logits, same, history)
        expected = [-1 if i in (1, 2, 3) else int(kept[i].argmax()) for i in range(6)]
        assert choose(logits, None, same, history).tolist() == choose(logits, torch.rand(6), same, history).tolist() == expected


def test_no_global_random_state():
    logits, u, rows = some_rows(3, 12, 300)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), logits.clone()
    together(logits, u, rows)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:3] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[3], logits)


@often
@given(both_sizes, st.integers(0, 5))
def test_logprobs(z, n):
    z = [f32(x) for x in z]
    x, ids = torch.tensor([z, z]), torch.tensor([0, len(z) - 1])
    chosen, best, nats, rank, entropy = logprobs(x, ids, n)
    expected = x.double().log_softmax(-1)
    assert rank.tolist() == [1 + in_order(z).index(id) for id in ids.tolist()]
    torch.testing.assert_close(entropy.double(), torch.special.entr(expected.exp()).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chosen.double(), expected[range(2), ids], atol=1e-5, rtol=1e-5)
    assert best[0].tolist() == in_order(z)[:n]
    torch.testing.assert_close(nats.double(), expected.gather(1, best), atol=1e-5, rtol=1e-5)
    assert torch.equal(logprobs(x, ids, n + 1)[1][:, :n], best[:, :len(z)])


# Picks against the closed form

V, DRAWS, AT_ONCE = 12, 26_000, 130
CASES = [dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.2),
         dict(repetition_penalty=1.5), dict(presence_penalty=1.0), dict(frequency_penalty=0.7), dict(no_repeat_ngram_size=2),
         dict(logit_bias={3: 1.5, 4: -100}), dict(min_new_tokens=9),
         dict(temperature=1.5, top_k=6, top_p=0.8, min_p=0.1, repetition_penalty=1.3, frequency_penalty=0.4)]
KINDS = [(128, torch.float32), (128, torch.bfloat16), (0, torch.float32)]  # all pairs; in bfloat16; short lists and digits
LEVEL = 0.001 / (len(CASES) * (len(KINDS) + 1))  # Bonferroni: right samplers fail any of these once in a thousand choices of seeds
PROMPT, TEXT, ENDS = [1, 2, 5], [3, 2, 2, 5, 1], {7}


def p_value(ids, pieces):
    "How probable a misfit at least this bad is, were `ids` drawn in proportion to `pieces` (Pearson 1900)."
    expected = torch.tensor(pieces, dtype=torch.float64)
    observed, possible = torch.bincount(ids, minlength=len(pieces)).double(), expected > 0
    assert not observed[~possible].any()
    mean = expected[possible] / expected.sum() * len(ids)
    if len(mean) == 1: return 1.0
    return torch.special.gammaincc((len(mean) - 1) / torch.tensor(2.0, dtype=torch.float64), ((observed[possible] - mean) ** 2 / mean).sum() / 2).item()


def a_distribution(dtype):
    return (torch.randn(V, generator=torch.Generator().manual_seed(1)) * 1.5).to(dtype)


def drawn(configs, seed, dtype):
    "DRAWS picks for each of the settings, in batches where they take turns."
    n = len(configs)
    rows = [(configs[i % n], PROMPT, TEXT, ENDS) for i in range(AT_ONCE)]
    u = torch.from_numpy(uniforms(seed, n * DRAWS)).view(-1, AT_ONCE)
    many = lambda logits, _, wanted, history: torch.stack([choose(logits, x, wanted, history) for x in u])
    ids = together(a_distribution(dtype).expand(AT_ONCE, -1), u[0], rows, run=many)
    return [ids[:, i::n].flatten() for i in range(n)]


@pytest.mark.parametrize("small, dtype", KINDS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_picks_are_distributed_so(case, small, dtype, monkeypatch):
    monkeypatch.setattr(sampling, "SMALL", small)
    config = GenerationConfig(**CASES[case])
    pieces = slow_pieces(a_distribution(dtype).tolist(), config, PROMPT, TEXT, ENDS)
    assert p_value(drawn([config], case, dtype)[0], pieces) > LEVEL


def test_picks_of_mixed_rows():
    configs = [GenerationConfig(**case) for case in CASES]
    for config, ids in zip(configs, drawn(configs, 99, torch.float32)):
        assert p_value(ids, slow_pieces(a_distribution(torch.float32).tolist(), config, PROMPT, TEXT, ENDS)) > LEVEL


def test_a_wrong_sampler_is_found_out():
    ids = drawn([GenerationConfig(temperature=1.1)], 0, torch.float32)[0]
    assert p_value(ids, slow_pieces(a_distribution(torch.float32).tolist(), GenerationConfig(), PROMPT, TEXT, ENDS)) < LEVEL


# Traced

B_, V_, S_ = 4, 150, 10
X, U = torch.randn(B_, V_, generator=torch.Generator().manual_seed(0)) * 3, torch.from_numpy(uniforms(0, B_))
PAST, N = torch.randint(V_, (B_, S_), generator=torch.Generator().manual_seed(1)), torch.tensor([3, 5, 8, 10])
ones = torch.ones(B_)
FUNCTIONS = {
    "shares": (shares, X), "rank_keys": (rank_keys, X), "pick": (pick, shares(X), U),
    "temperature": (apply_temperature, X, ones / 2), "shortlist": (lambda x, k: shortlist(x, k, 9), X, N),
    "top_k": (lambda x, k: apply_top_k(x, k, 10), X, N), "top_k, small": (lambda x, k: apply_top_k(x[:, :60], k), X, N),
    "top_p": (lambda x, p: apply_top_p(shares(x), p), X, ones * 0.8),
    "top_p, small": (lambda x, p: apply_top_p(shares(x[:, :60]), p), X, ones * 0.8),
    "min_p": (lambda x, m: apply_min_p(shares(x), m), X, ones * 0.1),
    "sample": (lambda x, u, t, k, p: sample(x, u, t, k, p, p / 9, largest=10, every=True, greedy=k > 9), X, U, ones / 2, N, ones * 0.8),
    "repetition": (lambda x, ids, n, p: apply_repetition_penalty(x, occurrences(ids, 0, n[:, None], V_) > 0, p), X, PAST, N, ones * 1.3),
    "presence": (lambda x, ids, n, p: apply_presence_penalty(x, occurrences(ids, 0, n[:, None], V_), p), X, PAST, N, ones),
    "frequency": (lambda x, ids, n, p: apply_frequency_penalty(x, occurrences(ids, 1, n[:, None], V_), p), X, PAST, N, ones),
    "ngram": (lambda x, ids, lengths, n: apply_no_repeat_ngram(x, ids, lengths, n, 3), X, PAST % 3, N, torch.tensor([1, 2, 3, 0])),
    "completing": (lambda ids, lengths: completing(ids, lengths, lengths // 3, 3), PAST % 3, N),
    "bias": (apply_logit_bias, X, PAST, torch.randn(B_, S_)), "ends": (apply_min_new_tokens, X, N, N + 1, PAST),
    "logprobs": (lambda x, ids: logprobs(x, ids, 3), X, N),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported(name):
    "The graph of torch.export, made for any number of rows, gives the same; so nothing in it asks for a value."
    function, *inputs = FUNCTIONS[name]

    class Module(torch.nn.Module):
        def forward(self, inputs): return function(*inputs)
    batch = torch.export.Dim("batch", min=2, max=1000)
    traced = torch.export.export(Module(), (inputs,), dynamic_shapes=([{0: batch} for _ in inputs],), strict=False).module()
    for rows in ([0, 1, 2, 3], [2, 0, 1]):
        some = [x[rows] for x in inputs]
        torch.testing.assert_close(traced(some), function(*some), rtol=0, atol=0)


@pytest.mark.parametrize("V", [60, 300])
def test_compiled_in_one_graph(V):
    "`choose` without a break, and `accept` with it: the same ids."
    torch._dynamo.reset()
    def step(logits, u, wanted, history):
        ids = choose(logits, u, wanted, history)
        history.accept(ids)
        return ids
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        given_ = some_rows(seed, 12, V)
        twice = lambda step: lambda logits, u, wanted, history: torch.stack([step(logits, u, wanted, history), step(logits, u, wanted, history)])
        assert torch.equal(together(*given_, run=twice(compiled)), together(*given_, run=twice(step)))


@pytest.mark.slow
@pytest.mark.parametrize("V", [60, 300, 50_257])
def test_compiled_by_inductor(V):
    "Fused loops, whose exp is another one, choose the same tokens."
    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True)
    short = lambda rng: some_config(rng).model_copy(update={"top_k": rng.randint(1, 30)})
    for make in (some_config, short):
        given_ = some_rows(0, 16, V, make)
        def many(run):
            def steps(logits, _, wanted, history):
                return torch.stack([run(logits, torch.from_numpy(uniforms(i, 16)).to(logits.device), wanted, history) for i in range(50)])
            return steps
        assert torch.equal(together(*given_, run=many(compiled)), together(*given_, run=many(choose)))


def test_nothing_waits():
    "Tensors without values: whoever asked for one would fail."
    logits, u, rows = some_rows(2, 24, 300)
    wanted = settings_of([config for config, *_ in rows], 300, [ends for *_, ends in rows], "meta")
    history = History(24, 20, "meta")
    ids = choose(logits.to("meta"), u.to("meta"), wanted, history)
    history.accept(ids)
    history.move(3, 1)
    assert ids.shape == (24,) and all(x.shape[0] == 24 for x in logprobs(logits.to("meta"), ids, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("V", [60, 300, 50_257])
def test_on_a_gpu(V):
    "The same ids as on the CPU, and CUDA raises if anything waits."
    for make in (some_config, lambda rng: some_config(rng).model_copy(update={"top_k": rng.randint(1, 30)})):
        given_ = some_rows(0, 24, V, make)
        def steps(logits, u, wanted, history):
            def step():
                ids = choose(logits, u, wanted, history)
                history.accept(ids)
                history.move(3, 2)
                return ids, *logprobs(logits, ids, 4)
            ids = [step()[0]]  # the first call loads kernels
            torch.cuda.set_sync_debug_mode("error")
            try: ids += [step()[0] for _ in range(3)]
            finally: torch.cuda.set_sync_debug_mode("default")
            return torch.stack(ids).cpu()

        def on_cpu(logits, u, wanted, history):
            ids = []
            for _ in range(4):
                ids.append(choose(logits, u, wanted, history))
                history.accept(ids[-1])
                history.move(3, 2)
            return torch.stack(ids)
        assert torch.equal(together(*given_, device="cuda", run=steps), together(*given_, run=on_cpu))
