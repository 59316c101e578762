"""Evaluate stories260K on WikiText-2 under every protocol, and race the protocol `word` against lm-eval: python .ci/evaluation.py

Writes nbs/results/evaluate.json, which chapter 09 shows. Needs stories260K-hf and WikiText-2 in the folder that TEXTGEN_DATA names, and
some minutes of one quiet core. Both programs read the same pages in turns, in one process with one thread; lm-eval's model `hf` with its own
batch size of 1, and with 16. What is reported is the median of the rounds' ratios. The sums of surprises must agree.
"""
import json, logging, os, statistics, sys, time, warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"], os.environ["TQDM_DISABLE"] = "1", "1"

import torch

import textgen
from textgen.evaluate import PROTOCOLS, detokenized, evaluate, held_out, pages
from textgen.evaluation import Report, evaluate_all, rows_of
from textgen.figures import machine

ROUNDS, BATCHES = 3, (1, 16)
RESULTS = Path(__file__).resolve().parent.parent/"nbs/results/evaluate.json"


def race(path, texts):
    "Seconds of both in turns, their median ratios, and how far apart their sums are."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
    model, plain = textgen.load(path, device="cpu"), pages("".join(text or " \n" for text in texts))
    theirs = {f"lm-eval hf, batch {B}": HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=B, add_bos_token=False) for B in BATCHES}
    asked = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(detokenized(page),), idx=0) for page in plain]
    ways = {"textgen": lambda: float(evaluate(model, plain, "word").nats.sum())}
    ways |= {name: lambda lm=lm: -sum(lm.loglikelihood_rolling(asked, disable_tqdm=True)) for name, lm in theirs.items()}
    entries, sums = {name: {"rounds s": []} for name in ways}, {}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, way in ways.items():
            start = time.perf_counter()
            sums[name] = way()
            if turn: entries[name]["rounds s"].append(time.perf_counter() - start)
            print(f"{turn} of {ROUNDS}: {name}, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    ours = entries["textgen"]["rounds s"]
    for name, entry in entries.items():
        entry["time s"] = statistics.median(entry["rounds s"])
        if name != "textgen":
            entry["textgen ×"] = statistics.median(b/a for a, b in zip(ours, entry["rounds s"]))
            entry["sums apart by"] = abs(sums[name]/sums["textgen"] - 1)
            assert entry["sums apart by"] < 1e-6, entry
    return entries


def main():
    if not (data := os.environ.get("TEXTGEN_DATA")): sys.exit("TEXTGEN_DATA must name a folder with stories260K-hf and wikitext-2-raw")
    torch.set_num_threads(1)
    path, texts = Path(data, "stories260K-hf"), held_out("wikitext-2")
    report = Report("wikitext-2", [one for one in PROTOCOLS.values() if not one.pseudo])
    evaluate_all([str(path)], texts, report, True, device="cpu")
    rows = [row | {"model": path.name} for row in rows_of(report)]
    found = {"data": report.data, "machine": machine(1, "make evaluation"),
             "evaluations": rows, "figures": {"word": race(path, texts)}}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["figures"], indent=1))


if __name__ == "__main__": main()
