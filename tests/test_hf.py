"""Models of transformers in our engine: architectures of several kinds against themselves alone, and what is refused at the door."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from conftest import KNOWN, needs_known
from transformers import AutoModelForCausalLM

import textgen
from textgen.cli import guessing
from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.hf import HF, Borrowed, BorrowedSlots, alike, can_pad, gather, join, load_causal, read_chunks, read_newest, run
from textgen.jobs import by_engine, jobs_of
from textgen.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CHARS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .,")
V, L = CHARS.vocab_size, 32
HEADS = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48,
             max_position_embeddings=L)
ARCHITECTURES = {
    "gpt_neox": dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, max_position_embeddings=L),
    "llama": HEADS,
    "mistral": dict(HEADS, sliding_window=4),
    "gemma3_text": dict(HEADS, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "opt": dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3,
                max_position_embeddings=L),
    "bloom": dict(n_layer=2, n_head=4, hidden_size=32),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": dict(hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    "jamba": dict(HEADS, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, num_experts=2),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=L),
    "openai-gpt": dict(n_embd=32, n_layer=2, n_head=4, n_positions=L),
}
KEPT = dict.fromkeys(ARCHITECTURES, "keys") | {"mamba": "state", "mamba2": "state", "jamba": "both", "rwkv": None, "openai-gpt": None}


def tiny(kind):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, vocab_size=V, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                                               initializer_range=0.3, **ARCHITECTURES[kind])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request): return HF(tiny(request.param), CHARS)


@pytest.fixture(scope="module")
def neox(): return HF(tiny("gpt_neox"), CHARS)


@pytest.fixture
def saved(neox, tmp_path):
    neox.save(tmp_path/"model")
    return tmp_path/"model"


def slowly(model, prompt, count):
    "Greedy, with the whole context read for every token; a full one loses its older half."
    ids, context, limit = [], CHARS.encode(prompt), model.context_length
    for _ in range(count):
        if limit and len(context) == limit + 1: context = context[-(limit // 2):]
        ids.append(int(run(model.decoder, torch.tensor([context]))[0, -1].argmax()))
        context.append(ids[-1])
    return ids


def test_each_row_is_what_it_is_alone(model):
    assert model.decoder.keeps == KEPT[model.decoder.model.config.model_type]
    prompts = ["a long prompt of many letters", "b", "so it is"]
    settings = dict(seed=4, temperature=1.1, max_new_tokens=45, stop_token_ids=[3, 4, 5, 6], n=2)
    company = model.generate(prompts, **settings)
    assert len({len(generation.token_ids) for generation in company}) > 1
    for i, generation in enumerate(company):
        assert model.generate(prompts[i // 2], **settings | dict(n=1, seed=generation.seed)) == [generation]


def test_a_text_is_what_the_model_says_of_whole_contexts(model):
    prompts = ["the end of it", "a", "another."]
    got = model.generate(prompts, temperature=0, max_new_tokens=40)
    assert [generation.token_ids for generation in got] == [slowly(model, prompt, 40) for prompt in prompts]


def test_prompts_in_parts_and_tokens_taken_back(model):
    "What the engine does for long prompts, for shared beginnings, and for guesses that were wrong."
    decoder, a, b = model.decoder, CHARS.encode("the fox and the grapes"), CHARS.encode("so it")
    slots, whole = BorrowedSlots(decoder, 3, L), lambda ids: run(decoder, torch.tensor([ids]))[0]
    read_chunks(slots, [(0, 0, a[:10]), (1, 0, b[:2])])
    logits = read_chunks(slots, [(0, 10, a[10:]), (1, 2, b[2:])])
    assert alike(logits[0], whole(a)[-1]) and alike(logits[1], whole(b)[-1])
    slots.copy(0, 2, 7)
    assert alike(read_chunks(slots, [(2, 7, b)])[0], whole(a[:7] + b)[-1])
    logits = read_newest(slots, torch.tensor([[1, 2, 3], [4, 5, 6]]), [len(a) + 3, len(b) + 3])  # (2, 3, V)
    assert alike(logits[0], whole(a + [1, 2, 3])[-3:]) and alike(logits[1], whole(b + [4, 5, 6])[-3:])
    logits = read_newest(slots, torch.tensor([[7], [8]]), [len(a) + 2, len(b) + 4])  # two were wrong in the first row
    assert alike(logits[0], whole(a + [1, 7])[-1:]) and alike(logits[1], whole(b + [4, 5, 6, 8])[-1:])


def test_guesses_change_nothing(model):
    plain = model.generate(["ab ab ab ab", "c"], temperature=0, max_new_tokens=25, seed=0)
    try:
        guessing(model, lookup=True, draft_model=None)
        assert model.generate(["ab ab ab ab", "c"], temperature=0, max_new_tokens=25, seed=0) == plain
    finally: del model.drafts


def test_nll_of_whole_and_long_texts(model):
    text = "the fox looked up at"
    ids = torch.tensor([CHARS.encode(text)])
    nats = torch.nn.functional.cross_entropy(run(model.decoder, ids)[0, :-1], ids[0, 1:], reduction="sum")
    assert model.nll(text)[0] == pytest.approx(nats.item(), rel=1e-4)
    assert model.nll([text, "b" * 90])[0] == pytest.approx(nats.item(), rel=1e-4)


def test_a_row_that_ends_takes_no_more_steps(neox, monkeypatch):
    full, sizes, real = neox.generate(["ab", "c", "fed"], seed=3, max_new_tokens=30), [], neox.decoder.model.forward
    stop = full[0].text[8:11]
    monkeypatch.setattr(neox.decoder.model, "forward", lambda **given: (sizes.append(tuple(given["input_ids"].shape)), real(**given))[1])
    cut = neox.generate(["ab", "c", "fed"], seed=3, max_new_tokens=30, stop=stop)
    lengths = [len(generation.token_ids) for generation in cut]
    assert lengths[0] == 11 and [rows for rows, T in sizes if T == 1] == [sum(n > t for n in lengths) for t in range(1, max(lengths))]


def test_a_model_that_takes_no_padding(neox, monkeypatch):
    "Positions that are no longer said: rows of different lengths are told apart, and every text is the same."
    prompts, settings = ["a long prompt", "b", "so it is"], dict(seed=1, max_new_tokens=20)
    wanted = neox.generate(prompts, **settings)
    other = HF(tiny("gpt_neox"), CHARS)
    other.decoder.names -= {"position_ids"}
    assert can_pad(neox.decoder) and (other.decoder.keeps, other.decoder.pads) == ("keys", True)  # rotary: only distances count
    opt, blind = HF(tiny("opt"), CHARS), HF(tiny("opt"), CHARS)
    blind.decoder.names -= {"position_ids", "attention_mask"}
    assert not blind.decoder.pads and blind.generate(prompts, **settings) == opt.generate(prompts, **settings)
    assert other.generate(prompts, **settings) == wanted


def test_a_cache_that_does_not_work_is_not_used(neox):
    other = HF(tiny("gpt_neox"), CHARS)
    whole = other.decoder.model.forward
    other.decoder.model.forward = lambda **given: whole(**given | {"past_key_values": None})
    assert other.decoder.keeps is None
    broken = Borrowed(tiny("gpt_neox"))
    real = broken.model.forward
    def fails(**given):
        if given["use_cache"]: raise TypeError("no cache here")
        return real(**given)
    broken.model.forward = fails
    assert broken.keeps is None
    assert other.generate("ab", seed=1, max_new_tokens=9) == neox.generate("ab", seed=1, max_new_tokens=9)


def test_join_and_gather_make_caches_of_their_own(neox):
    slots = BorrowedSlots(neox.decoder, 4, L)
    read_chunks(slots, [(i, 0, [i + 1] * (i + 1)) for i in range(4)])
    first = gather(slots, [0, 1, 2, 3], [1, 2, 3, 4])
    assert gather(slots, [0, 1, 2, 3], [1, 2, 3, 4]) is first  # the same rows: nothing is copied
    fewer = gather(slots, [0, 1], [1, 2])
    assert fewer is not first and slots.homes[2] is slots.homes[3] is None and first.layers[0].keys.shape[0] == 4
    assert fewer.layers[0].keys.shape == (2, 4, 2, 8) and not fewer.layers[0].keys[0, :, 0].any()  # padded on the left
    alone = join([(first, 3, 4, 2)])
    assert torch.equal(alone.layers[1].values, first.layers[1].values[3:, :, :2])


@pytest.mark.parametrize("kind", ["llama", "mamba", "jamba"])
def test_half_precision_is_no_reason_to_mistrust_a_cache(kind):
    decoder = HF(tiny(kind).to(torch.bfloat16), CHARS).decoder
    assert decoder.keeps == KEPT[kind] and decoder.pads


def test_all_settings_are_obeyed(neox):
    import llguidance  # noqa: F401
    assert HF.honours == frozenset(GenerationConfig.model_fields)
    got, = neox.generate("a", regex="(fox|hare)s?\\.", seed=2)
    assert got.text in ("fox.", "foxs.", "hare.", "hares.") and got.finish_reason == "stop"
    got, = neox.generate("a", logprobs=2, max_new_tokens=4, top_k=1)
    assert [one.logprob for one in got.logprobs] == [one.top[0][1] for one in got.logprobs]


def test_a_file_of_prompts(neox, tmp_path):
    file = tmp_path/"prompts.txt"
    file.write_text("ab\nlonger than that\nc\n")
    jobs = list(jobs_of(neox, file, dict(max_new_tokens=12), 5))
    lines = sorted((line for step in by_engine(neox, iter(jobs), 2, 30, 36) for line in step), key=lambda line: line["index"])
    assert [line["texts"] for line in lines] == [[neox.generate(job.prompt, job.config)[0].text] for job in jobs]


def test_saved_and_loaded(neox, saved):
    settings = dict(seed=2, max_new_tokens=15)
    again = textgen.load(saved, device="cpu")
    assert type(again) is HF and again.generate("ab", **settings) == neox.generate("ab", **settings)
    assert textgen.load(f"hf:{saved}").generate("ab", **settings) == again.generate("ab", **settings)
    half = load_causal(HF, saved, "cpu", "bfloat16")
    assert half.decoder.transformer.wte.weight.dtype == torch.bfloat16 and half.generate(["a", "bcd"], max_new_tokens=5, temperature=0)
    (saved/"generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 3, "eos_token_id": [7, 8]}))
    again = textgen.load(saved)
    assert again.eos_id == 7 and again.defaults == GenerationConfig(temperature=0, max_new_tokens=3, stop_token_ids=[8])


def refused(words, call, *args, error=UsageError, **settings):
    with pytest.raises(error, match=words) as told: call(*args, **settings)
    assert "\n" not in str(told.value)


def test_a_hub_that_is_not_there(monkeypatch):
    import huggingface_hub as hub

    def fails(error):
        def download(*args, **settings): raise error
        monkeypatch.setattr(hub, "snapshot_download", download)
    fails(OSError("no route"))
    refused("cannot be reached for a model of that name", textgen.load, "hf:some/model", error=TextgenError)
    refused("cannot be reached for a model of that name", textgen.load, "some/model", error=TextgenError)
    fails(hub.errors.RepositoryNotFoundError("nothing", response=SimpleNamespace(headers={}, request=None, status_code=404)))
    refused("shows no model of that name", textgen.load, "hf:some/model")


def test_a_full_disk_while_saving(saved, neox, monkeypatch):
    "Safetensors has a word of its own for it."
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    def full(*args, **settings): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(neox.decoder.model, "save_pretrained", full)
    with pytest.raises(TextgenError, match="could not write .*No space left"): neox.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_what_is_refused(saved, tmp_path):
    config = json.loads((saved/"config.json").read_text())
    def told(words, **values):
        (saved/"config.json").write_text(json.dumps(config | values))
        refused(words, textgen.load, saved)
    told("no model of type 'gptt' is known here, nor to transformers", model_type="gptt")
    told("tensors are missing or of another shape", hidden_size=64)
    told("transformers cannot open", model_type="clip")
    told("is damaged", architectures=7)
    (saved/"config.json").write_text(json.dumps(config))
    refused("no device 'tpu' here", textgen.load, saved, device="tpu")
    refused("dtype 'float23' is not known", textgen.load, saved, dtype="float23")
    (saved/"model.safetensors").rename(saved/"pytorch_model.bin")
    refused("weights in other files .pickles. are not read", textgen.load, saved)
    refused("no model in", textgen.load, f"hf:{tmp_path}/nothing")


@needs_known
def test_a_real_model_both_ways():
    "Stories260K by its known text, and the same as our decoder in every respect that shows."
    place = Path(KNOWN)
    if not (place/"stories260K-hf").is_dir(): pytest.skip("no stories260K-hf there")
    ours, theirs = (textgen.load(f"{kind}:{place}/stories260K-hf", device="cpu") for kind in ("gpt", "hf"))
    assert (type(theirs), theirs.decoder.keeps, theirs.decoder.pads) == (HF, "keys", True)
    got, = theirs.generate("", temperature=0, max_new_tokens=200, stop_token_ids=[])
    expected = (place/"stories260K"/"expected-greedy-from-bos-200.txt").read_text(encoding="utf-8")
    assert got.text.strip() == expected.strip()
    settings = dict(seed=3, n=2, temperature=0.9, top_p=0.95, repetition_penalty=1.1, max_new_tokens=60)
    prompts = ["Once upon a time", "Lily and her dog", "The"]
    assert ours.generate(prompts, **settings) == theirs.generate(prompts, **settings)
    assert theirs.nll(prompts) == pytest.approx(ours.nll(prompts), rel=1e-4)
    assert (ours.eos_id, ours.context_length, ours.defaults) == (theirs.eos_id, theirs.context_length, theirs.defaults)


def test_a_draft_model_must_be_a_decoder_of_ours(neox, saved):
    refused("are for decoders", guessing, neox, False, str(saved))


@pytest.mark.slow
def test_compiled(neox, saved):
    settings = dict(temperature=0, max_new_tokens=10, seed=0)
    model = textgen.load(saved, device="cpu", compile=True)
    assert model.generate(["ab", "cdefg"], **settings) == neox.generate(["ab", "cdefg"], **settings)


@pytest.mark.gpu
def test_on_a_gpu(neox, saved):
    for compile in (False, True):
        model = textgen.load(saved, device="cuda", compile=compile)
        settings = dict(temperature=0, max_new_tokens=40, seed=1)
        assert model.generate(["ab", "cdefg"], **settings) == neox.generate(["ab", "cdefg"], **settings)
