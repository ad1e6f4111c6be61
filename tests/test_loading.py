import subprocess
import sys
import warnings

import pytest
import torch

import cogx_fast
from cogx_fast.loading import read_device, read_dtype
from cogx_fast.model import cpu
from cogx_fast.model.cpu import SlowDtypeWarning
from cogx_fast.runtime import attention_methods
from cogx_fast.runtime.auto_attention import Choice
from cogx_fast.sizes import count_tokens, default_video
from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError
from tests.cases import for_each
from tests.support import inputs, relative_error, small, upstream


@pytest.fixture
def source():
    return upstream(small("5b"))


@for_each("dtype", ["int8", "float8_e4m3fn", torch.int64, torch.float8_e4m3fn, "", 16, "complex64"])
def test_dtypes_that_are_none(dtype, source):
    with pytest.raises(CheckpointError, match="expected one of bf16"):
        cogx_fast.load(source, dtype=dtype)


@for_each("dtype", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(dtype):
    assert read_dtype(dtype) is torch.bfloat16


@for_each("device", ["gpu", "cuda:99", "meta", "", 99, 1.5])
def test_devices_that_are_not_there(device, source):
    with pytest.raises(CheckpointError, match="device"):
        cogx_fast.load(source, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(tmp_path, source):
    source.save_pretrained(tmp_path)
    for thing in (source, tmp_path):
        with pytest.raises(CheckpointError, match=r"device 'cuda' cannot be used.*'cpu'"):
            cogx_fast.load(thing, device="cuda")


def test_device_by_name():
    assert read_device("cpu") == torch.device("cpu")


@pytest.fixture
def without_half_precision(monkeypatch):
    monkeypatch.setattr(cpu, "computes", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.usefixtures("without_half_precision")
def test_a_dtype_that_the_cpu_lacks_is_said_in_a_line(source, dtype, tmp_path):
    source.save_pretrained(tmp_path)
    for thing in (source, tmp_path):
        with pytest.warns(SlowDtypeWarning) as caught:
            cogx_fast.load(thing, dtype=dtype, device="cpu")
        assert [str(each.message) for each in caught] == [
            f"this CPU has no {dtype} instructions: torch computes {dtype} by plain loops, many times slower. "
            'Use fp32: dtype="fp32", on the command line --dtype fp32'
        ]


@pytest.mark.usefixtures("without_half_precision")
def test_what_may_go_to_another_device_is_not_warned_of(source, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cogx_fast.load(source, dtype="bf16")
        cogx_fast.load(source, dtype="fp32", device="cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.warns(SlowDtypeWarning):
        cogx_fast.load(source.bfloat16())


def test_python_shows_it_once():
    code = (
        "import cogx_fast\nfrom cogx_fast.model import cpu\ncpu.computes = lambda _: False\n"
        "from tests.support import small\nmodel = cogx_fast.runtime.module.CogVideoXModel(small('5b'))\n"
        "cogx_fast.load(model, dtype='bf16')\ncogx_fast.load(model, dtype='bf16')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.count("no bf16 instructions") == 1


def test_attention(source):
    assert set(cogx_fast.load(source).attention_backends) == {"sdpa"}
    assert set(cogx_fast.load(source, attention="flex").attention_backends) == {"flex"}
    with pytest.raises(ValueError, match="choose one of"):
        cogx_fast.load(source, attention="fast")


def test_auto_attention_is_chosen_for_the_models_usual_size(source, monkeypatch):
    asked = []

    def choose(shape, dtype, device, *, compiled):
        asked.append((shape, dtype, device.type, compiled))
        return Choice(name="flex", reason="told to", milliseconds={})

    monkeypatch.setattr(attention_methods, "choose_attention", choose)
    model = cogx_fast.load(source, dtype="bf16")
    tokens = count_tokens(model.config, default_video(model.config)).joint
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    assert asked == [((2, tokens, heads, width), torch.bfloat16, "cpu", False)]
    assert set(model.attention_backends) == {"flex"}
    assert model.attention_choice.reason == "told to"
    assert cogx_fast.load(source, attention="sdpa").attention_choice is None
    planned = cogx_fast.load(source, attention_plan="tiles")
    assert (set(planned.attention_backends), len(asked)) == ({"flex"}, 1)


def test_auto_attention_is_chosen_again_where_the_model_is_called(source, monkeypatch):
    """As after ``pipe.to("cuda")``, or with offload, for a model that was loaded to the CPU."""
    asked = []

    def choose(shape, dtype, device, *, compiled):
        asked.append(device.type)
        return Choice(name="sdpa-math" if device.type == "meta" else "sdpa", reason="told to", milliseconds={})

    monkeypatch.setattr(attention_methods, "choose_attention", choose)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # torch knows none of the meta device
    model = cogx_fast.load(source).to("meta")
    for _ in range(2):
        model(**inputs(model.config, device="meta"))
    assert asked == ["cpu", "meta"]
    assert set(model.attention_backends) == {"sdpa-math"}
    named = cogx_fast.load(source)
    named.set_attention_backend("sdpa")
    named.to("meta")(**inputs(named.config, device="meta"))
    assert set(named.attention_backends) == {"sdpa"}  # a named one stays
    assert asked == ["cpu", "meta", "cpu"]


def test_a_backend_that_cannot_run_here_is_refused(source):
    with pytest.raises(ValueError, match="'sdpa-cudnn' cannot run here: it runs on cuda"):
        cogx_fast.load(source, attention="sdpa-cudnn")


def test_errors_are_of_the_builtin_kinds():
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(CheckpointNotFoundError, FileNotFoundError)
    assert issubclass(CheckpointNotFoundError, CheckpointError)


def test_compile_is_called_with_the_config(source, monkeypatch):
    from cogx_fast.runtime.compiling import compile as module

    calls = []
    monkeypatch.setattr(module, "compile_model", lambda model, config: calls.append((model, config)))
    model = cogx_fast.load(source, compile=True)
    config = module.CompileConfig(scope="model")
    cogx_fast.load(source, compile=config)
    cogx_fast.load(source, compile=False)
    assert [each for _, each in calls] == [module.CompileConfig()] * 2 + [config] * 2  # tried on no weights first
    assert calls[1][0] is model


def test_a_file_and_a_live_model_give_the_same(source, tmp_path):
    source.save_pretrained(tmp_path)
    arguments = inputs(small("5b"))
    with torch.no_grad():
        live = cogx_fast.load(source)(**arguments, return_dict=False)[0]
        read = cogx_fast.load(str(tmp_path), dtype="fp32", device="cpu")(**arguments, return_dict=False)[0]
    assert torch.equal(live, read)
    assert relative_error(live, read) == 0
