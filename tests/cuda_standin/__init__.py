"""What README promises of a GPU, on the stand-in device (``benchmarks.standin``): what ran, not that nothing raised.

Each case asserts launches, library calls, CUDA graphs, graphs and recompiles, or peaks. Not every pair of card and
feature is run; what is:

| | T4 7.5 | A100 8.0 | 3060 8.6 | 4060, 4090 8.9 | H100 9.0 | B200 10.0 |
|---|---|---|---|---|---|---|
| load and call, eager (16 bits, fp32) | fp16 | ✓ | ✓ | ✓ | ✓ all variants | ✓ |
| `compile=True`, all defaults (timed candidates), batches 2, 1, 4 | fp16 | ✓ | ✓ | ✓ | ✓ | ✓ |
| a layer of 5b at its own size, compiled, torch's attention and flex | fp16 | ✓ | ✓ | ✓ | ✓ | ✓ |
| scopes × modes without CUDA graphs | | | ✓ | | ✓ | |
| `reduce-overhead`, `max-autotune` | | ✓ | | | ✓ and moves, batches, a pipeline | |
| attention by name, eager | refused | ✓ | ✓ | ✓ | ✓ | ✓ |
| attention by name, compiled | flex | ✓ | flex | 4090 | ✓ | ✓ |
| `attention="auto"` | ✓ | ✓ | at 5b's size | ✓ | ✓ compiled too | ✓ |
| sparse plans, both scopes | | ✓ | | 4090 | ✓ | ✓ |
| recipes, compiled | fp8 refused | int8, int4 | int8 | int8; 4090 all | all, both scopes, CUDA graphs | all |
| fp8 and int4 products, eager | | int4 | | 4090 | ✓ | ✓ |
| 24 sizes; training; two devices, two models | | | | | ✓ | |
| pipelines: accelerated, offloaded, compiled | fp16 | ✓ | ✓ | ✓ | ✓ every order, device, kind | ✓ |
| bundles, packages | | | | 4090 packages | ✓ | |
| an eager step's peak beside diffusers', or out of memory | 16 GB | | 12 GB | 8, 24 GB | 80 GB, and compiled | |
| released weights that fit, or are out of memory | 16 GB | | 12 GB | 8, 24 GB | 80 GB | |
| peaks of `load` and `accelerate` | | | | | ✓ | |

``test_findings.py`` has the faults that were found there, each on the card that shows it. The same with torch 2.11:
``make test-cuda-standin TORCH=2.11.0``.
"""
