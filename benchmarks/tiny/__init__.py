"""The tiny pipeline: how it is trained and judged."""
