"""`textgen benchmark train`: the peer is what it is said to be, only steps take time, and no fault loses the others' figures.

No test says how fast anything is: the machine that runs them has other things to do.
"""
import json, math, re, signal
from dataclasses import replace

import pytest
import torch

from textgen import baseline, training
from textgen.baseline import Peer, PeerSettings, as_decoder, as_recipe, peer_batch, peer_gradient, peer_step, start_peer
from textgen.cli import main
from textgen.training import (AT_MOST, PARTS, PLAY, ROWS, TARGETS, WIKI, Effort, compare_rows, find_targets, measure_rows,
                              points_of, quick_effort, recipe_of, recorder, settings_of, summary, text_of, train_peer, train_recipe)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def effort(tmp_path_factory): return replace(quick_effort(), root=str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def text(effort): return text_of("peer", effort)


# The peer

def test_the_peer_has_the_parameters_that_nanogpt_counts():
    "Four blocks of 12 C^2, nine norms of C, 65 characters; nanoGPT leaves positions out, and says 0.80M."
    peer, C = Peer(PeerSettings(), 65), 128
    counted = {name: weight.numel() for name, weight in peer.named_parameters()}
    assert sum(counted.values()) - counted["transformer.wpe.weight"] == 4 * 12 * C * C + 9 * C + 65 * C == 795_904
    assert counted["transformer.wpe.weight"] == 64 * C and not [name for name in counted if "bias" in name]


def test_the_peer_begins_as_gpt2_does():
    torch.manual_seed(0)
    for name, weight in Peer(PeerSettings(), 65).named_parameters():
        std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
        if weight.dim() == 2: assert weight.std().item() == pytest.approx(std, rel=0.05), name
        else: assert (weight == 1).all()


def test_the_peer_computes_what_a_decoder_of_ours_does():
    torch.manual_seed(0)
    settings = PeerSettings(n_layer=2, n_embd=32, length=16)
    peer = Peer(settings, 11)
    with torch.no_grad():
        for weight in peer.parameters(): weight.add_(0.3 * torch.randn_like(weight))   # far from where all of it is nearly zero
        ids, targets = torch.randint(11, (2, 3, 16))
        decoder = as_decoder(peer, settings)
        torch.testing.assert_close(decoder(ids), peer(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoder(ids, targets=targets), peer(ids, targets), atol=1e-4, rtol=1e-4)


def test_the_first_step_is_adamw_by_hand(text):
    "By the sign of the gradient, a 101st of the peak rate, and by what the decay takes off matrices alone."
    run = start_peer(text, PeerSettings(n_layer=1, n_embd=32, length=16))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    state = torch.get_rng_state()
    peer_gradient(run)
    gradient = {name: weight.grad.clone() for name, weight in run.model.named_parameters()}
    run.optimizer.zero_grad()
    torch.set_rng_state(state)   # the same windows again
    peer_step(run)
    rate = 1e-3 / 101
    for name, weight in run.model.named_parameters():
        g, old = gradient[name], before[name]
        wanted = old * (1 - rate * 0.1 * (old.dim() >= 2)) - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(weight.detach(), wanted, atol=2e-7, rtol=0)   # what the decay takes off a norm is 1e-6


def test_rates_of_the_peer(text):
    "Up for a hundred steps, and down to a tenth by the last."
    run = start_peer(text, PeerSettings(n_layer=1, n_embd=8, n_head=2, length=4, batch_size=1))
    for step, rate in [(0, 1e-3 / 101), (99, 1e-3 * 100 / 101), (100, 1e-3), (1050, 5.5e-4), (2000, 1e-4)]:
        run.step = step
        peer_step(run)
        assert run.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[1]["lr"] == pytest.approx(rate), step


def test_a_long_gradient_is_clipped_and_a_short_one_is_not(text):
    run = start_peer(text, PeerSettings(n_layer=1, n_embd=32, length=16))
    length = lambda: torch.stack([weight.grad.norm() for weight in run.model.parameters()]).norm().item()
    with torch.no_grad(): run.model.transformer.wte.weight.mul_(50)
    peer_gradient(run)
    assert length() == pytest.approx(1.0, abs=1e-4)
    run.optimizer.zero_grad()
    run.settings = replace(run.settings, clip=1e9)
    peer_gradient(run)
    assert length() > 1.1


def test_losses_fall_and_windows_begin_anywhere(text):
    run = start_peer(text, PeerSettings(n_layer=1, n_embd=32, length=16, steps=30, warmup=2))
    losses = [peer_step(run) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1 and run.step == 30
    found = [peer_batch(run) for _ in range(20)]
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in found)
    data = text.split("train").tokens
    rows = {tuple(row) for x, _ in found for row in x.tolist()}
    assert len(rows) > 200 and all(any((data[i:i + 16] == row).all() for i in range(len(data) - 16) if data[i] == row[0]) for row in [*rows][:3])


def test_our_trainer_gets_the_peers_settings(effort):
    config = recipe_of("shakespeare", effort, as_recipe(PeerSettings()))
    o = config.optimizer
    assert (config.length, config.batch_size, config.steps, config.accumulate, config.ema) == (64, 12, 2000, 1, 0)
    assert (o.name, o.learning_rate, o.betas, o.weight_decay, o.clip, o.warmup, o.schedule, o.floor) == \
        ("adamw", 1e-3, (0.9, 0.99), 0.1, 1.0, 100, "cosine", 0.1)


# What is counted

class Clock:
    "Stands for time.perf_counter: a second passes at each look."
    def __init__(self): self.now = 0.0
    def __call__(self): self.now += 1.0; return self.now


def test_time_is_that_of_steps_alone(effort, text, monkeypatch):
    "An evaluation of a hundred seconds changes nothing, for the peer and for a recipe."
    from textgen import train, trainer
    clock, evaluate, judged = Clock(), train.evaluate, []
    monkeypatch.setattr(baseline.time, "perf_counter", clock)

    def slow(*given, **more):
        clock.now += 100
        judged.append(1)
        return evaluate(*given, **more)

    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(trainer, "evaluate", slow)
    for act, part in [(train_peer, "peer"), (train_recipe, "shakespeare")]:
        record = {}
        act(part, effort, 1, 5, record)
        assert judged and record["time s"] == record["curve s"][-1] == 5 and record["step ms"] == 1000
        judged.clear()


def test_when_to_look():
    assert points_of(1600, 5) == [100, 200, 400, 800, 1600] and points_of(1, 9) == [1] and points_of(7, 1)[-1] == 7
    seen, record = [], {}
    watch = recorder(record, 3, Effort(points=9, sample=50), lambda tokens: seen.append(tokens) or {"val nats/token": 2.5})
    for step in (1, 2, 3): watch(type("Run", (), {"step": step, "seconds": step / 2}), None, None)
    assert record == {"curve s": [0.5, 1, 1.5], "curve nats/token": [2.5] * 3, "val nats/token": 2.5, "time s": 1.5, "step ms": 500}
    assert seen == [50, 50, None]   # the last takes the whole text


def test_bits_per_byte_of_a_uniform_guess(effort, text):
    from textgen.rows import Score
    part = text.split("validation")
    count = len(part) - (text.eos_id is None)
    found = training.loss_figures(Score(math.log(256), math.log(256), count), text)
    assert found["val bits/byte"] == pytest.approx(8 * len(part) / part.bytes, rel=1e-3)


def test_medians_and_times_against_the_peers():
    runs = lambda *pairs: {"runs": [{"val nats/token": loss, "val nats/char": loss, "val bits/byte": loss, "time s": s, "step ms": 1.0}
                                    for loss, s in pairs] + [{"seed": 9}]}
    results = {"figures": {PLAY: {"shakespeare, T/6": {"peer ×": 6.0, **runs((1.8, 9), (1.95, 10), (1.85, 12))}},
                           WIKI: {"peer": runs((4, 1)), "wikitext2": runs((6, 100)), "wikitext2-llama": runs((5, 110))}}}
    compare_rows(results)
    compare_rows(results)   # again: nothing is counted twice
    one = results["figures"][PLAY]["shakespeare, T/6"]
    assert (one["val nats/char"], one["time s"], one["peer ×"]) == (1.85, 10, 6) and one["seeds differ by nats/token"] == pytest.approx(0.15)
    assert results["figures"][WIKI]["any layout"] == {"val nats/token": 5, "val nats/char": 5, "val bits/byte": 5, "time s": 110}
    found = find_targets(results)
    assert found[f"{PLAY}: shakespeare, T/6, val nats/char"]["met"] and found[f"{PLAY}: shakespeare, T/6, peer ×"]["met"]
    assert not found[f"{WIKI}: wikitext2, val nats/token"]["met"] and found[f"{WIKI}: wikitext2, time s"]["met"]
    assert found[f"{PLAY}: shakespeare, T, val nats/char"]["why"] == "not measured"


def test_who_is_as_good_as_nanogpt():
    entry = lambda loss, seconds: {"val nats/char": loss, "time s": seconds}
    rows = {"peer": entry(1.9, 60), "shakespeare, T/6": entry(1.88, 10), "shakespeare, T/14": entry(1.898, 4), "shakespeare, T": {"lost": "no"}}
    results = {"machine": {"processor": "it", "threads": 1, "cores": 2, "versions": {"torch": "2"}}, "targets": {"one": {"met": True}}}
    lines = [*summary({**results, "figures": {PLAY: rows}})]
    assert lines[1:] == ["T       60.0 s: the peer's run", "1.898 nats/char or less: shakespeare, T/14 in 4.0 s; shakespeare, T/6 in 10.0 s", "targets 1 of 1 met, 0 missed, 0 not measured"]
    assert "nobody" in [*summary({**results, "figures": {PLAY: {"peer": entry(1.9, 60)}}})][2]


def test_every_target_names_what_is_measured():
    names = {(row.title, row.name) for row in ROWS} | {("speed", name) for name in training.SPEED} | {(WIKI, "any layout")}
    assert TARGETS.keys() <= names and {row.part for row in ROWS} < {*PARTS} and {row.name.partition(",")[0] for row in ROWS} <= training.STYLES.keys()
    wanted = {key for one in TARGETS.values() for key in one}
    assert wanted - AT_MOST == {"peer ×"} and AT_MOST < wanted
    for row in ROWS:   # its name says its share
        said = re.search(r", T(?:/(\d+))?$", row.name)
        assert row.share == (1 / int(said[1] or 1) if said else None)


# Faults

def test_a_recipe_that_is_not_there_loses_only_itself(effort, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ROWS", [training.Row(PLAY, "no-such", "no-such, T", 1), ROWS[0]])
    results = {}
    measure_rows(["no-such", "peer"], replace(effort, seeds=2), results, lambda text: None)
    entries = results["figures"][PLAY]
    assert "unknown recipe 'no-such'" in entries["no-such, T"]["lost"] and len(entries["peer"]["runs"]) == 1 and entries["peer"]["runs"][0]["time s"] > 0


def test_a_loss_that_is_no_number_loses_only_itself(effort, monkeypatch):
    broken = {**effort.changes, "optimizer.learning_rate": 1e30, "optimizer.clip": None, "optimizer.warmup": 0}
    results = {}
    measure_rows(["shakespeare"], replace(effort, changes=broken), results, lambda text: None)
    assert all("loss is" in entry["lost"] for entry in results["figures"][PLAY].values())
    assert "loss is" in find_targets(results)[f"{PLAY}: shakespeare, T, val nats/char"]["why"]


def test_missing_text_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXTGEN_DATA", "")
    training.run(["speed", "peer", "shakespeare"], Effort(root=str(tmp_path/"data")), tmp_path/"out", {})
    said = " ".join(capsys.readouterr().out.split())
    assert "shakespeare is not at hand" in said and "nothing was measured" in said and "? 1.898" in said and not (tmp_path/"out/train.json").exists()


def test_steps_are_a_share_of_the_peers_time(effort, monkeypatch):
    "By how many steps one of the peer's is worth, at most; where seconds are given, by the time of a step."
    from textgen.training import Row, steps_for
    monkeypatch.setattr(training, "step_of", lambda part, effort: (0.02, [1.2, 1.3, 1.5]))
    assert steps_for(Row(PLAY, "peer", "peer"), replace(effort, peer_steps=2000)) == {"steps": 2000, "planned s": 40}
    found = steps_for(Row(PLAY, "shakespeare", "shakespeare, T/6", 1 / 6), replace(effort, peer_steps=2000))
    assert found == {"steps": 433, "planned s": pytest.approx(8.66), "peer ×": pytest.approx(2600 / 433), "interval peer ×": pytest.approx([2400 / 433, 3000 / 433])} and found["peer ×"] >= 6
    assert steps_for(Row(PLAY, "shakespeare", "shakespeare, T", 1), replace(effort, peer_steps=10))["peer ×"] == 1
    assert steps_for(Row(WIKI, "wikitext2", "wikitext2"), replace(effort, seconds=100, fill=0.5)) == {"steps": 2500, "planned s": 50}


# The command

def leaves(tree, key=""):
    if isinstance(tree, dict):
        for name, value in tree.items(): yield from leaves(value, name)
    elif isinstance(tree, list):
        for value in tree: yield from leaves(value, key)
    elif isinstance(tree, float): yield key


def test_the_command(tmp_path, monkeypatch, capsys):
    "A quick run: a row for each that takes part, figures and a picture in files, keys that end in units, no targets."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXTGEN_DATA", "")   # it needs no known text
    assert main(["benchmark", "train", "--quick", "--output", "out"]) == 0
    out, error = capsys.readouterr()
    assert "speed: 2 rounds" in error and "run 1: " in error and "Traceback" not in error
    results = json.loads((tmp_path/"out/train.json").read_text(encoding="utf-8"))
    assert list(results["figures"]) == ["speed", PLAY, WIKI] and results["targets"] == {} and results["machine"]["threads"] == 1
    assert list(results["figures"]["speed"]) == ["peer", *training.SPEED]
    for name, entry in results["figures"]["speed"].items():
        assert len(entry["rounds ms"]) == 2 and (name == "peer") == ("peer ×" not in entry) and entry["parameters"] == results["figures"]["speed"]["peer"]["parameters"]
    rows = {**results["figures"][PLAY], **results["figures"][WIKI]}
    assert {row.name for row in ROWS} <= rows.keys() and all(name in out for name in rows)
    for name, entry in rows.items():
        if "lost" in entry: assert "unknown recipe" in entry["lost"]
        else: assert entry["time s"] > 0 and entry["val bits/byte"] > 0
    assert "T  " in out and "s: the peer's run" in out
    assert all(re.search(r" ?(tokens/s|nats/token|nats/char|bits/byte|ms|s|%|×|peak)$", key) for key in leaves(results)), sorted(set(leaves(results)))
    assert (tmp_path/"out/train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(number, tmp_path, monkeypatch, capsys):
    "In the middle of a run: what came before is saved with the way so far, the exit code is 130, and nobody else's ctrl-C is changed."
    from textgen import trainer
    step, before = trainer.next_step, signal.getsignal(signal.SIGTERM)

    def interrupted(run, batches):
        if run.step == 20 and run.config.steps == 40: signal.raise_signal(number)
        return step(run, batches)

    monkeypatch.setattr(trainer, "next_step", interrupted)
    monkeypatch.setattr(training, "steps_for", lambda row, effort: {"steps": 40, "planned s": 1.0})
    monkeypatch.setattr(training, "QUICK", {**training.QUICK, "data_options": {"train": 100, "validation": 5}})
    monkeypatch.chdir(tmp_path)
    assert main("benchmark train --quick --only peer,shakespeare --output out".split()) == 130
    out, error = capsys.readouterr()
    assert error.endswith("interrupted\n") and "peer" in out and signal.getsignal(signal.SIGTERM) is before
    entries = json.loads((tmp_path/"out/train.json").read_text(encoding="utf-8"))["figures"][PLAY]
    assert entries["peer"]["time s"] > 0 and entries["shakespeare, T/14"]["runs"][0]["curve s"] and "time s" not in entries["shakespeare, T/14"]


@pytest.mark.parametrize("words, code, said", [(["--only", "nothing"], 2, "--only: no 'nothing'"),
                                               (["--output", "file"], 1, "could not write to file")])
def test_refused_at_once(words, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").touch()
    assert main(["benchmark", "train", *words]) == code
    out, error = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", error) and said in error
