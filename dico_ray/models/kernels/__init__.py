"""The fused passes of a block in Triton, and which path a network takes: these, or plain PyTorch.

`plain` defines what every kernel computes; `adaln`, `depthwise`, `activation` and `product` hold the kernels; `block`
joins them into one operator. Only those five need Triton: nothing imports them before `choice` says so.
"""

from __future__ import annotations
