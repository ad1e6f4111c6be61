"""Quantization recipes for video transformers, on torchao."""
