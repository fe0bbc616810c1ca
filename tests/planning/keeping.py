"""What autograd keeps, counted; and run as a script, with Triton's interpreter, of the fused kernels.

TRITON_INTERPRET=1 python tests/planning/keeping.py     prints the bytes kept and the bytes foreseen
"""

from __future__ import annotations

import torch
from torch import nn

from dico_ray.config import Model
from dico_ray.models import create_model, use_kernels
from dico_ray.planning.activations import activation_bytes


def kept_bytes(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Of every storage that autograd keeps, once, parameters' not."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = module(*inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    del answer
    return total


def main() -> None:
    batch, side = 2, 4
    model = Model(name="DiCo-tiny", hidden_size=4, depths=(2, 1, 1, 1, 1), ffn_ratio=3, latent_size=side)  # pyright: ignore
    sizes = model.architecture
    network = create_model("DiCo-tiny", hidden_size=4, depths=sizes.depths, ffn_ratio=3, class_dropout_prob=0.0)
    t, y = torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    for path, again in (("fused", True), ("fused, GELU kept", False)):
        use_kernels(network, "triton", torch.device("cpu"), recompute_gelu=again)
        kept = kept_bytes(network, torch.randn(batch, 4, side, side), t, y)
        print(kept, batch * activation_bytes(model, path, value=4))


if __name__ == "__main__":
    main()
