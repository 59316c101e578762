"""Copy what runs measured into nbs/results, where README and docs take their figures from.

    python .ci/figures.py runs/demo runs/shakespeare ...

Every key ends in its unit (tests/test_repo.py holds README against these files). `make figures` trains and then calls this.
"""
import json, sys
from pathlib import Path

from textgen.figures import machine
from textgen.runs import figures

ROOT = Path(__file__).resolve().parent.parent


for folder in map(Path, sys.argv[1:]):
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = {key: result[key] for key in ("recipe", "seed", "machine")}
    kept["machine"] |= machine(kept["machine"]["threads"], "make figures", run=kept["seed"])
    kept |= {key: value for key, value in figures(result).items() if value is not None}
    path = ROOT / "nbs" / "results" / f"{result['recipe']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))
