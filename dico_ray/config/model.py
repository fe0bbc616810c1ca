"""The network's sizes, and the rows of the DiCo family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from dico_ray.config.base import Section


@dataclass(frozen=True)
class Architecture:
    """One size of the DiCo family (arXiv 2505.11196, table of model configurations)."""

    hidden_size: int
    depths: tuple[int, int, int, int, int]
    ffn_ratio: int


ARCHITECTURES: dict[str, Architecture] = {
    "DiCo-S":    Architecture(128, (5, 4, 4, 4, 4), 2),
    "DiCo-B":    Architecture(256, (5, 4, 4, 4, 4), 2),
    "DiCo-L":    Architecture(352, (9, 8, 9, 8, 9), 2),
    "DiCo-XL":   Architecture(416, (9, 9, 10, 9, 9), 2),
    "DiCo-H":    Architecture(416, (14, 12, 10, 12, 14), 4),
    "DiCo-tiny": Architecture(48, (2, 2, 2, 2, 2), 2),
}  # fmt: skip


Depths = tuple[int, int, int, int, int]


class Model(Section):
    """The network: a row of the DiCo family, or sizes of your own."""

    name: str = "DiCo-S"
    "Row of the family: DiCo-S, DiCo-B, DiCo-L, DiCo-XL, DiCo-H or DiCo-tiny."
    hidden_size: int | None = Field(None, ge=4)
    "Width of the first stage, instead of the row's (an even number)."
    depths: Depths | None = None
    "Blocks of the five stages, instead of the row's."
    ffn_ratio: int | None = Field(None, ge=1)
    "Width of the feed-forward half over the stage's width, instead of the row's."
    num_classes: int = Field(1000, ge=1)
    "Number of classes; the label num_classes itself is the null label of guidance."
    in_channels: int = Field(4, ge=1)
    "Channels of a latent."
    latent_size: int = Field(32, ge=4, multiple_of=4)
    "Height and width of a latent (image size over the autoencoder's factor); a multiple of 4."
    kernels: Literal["auto", "triton", "torch"] = "auto"
    "Fused kernels in Triton, or plain PyTorch. auto: Triton where it runs: on GPUs."

    @model_validator(mode="after")
    def _known(self) -> Model:
        if self.name not in ARCHITECTURES:
            raise ValueError(f"model.name: {self.name!r} is unknown; take one of {', '.join(ARCHITECTURES)}")
        if self.architecture.hidden_size % 2:
            raise ValueError(f"model.hidden_size: {self.hidden_size} is odd; take an even number")
        if min(self.architecture.depths) < 1:
            raise ValueError(f"model.depths: {self.depths}: every stage needs at least one block")
        return self

    @property
    def architecture(self) -> Architecture:
        """The named row with this config's own sizes in place of the row's."""
        row = ARCHITECTURES[self.name]
        return Architecture(
            self.hidden_size or row.hidden_size,
            self.depths or row.depths,
            self.ffn_ratio or row.ffn_ratio,
        )
