"LoRA: the same as peft both ways, merged exactly, refused where it cannot work, and never half written."
import copy, importlib, importlib.util, json, os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils import logging

from textgen.checkpoint import LLAMA, read_checkpoint, write_checkpoint
from textgen.core import GenerationConfig, TextgenError, UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT
from textgen.int8 import in_int8
from textgen.lora import CONFIG, WEIGHTS, LoRALinear, add_lora, load_adapter, lora_layers, merge_lora, save_adapter, summed
from textgen.slots import Flat
from textgen.tokenizer import CharTokenizer

logging.disable_progress_bar()
peft = importlib.import_module("peft") if importlib.util.find_spec("peft") else None
needs_peft = pytest.mark.skipif(peft is None, reason='needs the package peft; pip install "textgen[dev]"')
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(1))
GPT2_SIZES = dict(vocab_size=65, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
LLAMA_SIZES = dict(vocab_size=65, max_position_embeddings=32, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4)
THEIRS = {
    "gpt2": GPT2Config(**GPT2_SIZES),
    "gpt2, not tied": GPT2Config(**GPT2_SIZES, tie_word_embeddings=False),
    "llama": LlamaConfig(**LLAMA_SIZES),
    "llama, grouped, tied": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama with wide heads, one of keys": LlamaConfig(**LLAMA_SIZES, num_key_value_heads=1, head_dim=12),
}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = [("c_attn",), ("c_attn", "c_proj", "c_fc"), ("mlp.c_fc",)]


def small(**changes): return DecoderConfig(**{**dict(vocab_size=65, n_positions=32, n_embd=24, n_layer=2, n_head=3), **changes})


def decoder(**changes):
    torch.manual_seed(0)
    return Decoder(small(**changes)).eval()


def moved(model, std=0.3):
    "Changes that are not zero, as after training."
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B") or "lora_B" in name: p.normal_(std=std, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model): return getattr(out := model(IDS), "logits", out)


def agree(one, other, atol=1e-4): assert_close(logits(one).float(), logits(other).float(), atol=atol, rtol=0)


@pytest.fixture(params=THEIRS)
def place(request, tmp_path):
    "A directory with a model of transformers, and whether it is GPT-2."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(THEIRS[request.param]).save_pretrained(tmp_path/"base")
    return tmp_path, "gpt2" in request.param


def theirs(folder): return AutoModelForCausalLM.from_pretrained(folder/"base").eval()


# Against peft

@needs_peft
@pytest.mark.parametrize("targets", range(3))
def test_ours_in_peft(place, targets):
    folder, _ = place
    base = read_checkpoint(folder/"base")
    ours = moved(add_lora(copy.deepcopy(base), rank=3, alpha=7, targets=OURS[targets], dropout=0.25))
    assert (logits(ours) - logits(base)).abs().max() > 0.01
    save_adapter(ours, folder/"ours")
    opened = peft.PeftModel.from_pretrained(theirs(folder), folder/"ours").eval()
    agree(ours, opened)
    known = opened.peft_config["default"]
    assert (known.r, known.lora_alpha, known.lora_dropout) == (3, 7, 0.25)
    merged = opened.merge_and_unload()
    agree(merge_lora(copy.deepcopy(ours)), merged)
    again = load_adapter(copy.deepcopy(base), folder/"ours")  # in our own words nothing is stacked: the same numbers
    for (name, a), b in zip(again.state_dict().items(), ours.state_dict().values(), strict=True): assert torch.equal(a, b), name
    assert all(layer.dropout.p == 0.25 and layer.rank == 3 for layer in lora_layers(again).values())


@needs_peft
@pytest.mark.parametrize("settings", [dict(), dict(use_rslora=True), dict(lora_dropout=0.3)], ids=str)
@pytest.mark.parametrize("targets", range(3))
def test_theirs_here_and_back(place, targets, settings):
    folder, gpt2 = place
    named = [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["mlp.c_proj"]] if gpt2 else [["q_proj", "v_proj"], EVERY, ["up_proj"]]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=named[targets], task_type="CAUSAL_LM", fan_in_fan_out=gpt2, **settings)
    made = moved(peft.get_peft_model(theirs(folder), config))
    made.save_pretrained(folder/"made")
    before = torch.get_rng_state()
    base = read_checkpoint(folder/"base")
    ours = load_adapter(copy.deepcopy(base), folder/"made")
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in ours.modules()), "an evaluated decoder stays one"
    assert (logits(ours) - logits(base)).abs().max() > 0.005
    agree(ours, made)
    save_adapter(ours, folder/"back")
    agree(peft.PeftModel.from_pretrained(theirs(folder), folder/"back").eval(), made)
    agree(load_adapter(copy.deepcopy(base), folder/"back"), made)
    agree(merge_lora(ours), made)


@needs_peft
def test_a_step_of_training_is_peft_s(tmp_path):
    base = decoder()
    write_checkpoint(base, tmp_path/"base")
    ours = moved(add_lora(copy.deepcopy(base), rank=4, alpha=8, targets=["c_attn", "mlp.c_fc"]), 0.02)
    save_adapter(ours, tmp_path/"ours")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path), tmp_path/"ours", is_trainable=True)
    ours.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    other(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    assert len(grads) == 2*2*2
    for name, layer in lora_layers(ours).items():
        for x in "AB": assert_close(getattr(layer, x).grad, grads[f"base_model.model.{name}.lora_{x}.default.weight"], atol=1e-6, rtol=1e-4)


# By itself

@pytest.mark.parametrize("config", [dict(), LLAMA.swaps, dict(norm="rmsnorm", tie_word_embeddings=False)], ids=str)
def test_identity_freeze_and_merge(config):
    base = decoder(**config)
    ours = add_lora(copy.deepcopy(base), targets=["c_attn", "c_proj", "c_fc"])
    assert torch.equal(logits(ours), logits(base))
    assert {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.requires_grad} == {"A", "B"}
    assert len(lora_layers(ours)) == 8 and not any(module.training for module in ours.modules())
    moved(ours)
    expected = {name: layer.base.weight + 2.0*(layer.B @ layer.A) for name, layer in lora_layers(ours).items()}
    merged = merge_lora(copy.deepcopy(ours))
    for name, weight in expected.items(): assert torch.equal(merged.get_submodule(name).weight, weight)
    agree(merged, ours, atol=1e-5)
    assert [*merged.state_dict()] == [*base.state_dict()] and all(p.requires_grad for p in merged.parameters())
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert merge_lora(merged) is merged


def test_only_the_changes_learn():
    base = decoder()
    ours = add_lora(copy.deepcopy(base), rank=4).train()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(loss := ours.loss(IDS[:, :-1], IDS[:, 1:]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    for name, layer in lora_layers(ours).items(): ours.set_submodule(name, layer.base)
    for (name, a), b in zip(ours.state_dict().items(), base.state_dict().values(), strict=True): assert torch.equal(a, b), name


def test_dropout_is_for_training_alone():
    ours = moved(add_lora(decoder(), dropout=0.5))
    assert torch.equal(logits(ours), logits(ours))
    ours.train()
    assert not torch.equal(logits(ours), logits(ours))
    plain = moved(add_lora(decoder())).train()
    assert torch.equal(logits(plain), logits(plain))
    layer = LoRALinear(nn.Linear(6, 5), 2, 2, dropout=0.5).train()  # only the change drops, never the layer itself
    assert torch.equal(layer(x := torch.ones(4, 6)), layer.base(x))


def test_autocast_and_bf16_weights():
    ours, x = moved(add_lora(decoder())), IDS
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = ours(x), ours.loss(x[:, :-1], x[:, 1:])
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), logits(ours), atol=0.05, rtol=0.05)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in ours.parameters() if p.requires_grad)
    half = moved(add_lora(decoder().to(torch.bfloat16)))
    assert {layer.A.dtype for layer in lora_layers(half).values()} == {torch.float32} and logits(half).dtype == torch.bfloat16
    agree(merge_lora(copy.deepcopy(half)), half, atol=0.05)
    layer = half.transformer.h[0].attn.c_attn  # one rounding, not two
    exact = layer.base.weight.float() + layer.scale*(layer.B @ layer.A)
    assert torch.equal(summed(layer), exact.to(torch.bfloat16))


def test_fast_steps_write_with_the_change():
    ours = moved(add_lora(decoder(vocab_size=26), targets=["c_attn", "c_proj", "c_fc"]), 1.0)
    merged, base = merge_lora(copy.deepcopy(ours)), decoder(vocab_size=26)
    for a, b in zip(Flat(ours).blocks, Flat(merged).blocks, strict=True):
        for x, y in zip(a, b, strict=True): assert_close(x, y) if x is not None else None
    greedy, letters = GenerationConfig(temperature=0, max_new_tokens=12), CharTokenizer("abcdefghijklmnopqrstuvwxyz")
    said = {}
    for compile in (False, True):
        for name, model in {"ours": ours, "merged": merged, "base": base}.items():
            gpt = GPT(copy.deepcopy(model), letters)
            gpt.compile = compile
            said[name, compile] = gpt.generate("hello", greedy)[0].text
    assert len({said[name, compile] for name in ("ours", "merged") for compile in (False, True)}) == 1
    assert said["base", False] != said["ours", False]


def test_training_goes_on_after_loading(tmp_path):
    ours = moved(add_lora(decoder(), rank=4, targets=["c_attn", "c_fc"]))
    save_adapter(ours, tmp_path)
    again = load_adapter(decoder(), tmp_path)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {name for name, p in ours.named_parameters() if p.requires_grad}
    resumed = add_lora(decoder(), rank=4, targets=["c_attn", "c_fc"])  # as a trainer that resumes does
    resumed.load_state_dict(ours.state_dict())
    assert torch.equal(logits(resumed), logits(ours)) and torch.equal(logits(again), logits(ours))


def test_a_mix_of_no_family_has_our_names(tmp_path):
    ours = moved(add_lora(decoder(norm="rmsnorm"), targets=["c_attn", "mlp.c_proj"]))
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path/CONFIG).read_text())["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert torch.equal(logits(load_adapter(decoder(norm="rmsnorm"), tmp_path)), logits(ours))


# Refused

def refused(match, call, *args, **settings):
    with pytest.raises(UsageError, match=match) as caught: call(*args, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("match, settings", [
    ("the rank is 0", dict(rank=0)), ("the rank is 2.5", dict(rank=2.5)), ("the rank is True", dict(rank=True)),
    ("rank 25 is more than 24", dict(rank=25)), ("alpha is 0", dict(alpha=0)), ("alpha is nan", dict(alpha=float("nan"))),
    ("alpha is inf", dict(alpha=float("inf"))), ("dropout is 1", dict(dropout=1)), ("dropout is -0.1", dict(dropout=-0.1)),
    ("no layer 'q_proj' .* there are attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj", dict(targets=["q_proj"])),
    ("no layer 'attn.c_atn' .* there are attn.c_attn, ", dict(targets=["c_fc", "attn.c_atn"])), ("no layer ''", dict(targets=[""])),
    ("no targets", dict(targets=[])),
], ids=str)
def test_settings_that_cannot_work(match, settings):
    model = decoder()
    refused(match, add_lora, model, **settings)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_not_twice_not_in_int8_not_unmerged(tmp_path):
    assert set(lora_layers(add_lora(decoder(), targets="c_fc"))) == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}
    ours = add_lora(decoder())
    save_adapter(ours, tmp_path/"adapter")
    refused("has LoRA layers already", add_lora, ours)
    refused("has LoRA layers already", load_adapter, ours, tmp_path/"adapter")
    refused("int8", add_lora, in_int8(decoder()))
    refused("no LoRA layers to save", save_adapter, decoder(), tmp_path/"none")
    refused("c_attn.A is no tensor .* merge_lora", write_checkpoint, ours, tmp_path/"model")
    assert not (tmp_path/"none").exists() and not (tmp_path/"model").exists()
    write_checkpoint(merge_lora(ours), tmp_path/"model")


@pytest.fixture
def adapter(tmp_path):
    "A folder with an adapter, and what changes its settings or its tensors."
    save_adapter(moved(add_lora(decoder(), rank=4, targets=["c_attn", "mlp.c_fc"])), tmp_path)

    def change(settings=(), tensors=None):
        values = {**json.loads((tmp_path/CONFIG).read_text()), **dict(settings)}
        (tmp_path/CONFIG).write_text(json.dumps({name: value for name, value in values.items() if value is not Ellipsis}))
        if tensors: save_file(tensors(load_file(tmp_path/WEIGHTS)), tmp_path/WEIGHTS)
        return tmp_path
    return change


@pytest.mark.parametrize("match, settings", [
    ("peft_type is 'IA3'", dict(peft_type="IA3")), ("use_dora is True", dict(use_dora=True)), ("bias is 'all'", dict(bias="all")),
    ("modules_to_save is ..lm_head", dict(modules_to_save=["lm_head"])), ("rank_pattern", dict(rank_pattern={"c_attn": 2})),
    ("alpha_pattern", dict(alpha_pattern={"c_attn": 2})), ("init_lora_weights is 'pissa'", dict(init_lora_weights="pissa")),
    ("layers_to_transform", dict(layers_to_transform=[0])), ("lacks r, target_modules", {"r": ..., "target_modules": ...}),
    ("lacks peft_type", dict(peft_type=...)), ("the rank is '4'", dict(r="4")), ("alpha is None", dict(lora_alpha=None)),
    ("only a list of names", dict(target_modules=".*c_attn")), ("only a list of names", dict(target_modules=[])),
    ("dropout is 'a bit'", dict(lora_dropout="a bit")), ("F32 .4, 24., and this decoder with rank 8 asks for floats .8, 24.", dict(r=8)),
    ("name the layer 'q_proj', and the blocks here have only attn.c_attn, attn.c_proj", dict(target_modules=["c_attn", "q_proj"])),
    ("name the layer 'lm_head'", dict(target_modules=["c_attn", "lm_head"])),
    ("mlp.c_proj.lora_A.weight is missing", dict(target_modules=["c_attn", "c_fc", "mlp.c_proj"])),
    ("mlp.c_fc.lora_A.weight has no place", dict(target_modules=["c_attn"])),
], ids=str)
def test_settings_of_others(adapter, match, settings):
    model = decoder()
    refused(match, load_adapter, model, adapter(settings))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def without(tensors, end): return {name: x for name, x in tensors.items() if not name.endswith(end)}


@pytest.mark.parametrize("match, tensors", [
    ("h.1.mlp.c_fc.lora_B.weight is missing", lambda t: without(t, "h.1.mlp.c_fc.lora_B.weight")),
    ("magnitude has no place", lambda t: {**t, "magnitude": torch.ones(3)}),
    ("holds NaN or infinity", lambda t: {**t, next(iter(t)): next(iter(t.values()))*torch.inf}),
    ("is I64 ", lambda t: {name: x.long() for name, x in t.items()}),
], ids=lambda x: x if isinstance(x, str) else "")
def test_tensors_that_do_not_fit(adapter, match, tensors):
    model = decoder()
    refused(match, load_adapter, model, adapter(tensors=tensors))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_another_base(adapter):
    folder = adapter()
    for match, config in [("is F32 .4, 24., and this decoder with rank 4 asks for floats .4, 48.", dict(n_embd=48)),
                          ("h.2.attn.c_attn.lora_A.weight is missing", dict(n_layer=3)), ("h.1.* has no place", dict(n_layer=1)),
                          ("is F32 .96, 4., .* .50, 4.", dict(n_inner=50)), ("name the layer 'attn.c_attn'", LLAMA.swaps)]:
        refused(match, load_adapter, decoder(**config), folder)


def test_files_cut_short_or_absent(adapter, tmp_path):
    folder = adapter()
    whole = (folder/WEIGHTS).read_bytes()
    for keep in (0, 5, 200, len(whole) - 1):
        (folder/WEIGHTS).write_bytes(whole[:keep])
        refused("adapter_model.safetensors is damaged", load_adapter, decoder(), folder)
    (folder/WEIGHTS).unlink()
    refused("cannot read .*adapter_model.safetensors", load_adapter, decoder(), folder)
    (folder/CONFIG).write_text("{")
    refused("adapter_config.json is damaged", load_adapter, decoder(), folder)
    (folder/CONFIG).unlink()
    refused("there is no .*adapter_config.json; an adapter is a folder", load_adapter, decoder(), folder)


def test_all_or_nothing(tmp_path, monkeypatch):
    ours = moved(add_lora(decoder(), rank=4))
    save_adapter(ours, tmp_path)
    (tmp_path/"README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("save", "write_object"):
        with monkeypatch.context() as patch:
            def full(*args): raise OSError(28, "No space left on device")
            patch.setattr(f"textgen.lora.{name}", full)
            with pytest.raises(TextgenError, match="No space left"): save_adapter(moved(ours, 1.0), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_adapter(ours, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() and after[WEIGHTS] != before[WEIGHTS] and after["README.md"] == b"mine"
    with monkeypatch.context() as patch:  # between the two moves: no adapter, and not half of one
        def stops(one, other, replace=os.replace):
            if other.name == CONFIG: raise OSError(5, "Input/output error")
            replace(one, other)
        patch.setattr(os, "replace", stops)
        with pytest.raises(TextgenError, match="Input/output error"): save_adapter(ours, tmp_path)
    refused("there is no .*adapter_config.json", load_adapter, decoder(), tmp_path)
