"""The order of chunks and the loader over it: every chunk once an epoch whoever takes part, the same from any step on, as random as
a shuffle, and in memory that does not grow with the corpus.

Statistics have fixed seeds, so they give the same verdict every time. `fair` turns χ² into a normal score; |score| < 4 would refuse
one fair shuffle in 16,000, and the test of few rounds shows that what is not fair is found.
"""
import itertools, pickle, tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from textgen.core import UsageError
from textgen.data import Batches, Chunks, _block, _splitmix, batch_order, chunk_at

same_each_time = settings(deadline=None, derandomize=True)


def fair(counts):
    "χ² of counts that should be alike, as a score that is normal where they are (Wilson & Hilferty 1931)."
    counts = np.asarray(counts)
    freedom, mean = counts.size - 1, counts.mean()
    share = ((counts - mean)**2 / mean).sum() / freedom
    return (share**(1/3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom))**0.5


def epochs(n, count, seed=0, rounds=10): return chunk_at(np.arange(n * count), n, seed, rounds).reshape(count, n)


def shuffles(n, count, seed=0): return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


# A permutation

def test_splitmix_is_the_published_one():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _splitmix(np.uint64(1234567), np.arange(1, 6, dtype=np.uint64)).tolist() == known


@same_each_time
@given(n=st.integers(1, 5000), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**63 - 1))
def test_every_chunk_once(n, epoch, seed):
    assert (np.sort(chunk_at(n * epoch + np.arange(n), n, seed)) == np.arange(n)).all()


@same_each_time
@given(n=st.integers(1, 2**40), places=st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_a_place_alone_is_the_place_in_company(n, places):
    chunks = chunk_at(places, n, seed=3)
    assert ((0 <= chunks) & (chunks < n)).all()
    assert chunks.tolist() == [int(chunk_at([place], n, seed=3)[0]) for place in places]


# A fair one

@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_come_equally_often(n):
    _, counts = np.unique(epochs(n, 24_000), axis=0, return_counts=True)
    assert len(counts) == np.prod(range(1, n + 1)) and abs(fair(counts)) < 4


@pytest.mark.parametrize("n", [4, 5])
def test_all_orders_come_equally_often_over_seeds(n):
    orders = np.array([chunk_at(np.arange(n), n, seed) for seed in range(6000)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == np.prod(range(1, n + 1)) and abs(fair(counts)) < 4


@pytest.mark.parametrize("n", [7, 10, 16, 17, 100])
@pytest.mark.parametrize("source", [epochs, shuffles])
def test_chunks_places_and_neighbours(n, source):
    "Each chunk as often first, in each place, and at each distance from the one before; NumPy's shuffle passes the same."
    orders, every = source(n, 20_000), np.arange(n)
    assert abs(fair(np.bincount(orders[:, 0], minlength=n))) < 4
    assert abs(fair(np.bincount((orders * n + every).ravel(), minlength=n * n))) < 4
    assert abs(fair(np.bincount(np.diff(orders).ravel() % n, minlength=n)[1:])) < 4
    slopes = (orders - every.mean()) @ (every - every.mean())  # of place and chunk; sd for a fair shuffle in closed form
    assert abs(slopes.mean()) < 4 * (n**2 * (n + 1)**2 * (n - 1) / 144)**0.5 / len(orders)**0.5


@pytest.mark.parametrize("rounds", [2, 4, 6])
def test_few_rounds_are_found_out(rounds):
    assert fair(np.bincount(np.diff(epochs(16, 20_000, rounds=rounds)).ravel() % 16, minlength=16)[1:]) > 10


@pytest.mark.parametrize("n", [1000, 18_749])
def test_large_ones(n):
    "In twenty parts of the places, twenty parts of the chunks; and as many direct neighbours as a shuffle leaves: about one an epoch."
    orders = epochs(n, 200)
    parts = np.histogram2d(np.tile(np.arange(n), 200), orders.ravel(), bins=20, range=[[0, n], [0, n]])[0]
    sizes = np.histogram(np.arange(n), bins=20, range=[0, n])[0]
    assert abs(fair(parts / np.outer(sizes, sizes) * sizes.mean()**2)) < 4
    assert abs((np.diff(orders) == 1).sum() - 200) < 4 * 200**0.5


def test_epochs_and_seeds_are_independent():
    "How many chunks stand where they stood before: one on average, in the next epoch and under the next seed."
    for other in (epochs(100, 2001)[1:], epochs(100, 2000, seed=1)):
        assert abs((epochs(100, 2000) == other).sum() - 2000) < 4 * 2000**0.5
    assert len(np.unique(epochs(100, 2000)[:, :12], axis=0)) == 2000


# Dealt out

world = dict(n=st.integers(1, 200), size=st.integers(1, 9), ranks=st.integers(1, 5), seed=st.integers(0, 2**32), start=st.integers(0, 2000))


@same_each_time
@given(**world, workers=st.integers(1, 4))
def test_ranks_and_workers_share_an_epoch(n, size, ranks, seed, start, workers):
    "Worker w of a rank makes its batches w, w + workers, ...; in turns and side by side, they are the row of epochs, each chunk once."
    start, steps = start * n, n  # where an epoch begins; ranks * size epochs
    took = np.empty((steps, ranks, size), int)
    for rank, worker in itertools.product(range(ranks), range(workers)):
        loader = Batches(Chunks(np.arange(n + 1), 1), size, seed, start, rank, ranks)
        for i in range(worker, steps, workers): took[i, rank] = loader[i][0][:, 0]
    assert (np.sort(took.reshape(-1, n)) == np.arange(n)).all()
    assert (took.reshape(steps, -1) == [batch_order(n, ranks * size, seed, start + i) for i in range(steps)]).all()


@same_each_time
@given(**world)
def test_resuming_is_the_same_continuation(n, size, ranks, seed, start):
    chunks = Chunks(np.arange(n + 1), 1)
    whole = Batches(chunks, size, seed, rank=ranks - 1, ranks=ranks)
    ahead = itertools.islice(Batches(chunks, size, seed, start, ranks - 1, ranks), 3)
    _block.cache_clear()  # as in another process
    for i, (x, y) in enumerate(ahead):
        assert (x == whole[start + i][0]).all() and (y == whole[start + i][1]).all()


@same_each_time
@given(**world, apart=st.integers(1, 20))
def test_chunks_that_are_apart(n, size, ranks, seed, start, apart):
    "An epoch takes rows at equal distances, each once, from a first one that any process finds; fewer rows than that are one chunk."
    count = max(1, n // apart)
    start = start * count
    loaders = [Batches(Chunks(np.arange(n + 1), 1), size, seed, start, rank, ranks, apart) for rank in range(ranks)]
    took = np.sort(np.array([[loader[i][0][:, 0] for loader in loaders] for i in range(count)]).reshape(-1, count))
    assert (np.diff(took) == apart).all() and (took[:, 0] < apart).all() and took.max() < n


def test_every_beginning_is_as_likely():
    "400 epochs, 8 beginnings: chi-squared below the 99.9th percentile at this seed; and another seed has others."
    firsts = lambda seed: [Batches(Chunks(np.arange(81), 1), 10, seed, apart=8)[epoch][0].min() for epoch in range(400)]
    counts = np.bincount(firsts(1), minlength=8)
    assert len(counts) == 8 and ((counts - 50) ** 2 / 50).sum() < 24.3
    assert firsts(1) != firsts(2)


def test_data_loader_with_workers():
    "torch's DataLoader deals the batches out to processes and gives them in order."
    import torch
    from torch.utils.data import DataLoader
    batches = Batches(Chunks(np.arange(1001, dtype=np.uint16), 10), batch_size=8, seed=3, step=5)
    plain = DataLoader(batches, batch_size=None)
    shared = DataLoader(batches, batch_size=None, num_workers=2)
    for (x, y), alone, together in itertools.islice(zip(batches, plain, shared), 30):
        for ours, one, two in [(x, alone[0], together[0]), (y, alone[1], together[1])]:
            assert one.dtype == two.dtype == torch.int64 and (ours == one.numpy()).all() and (ours == two.numpy()).all()


@same_each_time
@given(stride=st.integers(1, 9), length=st.integers(1, 9), extra=st.integers(0, 60))
def test_windows(stride, length, extra):
    tokens = np.arange(length + 1 + extra)
    chunks = Chunks(tokens, length, stride=stride)
    x, y = chunks.batch(np.arange(len(chunks)))
    starts = range(0, len(tokens) - length, stride)
    assert x.tolist() == [list(range(start, start + length)) for start in starts] and (y == x + 1).all()
    if stride == length: assert len(chunks) == (len(tokens) - 1) // length


def test_chunks_are_sent_without_their_windows():
    "A worker that does not share memory is sent the tokens once, not every window of them."
    batches = Batches(Chunks(np.arange(10_000, dtype=np.uint16), 100, stride=1), 4)
    batches[0]
    sent = pickle.dumps(batches)
    assert len(sent) < 21_000 and (pickle.loads(sent)[7][1] == batches[7][1]).all()


# In constant memory

def peak(n):
    _block.cache_clear()
    tokens = np.broadcast_to(np.uint16(7), n + 1)  # a corpus that takes no room
    tracemalloc.start()
    for _ in itertools.islice(Batches(Chunks(tokens, 1), 32, step=10**6), 300): pass  # more than one block
    try: return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def test_memory_does_not_grow():
    peak(10)  # what is loaded once
    assert peak(10**9) < 1_000_000 and peak(10**9) < 1.1 * peak(10**4)


@pytest.mark.parametrize("wrong, part", [
    ({"n_chunks": 0}, "n_chunks 0, .*: each must be 1 or more"), ({"batch_size": 0}, "batch_size 0 .*: each must be 1 or more"),
    ({"ranks": 0}, "ranks 0: each must be 1 or more"), ({"rank": 2, "ranks": 2}, "rank 2 of 2, .* rank below 2"),
    ({"rank": -1}, "rank -1 of 1"), ({"step": -1}, "steps -256 on: all from 0"), ({"seed": -1}, "seed -1")])
def test_errors(wrong, part):
    with pytest.raises(UsageError, match=part) as caught: batch_order(**{"n_chunks": 7, "batch_size": 3, "seed": 0, "step": 0, **wrong})
    assert "\n" not in str(caught.value)
    if "n_chunks" not in wrong:
        with pytest.raises(UsageError, match=part): Batches(Chunks(np.arange(9), 1), **{"batch_size": 3, **wrong})


def test_what_is_kept_is_not_touched():
    once = batch_order(7, 3, 0, 5)
    again, once[:] = once.copy(), 0
    assert batch_order(7, 3, 0, 5).tolist() == again.tolist() == batch_order(np.int64(7), 3, 0, np.int64(5)).tolist()
