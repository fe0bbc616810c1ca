from __future__ import annotations

import torch
import torch.nn.functional as F

from dico_ray.models import layers


def nhwc(batch: int, height: int, width: int, channels: int) -> torch.Tensor:
    return torch.randn(batch, height, width, channels, dtype=torch.float64)


def test_pixel_unshuffle_and_shuffle_have_the_channel_order_of_torch():
    x = nhwc(2, 4, 8, 12)
    nchw = x.permute(0, 3, 1, 2)
    assert torch.equal(layers.pixel_unshuffle(x), F.pixel_unshuffle(nchw, 2).permute(0, 2, 3, 1))
    assert torch.equal(layers.pixel_shuffle(x), F.pixel_shuffle(nchw, 2).permute(0, 2, 3, 1))
    assert torch.equal(layers.pixel_shuffle(layers.pixel_unshuffle(x)), x)


def test_pointwise_equals_a_1x1_convolution():
    layer, x = layers.Pointwise(6, 10).double(), nhwc(2, 4, 8, 6)
    expected = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)


def test_convolutions_keep_the_activations_in_nhwc():
    x = torch.randn(2, 8, 8, 16)
    for layer in (layers.Conv3x3(16, 32), layers.Conv3x3(16, 16, groups=16), layers.Pointwise(16, 32)):
        assert layer(x).is_contiguous()
        assert all(parameter.is_contiguous() for parameter in layer.parameters())


def test_down_and_up_halve_and_double():
    x = torch.randn(2, 8, 4, 16)
    assert layers.Downsample(16)(x).shape == (2, 4, 2, 32)
    assert layers.Upsample(16)(x).shape == (2, 16, 8, 8)


def test_timestep_features_are_cosines_then_sines_in_float32():
    timesteps = torch.tensor([0, 1, 999])
    features = layers.timestep_features(timesteps)
    assert features.dtype == torch.float32
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    # frequencies run from 1 down to 10000 ** (-127 / 128)
    angles = timesteps.double()[:, None] * 10_000.0 ** (-torch.arange(128).double() / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=2e-4)


def test_modulation_and_gate_act_for_each_image_and_channel():
    x, branch = nhwc(3, 2, 2, 4), nhwc(3, 2, 2, 4)
    shift, scale, gate = torch.randn(3, 3, 4, dtype=torch.float64).unbind(0)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale.view(3, 1, 1, 4)) + shift.view(3, 1, 1, 4)
    torch.testing.assert_close(layers.layer_norm_modulate(x, shift, scale), expected)
    torch.testing.assert_close(layers.gated_residual(x, branch, gate), x + gate.view(3, 1, 1, 4) * branch)
