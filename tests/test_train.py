"""Training under fire: killed at any moment, on several processes, with full disks, damaged files and wrong recipes.

What runs as a process is forked from one helper that has imported everything (`nursery`), so that a start costs no seconds.
"""
import contextlib, errno, json, math, os, random, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textgen import fitting, runs, train as train_module, trainer
from textgen.core import TextgenError, UsageError, load
from textgen.processes import find_place
from textgen.recipe import load_recipe
from textgen.resume import checkpoints, load_checkpoint, save_checkpoint
from textgen.train import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
draw = random.Random(1)
TEXT = "".join(" ".join(draw.choices("fox grapes crow cheese up down the a sees wants old".split(), k=7)) + ".\n" for _ in range(60))
TINY = {"data": "text.txt", "data_options": {}, "tokenizer": "char", "device": "cpu", "precision": "fp32", "rows": "chunks",
        "length": 16, "batch_size": 4, "steps": 40, "model.n_layer": 1, "model.n_embd": 16, "model.n_head": 2, "model.n_positions": 16,
        "evaluate_every": 10, "checkpoint_every": 5, "log_every": 1, "sample.prompts": 1, "sample.stories": 0,
        "sample.settings": {"max_new_tokens": 8}, "optimizer.warmup": 5}
ALL = {"model.dropout": 0.1, "ema": 0.9, "accumulate": 2, "keep_best": True, "sample.every": 7, "evaluate_every": 8}  # at once


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder with a text in it, to be in; what training measures and draws costs nothing."
    (tmp_path/"text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "matmul_peak", lambda place: 1e9)
    monkeypatch.setattr(runs, "draw_curve", lambda folder: None)
    return tmp_path


def recipe(**more): return load_recipe("demo", {**TINY, **{key.replace("__", "."): value for key, value in more.items()}})


def go(out, resume=False, force=False, **more): return runs.train(recipe(**more), out, resume, force=force)[1]


def started(out="run", **more):
    "A run at step 0 with its folder."
    run = trainer.start(recipe(**more), Path(out))
    run.folder.mkdir(exist_ok=True)
    return run


TIMES = {"seconds", "tokens_per_second", "mfu_percent", "training_seconds", "peak_memory_bytes", "machine"}


def untimed(line): return {key: value for key, value in line.items() if key not in TIMES}


def left_by(folder):
    "All that a run has left behind, without times: to be equal to the bit."
    folder = Path(folder)
    found = {name: (folder/name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")}
    for path in checkpoints(folder):
        found |= {f"{path.name}/{file.name}": file.read_bytes() for file in path.glob("*.safetensors")}
        place = json.loads((path/"training.json").read_text())
        found[f"{path.name}/training.json"] = {key: value for key, value in place.items() if key not in ("seconds", "config")}
    if (folder/"best").is_dir(): found["best"] = (folder/"best/model.safetensors").read_bytes()
    if (folder/"samples.jsonl").is_file(): found["samples"] = (folder/"samples.jsonl").read_bytes()
    found["metrics"] = [untimed(json.loads(line)) for line in (folder/"metrics.jsonl").read_text().splitlines()]
    found["result"] = untimed(json.loads((folder/"result.json").read_text()))
    return found


def same(one, other):
    "Two runs have left the same, to the bit."
    one, other = left_by(one), left_by(other)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def losses(folder): return [line["nats_per_token"] for line in runs.read_lines(folder)]


# Processes

NURSERY = """
import gc, json, os, signal, sys
import torch, torch._dynamo, torch.distributed.fsdp, accelerate, accelerate.utils, filelock, rich.progress, tokenizers
from textgen import benchmark, cli, data_commands, export, fitting, lora, processes, resume, rounds, runs, trainer, workloads
torch.set_num_threads(1)

def dying(folder, count):
    "Be killed at the count-th time that something is done to the disk in the run's folder."
    names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    left = [count]
    def hook(event, arguments):
        if event in names and any(str(a).startswith(folder) for a in arguments[:2]):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(task):
    os.chdir(task["cwd"])
    os.environ.update(task["env"])
    for number, name in enumerate(["/dev/null", task["out"], task["err"]]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(task["first"], globals())
    if task["dies"]: dying(*task["dies"])
    code = cli.main(task["words"])
    sys.stdout.flush(); sys.stderr.flush()
    sys.exit(code)

trainer.matmul_peak, runs.draw_curve = lambda place: 1e9, lambda folder: None
gc.freeze()
print("ready", flush=True)
while line := sys.stdin.readline():
    task = json.loads(line)
    if "wait" in task:
        pid, status = os.waitpid(task["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if not pid: child(task)
    print(pid, flush=True)
"""


class Born:
    "A process that the nursery has started."
    def __init__(self, nursery, pid, out, err): self.nursery, self.pid, self.out, self.err, self.code = nursery, pid, out, err, None

    def poll(self):
        if self.code is None: self.code = self.nursery.ask({"wait": self.pid})
        return self.code

    def wait(self, seconds=60):
        end = time.time() + seconds
        while self.poll() is None:
            if time.time() > end:
                self.kill()
                raise AssertionError(f"still at work after {seconds} s: {self.err.read_text()}")
            time.sleep(0.01)
        return self.code

    def send(self, number): os.kill(self.pid, number) if self.poll() is None else None

    def kill(self):
        self.send(signal.SIGKILL)
        while self.poll() is None: time.sleep(0.005)

    said = property(lambda self: self.err.read_text())


class Nursery:
    "Starts `textgen` in no time, by a fork of a process that has imported all it needs."
    def __init__(self, folder):
        self.folder, self.count, self.children = folder, 0, []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, task):
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, words, cwd, env=None, first="", dies=None):
        self.count += 1
        out, err = (self.folder/f"{self.count}.{end}" for end in ("out", "err"))
        out.touch(), err.touch()
        task = {"words": words, "cwd": str(cwd), "env": env or {}, "first": first, "dies": dies, "out": str(out), "err": str(err)}
        self.children.append(Born(self, self.ask(task), out, err))
        return self.children[-1]

    def together(self, words, cwd, firsts=("", ""), dies=(None, None)):
        "Several processes that train together, as torchrun starts them."
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(len(firsts)), "LOCAL_WORLD_SIZE": str(len(firsts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [self.start(words, cwd, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, firsts[rank], dies[rank])
                for rank in range(len(firsts))]

    def close(self):
        for one in self.children: one.kill()
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


def typed(out, resume=False, force=False, **more):
    "The words of a command line."
    pairs = {**TINY, **{key.replace("__", "."): value for key, value in more.items()}}
    sets = [word for key, value in pairs.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["train", "demo", "--out", str(out), *sets, *["--resume"] * resume, *["--force"] * force]


def ended(*born, seconds=60):
    "Wait for processes that must end well."
    end = time.time() + seconds
    while time.time() < end and not (None not in (codes := [one.poll() for one in born]) or any(codes)): time.sleep(0.01)
    assert codes == [0] * len(born), "\n".join(one.said for one in born)


# 1. Killed at any moment

def test_killed_ten_times_ends_with_the_same_bits(home, nursery):
    "At ten of the moments at which something changes on the disk: weights, moments, average, record, best and samples are the same."
    ended(nursery.start(typed("whole", **ALL), home))
    moments, deaths = random.Random(0), 0
    for attempt in range(40):
        at = moments.randrange(20, 160) if deaths < 10 else 10**9
        born = nursery.start(typed("killed", resume=(home/"killed/config.yaml").is_file(), **ALL), home, dies=[str(Path("killed")), at])
        code = born.wait()
        if code == 0: break
        assert code == -signal.SIGKILL, born.said
        deaths += 1
    assert code == 0 and deaths >= 5, deaths
    same(home/"whole", home/"killed")
    assert not [path for path in (home/"killed").rglob("*.tmp")]



@pytest.mark.parametrize("sharded", [False, True], ids=["all weights each", "half of them each"])
def test_two_processes_killed_end_with_the_same_bits(home, nursery, sharded):
    more = {**ALL, "steps": 24, "sharded": sharded}
    ended(*nursery.together(typed("whole", **more), home))
    for at in (60, 90):
        pair = nursery.together(typed("killed", resume=(home/"killed/config.yaml").is_file(), **more), home, dies=(["killed", at], None))
        assert pair[0].wait() == -signal.SIGKILL, pair[0].said
        pair[1].kill()
    assert checkpoints(home/"killed") and not (home/"killed/result.json").exists()
    ended(*nursery.together(typed("killed", resume=True, **more), home))
    same(home/"whole", home/"killed")


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["all weights each", "half of them each"])
def test_two_processes_stop_at_the_same_step(home, nursery, sharded):
    "A signal to one of them stops both, at once and well; what they saved ends as if nothing had been."
    more = {**ALL, "steps": 24, "sharded": sharded, "checkpoint_every": 24}
    ended(*nursery.together(typed("whole", **more), home))
    slow = "old = trainer.next_step\ndef slowly(*given): import time; time.sleep(0.05); return old(*given)\ntrainer.next_step = slowly"
    pair = nursery.together(typed("half", **more), home, firsts=(slow, slow))
    until(lambda: len(losses(home/"half")) > 3, pair[0])
    pair[1].send(signal.SIGTERM)
    assert [one.wait() for one in pair] == [130, 130], pair[0].said
    said = [one.said.splitlines()[-1] for one in pair]
    assert said[0] == said[1] and said[0].startswith("stopped after step "), said
    stop = checkpoints(home/"half")
    assert len(stop) == 1
    ended(*nursery.together(typed("half", resume=True, **more), home))
    shutil.rmtree(stop[0])
    same(home/"whole", home/"half")


def until(true, born, seconds=60):
    "Wait for something that a process does."
    end = time.time() + seconds
    while not true():
        assert born.poll() is None and time.time() < end, born.said
        time.sleep(0.005)


# 3. Several processes and one

def test_processes_make_no_difference(home, nursery):
    "Losses of two processes, with all weights or half of them, are those of one; their checkpoints go on in any company."
    more = dict(optimizer__name="adamw", accumulate=2, steps=12, optimizer__learning_rate=0.01, batch_size=8, evaluate_every=6, keep=9)
    go("one", **more)
    ended(*nursery.together(typed("two", **more), home))
    ended(*nursery.together(typed("half", sharded=True, **more), home))
    close = lambda name: np.testing.assert_allclose(losses(name), losses("one"), rtol=0, atol=1e-5)
    close("two"), close("half")
    for before, on, now in [("half", "alone", {}), ("one", "pair", {"sharded": True}), ("two", "pair", {"sharded": True}), ("half", "pair", {})]:
        shutil.copytree(before, "on", ignore=shutil.ignore_patterns("step-000010", "step-000012", "result.json"))
        words = typed("on", resume=True, **{**more, "sharded": False, **now})
        born = nursery.together(words, home) if on == "pair" else [nursery.start(words, home)]
        ended(*born)
        close("on")
        assert "step-000005 was made elsewhere (processes" in born[0].said or (before, on) in [("two", "pair"), ("half", "pair")], born[0].said
        shutil.rmtree("on")


def test_dropout_differs_between_processes_and_comes_again(home, nursery):
    "Each draws masks of its own, the same ones in each run."
    first = ("import builtins\nold = trainer.train_step\ndef seen(*given):\n"
             "    mask = torch.nn.functional.dropout(torch.ones(64)).tolist()\n"
             "    print('mask', mask, file=sys.stderr)\n    return old(*given)\ntrainer.train_step = seen")
    masks = []
    for name in "ab":
        pair = nursery.together(typed(name, model__dropout=0.3, steps=4), home, firsts=(first, first))
        ended(*pair)
        masks.append([[line for line in one.said.splitlines() if line.startswith("mask")] for one in pair])
    assert masks[0] == masks[1] and len(masks[0][0]) == 4 and not set(masks[0][0]) & set(masks[0][1])
    same("a", "b")


@pytest.mark.slow
def test_mixed_precision_on_two_processes(home, nursery):
    more = dict(precision="bf16", steps=12)
    go("one", **more)
    for name, sharded in [("two", False), ("half", True)]:
        ended(*nursery.together(typed(name, sharded=sharded, **more), home))
        np.testing.assert_allclose(losses(name), losses("one"), rtol=0, atol=0.05)


@pytest.mark.parametrize("where", ["trainer.next_step", "runs.begin", "trainer.usable", "fitting.judge", "runs.finish"])
def test_one_fails_and_the_other_is_not_left_waiting(where, home, nursery):
    "Nothing but a kill frees a process that waits for a lost one, and torchrun sends it: the one that fails must end, not wait."
    module, name = where.split(".")
    first = f"def failing(*given): raise ValueError('lost')\n{module}.{name} = failing"
    pair = nursery.together(typed("run", steps=6), home, firsts=("", first))
    code = pair[1].wait(30)
    assert code not in (0, None) and "lost" in pair[1].said
    pair[0].kill()


@pytest.mark.slow
def test_the_end_of_two_processes_is_no_deadlock(home, nursery):
    "Were DDP the last to let go of the connections, it would hold Python's lock, which their threads want: now and then, so again and again."
    for attempt in range(15): ended(*nursery.together(typed(f"run-{attempt}", steps=3), home), seconds=45)


@pytest.mark.slow
def test_torchrun_ends_when_one_fails(home):
    "Rank 1 raises in the middle: torchrun stops the other one and ends with an error."
    (home/"script.py").write_text("import os, sys\nfrom textgen import trainer\nfrom textgen.cli import main\nold = trainer.next_step\n"
        "def failing(run, batches):\n    if run.step == 3 and os.environ['RANK'] == '1': raise ValueError('lost')\n"
        "    return old(run, batches)\ntrainer.next_step = failing\nsys.exit(main())\n", encoding="utf-8")
    done = under_torchrun(home, "script.py", *typed("run"))
    assert done.wait(120) != 0 and "lost" in done.communicate()[1]


SCRIPT = "import sys\nfrom textgen.cli import main\nsys.exit(main())\n"


def launched(home, module, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", module, *words], cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def under_torchrun(home, *words): return launched(home, "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--multi_gpu", "--use_fsdp"])
def test_accelerate_launch_starts_two_processes(home, option):
    "Its options are named after GPUs; where there is none, the two meet over gloo, and learn what one does."
    (home/"script.py").write_text(SCRIPT, encoding="utf-8")
    more = dict(optimizer__name="adamw", steps=12)
    done = launched(home, "accelerate.commands.launch", option, "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
                    "--dynamo_backend=no", "--main_process_port=0", "script.py", *typed("two", **more))
    try: said = done.communicate(timeout=180)[1]
    finally: done.kill()
    assert done.returncode == 0, said
    go("one", **more)
    assert json.loads((home/"two/result.json").read_text())["machine"]["processes"] == 2
    np.testing.assert_allclose(losses("two"), losses("one"), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_stopped_and_goes_on(home, number):
    "A signal to torchrun reaches both processes once; they save at the same step."
    (home/"script.py").write_text(SCRIPT, encoding="utf-8")
    done = under_torchrun(home, "script.py", *typed("run", steps=100_000, checkpoint_every=100_000, evaluate_every=100_000, batch_size=16))
    try:
        end = time.time() + 60
        while len(runs.read_lines("run")) < 5:
            assert done.poll() is None and time.time() < end
            time.sleep(0.02)
        done.send_signal(number)
        said = done.communicate(timeout=60)[1]
    finally: done.kill()
    assert done.returncode != 0 and len(checkpoints("run")) == 1, said
    assert len({line for line in said.splitlines() if line.startswith("stopped after step")}) == 1, said


# 4. N steps, stop, M steps

@pytest.fixture
def base(home):
    "A model saved before, to go on from."
    go("base", steps=5, optimizer__name="adamw")
    return "base"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("more", [
    dict(optimizer__schedule="linear"), dict(optimizer__schedule="cosine", optimizer__floor=0.1), dict(optimizer__schedule="wsd", ema=0.9),
    dict(precision="bf16", model__dropout=0.1), dict(init_from="base", lora={"rank": 2, "alpha": 4, "dropout": 0.1}, ema=0.5),
    dict(init_from="base", lora={"rank": 2, "alpha": 4}, precision="bf16"), dict(init_from="base", accumulate=4, rows="documents"),
], ids=["linear", "cosine", "wsd with ema", "bf16", "lora with ema", "lora in bf16", "from a model"])
def test_stopped_and_resumed_is_undisturbed(optimizer, more, base):
    "Eleven steps and nine are twenty, to the bit."
    more = {**more, "optimizer__name": optimizer, "steps": 20, "checkpoint_every": 20, "keep_best": True, "evaluate_every": 4}
    go("whole", **more)
    asked, real = [], runs.stop_signals
    @contextlib.contextmanager
    def after(): yield lambda: asked.append(0) or len(asked) == 11
    with pytest.MonkeyPatch.context() as patch, pytest.raises(fitting.Interrupted, match="after step 11 of 20"):
        patch.setattr(runs, "stop_signals", after)
        go("parts", **more)
    assert [path.name for path in checkpoints("parts")] == ["step-000011"]
    go("parts", resume=True, **more)
    shutil.rmtree("parts/checkpoints/step-000011")
    same("whole", "parts")
    moved = load_file("whole/model.safetensors")
    assert any(not torch.equal(moved[name], before) for name, before in load_file("base/model.safetensors").items())


# 5. Checkpoints that are kept, and damaged ones

def damage(path, how):
    file = path/{"truncated": "model.safetensors", "bit of the model": "model.safetensors", "no training.json": "training.json"}.get(
        how, "training.safetensors")
    data = file.read_bytes() if file.exists() else b""
    if how == "truncated": file.write_bytes(data[:len(data) // 2])
    elif how.startswith("bit"): file.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    elif how == "no training.json": file.unlink()
    elif how == "no numbers": (path/"training.json").write_text("{}")
    elif how == "half a line": (path/"training.json").write_text((path/"training.json").read_text()[:99])
    elif how == "empty": shutil.rmtree(path), path.mkdir()
    elif how == "half written": path.rename(path.with_name(f".{path.name}.0badcafe.tmp"))


HOW = ["truncated", "bit of the model", "bit of the moments", "no training.json", "no numbers", "half a line", "empty", "half written"]


@pytest.fixture
def stopped(home):
    "A run with checkpoints of steps 30, 35 and 40 that has not ended."
    go("run", keep=3, **ALL)
    assert [path.name for path in checkpoints("run")] == ["step-000030", "step-000035", "step-000040"]
    shutil.copytree("run", "whole")
    Path("run/result.json").unlink()
    return Path("run")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, stopped, capsys):
    damage(stopped/"checkpoints/step-000040", how)
    go("run", resume=True, keep=3, **ALL)
    said = capsys.readouterr().err
    if how != "half written": assert "step-000040 is damaged (" in said and "going on from step-000035" in said and said.count("\n") == 1
    same("whole", "run")
    assert not list(stopped.rglob("*.tmp"))


def test_all_damaged_is_said(stopped):
    for how, path in zip(HOW, checkpoints("run")): damage(path, how)
    with pytest.raises(UsageError, match="nothing to resume in run: .*step-000040.*step-000035.*step-000030.*another --out") as error:
        go("run", resume=True, keep=3, **ALL)
    assert "\n" not in str(error.value)


def test_checkpoints_after_the_one_in_use_do_not_push_it_out(stopped):
    "With the two newest damaged and one to keep, what is saved next is what is kept."
    for path in checkpoints("run")[1:]: damage(path, "truncated")
    run = started(keep=1, **ALL)
    load_checkpoint(run, stopped/"checkpoints/step-000030")
    run.step = 32
    assert save_checkpoint(run).name == "step-000032"
    assert [path.name for path in checkpoints("run")] == ["step-000032"]


def test_a_million_steps(home):
    "Checkpoints are in the order of their steps, not of their names' letters."
    run = started(keep=2)
    for run.step in (999_998, 999_999, 1_000_000, 1_000_001): save_checkpoint(run)
    assert [path.name for path in checkpoints("run")] == ["step-1000000", "step-1000001"]
    losses = [torch.tensor(math.nan)]
    with pytest.raises(TextgenError, match="the last good checkpoint is .*step-1000001"): fitting.read_losses(run, losses)


# 6. Bad input and bad luck

@pytest.mark.parametrize("more, part", [
    (dict(batch_size=10_000), "batch_size 10000 is more than the number of rows"),
    (dict(length=4000, model__n_positions=4000), "the train part has .* takes 4001"),
    (dict(length=32), "length 32 is more than the model's n_positions 16"),
    (dict(optimizer__learning_rate=0), "learning_rate"), (dict(optimizer__learning_rate=-1.0), "learning_rate"),
    (dict(optimizer__learning_rate=math.nan), "learning_rate"), (dict(accumulate=0), "accumulate"),
    (dict(accumulate=3), "batch_size 4 cannot be cut into 3 equal parts .* multiple of 3"),
    (dict(sharded=True), "sharded is for several processes; start it with torchrun"),
    (dict(precision="fp16"), "fp16 is for GPUs"), (dict(presicion="fp32"), "presicion"), (dict(lora={"rnk": 2}), "rnk"),
    (dict(lora={"rank": 400, "alpha": 1}), "rank 400"), (dict(lora={"rank": 2, "alpha": 1, "targets": ["x"]}), "'x'"),
    (dict(init_from="nowhere"), "nowhere"), (dict(init_from="empty"), "empty"), (dict(init_from="text.txt"), "text.txt"),
    (dict(init_from="other"), "character"), (dict(init_from="torn"), "torn.*damaged"), (dict(device="cuda:99"), "no device 'cuda:99'"),
    (dict(patience=0), "patience"), (dict(evaluate_tokens=1), "evaluate_tokens"), (dict(ema=1.0), "ema"), (dict(keep=0), "keep"),
], ids=lambda part: "" if isinstance(part, str) else ",".join(f"{k}={v}" for k, v in part.items())[:30])
def test_recipes_that_cannot_be(more, part, home):
    "One line that names the key, before anything is written."
    Path("empty").mkdir()
    if more.get("init_from") in ("other", "torn"):
        Path("other.txt").write_text("01 23 45 67 89\n" * 90)
        go(more["init_from"], data="other.txt" if more["init_from"] == "other" else "text.txt", steps=2)
        if more["init_from"] == "torn": damage(Path("torn"), "truncated")
    with pytest.raises(UsageError, match=part) as error: go("run", **more)
    assert "\n" not in str(error.value) and not list(home.glob("run*"))


def test_few_documents_and_a_large_batch(home):
    "Rows that begin at documents are fewer than chunks."
    more = dict(data="stories", data_options={"train": 9, "validation": 5}, tokenizer="bpe:300", rows="documents", steps=3, batch_size=16)
    with pytest.raises(UsageError, match="batch_size 16 is more than the number of rows to learn from, .*; set batch_size to at most") as error:
        go("run", **more)
    assert "\n" not in str(error.value) and not Path("run").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number(value, home, monkeypatch):
    "Training stops, names the step and the checkpoint that is still good, and that one loads."
    real = trainer.train_step
    def broken(model, optimizers, parts, clip, place):
        loss, norm = real(model, optimizers, parts, clip, place)
        count.append(0)
        return (torch.tensor(float(value)) if len(count) == 13 else loss), norm
    count = []
    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(TextgenError, match=f"at step 13 the loss is {value}; .*step-000010$") as error: go("run", **ALL)
    assert "\n" not in str(error.value) and not isinstance(error.value, UsageError)
    load(Path("run/checkpoints/step-000010"))
    monkeypatch.setattr(trainer, "train_step", real)
    go("run", resume=True, **ALL), go("whole", **ALL)
    same("whole", "run")


@pytest.mark.parametrize("at", [10, 12], ids=["where it would be saved", "where it would be the best"])
def test_weights_that_are_no_numbers_are_not_saved(at, home, monkeypatch):
    "A step may spoil the weights though the loss before it was a number."
    real = trainer.train_step
    def broken(model, optimizers, parts, clip, place):
        done = real(model, optimizers, parts, clip, place)
        count.append(0)
        if len(count) == at: next(model.parameters()).data.fill_(math.nan)
        return done
    count = []
    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(TextgenError, match=f"step {at}") as error: go("run", evaluate_every=at, keep_best=True, patience=1)
    assert "\n" not in str(error.value)
    assert checkpoints("run")[-1].name == f"step-0000{5 if at == 10 else 10:02}"
    for path in [*checkpoints("run"), *Path("run").glob("best")]: load(path)
    assert all(math.isfinite(loss) for loss in losses("run")) and "NaN" not in Path("run/metrics.jsonl").read_text()


def full(monkeypatch, where, at):
    "Let the disk be full from the at-th use of something for a checkpoint on."
    name = {"write": "write_bytes", "rename": "replace", "sync": "fsync"}[where]
    owner = Path if where == "write" else os
    real, count = getattr(owner, name), []
    def refusing(*given):
        if checkpoints("run") if where == "sync" else Path(given[0]).name.startswith((".step-", "training.")): count.append(0)
        if len(count) >= at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)
    monkeypatch.setattr(owner, name, refusing)
    return lambda: monkeypatch.setattr(owner, name, real)


@pytest.mark.parametrize("where, at", [("write", 2), ("rename", 2), ("sync", 3)])
def test_a_full_disk_leaves_the_checkpoint_before(where, at, home, monkeypatch):
    mend = full(monkeypatch, where, at)
    with pytest.raises(TextgenError, match="could not write .*: No space left on device; .* space") as error: go("run", **ALL)
    assert "\n" not in str(error.value)
    mend()
    assert checkpoints("run") and not list(Path("run").rglob("*.tmp"))
    for path in checkpoints("run"): load(path)
    go("run", resume=True, **ALL), go("whole", **ALL)
    same("whole", "run")


def test_a_really_full_disk(home):
    "On a file system of a few blocks, if one may be made."
    Path("small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", "small"], capture_output=True).returncode:
        pytest.skip("no file system may be made here")
    try:
        with pytest.raises(TextgenError, match="No space left on device; free some space"): go("small/run", keep=100)
        assert checkpoints("small/run") and not list(Path("small").rglob("*.tmp"))
        for path in checkpoints("small/run"): load(path)
    finally: subprocess.run(["umount", "small"], check=True)


def test_resuming_with_other_settings(stopped, capsys):
    "What shapes no batch and no step is noted, the rest is refused with a list, and may be forced."
    damage(stopped/"checkpoints/step-000040", "empty")
    shutil.rmtree(stopped/"checkpoints/step-000040")
    with pytest.raises(UsageError) as error: go("run", resume=True, **{**ALL, "optimizer.weight_decay": 0.5, "seed": 9, "log_every": 3})
    said = str(error.value)
    assert "optimizer.weight_decay was 0.0, not 0.5" in said and "seed was 1, not 9" in said and "--force" in said and "log_every" not in said
    go("run", resume=True, force=True, keep=3, **{**ALL, "optimizer.weight_decay": 0.5, "log_every": 3})
    said = capsys.readouterr().err
    assert "note: optimizer.weight_decay was 0.0, not 0.5" in said and "note: log_every was 1, not 3" in said
    with pytest.raises(UsageError, match="has ended"): go("run", resume=True, force=True)


@pytest.mark.parametrize("more, works", [
    (dict(optimizer__name="adamw"), False), (dict(lora={"rank": 2, "alpha": 2}), False), (dict(model__n_embd=32), False),
    (dict(ema=0.0), True), (dict(ema=0.5), True), (dict(precision="bf16"), True), (dict(batch_size=8, length=8), True), (dict(steps=50), True),
], ids=lambda part: "" if isinstance(part, bool) else ",".join(part))
@pytest.mark.parametrize("before", [0.0, 0.9], ids=["no average", "average"])
def test_forced_changes_work_or_are_refused(more, works, before, home):
    "Whatever is insisted on: the run goes on as asked, or one line says that it cannot and the checkpoint is not called damaged."
    go("run", ema=before, steps=20)
    Path("run/result.json").unlink()
    shutil.rmtree("run/checkpoints/step-000020")
    asked = {"ema": before, "steps": 20, **more}
    if works:
        result = go("run", resume=True, force=True, **asked)
        assert result["steps"] == asked["steps"] and math.isfinite(result["nats_per_token"])
        average = [name for name in load_file(checkpoints("run")[-1]/"training.safetensors") if name.startswith("average")]
        assert bool(average) == bool(asked["ema"])
    else:
        with pytest.raises(TextgenError, match="step-000015 was made with another") as error: go("run", resume=True, force=True, **asked)
        assert "damaged" not in str(error.value) and "delete" not in str(error.value)


def test_other_hardware_is_noted(stopped, capsys):
    path = stopped/"checkpoints/step-000040/training.json"
    place = json.loads(path.read_text())
    place["hardware"]["processor"] = "abacus"
    path.write_text(json.dumps(place))
    go("run", resume=True, keep=3, **ALL)
    assert "step-000040 was made elsewhere (processor abacus, now " in capsys.readouterr().err


def test_a_run_that_another_process_trains(home, nursery):
    slow = "old = trainer.next_step\ndef slowly(*given): import time; time.sleep(0.05); return old(*given)\ntrainer.next_step = slowly"
    busy = nursery.start(typed("run", steps=1000), home, first=slow)
    until(lambda: checkpoints("run"), busy)
    with pytest.raises(UsageError, match="another process is training in run"): go("run", resume=True, steps=1000)
    with pytest.raises(UsageError, match="'run' exists"): go("run", steps=1000)
    pair = nursery.together(typed("run", resume=True, steps=1000), home)
    assert pair[0].wait() == 2 and "another process is training in run" in pair[0].said
    for one in pair: one.kill()
    busy.send(signal.SIGKILL)
    busy.wait()
    go("run", resume=True, steps=1000, force=True, patience=1, evaluate_every=len(losses("run")) + 1)  # a dead one holds no lock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_by_a_signal(number, home, nursery):
    "The first one saves; a second one, which comes while that takes long, ends at once."
    slow = "old = trainer.next_step\ndef slowly(*given): import time; time.sleep(0.02); return old(*given)\ntrainer.next_step = slowly\n"
    born = nursery.start(typed("run", steps=1000, checkpoint_every=1000), home, first=slow)
    until(lambda: len(losses("run")) > 2, born)
    born.send(number)
    assert born.wait() == 130, born.said
    said = born.said.splitlines()[-1]
    assert said.startswith("stopped after step ") and "textgen train --resume --out run" in said and len(checkpoints("run")) == 1
    stuck = slow + "real = runs.train.__globals__\nimport time\ntrainer.usable = lambda run: (print('saving', file=sys.stderr, flush=True), time.sleep(60))"
    born = nursery.start(typed("run", resume=True, steps=1000, checkpoint_every=1000), home, first=stuck)
    until(lambda: len(losses("run")) > 2 and runs.read_lines("run")[-1]["step"] > int(checkpoints("run")[0].name[5:]) + 1, born)
    born.send(number)
    until(lambda: "saving" in born.said, born)
    born.send(number)
    assert born.wait(10) == 130 and born.said.splitlines()[-1].startswith("interrupted; what was saved stays"), born.said
    load(checkpoints("run")[-1])


def test_no_accelerate(home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TextgenError, match=r'pip install "textgen\[processes\]"'): find_place(recipe())


def test_asking_for_the_place_leaves_the_environment(home, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    find_place(recipe())
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


# 7. Looking on changes nothing

@pytest.mark.parametrize("look", [dict(evaluate_every=3), dict(sample__every=2), dict(log_every=7), dict(checkpoint_every=2), dict(keep_best=True),
                                  dict(evaluate_tokens=50), dict(keep=1)], ids=lambda look: ",".join(look))
@pytest.mark.parametrize("more", [{"model__dropout": 0.2}, {"ema": 0.8, "model__dropout": 0.2}, {"lora": {"rank": 2, "alpha": 4, "dropout": 0.2}}],
                         ids=["plain", "average", "lora"])
def test_looking_on_changes_no_loss(look, more, home, monkeypatch):
    "Not a batch, not a loss, not a bit of the weights."
    seen, real = [], trainer.train_step
    def watching(model, optimizers, parts, clip, place):
        found = real(model, optimizers, parts, clip, place)
        seen.append((*(part[0].tolist() for part in parts), found[0].item()))
        return found
    monkeypatch.setattr(trainer, "train_step", watching)
    more = {**more, "steps": 15, "evaluate_every": 15, "checkpoint_every": 15}
    go("plain", **more)
    plain = seen[:]
    seen.clear()
    go("looked", **{**more, **look})
    assert len(plain) == 15 and seen == plain
    for name in ("model", "training"):
        file = f"checkpoints/step-000015/{name}.safetensors"
        assert Path("plain", file).read_bytes() == Path("looked", file).read_bytes()


# 8. Early stopping and the best

WORSENING = dict(optimizer__name="adamw", optimizer__learning_rate=0.3, steps=60, evaluate_every=3, checkpoint_every=4, optimizer__clip=None)


def held_out(path, tokens=None):
    "The held-out loss of a saved model."
    run = started("unused")
    return evaluate(load(path, device="cpu").decoder, run.prepared, 16, tokens=tokens)


def test_patience_ends_the_run_and_the_best_is_handed_on(home):
    result = go("run", patience=3, keep_best=True, **WORSENING)
    scores = [line["validation"]["nats_per_token"] for line in runs.read_lines("run") if "validation" in line]
    assert result["steps"] < 60 and scores[-4] == min(scores) == result["nats_per_token"] and len(scores) > 3
    assert result == json.loads(Path("run/result.json").read_text())
    assert held_out("run").nats_per_token == result["nats_per_token"]
    last = go("last", patience=3, **WORSENING)
    assert last["steps"] == result["steps"] and last["nats_per_token"] == scores[-1] == held_out("last").nats_per_token


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.slow), {"ema": 0.9},
                                  pytest.param({"lora": {"rank": 2, "alpha": 4}}, marks=pytest.mark.slow)], ids=["plain", "average", "lora"])
def test_the_best_survives_a_stop_anywhere(more, home, monkeypatch):
    "Whatever step it is stopped at."
    more = {**WORSENING, **more, "patience": 3, "keep_best": True}
    whole = go("whole", **more)
    for stop in random.Random(3).sample(range(1, whole["steps"]), 3):
        @contextlib.contextmanager
        def after(): yield lambda: len(losses("run")) >= stop
        with monkeypatch.context() as patch, pytest.raises(fitting.Interrupted):
            patch.setattr(runs, "stop_signals", after)
            go("run", **more)
        result = go("run", resume=True, **more)
        assert untimed(result) == untimed(whole) and Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
        shutil.rmtree("run")


@pytest.mark.parametrize("was, now", [(dict(evaluate_every=5), dict(evaluate_every=20)), (dict(keep_best=False), dict()),
                                      (dict(), dict(keep_best=False)), (dict(), dict(evaluate_tokens=100))], ids=str)
def test_the_score_is_of_the_model_that_is_handed_on(was, now, home):
    "Also where the future was given up, and went another way: judged at other steps, on other tokens, or with another wish."
    more = dict(keep_best=True, checkpoint_every=10, evaluate_every=10, keep=9, steps=40)
    run = started(**{**more, **was})
    runs.write_config(run.config, run.folder)
    save = lambda run: save_checkpoint(run) if run.step == 10 else None
    with pytest.raises(fitting.Interrupted): fitting.fit(run, runs.recorder(run), lambda: run.step == 26, save)
    judged = [json.loads(line)["validation"]["nats_per_token"] for line in Path("run/metrics.jsonl").read_text().splitlines() if "validation" in line]
    assert min(judged) == judged[-1]  # the best one is of a step that will not have been
    worse = trainer.train_step
    def spoil(model, *given):  # from here on it gets worse
        done = worse(model, *given)
        for weight in model.parameters(): weight.data.mul_(1.2)
        return done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", spoil)
        result = go("run", resume=True, **{**more, **now})
    assert held_out("run", now.get("evaluate_tokens")).nats_per_token == pytest.approx(result["nats_per_token"], abs=0)


def test_a_lost_record_is_measured_again(home):
    "The score is that of the weights that are handed on, not of the last ones."
    result = go("run", patience=3, keep_best=True, **WORSENING)
    for name in ("metrics.jsonl", "result.json"): Path("run", name).unlink()
    again = go("run", resume=True, patience=3, keep_best=True, **WORSENING)
    assert held_out("run").nats_per_token == again["nats_per_token"]


# 9. What is judged

def test_the_whole_held_out_part_is_judged(home):
    "Each token but the first, once, whatever the batch; a sample is the same one each time."
    result = go("run", evaluate_every=20, evaluate_tokens=None)
    run = started("unused")
    part = run.prepared.split("validation")
    assert result["tokens"] == len(part.tokens) - 1
    decoder, total = load("run", device="cpu").decoder.eval(), 0.0
    for begin in range(0, len(part.tokens) - 1, 16):  # one window after the other, by hand
        window = torch.from_numpy(part.tokens[begin:begin + 17].astype(np.int64))
        with torch.no_grad(): total += torch.nn.functional.cross_entropy(decoder(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert result["nats_per_token"] == pytest.approx(total / result["tokens"], abs=1e-5)
    few = go("few", evaluate_tokens=50)
    assert few["tokens"] == 50 and {line["validation"]["tokens"] for line in runs.read_lines("few") if "validation" in line} == {50}
    assert few["nats_per_token"] == held_out("few", 50).nats_per_token != held_out("few").nats_per_token


# 10. Half precision and its scaler

@pytest.fixture
def halved(home, monkeypatch):
    "float16 on the CPU, where nobody would want it but this test."
    monkeypatch.setattr(train_module, "find_precision", lambda name, device: {"fp16": torch.float16}.get(name))


def overflowing(at):
    "A train_step whose gradient overflows at its at-th call."
    real, count = train_module.train_step, []
    def step(model, optimizers, parts, clip, place):
        count.append(0)
        weight = next(w for w in model.parameters() if w.dim() == 2)
        handle = weight.register_hook(lambda grad: grad * math.inf) if len(count) == at else None
        done = real(model, optimizers, parts, clip, place)
        handle.remove() if handle else None
        return done
    return step


@pytest.mark.parametrize("optimizer, clip", [("adamw", 1.0), ("adamw", None), ("muon", 1.0), ("muon", None)])
def test_an_overflow_moves_nothing_and_halves_the_scale(optimizer, clip, halved):
    "Neither of two optimizers moves, though the gradients of one of them are numbers."
    run = started(precision="fp16", optimizer__name=optimizer, optimizer__clip=clip)
    run.place.scaler._init_scale = 1024.0
    step, (x, y) = overflowing(3), trainer.dealt(run)[0]
    parts = [(torch.from_numpy(x), torch.from_numpy(y))]
    for number in range(1, 6):
        before, scale = [weight.detach().clone() for weight in run.model.parameters()], run.place.scaler.get_scale()
        step(run.learner, run.optimizers, parts, clip, run.place)
        after = list(run.model.parameters())
        assert all(weight.isfinite().all() for weight in after), number
        assert all(map(torch.equal, before, after)) == (number == 3)
        assert run.place.scaler.get_scale() == (scale if number != 3 else scale / 2)
        assert all(weight.grad is None for weight in after)


def test_the_scale_is_in_the_checkpoint(halved, monkeypatch):
    "A run with an overflow on each side of a stop is one without the stop, to the bit."
    more = dict(precision="fp16", steps=20, checkpoint_every=10, model__dropout=0.1)
    monkeypatch.setattr(trainer, "train_step", overflowing(4))
    go("whole", **more)
    scales = [json.loads((path/"training.json").read_text())["scaler"]["scale"] for path in checkpoints("whole")]
    assert scales == [2.0**15] * 2  # half of torch's 65,536
    monkeypatch.setattr(trainer, "train_step", overflowing(4))
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns("step-000020", "result.json"))
    monkeypatch.setattr(trainer, "train_step", train_module.train_step)
    go("parts", resume=True, **more)
    same("whole", "parts")
    with pytest.raises(UsageError, match="precision was 'fp16', not 'fp32'"):
        Path("parts/result.json").unlink()
        go("parts", resume=True, **{**more, "precision": "fp32"})
    shutil.rmtree("parts/checkpoints/step-000020")
    assert math.isfinite(go("parts", resume=True, force=True, **{**more, "precision": "fp32"})["nats_per_token"])


def test_from_full_to_half_precision_by_force(halved):
    "There is no scale in the checkpoint; the scaler begins as it does."
    go("run", steps=10)
    Path("run/result.json").unlink()
    go("run", resume=True, force=True, steps=15, precision="fp16")
    assert json.loads((checkpoints("run")[-1]/"training.json").read_text())["scaler"]["scale"] == 2.0**16


# 11. On a GPU

@pytest.fixture
def repeatable(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_gpu_learns_as_a_cpu_does(home):
    go("cpu"), go("gpu", device="cuda")
    np.testing.assert_allclose(losses("gpu"), losses("cpu"), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu(precision, home):
    go("cpu"), go("gpu", device="cuda", precision=precision)
    np.testing.assert_allclose(losses("gpu"), losses("cpu"), rtol=0, atol=0.1)
    assert losses("gpu") != losses("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_on_a_gpu_with_the_same_bits(precision, optimizer, home, repeatable):
    more = {**ALL, "device": "cuda", "precision": precision, "optimizer.name": optimizer, "log_every": 3}
    go("whole", **more)
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns("step-000040", "result.json"))
    go("parts", resume=True, **more)
    same("whole", "parts")


@pytest.mark.gpu
def test_memory_is_the_gpu_s(home):
    held = torch.ones(2**26, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    result = go("run", steps=3, device="cuda")
    assert 4 * 2**26 <= result["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    del held


# What adds up over many steps

def test_steps_leave_nothing_behind(home):
    "As many tensors are alive after 60 steps as after 20, with all that is watched on the way."
    import gc
    def alive():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    counts, real = {}, trainer.next_step
    def counting(run, batches):
        if run.step in (25, 57): counts[run.step] = alive()
        return real(run, batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "next_step", counting)
        go("run", **{**ALL, "steps": 60})
    assert counts[25] == counts[57]


def test_sums_of_the_record_after_a_torn_line(stopped):
    "Half a line at the end, as a power cut leaves it, is neither read nor followed."
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(stopped/name, "a") as file: file.write('{"step": 41, "nats_per')
    shutil.rmtree(stopped/"checkpoints/step-000040")
    go("run", resume=True, keep=3, **ALL)
    shutil.rmtree("whole/checkpoints/step-000030", ignore_errors=True)
    shutil.rmtree("run/checkpoints/step-000030", ignore_errors=True)
    same("whole", "run")


def test_broken_weights_in_one_part_stop_both(home, nursery):
    "Where each holds a part of the weights, both find out that one of them is no number."
    first = ("old = trainer.next_step\ndef broken(run, batches):\n    loss = old(run, batches)\n    if run.step == 5:\n"
             "        for weight in run.model.parameters(): weight.to_local().data.fill_(float('nan'))\n"
             "    return loss\ntrainer.next_step = broken")
    pair = nursery.together(typed("run", sharded=True), home, firsts=("", first))
    assert [one.wait(30) for one in pair] == [1, 1]
    for one in pair: assert one.said.splitlines()[-1].startswith("error: after step 5 some weights are no numbers"), one.said
    assert not checkpoints("run")


def test_processes_that_see_different_folders_are_stopped(home, nursery):
    "One that goes on from another step than the first one would learn another batch."
    go("run", steps=20)
    Path("run/result.json").unlink()
    first = "real = resume.checkpoints\nresume.checkpoints = lambda folder: real(folder)[:-1]"
    pair = nursery.together(typed("run", resume=True, steps=20), home, firsts=("", first))
    assert pair[1].wait(30) == 1 and "would go on from step 15 of run, and the first one from 20" in pair[1].said
    pair[0].kill()
