"""``cogx-fast roofline``: where a step's time must go on a device, by its ceilings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogx_fast.cli.arguments import add_command, add_size, count, read_size
from cogx_fast.config import TransformerConfig
from cogx_fast.measure import mesh, roofline
from cogx_fast.measure.devices import DEVICES, PCIE_SHARE, Device, get_device
from cogx_fast.pipelines.locate import Model, locate
from cogx_fast.runtime.step_caching.step_schedule_file import foresee_schedule
from cogx_fast.sizes import Tokens, VideoSize
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
    command.add_argument(
        "--offload", choices=["blocks"], help="also say whether the copies of streamed blocks hide under the computing"
    )
    command.add_argument(
        "--gpus", type=_counts, default=(1,), metavar="N|N..M", help="that share the step: the best mesh (default: 1)"
    )
    command.add_argument("--link", choices=mesh.LINKS, help="between GPUs (default: what the device has)")
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
    video = model.video(**read_size(arguments))
    tokens = model.tokens(video)
    device = get_device(arguments.device)
    if max(arguments.gpus) > 1:
        device = mesh.with_link(device, arguments.link or ("nvlink" if mesh.has_nvlink(device) else "pcie"))
    device = roofline.with_ceilings(device, _read_ceilings(arguments.ceilings))
    options = {"batch": arguments.batch, "scheme": arguments.quant, "kept": arguments.attention_kept}
    if len(arguments.gpus) > 1:
        facts = _of_meshes(model, tokens, device, arguments.gpus, options)
        return facts, _render_meshes(facts)
    (gpus,) = arguments.gpus
    best = _best(model.config, tokens, device, gpus, options)
    found = roofline.parts(model.config, tokens, guidance=best.guidance, sequence=best.sequence, **options)
    total = sum(part.seconds(device) for part in found)
    facts = {
        "model": model.name,
        "device": {"name": device.name, "source": device.source},
        "video": {"frames": video.frames, "height": video.height, "width": video.width, "batch": arguments.batch},
        "tokens": tokens.joint,
        "quant": arguments.quant,
        "attention_kept": arguments.attention_kept,
        "gpus": gpus,
        "mesh": {"guidance": best.guidance, "sequence": best.sequence},
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
    if arguments.offload is not None:
        links = roofline.streaming(model.config, found, device, scheme=arguments.quant)
        facts["streaming"] = [dataclasses.asdict(each) | {"hides": each.hides} for each in links]
    if arguments.step_cache is not None:
        shared = {**options, "guidance": best.guidance, "sequence": best.sequence}
        schedule = foresee_schedule(arguments.step_cache, model.config, arguments.steps)
        steps = roofline.schedule_seconds(schedule, model.config, tokens, device, **shared)
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
    pair = f"guidance {facts['mesh']['guidance']} × sequence {facts['mesh']['sequence']}"
    where = (
        f"{facts['gpus']} × {facts['device']['name']}, {pair}, each" if facts["gpus"] > 1 else facts["device"]["name"]
    )
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
            *_render_streaming(facts.get("streaming", [])),
        ]
    )


def _render_streaming(links: list[dict[str, Any]]) -> list[str]:
    if not links:
        return []
    first = links[0]
    rows = [
        (
            each["link"],
            f"{1e3 * each['copy_seconds']:.1f}",
            "hidden" if each["hides"] else f"{each['copy_seconds'] / each['compute_seconds']:.1f} × as long",
            f"{1e3 * each['step_seconds']:.1f}",
        )
        for each in links
    ]
    return [
        f"Streamed blocks (a prediction): {scaled(first['block_bytes'], 'B')} a block, which computes in at least "
        f"{1e3 * first['compute_seconds']:.1f} ms; copies at {PCIE_SHARE:.0%} of the link's rate",
        table(("link", "copy, ms", "beside computing", "a step at least, ms"), rows),
    ]


def _best(config: TransformerConfig, tokens: Tokens, device: Device, gpus: int, options: dict[str, Any]) -> mesh.Shared:
    found = mesh.meshes(config, tokens, device, gpus, **options)
    if not found:
        able = [str(each) for each in range(2, 65) if mesh.meshes(config, tokens, device, each, **options)]
        raise ValueError(
            f"{gpus} GPUs cannot share a batch of {options['batch']} and {config.num_attention_heads} heads: use one "
            f"of {', '.join(able)}"
        )
    return found[0]


def _of_meshes(
    model: Model, tokens: Tokens, device: Device, numbers: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
    """The best mesh for each number of GPUs that has one, and published speed-ups beside what is said here."""
    alone = mesh.share(model.config, tokens, device, 1, 1, **options).seconds
    found = [mesh.meshes(model.config, tokens, device, number, **options)[:1] for number in numbers]
    checks = [(published, mesh.check(published)) for published in mesh.PUBLISHED]
    return {
        "model": model.name,
        "device": {"name": device.name, "source": device.source},
        "link": {"bytes_per_second": device.link, "latency_seconds": device.link_latency},
        "tokens": tokens.joint,
        **options,
        "seconds_alone": alone,
        "meshes": [
            {**dataclasses.asdict(best), "gpus": best.gpus, "seconds": best.seconds, "speed_up": alone / best.seconds}
            for (best,) in filter(None, found)
        ],
        "published": [
            {
                "source": published.source, "model": published.model, "device": published.device,
                "gpus": published.gpus, "speed_up": published.speed_up, "said_here": check.speed_up,
                "link_bytes_per_second": check.link,
            }
            for published, check in checks
        ],
    }  # fmt: skip


def _render_meshes(facts: dict[str, Any]) -> str:
    rows = [
        (
            str(each["gpus"]),
            f"{each['guidance']} × {each['sequence']}",
            f"{each['seconds']:.3f}",
            f"{each['speed_up']:.2f}",
            f"{each['speed_up'] / each['gpus']:.0%}",
            scaled(each["sent"], "B"),
            f"{each['exchange'] / each['seconds']:.0%}",
        )
        for each in facts["meshes"]
    ]
    header = ("GPUs", "guidance × sequence", "a step, s", "speed-up", "of ideal", "each sends", "of the time")
    link = facts["link"]
    checks = [
        f"{each['model']} on {each['gpus']} × {each['device']}: {each['speed_up']:.2f} published ({each['source']}), "
        f"{each['said_here']:.2f} said here ({each['said_here'] / each['speed_up'] - 1:+.0%}); "
        f"{each['link_bytes_per_second'] / 1e9:.1f} GB/s a GPU would explain it"
        for each in facts["published"]
    ]
    return "\n\n".join(
        [
            f"{facts['model']}, batch {facts['batch']}, {facts['tokens']:,} tokens, {facts['scheme']}\n"
            f"{facts['device']['name']} ({facts['device']['source']}), {link['bytes_per_second'] / 1e9:.0f} GB/s and "
            f"{1e6 * link['latency_seconds']:.0f} µs between them; alone {facts['seconds_alone']:.3f} s a step",
            table(header, rows),
            "Floors, not measurements: nothing is sent while something is computed, and every link gives its rate.\n"
            + "\n".join(checks),
        ]
    )


def _counts(text: str) -> tuple[int, ...]:
    """A number of GPUs, or all from one to another."""
    first, dots, last = text.partition("..")
    numbers = range(count(first), (count(last) if dots else int(first)) + 1)
    if not numbers:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected N, or N..M with M from N on")
    return tuple(numbers)


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
