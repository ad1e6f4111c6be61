"""One step, or one model, on several ranks."""
