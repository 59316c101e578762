"""Train GPT-2, each swap towards Llama alone, and all of them, and write nbs/results/swaps.json (chapter 05a draws it).

    python .ci/swaps.py [SEED ...]        seeds 1 to 5 unless said otherwise; 40 seconds of one core for each model and seed

Data, steps and learning rates are those of the recipe `swaps` for all. So is the number of parameters, within two percent: what a
swap saves or costs goes into the width of the MLP. Speed is in tokens per second of one core's own time, so that other work on
the machine counts less. A run replaces the one of the same model and seed in the file.
"""
import json, sys, time
from pathlib import Path

import numpy as np
import torch

from textgen.data import Batches
from textgen.decoder import Decoder
from textgen.figures import machine
from textgen.recipe import decoder_config, load_recipe
from textgen.train import evaluate
from textgen.trainer import next_step, start

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/results/swaps.json"
GROUPED, ROTARY, NORM = {"n_kv_head": 1}, {"position": "rotary"}, {"norm": "rmsnorm"}
GATED, PLAIN = {"mlp": "swiglu"}, {"bias": False}
SWAPS = {"GPT-2": {}, "grouped heads": GROUPED, "rotary": ROTARY, "RMS norm": NORM, "SwiGLU": GATED, "no biases": PLAIN,
         "all: Llama": {**GROUPED, **ROTARY, **NORM, **GATED, **PLAIN}}
EVERY = 50  # steps of one point of the curve


def recipe(changes, seed=1): return load_recipe("swaps", {"seed": seed, **{f"model.{name}": value for name, value in changes.items()}})


def model_of(changes):
    with torch.device("meta"): return Decoder(decoder_config(recipe(changes), 1024))


def parameters(changes): return sum(p.numel() for p in model_of(changes).parameters())


def matched(changes):
    "The changes, with the width of the MLP (a multiple of 8) that brings the parameters nearest to GPT-2's."
    first, second = (parameters({**changes, "n_inner": width}) for width in (8, 16))
    return {**changes, "n_inner": 8 * round(1 + (parameters({}) - first) / (second - first))}


def train(changes, seed):
    "One run; what it measured, under names that end in their unit."
    run = start(recipe(changes, seed), ROOT / "runs", ROOT / "data")
    c, seconds, losses = run.config, 0.0, []
    batches = Batches(run.rows, c.batch_size, c.seed)
    for _ in range(c.steps):
        began = time.process_time()
        losses.append(next_step(run, batches).item())
        seconds += time.process_time() - began
    score = evaluate(run.model, run.prepared, c.length)
    curve = np.reshape(losses, (-1, EVERY)).mean(1).round(4).tolist()
    return {"seed": seed, "val nats/char": score.nats_per_char, "excess over the floor %": 100 * (score.nats_per_char / score.floor - 1),
            "error of the excess %": 100 * score.error / score.floor, "speed tokens/s": round(c.steps * c.batch_size * c.length / seconds),
            "training loss nats/token": curve}


def note(name, changes, run):
    "Put one run into the results file."
    c, cache = recipe({}), model_of(changes).caches(1, 1)
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"swaps": {}}
    old = result["swaps"].get(name, {"runs": []})["runs"]
    entry = {"model": changes, "parameters": parameters(changes), "cache of a token bytes": sum(2 * part.k.nbytes for part in cache),
             "runs": sorted([*(other for other in old if other["seed"] != run["seed"]), run], key=lambda run: run["seed"])}
    swaps = {**result["swaps"], name: entry}
    result = {"machine": machine(1, "make swaps"), "steps": c.steps, "steps of a point": EVERY, "tokens of a step": c.batch_size * c.length,
              "swaps": {name: swaps[name] for name in SWAPS if name in swaps}}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(seeds):
    torch.set_num_threads(1)
    for seed in seeds:
        for name, changes in SWAPS.items():
            changes = matched(changes)
            run = train(changes, seed)
            note(name, changes, run)
            print(f"{name}, seed {seed}: {run['excess over the floor %']:.2f}% above the floor", flush=True)


if __name__ == "__main__": main([int(word) for word in sys.argv[1:]] or [1, 2, 3, 4, 5])
