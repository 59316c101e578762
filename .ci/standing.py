"""Train the LSTM and the decoder of Tiny Shakespeare for several lengths of time, and write nbs/results/standing.json (chapter 10d draws it).

    python .ci/standing.py [STEPS-OF-THE-LSTM ...]        100, 400 and 1000 unless said otherwise; half an hour of one core

Each point is a whole run of its recipe, whose rate falls to its end with its last step; the decoder gets about as long as the
LSTM before it. Time is that of one core, spent in steps. Both are judged on the whole held-out part, in windows of as many tokens
as the decoder reads; the LSTM also as it is used, with its state carried on from the first token to the last.
"""
import json, os, sys, time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from textgen.figures import machine
from textgen.fitting import fit
from textgen.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/results/standing.json"
STREAMS = 8  # parts of the held-out text that are read side by side


def trained(recipe, steps):
    "A run to its end, and the core seconds of its steps."
    config = load_recipe(recipe, {"steps": steps, "evaluate_every": steps, "device": "cpu"})
    if config.generator == "rnn": from textgen.rnn_trainer import start
    else: from textgen.trainer import start
    run, spent = start(config, ROOT / "runs", ROOT / "data"), []

    def timed():
        began = time.process_time()
        loss = type(run).learn(run)
        spent.append(time.process_time() - began)
        return loss

    run.learn = timed
    fit(run)
    return run, sum(spent[1:]) * len(spent) / len(spent[1:])  # the first one also compiles, which does not grow with the run


def windows(run, length):
    "Nats per character in windows of so many tokens."
    if run.config.generator == "gpt":
        from textgen.train import evaluate
        return evaluate(run.model, run.prepared, length).nats_per_char
    from textgen.rnn_trainer import evaluate
    return evaluate(run.network, run.shape, run.prepared, length).nats_per_char


def point(recipe, steps):
    run, seconds = trained(recipe, steps)
    found = {"steps": steps, "parameters": run.parameters(run.writer()), "core time s": round(seconds, 1),
             "val nats/char": windows(run, load_recipe("shakespeare").length)}
    if run.config.generator == "rnn": found["val nats/char, state carried"] = windows(run, -(-len(run.prepared.split("validation")) // STREAMS))
    print(f"{recipe}, {steps} steps: {found['core time s']} s, {found['val nats/char']:.4f} nats/char", flush=True)
    return found


def main(lengths):
    import torch
    torch.set_num_threads(1)
    found, decoder_step = {"lstm-shakespeare": [], "shakespeare": []}, trained("shakespeare", 50)[1] / 50  # seconds
    for steps in lengths:
        found["lstm-shakespeare"].append(point("lstm-shakespeare", steps))
        other = point("shakespeare", round(found["lstm-shakespeare"][-1]["core time s"] / decoder_step))
        decoder_step = other["core time s"] / other["steps"]
        found["shakespeare"].append(other)
    RESULTS.write_text(json.dumps({"machine": machine(1, "make standing"), "points": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__": main([int(word) for word in sys.argv[1:]] or [100, 400, 1000])
