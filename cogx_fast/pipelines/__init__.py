"""diffusers' pipelines: found, opened, given our transformer, run."""
