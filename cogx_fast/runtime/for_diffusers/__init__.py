"""What diffusers, its pipelines and its adapters ask of their own model."""
