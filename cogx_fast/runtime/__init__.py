"""Everything that decides how the model runs."""
