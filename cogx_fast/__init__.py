"""A fast CogVideoX video transformer that drops into the diffusers pipelines."""

__version__ = "0.1.0"  # the build reads this line
