"""GPT, in GPT-2's shape and in Llama's, by PyTorch and by the compiled step, with guesses, in fewer bits, and one that was really trained."""
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import KNOWN, needs_known

import textgen
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT
from textgen.kernels import compiler
from textgen.speculative import Lookup
from textgen.testing import GeneratorTests
from textgen.tokenizer import BPETokenizer, CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")
LLAMA = dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_head=2, tie_word_embeddings=False)


class GPTTests(GeneratorTests):
    "A tiny model of random weights, large enough that its texts differ."
    family, compile, tokenizer, scale = {}, False, CharTokenizer("abcdefgh ."), 5
    context_length, more = 16, 0  # ids beyond those of the tokenizer

    def make(self):
        torch.manual_seed(0)
        config = dict(vocab_size=self.tokenizer.vocab_size + self.more, n_positions=self.context_length, n_embd=32, n_layer=2, n_head=4)
        decoder = Decoder(DecoderConfig(**config, **self.family)).eval()
        with torch.no_grad():
            for p in decoder.parameters():
                if p.dim() == 2: p.mul_(self.scale)
        model = GPT(decoder, self.tokenizer)
        model.compile = self.compile
        return model


class TestGPT2(GPTTests): pass


class TestLlama(GPTTests): family = LLAMA


@needs_compiler
class TestGPT2Compiled(GPTTests): compile = True


@needs_compiler
class TestLlamaCompiled(GPTTests): family, compile = LLAMA, True


class TestShortContext(GPTTests): context_length = 4


class TestMoreIdsThanTokens(GPTTests):
    "The vocabulary is filled up, and what it is filled with has probability, too."
    more = 14


class TestBytesWithAnEnd(GPTTests):
    "Byte-level BPE, whose tokens may be half a character, and an end-of-text token, from which empty prompts and scores start."
    tokenizer, scale = BPETokenizer.train(["größer é ☃ 🙂 ab abc b"] * 3, 270, eos_token="<|endoftext|>"), 1


class TestGuesses(GPTTests):
    "Several tokens a step, guessed from what stands before."
    def make(self):
        model = super().make()
        model.drafts = Lookup()
        return model


class Loaded(GPTTests):
    "The same model from a folder, with other weights or on another device."
    options = {}

    def make(self):
        with tempfile.TemporaryDirectory() as folder:
            super().make().save(folder)
            return textgen.load(folder, **self.options)


class TestBFloat16(Loaded): options, tolerance = dict(dtype="bfloat16"), 0.02


class TestInt8(Loaded): options, save = dict(dtype="int8"), False


@pytest.mark.gpu
class TestCUDA(Loaded): options = dict(device="cuda")


@needs_known
class TestStories(GeneratorTests):
    "Llama's shape, 260,000 weights, and a token that begins every prompt."
    prompts = ["Once upon a time", "One day, a girl", "The"]
    def make(self): return textgen.load(Path(KNOWN, "stories260K-hf"), device="cpu", compile=compiler() is not None)
