"""Attention: ways to compute it, masks, windows and plans."""
