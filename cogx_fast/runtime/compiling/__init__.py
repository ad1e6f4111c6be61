"""How a model is compiled, what that makes of it, and how the next process starts from it."""
