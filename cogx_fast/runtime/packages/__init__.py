"""A model's blocks compiled ahead of time, in a file."""
