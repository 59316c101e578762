"""Masked models of several architectures made to write: only gaps change, fewer each time, alone as in company; and what is refused."""
import json

import pytest
import tokenizers as hf
import torch
import transformers
from hypothesis import given, strategies as st
from transformers import AutoModelForMaskedLM

import textgen
from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.gpt import GPT
from textgen.hf import HF, quiet
from textgen.masked import Masked, find_mask, frame, lay_out, least_certain, look, rewrite, schedule_of
from textgen.tokenizer_io import HFTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "the a fox cat moon sings sleeps sees and . ,".split()
BERT, ROBERTA = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
L = 24
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=L, initializer_range=0.3,
             pad_token_id=0)
DISTIL = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=L, initializer_range=0.3, pad_token_id=0)
ARCHITECTURES = {"bert": (BERT, SIZES), "roberta": (ROBERTA, SIZES), "distilbert": (BERT, DISTIL), "electra": (BERT, SIZES | {"embedding_size": 32})}


def tokenizer_of(special):
    backend = hf.Tokenizer(hf.models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token=special[1]))
    backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    backend.post_processor = hf.processors.TemplateProcessing(single=f"{special[2]} $A {special[3]}",
                                                              special_tokens=[(special[2], 2), (special[3], 3)])
    return HFTokenizer(backend, settings={"mask_token": special[4]})


def tiny(kind):
    special, sizes = ARCHITECTURES[kind]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(special + WORDS) + 3, **sizes)
    return Masked(AutoModelForMaskedLM.from_config(config), tokenizer_of(special))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request): return tiny(request.param)


@pytest.fixture(scope="module")
def bert(): return tiny("bert")


PROMPTS = ["the fox sings and the moon", "a", "the cat sleeps ."]


def test_the_frame_and_the_mask(model):
    assert frame(model.tokenizer) == ([2], [3]) and model.mask == 4 == find_mask(model.tokenizer)
    assert model.out.tolist() == [True] * 5 + [False] * len(WORDS) + [True] * 3
    assert model.context_length == (L - 1 if model.model.config.model_type == "roberta" else L)


def test_only_gaps_change_and_fewer_each_time(model):
    config = GenerationConfig(max_new_tokens=13, seed=0)
    draft = lay_out(model, [2, *model.tokenizer.encode(PROMPTS[0])], 3, config)
    start, gaps = draft.ids.clone(), []
    for count in schedule_of(13, 5):
        draft.hide(count, model.mask)
        before, hidden = draft.ids.clone(), draft.ids == model.mask
        assert hidden.sum() == count and not hidden[:draft.first].any()
        look(model, [draft], config)
        assert torch.equal(before[~hidden], draft.ids[~hidden]) and (draft.ids != model.mask).all() and not model.out[draft.new].any()
        gaps.append(count)
    assert gaps == [13, 10, 7, 5, 2]
    assert torch.equal(draft.ids[:draft.first], start[:draft.first]) and draft.ids[-1] == 3


def test_alone_as_in_company_and_by_the_seed(model):
    for more in (dict(), dict(top_k=4), dict(temperature=0), dict(repetition_penalty=2.0), dict(top_p=0.7, logit_bias={7: 3})):
        company = model.generate(PROMPTS, n=3, seed=5, max_new_tokens=11, **more)
        for i, one in enumerate(company):
            assert model.generate(PROMPTS[i // 3], seed=one.seed, max_new_tokens=11, **more) == [one]
        assert all(one.finish_reason == "length" and len(one.token_ids) == 11 for one in company)
    assert len({one.text for one in model.generate("a", n=5, seed=5, max_new_tokens=11, temperature=3)}) == 5


def test_one_look_without_chance_is_the_argmax_of_one_pass(model):
    quick = Masked(model.model, model.tokenizer, rounds=1)
    for prompt in PROMPTS:
        got, = quick.generate(prompt, temperature=0, max_new_tokens=6)
        ids = [2, *model.tokenizer.encode(prompt)]
        logits = model.model(torch.tensor([[*ids, *[4] * 6, 3]])).logits[0, len(ids):-1, :]
        assert got.token_ids == logits.masked_fill(model.out, -torch.inf).argmax(-1).tolist()


def test_ten_looks_by_hand(bert):
    "Mask-Predict without chance, written plainly."
    got, = bert.generate(PROMPTS[1], temperature=0, max_new_tokens=10, logprobs=1)
    ids = torch.tensor([[2, *bert.tokenizer.encode(PROMPTS[1]), *[4] * 10, 3]])
    first, nats = ids.shape[1] - 11, [0.0] * 10
    for turn in range(10):
        worst = sorted(range(10), key=lambda place: (nats[place], -place))[:10 - turn]
        for place in worst: ids[0, first + place] = 4
        scores = bert.model(ids).logits[0].masked_fill(bert.out, -torch.inf).log_softmax(-1)
        for place in worst: ids[0, first + place], nats[place] = scores[first + place].argmax(), scores[first + place].max().item()
    assert got.token_ids == ids[0, first:-1].tolist()
    assert [one.logprob for one in got.logprobs] == pytest.approx(nats, abs=1e-4)
    assert [one.top[0][0] for one in got.logprobs] == got.token_ids


@given(st.lists(st.integers(-3, 0), min_size=1, max_size=20), st.data())
def test_the_least_certain(values, data):
    count = data.draw(st.integers(0, len(values)))
    hidden = least_certain(torch.tensor(values, dtype=torch.float32), count).tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], -i))
    assert [i for i, out in enumerate(hidden) if out] == sorted(order[:count])


def test_penalties_and_biases_do_something(bert):
    plain, = bert.generate("the", temperature=0, max_new_tokens=12)
    twice = max(set(plain.token_ids), key=plain.token_ids.count)
    varied, = bert.generate("the", temperature=0, max_new_tokens=12, frequency_penalty=2.0, presence_penalty=2.0)
    assert varied.token_ids.count(twice) < plain.token_ids.count(twice)
    never, = bert.generate("the", temperature=0, max_new_tokens=12, logit_bias={twice: -100})
    assert twice not in never.token_ids


def test_a_schedule_ends_with_no_gap(bert):
    seen = []
    drafts = [lay_out(bert, [2, 6], 1, GenerationConfig(max_new_tokens=n)) for n in (3, 12)]
    rewrite(bert, drafts, GenerationConfig(), lambda drafts: seen.append([int(draft.hidden.sum()) for draft in drafts]))
    assert [gaps for _, gaps in seen] == schedule_of(12, 10) and [gaps for gaps, _ in seen][:7] == schedule_of(3, 10)
    assert all((draft.ids != bert.mask).all() for draft in drafts)


def test_closed_rows_and_stop_strings(bert):
    full = bert.generate(PROMPTS, seed=1, max_new_tokens=12)
    stop = bert.tokenizer.decode(full[0].token_ids[4:5])
    cut = bert.generate(PROMPTS, seed=1, max_new_tokens=12, stop=stop)
    assert all(stop not in one.text for one in cut) and cut[0].finish_reason == "stop"
    assert all(short.token_ids == whole.token_ids[:len(short.token_ids)] for short, whole in zip(cut, full))
    tokens = bert.tokens([[2, 6], [2, 7]], [1, 1], GenerationConfig(max_new_tokens=5), {1})
    assert {token.row for token in tokens} == {0}


def test_a_context_that_is_full(bert):
    room = L - 2
    prompt = " ".join(["fox"] * (room - 3))
    stop, = bert.generate(prompt, overflow="stop", max_new_tokens=9, seed=0)
    slide, = bert.generate(prompt, max_new_tokens=9, seed=0)
    short, = bert.generate(" ".join(["fox"] * (room - 9)), max_new_tokens=9, seed=0)
    assert len(stop.token_ids) == 3 and slide == short
    for words, settings in [("exceed the 22 that this model sees", dict(max_new_tokens=23)), ("ask for", dict(overflow="error", max_new_tokens=9))]:
        with pytest.raises(UsageError, match=words): bert.generate(prompt, **settings)
    assert len(bert.nll([prompt * 3])) == 1


def test_pseudo_likelihood(model):
    ids, slow = model.tokenizer.encode(PROMPTS[0]), 0
    for place, id in enumerate(ids):
        row = torch.tensor([[2, *ids[:place], 4, *ids[place + 1:], 3]])
        slow -= model.model(row).logits[0, 1 + place].log_softmax(-1)[id].item()
    nats = model.nll([*PROMPTS, ""])
    assert nats[0] == pytest.approx(slow, rel=1e-4) and nats[3] == 0 and model.nll(PROMPTS[0])[0] == pytest.approx(nats[0], rel=1e-4)


@pytest.fixture
def saved(bert, tmp_path):
    with quiet(): bert.model.save_pretrained(tmp_path/"bert")
    bert.tokenizer.save(tmp_path/"bert")
    return tmp_path/"bert"


def test_loaded_by_its_type(bert, saved):
    again, settings = textgen.load(saved, device="cpu", rounds=3), dict(seed=1, max_new_tokens=8)
    assert type(again) is Masked and again.rounds == 3 and not isinstance(again, GPT)
    assert again.generate("the", **settings) == Masked(bert.model, bert.tokenizer, 3).generate("the", **settings)
    assert textgen.load(f"masked:{saved}", dtype="bfloat16").generate("the", **settings)[0].text
    config = json.loads((saved/"config.json").read_text())
    (saved/"config.json").write_text(json.dumps(config | {"model_type": "electra", "embedding_size": 32}))  # other names of weights
    with pytest.raises(UsageError, match="tensors are missing"): textgen.load(saved)


def test_roberta_with_bytes_for_letters(tmp_path):
    "Its tokenizer puts nothing before a prompt by itself, and its positions begin behind the padding token's number."
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer, backend.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    backend.train_from_iterator(["the fox sings and the moon sleeps"] * 9, hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    backend.post_processor = hf.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", cls_token="<s>", sep_token="</s>")
    config = transformers.RobertaConfig(vocab_size=backend.get_vocab_size(), **SIZES | dict(pad_token_id=1, max_position_embeddings=26))
    torch.manual_seed(0)
    with quiet():
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    model = textgen.load(tmp_path, device="cpu")
    assert (model.marks, model.mask, model.context_length) == (([0], [2]), 4, 24)
    made = model.generate(["the fox", "and the moon sings", ""], max_new_tokens=9, seed=1)
    assert [model.generate(prompt, max_new_tokens=9, seed=1) == [one] for prompt, one in zip(["the fox", "and the moon sings", ""], made)] == [True] * 3
    assert len(model.generate("", max_new_tokens=22)[0].token_ids) == 22  # every position it has
    with pytest.raises(UsageError, match="exceed the 22"): model.generate("", max_new_tokens=23)


def test_what_is_refused(bert, saved):
    def refused(words, call, *args, **settings):
        with pytest.raises(UsageError, match=words) as told: call(*args, **settings)
        assert "\n" not in str(told.value)
    refused("looks at both sides of a gap; load it as masked:", HF.load, saved)
    refused("rounds: must be a whole number", textgen.load, saved, rounds=0)
    refused("regex: Masked cannot do this", bert.generate, "a", regex="a")
    refused("no device", textgen.load, saved, device="tpu")
    refused("dtype 'int9'", textgen.load, saved, dtype="int9")
    (saved/"tokenizer.json").unlink()
    refused("no tokenizer in", textgen.load, saved)


def test_broken_weights_are_told(bert):
    model = tiny("bert")
    with torch.no_grad(): model.model.bert.embeddings.word_embeddings.weight[6] = torch.nan
    with pytest.raises(TextgenError, match="gave no numbers at look 1"): model.generate("a", max_new_tokens=3)


@pytest.mark.gpu
def test_on_a_gpu(bert, saved):
    model = textgen.load(saved, device="cuda")
    for more in (dict(temperature=0), dict(temperature=2, repetition_penalty=1.5)):
        assert model.generate(PROMPTS, seed=1, max_new_tokens=9, **more) == bert.generate(PROMPTS, seed=1, max_new_tokens=9, **more)
