"""A bundle makes the first call of another process a warm one, and is not touched where it does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast.runtime.code_file import read_artifact, write_artifact
from cogx_fast.runtime.compiling import warm_start
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
from cogx_fast.runtime.compiling.recorder import Recorder
from cogx_fast.runtime.compiling.warm_start import load_compile_cache, save_compile_cache
from cogx_fast.runtime.module import CogVideoXModel
from tests.cases import for_each
from tests.support import inputs, small, upstream

CHILD = """
import json, sys, time
import torch, cogx_fast
from tests.runtime.test_warm_start import make
from tests.support import inputs
layers, heads, quant, bundle = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
begin = time.perf_counter()
source = make(layers, heads).requires_grad_("told" in sys.argv)
model = cogx_fast.load(source, compile=True, quant=None if quant == "none" else quant,
                       compile_cache=bundle if "warm" in sys.argv else None).requires_grad_(False)
loaded = time.perf_counter()
with torch.no_grad():
    output = model(**inputs(model.config), return_dict=False)[0]
called = time.perf_counter()
if "warm" not in sys.argv:
    model.save_compile_cache(bundle)
from torch._dynamo.utils import counters
hits = {name: counters[kind][name] for kind, name in [("aot_autograd", "autograd_cache_hit"),
        ("aot_autograd", "autograd_cache_miss"), ("aot_autograd", "autograd_cache_bypass"),
        ("inductor", "fxgraph_cache_hit"), ("inductor", "fxgraph_cache_miss")]}
print(json.dumps({"load": loaded - begin, "call": called - loaded, "sum": output.double().abs().sum().item(), **hits}))
"""


def make(layers: int = 2, heads: int = 1) -> CogVideoXModel:
    """A model with weights that are the same in every process."""
    torch.manual_seed(0)
    return CogVideoXModel(small("5b", num_layers=layers, num_attention_heads=heads)).eval().requires_grad_(False)


def run(cache_dir: Path, *arguments: object) -> dict[str, Any]:
    """One process with a cache directory of its own."""
    env = os.environ | {
        "TORCHINDUCTOR_VEC_ISA_OK": "",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir),
        "TRITON_CACHE_DIR": str(cache_dir / "triton"),
    }
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1200)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle that another process wrote, and what that process did."""
    directory = tmp_path_factory.mktemp("bundle")
    return directory / "m.bundle", run(directory / "cold", 2, 1, "none", directory / "m.bundle")


@pytest.fixture
def model() -> CogVideoXModel:
    """The bundle's model in this process, compiled but not called."""
    return cogx_fast.load(make(), compile=True)


def libraries(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*.so")}


@pytest.mark.parametrize("how", ["as it was", "told"])
def test_another_process_finds_everything_compiled(
    how: str, bundle: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Also where weights that need gradients are told after loading that they need none."""
    path, cold = bundle
    warm = run(tmp_path, 2, 1, "none", path, "warm", how)
    assert (cold["autograd_cache_miss"], cold["fxgraph_cache_miss"], cold["autograd_cache_hit"]) == (3, 3, 0)
    assert (warm["autograd_cache_miss"], warm["fxgraph_cache_miss"], warm["autograd_cache_bypass"]) == (0, 0, 0)
    assert warm["autograd_cache_hit"] >= 3
    assert warm["sum"] == cold["sum"]
    carried = {Path(name).name for name in read_artifact(path, warm_start.KIND)[1] if name.endswith(".so")}
    assert libraries(tmp_path) == carried  # none was built
    assert libraries(path.parent / "cold") == carried


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("quant", ["none", "int8-dynamic", "int8-weight-only"])
def test_the_first_call_takes_a_quarter_of_a_cold_one(quant: str, tmp_path: Path) -> None:
    cold = run(tmp_path / "cold", 8, 4, quant, tmp_path / "m.bundle")
    warm = run(tmp_path / "warm", 8, 4, quant, tmp_path / "m.bundle", "warm")
    print(f"{quant}: load {cold['load']:.2f} -> {warm['load']:.2f} s, call {cold['call']:.2f} -> {warm['call']:.2f} s")
    assert warm["call"] <= cold["call"] / 4
    assert warm["load"] + warm["call"] <= (cold["load"] + cold["call"]) / 2
    assert (warm["autograd_cache_miss"], warm["autograd_cache_bypass"]) == (0, 0)
    assert warm["sum"] == cold["sum"]


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a bundle may be used."""
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda *_: pytest.fail("a refused bundle was used"))


def refused(model: CogVideoXModel, path: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not load_compile_cache(model, path)
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.usefixtures("untouched")
@for_each(
    "field, value",
    [
        ("versions.torch", "1.0"),
        ("versions.triton", "0.1"),
        ("versions.python", "2.7"),
        ("versions.cogx_fast", "0.0.1"),
        ("device.type", "cuda"),
        ("device.instructions", "sse"),
        ("vectors", "DEFAULT"),
        ("config", "0" * 64),
        ("compile.mode", "max-autotune"),
        ("attention", ["flex"]),
        ("weights", ["Tensor torch.float16"]),
    ],
)
def test_what_differs_is_named(
    bundle: tuple[Path, dict[str, Any]], model: CogVideoXModel, tmp_path: Path, field: str, value: Any
) -> None:
    manifest, members = read_artifact(bundle[0], warm_start.KIND)
    target = manifest
    for key in field.split(".")[:-1]:
        target = target[key]
    target[field.split(".")[-1]] = value
    write_artifact(tmp_path / "m", warm_start.KIND, manifest, members)
    message = refused(model, tmp_path / "m")
    assert f"{field}: got {value!r}, expected " in message
    assert "compiles anew" in message


@pytest.mark.usefixtures("untouched")
def test_weights_that_need_gradients_are_told_apart_at_the_first_call(bundle: tuple[Path, dict[str, Any]]) -> None:
    """``load`` leaves them as they are, and who loads may say after it that they need none."""
    trained = cogx_fast.load(make().requires_grad_(True), compile=True)
    assert load_compile_cache(trained, bundle[0])
    message = r"gradients: got False, expected True; call model\.requires_grad_\(False\) before the first call.*anew"
    with pytest.warns(UserWarning, match=message), torch.no_grad():
        trained(**inputs(trained.config))


@pytest.mark.usefixtures("untouched")
def test_another_model_is_told_apart(bundle: tuple[Path, dict[str, Any]]) -> None:
    assert "config: got" in refused(cogx_fast.load(make(layers=1), compile=True), bundle[0])
    assert "weights: got" in refused(cogx_fast.load(make(), dtype="bf16", compile=True), bundle[0])
    assert "compile.dynamic: got" in refused(cogx_fast.load(make(), compile=CompileConfig(dynamic=False)), bundle[0])
    assert "not compiled by Inductor" in refused(make(), bundle[0])


@pytest.mark.usefixtures("untouched")
def test_a_damaged_bundle_is_not_used(
    bundle: tuple[Path, dict[str, Any]], model: CogVideoXModel, tmp_path: Path
) -> None:
    whole = bundle[0].read_bytes()
    for content in (b"", b"nothing of the kind", whole[: len(whole) // 2], whole[:-1], bytes(2000)):
        (tmp_path / "m").write_bytes(content)
        assert "damaged" in refused(model, tmp_path / "m")
    for position in (1000, len(whole) // 2, len(whole) - 3000):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "m").write_bytes(damaged)
        assert "damaged" in refused(model, tmp_path / "m")
    assert "No such file" in refused(model, tmp_path / "absent")
    refused(model, tmp_path)  # a directory


@pytest.mark.usefixtures("untouched")
@for_each("name", ["libraries/../../evil.so", "libraries/ab/evil.so", "evil.py", "/etc/passwd"])
def test_files_may_go_nowhere_else(
    bundle: tuple[Path, dict[str, Any]], model: CogVideoXModel, tmp_path: Path, name: str
) -> None:
    manifest, members = read_artifact(bundle[0], warm_start.KIND)
    write_artifact(tmp_path / "m", warm_start.KIND, manifest, {**members, name: b""})
    assert "contents no bundle has" in refused(model, tmp_path / "m")


def test_load_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="compile_cache is given, but compile is False"):
        cogx_fast.load(make(), compile_cache="m.bundle")
    with pytest.warns(UserWarning, match="No such file"):
        cogx_fast.load(make(), compile=True, compile_cache="absent.bundle")


def test_nothing_compiled_is_nothing_to_save(model: CogVideoXModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not compiled by Inductor"):
        make().save_compile_cache(tmp_path / "m")
    with pytest.raises(ValueError, match="call it once"):
        model.save_compile_cache(tmp_path / "m")
    compile_model(model, CompileConfig(backend="eager"))
    with pytest.raises(ValueError, match="not compiled by Inductor"):
        save_compile_cache(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- whose artifacts ---------------------------------------------------------------------------------------------------


def test_only_what_belongs_to_the_model_is_noted() -> None:
    from torch.compiler._cache import CacheArtifactManager as Manager

    Manager._ensure_cache_artifacts_registered()

    def record(key: str) -> None:
        Manager.record_artifact("aot_autograd", key, b"content")

    def noted(recorder: Recorder) -> list[str]:
        return [artifact.key for artifact in recorder.artifacts]

    first, second = (Recorder(CompileConfig(), lambda device: {}) for _ in range(2))
    with Manager.with_fresh_cache():
        record("someone else's")
        with first._recording():
            record("first")
            record("shared")
        with second._recording():
            record("shared")
        assert (noted(first), noted(second)) == (["first", "shared"], ["shared"])
        everything = [artifact.key for artifact in Manager._seen_artifacts]
        assert everything == ["someone else's", "first", "shared"]  # torch's own list is complete all the same
        packed = warm_start._pack(first.artifacts)
        assert b"someone" not in packed
        assert [a.key for a in Manager.deserialize(packed)["aot_autograd"]] == ["first", "shared"]
        assert [artifact.key for artifact in Manager._seen_artifacts] == everything


def test_a_live_upstream_model_takes_a_bundle_argument(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No such file"):
        cogx_fast.load(upstream(small("5b")), compile=True, compile_cache=tmp_path / "absent")
