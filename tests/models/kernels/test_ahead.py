from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from tests.models.kernels import ahead  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "ratio"),
    [
        ((64, 32, 32, 416), 4),
        ((64, 16, 16, 832), 4),
        ((64, 8, 8, 1664), 2),
        ((64, 8, 8, 3328), 2),
        ((16, 64, 64, 128), 2),
    ],
)
def test_every_launch_compiles_for_an_h100_and_keeps_its_numbers_in_registers(
    shape: tuple[int, int, int, int],
    ratio: int,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = ahead.Compiled(monkeypatch)
    ahead.launch_all(shape, ratio, dtype)
    assert len(compiled) > 10
    products = sum(name.startswith("product.") for name, _ in compiled)
    assert products == (dtype == torch.bfloat16 and shape[-1] <= 1024)  # the others stay with the library
    for name, kernel in compiled:
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
        assert found, usage.stdout
        assert int(found[1]) <= 255, name
        # On the GPU the cuts that spill a little in the backward norm were faster than those that do not.
        assert int(found[2]) <= (80 if dtype == torch.bfloat16 else 336), f"{name} spills {found[2]} bytes a thread"
        assert found[3] == "0", name
        assert kernel.metadata.shared <= 227 * 1024, name
        if name.startswith("product."):
            assert "wgmma.mma_async" in kernel.asm["ptx"], name
            assert "cp.async.bulk.tensor" in kernel.asm["ptx"], name
            assert found[2] == "0", f"{name} spills {found[2]} bytes a thread"
            assert int(found[1]) <= 128, name
            assert kernel.metadata.shared <= 227 * 1024 // 2, f"{name}: two programs do not fit a multiprocessor"
        if "_depthwise_backward" in name:  # Triton once took one of the values that its loop hands on for a constant
            handed_on = re.search(r"scf\.for .* iter_args\((.*?)\) ->", kernel.asm["ttir"])
            assert handed_on
            assert handed_on[1].count("=") == 15, "rows above, here: 4; taps 9; bias; x"
