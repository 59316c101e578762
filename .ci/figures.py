"""Copy what runs measured into nbs/results, where README and docs take their figures from.

    python .ci/figures.py runs/demo runs/shakespeare ...

Every key ends in its unit (tests/test_repo.py holds README against these files). `make figures` trains and then calls this.
"""
import json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def figures(result):
    "The measured values of a run's result.json, under names that end in their unit."
    loss, floor = result["nats_per_char"], result["floor"]
    found = {"recipe": result["recipe"], "seed": result["seed"], "machine": result["machine"],
             "val nats/char": loss, "val nats/token": result["nats_per_token"], "steps": result["steps"],
             "parameters": result["parameters"], "training time s": result["training_seconds"],
             "training speed tokens/s": result["tokens_per_second"]}
    # a run on a machine that doesn't tell them has none
    if result.get("mfu_percent") is not None: found["mfu %"] = result["mfu_percent"]
    if result.get("peak_memory_bytes") is not None: found["peak memory MB"] = result["peak_memory_bytes"] / 1e6
    if floor is not None: found |= {"floor nats/char": floor, "excess nats/char": loss - floor, "excess over the floor %": 100 * (loss / floor - 1)}
    if "grammatical" in result: found["grammatical stories %"] = 100 * result["grammatical"]
    return found


for folder in map(Path, sys.argv[1:]):
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    path = ROOT / "nbs" / "results" / f"{result['recipe']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures(result), indent=2) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))
