"""Binarized neural networks in PyTorch, and what random bit errors in their memory do to them."""

__version__ = "0.1.0"
