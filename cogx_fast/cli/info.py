"""``cogx-fast info``: what a model is and costs, from its configuration."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cogx_fast.cli.arguments import add_command, add_size, count, read_size
from cogx_fast.config import HUB_IDS, PRESETS, TransformerConfig
from cogx_fast.measure import costs
from cogx_fast.measure.devices import DEVICES, get_device
from cogx_fast.pipelines.budget import LINK, STEPS, Clock, by_recipe, choose_plan
from cogx_fast.pipelines.locate import Model, locate, read_stored_weights
from cogx_fast.pipelines.memory import estimate, released
from cogx_fast.sizes import VideoSize
from cogx_fast.terminal import Progress, pairs, scaled, table

CARDS = (8, 12, 16, 24, 48, 80)
"""Memory of GPUs that there are, in GB."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands, "info", run, "say what a model is and what a step costs, without loading weights",
        "Configuration, parameters by part, memory by dtype, tokens and operations of one denoising step.",
    )  # fmt: skip
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a pipeline or transformer directory, its config.json, a .safetensors file beside one, a hub id, or one "
        f"of {', '.join(PRESETS)}",
    )
    add_size(command)
    command.add_argument(
        "--batch", type=count, default=2, help="videos in one call; guidance doubles them (default: %(default)s)"
    )
    command.add_argument(
        "--memory", action="store_true", help=f"also how its pipeline fits cards of {', '.join(map(str, CARDS))} GB"
    )
    command.add_argument(
        "--device", choices=DEVICES, help="with --memory: the time predicted on that GPU, had it so much memory"
    )


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    """Carry it out: the report, and its text."""
    model = locate(arguments.model)
    facts = describe(model, **read_size(arguments), batch=arguments.batch)
    if arguments.memory:
        facts["device"] = arguments.device
        facts["cards"] = describe_cards(model, facts["video"], arguments.device)
    return facts, render(facts)


def describe_cards(model: Model, video: dict[str, int], device: str | None = None) -> list[dict[str, Any]]:
    """How a released pipeline in bf16 is laid out on cards of some sizes, with its predicted peaks, and times."""
    size = VideoSize(frames=video["frames"], height=video["height"], width=video["width"])
    pipe, tokens = released(model.config), model.tokens(size)
    needs = by_recipe(estimate(pipe, tokens, size, batch=video["batch"]), pipe.transformer)
    clock = None
    if device is not None:
        clock = Clock(device=get_device(device), config=model.config, tokens=tokens, batch=video["batch"])
    cards = []
    for gigabytes in CARDS:
        plan = choose_plan(needs, pipe.text_encoder, gigabytes * 10**9, clock)
        facts = None if plan is None else dataclasses.asdict(plan) | {"seconds": plan.seconds}
        cards.append({"gigabytes": gigabytes, "plan": facts})
    return cards


def describe(model: Model, *, frames: int | None, height: int | None, width: int | None, batch: int) -> dict[str, Any]:
    """Everything about a model that can be known without its weights, as plain data (the command's ``--json``).

    Args:
        model: the model.
        frames, height, width: of the video to count tokens and operations for; None for the model's own.
        batch: videos in one call of the transformer; guidance doubles them.

    Raises:
        ValueError: the model cannot make a video of that size, or its weight files are damaged or of another model.
    """
    config = model.config
    video = model.video(frames=frames, height=height, width=width)
    tokens = model.tokens(video)
    parameters = costs.count_parameters(config)
    stored = read_stored_weights(model)
    if stored is not None and stored.parameters != sum(parameters.values()):
        raise ValueError(
            f"the weight files of {model.name!r} hold {stored.parameters:,} parameters, its config.json describes "
            f"{sum(parameters.values()):,}: they do not belong together"
        )
    flops = costs.count_flops(config, tokens, batch=batch)
    return {
        "model": model.name,
        "kind": model.kind,
        "hub_id": HUB_IDS.get(model.name),
        "pipeline_class": model.pipeline_class,
        "config": dict(config),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "learned_positions": costs.count_positions(config),
        "memory_bytes": costs.memory(config),
        "stored": None
        if stored is None
        else {"files": stored.files, "bytes": stored.bytes, "dtypes": dict(stored.dtypes)},
        "video": {"frames": video.frames, "height": video.height, "width": video.width, "batch": batch},
        "tokens": {
            "text": tokens.text, "video": tokens.video, "joint": tokens.joint, "grid": list(tokens.grid)
        },
        "flops_per_step": {**flops, "total": sum(flops.values())},
    }  # fmt: skip


def render(facts: dict[str, Any]) -> str:
    """The same for people."""
    config = TransformerConfig(**facts["config"])
    parameters, flops = facts["parameters"], facts["flops_per_step"]
    names = [*costs.PARTS[: costs.PARTS.index("attention") + 1], "attention scores", "feed-forward", "norms", "head"]
    rows = [
        (
            name,
            f"{parameters[name]:,}" if name in parameters else "–",
            _share(parameters.get(name), parameters["total"]),
            scaled(flops[name], "FLOP") if name in flops else "–",
            _share(flops.get(name), flops["total"]),
        )
        for name in names
    ]
    rows.append(("total", f"{parameters['total']:,}", "", scaled(flops["total"], "FLOP"), ""))
    video, tokens = facts["video"], facts["tokens"]
    size = VideoSize(frames=video["frames"], height=video["height"], width=video["width"])
    grid = " × ".join(map(str, tokens["grid"]))
    memory = " · ".join(f"{name} {scaled(size, 'B')}" for name, size in facts["memory_bytes"].items())
    sections = [
        _title(facts),
        pairs(_config_pairs(config)),
        table(("part", "parameters", "share", "one step", "share"), rows, last_is_total=True),
        pairs(
            [
                ("video", f"{size}, batch {video['batch']}" + (" (guidance)" if video["batch"] == 2 else "")),
                ("tokens", f"{tokens['text']:,} text + {tokens['video']:,} video ({grid}) = {tokens['joint']:,}"),
                ("weights", memory),
                *_stored_pair(facts["stored"]),
            ]
        ),
    ]
    if "cards" in facts:
        sections.append(_cards_table(facts["cards"], facts["device"]))
    return "\n\n".join(sections)


def _cards_table(cards: list[dict[str, Any]], device: str | None) -> str:
    rows: list[tuple[str, ...]] = []
    for card in cards:
        plan = card["plan"]
        if plan is None:
            rows.append((f"{card['gigabytes']} GB", "does not fit", "–", "–", "–", "–"))
            continue
        words = [plan["kind"], *filter(None, [plan["recipe"]])]
        words += ["VAE tiled"] * plan["vae_tiling"] + ["T5 int8"] * plan["text_int8"]
        peaks = [scaled(peak, "B") for peak in plan["peaks"].values()]
        times = "–" if plan["seconds"] is None else f"{plan['step_seconds']:.2f} s, {plan['seconds']:.0f} s"
        rows.append((f"{card['gigabytes']} GB", ", ".join(words), *peaks, times))
    note = "Predicted peaks of the whole pipeline in bf16, 1 GiB of each for CUDA and its libraries (docs/memory.md)."
    if device is not None:
        note += (
            f"\nTimes of a step, and of {STEPS} with copies over {LINK}: what the ceilings of {device} allow at best."
        )
    return f"{table(('card', 'layout', 'text', 'denoise', 'decode', 'at least'), rows)}\n{note}"


def _title(facts: dict[str, Any]) -> str:
    words = [facts["pipeline_class"] or facts["kind"]]
    if facts["hub_id"]:
        words.append(facts["hub_id"])
    return f"{facts['model']} ({', '.join(words)}), {scaled(facts['parameters']['total'])} parameters"


def _config_pairs(config: TransformerConfig) -> list[tuple[str, str]]:
    positions = "sin-cos, added"
    if config.use_rotary_positional_embeddings:
        positions = "rotary and learned" if config.use_learned_positional_embeddings else "rotary"
    patch_frames = config.patch_size_t or 1
    patch = f"{config.patch_size} × {config.patch_size} latent pixels, {patch_frames} latent frame"
    embeddings = f"{config.time_embed_dim} wide" + (", with ofs" if config.ofs_embed_dim else "")
    return [
        ("width", f"{config.inner_dim:,} = {config.num_attention_heads} heads × {config.attention_head_dim}"),
        ("layers", str(config.num_layers)),
        ("channels", f"{config.in_channels} in, {config.out_channels} out"),
        ("patch", patch + ("s" if patch_frames > 1 else "")),
        ("positions", positions),
        ("text", f"{config.max_text_seq_length} tokens, {config.text_embed_dim:,} wide"),
        ("timestep", embeddings),
        ("feed-forward", config.activation_fn),
    ]


def _stored_pair(stored: dict[str, Any] | None) -> list[tuple[str, str]]:
    if stored is None:
        return []
    dtypes = ", ".join(sorted(stored["dtypes"], key=stored["dtypes"].get, reverse=True))
    files = "1 file" if stored["files"] == 1 else f"{stored['files']} files"
    return [("on disk", f"{scaled(stored['bytes'], 'B')} in {files}, {dtypes}")]


def _share(value: int | None, total: int) -> str:
    return "" if value is None else f"{100 * value / total:.1f} %"


__all__ = ["add", "describe", "render", "run"]
