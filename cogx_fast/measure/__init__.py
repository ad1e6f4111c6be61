"""What a model costs, what it could cost at best, what it takes, and what the compiler made of it."""
