"""The interface over any model: stop strings against a search of the whole text, closed rows, streams that end early, what is refused."""
import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, strategies as st

from textgen import slots
from textgen.core import GenerationConfig, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT
from textgen.generator import Logprob, Piece, Row, StopStrings, TextGenerator, Token, collect, pieces
from textgen.slots import decode_one
from textgen.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

ALPHABET = "ab,[3]4é☃🙂"
TOKENIZERS = {"char": CharTokenizer(ALPHABET), "byte": ByteTokenizer(),
              "bpe": BPETokenizer.train(["[3,4] é☃🙂 3,3,4 aab 🙂🙂 ☃☃ [3]a é, " * 3], 300)}


class Recite(TextGenerator):
    "Writes the rows of token ids that it was given, in turn, and keeps a record of its steps."
    honours = {"min_new_tokens", "logprobs"}
    def __init__(self, tokenizer, *rows, obeys=True): self.tokenizer, self.rows, self.obeys, self.steps, self.ended = tokenizer, rows, obeys, [], 0
    def nll(self, texts): raise NotImplementedError
    def load(cls, path): raise NotImplementedError
    def tokens(self, prompts, seeds, config, closed):
        try:
            for t in range(max(map(len, self.rows))):
                for row, ids in enumerate(self.rows):
                    if t < len(ids) and not (self.obeys and row in closed):
                        self.steps.append((row, t))
                        yield Token(row, ids[t], "length" if t == len(ids) - 1 else None, -float(ids[t]), ((ids[t], -1.0),), ids[t], 0.5)
        finally: self.ended += 1


def complete(text, stops):
    "Where the stop string ends that is complete first, and where it begins (of several the longest); None without one."
    for end in range(1, len(text) + 1):
        if found := [len(stop) for stop in stops if text[:end].endswith(stop)]: return end, end - max(found)


def naive(tokenizer, ids, stops, least=0):
    "Text, tokens and reason by searching the whole text after every token; what may be shown after each of them."
    stream, skipped, text, shown = tokenizer.stream_decoder(), "", "", []
    for count, id in enumerate(ids, 1):
        new = stream.push(id) + (stream.flush() if count == len(ids) else "")
        if count <= least:
            skipped += new
            shown.append(skipped)
            continue
        text += new
        if found := complete(text, stops): return skipped + text[:found[1]], ids[:count], "stop", shown
        waits = next(n for n in range(len(text), -1, -1) if not n or any(s.startswith(text[-n:]) for s in stops))
        shown.append(skipped + text[:len(text) - waits])
    return skipped + text, ids, "length", shown


def check(tokenizer, ids, stops, least=0):
    model = Recite(tokenizer, ids)
    settings = dict(stop=stops, min_new_tokens=least, max_new_tokens=max(least, 1000), logprobs=1)
    text, tokens, reason, shown = naive(tokenizer, ids, stops, least)
    whole, = model.generate("a", **settings)
    assert (whole.text, whole.token_ids, whole.finish_reason) == (text, tokens, reason)
    assert whole.logprobs == [Logprob(-float(id), ((id, -1.0),), id, 0.5) for id in tokens]
    stream = list(model.stream("a", **settings))
    assert collect(stream, [whole.seed]) == [whole] and all(piece.text or piece.finish_reason for piece in stream)
    so_far, count = "", 0
    for piece in stream[:-1]:  # no later and no earlier than it is certain
        so_far, count = so_far + piece.text, count + len(piece.token_ids)
        assert so_far == shown[count - 1]
    assert [piece.finish_reason for piece in stream] == [None] * (len(stream) - 1) + [reason]


texts = st.text(ALPHABET, min_size=1, max_size=30)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.sampled_from(sorted(TOKENIZERS)), texts, stop_lists, st.integers(0, 4))
@example("char", "3,3,4", ["3,4"], 0)
@example("char", "[3,3,4]a", ["[3,4]", "3,4]"], 0)
@example("bpe", "é☃🙂 aab", ["é☃🙂"], 0)
@example("byte", "🙂🙂☃", ["🙂☃"], 0)
@example("char", "aabaab", ["aab", "b"], 3)
def test_stop_strings_in_real_text(kind, text, stops, least):
    check(TOKENIZERS[kind], TOKENIZERS[kind].encode(text), stops, least)


@given(texts, st.data())
def test_stop_strings_that_are_there(text, data):
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(sorted(TOKENIZERS)))]
    begin = data.draw(st.integers(0, len(text) - 1))
    stop = text[begin:data.draw(st.integers(begin + 1, len(text)))]
    check(tokenizer, tokenizer.encode(text), [stop, *data.draw(stop_lists)])
    assert stop not in Recite(tokenizer, tokenizer.encode(text)).generate("a", stop=stop)[0].text


@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0xF0, 0x9F, 0x99, 0x82, 0xE2, 0x98])), min_size=1, max_size=20),
       st.lists(st.text("\ufffda🙂☃", min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from(["byte", "bpe"]))
@example([0xF0, 0x9F], ["\ufffd"], "byte")  # it is the flush at the end that completes this one
def test_stop_strings_in_broken_characters(ids, stops, kind):
    check(TOKENIZERS[kind], ids, stops)


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_search_does_not_depend_on_the_cuts(text, stops, data):
    search, shown, found, rest = StopStrings(tuple(stops)), "", False, text
    while rest and not found:
        cut = data.draw(st.integers(1, len(rest)))
        more, found = search.push(rest[:cut])
        shown, rest = shown + more, rest[cut:]
        assert len(search.held) < max(map(len, stops))
    expected = complete(text, stops)
    assert (shown + search.held, found) == (text[:expected[1]] if expected else text, bool(expected))


def test_a_closed_row_gets_no_more_steps():
    tokenizer = TOKENIZERS["char"]
    rows = [tokenizer.encode(text) for text in ("ab,ab", "a34ab", "[3]ab")]
    model = Recite(tokenizer, *rows)
    results = model.generate(["a"] * 3, stop=["34", ","])
    assert [(g.text, g.finish_reason) for g in results] == [("ab", "stop"), ("a", "stop"), ("[3]ab", "length")]
    assert [t for row, t in model.steps if row == 0] == [0, 1, 2] == [t for row, t in model.steps if row == 1]
    deaf = Recite(tokenizer, *rows, obeys=False)  # what comes for a closed row is not shown; all closed, it is not asked again
    assert [g.text for g in deaf.generate(["a"] * 3, seed=1, stop=["34", ","])] == [g.text for g in results]
    deaf = Recite(tokenizer, *rows, obeys=False)
    assert [g.text for g in deaf.generate(["a"] * 3, stop=[",", "34", "["])] == ["ab", "a", ""] and deaf.ended == 1
    assert max(t for _, t in deaf.steps) == 2


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=CHARS.vocab_size, n_positions=16, n_embd=32, n_layer=1, n_head=4)).eval()
    with torch.no_grad(): decoder.transformer.wte.weight.mul_(10)
    model = GPT(decoder, CHARS)
    model.compile = False
    return model


CHARS = CharTokenizer("abcdefgh .")


def test_a_stop_string_frees_a_seat(gpt, monkeypatch):
    full = gpt.generate(["ab", "c", "fed"], seed=3, max_new_tokens=40)
    stop = full[0].text[10:13]
    sizes = []
    monkeypatch.setattr(slots, "decode_one", lambda *args: (sizes.append(len(args[1])), decode_one(*args))[1])
    cut = gpt.generate(["ab", "c", "fed"], seed=3, max_new_tokens=40, stop=stop)
    for whole, short in zip(full, cut):
        at = whole.text.find(stop)
        assert short.text == (whole.text if at < 0 else whole.text[:at]) and stop not in short.text
        assert short.token_ids == (whole.token_ids if at < 0 else whole.token_ids[:at + len(stop)])
        assert short.finish_reason == ("length" if at < 0 else "stop")
    lengths = [len(g.token_ids) for g in cut]
    assert lengths[0] < 40 and sizes == [sum(length > t for length in lengths) for t in range(1, max(lengths))]
    alone = [gpt.generate(text, seed=3, max_new_tokens=40, stop=stop)[0] for text in ("ab", "c", "fed")]
    assert alone == cut


@pytest.mark.parametrize("settings", [dict(repetition_penalty=1.3), dict(frequency_penalty=0.5), dict(no_repeat_ngram_size=3), dict(min_new_tokens=2)])
def test_a_stop_string_where_settings_look_back(gpt, settings):
    "The history of another row moves into the seat that is freed between two steps."
    prompts, settings = ["ab", "c", "fed"], dict(seed=3, max_new_tokens=30, **settings)
    for whole in gpt.generate(prompts, **settings):
        stop = whole.text[5:7]
        together, alone = gpt.generate(prompts, stop=stop, **settings), [gpt.generate(text, stop=stop, **settings)[0] for text in prompts]
        assert together == alone and {"stop"} <= {g.finish_reason for g in together}


@pytest.mark.parametrize("end", ["close", "break", "raise", "drop"])
def test_a_stream_that_ends_early_ends_the_model(end):
    model = Recite(TOKENIZERS["char"], *[TOKENIZERS["char"].encode("ab" * 9)] * 2)
    stream = model.stream(["a", "b"])
    next(stream)
    assert model.ended == 0
    if end == "close": stream.close()
    if end == "break":
        for _ in stream: break
    if end == "raise":
        with pytest.raises(KeyboardInterrupt): stream.throw(KeyboardInterrupt)
    gc.disable()
    try: del stream
    finally: gc.enable()
    assert model.ended == 1
    model.stream("a").close()  # before its first token
    assert model.ended == 1


def test_what_a_model_refuses_is_raised_at_once():
    class Refuses(Recite):
        def tokens(self, *args): raise UsageError("not this")
    with pytest.raises(UsageError, match="not this"): Refuses(TOKENIZERS["char"], [1]).stream("a")


def test_logprobs_only_when_asked():
    model = Recite(TOKENIZERS["char"], [1, 2, 3])
    assert model.generate("a")[0].logprobs is None and all(piece.logprobs is None for piece in model.stream("a"))
    assert len(model.generate("a", logprobs=0)[0].logprobs) == 3


def test_a_row_without_tokens():
    row = Row(TOKENIZERS["byte"].stream_decoder(), GenerationConfig(stop="x", logprobs=2))
    assert row.push(Token(5, None, "stop")) == Piece(5, "", [], "stop", [])


def test_what_a_model_does_not_obey_is_refused(gpt):
    for settings in [dict(min_p=0.1), dict(regex="a"), dict(json_schema={}), dict(repetition_penalty=1.2), dict(logit_bias={1: 2.0})]:
        bare = SimpleNamespace(tokenizer=gpt.tokenizer, context_length=16, vocab_size=11, eos_id=None, defaults=GenerationConfig(), honours=frozenset())
        with pytest.raises(UsageError, match=rf"^{next(iter(settings))}: SimpleNamespace cannot do this") as told:
            TextGenerator.stream(bare, "a", **settings)
        assert "\n" not in str(told.value)
    with pytest.raises(UsageError, match="stop_token_ids: 99 is no token of the model, whose ids run from 0 to 9"):
        gpt.stream("a", stop_token_ids=[99])


def test_rows_have_seeds_of_their_own_and_say_them(gpt):
    four = gpt.generate(["ab", "c"], n=2, seed=9, max_new_tokens=12)
    assert four[0].seed == four[2].seed == 9 and four[1].seed == four[3].seed != 9
    assert [gpt.generate(text, seed=g.seed, max_new_tokens=12)[0] for text, g in zip(["ab", "ab", "c", "c"], four)] == four
