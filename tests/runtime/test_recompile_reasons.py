"""What compiles is said on a terminal and nowhere else, and nothing of it stays."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cogx_fast.runtime.compiling import recompiles
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
from cogx_fast.runtime.module import CogVideoXModel
from tests.support import inputs, small

SECONDS = 0.3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A compiler that takes its time, shown after a tenth of it; what it may do besides is in ``also``."""
    from torch._dynamo.backends import registry

    def slow(graph: torch.fx.GraphModule, _: Any) -> Any:
        time.sleep(SECONDS)
        slow.also()  # type: ignore[attr-defined]
        return graph.forward

    slow.also = lambda: None  # type: ignore[attr-defined]
    registry.register_backend(slow, name="cogx_fast_slow")
    monkeypatch.setattr(recompiles, "_FIRST_SHOWN_AFTER", SECONDS / 10)
    monkeypatch.setattr(recompiles, "_SHOWN_EVERY", SECONDS / 10)
    yield slow
    registry._BACKENDS.pop("cogx_fast_slow")
    registry._COMPILER_FNS.pop("cogx_fast_slow")


def compile_and_call(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CogVideoXModel(small("2b", num_layers=1)).eval()
    compile_model(model, CompileConfig(backend="cogx_fast_slow"))
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(sys, "stderr", stream)
        model(**inputs(model.config))


def shown_at_the_end(stream: io.StringIO) -> str:
    """What a terminal would still show of what was written."""
    return stream.getvalue().split("\r\x1b[2K")[-1]


@pytest.mark.usefixtures("backend")
def test_a_line_on_a_terminal_while_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, stream = set(threading.enumerate()), Terminal()
    compile_and_call(stream, monkeypatch)
    assert "compiling the block … 0 s" in stream.getvalue()
    assert (shown_at_the_end(stream), "\n" in stream.getvalue()) == ("", False)
    assert set(threading.enumerate()) <= threads


@pytest.mark.usefixtures("backend")
def test_nothing_where_stderr_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    compile_and_call(stream, monkeypatch)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_the_line_and_its_thread_end_with_an_interrupted_compilation(
    backend: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise error

    backend.also = fails
    threads, stream = set(threading.enumerate()), Terminal()
    with pytest.raises(BaseException, match="|".join(["", error.__name__])):
        compile_and_call(stream, monkeypatch)
    assert "compiling the block" in stream.getvalue()
    assert shown_at_the_end(stream) == ""
    assert set(threading.enumerate()) <= threads


def test_choices_that_were_timed_are_counted() -> None:
    from torch._dynamo.callback import CallbackTrigger, callback_handler
    from torch._dynamo.utils import counters

    stream = Terminal()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recompiles, "_FIRST_SHOWN_AFTER", 0.01)
        patched.setitem(counters["inductor"], "select_algorithm_autotune", 5)
        with (
            recompiles.show_progress("the model", stream),
            callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/0"),
        ):
            counters["inductor"]["select_algorithm_autotune"] += 2
            time.sleep(SECONDS)
    assert "compiling the model … 0 s, 2 products autotuned" in stream.getvalue()
