"""Measure the originality report, and two other ways to find the longest overlaps: python .ci/originality.py

Writes nbs/results/originality.json, in which README's and chapter 09b's figures must stand. Needs WikiText-2 in the folder that TEXTGEN_DATA
names, 2 GB of memory and some minutes of one core. A hundred samples of 1,000 characters are looked up in WikiText-2's training part (10 MB), and
in nine copies of it whose letters are exchanged (100 MB). Each way runs in a process of its own, in turns; what is reported is the median
of its seconds, from the file to all overlaps, of the peak memory of the whole process, and of how many times as long as the first it took.
All must find the same overlaps.
"""
import json, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

from textgen.originality import BORDER, TrainingText, originality

ROUNDS, COUNT, LENGTH, LEAST = 3, 100, 1000, 16
RESULTS = Path(__file__).resolve().parent.parent/"nbs/results/originality.json"


def lines(path):
    with open(path, encoding="utf-8", newline="\n") as file: yield from file


def ours(path, samples):
    "The suffix array of the training text."
    training, start = TrainingText(lines(path)), time.perf_counter()
    found = [one.overlap.length for one in originality(samples, training).samples]
    return found, {"looking up s": time.perf_counter() - start}


def common_prefixes(path, samples):
    "One suffix array of training text and samples, and how much neighbours in it have in common (Kasai et al. 2001)."
    from pydivsufsort import divsufsort, kasai
    encoded = [sample.encode() for sample in samples]
    text = b"".join(line.encode() + BORDER for line in lines(path))
    border, owner = len(text), np.repeat(np.arange(COUNT), [len(one) + 1 for one in encoded])
    text += b"\xfe".join([*encoded, b""])  # no byte of a character, either
    order = divsufsort(text)
    common, best = kasai(text, order), {}  # common[i]: of the suffixes in rows i and i+1
    rows = np.flatnonzero(order >= border)
    for steps, shift in ((rows.tolist(), -1), (rows[::-1].tolist(), 1)):  # down, with the nearest training suffix above; and up
        before, least = None, 0
        for row in steps:
            near = int(common[min(row, row + shift)]) if 0 <= row + shift < len(order) else 0
            least = min(least, near) if before == row + shift else near
            place, before = int(order[row]), row
            best[place] = max(best.get(place, 0), least)
    found = [0] * COUNT
    for place, length in best.items():
        number = int(owner[place - border])
        found[number] = max(found[number], characters(text[place : place + length]))
    return found, {}


def characters(piece):
    "How many whole characters a piece has that may begin or end inside one."
    return len(piece.decode("utf-8", "ignore"))


def mixed(words, at):
    "A hash of the LEAST = 16 bytes at each place, from two overlapping views of eight."
    return words[at] * np.uint64(0x9E3779B97F4A7C15) ^ words[at + 8] * np.uint64(0xC2B2AE3D27D4EB4F)


def eights(data):
    "Eight bytes at each place as a number."
    return np.lib.stride_tricks.as_strided(np.frombuffer(data, np.uint64, 1), (len(data) - 7,), (1,))


def streamed(path, samples):
    "A table of all windows of 16 bytes of the samples; the training text passes by. Shorter overlaps are not found."
    encoded = [sample.encode() for sample in samples]
    text = b"\xfe".join([*encoded, b"\xfe" * 16])
    owner = np.repeat(np.arange(COUNT), [len(one) + 1 for one in encoded])
    keys = mixed(eights(text), np.arange(len(owner)))
    order = np.argsort(keys, kind="stable")
    keys, seen = keys[order], np.zeros(2**24, bool)
    seen[keys >> np.uint64(40)] = True
    mine, found = np.frombuffer(text, np.uint8), np.zeros(COUNT, int)
    with open(path, "rb") as file:
        while block := b"".join(file.readlines(2**22)):  # whole lines
            block = block.replace(b"\n", b"\n" + BORDER) + b"\xfd" * 16
            hashes, theirs = mixed(eights(block), np.arange(len(block) - 15)), np.frombuffer(block, np.uint8)
            places = np.flatnonzero(seen[hashes >> np.uint64(40)])
            first, last = (np.searchsorted(keys, hashes[places], side) for side in ("left", "right"))
            places = np.repeat(places, last - first)
            rows = np.concatenate([np.arange(a, b) for a, b in zip(first, last) if b > a] or [np.zeros(0, int)])
            starts, lengths = order[rows], np.zeros(len(rows), int)
            live = np.arange(len(rows))
            while len(live):  # a byte more, of those that still agree
                live = live[mine[starts[live] + lengths[live]] == theirs[places[live] + lengths[live]]]
                lengths[live] += 1
            for start, length in zip(starts.tolist(), lengths.tolist()):
                if length > found[owner[start]]: found[owner[start]] = max(found[owner[start]], characters(text[start : start + length]))
    return found.tolist(), {}


WAYS = {"suffix array of the training text": ours, "suffix array of text and samples": common_prefixes, "training text streamed past the samples": streamed}


def cuts(text, count, seed):
    chance = random.Random(seed)
    return [text[i : i + LENGTH] for i in (chance.randrange(len(text) - LENGTH) for _ in range(count))]


def run(way, path, samples):
    "What a process of its own does: one way, timed."
    samples = json.loads(Path(samples).read_text(encoding="utf-8"))
    start = time.perf_counter()
    found, parts = WAYS[way](path, samples)
    took = time.perf_counter() - start
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({"s": took, "peak MB": peak * 1024 / 1e6, **parts, "lengths": found}))


def measured(file, samples):
    "Every way in turns, after one turn to warm up the disk."
    rounds = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, way, file, samples], stdout=subprocess.PIPE, text=True, check=True)
            rounds[way].append(json.loads(done.stdout))
            print(file.name, way, {key: round(value, 2) for key, value in rounds[way][-1].items() if key != "lengths"}, flush=True)
    first = rounds["suffix array of the training text"]
    wanted = first[0]["lengths"]
    for way, turns in rounds.items():
        for turn in turns:
            assert all(a == b or way.startswith("training") and max(a, b) < LEAST for a, b in zip(turn["lengths"], wanted)), way
    for turns in rounds.values():
        for turn, beside in zip(turns, first): turn["of the first ×"] = turn["s"] / beside["s"]
    return {way: {key: statistics.median(turn[key] for turn in turns) for key in turns[0] if key != "lengths"} for way, turns in rounds.items()}


def main():
    from textgen.figures import machine
    source = Path(os.environ["TEXTGEN_DATA"], "wikitext-2-raw")
    train, test = ((source/f"wiki.{name}.raw").read_text(encoding="utf-8") for name in ("train", "test"))
    letters, found = "abcdefghijklmnopqrstuvwxyz", {}
    held = cuts(test, COUNT, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder, "samples.json")
        samples.write_text(json.dumps(held[: COUNT * 9 // 10] + cuts(train, COUNT // 10, seed=1)), encoding="utf-8")
        for name, copies in (("10 MB", 1), ("100 MB", 9)):
            file = Path(folder, name.replace(" ", "-"))
            with open(file, "w", encoding="utf-8", newline="\n") as out:
                for k in range(copies): out.write(train.translate(str.maketrans(letters, letters[k:] + letters[:k])))
            found[name] = {"text MB": file.stat().st_size / 1e6, "ways": measured(file, samples)}
    found["held-out"] = originality(held, [line + "\n" for line in train.split("\n")]).figures()
    found["samples"], found["characters of each"], found["machine"] = COUNT, LENGTH, machine(1, "make originality")
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__": run(*sys.argv[1:]) if sys.argv[1:] else main()
