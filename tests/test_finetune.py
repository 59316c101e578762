"""Going on from a model by a recipe: GPT-2 and Llama in their variants, all weights or LoRA, and what cannot work said in one line."""
import json, re, shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import textgen
from conftest import KNOWN, needs_known
from textgen.cli import main
from textgen.core import UsageError
from textgen.recipe import load_recipe
from textgen.runs import train
from textgen.tokenizer import BPETokenizer
from textgen.fitting import fit, judge
from textgen.trainer import notes, start

pytestmark = pytest.mark.usefixtures("one_thread")
FABLE = "The fox looked up at the grapes, and the grapes looked down at the fox.\n"
TINY = {"device": "cpu", "data_options": {}, "steps": 6, "evaluate_every": 3, "checkpoint_every": 3, "length": 16, "rows": "chunks",
        "batch_size": 4, "sample.stories": 0, "sample.prompts": 1, "sample.settings.max_new_tokens": 5, "optimizer.name": "adamw",
        "optimizer.learning_rate": 0.01}
LORA = {"lora": {"rank": 4, "alpha": 8, "targets": ["c_attn", "mlp.c_proj"]}, "optimizer.learning_rate": 0.05}
SHAPE = dict(n_positions=24, n_embd=32, n_layer=2, n_head=2)
LLAMA = dict(max_position_embeddings=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48)
VARIANTS = {  # vocabulary beyond the tokenizer's, and a model as transformers makes it
    "gpt2": (0, GPT2LMHeadModel, GPT2Config, SHAPE),
    "gpt2 exact gelu, wider, dropout": (7, GPT2LMHeadModel, GPT2Config, {**SHAPE, "activation_function": "gelu", "resid_pdrop": 0.5}),
    "gpt2 untied": (0, GPT2LMHeadModel, GPT2Config, {**SHAPE, "tie_word_embeddings": False}),
    "llama": (0, LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama tied, wider": (5, LlamaForCausalLM, LlamaConfig, {**LLAMA, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder with a text, a tokenizer, and a model of each variant by its name."
    folder = tmp_path_factory.mktemp("finetune")
    (folder/"fable.txt").write_text(FABLE * 30)
    tokenizer = BPETokenizer.train([FABLE], 300, eos_token="<end>")
    transformers.utils.logging.disable_progress_bar()
    for name, (wider, cls, config, shape) in VARIANTS.items():
        torch.manual_seed(0)
        ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
        cls(config(vocab_size=tokenizer.vocab_size + wider, **ends, **shape)).save_pretrained(folder/name)
        tokenizer.save(folder/name)
    return folder


def recipe(work, base, **more):
    return load_recipe("demo", {**TINY, "init_from": str(work/base), "data": str(work/"fable.txt"), **more})


def logits(folder, ids):
    "By us and by transformers."
    ours, theirs = textgen.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode(): return ours.decoder(ids), theirs(ids).logits


@pytest.mark.parametrize("more", [{}, LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", VARIANTS)
def test_run_is_a_model_of_the_same_kind(name, more, work, tmp_path):
    "Begins with the base's losses, learns the text, and is saved so that both open it with equal logits; the base stays as it was."
    ids, config = torch.arange(20)[None], recipe(work, name, **more)
    run = start(config, tmp_path/"at_rest", work/"data")
    with torch.inference_mode(): torch.testing.assert_close(run.model.eval()(ids), logits(work/name, ids)[1])
    before, stored = judge(run).nats_per_token, (work/name/"model.safetensors").read_bytes()
    folder, result = train(config, tmp_path/"run", root=work/"data")
    assert result["nats_per_token"] < before - 0.02
    ours, theirs = logits(folder, ids)
    torch.testing.assert_close(ours, theirs)
    was, now = (json.loads((path/"config.json").read_text()) for path in (work/name, folder))
    for key in ("model_type", "vocab_size", "activation_function", "hidden_act", "tie_word_embeddings", "eos_token_id", "n_positions",
                "num_key_value_heads", "max_position_embeddings"): assert was.get(key) == now.get(key), key
    assert now.get("resid_pdrop", 0) == 0  # as the recipe has it
    assert (work/name/"model.safetensors").read_bytes() == stored


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_moves_nothing_else(name, work, tmp_path):
    "To the bit; and dropout of the recipe is that of the training."
    run = start(recipe(work, name, **LORA, **{"model.dropout": 0.3}), tmp_path, work/"data")
    before = {key: weight.clone() for key, weight in run.model.state_dict().items()}
    assert run.model.config.dropout == 0.3
    fit(run)
    moved = {key for key, weight in run.model.state_dict().items() if not weight.equal(before[key])}
    assert moved and {key.rpartition(".")[2] for key in moved} == {"A", "B"} and len(moved) == 2 * 2 * 2
    base = textgen.load(work/name).decoder.state_dict()
    for key, weight in run.model.state_dict().items():
        if key not in moved: assert weight.equal(base[key.replace(".base.", ".")]), key


def test_stopped_and_resumed(work, tmp_path):
    "A fine-tuned model has the same bits when it is trained in two goes, and goes on from the run's own folder."
    config = recipe(work, "gpt2", **LORA)
    whole, _ = train(config, tmp_path/"whole", root=work/"data")
    half, _ = train(config.model_copy(update={"steps": 6}), tmp_path/"half", root=work/"data")
    for left in ("result.json", "model.safetensors"): (half/left).unlink()
    shutil.rmtree(half/"checkpoints"/"step-000006")
    train(config, half, resume=True, root=work/"data")
    assert (half/"model.safetensors").read_bytes() == (whole/"model.safetensors").read_bytes()
    again, result = train(load_recipe("demo", {**TINY, "init_from": str(half), "data": str(work/"fable.txt")}), tmp_path/"again", root=work/"data")
    assert (again/"model.safetensors").is_file() and result["steps"] == 6


def test_tokens_that_end_a_text(work, tmp_path):
    "Those of the base still do, unless the recipe names others; what stands between the documents does first."
    base = Path(shutil.copytree(work/"gpt2", tmp_path/"base"))
    (base/"generation_config.json").write_text('{"eos_token_id": [5, 9, 100000], "do_sample": false, "max_new_tokens": 7}')
    config = json.loads((base/"config.json").read_text())
    (base/"config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    (end,), fable = textgen.load(work/"gpt2").tokenizer.encode("\n"), {"data": str(work/"fable.txt")}
    stories = {"data": "stories", "data_options": {"train": 100, "validation": 10}}  # each ends in a new line
    own = {**stories, "sample.settings.stop_token_ids": [4]}
    for i, (more, first, others) in enumerate([(fable, 9, (5,)), (stories, end, (5, 9)), (own, end, (4,))]):
        changes = {**TINY, **more, "init_from": str(base), "steps": 1}
        folder, _ = train(load_recipe("demo", changes), tmp_path/f"run{i}", root=work/"data")
        made = textgen.load(folder)
        assert made.eos_id == first and made.defaults.stop_token_ids == others and made.defaults.temperature == 0.8
        assert json.loads((folder/"config.json").read_text())["eos_token_id"] == first


def test_half_precision_becomes_whole(work, tmp_path):
    GPT2LMHeadModel.from_pretrained(work/"gpt2").bfloat16().save_pretrained(tmp_path/"base")
    for file in work.glob("gpt2/tokenizer*"): shutil.copy(file, tmp_path/"base")
    run = start(load_recipe("demo", {**TINY, "init_from": str(tmp_path/"base"), "data": str(work/"fable.txt")}), tmp_path, work/"data")
    assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}


# What cannot work

def test_refused(work, tmp_path):
    "In one line that names what is wrong and what to do."
    def refused(said, **more):
        with pytest.raises(UsageError) as error: start(load_recipe("demo", {**TINY, "data": str(work/"fable.txt"), **more}), tmp_path, work/"data")
        assert re.search(said, str(error.value)) and "\n" not in str(error.value), error.value
    refused("length 112 is more than the model's n_positions 24; set length to at most 24", init_from=str(work/"gpt2"), length=112)
    refused("no layer 'q_proj' in the blocks", init_from=str(work/"llama"), lora={"rank": 4, "alpha": 8, "targets": ["q_proj"]})
    refused("rank 64 is more than 32", init_from=str(work/"gpt2"), lora={"rank": 64, "alpha": 8})
    refused("init_from .* is no directory; name a run", init_from=str(tmp_path/"none"))
    (tmp_path/"m.gguf").write_bytes(b"GGUF")
    refused("textgen export .* DIRECTORY", init_from=str(tmp_path/"m.gguf"))
    (tmp_path/"begun").mkdir()
    refused("has no config.json; name a run that has ended", init_from=str(tmp_path/"begun"))
    shutil.copy(work/"gpt2/config.json", tmp_path/"begun")
    refused("has no tokenizer.json; copy it", init_from=str(tmp_path/"begun"))
    short = Path(shutil.copytree(work/"gpt2", tmp_path/"short"))
    BPETokenizer.train([FABLE * 2, "more " * 99, "and other words, many of them"], 320).save(short)
    refused(r"knows \d+ tokens, and its tokenizer makes \d+", init_from=str(short))
    other = Path(shutil.copytree(work/"gpt2", tmp_path/"other"))
    (other/"config.json").write_text('{"model_type": "opt"}')
    refused("model_type is 'opt', and the decoder here has only", init_from=str(other))


def test_note_of_a_shorter_length(work, tmp_path):
    "Places behind the length are not trained where all begins at random; a model that is there has them."
    fresh = {**TINY, "data": str(work/"fable.txt"), "tokenizer": "char"}
    assert any("places behind 16 tokens" in note for note in notes(start(load_recipe("demo", fresh), tmp_path, work/"data")))
    assert not list(notes(start(recipe(work, "gpt2"), tmp_path, work/"data")))


# As it is typed, and a real model

@needs_known
def test_typed(tmp_path, monkeypatch, capsys):
    "`textgen train demo --set init_from=DIR --data my.txt` needs nothing else."
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(FABLE * 100)
    words = ["train", "demo", "--set", f"init_from={KNOWN}/stories260K-hf", "--data", "my.txt", "--out", "run", "--set", "steps=3"]
    assert main(words) == 0, capsys.readouterr().err
    assert "val " in capsys.readouterr().out
    assert textgen.load("run").tokenizer.encode("the fox") == textgen.load(f"{KNOWN}/stories260K-hf").tokenizer.encode("the fox")
    assert main([*words, "--resume"]) == 2 and "has ended" in capsys.readouterr().err


@needs_known
def test_stories_learn_shakespeare(tmp_path):
    "A real Llama with LoRA: plays become likelier within some steps, and the base's own matrices are untouched."
    config = load_recipe("demo", {
        **TINY, **LORA, "init_from": f"{KNOWN}/stories260K-hf", "data": f"{KNOWN}/tinyshakespeare/input.txt", "length": 64, "batch_size": 16,
        "steps": 30, "evaluate_every": 30, "evaluate_tokens": 4000, "checkpoint_every": 30, "optimizer.learning_rate": 0.01})
    run = start(config, tmp_path/"run", tmp_path/"data")
    before = judge(run).nats_per_char
    fit(run)
    after = judge(run).nats_per_char
    assert after < 0.8 * before, (before, after)
    base = textgen.load(f"{KNOWN}/stories260K-hf").decoder.state_dict()
    kept = {name.replace(".base.", "."): weight for name, weight in run.model.state_dict().items() if name.rpartition(".")[2] not in "AB"}
    assert kept.keys() == base.keys() and all(weight.equal(base[name]) for name, weight in kept.items())
