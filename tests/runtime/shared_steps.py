"""What each rank of a job does in test_parallel and test_ranks."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import cogx_fast
from cogx_fast.attention.plan import FULL, AttentionPlan
from cogx_fast.attention.windows import Pattern
from cogx_fast.measure import roofline
from cogx_fast.pipelines.shared_decode import SharedTiles, plan_tiles, sent_bytes, share_decode
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, watch_compilation
from cogx_fast.runtime.distributed import ranks
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.step_caching.step_schedule import StepSchedule
from cogx_fast.sizes import Tokens
from tests.support import AROUND, inputs, relative_error, small

HEADS = 12
SIZES: tuple[dict[str, Any], ...] = ({}, {"frames": 5, "height": 8, "text_len": 7}, {"frames": 3, "text_len": 6})
"""128, 107 and 96 tokens: some numbers that 2, 3 and 4 divide, and some that they do not."""


def make(name: str = "5b", seed: int = 0, **options: Any) -> CogVideoXModel:
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 16, "num_layers": 2} | options
    return CogVideoXModel(small(name, **sizes)).eval().requires_grad_(False)


def generate(model: CogVideoXModel, steps: int = 2, **size: Any) -> Tensor:
    """As a pipeline does: every step on the last one's output, its timestep a view of the schedule's."""
    kwargs = size.pop("attention_kwargs", None)
    arguments = inputs(model.config, **size) | {"attention_kwargs": kwargs}
    latents = arguments.pop("hidden_states")
    with torch.no_grad():
        for timestep in torch.linspace(999, 1, steps).round().long():
            arguments["timestep"] = timestep.expand(latents.shape[0])
            with model.cache_context("cond_uncond"):
                sample = model(latents, **arguments).sample
            noisy, image = latents.tensor_split([sample.shape[2]], dim=2)
            latents = torch.cat([noisy - 0.3 * sample, image], dim=2)
    return latents


def pairs() -> Iterator[ParallelConfig]:
    """Every mesh of the job's ranks."""
    size = dist.get_world_size()
    for guidance in range(1, size + 1):
        if size % guidance == 0:
            yield ParallelConfig(guidance=guidance, sequence=size // guidance)


def meshes(rank: int, backend: str | None, heads: int = HEADS) -> dict[str, float]:
    """The error of every mesh, eager and compiled (None: not), for several sizes beside one process.

    In a job of four only the mesh that shares both is compiled in eager code: others are in jobs of two and three.
    """
    errors: dict[str, float] = {}
    alone = make(num_attention_heads=heads)
    for parallel in pairs():
        videos = max(2, parallel.guidance)
        expected = [generate(alone, batch=videos, **size) for size in SIZES]
        is_new = backend == "inductor" or dist.get_world_size() < 4 or 1 not in (parallel.guidance, parallel.sequence)
        for compiled in (False, True) if is_new and backend is not None else (False,):
            model = copy.deepcopy(alone)
            model.set_parallel(parallel)
            if compiled:
                compile_model(model, CompileConfig(backend=backend, strict=True))
            with watch_compilation() as made:
                found = [generate(model, batch=videos, **size) for size in SIZES]
            name = f"{parallel.guidance} × {parallel.sequence}, {'compiled' if compiled else 'eager'}"
            for size, one, other in zip(SIZES, found, expected, strict=True):
                errors[f"{name}, {size}"] = relative_error(one, other)
            blocks = 1 if parallel.sequence == 1 else 2  # of tokens that divide, and that do not
            graphs = compiled * (blocks + AROUND)
            if (made.graphs, made.breaks, made.recompiles) != (graphs, 0, 0):
                errors[f"{name}: {made}"] = 1.0
    return errors


def go_on(rank: int, fault: dict[str, Any], ready: str) -> None:
    """Steps without end; rank 1 is given something else, or raises, as ``fault`` says."""
    mine = fault if rank == 1 else {}
    model = make()
    if mine.get("hangs") == "in its own code":
        os.execvp("sleep", ["sleep", "25"])
    model.set_parallel(ParallelConfig(sequence=dist.get_world_size(), lost_after=4.0))
    if mine.get("hangs") == "before its first step":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mine.get("raises") == "in a step":
        model.transformer_blocks[1].register_forward_hook(_raise)
    for number in range(10_000):
        generate(model)
        if number == 2:
            open(f"{ready}{rank}", "w").close()
        if number == 4 and mine.get("raises") == "between steps":
            raise ValueError("the disk is full")
        if number == 4 and mine.get("raises") == "ends":
            return


def join(rank: int, command: str) -> None:
    """Join a job of which rank 1 is a shell's command, which does not."""
    if rank == 1:
        os.execvp("sh", ["sh", "-c", command])
    ranks.start(lost_after=4.0)


def _raise(*_: Any) -> None:
    raise ValueError("a hook failed")


def disagree(rank: int) -> dict[str, str]:
    """What a rank says where rank 1 was given something else, case by case; then all go on together."""
    parallel = ParallelConfig(sequence=3)

    def attempt(model: CogVideoXModel, steps: int = 2, parallel: ParallelConfig = parallel, **size: Any) -> str:
        try:
            model.set_parallel(parallel)
            generate(model, steps, **size)
        except ValueError as error:
            return str(error)
        return "nothing was said"

    def other(usual: Any, another: Any) -> Any:
        return another if rank == 1 else usual

    said = {
        "prompt length": attempt(make(), text_len=other(8, 7)),
        "size of the latents": attempt(make(), frames=other(4, 3)),
        "seed or image": attempt(make(), seed=other(1, 2)),
        "schedule of steps": attempt(make(), other(2, 3)),
        "weights": attempt(make(seed=other(0, 1))),
        "model": attempt(make(num_layers=other(2, 3))),
    }
    for name, option in (("recipe", {"quant": "int8-weight-only"}), ("step cache", {"step_cache": "balanced"})):
        said[name] = attempt(cogx_fast.load(make(), **other({}, option)))
    said["mesh"] = attempt(make(), parallel=other(parallel, ParallelConfig(guidance=3)))
    said["dtype"] = attempt(cogx_fast.load(make(), dtype=other("fp32", "fp64")))
    model = make()
    said["none"] = attempt(model)
    said["none again"] = attempt(model, seed=3)
    return said


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.bytes += args[0].nbytes * (len(args[1]) - 1) // len(args[1])
        elif func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.bytes += args[0].nbytes * (args[1] - 1)
        return func(*args, **(kwargs or {}))


def sent(rank: int) -> list[tuple[int, int]]:
    """For every mesh and size the bytes that a step sends, counted, and by the formula."""
    found = []
    model = make()
    for parallel in pairs():
        model.set_parallel(parallel)
        for size in SIZES:
            batch = max(2, parallel.guidance)
            latents = inputs(model.config, **size)["hidden_states"]
            grid = model.config.grid(latents.shape[1], *latents.shape[3:])
            tokens = Tokens(text=size.get("text_len", model.config.max_text_seq_length), grid=grid)
            mesh = {"guidance": parallel.guidance, "sequence": parallel.sequence}
            parts = roofline.parts(model.config, tokens, batch=batch, **mesh)
            with Sent() as counted:
                generate(model, 1, batch=batch, **size)
            found.append((counted.bytes, 2 * sum(part.sent for part in parts)))  # in fp32
    return found


def decode(rank: int) -> list[dict[str, Any]]:
    """Videos of several sizes decoded by the ranks' tiles, beside one process' tiled decode; and what was sent."""
    from diffusers import AutoencoderKLCogVideoX

    from cogx_fast.assets.recipe import VAE_CONFIG

    torch.manual_seed(0)
    pipe = SimpleNamespace(vae=AutoencoderKLCogVideoX(**VAE_CONFIG).eval())
    pipe.vae.enable_tiling(32, 48)
    found = []
    for frames, height, width in ((3, 7, 13), (2, 4, 11), (1, 3, 7), (1, 3, 5)):
        z = torch.randn(2, VAE_CONFIG["latent_channels"], frames, height, width)
        with torch.no_grad(), Sent() as sent:
            share_decode(pipe, None)
            alone = pipe.vae.decode(z).sample
            share_decode(pipe, ParallelConfig(decode=True))
            shared = pipe.vae.decode(z).sample
        tiles = plan_tiles(pipe.vae, z.shape, dist.get_world_size())
        is_tiled = height > 4 or width > 6
        expected = sent_bytes(tiles, dist.get_world_size(), 4) if is_tiled else 0
        found.append({"equal": torch.equal(alone, shared), "sent": sent.bytes, "expected": expected})
    return found


def memory(rank: int, weights: list[str], ranks: tuple[int, ...]) -> dict[tuple[str, int], dict[str, int]]:
    """Bytes of host memory that a model takes in a rank when the first so many ranks have loaded it and read all of it.

    "own" is the rank's alone; "file" its part of what is mapped, each page shared by those that have it (Linux's PSS).
    """

    def held() -> dict[str, int]:
        # The last model's queries, keys and values lie in the C library's heap, kept for the next who asks: give back.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/smaps_rollup") as file:
            lines = [line.split() for line in file.readlines()[1:]]
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}

    found = {}
    for directory, sharing in itertools.product(weights, ranks):
        before = held()
        dist.barrier()
        if rank < sharing:
            model = cogx_fast.load(directory)
            for tensor in model.state_dict().values():
                tensor.view(-1).view(torch.uint8).max()
        dist.barrier()
        after = held()
        dist.barrier()
        if rank < sharing:
            own, file = (after[name] - before[name] for name in ("Pss_Anon", "Pss_File"))
            found[directory, sharing] = {"own": own, "file": file}
            del model, tensor
    return found


def compositions(rank: int) -> dict[str, float]:
    """The error of what goes together, in a mesh of two by two, beside one process."""
    few = AttentionPlan(
        patterns=(FULL, Pattern(kind="spatial"), Pattern(kind="temporal", space=0.1)),
        choice=(tuple(head % 3 for head in range(HEADS)), (2,) * HEADS),
        block_size=16, tile=(2, 2), dense_above=700.0,
    )  # fmt: skip
    hidden = torch.rand(2 * HEADS, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.2
    hidden[:, :, 0] = False
    cases: dict[str, tuple[CogVideoXModel, dict[str, Any], dict[str, Any]]] = {
        name: (make(name), {}, {}) for name in ("2b", "5b-i2v", "1.5-5b-i2v")
    }
    cases |= {
        "a plan of each head": (make(), {"attention_plan": few}, {}),
        "a step cache": (make(), {"step_cache": "mask:1,1,0,1"}, {"steps": 4}),
        "a mask of each head": (make(), {}, {"attention_kwargs": {"attention_mask": ~hidden}}),
        "a mask of each video": (make(), {}, {"attention_kwargs": {"attention_mask": ~hidden[:2, 0]}}),
        "weights in int8": (make(), {"quant": "int8-weight-only"}, {}),
        "products in int8": (make(attention_head_dim=32), {"quant": "int8-dynamic"}, {}),
        "four videos": (make(), {}, {"batch": 4}),
    }
    errors = {}
    for name, (model, options, call) in cases.items():
        expected = generate(cogx_fast.load(model, **options), **call)
        shared = cogx_fast.load(model, parallel=ParallelConfig(guidance=2, sequence=2), **options)
        errors[name] = relative_error(generate(shared, **call), expected)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "guidance"))
    model = make()
    expected = generate(model)
    model.set_parallel(mesh)
    errors["a mesh of the caller's"] = relative_error(generate(model), expected)
    errors["a copy, alone"] = relative_error(generate(copy.deepcopy(model)), expected)
    model.set_parallel(None)
    errors["not any more"] = relative_error(generate(model), expected)
    return errors


def refusals(rank: int) -> dict[str, str]:
    """What a rank of two says of what does not go together."""
    shared = cogx_fast.load(make(), parallel=ParallelConfig(sequence=2))
    guided = cogx_fast.load(make(), parallel=ParallelConfig(guidance=2))
    packaged = make()
    packaged.runner.package = "m.pt2"
    layers = shared.config.num_layers
    halves = StepSchedule(blocks=(layers, layers), num_layers=layers, unconditional=(1, 0))

    def said(act: Callable[[], Any]) -> str:
        try:
            act()
        except ValueError as error:
            return str(error)
        return "nothing was said"

    return {
        "step_cache='first-block:": said(lambda: shared.set_step_cache("first-block:0.1")),
        "takes the halves of a guided batch apart": said(lambda: shared.set_step_cache(halves)),
        "use CompileConfig(scope='block')": said(lambda: compile_model(shared, CompileConfig(scope="model"))),
        "does not divide the model's 12 heads: use 2, 3, 4, 6, 12": said(
            lambda: make().set_parallel(ParallelConfig(sequence=5))
        ),
        "is for 4 ranks, and the job has 2": said(lambda: make().set_parallel(ParallelConfig(guidance=2, sequence=2))),
        "call the model under torch.no_grad()": said(lambda: shared(**inputs(shared.config))),
        "guidance=2 shares a batch of 1": said(lambda: generate(guided, batch=1)),
        "needs another code of the blocks": said(lambda: packaged.set_parallel(ParallelConfig(sequence=2))),
        "this is its transformer alone": said(lambda: make().set_parallel(ParallelConfig(sequence=2, decode=True))),
        "that of SimpleNamespace has none (NoneType)": said(
            lambda: cogx_fast.accelerate(
                SimpleNamespace(transformer=make()), parallel=ParallelConfig(sequence=2, decode=True)
            )
        ),
        "decode under torch.no_grad()": said(lambda: SharedTiles(None, 4.0)(torch.zeros(1))),
        "dimensions are named ('rows',)": said(
            lambda: make().set_parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("rows",)))
        ),
    }


def packaged(rank: int, package: str, checkpoint: str) -> float:
    """The error of a package's code in a mesh that shares the batch."""
    model = cogx_fast.load_package(package, checkpoint)
    expected = generate(model)
    model.set_parallel(ParallelConfig(guidance=2))
    return relative_error(generate(model), expected)
