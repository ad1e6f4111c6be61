"""``auto``: the fastest exact backend is found by measuring, once, and kept."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogx_fast.attention.backends import BACKENDS, Backend
from cogx_fast.runtime import auto_attention
from cogx_fast.runtime.auto_attention import Choice, choose_attention
from cogx_fast.runtime.compiling.compile import watch_compilation
from tests.cases import for_each

CPU, SHAPE = torch.device("cpu"), (2, 40, 3, 16)


def quick(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return v


def slow(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    time.sleep(0.03)  # longer than a busy machine takes to come back
    return v


def broken(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    raise RuntimeError("no such kernel\nand more")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cogx-fast"


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three made-up backends to choose from, and the names of those that were measured."""
    for name, run in (("quick", quick), ("slow", slow), ("broken", broken)):
        monkeypatch.setitem(BACKENDS, name, Backend(name=name, run=run, about=name))
    monkeypatch.setitem(auto_attention.CANDIDATES, "cpu", ("slow", "quick", "broken"))
    measured: list[str] = []
    measure = auto_attention.measure

    def spy(name: str, *arguments: Any) -> Any:
        measured.append(name)
        return measure(name, *arguments)

    monkeypatch.setattr(auto_attention, "measure", spy)
    return measured


def choose(**changes: Any) -> Choice:
    return choose_attention(SHAPE, torch.float32, CPU, **{"compiled": False, **changes})


def test_the_fastest_is_chosen_and_the_reason_names_them_all(candidates: list[str]) -> None:
    chosen = choose()
    assert chosen.name == "quick"
    assert chosen.milliseconds["quick"] < chosen.milliseconds["slow"]
    assert chosen.reason.startswith("measured at (B, S, N, K) = (2, 40, 3, 16) in float32: quick ")
    assert "broken failed (no such kernel)" in chosen.reason


def test_the_answer_is_kept_for_the_same_question_only(candidates: list[str], folder: Path) -> None:
    first = choose()
    again = choose()
    assert (again.name, again.milliseconds) == (first.name, first.milliseconds)
    assert again.reason.startswith("remembered at")
    assert len(candidates) == 3
    choose_attention((2, 41, 3, 16), torch.float32, CPU, compiled=False)
    assert len(candidates) == 6
    assert len(json.loads((folder / "attention.json").read_text())) == 2


def test_another_version_of_torch_measures_again(candidates: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert choose().reason.startswith("measured")


@for_each("content", ["", "{", "[]", '{"key": 3}', "\x00\xff"])
def test_a_damaged_file_is_measured_over(content: str, candidates: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "attention.json").write_text(content, encoding="latin-1")
    chosen = choose()
    assert chosen.name == "quick"
    assert chosen.reason.startswith("measured")
    assert choose().reason.startswith("remembered")


def test_what_cannot_be_kept_is_still_chosen(candidates: list[str], folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be remembered in .*attention.json"):
        assert choose().name == "quick"


def test_where_nothing_runs_sdpa_is_left(candidates: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto_attention.CANDIDATES, "cpu", ("broken", "broken2"))
    monkeypatch.setitem(BACKENDS, "broken2", Backend(name="broken2", run=broken, about=""))
    chosen = choose()
    assert (chosen.name, chosen.milliseconds) == ("sdpa", {})
    assert "no candidate ran (broken: no such kernel; broken2" in chosen.reason
    assert choose().reason.startswith("no candidate ran")  # and not "remembered": a passing failure is not for ever
    assert not (auto_attention.cache_folder() / "attention.json").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("E: out of memory")]
)
def test_a_lack_of_memory_is_not_for_ever(
    candidates: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def starved(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        raise error

    monkeypatch.setitem(BACKENDS, "broken", Backend(name="broken", run=starved, about=""))
    assert "broken failed (out of memory at that moment)" in choose().reason
    monkeypatch.setitem(BACKENDS, "broken", Backend(name="broken", run=quick, about=""))
    again = choose()
    assert again.reason.startswith("measured")
    assert "broken" in again.milliseconds


def test_a_lack_of_memory_that_was_kept_is_forgotten(candidates: list[str], folder: Path) -> None:
    choose()
    kept = json.loads((folder / "attention.json").read_text())
    damaged = {key: {**answer, "broken": "CUDA out of memory. Tried"} for key, answer in kept.items()}
    (folder / "attention.json").write_text(json.dumps(damaged))
    assert choose().reason.startswith("measured")


def test_a_candidate_leaves_nothing_to_the_next(candidates: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def leaking(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        cycle: list[Any] = [v]
        cycle.append(cycle)
        alive.append(weakref.ref(v))
        return v

    def looking(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        assert all(tensor() is None for tensor in alive)
        return v

    monkeypatch.setitem(BACKENDS, "slow", Backend(name="slow", run=leaking, about=""))
    monkeypatch.setitem(BACKENDS, "quick", Backend(name="quick", run=looking, about=""))
    gc.disable()
    try:
        choose()
    finally:
        gc.enable()


def test_on_the_cpu_nothing_is_measured(folder: Path) -> None:
    assert choose() == Choice(name="sdpa", reason="the one candidate on cpu", milliseconds={})
    assert not folder.exists()


def test_candidates_on_cuda_are_exact_and_flex_is_none_where_it_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(auto_attention, "measure", lambda name, *_: asked.append(name) or float(len(asked)))
    chosen = choose_attention(SHAPE, torch.bfloat16, torch.device("cuda"), compiled=True)
    assert (chosen.name, asked) == ("flex", ["flex", "sdpa-cudnn", "sdpa-flash"])
    asked.clear()
    chosen = choose_attention(SHAPE, torch.bfloat16, torch.device("cuda"), compiled=False)
    assert (chosen.name, asked) == ("sdpa-cudnn", ["sdpa-cudnn", "sdpa-flash"])
    assert all(BACKENDS[name].exact for name in auto_attention.CANDIDATES["cuda"])
    assert choose_attention(SHAPE, torch.float32, torch.device("cuda"), compiled=False).name == "sdpa"
    asked.clear()  # flex alone is not taken untimed
    assert choose_attention(SHAPE, torch.float32, torch.device("cuda"), compiled=True).name == "flex"
    assert asked == ["flex", "sdpa"]


def test_compiled_candidates_are_measured_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto_attention.CANDIDATES, "cpu", ("flex", "sdpa"))
    with watch_compilation() as compilation:
        chosen = choose(compiled=True)
    assert set(chosen.milliseconds) == {"flex", "sdpa"}
    assert (compilation.graphs, compilation.recompiles) == (2, 0)


def test_any_number_of_shapes_can_be_measured_in_one_process() -> None:
    """More than torch compiles one function for."""
    times = [auto_attention.measure("sdpa", (1, tokens, 1, 16), torch.float32, CPU, True) for tokens in range(20, 29)]
    assert all(isinstance(ms, float) for ms in times), times


@pytest.mark.gpu
def test_a_gpu_is_measured_and_remembered() -> None:
    cuda, shape = torch.device("cuda"), (2, 4000, 8, 64)
    first = choose_attention(shape, torch.bfloat16, cuda, compiled=True)
    assert {"flex", "sdpa-flash"} <= set(first.milliseconds)
    again = choose_attention(shape, torch.bfloat16, cuda, compiled=True)
    assert (again.name, again.reason.partition(" ")[0]) == (first.name, "remembered")


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::cogx_fast.runtime.compiling.recompiles.RecompileWarning"
)  # the first call with a mask is one
@for_each("compile", [False, True], "chosen", ["quick", "flex"])
def test_a_choice_that_takes_no_mask_refuses_no_call(
    monkeypatch: pytest.MonkeyPatch, candidates: list[str], chosen: str, compile: bool
) -> None:
    """Calls without a mask go on with what was chosen, and compile nothing after one that had a mask."""
    import cogx_fast
    from cogx_fast.runtime.compiling.compile import CompileConfig
    from cogx_fast.runtime.compiling.recompiles import watch_compilation
    from cogx_fast.runtime.module import CogVideoXModel
    from tests.support import inputs, small

    torch.manual_seed(0)
    source = CogVideoXModel(small("5b")).eval().requires_grad_(False)
    answer = Choice(name=chosen, reason="", milliseconds={})
    monkeypatch.setattr("cogx_fast.runtime.attention_methods.choose_attention", lambda *_, **__: answer)
    config = CompileConfig(backend="eager") if compile else False
    model = cogx_fast.load(source, attention="auto", compile=config)
    assert set(model.attention_backends) == {chosen}
    call = inputs(model.config)
    tokens = call["encoder_hidden_states"].shape[1] + 4 * 6 * 5
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, 3] = False
    with torch.no_grad():
        before = model(**call).sample
        masked = model(**call, attention_kwargs={"attention_mask": mask}).sample
        with watch_compilation() as stats:
            after = model(**call).sample
            model(**call, attention_kwargs={"attention_mask": mask})
        expected = source(**call, attention_kwargs={"attention_mask": mask}).sample
    assert torch.equal(before, after)
    torch.testing.assert_close(masked, expected)
    assert (stats.graphs, stats.recompiles) == (0, 0)
    if compile:
        return
    model.set_attention_backend(chosen)  # by name: then it is that or an error
    with pytest.raises(ValueError, match="takes"), torch.no_grad():
        model(**call, attention_kwargs={"attention_mask": mask})
