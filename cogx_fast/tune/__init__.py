"""Searches over a trained model: attention plans, quantization recipes, step schedules."""
