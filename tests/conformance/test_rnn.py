"""LSTM and GRU, by the graph as it is and compiled by XLA, with characters and with tokens that end a text."""
import pytest

pytest.importorskip("tensorflow", reason="needs the extra lstm")
from textgen.lstm import RNNShape, build_network, load_tensorflow
from textgen.rnn import RNN
from textgen.testing import GeneratorTests
from textgen.tokenizer import BPETokenizer, CharTokenizer

load_tensorflow()
import keras


class RNNTests(GeneratorTests):
    "A tiny network of random weights, large enough that its texts differ."
    shape, tokenizer, compile = RNNShape(units=24, n_embd=8), CharTokenizer("abcdefgh ."), False
    prompts = ["ab", "abc", "b"]

    def make(self):
        keras.utils.set_random_seed(0)
        network = build_network(self.shape, self.tokenizer.vocab_size)
        network.set_weights([3 * weight for weight in network.get_weights()])
        model = RNN(network, self.shape, self.tokenizer)
        model.compile = self.compile
        return model


class TestLSTM(RNNTests): pass


class TestGRU(RNNTests): shape = RNNShape(cell="gru", units=24, n_embd=8, n_layer=3)


class TestXLA(RNNTests):
    "Every setting is a graph of its own to compile, so it is a small one; see chapter 10b for a larger one."
    shape, compile = RNNShape(units=24, n_embd=8, n_layer=1), True


class TestEndOfText(RNNTests):
    "Byte pairs, of which one ends a document: more than can be compared in pairs. The table of tokens is the last layer, too."
    shape = RNNShape(units=24, n_embd=8, tie_word_embeddings=True)
    tokenizer = BPETokenizer.train(["the cat sat on the mat, and the rat sat on the cat. " * 9], 280, eos_token="<end>")
    prompts = ["the cat", "a", "on the mat"]
