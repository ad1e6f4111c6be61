"""``cogx-fast roofline``: where a step's time must go on a device, by its ceilings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cogx_fast import sizes
from cogx_fast.cli.arguments import add_command, add_size, count
from cogx_fast.config import TransformerConfig
from cogx_fast.measure import roofline
from cogx_fast.measure.devices import DEVICES, get_device
from cogx_fast.pipelines.locate import locate
from cogx_fast.runtime.step_schedule import FirstBlock, StepCacheError, StepSchedule, TeaCache
from cogx_fast.runtime.step_schedule_file import choose_strategy
from cogx_fast.sizes import VideoSize
from cogx_fast.terminal import Progress, scaled, table


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "roofline", run, "say how fast a step can be on a device at most, and where its time must go",
        "Operations, bytes and the least time of each part of one denoising step at a device's ceilings.",
    )  # fmt: skip
    command.add_argument("--preset", "--model", dest="model", required=True, metavar="MODEL", help="as for info")
    command.add_argument("--device", required=True, choices=DEVICES, help="a described device")
    add_size(command)
    command.add_argument("--batch", type=count, default=2, help="videos in one call (default: %(default)s, guidance)")
    command.add_argument(
        "--quant", default=roofline.UNQUANTIZED, choices=roofline.SCHEMES, help="of the blocks' linears (default: none)"
    )
    command.add_argument(
        "--attention-kept", type=float, default=1.0, metavar="SHARE",
        help="share of the attention scores that are computed (default: 1, dense)",
    )  # fmt: skip
    command.add_argument("--gpus", type=count, default=1, help="that share the step (default: %(default)s)")
    command.add_argument(
        "--step-cache", metavar="SCHEDULE", help="quality, balanced, fast, mask:1,1,0,… or a schedule's file: its steps"
    )
    command.add_argument("--steps", type=count, default=50, help="of a generation, for --step-cache [%(default)s]")
    command.add_argument(
        "--ceilings", type=Path, metavar="FILE", help="JSON with measured ceilings (TFLOP/s, GB/s) for stated ones"
    )


def run(arguments: argparse.Namespace, _: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    model = locate(arguments.model)
    video = sizes.choose_video(
        model.config,
        frames=arguments.frames,
        height=arguments.height,
        width=arguments.width,
        spatial_factor=model.spatial_factor,
    )
    tokens = sizes.count_tokens(model.config, video, spatial_factor=model.spatial_factor)
    device = roofline.with_ceilings(get_device(arguments.device), _read_ceilings(arguments.ceilings))
    found = roofline.parts(
        model.config, tokens, batch=arguments.batch, scheme=arguments.quant, kept=arguments.attention_kept,
        gpus=arguments.gpus,
    )  # fmt: skip
    total = sum(part.seconds(device) for part in found)
    facts = {
        "model": model.name,
        "device": {"name": device.name, "source": device.source},
        "video": {"frames": video.frames, "height": video.height, "width": video.width, "batch": arguments.batch},
        "tokens": tokens.joint,
        "quant": arguments.quant,
        "attention_kept": arguments.attention_kept,
        "gpus": arguments.gpus,
        "parts": [
            {
                "name": part.name, "group": part.group, "products": part.products, "flops": part.flops,
                "bytes": part.bytes, "exponentials": part.exponentials, "sent_bytes": part.sent,
                "seconds": part.seconds(device), "bound": part.bound(device), "share": part.seconds(device) / total,
            }
            for part in found
        ],
        "flops": sum(part.flops for part in found),
        "bytes": sum(part.bytes for part in found),
        "floor_seconds": total,
        "groups": {
            group: sum(part.seconds(device) for part in found if part.group == group)
            for group in dict.fromkeys(part.group for part in found)
        },
    }  # fmt: skip
    if arguments.step_cache is not None:
        options = {"scheme": arguments.quant, "kept": arguments.attention_kept, "gpus": arguments.gpus}
        schedule = _read_schedule(arguments.step_cache, model.config, arguments.steps)
        steps = roofline.schedule_seconds(schedule, model.config, tokens, device, batch=arguments.batch, **options)
        facts["step_cache"] = {
            "schedule": arguments.step_cache,
            "steps": schedule.steps,
            "speedup": schedule.speedup,
            "mean_floor_seconds": sum(steps) / len(steps),
            "shortest_floor_seconds": min(steps),
            "ratio": sum(steps) / len(steps) / total,
        }
    return facts, render(facts)


def render(facts: dict[str, Any]) -> str:
    """The same for people: parts by their time, the longest first."""
    longest = sorted(facts["parts"], key=lambda part: -part["seconds"])
    rows = [
        (
            part["name"],
            scaled(part["flops"], "FLOP") if part["flops"] else "–",
            scaled(part["bytes"] or part["sent_bytes"], "B"),
            scaled(part["exponentials"]) if part["exponentials"] else "–",
            f"{1e3 * part['seconds']:.1f}",
            f"{part['share']:.1%}",
            f"{part['products']} products" if part["bound"] == "products" else part["bound"],
        )
        for part in longest
    ]
    total = facts["floor_seconds"]
    rows.append(
        ("at least", scaled(facts["flops"], "FLOP"), scaled(facts["bytes"], "B"), "", f"{1e3 * total:.1f}", "", "")
    )
    video = facts["video"]
    size = VideoSize(frames=video["frames"], height=video["height"], width=video["width"])
    what = [f"{facts['model']}, {size}, batch {video['batch']}, {facts['tokens']:,} tokens", facts["quant"]]
    if facts["attention_kept"] != 1:
        what.append(f"{facts['attention_kept']:.0%} of the attention scores")
    where = f"{facts['gpus']} × {facts['device']['name']}, each" if facts["gpus"] > 1 else facts["device"]["name"]
    header = ("one step", "operations", "bytes", "exponentials", "ms", "share", "bound by")
    cached = ""
    if "step_cache" in facts:
        found = facts["step_cache"]
        cached = (
            f"\nWith the step cache {found['schedule']}, {found['speedup']:.2f} times fewer blocks in {found['steps']} "
            f"steps: {1e3 * found['mean_floor_seconds']:.1f} ms a step in the mean ({found['ratio']:.3f} ×), the "
            f"shortest {1e3 * found['shortest_floor_seconds']:.1f} ms."
        )
    groups = ", ".join(f"{group} {seconds / total:.0%}" for group, seconds in facts["groups"].items())
    return "\n\n".join(
        [
            f"{', '.join(what)}\n{where} ({facts['device']['source']})",
            table(header, rows, last_is_total=True),
            f"The time must go into: {groups}.{cached}\nA floor from the device's ceilings, not a measurement.",
        ]
    )


def _read_schedule(value: str, config: TransformerConfig, steps: int) -> StepSchedule:
    strategy = choose_strategy(value, config)
    if isinstance(strategy, FirstBlock | TeaCache):
        raise StepCacheError(f"step_cache is {value!r}, which depends on the model's weights: give a name or a file")
    layers: Any = SimpleNamespace(transformer_blocks=range(config.num_layers))
    return strategy.schedule(layers, range(steps, 0, -1))


def _read_ceilings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f'{path}: not valid JSON ({error}): expected {{"bf16": TFLOP/s, …}}') from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a {type(content).__name__}, expected an object of ceilings")
    return content


__all__ = ["add", "render", "run"]
