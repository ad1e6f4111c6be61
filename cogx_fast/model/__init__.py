"""What the compiler sees: tensors in, tensors out; no state, no I/O, no branches on data."""
