"""The suite finds faults: the chapter's model passes it, and each model below, broken in one way, fails the test that is named beside it."""
import random, sys

import numpy as np
import pytest
import torch

from textgen.core import REGISTRY
from textgen.generator import Token, pieces, plan
from textgen.testing import BatchTests, GeneratorTests, Outcomes, run_tests

from .example import example, sentences

MODULE = example()
Markov, SOUND = MODULE.Markov, MODULE.train(sentences())
FAULTS = []


def outcomes(cls, monkeypatch, *groups, **said):
    "What the suite, or some groups of it, say of a class of models; `said` are attributes of the suite."
    class Tests(*groups):
        prompts, new_tokens = ["One day ", "The", "a"], 24
        def make(self): return cls(SOUND.tokenizer.characters, SOUND.counts)
    monkeypatch.setitem(REGISTRY["generators"], "markov", cls)
    return run_tests(type("Tests", (Tests,), said))


def named(found, outcome): return {one.test for one in found if one.outcome == outcome}


def fails(*tests):
    "Mark a class of models as one that fails these tests; it may fail others too."
    def mark(cls):
        FAULTS.append(pytest.param(cls, {f"test_{name}" for name in tests}, id=cls.__name__))
        return cls
    return mark


def test_the_sound_model_passes(monkeypatch):
    found = outcomes(Markov, monkeypatch, GeneratorTests)
    assert not named(found, "failed"), found
    assert len(named(found, "passed")) > 20 and {one.reason for one in found if one.test == "test_top_k_1_is_greedy"} == {"Markov has no top_k"}


# Seeds

@fails("a_seed_is_a_text", "a_reported_seed_gives_the_text_again")
class IgnoresSeeds(Markov):
    def tokens(self, prompts, seeds, config, closed):
        return super().tokens(prompts, [random.SystemRandom().getrandbits(32) for _ in seeds], config, closed)


@fails("a_seed_is_a_text")
class HasOneSeed(Markov):
    def tokens(self, prompts, seeds, config, closed): return super().tokens(prompts, [7 for _ in seeds], config, closed)


@fails("a_batch_is_what_each_prompt_gives_alone", "continuations_have_seeds_of_their_own")
class SeedsByPlace(Markov):
    def tokens(self, prompts, seeds, config, closed):
        return super().tokens(prompts, [seed + row for row, seed in enumerate(seeds)], config, closed)


@fails("continuations_have_seeds_of_their_own")
class ReportsTheFirstSeed(Markov):
    def generate(self, *args, **settings):
        found = super().generate(*args, **settings)
        for one in found: one.seed = found[0].seed
        return found


@fails("a_reported_seed_gives_the_text_again")
class ReportsAnotherSeed(Markov):
    def generate(self, *args, **settings):
        found = super().generate(*args, **settings)
        for one in found: one.seed += 1
        return found


def draws(name, draw):
    "A model that draws from a global generator, and throws the number away."
    def tokens(self, prompts, seeds, config, closed):
        for token in Markov.tokens(self, prompts, seeds, config, closed):
            draw()
            yield token
    fails("global_random_state_is_left_alone")(type(f"DrawsFrom{name}", (Markov,), {"tokens": tokens}))


draws("Python", random.random)
draws("NumPy", np.random.random)
draws("Torch", lambda: torch.rand(1))


# Company and streams

@fails("a_batch_is_what_each_prompt_gives_alone")
class PadsRows(Markov):
    "Shorter prompts are filled up, and the filling is read."
    def tokens(self, prompts, seeds, config, closed):
        longest = max(map(len, prompts))
        return super().tokens([ids + [0] * (longest - len(ids)) for ids in prompts], seeds, config, closed)


@fails("a_batch_is_what_each_prompt_gives_alone")
class LogprobsOfTheNeighbour(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(logprob=token.logprob - 0.001 * len(prompts))


@fails("two_streams_at_once")
class CountsInTheModel(Markov):
    def tokens(self, prompts, seeds, config, closed):
        self.left = len(prompts) * config.max_new_tokens
        for token in super().tokens(prompts, seeds, config, closed):
            self.left -= 1
            yield token if self.left >= 0 else Token(token.row, None, "length")
            if self.left < 0: return


@fails("a_stream_that_is_closed_stops")
class StaysLocked(Markov):
    locked = False
    def tokens(self, prompts, seeds, config, closed):
        if self.locked: raise RuntimeError("somebody is writing")
        self.locked = True
        yield from super().tokens(prompts, seeds, config, closed)
        self.locked = False


@fails("a_stream_that_is_closed_stops")
class CannotBeClosed(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            try: yield token
            except GeneratorExit: yield token


@fails("the_pieces_join_to_the_whole")
class ForgetsTheReason(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token._replace(finish_reason=None) if token.finish_reason == "length" else token


@fails("the_pieces_join_to_the_whole")
class HasItsOwnReasons(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token._replace(finish_reason="eos") if token.finish_reason == "stop" else token


@fails("the_pieces_join_to_the_whole")
class StreamsAnotherText(Markov):
    def stream(self, prompts, config=None, **settings):
        rows, seeds, config = plan(self, prompts, config, settings)
        return pieces(self, rows, [seed + 1 for seed in seeds], config)


# Ends

@fails("max_new_tokens")
class OneTooMany(Markov):
    def tokens(self, prompts, seeds, config, closed):
        return super().tokens(prompts, seeds, config.model_copy(update={"max_new_tokens": config.max_new_tokens + 1}), closed)


@fails("a_longer_text_begins_as_a_shorter_one")
class PlansAhead(Markov):
    def tokens(self, prompts, seeds, config, closed):
        return super().tokens(prompts, [seed + config.max_new_tokens for seed in seeds], config, closed)


@fails("ids_are_tokens_of_the_model")
class ShowsTheEnd(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is not None else Token(token.row, self.eos_id, "stop", 0.0, (), 1, 0.0)


@fails("stop_strings_cut")
class StreamsTheStopString(Markov):
    def stream(self, prompts, config=None, **settings):
        rows, seeds, config = plan(self, prompts, config, settings)
        return pieces(self, rows, seeds, config.model_copy(update={"stop": ()}))


@fails("stop_strings_cut")
class WritesTheStopString(StreamsTheStopString):
    def generate(self, prompts, config=None, **settings):
        return super().generate(prompts, config.model_copy(update={"stop": ()}) if config else None, **settings)


@fails("stop_strings_cut")
class StopsEveryRow(Markov):
    "When a stop string has ended one row, those that come later are cut as well."
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield Token(token.row, None, "stop") if config.stop and closed else token


@fails("stop_token_ids")
class ShowsTheStopToken(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token._replace(id=config.stop_token_ids[0], logprob=0.0, top=(), rank=1, entropy=0.0) if token.id is None and config.stop_token_ids else token


# Settings that are listed in `honours` and ignored

def ignores(setting, *tests):
    def tokens(self, prompts, seeds, config, closed):
        default = type(config).model_fields[setting].default
        return Markov.tokens(self, prompts, seeds, config.model_copy(update={setting: default}), closed)
    body = {"tokens": tokens, "honours": Markov.honours | {setting}} | ({"context_length": 30} if setting == "overflow" else {})
    fails(*tests)(type(f"Ignores_{setting}", (Markov,), body))


ignores("temperature", "temperature_0_needs_no_seed")
ignores("top_k", "top_k_1_is_greedy")
ignores("top_p", "a_tiny_top_p_is_greedy")
ignores("min_p", "min_p_1_is_greedy")
ignores("repetition_penalty", "repetition_penalty")
ignores("presence_penalty", "presence_penalty")
ignores("frequency_penalty", "frequency_penalty")
ignores("no_repeat_ngram_size", "no_repeat_ngram_size")
ignores("logit_bias", "logit_bias_forbids_and_forces")
ignores("min_new_tokens", "min_new_tokens")
ignores("stop_token_ids", "stop_token_ids")
ignores("overflow", "overflow_slide_and_stop")


# Scores

@fails("logprobs_add_up_to_nll")
class HalvesLogprobs(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(logprob=token.logprob / 2)


@fails("logprobs_are_one_a_token")
class LikeliestLast(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(top=token.top[::-1])


@fails("logprobs_are_one_a_token")
class PercentForLogprobs(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(top=tuple((id, np.exp(nats)) for id, nats in token.top))


@fails("logprobs_are_one_a_token")
class CountsFromZero(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(rank=token.rank - 1)


@fails("logprobs_are_one_a_token")
class EntropyOfTheLikeliest(Markov):
    def tokens(self, prompts, seeds, config, closed):
        for token in super().tokens(prompts, seeds, config, closed):
            yield token if token.id is None else token._replace(entropy=-token.top[0][1] * np.exp(token.top[0][1]) if token.top else 0)


@fails("nll_of_many_is_nll_of_each")
class AveragesNll(Markov):
    def nll(self, texts): return [sum(super(AveragesNll, self).nll(texts)) / len(texts)] * len(texts) if texts else []


@fails("nll_of_many_is_nll_of_each")
class ForgetsTheMinus(Markov):
    def nll(self, texts): return [-nats for nats in super().nll(texts)]


@fails("logprobs_add_up_to_nll")
class NllPerToken(Markov):
    def nll(self, texts): return [nats / max(1, len(text)) for nats, text in zip(super().nll(texts), texts)]


# Files

@fails("what_was_saved_loads_and_writes_the_same")
class SavesRounded(Markov):
    def save(self, path): Markov(self.tokenizer.characters, self.counts > 0).save(path)


@fails("what_was_saved_loads_and_writes_the_same")
class LoadsAnotherClass(Markov):
    @classmethod
    def load(cls, path): return Markov.load(path)


# Mistakes

@fails("settings_that_are_wrong")
class TakesAnySetting(Markov):
    def generate(self, prompts, config=None, **settings):
        return super().generate(prompts, config, **{name: value for name, value in settings.items() if name != "max_new_token"})


@fails("settings_that_are_wrong", "prompts_that_are_no_text")
class TellsLate(Markov):
    "The stream is a generator itself: nothing is checked before its first piece."
    def stream(self, prompts, config=None, **settings): yield from super().stream(prompts, config, **settings)


@fails("settings_that_the_model_does_not_honour")
class DropsWhatItCannotDo(Markov):
    def stream(self, prompts, config=None, **settings):
        return super().stream(prompts, config, **{name: value for name, value in settings.items() if name not in ("top_k", "regex")})


@fails("settings_that_the_model_does_not_honour")
class HonoursWithATypo(Markov): honours = Markov.honours | {"top-k"}


@fails("nothing_and_what_it_may_not_know")
class CrashesAtStrangers(Markov):
    def __init__(self, *args):
        super().__init__(*args)
        known = {c: i for i, c in enumerate(self.tokenizer.characters)}
        self.tokenizer.encode = lambda text: [known[c] for c in text]


@fails("tokens_that_the_model_does_not_have")
class KnowsNoBounds(Markov):
    def stream(self, prompts, config=None, stop_token_ids=(), **settings): return super().stream(prompts, config, **settings)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what cannot be closed
@pytest.mark.parametrize("cls, tests", FAULTS)
def test_a_fault_is_found(cls, tests, monkeypatch):
    found = outcomes(cls, monkeypatch, *(group for group in GeneratorTests.__bases__ if vars(group).keys() & tests))
    assert tests <= named(found, "failed"), found
    assert all(one.reason for one in found if one.outcome != "passed")


@pytest.mark.parametrize("cls, said, test", [
    (PlansAhead, "writes_left_to_right", "a_longer_text_begins_as_a_shorter_one"), (NllPerToken, "scores_its_text", "logprobs_add_up_to_nll"),
    (SavesRounded, "save", "what_was_saved_loads_and_writes_the_same")])
def test_what_a_suite_says_is_no_fault(cls, said, test, monkeypatch):
    "A model that is not made for it is not tested for it, and everything else is."
    sound = named(outcomes(Markov, monkeypatch, GeneratorTests), "passed")
    found = outcomes(cls, monkeypatch, GeneratorTests, **{said: False})
    left_out = {one.test for one in found if one.outcome == "skipped" and one.reason == f"{cls.__name__} has no {said}"}
    assert f"test_{test}" in left_out and not named(found, "failed") and named(found, "passed") == sound - left_out, found


def test_every_test_finds_something():
    "No test of the suite is without a fault that it finds."
    there = {name for name in dir(GeneratorTests) if name.startswith("test_")}
    assert there == set().union(*(param.values[1] for param in FAULTS)) | {"test_overflow_error_refuses_at_once"}


def test_what_make_raises_is_an_outcome():
    class Unmade(BatchTests): pass
    found = run_tests(Unmade)
    assert isinstance(found, Outcomes) and named(found, "failed") == {name for name in vars(BatchTests) if name.startswith("test_")}
    assert found[0].reason == "NotImplementedError: Unmade.make must return the model to test" and "0 passed, 0 skipped, 2 failed" in repr(found)


def test_a_model_is_made_once_a_class_and_let_go():
    made = []
    class Once(BatchTests):
        prompts = ["One day ", "The"]
        def make(self): return made.append(1) or SOUND
    class Again(Once): pass
    assert not named(run_tests(Once), "failed") and len(made) == 1 and Once.model is None
    run_tests(Again)
    assert len(made) == 2


def test_it_imports_no_framework():
    import subprocess
    code = "import sys, textgen.testing; print([name for name in ('torch', 'tensorflow', 'pytest', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
