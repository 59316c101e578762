"What Muon must keep to that its chapter need not show: saving and loading, company and order, what it skips and what it refuses."
import copy, io, subprocess, sys

import numpy as np
import pytest
import torch

from textgen import muon
from textgen.core import UsageError
from textgen.muon import Muon, polar_express

JORDAN = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 8), (8, 24), (8, 8), (40, 8), (8, 8), (128, 128), (64, 256)]


def matrices(seed=0, shapes=SHAPES, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in shapes]
    return give_gradients(weights, seed + 1)


def give_gradients(weights, seed):
    draw = torch.Generator().manual_seed(seed)
    for weight in weights: weight.grad = torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    return weights


def same(a, b): return all(map(torch.equal, a, b))


def groups(weights): return [{"params": weights[:1], "parts": 3}, {"params": weights[1:]}]


def test_resumes_bitwise():
    "Four steps in a row are two steps, a file, and two steps."
    straight = matrices()
    optimizer = Muon(groups(straight), weight_decay=0.1)
    for step in range(2): give_gradients(straight, step); optimizer.step()
    resumed = [torch.nn.Parameter(w.detach().clone()) for w in straight]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = Muon(groups(resumed), lr=1.0)  # its own settings give way to those saved
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(2, 4):
        for weights, muon_ in [(straight, optimizer), (resumed, again)]: give_gradients(weights, step); muon_.step()
    assert same(straight, resumed)
    assert all(list(state) == ["momentum_buffer"] for state in again.state.values()) and len(again.state) == len(SHAPES)
    assert all(again.state[w]["momentum_buffer"].shape == w.shape for w in resumed)


def test_order_does_not_matter():
    "The same matrices in another order move by the same bits: their company is the same."
    forward, backward = matrices(), matrices()
    Muon(forward).step()
    Muon(backward[::-1]).step()
    assert same(forward, backward)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 4 / 256)])
def test_company_matters_little(dtype, tolerance):
    "Alone or with others: the stacked product may add up in another order, so only rounding may differ."
    together, alone = matrices(dtype=dtype), matrices(dtype=dtype)
    Muon(together).step()
    for weight in alone: Muon([weight]).step()
    for a, b, start in zip(together, alone, matrices(dtype=dtype)): assert (a - b).norm() <= tolerance * (a - start).norm()


def test_parts_move_as_matrices_do():
    whole, cut = matrices(shapes=[(24, 8)])[0], []
    for part in whole.detach().clone().chunk(3): cut.append(torch.nn.Parameter(part))
    for part, part.grad in zip(cut, whole.grad.chunk(3)): pass
    Muon([{"params": [whole], "parts": 3}], weight_decay=0.1).step()
    Muon(cut, weight_decay=0.1).step()
    assert torch.equal(whole, torch.cat(cut))


def test_groups_of_one_shape_keep_their_settings():
    "They share a stack where they can, and each has its own rate, decay, momentum and coefficients."
    settings = [{"lr": 0.1}, {"weight_decay": 0.5}, {"momentum": 0.5}, {"nesterov": False}, {"coefficients": JORDAN}, {"steps": 3}]
    weights = matrices(shapes=[(16, 8)] * len(settings))
    alone = matrices(shapes=[(16, 8)] * len(settings))
    optimizer = Muon([{"params": [w], **s} for w, s in zip(weights, settings)])
    ones = [Muon([w], **s) for w, s in zip(alone, settings)]
    for step in range(3):
        for given in (weights, alone): give_gradients(given, step)
        optimizer.step()
        for one in ones: one.step()
    for a, b, start in zip(weights, alone, matrices(shapes=[(16, 8)] * len(settings))):
        assert (a - b).norm() <= 4 / 256 * (a - start).norm()


def test_no_gradient_no_step():
    weights = matrices()
    before = copy.deepcopy(weights[2]).detach()
    weights[2].grad = None
    optimizer = Muon(weights, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(weights[2], before) and weights[2] not in optimizer.state
    assert not torch.equal(weights[4], matrices()[4])
    for weight in weights: weight.grad = None
    assert optimizer.step() is None


def test_rate_is_read_at_each_step():
    weights = matrices(dtype=torch.float64)
    optimizer = Muon(weights)
    before = [w.detach().clone() for w in weights]
    steps = []
    for rate in (0.02, 0.0, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        steps.append([(w.detach() - b).norm().item() for w, b in zip(weights, before)])
        before = [w.detach().clone() for w in weights]
    assert not any(steps[1]) and steps[0] == pytest.approx([2 * step for step in steps[2]], rel=1e-9)


def test_closure():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([weight])
    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 16 and weight.sum() < 16


def test_no_gradient_at_all_stays_finite():
    "A matrix whose gradient is zero stays where it is."
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight]).step()
    assert torch.equal(weight, torch.ones(4, 4))


@pytest.mark.parametrize("fast", [True, False])
def test_as_torch(fast, monkeypatch):
    "As torch.optim.Muon, in bfloat16 and in float32; the latter differs by torch's rounding to bfloat16."
    monkeypatch.setattr(muon, "fast_bfloat16", lambda device: fast)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs, exact = matrices(), matrices(), matrices(dtype=torch.float64)
    for weight, true in zip(ours, exact): true.data, true.grad = weight.data.double(), weight.grad.double()
    optimizers = [Muon(ours, coefficients=JORDAN, **settings), Muon(exact, coefficients=JORDAN, **settings),
                  torch.optim.Muon(theirs, adjust_lr_fn="original", **settings)]
    for _ in range(3):
        for optimizer in optimizers: optimizer.step()
    for a, b, c, start in zip(ours, theirs, exact, matrices()):
        length = (b - start).norm()
        assert (a - b).norm() <= (4 if fast else 8) / 256 * length
        assert (a - c).norm() <= (8 / 256 if fast else 1e-4) * length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_weights(dtype):
    "Weights of 16 bits move, too, and their momentum is of their kind."
    weights = matrices(dtype=dtype)
    optimizer = Muon(weights)
    optimizer.step()
    for weight, start in zip(weights, matrices(dtype=dtype)):
        assert weight.isfinite().all() and not torch.equal(weight, start)
        assert optimizer.state[weight]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("params, settings, message", [
    ([torch.zeros(3)], {}, "shape (3,)"),
    ([torch.zeros(3, 3, 3)], {}, "give it to AdamW"),
    ([{"params": [torch.zeros(8, 8)], "parts": 3}], {}, "cannot be cut into 3 equal parts"),
    ([{"params": [torch.zeros(8, 8)], "parts": 0}], {}, "cannot be cut into 0 equal parts"),
    ([torch.zeros(8, 8)], {"lr": -1}, "lr is out of range: -1"),
    ([torch.zeros(8, 8)], {"momentum": 1.0}, "momentum is out of range"),
    ([torch.zeros(8, 8)], {"weight_decay": -0.1}, "weight_decay is out of range"),
    ([torch.zeros(8, 8)], {"steps": 0}, "steps is out of range"),
    ([torch.zeros(8, 8)], {"coefficients": (1.0, 2.0)}, "three numbers"),
])
def test_refuses(params, settings, message):
    with pytest.raises(UsageError) as error: Muon(params, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lower", [1e-2, 1e-3, 1e-5])
def test_polar_express_keeps_its_promise(lower):
    "Each polynomial maps the interval into the next one; with steps enough the interval is a point."
    x = np.geomspace(lower, 1, 10_000)
    worst = 1.0
    for a, b, c in polar_express(16, lower=lower, safety=1.0):
        x = a * x + b * x**3 + c * x**5
        assert x.min() > 0 and abs(1 - x).max() <= worst + 1e-9
        worst = abs(1 - x).max()
    assert worst < 1e-9


@pytest.mark.gpu
def test_on_a_gpu(device="cuda"):
    "A GPU's steps are the CPU's but for rounding, and torch's on the same GPU."
    starts, exact = matrices(), matrices(dtype=torch.float64)
    weights, theirs = ([torch.nn.Parameter(w.detach().to(device, copy=True)) for w in starts] for _ in range(2))
    for a, b, true, start in zip(weights, theirs, exact, starts):
        true.data, true.grad = start.data.double(), start.grad.double()
        a.grad = b.grad = start.grad.to(device)
    optimizers = [Muon(weights, coefficients=JORDAN), Muon(exact, coefficients=JORDAN),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="original")]
    for _ in range(3):
        for optimizer in optimizers: optimizer.step()
    for a, b, true, start in zip(weights, theirs, exact, starts):
        length = (true - start).norm().item()
        assert (a.cpu() - true).norm() <= 8 / 256 * length and (a - b).norm() <= 4 / 256 * length


SPREAD = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from textgen.muon import Muon
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh, draw = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
starts = [torch.randn(shape, generator=draw) for shape in [(24, 8), (8, 16), (5, 8)]]  # 5 rows are dealt out as 3 and 2
plain = [torch.nn.Parameter(w.clone()) for w in starts]
spread = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in starts]
made = [Muon([{"params": w[:1], "parts": 3}, {"params": w[1:]}], weight_decay=0.1) for w in (plain, spread)]
for step in range(3):
    for a, b in zip(plain, spread):
        a.grad = torch.randn(a.shape, generator=draw)
        b.grad = distribute_tensor(a.grad, mesh, [Shard(0)])
    for optimizer in made: optimizer.step()
for a, b in zip(plain, spread):
    assert torch.equal(a, b.full_tensor()), "other bits"
    assert b.placements == made[1].state[b]["momentum_buffer"].placements == (Shard(0),)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_spread_over_two_processes(tmp_path):
    "Where each process holds some rows of a matrix, the bits are those of one process."
    running = [subprocess.Popen([sys.executable, "-c", SPREAD, str(rank), str(tmp_path/"meet")], stderr=subprocess.PIPE, text=True)
               for rank in range(2)]
    try:
        for process in running:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in running: process.kill()
