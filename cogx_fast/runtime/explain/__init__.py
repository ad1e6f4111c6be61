"""What a model becomes when it is compiled: the graphs, the kernels, and what each reads, writes and computes."""
