"""CUDA graphs of the stages: the same numbers as without, whatever comes between."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_ray.models import DiCo, create_model, graph_inference, graph_stages, use_kernels
from dico_ray.settings import build

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def _networks(kernels: str, lend: bool) -> tuple[DiCo, DiCo]:
    """The same network twice; the second one's stages are graphs."""
    torch.manual_seed(0)
    plain = create_model("DiCo-tiny", num_classes=5, class_dropout_prob=0.0)
    for parameter in plain.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    plain = plain.to(GPU, torch.bfloat16)
    use_kernels(plain, kernels, GPU)
    graphed = copy.deepcopy(plain)
    graph_stages(graphed, lend)
    return plain, graphed


def _inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    t, y = torch.randint(1000, (batch,), device=GPU), torch.randint(5, (batch,), device=GPU)
    return torch.randn(batch, 4, 16, 16, device=GPU), t, y


def _equal(plain: DiCo, graphed: DiCo, batch: int = 3) -> None:
    inputs, found = _inputs(batch), []
    for network in (plain, graphed):
        out = network(*inputs)
        out.float().square().mean().backward()
        found.append(out)
    assert torch.equal(*found)
    for (name, one), two in zip(plain.named_parameters(), graphed.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        if "embedder_" in name or name.startswith("y_"):  # summed over the stages in another order
            assert float((one.grad - two.grad).float().norm() / two.grad.float().norm()) < 0.02, name
        else:
            assert torch.equal(one.grad, two.grad), name


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("lend", [False, True])
def test_replays_give_what_plain_passes_give(kernels: str, lend: bool) -> None:
    """Bit by bit, over micro-batches, changed weights, another batch size, and passes without gradients in between."""
    plain, graphed = _networks(kernels, lend)
    for turn in range(4):
        _equal(plain, graphed, batch=2 if turn == 2 else 3)
        graphs = graphed.latent.graphs
        assert graphs
        assert [captured.replays for captured in graphs._captured.values()] == [turn + (turn < 2)] * 5
        if lend:
            for network in (plain, graphed):
                network.zero_grad(set_to_none=True)
        with torch.no_grad():
            inputs = _inputs()
            assert torch.equal(plain(*inputs), graphed(*inputs))
            for one, two in zip(plain.parameters(), graphed.parameters(), strict=True):
                one += 0.01 * torch.randn_like(one)
                two.copy_(one)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_passes_without_gradients_replay_what_plain_ones_give(kernels: str) -> None:
    """Bit by bit: in either mode, over shapes, changed weights and weights that moved; an output stays as it was."""
    plain, graphed = _networks(kernels, lend=True)
    graph_inference(graphed)
    plain.eval(), graphed.eval()
    graphs = graphed.inference_graphs
    assert graphs
    for turn, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)):
        with mode():
            for batch in (3, 2, 3):
                first, second = _inputs(batch), _inputs(batch)
                kept, expected = graphed(*first), plain(*first)
                assert torch.equal(plain(*second), graphed(*second))
                assert torch.equal(kept, expected)
        assert [recorded.out.shape[0] for recorded in graphs._recorded.values()] == [3, 2]
        for one, two in zip(plain.parameters(), graphed.parameters(), strict=True):
            one.data += 0.01 * torch.randn_like(one)
            if turn == 1:
                two.data = one.data.clone()
            else:
                two.data.copy_(one.data)
    with torch.no_grad():
        for batch in range(1, 8):
            inputs = _inputs(batch)
            assert torch.equal(plain(*inputs), graphed(*inputs))
    assert len(graphs._recorded) == 4
    assert graphed(*_inputs()).requires_grad
    graphed.train()
    with torch.no_grad():
        assert torch.equal(plain(*inputs), graphed(*inputs))


def test_weights_that_moved_are_captured_again() -> None:
    plain, graphed = _networks("torch", lend=True)
    _equal(plain, graphed)
    for network in (plain, graphed):
        network.zero_grad(set_to_none=True)
    for one, two in zip(plain.parameters(), graphed.parameters(), strict=True):
        one.data = one.data + 0.01 * torch.randn_like(one)
        two.data = one.data.clone()
    _equal(plain, graphed)


def test_a_backward_pass_that_comes_too_late_is_refused() -> None:
    _, graphed = _networks("torch", lend=True)
    first = graphed(*_inputs()).sum()
    graphed(*_inputs()).sum().backward()
    with pytest.raises(RuntimeError, match="another forward pass"):
        first.backward()


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("stage", "precision", "offload"), [(0, "bf16", False), (0, "fp32", False), (1, "bf16", False), (1, "bf16", True),
                                        (1, "fp32", False), (2, "bf16", False)],
)  # fmt: skip
def test_the_engine_takes_the_same_steps(stage: int, precision: str, offload: bool) -> None:
    """Three steps of four micro-batches, with losses, gradient norms and weights as without graphs."""
    from dico_ray.diffusion.process import Diffusion
    from dico_ray.training.engine import Engine

    train: dict[str, Any] = {
        "zero_stage": stage, "precision": precision, "offload": offload, "global_batch": 8, "micro_batch": 2,
        "num_workers": 1, "lr": 1e-3,
    }  # fmt: skip
    config, curves = build({"train": train}).train, []
    for graphs in (False, True):
        torch.manual_seed(0)
        network, diffusion = create_model("DiCo-tiny", num_classes=5, class_dropout_prob=0.0), Diffusion()
        use_kernels(network, "torch", GPU)
        engine = Engine(network, config, GPU)
        if graphs:
            graph_stages(network, engine.frees_gradients)
        torch.manual_seed(1)
        curve: list[float] = []
        for _ in range(12):
            x, t, y = _inputs(2)
            loss = diffusion.training_losses(engine, x, t, torch.randn_like(x), y=y)["loss"].mean()
            norm = engine.backward(loss)
            curve += [float(loss)] + ([] if norm is None else [float(norm)])
        if graphs:
            captured = network.latent.graphs
            assert captured
            assert [one.replays for one in captured._captured.values()] == [12] * 5
        curves.append(np.array(curve + [float(f.weight.norm()) for f in engine.fragments()]))
        engine.close()
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5 if precision == "fp32" else 1e-3)


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A torch.distributed group of this process alone, on the GPU, unless there is one."""
    import os

    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher's variable
    if dist.is_initialized():
        yield
        return
    file = Path(tmp_path_factory.mktemp("group")) / "store"
    dist.init_process_group("nccl", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
