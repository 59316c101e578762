"""Constrained text: what random logits write under a mask always matches, never gets stuck, and the mask is the one that trying everything gives."""
import itertools, json, os, re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'textgen[constrain]'")
from jsonschema import Draft202012Validator

from textgen.constrained import Constraint, characters, compiled, vocabulary_tree
from textgen.core import UsageError
from textgen.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Vocabulary, gpt2_tokenizer
from textgen.tokenizer_io import load_tokenizer

PRINTABLE = "".join(map(chr, range(32, 127)))
STORIES = Path(os.environ.get("TEXTGEN_DATA", "absent"), "stories260K-hf")
MADE = {"char": lambda: CharTokenizer(PRINTABLE + "é☃"), "byte": lambda: ByteTokenizer(eos_token="<|end|>"),
        "bpe": lambda: BPETokenizer.train(['{"name": "größer ☃🙂", "age": 12} [1, 2] true null 2024-01-31 ' * 3], 330, eos_token="<|endoftext|>"),
        "gpt2": gpt2_tokenizer, "hf": lambda: load_tokenizer(STORIES)}
# Digits are spelt out: \d is any of Unicode's, and Python's Unicode is older than the library's.
REGEXES = [r"[a-z]{3,6}@[a-z]{1,9}\.(com|org)", r"([0-9]{1,3}\.){3}[0-9]{1,3}", r"(yes|no|maybe so)", r"-?(0|[1-9][0-9]{0,4})(\.[0-9]{1,3})?",
           r"(a|b)*abb", r"\{\"x\": (\[[0-9](, [0-9]){0,3}\])\}", r".{0,5}é☃?", r"(?i)end of (text|<\|endoftext\|>)"]
SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": -5, "maximum": 130}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"enum": [1, "two", [3, 4]]}]}, "minItems": 1, "maxItems": 4},
    {"$defs": {"leaf": {"const": "leaf"}, "tree": {"anyOf": [{"$ref": "#/$defs/leaf"},
               {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}]}}, "$ref": "#/$defs/tree"},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2,4}$"},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date"}, "n": {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5}},
     "required": ["when"], "additionalProperties": False},
]


@pytest.fixture(scope="module", params=sorted(MADE))
def tokenizer(request):
    if request.param == "hf" and not STORIES.is_dir(): pytest.skip("no shared data: set TEXTGEN_DATA")
    return MADE[request.param]()


def walk(constraint, seed, most=2000, quit=0.5):
    "Any token that may come, until the text is done, or may end and the dice say so."
    noise = np.random.default_rng(seed)
    while not constraint.done and not (constraint.complete and noise.random() < quit):
        assert constraint.mask().any() and len(constraint.ids) < most
        content = [i for i in np.flatnonzero(constraint.mask()) if i not in constraint.ends]
        constraint.advance(int(noise.choice(content)))
    return constraint.tokenizer.decode(constraint.ids)


@pytest.mark.parametrize("regex", REGEXES)
def test_every_walk_matches_the_regex(tokenizer, regex):
    for seed in range(40): assert re.fullmatch(regex, walk(Constraint(tokenizer, regex=regex), seed))


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_walk_is_json_of_the_schema(tokenizer, schema):
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for seed in range(40):
        text = walk(Constraint(tokenizer, json_schema=schema), seed)
        validator.validate(json.loads(text))


PIECES = ["a", "b", "ab", "ba", "bb", "1", "b1", "aa1"]
TOY = Vocabulary([piece.encode() for piece in PIECES])
WORDS = ["".join(letters) for n in range(9) for letters in itertools.product("ab1", repeat=n)]
patterns = st.recursive(st.sampled_from(["a", "b", "1", "ab", "[ab]", "b1"]), lambda inner: st.one_of(
    st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
    inner.map(lambda one: f"({one})?")), max_leaves=4)  # so they match at most 8 characters


@given(patterns, st.integers(0, 2**32))
@settings(deadline=None)
def test_the_mask_is_what_trying_everything_gives(pattern, seed):
    matching = [word for word in WORDS if re.fullmatch(pattern, word)]
    constraint, noise, text = Constraint(TOY, regex=pattern), np.random.default_rng(seed), ""
    while True:
        allowed = [any(word.startswith(text + piece) for word in matching) for piece in PIECES]
        assert constraint.mask().tolist() == allowed
        assert (constraint.complete, constraint.done) == (text in matching, not any(allowed))
        if not any(allowed): break
        token = int(noise.choice(np.flatnonzero(allowed)))
        constraint.advance(token)
        text += PIECES[token]


@given(st.sets(st.sampled_from("abc1"), min_size=1), patterns, st.integers(0, 2**32))
@settings(deadline=None)
def test_missing_characters_are_no_dead_end(letters, pattern, seed):
    tokenizer = CharTokenizer("".join(sorted(letters)))
    writable = [word for word in WORDS if re.fullmatch(pattern, word) and set(word) <= letters]
    try: text = walk(Constraint(tokenizer, regex=pattern), seed)
    except UsageError as error:
        assert "can go on after ''" in str(error) and not writable
    else: assert text in writable


def test_the_end_of_text(tokenizer):
    constraint = Constraint(tokenizer, regex="(ab)*")
    own = {tokenizer.eos_id} - {None}
    ends = lambda: {int(i) for i in np.flatnonzero(constraint.mask())} & own
    assert constraint.complete and ends() == own
    constraint.advance(tokenizer.pieces.index(b"a"))
    assert not constraint.complete and not ends()
    constraint.advance(tokenizer.pieces.index(b"b"))
    assert constraint.complete and ends() == own and not constraint.done
    for end in own:
        constraint.advance(end)
        assert constraint.done and not constraint.mask().any()


def test_a_special_token_is_not_text():
    gpt2 = gpt2_tokenizer()
    spelt = Constraint(gpt2, regex=r"<\|endoftext\|>")
    assert not spelt.mask()[gpt2.eos_id] and spelt.mask()[gpt2.encode("<")[0]]


def test_rows_of_a_grammar_do_not_meet():
    gpt2 = gpt2_tokenizer()
    one, two = (Constraint(gpt2, regex="[a-z]+[0-9]+") for _ in range(2))
    first = two.mask().copy()
    for text in ("abc", "1"): one.advance(gpt2.encode(text)[0])
    assert (two.mask() == first).all() and two.matcher is not one.matcher
    assert compiled(gpt2, one.ends, "[a-z]+[0-9]+", None) is compiled(gpt2, one.ends, "[a-z]+[0-9]+", None)
    assert vocabulary_tree(gpt2, one.ends) is vocabulary_tree(gpt2, two.ends)


def test_a_text_that_is_cut_may_hold_half_a_character():
    tokenizer = ByteTokenizer()
    constraint = Constraint(tokenizer, regex="☃+")
    for byte in "☃".encode():
        assert np.flatnonzero(constraint.mask()).tolist() == ([byte] if not constraint.complete else [])
        constraint.advance(byte)
    assert constraint.complete


def test_what_characters_are():
    assert characters(CharTokenizer("abé")) == ("a", "b", "é") and characters(ByteTokenizer()) is None and characters(TOY) is None


def test_without_the_library():
    "What is said where llguidance is not installed; and that the module needs it only when it is used."
    code = ("import sys; sys.modules['llguidance'] = None\nfrom textgen.constrained import Constraint\nfrom textgen.tokenizer import ByteTokenizer\n"
            "try: Constraint(ByteTokenizer(), regex='a')\nexcept Exception as error: print(type(error).__name__, error)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "UsageError regex and json_schema need llguidance; pip install 'textgen[constrain]'\n"
