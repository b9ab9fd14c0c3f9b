"""loratune teaches a diffusion model a new style with LoRA, on PyTorch Lightning."""

__version__ = "0.1.0"
