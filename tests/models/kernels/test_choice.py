from __future__ import annotations

import pytest
import torch

from dico_ray.config import ConfigError
from dico_ray.models import create_model, use_kernels
from dico_ray.models.kernels import choice, tiles
from dico_ray.models.layers import Block

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_triton_on_gpus_and_says_why_not_elsewhere() -> None:
    assert choice.choose("auto", GPU, torch.bfloat16) == (True, "Triton (fused blocks)")
    for device, dtype, why in (
        (CPU, torch.float32, "on cpu, not on a GPU"),
        (GPU, torch.float64, "computes in float64"),
    ):
        fused, line = choice.choose("auto", device, dtype)
        assert not fused
        assert why in line
        with pytest.raises(ConfigError, match=rf"model\.kernels: triton, but .*{why}"):
            choice.choose("triton", device, dtype)
    assert not choice.choose("torch", GPU, torch.bfloat16)[0]


def test_without_triton_plain_pytorch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choice.choose("auto", GPU, torch.bfloat16) == (
        False, "plain PyTorch (the package triton is not installed)",
    )  # fmt: skip


def test_the_choice_reaches_every_block_and_the_head() -> None:
    model = create_model("DiCo-tiny", hidden_size=8, num_classes=3)
    use_kernels(model, "auto", GPU)
    assert all(module.fused for module in model.modules() if isinstance(module, Block))
    assert model.final_layer.fused
    use_kernels(model, "auto", CPU)
    assert not any(getattr(module, "fused", False) for module in model.modules())


@pytest.mark.parametrize("images", [1, 3, 64, 256])
@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 832), (8, 8, 1664), (64, 64, 416), (5, 9, 7)])
def test_programs_cover_every_row_and_sums_are_not_too_many(
    images: int, height: int, width: int, channels: int
) -> None:
    pixels = height * width
    cuts = (
        (tiles.whole_channels(images, pixels, channels, sums=True), pixels, 1),
        (tiles.image_rows(images, height, width, channels, 32), height, None),
        (tiles.image_rows(images, height, width, channels, 16), height, None),
    )
    for cut, rows, across in cuts:
        assert _covers(cut, rows)
        blocks = across or tiles.ceil_div(channels, cut.channels)
        enough = tiles._SUMMING_PROGRAMS if across else tiles._PROGRAMS
        assert cut.splits == 1 or images * blocks * cut.splits <= 2 * enough
    assert _covers(tiles.whole_channels(images, pixels, channels, sums=False), pixels)
    assert _covers(tiles.channel_blocks(pixels, channels, block=128, step=8, turns=4, warps=2), pixels)


def _covers(cut: tiles.Tiles, rows: int) -> bool:
    exact = (cut.splits - 1) * cut.rows < rows <= cut.splits * cut.rows
    return exact and cut.rows % cut.step == 0 and cut.channels & (cut.channels - 1) == 0
