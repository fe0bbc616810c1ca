"""Tests of the kernels by Triton's interpreter, on the CPU. `test_interpreted.py` runs this file in its own process,

since TRITON_INTERPRET has to be set before anything imports Triton.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dico_ray.bench import kernels as kernels_bench
from dico_ray.models import UNITS, create_model, use_kernels
from dico_ray.models.kernels import activation, product
from dico_ray.models.kernels.block import block, block_inference, norm_modulate
from dico_ray.settings import build
from tests.models.kernels import cases

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(2, 5, 7, 70), (1, 12, 4, 33)])
@pytest.mark.parametrize("name", cases.CASES)
def test_a_kernel_computes_what_its_twin_does_in_float64(name: str, shape: cases.Shape) -> None:
    torch.seed()
    cases.CASES[name](cases.Inputs(shape, torch.float32, "cpu"), 2e-5)


@settings(max_examples=7, deadline=None, database=None, phases=[Phase.generate])
@given(name=st.sampled_from(list(cases.CASES)), data=st.data())
def test_at_any_small_size(name: str, data: st.DataObject) -> None:
    sizes = (
        st.integers(1, 3),
        st.integers(1, 6),
        st.integers(1, 6),
        st.integers(8, 40),
    )  # of few channels a LayerNorm leaves nothing but rounding
    shape: cases.Shape = data.draw(st.tuples(*sizes))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    cases.CASES[name](cases.Inputs(shape, torch.float32, "cpu"), 2e-4)


def test_many_programs_share_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a program takes, so that every reduction has both of its stages."""
    from dico_ray.models.kernels import activation, tiles

    for case in cases.CASES.values():
        case(cases.Inputs((1, 17, 9, 11), torch.float32, "cpu"), 2e-5)
    assert tiles.image_rows(1, 17, 9, 11, 16).splits > 1
    assert tiles.whole_channels(1, 153, 11, sums=True).splits > 1
    cuts: list[tiles.Tiles] = []

    def cut(*arguments: int, **named: int) -> tiles.Tiles:
        cuts.append(tiles.channel_blocks(*arguments, **named))
        return cuts[-1]

    monkeypatch.setattr(activation, "channel_blocks", cut)
    for case in cases.CASES.values():
        case(cases.Inputs((1, 17, 9, 11), torch.float32, "cpu"), 2e-5)
    assert min(cut.splits for cut in cuts) > 1


def test_a_product_of_more_rows_of_tiles_than_run_together() -> None:
    shape = (1, 90, 13, 88)
    assert product.TILE_ROWS * product.GROUP < 90 * 13
    assert 2 * product.TILE_COLUMNS < 3 * 88
    assert product.TILE_INNER < 88
    cases.gelu_product(cases.Inputs(shape, torch.float32, "cpu"), 2e-5)


@pytest.mark.parametrize("shape", [(2, 5, 7, 72), (1, 3, 2, 8)])
def test_a_block_without_gradients_whose_product_does_the_gelu(
    shape: cases.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Size] = []
    linear_gelu = product.linear_gelu

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        made.append(weight.shape)
        return linear_gelu(x, weight, bias)

    monkeypatch.setattr(product, "linear_gelu", noted)
    monkeypatch.setattr(product, "LEAST", 0)
    monkeypatch.setattr(product, "DTYPES", (torch.float32,))
    cases.block(cases.Inputs(shape, torch.float32, "cpu"), 2e-5)
    assert made == [(2 * shape[-1], shape[-1])] * 2  # the passes with gradients leave it to the library


def test_a_product_does_the_gelu_where_sizes_and_addresses_let_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def sized(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(rows, inner, dtype=torch.bfloat16), torch.zeros(columns, inner, dtype=torch.bfloat16)

    assert product.pays(*sized(2**10, 2**10, 2**10))
    assert not product.pays(*sized(2**10 - 1, 2**10, 2**10))
    assert not product.pays(*sized(2**10, 2**10 + 8, 2**10))  # a long sum
    monkeypatch.setattr(product, "LEAST", 0)
    x, weight = sized(6, 16, 32)
    assert product.pays(x, weight)
    assert not product.pays(x.float(), weight.float())  # the library's
    assert not product.pays(*sized(6, 16, 36))  # rows of 72 bytes
    assert not product.pays(*sized(6, 12, 32))  # rows of 24 bytes
    moved = torch.zeros(32 * 16 + 1, dtype=torch.bfloat16)[1:].view(32, 16)
    assert not product.pays(x, moved)


def test_the_gelus_integral_is_that_of_erf() -> None:
    x = torch.linspace(-12, 12, 20001).view(1, 1, -1, 3)
    exact = torch.nn.functional.gelu(x.double())
    assert float(((activation.gelu(x) - exact) / x.abs().clamp_min(1)).abs().max()) < 1.2e-7  # fp32's rounding
    small = x.abs() < 5
    assert float(((activation.gelu(x) - exact).abs() / exact.abs().clamp_min(1e-30))[small & (x != 0)].max()) < 0.02


def test_bfloat16_runs() -> None:
    # The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
    cases.block(cases.Inputs((2, 4, 4, 24), torch.bfloat16, "cpu"), 0.06)


def test_the_kernels_bench_times_every_launch_of_a_block() -> None:
    rows = kernels_bench.measure((1, 2, 3, 8), 2, torch.float32, CPU, 1e-6, 1e9)
    assert len({found["kernel"] for found in rows}) == 13
    assert all(found["times"] == pytest.approx(found["us"] / found["bytes_us"]) for found in rows)


def test_a_network_generates_in_inference_mode() -> None:
    torch.manual_seed(0)
    network = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=5).eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.tensor([5])
    with torch.inference_mode():
        expected = network(x, t, y)
        use_kernels(network, "auto", CPU)
        torch.testing.assert_close(network(x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_bit_by_bit() -> None:
    i = cases.Inputs((2, 6, 5, 20), torch.float32, "cpu")
    made = cases.make_block(i, 2)
    made.fused = True
    x, condition, d_out = i.like().requires_grad_(), i.draw(2, 20), i.like()
    first, second = (torch.autograd.grad(made(x, condition), [x, *made.parameters()], d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_every_tensor_of_a_network_by_both_paths() -> None:
    torch.manual_seed(1)
    exact = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=5, class_dropout_prob=0.0).double()
    for parameter in exact.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    x, t, y = torch.randn(2, 4, 4, 8).double(), torch.tensor([3, 900]), torch.tensor([0, 5])
    target = torch.randn(2, 8, 4, 8).double()

    def run(network: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        out = network(x.to(dtype), t, y)
        return [
            out.detach(),
            *torch.autograd.grad((out - target.to(dtype)).square().mean(), list(network.parameters())),
        ]

    want = run(exact, torch.float64)
    for kernels in ("triton", "torch"):
        network = copy.deepcopy(exact).float()
        assert ("Triton" in use_kernels(network, kernels, CPU)) == (kernels == "triton")
        cases.compare(list(run(network, torch.float32)), want, 2e-5)


@pytest.mark.slow
def test_the_operators_are_sound() -> None:
    i = cases.Inputs((2, 3, 5, 6), torch.float32, "cpu")
    made = cases.make_block(i, 2)
    x, modulation = i.like().requires_grad_(), i.draw(2, 36).requires_grad_()
    for keep_gelu in (False, True):
        torch.library.opcheck(block, (x, modulation, made._weights(), keep_gelu))
    torch.library.opcheck(block_inference, (x.detach(), modulation.detach(), [w.detach() for w in made._weights()]))
    torch.library.opcheck(norm_modulate, (x, i.draw(2, 12).requires_grad_()))


@pytest.mark.slow
def test_a_fused_block_compiles_into_one_graph() -> None:
    i = cases.Inputs((2, 4, 4, 6), torch.float32, "cpu")
    made = cases.make_block(i, 2)
    made.fused = True
    x, condition = i.like(), i.draw(2, 6)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition), made(x, condition))


@pytest.mark.parametrize("ratio", [2, 4])
def test_a_block_keeps_what_its_docstring_says(ratio: int) -> None:
    i = cases.Inputs((2, 8, 8, 16), torch.float32, "cpu")
    x, made = i.like().requires_grad_(), cases.make_block(i, ratio)
    for fused, keep_gelu, values in ((True, False, 6), (True, True, 6 + ratio), (False, False, 12 + ratio)):
        made.fused, made.keep_gelu = fused, keep_gelu
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= 4 * x.numel():  # activations are the only tensors of that size
                kept[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = made(x, i.draw(2, 16))
        assert sum(kept.values()) == (values + ratio) * x.numel()
        assert out.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("one_process")
def test_training_steps_by_the_engine_are_those_of_plain_pytorch(stage: int) -> None:
    """DeepSpeed's hooks on the parameters see the gradients of a fused block as those of its layers.

    At stage 3 they also bring a block's weights, and take them away again.
    """
    from dico_ray.training.engine import Engine

    settings = {"global_batch": 4, "micro_batch": 2, "zero_stage": stage, "precision": "fp32", "lr": 1e-2}
    config = build({"train": settings}).train
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])
    found = []
    for kernels in ("triton", "torch"):
        torch.manual_seed(0)
        network = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=5, class_dropout_prob=0.0)
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
        use_kernels(network, kernels, CPU)
        engine = Engine(network, config, CPU, units=UNITS)
        norms = [engine.backward(engine(x, t, y).square().mean()) for _ in range(4)]
        found.append([norm for norm in norms if norm is not None])
        engine.close()
    assert len(found[0]) == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
