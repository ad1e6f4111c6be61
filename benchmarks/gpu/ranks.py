"""Several GPUs of a machine: a step of each mesh beside one GPU alone, the VAE's tiles shared, and what a link carries.

    python -m benchmarks.gpu.ranks [--ranks 2,4,8] [--budget 600] [--accept] [--device cpu --quick]

``python -m benchmarks.gpu`` runs it first where torch sees more than one GPU. For each number of ranks a torchrun job
of its own times, in turns, each of its ranks alone and all of them in each mesh, once what they compute is the same.
Recorded in the device's table beside the other cases: the speed-up is held, the rest explains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import environment, gate
from benchmarks.gpu import measure, models, suite
from benchmarks.gpu.cases import BATCH
from cogx_fast import load
from cogx_fast.attention.plan import LAST_TIMESTEP
from cogx_fast.config import PRESETS
from cogx_fast.measure import contest, roofline, timing
from cogx_fast.measure.contest import Work
from cogx_fast.pipelines.shared_decode import plan_tiles, sent_bytes, share_decode
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.distributed import ranks
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from cogx_fast.runtime.runner import Whole
from cogx_fast.sizes import count_tokens, default_video, latent_frames

RANKS = (2, 3, 4, 6, 8)
MODELS = ("5b", "1.5-5b")
MARGINS = {"speedup": "0.05"}
LIMIT = 0.02
"""Relative error of a mesh beside one GPU, in bf16."""
LIMIT_SECONDS = 600
"""Of a job."""
CALLS = 4
"""Steps of a generation: ranks compare what they were given before the first of them."""


def run(options: argparse.Namespace) -> int:
    """A job for each number of ranks; 1 if one failed or became slower."""
    end, red = time.monotonic() + options.budget, False
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for number in options.ranks:
        file = out / f"ranks-{number}.json"
        if not options.resume:
            file.unlink(missing_ok=True)
        left = end - time.monotonic()
        if not file.is_file() and left < (5 if options.quick else 60):
            print(f"NO TIME LEFT for {number} ranks")
            continue
        if not file.is_file() and (failure := _start(number, options, file, min(left, LIMIT_SECONDS))):
            print(f"FAILED: {number} ranks: {failure}")
            red = True
            continue
        red |= not _judge(json.loads(file.read_text()), options)
    return int(red)


def _start(number: int, options: argparse.Namespace, file: Path, seconds: float) -> str:
    """Run a job; says why it failed, if it did."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    worker = [str(number), "-m", "benchmarks.gpu.ranks", "--worker", str(file), f"--device={options.device}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))}
    process = subprocess.Popen([*torchrun, *worker, *(["--quick"] * options.quick)], env=environment,
                               start_new_session=True)  # fmt: skip
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun, which ends the ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(35)
        return f"not done after {seconds:.0f} s"
    return f"status {status}, its error stands above" if status else ""


def _judge(found: dict[str, Any], options: argparse.Namespace) -> bool:
    """Print a job's cases, hold them against the table, and record those that it lacks."""
    table = options.baselines / f"{found['device']}.csv"
    rows = gate.read(table) if table.is_file() else {}
    passed = True
    for name, case in found["cases"].items():
        held, notes = case["held"], case["notes"]
        print(f"{name}: {held['speedup']} × one, {json.dumps(notes)}")
        verdict = gate.compare(rows, {name: held}, {name: notes}, found["versions"], told=MARGINS, margins=MARGINS)
        if options.accept or (not verdict.not_binding and (name, "speedup") not in rows):
            gate.record(table, found["versions"], {name: held}, {name: notes}, margins=MARGINS)
            print(f"recorded in {table}: {name}")
        elif not verdict.passed or verdict.told or verdict.not_binding:
            print(verdict)
            passed &= verdict.passed
    return passed


# --------------------------------------------------------------------------------------------------------- in each rank


def work(options: argparse.Namespace) -> None:
    """What a rank does; rank 0 writes what was found."""
    ranks.start()
    device = torch.device(options.device, torch.cuda.current_device() if options.device == "cuda" else None)
    snapshot = environment.snapshot(device)
    link = _link(device, quick=options.quick)
    cases: dict[str, Any] = {}
    for model in ("tiny",) if options.quick else MODELS:
        for name, found in [*_steps(model, device, options.quick), *_decode(model, device, options.quick)]:
            cases[f"{model}/ranks/{name}"] = found
            found["notes"] |= {"link_gb_per_s": suite.short(link), "commit": str(snapshot["commit"])[:9]}
    if dist.get_rank() == 0:
        found = {"device": suite.device_name(device), "versions": suite.versions(snapshot), "cases": cases}
        options.worker.write_text(json.dumps(found))


def _work(model: str, device: torch.device, *, quick: bool) -> Work:
    """A model of one layer at its own video size."""
    config = dataclasses.replace(PRESETS[model], num_layers=1)
    if quick:
        config = dataclasses.replace(config, num_attention_heads=12, attention_head_dim=16)
    return Work(config=config, tokens=count_tokens(config, default_video(config)), device=device, batch=BATCH)


def _steps(model: str, device: torch.device, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A model of one layer in every mesh of the job's ranks, and in one with its block's weights sharded."""
    work = _work(model, device, quick=quick)
    compiled = CompileConfig(backend="aot_eager" if quick else "inductor", strict=True)
    source = models.perturb(contest.random_upstream(work))
    ours = load(source, attention="sdpa", compile=compiled)
    splits: dict[str, Any] = {"alone": Whole()}
    size, heads = dist.get_world_size(), work.config.num_attention_heads
    meshes = {f"{guidance}x{size // guidance}": {"guidance": guidance, "sequence": size // guidance}
              for guidance in (1, 2) if size % guidance == 0 and heads % (size // guidance) == 0}  # fmt: skip
    for name, mesh in meshes.items():
        ours.set_parallel(ParallelConfig(**mesh))
        splits[name] = ours.runner.slots.split
    arguments = contest.call_arguments(work.config, work.tokens, BATCH, work.dtype, device)
    timesteps = torch.linspace(LAST_TIMESTEP, 1, CALLS).round().long().to(device)  # a call's is a view of them

    def generate(model: Any, split: Any) -> Tensor:
        model.runner.use(dataclasses.replace(model.runner.slots, split=split))
        calls = [arguments | {"timestep": each.expand(BATCH)} for each in timesteps]
        return [contest.run(model, each) for each in calls][-1]

    steps = {name: functools.partial(generate, ours, split) for name, split in splits.items()}
    for name, mesh in list(meshes.items())[:1]:
        parallel = ParallelConfig(**mesh, shard_weights=True)
        sharded = load(source, attention="sdpa", compile=compiled, parallel=parallel)
        meshes[f"{name}-sharded"] = mesh
        steps[f"{name}-sharded"] = functools.partial(generate, sharded, sharded.runner.slots.split)
    for name, found in _compare(steps, device, quick):
        sent = sum(part.sent for part in roofline.parts(work.config, work.tokens, batch=BATCH, **meshes[name]))
        if name.endswith("-sharded"):
            sent += sum(each.nbytes for each in ours.transformer_blocks.parameters()) * (size - 1) // size
        found["notes"] |= {"sent_mib_a_step": suite.short(sent / 2**20), "steps": CALLS}
        yield f"block/{name}", found


def _decode(model: str, device: torch.device, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default video of a model decoded by tiles."""
    from diffusers import AutoencoderKLCogVideoX

    from cogx_fast.assets.recipe import VAE_CONFIG

    torch.manual_seed(0)
    with device:
        vae = AutoencoderKLCogVideoX(**(VAE_CONFIG if quick else {})).eval().requires_grad_(False)
    vae.to(torch.float32 if quick else torch.bfloat16)  # not every CPU has convolutions in bf16
    video = default_video(PRESETS[model])
    frames = 1 if quick else latent_frames(PRESETS[model], video.frames)
    shape = (1, vae.config.latent_channels, frames, video.height // 8, video.width // 8)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, vae.dtype)
    vae.enable_tiling(*((32, 32) if quick else ()))
    pipe = SimpleNamespace(vae=vae)
    share_decode(pipe, ParallelConfig(decode=True))

    def decode(tiled: Callable[[Tensor], Any]) -> Tensor:
        with torch.no_grad():
            sample: Tensor = tiled(z).sample
        return sample

    steps = {"alone": lambda: decode(lambda z: type(vae).tiled_decode(vae, z)), "shared": lambda: decode(vae.decode)}
    size = dist.get_world_size()
    for _, found in _compare(steps, device, quick):
        sent = sent_bytes(plan_tiles(vae, shape, size), size, z.itemsize)
        found["notes"] |= {"sent_mib": suite.short(sent / 2**20)}
        yield f"decode/{size}", found


def _compare(
    steps: Mapping[str, Callable[[], Tensor]], device: torch.device, quick: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each step beside the first one, once it gives the same; seconds are of the slowest rank."""
    clock = timing.clock(device)

    def now() -> float:
        clock()  # this rank's device is done
        dist.all_reduce(torch.zeros(1))  # so are all
        return clock()

    alone, *others = steps
    expected = steps[alone]()
    errors = {name: models.relative_error(steps[name](), expected) for name in others}
    wrong = {name: error for name, error in errors.items() if not error < LIMIT}
    if wrong:
        raise suite.RedError(f"rank {dist.get_rank()}: relative errors beside one GPU {wrong}, the limit {LIMIT}")
    peaks = {name: measure.peak_bytes(steps[name], device) / 2**20 for name in steps}
    seconds = timing.take_turns(steps, rounds=2 if quick else 6, now=now)
    seconds = {name: each[1:] for name, each in seconds.items()}  # the first warms up
    for name in others:
        single, many = (timing.median(seconds[each]).median for each in (alone, name))
        notes = {"seconds": many, "alone_seconds": single, "error": errors[name],
                 "peak_mib": peaks[name], "alone_peak_mib": peaks[alone]}  # fmt: skip
        speedup = suite.short(1 / timing.ratio(seconds[name], seconds[alone]).median)
        yield name, {"held": {"speedup": speedup}, "notes": {key: suite.short(value) for key, value in notes.items()}}


def _link(device: torch.device, *, quick: bool) -> float:
    """GB/s that a rank sends in an exchange of all with all (``cogx-fast roofline --ceilings`` takes it as "link")."""
    size, clock = dist.get_world_size(), timing.clock(device)
    sent = torch.zeros(size, 1 << (16 if quick else 27), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(2 if quick else 6):
        begin = clock()
        dist.all_to_all_single(received, sent)
        seconds.append(clock() - begin)
    return sent[1:].nbytes / min(seconds) / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=lambda text: [int(each) for each in text.split(",")], metavar="N,N,…")
    parser.add_argument("--budget", type=float, default=600, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "out" / "gpu", metavar="DIR")
    parser.add_argument("--baselines", type=Path, default=suite.EXPECTED, metavar="DIR", help="the tables' folder")
    parser.add_argument("--resume", action="store_true", help="go on where the last run in --out stopped")
    parser.add_argument("--accept", action="store_true", help="record what is measured, and hold nothing against it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy sizes: every line runs, the times mean nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        work(options)
        return 0
    options.ranks = options.ranks or [number for number in RANKS if number <= torch.cuda.device_count()]
    if not options.ranks:
        print("error: torch sees fewer than two GPUs: --device cpu --quick --ranks 2 tries this", file=sys.stderr)
        return 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
