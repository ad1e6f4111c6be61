"""What ``export_package`` makes of a model: of every release and recipe, once at a time, and where it cannot."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from cogx_fast.loading import load, load_package, load_weights
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.packages import export
from cogx_fast.runtime.packages.export import export_package
from cogx_fast.runtime.packages.package import SizeRange
from tests.cases import for_each
from tests.runtime.test_package import SIZES, check, first_output
from tests.support import RELEASED, inputs, predict, relative_error, small, upstream


def quantized(source: Any, recipe: str) -> CogVideoXModel:
    """Eager: ``load`` would warn that it is slow."""
    return load_weights(source, CogVideoXModel, attention="sdpa", compiled=False, quant=recipe)


@for_each(
    "device, recipe, given",
    [
        ("cuda", "int8-dynamic", True),
        ("cuda", "int8-weight-only", False),
        ("cuda", None, False),
        ("cpu", "int8-dynamic", False),
    ],
)
def test_int8_products_are_compiled_as_without_a_package(
    device: str, recipe: str | None, given: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor

    from cogx_fast.runtime.compiling.compile import INT8_OPTIONS

    found: dict[str, Any] = {}
    monkeypatch.setattr(export, "export_block", lambda *_: None)
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda *_, inductor_configs, **__: found.update(inductor_configs)
    )
    monkeypatch.setattr(CogVideoXModel, "device", torch.device(device))
    model = CogVideoXModel(small("5b", num_layers=1)) if recipe is None else quantized(upstream(small("5b")), recipe)
    export.compile_block(model, model.transformer_blocks[0], SizeRange(tokens=(2, 9)), tmp_path / "0")
    assert found["aot_inductor.embed_kernel_binary"]
    assert (found.items() >= INT8_OPTIONS.items()) == given
    assert bool(found.get("max_autotune")) == (device == "cuda")


def test_one_package_is_compiled_at_a_time_whatever_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch's cache has objects that packages share, and writes them in place."""
    import torch._inductor
    from filelock import FileLock, Timeout
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    refused = []

    def compile_and_package(*_: Any, **__: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(Path(cache_dir(), "cogx_fast-package.lock"), timeout=0).acquire()
        refused.append(True)

    monkeypatch.setattr(export, "export_block", lambda *_: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    model = CogVideoXModel(small("5b", num_layers=1))
    export.compile_block(model, model.transformer_blocks[0], SizeRange(tokens=(2, 9)), tmp_path / "0")
    assert refused


@for_each("sizes", [{"tokens": (1, 9)}, {"tokens": (9, 9)}, {"tokens": (2, 9), "batch": 1}])
def test_ranges_that_are_none(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SizeRange(**sizes)


def test_without_a_cpp_compiler_the_message_says_so(tmp_path: Path) -> None:
    from torch._inductor import config

    model = load(upstream(small("5b")))
    with config.patch({"cpp.cxx": (str(tmp_path / "none"),)}), pytest.raises(ValueError, match="install g"):
        export_package(model, tmp_path / "m.pt2", SizeRange(tokens=(2, 100)))
    assert not (tmp_path / "m.pt2").exists()


# -- slow, or on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tiny_models_first_output_within_three_seconds(tmp_path: Path) -> None:
    """From the end of torch's import to the output, the package's and the weights' loading included. In bf16."""
    model = load("tiny")
    export_package(model, tmp_path / "tiny.pt2", SizeRange(tokens=(2, 2000)))
    empty = tmp_path / "empty"
    empty.mkdir()
    seconds, _ = first_output(tmp_path / "tiny.pt2", "tiny", empty)
    print(f"first output after {seconds:.2f} s")
    assert seconds <= 3
    exact, packaged = load("tiny", dtype="fp32"), load_package(tmp_path / "tiny.pt2", "tiny")
    for size in SIZES:
        arguments = inputs(model.config, **size)
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
        truth = predict(exact, arguments)
        eager_error = relative_error(predict(model, half), truth)
        assert relative_error(predict(packaged, half), truth) <= 1.05 * eager_error, size


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RELEASED if name != "5b"])
def test_every_released_model_can_be_packaged(name: str, tmp_path: Path) -> None:
    source = upstream(small(name, num_attention_heads=1))
    export_package(load(source), tmp_path / "m.pt2", SizeRange(tokens=(2, 1000)))
    model, eager = load_package(tmp_path / "m.pt2", source), load(source)
    for batch in (1, 2):
        for size in ({}, {"text_len": 3}) if name != "5b-i2v" else ({},):
            arguments = inputs(eager.config, batch=batch, **size)
            assert relative_error(predict(model, arguments), predict(eager, arguments)) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-weight-only"])
def test_a_quantized_package(recipe: str, tmp_path: Path) -> None:
    """Its weights are quantized when it is loaded. Its error against fp32 is that of the quantized eager model."""
    source, other = upstream(small("5b", num_attention_heads=1)), upstream(small("5b", num_attention_heads=1), seed=7)
    export_package(quantized(source, recipe), tmp_path / "m.pt2", SizeRange(tokens=(2, 264)))
    for weights in (source, other):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            packaged = load_package(tmp_path / "m.pt2", weights)
        eager, exact = quantized(weights, recipe), load(weights)
        for size in SIZES:
            arguments = inputs(exact.config, **size)
            truth = predict(exact, arguments)
            eager_error = relative_error(predict(eager, arguments), truth)
            assert eager_error > 1e-4
            assert relative_error(predict(packaged, arguments), truth) <= 1.05 * eager_error, size


@pytest.mark.slow
def test_a_package_with_flex_attention(tmp_path: Path) -> None:
    source = upstream(small("5b", num_attention_heads=1))
    export_package(load(source, attention="flex"), tmp_path / "m.pt2", SizeRange(tokens=(2, 264)))
    packaged = load_package(tmp_path / "m.pt2", source)
    assert list(packaged.attention_backends) == ["flex"]
    check(packaged, load(source))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_package_for_cuda(attention: str, tmp_path: Path) -> None:
    source = upstream(small("5b"))
    model = load(source, dtype="bf16", device="cuda", attention=attention)
    export_package(model, tmp_path / "m.pt2", SizeRange(tokens=(2, 1000)))
    packaged, exact = load_package(tmp_path / "m.pt2", source), load(source, dtype="fp32", device="cuda")
    for size in SIZES[:4]:
        arguments = inputs(model.config, device="cuda", **size)
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
        truth = predict(exact, arguments)
        eager_error = relative_error(predict(model, half), truth)
        assert relative_error(predict(packaged, half), truth) <= 1.05 * eager_error, size
