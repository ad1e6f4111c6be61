"""Files that carry compiled code: a zip with a manifest that is checked before anything else in it is used.

What such a file holds is executed by whoever loads it. The checksums are against damage, not against malice: take
these files only from where you would take a program from.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import platform
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cogx_fast.whole_file import whole_file

MANIFEST = "manifest.json"
_FORMAT = 1
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OverflowError)


class ArtifactError(ValueError):
    """A file of compiled code that is damaged, foreign or made elsewhere; the message says what was found."""


def write_artifact(
    path: str | os.PathLike[str], kind: str, manifest: Mapping[str, Any], members: Mapping[str, bytes]
) -> None:
    """Write a file of compiled code, whole or not at all.

    Args:
        path: replaced if it is there; its directory must be.
        kind: what it is, e.g. "compile cache".
        manifest: what it was made with, JSON.
        members: contents by name.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    listed = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in members.items()}
    head = {"kind": kind, "format": _FORMAT, **manifest, "members": listed}
    with whole_file(path) as hidden, zipfile.ZipFile(hidden, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, json.dumps(head, indent=2, sort_keys=True))
        for name, data in members.items():
            file.writestr(name, data)


def read_artifact(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the members of a file that ``write_artifact`` wrote. Nothing in it is run or unpickled.

    Raises:
        ArtifactError: it is damaged, or something else.
        OSError: it cannot be read.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(content) as file:
            if MANIFEST not in file.namelist():
                raise ArtifactError(f"{path}: has no {MANIFEST}: it is not a {kind} of cogx_fast")
            manifest = json.loads(file.read(MANIFEST))
            members = {name: file.read(name) for name in file.namelist() if name != MANIFEST}
    except ArtifactError:
        raise
    except (*_UNREADABLE, ValueError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path}: damaged, or not a {kind} ({error}): make it again") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(f"{path}: its kind is {found!r}, expected {kind!r}: this is another file")
    if manifest.get("format") != _FORMAT:
        raise ArtifactError(
            f"{path}: format {manifest.get('format')!r}, this cogx_fast reads {_FORMAT}: make it again with this one"
        )
    _check_members(path, manifest.get("members"), members)
    return manifest, members


def _check_members(path: object, listed: Any, members: Mapping[str, bytes]) -> None:
    if not isinstance(listed, dict) or set(listed) != set(members):
        names = sorted(set(members) ^ set(listed if isinstance(listed, dict) else ()))
        raise ArtifactError(f"{path}: its contents are not those of its manifest ({', '.join(names)}): make it again")
    for name, data in members.items():
        expected = listed[name].get("sha256") if isinstance(listed[name], dict) else None
        found = _sha256(data)
        if found != expected:
            checksums = f"SHA-256 {found[:12]}…, expected {str(expected)[:12]}…"
            raise ArtifactError(f"{path}: {name} is damaged ({checksums}): make it again")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Where a manifest is not as it must be, as "name: got …, expected …"; other fields of it do not matter."""
    for key, wanted in expected.items():
        value, name = found.get(key), f"{prefix}{key}"
        if isinstance(wanted, Mapping) and isinstance(value, Mapping):
            yield from differences(value, wanted, f"{name}.")
        elif value != wanted:
            yield f"{name}: got {value!r}, expected {wanted!r}"


def describe_versions() -> dict[str, Any]:
    """Versions that compiled code belongs to."""
    from cogx_fast.version import __version__

    return {"torch": str(torch.__version__), "cogx_fast": __version__}


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device that compiled code is for: its name and, of a CPU, what instructions it has."""
    if device.type == "cuda":
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": str(torch.version.cuda or torch.version.hip),
        }
    flags = torch.cpu.get_capabilities()
    return {
        "type": device.type,
        "system": f"{sys.platform} {platform.machine()}",
        "instructions": " ".join(sorted(name for name, value in flags.items() if value is True)),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = [
    "ArtifactError", "describe_device", "describe_versions", "differences", "read_artifact",
    "write_artifact",
]  # fmt: skip
