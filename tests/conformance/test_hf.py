"""Models of transformers, with keys for a past, with a state, and with neither; and BERT."""
import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from textgen.hf import HF
from textgen.masked import Masked
from textgen.testing import GeneratorTests
from textgen.tokenizer import CharTokenizer
from textgen.tokenizer_io import HFTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a fox cat moon sings sleeps sees and . ,".split()


def tiny(kind, kind_of, **sizes):
    "Random weights, large enough that texts differ."
    torch.manual_seed(0)
    return kind_of.from_config(transformers.AutoConfig.for_model(kind, initializer_range=0.3, **sizes)).eval()


class HFTests(GeneratorTests):
    kind, sizes = "gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=32)
    tokenizer, prompts = CharTokenizer("abcdefgh ."), ["ab", "abc", "b"]

    def make(self):
        ends = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
        return HF(tiny(self.kind, AutoModelForCausalLM, vocab_size=self.tokenizer.vocab_size, **ends, **self.sizes), self.tokenizer)


class TestGPT2(HFTests): save = False   # textgen.load opens what was saved in our own engine


class TestBloom(HFTests): kind, sizes = "bloom", dict(n_layer=2, n_head=4, hidden_size=32)


class TestMamba(HFTests): kind, sizes = "mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4)


class TestOpenAIGPT(HFTests): kind, sizes = "openai-gpt", dict(n_embd=32, n_layer=2, n_head=4, n_positions=32)


class TestBERT(GeneratorTests):
    "Writes in no order, and its surprise at a text is no probability of it."
    prompts, writes_left_to_right, scores_its_text = ["the cat sleeps", "a", "the fox"], False, False
    test_overflow_slide_and_stop = test_overflow_error_refuses_at_once = None   # a whole text has to fit: see tests/test_masked.py

    def make(self):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.add_special_tokens(WORDS[:5])
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        model = tiny("bert", AutoModelForMaskedLM, vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                     intermediate_size=48, max_position_embeddings=64, pad_token_id=0)
        return Masked(model, HFTokenizer(backend, settings={"mask_token": "[MASK]"}))
