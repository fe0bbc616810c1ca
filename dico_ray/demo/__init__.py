"""The demo: 5,000 handwritten digits and three small networks that ship with the package."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
VAE = WEIGHTS / "vae"
FEATURES = WEIGHTS / "digits_features.safetensors"
JUDGE = WEIGHTS / "digits_judge.safetensors"
