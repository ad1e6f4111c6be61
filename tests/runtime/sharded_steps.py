"""What each rank of a job does in test_sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import cogx_fast
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, watch_compilation
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.packages.export import export_package
from cogx_fast.runtime.packages.package import SizeRange
from tests.runtime.shared_steps import SIZES, generate, make, pairs
from tests.support import AROUND, relative_error


def sharding(parallel: ParallelConfig) -> ParallelConfig:
    return ParallelConfig(guidance=parallel.guidance, sequence=parallel.sequence, shard_weights=True)


def held(model: CogVideoXModel) -> int:
    """Bytes of the blocks' weights that this rank has."""
    return sum(getattr(each, "_local_tensor", each).nbytes for each in model.transformer_blocks.parameters())


class Gathered(TorchDispatchMode):
    """Counts the bytes of weights that this rank sends, and notes when."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.order = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.sent += args[1].nbytes * (dist.get_world_size() - 1)
            self.order += "gather "
        return func(*args, **(kwargs or {}))


def sent(model: CogVideoXModel, videos: int) -> int:
    """Bytes of weights that this rank sends in a step, a block's before the one in front of it computes."""
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: setattr(gathered, "order", gathered.order + "compute "))
    with Gathered() as gathered:
        generate(model, 1, batch=videos)
    layers = len(model.transformer_blocks)
    assert gathered.order == "gather " + "gather compute " * (layers - 1) + "compute "
    return gathered.sent


def meshes(rank: int, backend: str, checkpoint: str) -> list[dict[str, Any]]:
    """For every mesh, eager, compiled, and compiled after, what sharded weights compute beside whole ones."""
    size = dist.get_world_size()
    alone = cogx_fast.load(checkpoint)
    whole = held(alone)
    found = []
    for parallel in pairs():
        videos = max(2, parallel.guidance)
        expected = [generate(alone, batch=videos, **each) for each in SIZES]
        compiling = CompileConfig(backend=backend, strict=True)
        for compile in (False, compiling):
            model = cogx_fast.load(checkpoint, device="cpu", parallel=sharding(parallel), compile=compile)
            with watch_compilation() as made:
                results = [generate(model, batch=videos, **each) for each in SIZES]
            graphs = bool(compile) * ((1 if parallel.sequence == 1 else 2) + AROUND)
            found.append({
                "error": max(map(relative_error, results, expected)),
                "made": (made.graphs - graphs, made.breaks, made.recompiles),
                "held": held(model) * size / whole,
                "sent": 1.0 if compile else sent(model, videos) / (whole * (size - 1) / size),
            })  # fmt: skip
    later = cogx_fast.load(checkpoint)
    later.set_parallel(sharding(next(pairs())))
    compile_model(later, compiling)
    later.transformer_blocks[1].norm1.register_forward_hook(lambda module, given, result: None)
    found.append({"error": relative_error(generate(later), generate(alone))})
    return found


def compositions(rank: int, checkpoint: str, lora: str) -> dict[str, float]:
    """The error of what goes together with sharded weights, beside one process."""
    parallel = ParallelConfig(sequence=2, shard_weights=True)
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "a step cache": ({"step_cache": "mask:1,1,0,1"}, {"steps": 4}),
        "LoRAs": ({"loras": [lora]}, {}),
        "a baked schedule": ({"schedule": [999, 1]}, {}),
        "a plan": ({"attention_plan": "radial", "attention": "flex"}, {}),
    }
    errors = {}
    for name, (options, call) in cases.items():
        expected = generate(cogx_fast.load(checkpoint, **options), **call)
        errors[name] = relative_error(
            generate(cogx_fast.load(checkpoint, parallel=parallel, **options), **call), expected
        )
    return errors


def refusals(rank: int, checkpoint: str, quantized: str, target: str) -> dict[str, str]:
    """What a rank of two says of what does not go together with sharded weights; then the model goes on."""
    parallel = ParallelConfig(sequence=2, shard_weights=True)
    model = cogx_fast.load(checkpoint, parallel=parallel)
    expected = generate(model)
    sizes, packaged = SizeRange(tokens=(96, 128)), make()
    packaged.runner.package = "m.pt2"

    def said(act: Callable[[], Any]) -> str:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return "nothing was said"

    def offload() -> None:
        from diffusers.hooks import apply_group_offloading

        hooked = cogx_fast.load(checkpoint, parallel=parallel)
        apply_group_offloading(hooked, torch.device("cpu"), num_blocks_per_group=1)
        generate(hooked)

    messages = {
        "set_loras needs whole weights": said(lambda: model.set_loras([])),
        "set_parallel needs whole weights": said(lambda: model.set_parallel(None)),
        "export_package needs whole weights": said(lambda: export_package(model, target, sizes)),
        "a copy needs whole weights": said(lambda: copy.deepcopy(model)),
        "state_dict(layout='diffusers') needs whole weights": said(lambda: model.state_dict(layout="diffusers")),
        "its weights are sharded over several processes": said(lambda: model.save_pretrained(target)),
        "or load the checkpoint in each process": said(lambda: cogx_fast.load(model)),
        "sharded weights stay in torch.float32 on cpu": said(lambda: model.to(torch.bfloat16)),
        "sharded weights stay where they are": said(offload),
        "does not go with quant='int8-weight-only'": said(
            lambda: cogx_fast.load("no such", parallel=parallel, quant="int8-weight-only")
        ),
        "does not go with quantized weights": said(lambda: cogx_fast.load(quantized, parallel=parallel)),
        "needs weights that can be divided": said(
            lambda: packaged.set_parallel(ParallelConfig(guidance=2, shard_weights=True))
        ),
        "rank 1 has another weights": said(lambda: make(seed=rank).set_parallel(parallel)),
    }
    messages["and goes on"] = "and goes on" if torch.equal(generate(model), expected) else "it is another model now"
    return messages
