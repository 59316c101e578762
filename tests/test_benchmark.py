"""`textgen benchmark generate`: contestants that die, hang or lie lose nobody else's figures; what is printed, saved and drawn.

No test says how fast anything is: the machine that runs them has other things to do.
"""
import json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from textgen import benchmark, figures
from textgen.benchmark import AT_MOST, TARGETS, find_targets, read_batches, sweep, tables
from textgen.core import TextgenError, UsageError
from textgen.figures import check_same, files_for, machine, missing, read_names, revision
from textgen.peers import BYTES, CONTESTANTS, SHAPES, Contestant, Lost, Runner, open_textgen, random_model
from textgen.rounds import (Memory, Plan, compare, difference, interval, measure, note, peer_of, product_speed, prompt_operations, ratios, take_turn,
                             weights_read)
from textgen.workloads import WORKLOADS, measure_workloads

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())"]  # what the script `textgen` does


# Contestants that misbehave; their processes import them from here, and PyTorch only if they use it: it must not be imported above

def dying(folder, weights): return lambda prompts, count, sampled: os.kill(os.getpid(), signal.SIGKILL)
def hanging(folder, weights): return lambda prompts, count, sampled: time.sleep(600)
def noisy(folder, weights): return lambda prompts, count, sampled: [print("x" * 10**6) or os.write(2, b"y" * 10**6) and [1] * count for _ in prompts]
def stopping(folder, weights): return lambda prompts, count, sampled: [[1] * count, [1] * (count - 1)]
def plain(folder, weights): return lambda prompts, count, sampled: [[1] * count for _ in prompts]
def making(folder, weights): Path(folder, "made").write_text(str(os.getpid()))
def refusing(folder, weights): raise ValueError("not\nthis one")
def absent(folder, weights): import no_such_library


def lying(folder, weights):
    "Writes one token wrongly, where it is no tie."
    run = open_textgen(folder, weights, compile=False)
    return lambda prompts, count, sampled, told=None: [[(row[0] + 1) % 65, *row[1:]] for row in run(prompts, count, sampled)]


EAGER = next(one for one in CONTESTANTS if one.name == "textgen eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    random_model("tiny").save(path)
    return path


@pytest.mark.parametrize("open, limit, said", [(dying, 60, "died of SIGKILL"), (hanging, 0.5, "no answer within 0.5 s")])
def test_a_lost_contestant_says_why(open, limit, said, folder):
    "Whoever dies or hangs while it is asked raises Lost, and its process is gone."
    runner = Runner(Contestant("it", open), folder)
    runner.limit = limit   # opening may take longer
    with pytest.raises(Lost, match=said): runner.ask([[1]], 2)
    assert not runner.process.is_alive()


@pytest.mark.parametrize("open, said", [(refusing, "ValueError: not this one"), (absent, r"not installed \(no_such_library\).*textgen\[peers\]")])
def test_who_cannot_be_opened_says_why(open, said, folder):
    with pytest.raises(Lost, match=said): Runner(Contestant("it", open), folder)


def test_who_stops_early_is_not_the_faster_one(folder):
    runner = Runner(Contestant("it", stopping), folder)
    with pytest.raises(Lost, match="did not write 3 tokens for each of 2 texts"): runner.ask([[1], [2]], 3)
    assert not runner.process.is_alive()


def test_without_a_compiler_nobody_writes_in_its_place(folder, monkeypatch):
    "The compiled contestants are lost with the reason; eager PyTorch is not measured under their name."
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TEXTGEN_CACHE", str(folder/"cache"))
    with pytest.raises(Lost, match="no C compiler was found"): Runner(next(one for one in CONTESTANTS if one.name == "textgen int8"), folder)
    runner = Runner(EAGER, folder)
    runner.close(patience=30)


def test_a_contestant_says_nothing_on_the_terminal(folder, capfd):
    runner = Runner(Contestant("it", noisy), folder)
    assert runner.ask([[1], [2]], 3)[1] == [[1] * 3] * 2
    runner.close(patience=30)
    assert runner.process.exitcode == 0 and capfd.readouterr() == ("", "")


def test_one_lost_contestant_loses_nobody_else(folder):
    "The good one has every round; each lost one has its reason; a liar is found out, and says where."
    plan = Plan(["tiny"], [2], rounds=2, count=4, limit=120,
                contestants=[Contestant("dies", dying), Contestant("absent", absent), EAGER, Contestant("lies", lying)])
    results, told = {}, []
    measure(plan, results, told.append)
    compare(plan, results)
    entries = results["figures"]["tiny, batch 2"]
    assert list(entries) == ["dies", "absent", "textgen eager", "lies"]
    assert "SIGKILL" in entries["dies"]["lost"] and "not installed" in entries["absent"]["lost"]
    assert len(entries["textgen eager"]["rounds tokens/s"]) == len(entries["textgen eager"]["sampled rounds tokens/s"]) == 2
    results["figures"].pop("tiny, prompt of 128")
    found = entries["lies"]["differs"]
    assert (found["texts"], found["of"], found["token"]) == (2, 2, 0) and found["gap"] > found["margin"] == 1e-3
    assert "differs" not in entries["textgen eager"] and told.count("textgen eager") == 6
    with pytest.raises(TextgenError, match="lies writes other tokens in float32"): check_same(results)
    found["margin"] = found["gap"] + 1   # told apart by rounding, say
    check_same(results)
    assert "lies: other tokens in 2 of 2 texts" in next(tables(results)).caption
    assert "lost" not in entries["lies"]


def test_a_turn_is_as_many_texts_as_fill_its_time():
    """0.1, 0.2 and 0.3 s for two texts of 4 tokens each; what takes longer than a turn is written once. One token takes 0.08 s,
    and half a second; then the pauses of a text that is read along. Without reading, three tokens take 0.12 and 1.5 s."""
    class Clock:
        contestant, memory, times = Contestant("theirs", None), 5 * 10**6, None
        def ask(self, prompts, count, sampled, watched=False):
            if watched: self.times = [0.05, 0.06, 0.08, 0.11]
            return 9.0 if watched else next(self.seconds if count > 1 else self.firsts), []

    runner, entry = Clock(), {}
    for runner.seconds, runner.firsts in [(iter([0.1, 0.2, 0.3]), iter([0.08])), (iter([2]), iter([0.5]))]:
        take_turn(runner, entry, [[1], [2]], Plan(count=4, least=0.5), lambda kind: 10.0)
    assert entry.pop("pauses") == pytest.approx([10, 10, 20, 20, 30, 30])
    assert entry == {"rounds tokens/s": [pytest.approx(24 / 0.6), 4], "read rounds GB/s": [10, 10], "peak MB": 5, "rounds first token ms": [80, 500],
                     "rounds decode tokens/s": [pytest.approx(6 / 0.12), pytest.approx(6 / 1.5)],
                     "rounds pause ms": [pytest.approx(20)] * 2, "99th pause ms": pytest.approx(30)}


def test_who_does_not_tell_is_not_asked(folder):
    runner, entry = Runner(Contestant("it", plain, tells=False), folder), {}
    take_turn(runner, entry, [[1], [2]], Plan(count=4, least=0), lambda kind: 10.0)
    runner.close(patience=30)
    assert entry["remarks"] == ["does not say when a token is there"] and "rounds pause ms" not in entry and entry["rounds decode tokens/s"][0] > 0


def test_times_are_those_of_the_tokens(folder):
    "Each contestant tells of every token while it writes, for all rows at once, and writes the same as when it is not asked to."
    for name in ("textgen eager", "transformers"):
        runner = Runner(next(one for one in CONTESTANTS if one.name == name), folder)
        (seconds, rows), times = runner.ask([[1, 2], [3, 4]], 9, watched=True), runner.times
        assert len(times) == 9 and times == sorted(times) and 0 < times[0] and times[-1] <= seconds
        assert runner.ask([[1, 2], [3, 4]], 9)[1] == rows and runner.times == [] and runner.memory > 10**7
        runner.close(patience=30)


def test_a_format_is_made_in_a_process_before(tmp_path):
    "So that the memory that takes is not the contestant's; one that cannot be made is lost with the reason."
    runner = Runner(Contestant("it", plain, makes=making), tmp_path)
    runner.close(patience=30)
    assert int((tmp_path/"made").read_text()) not in (os.getpid(), runner.process.pid)
    with pytest.raises(Lost, match="ValueError: not this one"): Runner(Contestant("it", plain, makes=refusing), tmp_path)


def test_reading_and_its_share():
    "Shares of products and ratios are taken in each round; the first token is there when the prompt is read."
    plan = Plan(["tiny"], [1], reading=8)
    entries = {"textgen float32": {"rounds prompt tokens/s": [100.0, 200.0], "peak rounds GFLOP/s": [1.0, 1.0]},
               "transformers": {"rounds prompt tokens/s": [50.0, 50.0], "peak rounds GFLOP/s": [1.0, 1.0]}}
    compare(plan, {"figures": {"tiny, prompt of 8": entries}})
    ours, each = entries["textgen float32"], prompt_operations("tiny", 8) / 8
    assert ours["prompt tokens/s"] == 150 and ours["transformers ×"] == 3 and ours["interval transformers ×"] == [2, 4]
    assert ours["matmul %"] == pytest.approx(100 * 150 * each / 1e9) and ours["first token ms"] == pytest.approx((80 + 40) / 2)


def test_products_are_fastest_in_their_best_type():
    for kind in BYTES: assert product_speed(kind) > 0
    assert product_speed("q8_0") >= 0.5 * product_speed("float32")   # of both types, the better one


def test_batches_that_are_drawn():
    entry = lambda speed, *ends: {"tokens/s": speed, "interval tokens/s": [*ends]} if ends else {"tokens/s": speed}
    found = {"tiny, batch 1": {"a": entry(10.0, 9.0, 12.0), "b": {"lost": "no"}}, "tiny, batch 4": {"a": entry(20.0)}, "char, batch 1": {"a": entry(1.0)},
             "tiny, batch 1, CUDA": {"a": entry(5.0)}, "tiny, prompt of 8": {"a": {"prompt tokens/s": 9.0}}}
    assert sweep({"figures": found}) == {"tiny": {"a": [(1, 10, 1, 2), (4, 20, 0, 0)]}}


def test_figures_are_medians_of_ratios_and_shares():
    plan, peer = Plan(["tiny"], [2]), "CTranslate2 float32"
    entries = {"transformers": {"rounds tokens/s": [1.0, 2.0, 3.0], "read rounds GB/s": [1.0, 1.0, 1.0]}, peer: {"lost": "not installed"},
               "textgen float32": {"rounds tokens/s": [10.0, 2.0, 9.0], "sampled rounds tokens/s": [8.0, 2.0], "read rounds GB/s": [1.0, 2.0, 3.0]}}
    results = {"figures": {"tiny, batch 2": entries}}
    compare(plan, results)
    ours = entries["textgen float32"]
    assert ours["tokens/s"] == 9 and ours["transformers ×"] == 3 and "CTranslate2 ×" not in ours   # the medians of 10, 2, 9 and of 10, 1, 3
    assert ours["sampling adds %"] == pytest.approx(12.5)                                          # of 1.25 and 1
    assert ours["roofline %"] == pytest.approx(100 * 3 / 2 * weights_read("tiny", "float32") / 1e9) and ours["read GB/s"] == 2   # of 10, 1, 3
    assert ours["interval tokens/s"] == [2, 10] and ours["interval transformers ×"] == [1, 10] and ratios([4.0], [2.0, 1.0]) == [2]


@pytest.mark.parametrize("count, outer", [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (17, 4), (25, 7)])
def test_intervals_are_those_of_the_tables(count, outer):
    "How many of so many values lie outside on each side, at 95%, as in Conover's table of the binomial distribution."
    values = [float(7 * n % count) for n in range(count)]
    assert interval(values) == [outer, count - 1 - outer] if count % 7 else True
    assert interval([3.0] * count) == [3, 3] and interval(values, 0.0)[0] >= interval(values)[0]


def test_a_figure_is_shown_with_the_farther_end():
    entry = {}
    note(entry, "tokens/s", [100.0])
    assert entry == {"tokens/s": 100}
    note(entry, "tokens/s", [100.0, 120, 101, 99, 98, 102])
    assert entry == {"tokens/s": 100.5, "interval tokens/s": [98, 120]}
    wanted = {"it: ours, tokens/s": {"wanted": 90, "met": True}}
    cells = lambda one: [cell for column in figures.draw_table("it", {"ours": one}, ["tokens/s"], wanted).columns for cell in column.cells]
    assert cells(entry) == ["ours", "[green]100 ±20 ≥ 90[/]"] and cells({"tokens/s": 100.5}) == ["ours", "[green]100 ≥ 90[/]"]
    assert [figures.shown(value, ends=ends) for value, ends in [(0.123, [0.12, 0.124]), (12345.0, [12000.0, 12346.0]), (2.0, [2.0, 2.0 + 1e-15])]] == \
        ["0.123 ±0.003", "12,345 ±345", "2 ±0"]
    found = figures.targets({"figures": {"it": {"ours": entry}}}, {("it", "ours"): {"tokens/s": 90}}, set())
    assert found["it: ours, tokens/s"] == {"wanted": 90, "measured": 100.5, "interval": [98, 120], "met": True}


@pytest.mark.parametrize("shape", ["char", "tiny"])
def test_a_step_reads_all_weights_but_positions(shape):
    sizes = [p.numel() for name, p in random_model(shape).decoder.named_parameters() if "wpe" not in name]
    assert weights_read(shape, "float32") == 4 * sum(sizes) and weights_read(shape, "int8") < weights_read(shape, "float32") / 3.5


def test_every_target_names_what_is_measured():
    "A target whose figure, contestant or workload was renamed would never be looked at."
    names = {one.name for one in CONTESTANTS} | {"textgen CUDA"}
    for title, row in TARGETS:
        if title == "workloads": assert row.split(", ")[0] in WORKLOADS and row.split(", ")[1] in SHAPES
        else: assert row in names and title.split(",")[0] in SHAPES
    results = {"figures": {}, "workloads": {}}
    for (title, row), wanted in TARGETS.items():
        (results["workloads"] if title == "workloads" else results["figures"].setdefault(title, {}))[row] = dict.fromkeys(wanted, 0.0)
    found = find_targets(results)
    assert len(found) == sum(map(len, TARGETS.values()))
    assert {name.rpartition(", ")[2] for name, one in found.items() if one["met"]} == AT_MOST   # nothing is little
    waits = {"batching, gpt2": {"one after another ×": 9, "longest wait of its share %": 101}}
    assert [one["met"] for one in find_targets({"workloads": waits}).values()] == [True, False]


def test_whom_each_is_compared_with():
    names = [one.name for one in CONTESTANTS]
    by_name = {one.name: one for one in CONTESTANTS}
    assert peer_of(by_name["textgen int8"], "llama.cpp", names) == "llama.cpp q8_0"
    assert peer_of(by_name["textgen eager"], "CTranslate2", names) == "CTranslate2 float32"
    assert peer_of(by_name["transformers"], "transformers", names) is None
    assert peer_of(by_name["textgen bfloat16"], "CTranslate2", names) is None
    assert {one.weights for one in CONTESTANTS} == set(BYTES)


def test_a_difference_is_where_it_is_and_as_wide_as_the_logits_say():
    import torch
    decoder, prompt = random_model("tiny").decoder, [3, 4]
    with torch.no_grad(): logits = decoder(torch.tensor([[*prompt, 7]]))[0, -1]
    found = difference(decoder, [[1], prompt], [[5, 6], [7, 8]], [[5, 6], [7, 9]])
    assert (found["texts"], found["of"], found["text"], found["token"]) == (1, 2, 1, 1) and math.isclose(found["gap"], abs(logits[8] - logits[9]), rel_tol=1e-5)


def test_of_several_differences_the_widest_counts():
    "A tie in the first text must not hide what comes after it."
    import torch
    decoder, prompts = random_model("tiny").decoder, [[3], [4], [5]]
    with torch.no_grad(): order = [decoder(torch.tensor([prompt]))[0, -1].argsort().tolist() for prompt in prompts]
    best, second, worst = ([[one[at]] for one in order] for at in (-1, -2, 0))
    found = difference(decoder, prompts, [second[0], worst[1], best[2]], best)
    assert (found["texts"], found["of"], found["text"]) == (2, 3, 1)


def test_how_fast_memory_is_without_a_compiler(monkeypatch):
    monkeypatch.setattr("textgen.kernels.compiler", lambda: None)
    memory = Memory("cpu", 2**20)
    assert memory.by == "torch.sum" and memory.speed(2**19) > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_really_read(threads):
    "The loop adds up every number of the part it is to read, once in each pass."
    import ctypes
    memory = Memory("cpu", 2**20, threads)
    if memory.by != "C": pytest.skip("no compiler")
    memory.loop.restype = ctypes.c_float   # one of sixteen sums
    call = lambda blocks, passes: memory.loop(ctypes.c_void_p(memory.numbers), *map(ctypes.c_int64, (blocks, passes, threads)))
    assert call(2048, 1) == 2048 * 8 and call(1024, 3) == 3 * 1024 * 8


def test_no_graphics_card_is_said(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = {}
    measure(Plan(["gpt2"], [1], device="cuda", contestants=[Contestant("textgen CUDA", dying)]), results)
    assert all("no graphics card" in one["why"] for one in find_targets(results).values()) and len(find_targets(results)) == 3
    assert "no graphics card" in next(tables(results))


@pytest.mark.parametrize("typed, figures, plot", [("x", "x.json", "x.png"), ("x.json", "x.json", "x.png"), ("x.png", "x.json", "x.png"),
                                                  ("results.v2", "results.v2.json", "results.v2.png"), ("a/b.JSON", "a/b.JSON", "a/b.png")])
def test_names_of_the_files(typed, figures, plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files_for(Path(typed)) == (Path(figures), Path(plot)) and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_place_for_the_files(tmp_path):
    (tmp_path/"file").touch()
    (tmp_path/"x.png").mkdir()
    for typed, kind in [("file/x", TextgenError), ("x", UsageError), ("x.json", UsageError)]:
        with pytest.raises(kind, match="could not write to|is a folder"): files_for(tmp_path/typed)
    if os.path.exists("/dev/null"):
        with pytest.raises(UsageError, match="is no plain file"): files_for(Path("/dev/null"))


def test_a_workload_that_cannot_be_measured_is_a_row(monkeypatch):
    monkeypatch.setenv("TEXTGEN_DATA", "")
    results = {}
    measure_workloads(["start"], "tiny", 1, results)
    assert "TEXTGEN_DATA" in results["workloads"]["start, tiny"]["lost"]


@pytest.mark.parametrize("act", [lambda: read_names("figures,figure", ["figures"], "--only"), lambda: read_batches("1,,2"),
                                 lambda: read_batches("257"), lambda: read_batches("1.5")])
def test_what_was_mistyped(act):
    with pytest.raises(UsageError): act()


def half_done(names, shape, rounds, results, tell):
    "Stands for workloads of which the second ends everything."
    results["workloads"] = {"prefix, tiny": {"rounds": {"nothing shared ×": [2.0]}, "nothing shared ×": 2.0}}
    raise TextgenError("no room")


def test_a_fault_in_the_middle_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure_workloads", half_done)
    with pytest.raises(TextgenError, match="no room"): benchmark.run(["prefix", "batching"], Plan(["tiny"]), tmp_path/"x", {})
    assert "nothing shared ×" in capsys.readouterr().out
    assert json.loads((tmp_path/"x.json").read_text(encoding="utf-8"))["workloads"]["prefix, tiny"]["nothing shared ×"] == 2


def test_a_full_disk_keeps_what_was_measured_on_the_screen(tmp_path, monkeypatch, capsys):
    def full(path): raise TextgenError(f"could not write {path}: No space left on device; free some space")
    monkeypatch.setattr(figures, "atomic_path", full)
    results = {"workloads": {"prefix, tiny": {"rounds": {"nothing shared ×": [2.0]}, "nothing shared ×": 2.0}}}
    with pytest.raises(TextgenError, match="No space left"): benchmark.report([], results, tmp_path/"x.json", tmp_path/"x.png")
    assert "nothing shared ×" in capsys.readouterr().out


def test_figures_that_are_there_are_not_replaced_by_none(tmp_path, monkeypatch, capsys):
    (tmp_path/"x.json").write_text("{}")
    benchmark.report([], {"figures": {"tiny, batch 1": {"textgen int8": {"lost": "no"}}}}, tmp_path/"x.json", tmp_path/"x.png")
    assert (tmp_path/"x.json").read_text() == "{}" and "nothing is saved" in capsys.readouterr().out


# Where figures come from

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A package in a checkout of its own, and git to work on it."
    import textgen
    (tmp_path/"textgen").mkdir()
    (tmp_path/"textgen/__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(textgen, "__file__", str(tmp_path/"textgen/__init__.py"))
    return lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", tmp_path, *words],
                                         capture_output=True, text=True, check=True).stdout.strip()


def test_the_revision_is_that_of_the_package(checkout, tmp_path):
    "Not that of somebody else's checkout in which it happens to lie; a change of a file is seen, a new file is none."
    assert revision() is None
    checkout("init", "-q")
    assert revision() is None
    checkout("add", "textgen")
    checkout("commit", "-q", "-m", "one")
    (tmp_path/"benchmark.json").touch()
    assert revision() == {"commit": checkout("rev-parse", "HEAD"), "changed": False}
    (tmp_path/"textgen/__init__.py").write_text("x = 2\n")
    assert revision()["changed"] is True


def test_without_git_there_is_no_revision(checkout, monkeypatch):
    checkout("init", "-q")
    checkout("add", "textgen")
    monkeypatch.setenv("PATH", "")
    assert revision() is None


def test_what_a_file_says_of_its_making():
    found = machine(2, "textgen benchmark generate --quick", weights=0, prompts=[1, 16])
    assert {"command", "date", "revision", "processor", "cores", "threads", "memory MB", "system", "python", "versions", "seeds"} <= found.keys()
    assert found["threads"] == 2 and found["seeds"] == {"weights": 0, "prompts": [1, 16]} and re.fullmatch(r"[\d-]{10}T[\d:]{8}\+00:00", found["date"])
    assert {"textgen", "numpy", "torch", "transformers"} <= found["versions"].keys() and json.loads(json.dumps(found)) == found


def test_what_is_missing_is_named_with_its_line():
    lost = {"lost": 'not installed (llama_cpp); pip install "textgen[peers]"'}
    other = {"lost": "not installed (tiktoken); pip install tiktoken"}
    figures = {"tiny, batch 1": {"llama.cpp q8_0": lost, "CTranslate2 int8": lost, "dead": {"lost": "its process died"}}, "prepare": {"tiktoken, 2 threads": other}}
    assert [*missing({"figures": figures})] == ['missing CTranslate2, llama.cpp; to have them measured: pip install "textgen[peers]"',
                                                "missing tiktoken; to have them measured: pip install tiktoken"]


# The command

def environment(): return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_the_command(tmp_path):
    "A quick run has a row for each contestant, installed or not; figures and a picture in files; keys that end in units."
    line = [*PROGRAM, "benchmark", "generate", "--quick", "--only", "figures,batching", "--output", "out/figures.json"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(turn \d+ of \d+: .*\n)*", done.stderr)   # one each half minute, where it is that slow
    assert all(one.name in done.stdout for one in CONTESTANTS) and "one after another ×" in done.stdout
    results = json.loads((tmp_path/"out/figures.json").read_text(encoding="utf-8"))
    assert results["machine"]["command"] == "textgen benchmark generate --only figures,batching --quick"
    entries = results["figures"]["tiny, batch 1"]
    assert list(entries) == [one.name for one in CONTESTANTS] and results["machine"]["versions"]["torch"]
    for entry in entries.values():
        assert "lost" in entry or len(entry["rounds tokens/s"]) == len(entry["read rounds GB/s"]) == 2 and entry["tokens/s"] > 0
    if any("not installed" in entry.get("lost", "") for entry in entries.values()): assert 'pip install "textgen[peers]"' in done.stdout
    assert "tiny, batch 1: textgen float32, CTranslate2 ×" in done.stdout and "targets" in done.stdout
    assert entries["textgen eager"]["transformers ×"] > 0 and results["memory"]["cpu"]["read by"] in ("C", "torch.sum")
    keys = {key for entry in entries.values() for key in entry} - {"lost", "differs"}
    assert all(re.search(r" ?(tokens/s|ms|s|MB|GB/s|%|×)$", key) for key in keys), keys
    for entry in entries.values(): assert "lost" in entry or entry["peak MB"] > 10 and entry["99th pause ms"] >= 0 and "interval decode tokens/s" in entry
    for entry in results["figures"]["tiny, prompt of 64"].values(): assert "lost" in entry or entry["matmul %"] > 0 and "interval matmul %" in entry
    assert (tmp_path/"out/figures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_is_not_heard_by_a_contestant(folder):
    "Not by the first one of a program either, with which multiprocessing starts a process of its own."
    code = ("import os, signal, sys; from textgen.peers import CONTESTANTS, Runner\n"
            "runner = Runner(next(one for one in CONTESTANTS if one.name == 'textgen eager'), sys.argv[1])\n"
            "os.kill(runner.process.pid, signal.SIGINT); print(len(runner.ask([[1]], 3)[1][0])); runner.close(30)")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("send, number", [(getattr(os, "killpg", None), "SIGINT"), (os.kill, "SIGTERM")])
def test_ctrl_c_keeps_what_was_measured(tmp_path, send, number):
    """Ctrl-C goes to the whole group, as from a terminal, a batch system's SIGTERM to the program: figures so far are saved,
    the exit code is 130, nobody is left."""
    told = ("turn = rounds.take_turn\nrounds.take_turn = lambda *given: (turn(*given), print('turn', flush=True))\n"
            "rounds.CONTESTANTS[:] = [one for one in rounds.CONTESTANTS if one.name in ('textgen eager', 'textgen int8')]\n")
    code = PROGRAM[2].replace("import sys; ", f"import sys, textgen.rounds as rounds\n{told}")
    words = "benchmark generate --models tiny --batch 1 --rounds 100000 --only figures".split()
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "turn\n"
        send(process.pid, getattr(signal, number))
        out, error = process.communicate()
    finally:
        process.kill()   # its children end when nobody asks them any more
        process.wait()
    assert process.returncode == 130 and error.endswith("interrupted\n") and "textgen int8" in out, error
    results = json.loads((tmp_path/"benchmark.json").read_text(encoding="utf-8"))
    assert any(entry.get("rounds tokens/s") for entry in results["figures"]["tiny, batch 1"].values())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("words, said", [(["--models", "gpt3"], "--models: no 'gpt3'"), (["--batch", "0"], "--batch: '0'"),
                                         (["--only", "nothing"], "--only: no 'nothing'"), (["--output", "."], "is a folder")])
def test_refused_at_once(words, said, tmp_path):
    done = subprocess.run([*PROGRAM, "benchmark", "generate", *words], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"error: [^\n]+\n", done.stderr) and said in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]
