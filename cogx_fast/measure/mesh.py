"""How fast a step can be on several GPUs, by each mesh of them: the roofline with the links between the GPUs.

A GPU's part of the work takes what its ceilings allow, and what is sent takes its bytes at the link's rate and a fixed
time for each collective; nothing is sent while something is computed. As every floor it holds for no device exactly.
What it says of the speed-up is held against figures that were published (``PUBLISHED``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from cogx_fast.config import PRESETS, TransformerConfig
from cogx_fast.measure import roofline
from cogx_fast.measure.devices import DEVICES, GIGA, Device
from cogx_fast.sizes import Tokens, VideoSize, count_tokens


class Link(NamedTuple):
    """What joins GPUs."""

    bandwidth: float | None
    """Bytes a second that one GPU can send; None: as its device says."""
    latency: float
    """Seconds of a collective that sends next to nothing: an assumption, of the order that NCCL's tests show."""
    about: str


PCIE = 32 * GIGA
LINKS: dict[str, Link] = {
    "nvlink": Link(None, 20e-6, "NVLink at the device's rate"),
    "pcie": Link(PCIE, 30e-6, "PCIe 4.0 × 16 of its own for each GPU"),
    "network": Link(50 * GIGA, 50e-6, "a network of 400 Gb/s for each GPU"),
}


def has_nvlink(device: Device) -> bool:
    """Whether its own link is faster than PCIe."""
    return device.link > PCIE


def with_link(device: Device, name: str) -> Device:
    """The device, joined to others of its kind by that.

    Raises:
        ValueError: NVLink, which it does not have.
    """
    link = LINKS[name]
    if link.bandwidth is None and not has_nvlink(device):
        raise ValueError(f"{device.name} has no NVLink: use pcie or network")
    return dataclasses.replace(device, link=link.bandwidth or device.link, link_latency=link.latency)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A step on a mesh of GPUs."""

    guidance: int
    sequence: int
    compute: float
    """Seconds."""
    exchange: float
    """Seconds."""
    sent: int
    """Bytes that each GPU sends."""

    @property
    def gpus(self) -> int:
        """How many."""
        return self.guidance * self.sequence

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.exchange


def share(
    config: TransformerConfig, tokens: Tokens, device: Device, guidance: int, sequence: int, *, reached: float = 1.0,
    **options: Any,
) -> Shared:  # fmt: skip
    """A step on that mesh.

    Args:
        config, tokens: of the model and the video.
        device: with its link (``with_link``).
        guidance, sequence: the mesh.
        reached: share of the ceilings that kernels reach.
        options: ``batch``, ``scheme`` and ``kept`` of ``roofline.parts``.

    Raises:
        ValueError: as ``roofline.parts``.
    """
    parts = roofline.parts(config, tokens, guidance=guidance, sequence=sequence, **options)
    computed, sent = [[p for p in parts if (p.group == "communication") is is_sent] for is_sent in (False, True)]
    return Shared(
        guidance=guidance,
        sequence=sequence,
        compute=sum(part.seconds(device) for part in computed) / reached,
        exchange=sum(part.seconds(device) for part in sent),
        sent=sum(part.sent for part in sent),
    )


def meshes(config: TransformerConfig, tokens: Tokens, device: Device, gpus: int, **options: Any) -> list[Shared]:
    """Every mesh of so many GPUs, the fastest first; none where the numbers do not divide.

    Args:
        config, tokens, device, options: as of ``share``.
        gpus: how many.
    """
    batch, heads = options["batch"], config.num_attention_heads
    pairs = [(guidance, gpus // guidance) for guidance in range(1, gpus + 1) if gpus % guidance == 0]
    able = [(guidance, sequence) for guidance, sequence in pairs if batch % guidance == 0 and heads % sequence == 0]
    return sorted((share(config, tokens, device, *pair, **options) for pair in able), key=lambda found: found.seconds)


class Published(NamedTuple):
    """A speed-up that others measured."""

    source: str
    model: str
    video: VideoSize
    device: str
    gpus: int
    speed_up: float
    step: float
    """Seconds of a step on all of them, by which it is known what one reached."""


_XDIT = "xDiT, docs/performance/cogvideo.md"
PUBLISHED = (
    Published(_XDIT, "2b", VideoSize(frames=49, height=480, width=720), "l40", 12, 4.29, 0.49),
    Published(_XDIT, "5b", VideoSize(frames=49, height=480, width=720), "l40", 12, 7.75, 40 / 50),
    Published(_XDIT, "1.5-5b", VideoSize(frames=161, height=768, width=1360), "l40", 8, 6.12, 600 / 50),
)
"""50 steps; 40 s and "less than 10 minutes" are of whole videos. "Up to" 12 GPUs are taken for 12."""


class Check(NamedTuple):
    """What is said here of something that was published."""

    speed_up: float
    """With kernels as fast as theirs were."""
    link: float
    """Bytes a second that would explain theirs."""


def check(published: Published) -> Check:
    """Hold this model against a published figure."""
    config = PRESETS[published.model]
    tokens, device = count_tokens(config, published.video), with_link(DEVICES[published.device], "pcie")
    alone = share(config, tokens, device, 1, 1, batch=2).seconds
    taken = published.step * published.speed_up
    best = meshes(config, tokens, device, published.gpus, batch=2, reached=min(1.0, alone / taken))[0]
    return Check(taken / best.seconds, best.sent / (published.step - best.compute))


__all__ = [
    "LINKS", "PCIE", "PUBLISHED", "Check", "Link", "Published", "Shared", "check", "has_nvlink", "meshes", "share",
    "with_link",
]  # fmt: skip
