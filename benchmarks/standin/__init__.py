"""A CUDA device that is not there: the CUDA build of torch, unmodified, on a machine without a GPU.

``native/`` is a library in the place of the CUDA driver, its runtime and what torch calls of cuBLAS, cuBLASLt and
cuDNN. Loaded before torch (``LD_PRELOAD``), it answers as the card that environment variables describe
(``cards.py``), and keeps a journal of what it was asked to do (``journal.py`` reads it)::

    python -m benchmarks.standin --card rtx4090 --devices 2 -- python -m pytest …

It takes gcc, ``nm``, and an environment with the CUDA 13 build of torch, whose wheels bring the headers; about 4 GB.

Real there is everything on the host's side: torch's dispatcher, the choice of attention kernels, the caching allocator
with its peaks and its out-of-memory errors, streams, events, CUDA graphs and what is forbidden while one is recorded,
several devices, Dynamo, Inductor with its autotuning, Triton's compiler and ptxas for the card's compute capability and
its limit of shared memory, AOTInductor, and what diffusers' and accelerate's hooks move where.

What it cannot show:

- **Results.** No kernel computes, no copy within the device is made, no memory is filled. What is read back is what was
  last copied there from the host, or zeros; code that branches on values takes that branch.
- **Time.** By its events every launch takes 0.05 ms, so autotuning takes the first candidate that compiles.
- **Faults within kernels**: accesses out of bounds, races, registers (every kernel is said to have 64), spills.
- **The libraries' judgement.** cuBLASLt and cuDNN take every problem, with no workspace. cuDNN's older functions (RNNs,
  pooling, CTC) fail, and so does anything of cuSOLVER, cuSPARSE, cuFFT and NCCL.
- **Concurrency.** Work is done in the moment it is asked for, on one stream after the other; a missing synchronisation
  does not show. One CUDA graph is recorded at a time.
- Expandable segments, memory shared between processes, peer access, unified memory that migrates: asked for, an error.
"""
