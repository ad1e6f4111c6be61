"""The GPU regression gate: how fast ours is beside diffusers compiled on whatever GPU it finds, held against a table.

    python -m benchmarks.gpu [--budget 540] [--accept]          or, in one process: pytest benchmarks/gpu

Every case is a pytest-benchmark test of one model: one block of it (a model of one layer) or a whole step, at the
model's own video size, by recipe and compile scope; attention alone, kernel by kernel. First one layer is held against
diffusers' in fp32: a case whose result is wrong is red and is not timed. Then ours and diffusers under
``torch.compile(mode="max-autotune", fullgraph=True)`` run in turns, timed between CUDA events on a warm GPU. What
decoding and a whole call hold at their peak is counted: red where that is not what ``memory=`` predicts.

What is held (``suite.MARGINS``), in ``expected/gpu/<device>.csv``: the ratio to diffusers in the same run, the per cent
of the time that the ceilings measured in the same run allow (``roofline``), peak memory, and kernel launches. Without a
table for the device, or without a row of a case, that is said and recorded. ``--accept`` records everything anew. What
diffusers eager and with torchao's recipes do is recorded beside it and held to nothing.

The runner gives every model a process, restarts it after what crashes or hangs, stops when the budget is spent, names
what was not run, and goes on from ``--out`` the next time (``budget``). ``wheels`` collects what an offline machine
lacks; ``session.sh`` is the order for a quarter of an hour; ``ranks`` times the meshes of several GPUs first.
``--device cpu --quick`` runs each line in toy sizes.
"""
