"""The battery: on whatever GPU it finds, what is right, what the device can do, and how fast ours and the peers are.

    python -m benchmarks.gpu --budget 540 --out out/gpu

Order: the device's ceilings; then for each model ours and the peers, most informative first, until the budget is spent.
Every case is a process with a time limit of its own. It first computes one layer's model at the real size and holds it
against diffusers' in fp32: a case whose result is wrong is red and is not timed. Then it times steps with random
weights, of which the time does not depend: ours, compiled as one block, with all layers for the first model; what takes
minutes to compile with few layers, extrapolated (``cases.FEW_LAYERS``), which the table marks with ~.

Peers are diffusers, eager and ``torch.compile(mode="max-autotune", fullgraph=True)``, the same with torchao's fp8 per
row and int8 dynamic on the blocks' linears, and, where it is installed, with SageAttention. Step caches (cache-dit,
ParaAttention) are not among them: how many steps they skip depends on real weights.

``wheels`` collects what an offline machine lacks; ``session.sh`` is the order for half an hour in commands of at most
ten minutes. ``--device cpu --quick`` runs every line of it in a minute or so, with toy sizes.
"""
