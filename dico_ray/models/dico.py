"""DiCo: a convolutional U-shaped denoiser, conditioned by timestep and class (arXiv 2505.11196)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dico_ray.config import ARCHITECTURES
from dico_ray.models.graphs import InferenceGraphs, StageGraphs
from dico_ray.models.kernels.choice import choose
from dico_ray.models.layers import (
    Block,
    Downsample,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    Pointwise,
    Stage,
    TimestepEmbedder,
    Upsample,
    timestep_features,
)

EMBEDDING_STD = 0.02
UNITS = (Block, FinalLayer)
"""Modules that compute as one, by operators that take weights of all their layers: where weights are sharded, those
of a unit have to be gathered together."""


class DiCo(nn.Module):
    """The network: predicts noise and, with learn_sigma, the variance interpolation, from noised latents.

    Five stages of blocks: full resolution at width D = hidden_size, half at 2D, quarter at 4D, back at half
    with 2D, and full again at **2D**. The two decoders join the encoder's output before its downsampling.

    Parameter names and shapes are those of the released checkpoints, whatever the layout of the activations.

    Args:
        hidden_size: D, a positive even number.
        depths: blocks in each of the five stages, all positive.
        ffn_ratio: width of a block's feed-forward half, as a multiple of the block's own.
        num_classes: number of classes K; labels are 0 .. K - 1, and K itself is the null label.
        in_channels: channels of the latents.
        learn_sigma: whether the output carries a second half of channels, the variance interpolation v.
        class_dropout_prob: share of the labels that training mode replaces by the null label (torch's own
            random numbers). Set 0 where the caller drops labels itself.

    Raises:
        ValueError: a size outside its range.

    inference_graphs: replays passes without gradients in evaluation mode, if `graph_inference` asked for it.
    """

    inference_graphs: InferenceGraphs | None = None

    def __init__(
        self,
        hidden_size: int,
        depths: Sequence[int],
        ffn_ratio: int,
        num_classes: int = 1000,
        in_channels: int = 4,
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, depths, ffn_ratio, num_classes, in_channels, class_dropout_prob)
        width_1, width_2, width_3 = hidden_size, 2 * hidden_size, 4 * hidden_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob

        self.x_embedder = PatchEmbedder(in_channels, width_1)
        self.t_embedder_1 = TimestepEmbedder(width_1)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.t_embedder_2 = TimestepEmbedder(width_2)
        self.t_embedder_3 = TimestepEmbedder(width_3)

        self.encoder_level_1 = Stage(width_1, depths[0], ffn_ratio)
        self.down1_2 = Downsample(width_1)
        self.encoder_level_2 = Stage(width_2, depths[1], ffn_ratio)
        self.down2_3 = Downsample(width_2)
        self.latent = Stage(width_3, depths[2], ffn_ratio)
        self.up3_2 = Upsample(width_3)
        self.reduce_chan_level2 = Pointwise(2 * width_2, width_2)
        self.decoder_level_2 = Stage(width_2, depths[3], ffn_ratio)
        self.up2_1 = Upsample(width_2)
        self.reduce_chan_level1 = Pointwise(2 * width_1, width_2)
        self.decoder_level_1 = Stage(width_2, depths[4], ffn_ratio)
        self.final_layer = FinalLayer(width_2, self.out_channels)
        self.initialize_weights()

    @property
    def null_label(self) -> int:
        """The label that means no class: num_classes."""
        return self.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which the network computes and answers."""
        return self.x_embedder.proj.weight.dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and v) in noised latents.

        Args:
            x: latents `(B, C, H, W)`, any floating dtype; H and W multiples of 4.
            t: timesteps `(B,)` in [0, 1000).
            y: int64 labels `(B,)` in [0, num_classes]; not checked, as that would stall the device.

        Returns:
            `(B, 2C, H, W)`, noise then v, or `(B, C, H, W)` without learn_sigma; contiguous, in `dtype`.

        Raises:
            ValueError: x is not `(B, C, H, W)` with C = in_channels and H and W multiples of 4.
        """
        self._check_latents(x)
        if self.inference_graphs is None or self.training or torch.is_grad_enabled():
            return self._forward(x, t, y)
        return self.inference_graphs.run(self._forward, x, t, y)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._prepare_graphs(x)
        c1, c2, c3 = self._conditions(t, y)
        x = x.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        skip_1 = self.encoder_level_1(self.x_embedder(x), c1)
        skip_2 = self.encoder_level_2(self.down1_2(skip_1), c2)
        h = self.latent(self.down2_3(skip_2), c3)
        h = self.reduce_chan_level2(torch.cat([self.up3_2(h), skip_2], dim=-1))
        h = self.decoder_level_2(h, c2)
        h = self.reduce_chan_level1(torch.cat([self.up2_1(h), skip_1], dim=-1))
        h = self.decoder_level_1(h, c2)
        return self.final_layer(h, c2).permute(0, 3, 1, 2).contiguous()

    def _stages(self) -> list[Stage]:
        """In the order in which they run."""
        return [self.encoder_level_1, self.encoder_level_2, self.latent, self.decoder_level_2, self.decoder_level_1]

    def _prepare_graphs(self, x: Tensor) -> None:
        """Has the stages captured for these latents `(B, C, H, W)`, if `graph_stages` asked for graphs."""
        graphs = self.encoder_level_1.graphs
        if graphs is None:
            return
        batch, _, height, width = x.shape
        shapes = [
            (batch, height // by, width // by, stage.channels)
            for stage, by in zip(self._stages(), (1, 2, 4, 2, 1), strict=True)
        ]
        graphs.prepare(shapes, x.device, self.dtype)

    def _conditions(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of timestep and label embeddings at the three widths: `(B, D)`, `(B, 2D)`, `(B, 4D)`."""
        if self.training and self.class_dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
            y = torch.where(dropped, self.null_label, y)
        features = timestep_features(t).to(self.dtype)
        y1, y2, y3 = self.y_embedder(y)
        c1, c2, c3 = (embed(features) for embed in (self.t_embedder_1, self.t_embedder_2, self.t_embedder_3))
        return c1 + y1, c2 + y2, c3 + y3

    def _check_latents(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"latents have shape {tuple(x.shape)}; this model takes (B, {self.in_channels}, H, W): "
                f"pass such latents, or build the model with another in_channels"
            )
        height, width = x.shape[2:]
        if height % 4 or width % 4:
            raise ValueError(
                f"latents are {height} x {width}; height and width must be multiples of 4, since the network "
                f"halves them twice: use images whose sides are multiples of 32 pixels"
            )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start as the released code does: Xavier uniform, small embeddings, gates and output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # PyTorch counts a depthwise [C, 1, 3, 3] as fan_in 9, fan_out 9C: so did the released code.
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
        # The input convolution counts as a linear layer on patches, a [D, 9C] matrix: fan_out D, not 9D.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                for weight in (module.mlp.get_parameter("0.weight"), module.mlp.get_parameter("2.weight")):
                    nn.init.normal_(weight, std=EMBEDDING_STD)
            elif isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.out_proj.weight)


def create_model(name: str, **overrides: Any) -> DiCo:
    """Build one of the sizes in `dico_ray.config.ARCHITECTURES`; overrides replace arguments of `DiCo`.

    Raises:
        ValueError: a name that is not in the table.
        TypeError: an override that DiCo does not take.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"no model is named {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    size = ARCHITECTURES[name]
    arguments = {"hidden_size": size.hidden_size, "depths": size.depths, "ffn_ratio": size.ffn_ratio}
    return DiCo(**(arguments | overrides))


def compile_blocks(model: DiCo) -> None:
    """Compiles every block in place, by torch.compile, at its first use; blocks of one width share the result.

    Fused blocks have nothing to gain: they stay as they are.
    """
    for module in model.modules():
        if isinstance(module, Block) and not module.fused:
            module.compile(dynamic=False)


def graph_stages(model: DiCo, lend_gradients: bool) -> None:
    """Has every stage captured as CUDA graphs at the first pass with gradients, and replayed in those that follow.

    lend_gradients: as in `graphs.StageGraphs`. The network's weights are on a GPU by that pass.
    """
    graphs = StageGraphs(model._stages(), lend_gradients)
    for stage in model._stages():
        stage.graphs = graphs


def graph_inference(model: DiCo) -> None:
    """Has passes without gradients in evaluation mode captured as CUDA graphs at the first of a shape, then replayed.

    The network's weights are on a GPU by that pass. Results are those of plain passes, bit by bit.
    """
    model.inference_graphs = InferenceGraphs(model.parameters())


def use_kernels(model: DiCo, setting: str, device: torch.device, recompute_gelu: bool = True) -> str:
    """Makes the blocks and the head take the path that model.kernels asks for, on this device.

    setting: auto, triton or torch. recompute_gelu: whether fused blocks make the feed-forward GELU again for their
    backward pass instead of keeping it. Returns a line that says which path runs, and why.

    Raises:
        ConfigError: triton is asked for and cannot run here.
    """
    fused, why = choose(setting, device, model.dtype)
    for module in model.modules():
        if isinstance(module, Block | FinalLayer):
            module.fused = fused
        if isinstance(module, Block):
            module.keep_gelu = not recompute_gelu
    return why


def _check_sizes(
    hidden_size: int,
    depths: Sequence[int],
    ffn_ratio: int,
    num_classes: int,
    in_channels: int,
    class_dropout_prob: float,
) -> None:
    rules = (
        ("hidden_size", hidden_size, "a positive even number", hidden_size > 0 and hidden_size % 2 == 0),
        ("depths", depths, "five positive numbers", len(depths) == 5 and min(depths) > 0),
        ("ffn_ratio", ffn_ratio, "a positive whole number", ffn_ratio > 0 and ffn_ratio == int(ffn_ratio)),
        ("num_classes", num_classes, "at least 1", num_classes >= 1),
        ("in_channels", in_channels, "at least 1", in_channels >= 1),
        ("class_dropout_prob", class_dropout_prob, "in [0, 1]", 0 <= class_dropout_prob <= 1),
    )
    for name, value, rule, holds in rules:
        if not holds:
            raise ValueError(f"{name} is {value!r}; it must be {rule}")
