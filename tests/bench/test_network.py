from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from dico_ray import cli
from dico_ray.bench import classes, kernels, network, rival
from dico_ray.bench.released import PlainDiCo
from dico_ray.config import ConfigError, Model
from dico_ray.models import create_model
from dico_ray.settings import build

TINY = ["--model.name", "DiCo-tiny", "--model.hidden_size", "16", "--model.depths", "[1,1,1,1,1]",
        "--model.latent_size", "8", "--model.num_classes", "10", "--resources.accelerator", "cpu"]  # fmt: skip
CPU = torch.device("cpu")


def test_the_plain_network_computes_what_ours_does_gradients_included() -> None:
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=5, class_dropout_prob=0.0).double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    plain, weights = PlainDiCo(model), list(model.parameters())
    x, t, y = torch.randn(2, 4, 8, 4).double(), torch.tensor([7, 800]), torch.tensor([5, 1])
    ours, theirs = model(x, t, y), plain(x, t, y)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), weights) for out in (ours, theirs)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(other, mine, rtol=1e-8, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("verb", ["train", "forward"])
def test_every_way_that_runs_here_has_a_row_and_the_others_say_why(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    own = ["--variants", "[released,eager,fused]", "--micro_batches", "[2,4]", "--seconds", "0.01", "--json", str(file)]
    assert cli.main(["bench", verb, *TINY, *own, "--train.global_batch", "8"]) == 0
    figures = json.loads(file.read_text())
    for found in figures["rows"][:4]:
        assert found["images_per_s"] > 0
        assert found["difference"] < 1e-5
        assert found["classes"]["matrix products"] > 0
    assert [found["micro_batch"] for found in figures["rows"]] == [2, 4] * 3
    assert all("not on a GPU" in found["failed"] for found in figures["rows"][4:])
    assert figures["measured"] == []  # those are of GPUs
    rows = network.measured(0 if verb == "train" else 1, figures["rows"], "NVIDIA A100-SXM4-80GB")
    fields = {
        "model",
        "gpu",
        "what",
        "micro_batch",
        "images_per_s",
        "tflops",
        "memory_gb",
        "versions",
        "command",
        "date",
    }
    assert [set(found) for found in rows] == [fields] * 4
    words = "training, bare loop" if verb == "train" else "forward, bf16"
    assert (rows[2]["what"], rows[2]["gpu"]) == (f"{words}, layer by layer", "A100")
    text = capsys.readouterr().out
    assert "matrix products" in text
    if verb == "train":
        assert [found["accumulate"] for found in figures["rows"][:2]] == [4, 2]
        assert figures["rows"][0]["classes"]["optimizer"] > 0
        assert figures["rows"][0]["classes"]["EMA"] > 0


@pytest.mark.ray
def test_the_engine_is_one_of_the_ways(tmp_path: Path) -> None:
    """DeepSpeed's toll is the difference between two rows. Its process has no torch.distributed group, as a user's."""
    file = tmp_path / "figures.json"
    own = ["--variants", "eager,engine", "--micro_batches", "[2,1]", "--seconds", "0.01", "--json", str(file)]
    words = ["bench", "train", *TINY, *own, "--train.global_batch", "4", "--train.zero_stage", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "dico_ray.cli", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    bare, _, engine, other = json.loads(file.read_text())["rows"]
    assert (other["micro_batch"], other["accumulate"]) == (1, 4)
    assert engine["images_per_s"] > 0
    assert (bare["accumulate"], engine["accumulate"]) == (2, 2)
    assert engine["what"].startswith("training, engine at ZeRO-2 with EMA, plain PyTorch")
    assert engine["difference"] < 1e-5
    assert engine["classes"]["matrix products"] > 0


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="--variants fastest: take some of released, eager"):
        network.check_variants(["eager", "fastest"])
    with pytest.raises(ConfigError, match="--variants engine"):
        network.check_variants(["engine"], without=("engine",))


def test_the_kernels_bench_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", *TINY])
    assert "not on a GPU" in capsys.readouterr().err
    config = build({"model": {"name": "DiCo-H"}})
    shapes = [(64, 32, 32, 416), (64, 16, 16, 832), (64, 8, 8, 1664), (64, 32, 32, 832)]
    assert kernels.stage_shapes(config, 64) == shapes


def test_a_way_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(variant: str, batch: int, expected: torch.Tensor) -> dict:
        raise torch.OutOfMemoryError

    config = build({"model": {"hidden_size": 8, "depths": [1] * 5, "latent_size": 8, "num_classes": 3}})
    rows = network.each_way(config, CPU, ["eager"], [64], measure)
    assert rows == [{"variant": "eager", "micro_batch": 64, "failed": "out of memory"}]
    assert "eager         64  out of memory" in capsys.readouterr().out


def test_the_rival_is_dit_xl_2_and_answers_as_a_dico_does() -> None:
    # 118.64 billion multiply-adds at 32x32 latents: arXiv 2212.09748, table 1 (there called flops).
    assert rival.forward_flops(Model.model_validate({})) == pytest.approx(2 * 118.64e9, rel=0.01)
    small = rival.DiT(Model.model_validate({"latent_size": 8, "num_classes": 5}), layers=1, heads=1)
    small.compile_blocks()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5])
    with torch.compiler.set_stance("force_eager"):
        assert small(x, t, y).shape == (2, 8, 8, 8)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void conv2d_c1_k1_nhwc_kernel<__nv_bfloat16>", "depthwise"),
        ("_depthwise_backward", "depthwise"),
        ("_adaln_forward", "normalisation and modulation"),
        ("triton_red_fused_add_mul_native_layer_norm_3", "normalisation and modulation"),
        ("_gelu_backward", "elementwise"),
        ("triton_poi_fused_gelu_2", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "reductions"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void multi_tensor_apply_kernel<TernaryOpScalarFunctor<float>, LerpFunctor>", "EMA"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16", "communication"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kernels_are_told_by_their_names(name: str, kind: str) -> None:
    assert classes.class_of(name) == kind


def test_idle_time_is_what_no_kernel_covers() -> None:
    spans = (("nvjet_a", 0, 4000), ("ncclDevKernel", 3000, 6000), ("_adaln_forward", 8000, 9000))
    events = [FunctionEvent(i, name, 0, start, stop) for i, (name, start, stop) in enumerate(spans)]
    assert classes._kernels(events) == {
        "matrix products": 4.0, "communication": 3.0, "normalisation and modulation": 1.0, "idle": 2.0,
    }  # fmt: skip
