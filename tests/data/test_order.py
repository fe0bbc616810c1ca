from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray.data.order import SampleOrder, chunk_sizes, rank_rows

# Sizes that divide each other now and then, and mostly not.
orders = st.builds(
    SampleOrder,
    chunk_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple),
    global_batch=st.integers(1, 20),
    window_samples=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)


def sequence(order: SampleOrder, samples: int) -> np.ndarray:
    """The first keys of the endless sequence."""
    rows = order.window_steps * order.global_batch
    return np.concatenate([order.window_keys(window) for window in range(-(-samples // rows))])[:samples]


@settings(deadline=None, max_examples=150)
@given(order=orders)
def test_every_epoch_holds_every_sample_exactly_once(order: SampleOrder) -> None:
    epochs, n = 3, sum(order.chunk_sizes)
    keys = sequence(order, epochs * n)
    for epoch in range(epochs):
        assert np.array_equal(np.sort(keys[epoch * n : (epoch + 1) * n]), np.arange(n))


@settings(deadline=None, max_examples=100)
@given(order=orders, window=st.integers(0, 1000))
def test_windows_are_whole_batches_and_depend_on_nothing_else(order: SampleOrder, window: int) -> None:
    assert order.window_steps == -(-order.window_samples // order.global_batch)
    keys = order.window_keys(window)
    assert keys.shape == (order.window_steps * order.global_batch,)
    assert keys.dtype == np.int64
    np.random.seed(window)  # the global stream plays no part
    order.window_keys(window + 1)  # nor do other windows
    fresh = SampleOrder(order.chunk_sizes, order.global_batch, order.window_samples, order.seed)
    assert np.array_equal(fresh.window_keys(window), keys)
    assert np.array_equal(fresh.window_flips(window), order.window_flips(window))
    first = window * order.window_steps
    steps = [first, first + order.window_steps - 1]
    assert [order.window_of(step) for step in steps] == [window, window]
    assert order.window_of(first + order.window_steps) == window + 1


def test_another_process_draws_the_same() -> None:
    order = SampleOrder((50,) * 8, 32, 100, 7)
    code = (
        "from dico_ray.data.order import SampleOrder as S; o = S((50,) * 8, 32, 100, 7);"
        "print(o.window_keys(5).tolist(), o.window_flips(5).tolist(), sep='|')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.strip() == f"{order.window_keys(5).tolist()}|{order.window_flips(5).tolist()}"


def test_seeds_epochs_and_windows_differ() -> None:
    sizes, batch, window = (50,) * 16, 100, 200
    n = sum(sizes)
    keys = sequence(SampleOrder(sizes, batch, window, 0), 3 * n).reshape(3, n)
    other = sequence(SampleOrder(sizes, batch, window, 1), n)
    for a, b in ((keys[0], keys[1]), (keys[0], keys[2]), (keys[1], keys[2]), (keys[0], other)):
        # A perfect shuffle leaves one sample of n in its place, on average.
        assert (a == b).sum() < 12
        # Chunks are in another order too: the windows do not hold the same samples.
        assert len(np.intersect1d(a[:window], b[:window])) < window / 2


def test_epochs_within_one_window_differ() -> None:
    """A data set smaller than a window, of one chunk: only the shuffle by sample tells its epochs apart."""
    epochs = sequence(SampleOrder((100,), 50, 400, 0), 400).reshape(4, 100)
    for a in range(4):
        for b in range(a):
            assert (epochs[a] == epochs[b]).sum() < 10


def test_flips_are_fair_coins_and_differ_by_window_and_seed() -> None:
    order = SampleOrder((1000,) * 4, 500, 2000, 3)
    flips = np.stack([order.window_flips(window) for window in range(8)])
    assert set(np.unique(flips)) == {0, 1}
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)
    for a, b in ((flips[0], flips[1]), (flips[0], SampleOrder((1000,) * 4, 500, 2000, 4).window_flips(0))):
        assert abs((a == b).mean() - 0.5) < 4 * 0.5 / np.sqrt(a.size)


def test_a_sample_is_not_always_flipped_alike() -> None:
    order = SampleOrder((64,) * 4, 64, 256, 0)
    seen = np.zeros((40, 256))
    for epoch in range(40):
        seen[epoch, order.window_keys(epoch)] = order.window_flips(epoch)
    assert 0 < seen.mean(0).min() < seen.mean(0).max() < 1
    assert abs(seen.mean() - 0.5) < 0.02


@given(shares=st.integers(1, 6), ranks=st.integers(1, 6), steps=st.integers(1, 5), seed=st.integers(0, 99))
def test_ranks_part_every_global_batch(shares: int, ranks: int, steps: int, seed: int) -> None:
    batch = shares * ranks
    order = SampleOrder((7, 5, 9), batch, steps * batch, seed)
    rows = [rank_rows(order, ranks, rank) for rank in range(ranks)]
    assert {r.shape for r in rows} == {(order.window_steps * shares,)}
    for step in range(order.window_steps):
        mine = [r[step * shares : (step + 1) * shares] for r in rows]
        # In rank order the shares are the batch: a rank's place in the global batch does not depend on the rest.
        assert np.concatenate(mine).tolist() == list(range(step * batch, (step + 1) * batch))


def test_the_global_batches_are_the_same_for_any_number_of_ranks() -> None:
    order = SampleOrder((11, 13, 7, 9), 12, 40, 5)
    keys = order.window_keys(2)
    whole = keys.reshape(order.window_steps, 12)
    for ranks in (1, 2, 3, 4, 6, 12):
        parts = [keys[rank_rows(order, ranks, rank)].reshape(order.window_steps, -1) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)


@given(order=orders, window=st.integers(0, 20))
def test_chunks_of_covers_and_is_no_more_than_needed(order: SampleOrder, window: int) -> None:
    keys = order.window_keys(window)
    chunks = order.chunks_of(keys)
    owner = np.repeat(np.arange(len(order.chunk_sizes)), order.chunk_sizes)
    assert chunks == sorted(set(owner[keys].tolist()))


def test_a_window_reads_few_chunks() -> None:
    """What makes bulk reading cheap: a window touches its share of the chunks, and at most one more at each end."""
    order = SampleOrder((50,) * 64, 100, 500, 0)
    assert all(len(order.chunks_of(order.window_keys(window))) <= 500 // 50 + 1 for window in range(6))


@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=6), size=st.integers(1, 20))
def test_chunks_cut_each_shard_by_itself(counts: list[int], size: int) -> None:
    cut = iter(chunk_sizes(counts, size))
    for count in counts:
        mine = [next(cut) for _ in range(-(-count // size))]
        assert sum(mine) == count
        assert all(part == size for part in mine[:-1])
        assert 1 <= mine[-1] <= size
    assert list(cut) == []


@pytest.mark.parametrize("sizes", [(), (3, 0), (-1,)])
def test_impossible_chunks_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="chunk sizes"):
        SampleOrder(sizes, 4, 8, 0)


def test_batches_mix_nearly_as_well_as_a_perfect_shuffle() -> None:
    """64 chunks of 50 samples, one class a chunk: the worst case for a shuffle by chunks and windows.

    A window of a quarter of the data holds 16 of the 64 classes, so a batch's label entropy cannot exceed
    log2(16) = 4 bits; a perfect shuffle reaches about 5.6. Bound: within 0.25 bits of the window's own limit.
    Displacement: a perfect shuffle moves a sample by a third of the data on average; bound: within a tenth.
    """
    chunks, each, batch = 64, 50, 100
    n = chunks * each
    order = SampleOrder((each,) * chunks, batch, n // 4, 0)
    keys = sequence(order, 4 * n).reshape(4, n)
    entropies = [entropy(part // each) for epoch in keys for part in epoch.reshape(-1, batch)]
    assert np.mean(entropies) > 4 - 0.25
    assert min(entropies) > 3.4
    moved = np.abs(keys - np.arange(n)).mean() / n
    assert abs(moved - 1 / 3) < 1 / 30
    # With a window of all the data it is a perfect shuffle: the same entropy as numpy's, within 0.05 bits.
    whole = sequence(SampleOrder((each,) * chunks, batch, n, 0), n)
    perfect = np.random.default_rng(0).permutation(n)
    means = [np.mean([entropy(p // each) for p in k.reshape(-1, batch)]) for k in (whole, perfect)]
    assert abs(means[0] - means[1]) < 0.05
    assert means[1] > 5.4


def entropy(labels: np.ndarray) -> float:
    """Of the labels' shares, in bits."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def test_neighbours_are_parted() -> None:
    """Of two samples that follow each other in the data set, few follow each other in training."""
    order = SampleOrder((50,) * 64, 100, 800, 1)
    keys = sequence(order, 3200)
    assert (np.diff(keys) == 1).mean() < 0.01
