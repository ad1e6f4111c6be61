"""Warm start: what compiling a model made, as a file that another process compiles from.

A bundle holds torch's portable cache artifacts (``torch.compiler.save_cache_artifacts``), of this model alone, and the
C++ libraries that torch leaves out of them: on a CPU those are what compiling takes the time for.

A bundle is code: its artifacts are pickles and libraries, and loading it runs what it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cogx_fast.attention.plan import hash_config
from cogx_fast.runtime.code_file import (
    ArtifactError,
    describe_device,
    describe_versions,
    differences,
    read_artifact,
    write_artifact,
)
from cogx_fast.whole_file import whole_file

if TYPE_CHECKING:
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.compiling.recorder import Recorder
    from cogx_fast.runtime.module import CogVideoXModel

KIND = "compile cache"
_ARTIFACTS = "artifacts.bin"
LIBRARY = re.compile(r"libraries/([a-z2-7]{2}/c[a-z2-7]{51}(\.main)?\.so)")
"""How a bundle names a C++ library, and, behind the first folder, torch's cache does."""


def save_compile_cache(model: CogVideoXModel, path: str | os.PathLike[str]) -> None:
    """Write what compiling ``model`` made, for ``load(..., compile_cache=path)`` in another process.

    Args:
        model: compiled, and called once with every size that the bundle is to hold.
        path: the file; replaced if it is there.

    Raises:
        ValueError: nothing was compiled yet, or not by Inductor.
        OSError: it cannot be written.
    """
    recorder = _recorder(model)
    if recorder is None:
        raise ValueError("the model is not compiled by Inductor: load it with compile=True, call it once, then save")
    if not recorder.artifacts:
        raise ValueError("the model has not compiled anything yet: call it once with each size to keep, then save")
    members = {_ARTIFACTS: _pack([*recorder.artifacts, *_autotuning()])}
    for library in sorted(recorder.libraries | _instruction_probes(model.device)):
        with contextlib.suppress(FileNotFoundError):  # a cache that was emptied meanwhile: it is made again
            members[f"libraries/{library.parent.name}/{library.name}"] = library.read_bytes()
    write_artifact(path, KIND, describe(model, recorder.made_by), members)


def load_compile_cache(model: CogVideoXModel, path: str | os.PathLike[str], *, is_called: bool = False) -> bool:
    """Have a compiled model start from a bundle. This runs code from it: take bundles only from where you trust code.

    Args:
        model: compiled, not called yet.
        path: what ``save_compile_cache`` wrote.
        is_called: it is being called: nothing about it will change.

    Returns:
        Whether it is used; True where only that differs which may yet change (it was made on CUDA, and the model is not
        there; its weights needed gradients, or did not): it is looked at again before the first graph is compiled. If
        not (another version, device, configuration or way to compile; a damaged file), a warning says why, and the
        model compiles as without it.
    """
    try:
        recorder = _recorder(model)
        if recorder is None:
            raise ArtifactError(f"{path}: the model is not compiled by Inductor")
        manifest, members = read_artifact(path, KIND)
        expected = describe(model, recorder.made_by)
        wrong = list(differences(manifest, expected))
        if wrong and not is_called and _is_for_later(manifest, expected):
            recorder.when_called = functools.partial(load_compile_cache, model, path, is_called=True)
            return True
        if manifest.get("gradients") == (not expected["gradients"]):
            wrong.append(f"call model.requires_grad_({manifest['gradients']}) before the first call")
        if wrong:
            raise ArtifactError(f"{path}: was made for something else ({'; '.join(wrong)})")
        strange = [name for name in members if name != _ARTIFACTS and not LIBRARY.fullmatch(name)]
        if strange or _ARTIFACTS not in members:
            raise ArtifactError(f"{path}: has contents no bundle has ({', '.join(strange) or 'no artifacts'})")
        _install(members)
    except (ArtifactError, OSError) as error:
        warnings.warn(f"{error}. The compile cache is not used; the model compiles anew", stacklevel=3)
        return False
    return True


def _recorder(model: CogVideoXModel) -> Recorder | None:
    compilation = model.runner.compilation
    return None if compilation is None else compilation.recorder


def _is_for_later(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether the model may yet become what the bundle is for.

    It may be moved to a GPU, where its attention is chosen anew, and be told to need gradients or not.
    """
    made_on = manifest.get("device")
    is_elsewhere = isinstance(made_on, Mapping) and made_on.get("type") == "cuda" != expected["device"]["type"]
    changing = {"gradients"}
    if is_elsewhere and torch.cuda.is_available():
        changing |= {"device", "environment", "vectors", "attention"}
    return not any(differences(manifest, {key: value for key, value in expected.items() if key not in changing}))


def describe(model: CogVideoXModel, config: CompileConfig) -> dict[str, Any]:
    """What a bundle must have been made with to be of use."""
    weights = {f"{type(tensor.data).__name__} {tensor.dtype}" for tensor in model.transformer_blocks.parameters()}
    return {
        "versions": {**describe_versions(), "python": platform.python_version(), "triton": _triton_version()},
        "device": {**describe_device(model.device), "index": model.device.index},  # which generated code names
        "environment": sys.prefix if model.device.type == "cpu" else None,  # its C++ libraries are named after it
        # Its kernels are written for one width, which ATEN_CPU_CAPABILITY can change; torch's own cache does not look.
        "vectors": torch.backends.cpu.get_cpu_capability() if model.device.type == "cpu" else None,
        "config": hash_config(model.config),
        "compile": {key: _plain(value) for key, value in dataclasses.asdict(config).items()},
        "attention": sorted(model.attention_backends),
        "sparse": model.attention_plan is not None,
        "weights": sorted(weights),
        "gradients": any(tensor.requires_grad for tensor in model.transformer_blocks.parameters()),
    }


def _install(members: Mapping[str, bytes]) -> None:
    """Put a checked bundle where torch looks for what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name, data in members.items():
        match = LIBRARY.fullmatch(name)
        if match is None:
            continue
        target = Path(cache_dir(), match[1])
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as hidden:  # another process may be at the same
            hidden.write_bytes(data)
    if torch.compiler.load_cache_artifacts(members[_ARTIFACTS]) is None:
        raise ArtifactError("the bundle's artifacts cannot be read by this torch")


def _pack(artifacts: list[Any]) -> bytes:
    """Artifacts in torch's portable format."""
    from torch.compiler._cache import CacheArtifactManager as Manager

    with Manager.with_fresh_cache():
        for artifact in artifacts:
            Manager._new_cache_artifacts[artifact.type()].append(artifact)
        saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    return saved[0]


def _autotuning() -> list[Any]:
    """Which launch parameters were fastest. It is found when a kernel first runs, so it cannot be told whose it is."""
    from torch.compiler._cache import CacheArtifactManager as Manager

    return [artifact for artifact in Manager._seen_artifacts if artifact.type() == "autotune"]


def _instruction_probes(device: torch.device) -> set[Path]:
    """The little libraries by which Inductor finds out what instructions the compiler and the CPU can do."""
    from torch._inductor import cpu_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if device.type != "cpu":
        return set()
    kinds = [kind for kind in vars(cpu_vec_isa).values() if isinstance(kind, type)]
    probes = {
        text.strip()
        for kind in kinds
        for name, text in vars(kind).items()
        if name.endswith("_code") and isinstance(text, str)
    }
    sources = Path(cache_dir()).glob("??/c*.cpp")
    return {
        source.with_suffix(".so")
        for source in sources
        if not source.name.endswith(".main.cpp") and source.read_text().strip() in probes
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


__all__ = ["LIBRARY", "describe", "load_compile_cache", "save_compile_cache"]
