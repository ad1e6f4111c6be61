"""Which blocks each denoising step computes."""
