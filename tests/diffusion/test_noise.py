from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray.diffusion import Stream
from dico_ray.diffusion.noise import bernoulli, integers, normal, philox

# Counter, key and result, from the known-answer file of the authors' library, Random123.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEED = 0x123456789ABCDEF0
ROWS = torch.arange(64)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str):
    # A batch of them: vectorised and scalar code of the processor must agree.
    c0, c1, c2, c3 = (torch.full((37,), word) for word in words(counter))
    k0, k1 = words(key)
    for actual, expected in zip(philox(c0, c1, c2, c3, k0, k1), words(result), strict=True):
        assert torch.equal(actual, torch.full((37,), expected))


def reference_words(seed: int, stream: int, step: int, row: int, block: int) -> list[int]:
    """Philox once more, in Python's whole numbers, with the counter's layout as the module documents it."""
    c = [block, row, step % 2**32, stream + (step // 2**32) * 2**16]
    k = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        p0, p2 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p2 // 2**32) ^ c[1] ^ k[0], p2 % 2**32, (p0 // 2**32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_normal_is_box_muller_of_the_documented_counters():
    step, rows = 5 + 7 * 2**32, [0, 3, 2**32 - 1]
    values = normal(SEED, Stream.POSTERIOR, step, torch.tensor(rows), (2, 3))
    for row, actual in zip(rows, values, strict=True):
        raw = [w for block in (0, 1) for w in reference_words(SEED, Stream.POSTERIOR, step, row, block)]
        uniform = np.array([w if w < 2**31 else 2**32 - 1 - w for w in raw]) * 4.6566127342e-10
        radius = np.sqrt(-2 * np.log(np.maximum(uniform[0::2], 1e-7)))
        angle = 2 * np.pi * uniform[1::2]
        expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:6]
        np.testing.assert_allclose(actual.numpy().ravel(), expected, atol=2e-6)


def test_integers_and_bernoulli_use_the_first_word():
    first = torch.tensor([reference_words(SEED, Stream.TIMESTEP, 9, row, 0)[0] for row in range(64)])
    assert torch.equal(integers(SEED, Stream.TIMESTEP, 9, ROWS, 1000), first * 1000 // 2**32)
    assert torch.equal(bernoulli(SEED, Stream.TIMESTEP, 9, ROWS, 0.25), first < 2**30)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    elements=st.integers(1, 41),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**48 - 1),
)
def test_any_split_of_the_rows_gives_the_values_of_the_whole(
    rows: list[int], cuts: list[int], elements: int, seed: int, step: int
):
    whole = torch.tensor(rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [whole[a:b] for a, b in pairwise(edges)]
    for draw in (
        lambda r: normal(seed, Stream.NOISE, step, r, (elements,)),
        lambda r: integers(seed, Stream.TIMESTEP, step, r, 1000),
        lambda r: bernoulli(seed, Stream.LABEL_DROP, step, r, 0.1),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))


def test_a_longer_row_begins_with_the_shorter_one():
    long, short = (normal(SEED, Stream.NOISE, 0, ROWS, (n,)) for n in (100, 37))
    assert torch.equal(long[:, :37], short)


def test_normal_values_are_standard_normal():
    values = normal(SEED, Stream.NOISE, 0, torch.arange(1000), (4, 8, 8)).double()
    n = values.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        # five standard errors
        assert abs((values**power).mean().item() - expected) < 5 * (variance / n) ** 0.5
    # neighbours, and values whose blocks or rows are neighbours, are uncorrelated
    flat = values.flatten(1)
    for other in (flat.roll(1, 1), flat.roll(2, 1), flat.roll(4, 1), flat.roll(1, 0)):
        assert abs((flat * other).mean().item()) < 5 / n**0.5


def test_integers_are_even_over_their_range():
    draws = integers(SEED, Stream.TIMESTEP, 0, torch.arange(50_000), 10)
    counts = torch.bincount(draws, minlength=10)
    assert len(counts) == 10
    assert (counts - 5000).abs().max() < 5 * (5000 * 0.9) ** 0.5
    assert (integers(SEED, Stream.TIMESTEP, 0, ROWS, 1) == 0).all()
    assert integers(SEED, Stream.TIMESTEP, 0, ROWS, 2**31 - 1).min() >= 0


def test_bernoulli_has_its_probability():
    rows = torch.arange(50_000)
    share = bernoulli(SEED, Stream.LABEL_DROP, 0, rows, 0.1).double().mean().item()
    assert abs(share - 0.1) < 5 * (0.09 / 50_000) ** 0.5
    assert not bernoulli(SEED, Stream.LABEL_DROP, 0, rows, 0.0).any()
    assert bernoulli(SEED, Stream.LABEL_DROP, 0, rows, 1.0).all()


def test_shapes_and_dtypes():
    values = normal(0, Stream.NOISE, 0, ROWS, (4, 3, 5))
    assert (values.shape, values.dtype) == ((64, 4, 3, 5), torch.float32)
    assert values.is_contiguous()
    assert normal(0, Stream.NOISE, 0, ROWS[:0], (4, 8)).shape == (0, 4, 8)
    assert integers(0, Stream.NOISE, 0, ROWS, 5).dtype == torch.int64
    assert bernoulli(0, Stream.NOISE, 0, ROWS, 0.5).dtype == torch.bool


def test_every_part_of_the_address_matters():
    base = normal(1, Stream.NOISE, 1, ROWS, (64,))
    others = [normal(seed, Stream.NOISE, 1, ROWS, (64,)) for seed in (2, 1 + 2**32, 1 + 2**63)]
    others += [normal(1, Stream.NOISE, step, ROWS, (64,)) for step in (0, 2, 1 + 2**32, 1 + 2**47)]
    others += [normal(1, stream, 1, ROWS, (64,)) for stream in Stream if stream != Stream.NOISE]
    others += [normal(1, Stream.NOISE, 1, ROWS + 64, (64,))]
    for other in others:
        # Of 4096 float32 values a few recur by chance; the same stream shifted would bring back most.
        assert torch.isin(other, base).sum() < 20


@pytest.mark.parametrize(
    ("seed", "step", "match"),
    [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "step"), (0, 2**48, "step")],
)
def test_refuses_addresses_outside_their_range(seed: int, step: int, match: str):
    with pytest.raises(ValueError, match=match):
        normal(seed, Stream.NOISE, step, ROWS, (4,))


def test_refuses_impossible_arguments():
    for high in (0, 2**31):
        with pytest.raises(ValueError, match="high"):
            integers(0, Stream.TIMESTEP, 0, ROWS, high)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p is"):
            bernoulli(0, Stream.LABEL_DROP, 0, ROWS, p)


TRITON_TWIN = """
import torch, triton, triton.language as tl
from dico_ray.diffusion.noise import Stream, normal, philox

@triton.jit
def draw(words, values, seed, row, step, stream, N: tl.constexpr):
    block = tl.arange(0, N).to(tl.uint32)
    zero = block * 0
    row, step, stream = zero + row.to(tl.uint32), zero + step.to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, row, step, stream)
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    at = tl.arange(0, N) * 4
    tl.store(words + at, w0.to(tl.int64)); tl.store(words + at + 1, w1.to(tl.int64))
    tl.store(words + at + 2, w2.to(tl.int64)); tl.store(words + at + 3, w3.to(tl.int64))
    tl.store(values + at, n0); tl.store(values + at + 1, n1)
    tl.store(values + at + 2, n2); tl.store(values + at + 3, n3)

seed, row, step, n = 0x123456789ABCDEF0, 4_000_000_000, 3_000_000_000, 256
words, values = torch.zeros(n, 4, dtype=torch.int64), torch.zeros(n, 4)
draw[(1,)](words, values, seed, row, step, int(Stream.NOISE), N=n)
blocks = torch.arange(n)
counters = [torch.full_like(blocks, c) for c in (row, step, int(Stream.NOISE))]
expected = torch.stack(philox(blocks, *counters, seed & 0xFFFFFFFF, seed >> 32), dim=1)
assert torch.equal(words, expected), (words[:2], expected[:2])
twin = normal(seed, Stream.NOISE, step, torch.tensor([row]), (n, 4))[0]
assert (twin - values).abs().max() < 4e-6, (twin - values).abs().max()
print("agree")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_draws_the_same_bits(tmp_path: Path):
    # Interpreted on the CPU, and from a file: Triton reads its kernels' source.
    script = tmp_path / "twin.py"
    script.write_text(TRITON_TWIN)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.strip() == "agree", run.stderr[-2000:]
