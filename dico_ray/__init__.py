"""dico-ray: distributed training of DiCo diffusion ConvNets on Ray."""

__version__ = "0.1.0"
