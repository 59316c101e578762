"Every shape of decoder against transformers, against slow references, and through caches; configs that cannot work."
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from textgen.attention import written_out
from textgen.core import UsageError, parse
from textgen.decoder import Decoder, DecoderConfig
from textgen.llama import attention_maps
from textgen.rotary import frequencies, read_scaling, rotate, rotation_tables
from textgen.recipe import decoder_config, load_recipe

LLAMA = dict(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False)
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn by its own": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5,
                        "truncate": False, "attention_factor": 0.7},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5},
}
SHAPES = {  # of Llama
    "plain": dict(vocab_size=65, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "grouped": dict(vocab_size=65, n_positions=64, n_embd=48, n_layer=3, n_head=6, n_kv_head=2, n_inner=70),
    "one head of keys, not tied": dict(vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=8, n_kv_head=1, tie_word_embeddings=False),
    "wide heads": dict(vocab_size=65, n_positions=64, n_embd=16, n_layer=2, n_head=2, head_size=20, rope_theta=500.0, layer_norm_epsilon=1e-3),
}


def noisy(model):
    "Parameters far from their start, so that nothing is near zero by chance."
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def as_llama(config, **more):
    "transformers' model of the same shape, and how its parameters are made from ours."
    c, (G, D) = config, config.kv_shape
    theirs = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner or 4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=G, head_dim=D, max_position_embeddings=c.n_positions,
        rms_norm_eps=c.layer_norm_epsilon, tie_word_embeddings=c.tie_word_embeddings, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_theta": c.rope_theta, **(c.rope_scaling or {"rope_type": "default"})}, **more)
    return LlamaForCausalLM(theirs).eval()


def llama_state(decoder):
    "Our parameters under transformers' names."
    c, (G, D), ours = decoder.config, decoder.config.kv_shape, decoder.state_dict()
    state = {"model.embed_tokens.weight": ours["transformer.wte.weight"], "model.norm.weight": ours["transformer.ln_f.weight"],
             "lm_head.weight": ours.get("lm_head.weight", ours["transformer.wte.weight"])}
    for i in range(c.n_layer):
        a, b = f"transformer.h.{i}.", f"model.layers.{i}."
        q, k, v = ours[a + "attn.c_attn.weight"].split([c.n_head * D, G * D, G * D])
        gate, up = ours[a + "mlp.c_fc.weight"].chunk(2)
        state |= {b + "self_attn.q_proj.weight": q, b + "self_attn.k_proj.weight": k, b + "self_attn.v_proj.weight": v,
                  b + "self_attn.o_proj.weight": ours[a + "attn.c_proj.weight"], b + "mlp.gate_proj.weight": gate,
                  b + "mlp.up_proj.weight": up, b + "mlp.down_proj.weight": ours[a + "mlp.c_proj.weight"],
                  b + "input_layernorm.weight": ours[a + "ln_1.weight"], b + "post_attention_layernorm.weight": ours[a + "ln_2.weight"]}
    return state


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_llama(shape, scaling):
    torch.manual_seed(0)
    ours = noisy(Decoder(DecoderConfig(**SHAPES[shape], **LLAMA, rope_scaling=SCALINGS[scaling])))
    theirs = as_llama(ours.config, attn_implementation="eager")
    theirs.load_state_dict(llama_state(ours))
    ids = torch.randint(ours.config.vocab_size, (3, 64))
    with torch.no_grad(): expected = theirs(ids, output_attentions=True)
    torch.testing.assert_close(ours(ids), expected.logits, atol=1e-4, rtol=1e-5)
    for a, b in zip(attention_maps(ours, ids), expected.attentions, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("gelu", [("gelu", "gelu_new"), ("gelu_erf", "gelu")], ids=str)
@pytest.mark.parametrize("shape", [dict(n_embd=32, n_layer=2, n_head=4), dict(n_embd=48, n_layer=3, n_head=6, n_inner=70), dict(n_embd=8, n_layer=1, n_head=1)])
def test_logits_are_those_of_gpt2(shape, gelu):
    torch.manual_seed(0)
    ours = noisy(Decoder(DecoderConfig(vocab_size=65, n_positions=40, **shape, mlp=gelu[0])))
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=40, **shape, activation_function=gelu[1], bos_token_id=None, eos_token_id=None, attn_implementation="eager")).eval()
    state = {name: t.T if ".h." in name and t.dim() == 2 else t for name, t in ours.state_dict().items()}
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    ids = torch.randint(65, (3, 40))
    with torch.no_grad(): expected = theirs(ids, output_attentions=True)
    torch.testing.assert_close(ours(ids), expected.logits, atol=2e-5, rtol=1e-5)
    for a, b in zip(attention_maps(ours, ids), expected.attentions, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [16, 64, 200])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "none"])
@pytest.mark.parametrize("head_size, theta", [(8, 10000.0), (64, 500000.0), (10, 100.0), (2, 10.0)])
def test_frequencies_are_those_of_transformers(head_size, theta, scaling, length):
    if scaling == "dynamic" and head_size == 2: pytest.skip("transformers divides by zero there")
    settings = SCALINGS[scaling]
    config = LlamaConfig(hidden_size=head_size, num_attention_heads=1, head_dim=head_size, max_position_embeddings=length,
                         rope_parameters={"rope_theta": theta, **settings})
    expected, gain = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=length)
    ours = read_scaling(settings, length)
    torch.testing.assert_close(ours.scale(frequencies(head_size, theta), theta, length), expected, atol=0, rtol=2e-6)
    assert math.isclose(ours.gain(length), gain)
    cos, sin = rotation_tables(head_size, length, theta, ours)
    angles = torch.arange(length)[:, None] * expected
    torch.testing.assert_close(cos, angles.cos() * gain, atol=1e-4, rtol=0)
    torch.testing.assert_close(sin, angles.sin() * gain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [64, 150, 1000])
def test_dynamic_beyond_the_length_of_training(length):
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **SCALINGS["dynamic"]})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
    ours = read_scaling({**SCALINGS["dynamic"], "original_max_position_embeddings": 64}, length)
    torch.testing.assert_close(ours.scale(frequencies(16), 1e4, length), expected, atol=0, rtol=2e-6)


def slow_frequency(i, D, theta, s, length):
    "Pair i alone, from the papers, with Python's own numbers: frequency and gain."
    w, kind, factor = theta ** (-2 * i / D), s["rope_type"], s["factor"]
    if kind == "linear": return w / factor, 1
    if kind == "dynamic": return (theta * (factor * 1 - (factor - 1)) ** (D / (D - 2))) ** (-2 * i / D), 1  # within the length of training
    original, wave = s["original_max_position_embeddings"], 2 * math.pi / w
    if kind == "llama3":
        if wave < original / s["high_freq_factor"]: return w, 1
        if wave > original / s["low_freq_factor"]: return w / factor, 1
        smooth = (original / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        return (1 - smooth) * w / factor + smooth * w, 1
    pair = lambda turns: D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = pair(s.get("beta_fast", 32)), pair(s.get("beta_slow", 1))
    if s.get("truncate", True): low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    slow = min(max((i - low) / (high - low if high != low else 0.001), 0), 1)
    gain = lambda m: 0.1 * m * math.log(factor) + 1
    own = gain(s["mscale"]) / gain(s["mscale_all_dim"]) if "mscale" in s else gain(1)
    return slow * w / factor + (1 - slow) * w, s.get("attention_factor", own)


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "none"])
def test_frequencies_are_those_of_the_papers(scaling):
    s, D, theta, length = SCALINGS[scaling], 32, 1000.0, 64
    ours = read_scaling(s, length)
    pairs = [slow_frequency(i, D, theta, s, length) for i in range(D // 2)]
    torch.testing.assert_close(ours.scale(frequencies(D, theta), theta, length), torch.tensor([w for w, _ in pairs]), atol=0, rtol=1e-5)
    assert all(math.isclose(ours.gain(length), gain) for _, gain in pairs)


def test_rotation_is_a_product_of_complex_numbers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    angles = torch.arange(7)[:, None] * frequencies(10).double()
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.exp(1j * angles)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], -1))


MIXES = [dict(), LLAMA, dict(n_kv_head=2), dict(position="rotary"), dict(norm="rmsnorm"), dict(mlp="swiglu", n_inner=50),
         dict(mlp="gelu_erf", bias=False),
         dict(tie_word_embeddings=False), dict(LLAMA, n_kv_head=1, head_size=10, rope_scaling=SCALINGS["yarn"], tie_word_embeddings=False),
         dict(position="rotary", norm="rmsnorm", n_kv_head=2, rope_scaling={"type": "linear", "factor": 2})]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_caches_change_nothing(mix):
    "In step and row by row, in pieces of any size, the logits are those of the whole text."
    torch.manual_seed(0)
    model = noisy(Decoder(DecoderConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, **mix))).requires_grad_(False)
    ids = torch.randint(40, (3, 24))
    whole = model(ids)
    caches = model.caches(3)
    G, D = model.config.kv_shape
    assert all(cache.k.shape == (3, G, 24, D) for cache in caches)
    cuts = [0, 5, 6, 7, 15, 24]
    parts = [model(ids[:, a:b], caches, upto=b) for a, b in zip(cuts, cuts[1:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    lengths, caches = torch.tensor([[9], [1], [4]]), model.caches(3)
    model(ids[:, :9], caches, upto=9)  # the rubbish behind short rows is overwritten
    for step in range(12):
        at = lengths + step
        logits = model(ids.gather(1, at), caches, at, int(at.max()) + 1)
        torch.testing.assert_close(logits[:, 0], whole[torch.arange(3), at[:, 0]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_any_mix_trains(mix):
    "A good start, a gradient for every parameter, and a loss that falls."
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, **mix))
    ids = torch.randint(40, (4, 25))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    assert abs(model.loss(ids[:, :-1], ids[:, 1:]).item() - math.log(40)) < 0.1
    for _ in range(30):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_the_loss_comes_out_of_forward_in_float32(mix):
    "Of the targets that count, also where the logits are bfloat16, and through a wrapper that knows only forward."
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, **mix))
    ids, targets = torch.randint(40, (4, 24)), torch.randint(40, (4, 24))
    targets[1, 3:] = targets[2] = -100
    surprise = lambda logits: -logits.float().log_softmax(-1)[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    torch.testing.assert_close(model.loss(ids, targets), surprise(model(ids)))
    assert torch.equal(model.loss(ids, targets), torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))
    assert torch.equal(model.loss(ids, targets), torch.nn.DataParallel(model)(ids, targets=targets))
    with torch.autocast("cpu", torch.bfloat16): assert model(ids).dtype == torch.bfloat16 and model.loss(ids, targets).dtype == torch.float32
    half = model.bfloat16()
    torch.testing.assert_close(half.loss(ids, targets), surprise(half(ids)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_training_in_bfloat16_on_a_cpu(mix, monkeypatch):
    "Attention is written out, under autocast as in a model of bfloat16, and the gradients are those of float32 but for rounding."
    torch.manual_seed(0)
    model, calls = Decoder(DecoderConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, **mix)), []
    counted = lambda *given: calls.append({t.dtype for t in given[:3]}) or written_out(*given)
    monkeypatch.setattr("textgen.attention.written_out", counted)
    ids = torch.randint(40, (4, 25))
    gradient = lambda: torch.cat([g.flatten().float() for g in torch.autograd.grad(model.loss(ids[:, :-1], ids[:, 1:]), list(model.parameters()))])
    exact = gradient()
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        assert (gradient() - exact).norm() < 0.02 * exact.norm()
        with torch.no_grad(): model(ids[:, :24])
    assert calls == 2 * [{torch.bfloat16}]
    model.bfloat16()
    assert (gradient() - exact).norm() < 0.03 * exact.norm()
    with torch.no_grad(): model(ids[:, :24]), model(ids[:, :24], model.caches(4))
    assert calls == 4 * [{torch.bfloat16}]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_parameters_are_what_the_config_asks_for(mix):
    c = DecoderConfig(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, **mix)
    names = [name for name, _ in Decoder(c).named_parameters()]
    assert any(name.endswith("bias") for name in names) == (c.bias or False)
    assert ("transformer.wpe.weight" in names) == (c.position == "learned")
    assert ("lm_head.weight" in names) == (not c.tie_word_embeddings)
    assert not {"transformer.cos", "transformer.sin"} & Decoder(c).state_dict().keys()  # computed, never stored
    with torch.device("meta"): model = Decoder(c)
    tables = [t for t in (model.transformer.cos, model.transformer.sin) if t is not None]
    assert len(tables) == 2 * (c.position == "rotary") and all(t.device.type == "cpu" for t in tables)  # and so survive loading


def test_the_tables_of_half_precision_are_those_of_float32_rounded():
    model = Decoder(DecoderConfig(vocab_size=9, position="rotary"))
    whole = model.transformer.cos.clone()
    assert torch.equal(model.bfloat16().transformer.cos, whole.bfloat16())


@pytest.mark.parametrize("values, told", [
    (dict(n_kv_head=3), "n_kv_head: 4 heads of queries cannot share 3 of keys equally; n_kv_head may be 1, 2, 4"),
    (dict(n_head=3, n_kv_head=2), "n_head: n_embd 128 cannot be cut into 3 equal heads"),
    (dict(position="rotary", head_size=5), "position: rotary positions turn pairs of channels, and a head has 5; make head_size even"),
    (dict(position="rotary", n_embd=12, n_head=4), "a head has 3"),
    (dict(position="alibi"), "position: input should be 'learned' or 'rotary'"),
    (dict(norm="batch"), "norm: input should be 'layernorm' or 'rmsnorm'"),
    (dict(mlp="relu"), "mlp: input should be 'gelu', 'gelu_erf' or 'swiglu'"),
    (dict(n_inner=0), "n_inner"), (dict(head_size=0), "head_size"), (dict(rope_theta=0), "rope_theta"), (dict(rope_theta=1e300), "rope_theta"),
    (dict(n_positions=2**40), "n_positions"),
    (dict(rope_scaling={"rope_type": "longrope", "factor": 2}), "rope_type 'longrope' is not known here; choose from default, dynamic, linear, llama3, yarn"),
    (dict(rope_scaling={"rope_type": ["yarn"]}), "is not known here"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_type 'linear': factor: field required"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor: input should be greater than or equal to 1"),
    (dict(rope_scaling={"rope_type": "linear", "factor": math.inf}), "factor"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}), "unknown key 'partial_rotary_factor'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 2}), "low_freq_factor: field required"),
    (dict(rope_scaling={"factor": 2}), "factor with no rope_type; name one of linear, dynamic, llama3, yarn"),
    (dict(rope_scaling="linear"), "rope_scaling"),
])
def test_configs_that_cannot_work(values, told):
    with pytest.raises(UsageError) as error: parse(DecoderConfig, {"vocab_size": 9, **values}, "my.yaml")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_recipes_can_ask_for_any_mix():
    changes = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "n_inner": 344, "head_size": 16,
               "tie_word_embeddings": False, "rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config = load_recipe("demo", {f"model.{name}": value for name, value in changes.items()})
    made = decoder_config(config, vocab_size=9)
    assert {name: getattr(made, name) for name in changes} == changes
    assert decoder_config(load_recipe("demo"), vocab_size=9) == DecoderConfig(vocab_size=9, n_positions=112)
    for name, value, told in [("norm", "batch", "norm: input should be"), ("n_kv_head", 3, "n_kv_head may be 1, 2, 4"), ("mpl", "gelu", "did you mean")]:
        with pytest.raises(UsageError, match=told): load_recipe("demo", {f"model.{name}": value})


@pytest.mark.parametrize("mix", [dict(), LLAMA])
def test_input_that_cannot_work(mix):
    model = Decoder(DecoderConfig(vocab_size=9, n_positions=8, n_embd=8, n_head=2, n_layer=1, **mix))
    one = torch.zeros(1, 1, dtype=torch.long)
    for told, args in [("token ids from 9 to 9", [one + 9]), ("text of 9 tokens", [one.expand(1, 9)]), ("text of 9 tokens", [one, model.caches(1, 20), None, 9]),
                       ("positions from 8 to 8", [one, model.caches(1), one + 8]), ("positions from -1 to -1", [one, model.caches(1), one - 1]),
                       ("shape (1, 0)", [one[:, :0]]), ("shape (1,)", [one[0]])]:
        with pytest.raises(UsageError) as error: model(*args)
        assert told in str(error.value) and "\n" not in str(error.value)
