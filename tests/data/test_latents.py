from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dico_ray import demo
from dico_ray.config import ConfigError, UserError
from dico_ray.data.latents import Autoencoder, ChannelwiseGroupNorm, draw_posterior, fill_up
from dico_ray.demo.digits import load_digits

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return Autoencoder(str(demo.VAE), "fp32", CPU)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Sixty-three digits, of all classes: uint8 (63, 32, 32, 3)."""
    return load_digits()[0][::80]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the demo's autoencoder, to be damaged."""
    return Path(shutil.copytree(demo.VAE, tmp_path / "vae"))


def draw(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def means(vae: Autoencoder, pixels: np.ndarray) -> np.ndarray:
    return vae.encode(pixels)[:, : vae.channels].numpy()


def drawn(vae: Autoencoder, pixels: np.ndarray, noise: torch.Tensor) -> np.ndarray:
    return draw_posterior(vae.encode(pixels), noise).numpy()


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, of uint8 pixels."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - wanted).mean()))


def test_sizes_come_from_the_autoencoder(vae: Autoencoder) -> None:
    config = json.loads((demo.VAE / "config.json").read_text())
    assert (vae.channels, vae.factor, vae.scale) == (4, 4, config["scaling_factor"])
    assert vae.scale != 1


def test_digits_survive_encoding_and_decoding(vae: Autoencoder, digits: np.ndarray) -> None:
    latents = means(vae, digits)
    assert (latents.shape, latents.dtype) == ((len(digits), 4, 8, 8), np.float32)
    decoded = vae.decode(torch.from_numpy(latents))
    assert (decoded.shape, decoded.dtype) == (digits.shape, torch.uint8)
    assert decoded.is_contiguous()
    assert psnr(decoded.numpy(), digits) > 25
    # Half precision of the shards costs next to nothing.
    half = vae.decode(torch.from_numpy(latents.astype(np.float16)))
    assert psnr(half.numpy(), decoded.numpy()) > 45


def test_scaled_latents_have_unit_variance(vae: Autoencoder, digits: np.ndarray) -> None:
    latents = drawn(vae, digits, draw((len(digits), 4, 8, 8)))
    assert 0.8 < latents.std() < 1.2
    assert abs(latents.mean()) < 0.1
    assert (np.abs(latents.std((0, 2, 3)) - 1) < 0.3).all()


def test_an_image_s_latents_are_its_own(vae: Autoencoder, digits: np.ndarray) -> None:
    """The same alone as in a batch, and the mirrored image's latents are not the mirrored latents."""
    together = means(vae, digits[:4])
    np.testing.assert_allclose(means(vae, digits[1:2])[0], together[1], atol=1e-4)
    mirrored = means(vae, digits[:4, :, ::-1])
    assert np.abs(mirrored - together[..., ::-1]).max() > 0.05
    assert psnr(vae.decode(torch.from_numpy(mirrored)).numpy(), digits[:4, :, ::-1]) > 22


def test_noise_draws_from_the_posterior(vae: Autoencoder, digits: np.ndarray) -> None:
    noise = draw((8, 4, 8, 8))
    mean = means(vae, digits[:8])
    np.testing.assert_array_equal(drawn(vae, digits[:8], torch.zeros_like(noise)), mean)
    deviation = drawn(vae, digits[:8], torch.ones_like(noise)) - mean
    assert (deviation > 0).all()
    np.testing.assert_allclose(drawn(vae, digits[:8], noise) - mean, deviation * noise.numpy(), atol=1e-5)
    np.testing.assert_array_equal(drawn(vae, digits[:8], noise), drawn(vae, digits[:8], noise))


def test_decoding_truncates_into_the_bytes(vae: Autoencoder) -> None:
    """Latents far outside of the data: pixels are clamped, not wrapped around."""
    wild = draw((2, 4, 8, 8)) * 30
    pixels = vae.decode(wild)
    with torch.inference_mode():
        signed = vae._vae.decode(wild / vae.scale).sample
    wanted = np.floor(np.clip(127.5 * signed.numpy() + 128, 0, 255)).transpose(0, 2, 3, 1)
    assert np.abs(pixels.numpy() - wanted).max() <= 1
    assert (pixels.numpy() == wanted).mean() > 0.999
    assert {0, 255} <= set(pixels.flatten().tolist())


def test_bf16_is_near(vae: Autoencoder, digits: np.ndarray) -> None:
    half = Autoencoder(str(demo.VAE), "bf16", CPU)
    found, wanted = means(half, digits[:4]), means(vae, digits[:4])
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 0.15


def test_fp16_is_nearer_than_bf16(vae: Autoencoder, digits: np.ndarray) -> None:
    wanted = means(vae, digits[:4])
    apart = {p: np.abs(means(Autoencoder(str(demo.VAE), p, CPU), digits[:4]) - wanted).mean() for p in ("bf16", "fp16")}
    assert 0 < apart["fp16"] < apart["bf16"] / 3


def test_what_is_too_large_for_fp16_is_an_error_and_no_picture() -> None:
    half = Autoencoder(str(demo.VAE), "fp16", CPU)
    with pytest.raises(UserError, match=r"codec\.precision: fp16, .* take bf16"):
        half.decode(draw((1, 4, 8, 8)) * 1e7)


def test_a_filled_up_batch_keeps_its_layout() -> None:
    """Code compiled for a layout is not compiled again for the last, short batch."""
    for batch in (torch.randn(3, 4, 8, 8), torch.randn(3, 8, 8, 4).permute(0, 3, 1, 2)):
        filled = fill_up(batch, 5)
        assert filled.shape == (5, 4, 8, 8)
        assert filled.stride() == batch.stride()
        assert torch.equal(filled[:3], batch)
        assert torch.equal(filled[3:], batch[-1:].expand(2, 4, 8, 8))
        assert fill_up(batch, 3) is batch


def test_the_channelwise_norm_keeps_its_digits_beside_a_large_mean() -> None:
    x = draw((2, 32, 16, 16)) + 300
    norm = torch.nn.GroupNorm(8, 32, eps=1e-6)
    wanted = norm.double()(x.double())
    norm.float().__class__ = ChannelwiseGroupNorm
    # x itself has been rounded to 2e-5 of a deviation
    torch.testing.assert_close(norm(x).double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 32, 5, 7), (2, 32, 11), (1, 64, 4, 4)])
def test_the_channelwise_norm_is_the_group_norm(shape: tuple[int, ...]) -> None:
    plain = torch.nn.GroupNorm(8, shape[1], eps=1e-6)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    x = draw(shape) * 3 + 5
    wanted = plain(x)
    plain.__class__ = ChannelwiseGroupNorm
    torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-5)
    half = plain.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_compiled_autoencoder_is_made_once_for_ragged_batches(digits: np.ndarray, precision: str) -> None:
    torch.compiler.reset()
    plain = Autoencoder(str(demo.VAE), "fp32", torch.device("cuda"))
    compiled = Autoencoder(str(demo.VAE), precision, torch.device("cuda"), compiled=True)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for count in (8, 3, 8, 1):
        found, wanted = compiled.encode(digits[:count]), plain.encode(digits[:count])
        assert float((found - wanted)[:, :4].norm() / wanted[:, :4].norm()) < 0.05
        pixels = compiled.decode(wanted[:, :4]).int() - plain.decode(wanted[:, :4]).int()
        assert float(pixels.abs().float().mean()) < 2
    assert graphs["unique_graphs"] == before + 2  # encoder and decoder


def test_description_is_stable_and_its_hash_is_of_the_weights(vae: Autoencoder, copy: Path) -> None:
    told = vae.describe()
    assert told == {**Autoencoder(str(copy), "fp32", CPU).describe(), "vae": str(demo.VAE)}
    assert told == json.loads(json.dumps(told))
    assert told == Autoencoder(str(demo.VAE), "bf16", CPU).describe()  # of the weights as they are stored
    assert (told["scale"], told["factor"], len(told["hash"])) == (vae.scale, vae.factor, 32)
    weights = load_file(copy / WEIGHTS)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, copy / WEIGHTS)
    assert Autoencoder(str(copy), "fp32", CPU).describe()["hash"] != told["hash"]


@pytest.mark.parametrize("path", ["/no/such/vae", "./no-such-vae", "~/no-such-vae"])
def test_a_missing_folder_is_a_wrong_setting(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^codec\.vae: {path} is not a folder; name a diffusers"):
        Autoencoder(path, "fp32", CPU)


@pytest.mark.parametrize("damage", ["no weights", "no config", "no json", "torn"])
def test_a_damaged_autoencoder_is_a_wrong_setting(copy: Path, damage: str) -> None:
    if damage == "no weights":
        (copy / WEIGHTS).unlink()
    elif damage == "no config":
        (copy / "config.json").unlink()
    elif damage == "no json":
        (copy / "config.json").write_text("{")
    else:
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    refused(copy)


def test_weights_that_do_not_fit_the_config(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    weights["quant_conv.bias"] = torch.zeros(7)
    save_file(weights, copy / WEIGHTS)
    refused(copy)


def test_weights_that_are_not_all_there(copy: Path) -> None:
    """Otherwise the missing ones would be random: other latents each time, and a warning that nobody reads."""
    weights = load_file(copy / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, copy / WEIGHTS)
    refused(copy)


def refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^codec\.vae: .*{folder}") as caught:
        Autoencoder(str(folder), "fp32", CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_the_moments_are_the_posterior_s_mean_and_log_variance(vae: Autoencoder, digits: np.ndarray) -> None:
    images = torch.from_numpy(digits[:4]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        posterior = vae._vae.encode(images).latent_dist
    mean, log_variance = vae.encode(digits[:4]).chunk(2, dim=1)
    np.testing.assert_allclose(mean, posterior.mean * vae.scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((log_variance / 2).exp(), posterior.std * vae.scale, rtol=1e-5)
