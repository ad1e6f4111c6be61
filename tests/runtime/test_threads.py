"""Several threads: a first call that another waits for is no recompile, and torch's flags are left as they were."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import cogx_fast
from cogx_fast.attention.plan import FULL, AttentionPlan
from cogx_fast.attention.windows import Pattern
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.compiling.flags import Flags
from cogx_fast.runtime.compiling.recompiles import RecompileError, RecompileWarning
from tests.support import inputs, small, upstream

CONFIG = small("5b")


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any]) -> list[BaseException]:
    gate, raised = threading.Barrier(len(works)), []

    def run(work: Callable[[], Any]) -> None:
        gate.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def model(*, strict: bool) -> Any:
    return cogx_fast.load(upstream(CONFIG), compile=cogx_fast.CompileConfig(backend="eager", strict=strict))


def predict(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(CONFIG), return_dict=False)[0]


def test_two_first_calls_at_once_are_no_recompile() -> None:
    for _ in range(5):
        shared, other = model(strict=True), model(strict=True)
        works = [lambda one=one: predict(one) for one in (shared, shared, other, other)]
        assert at_once(*works) == []


def test_a_real_recompile_is_still_told_of() -> None:
    def train(one: Any) -> None:
        one(**inputs(CONFIG), return_dict=False)  # with gradients

    strict = model(strict=True)
    predict(strict)
    assert [type(error) for error in at_once(lambda: train(strict), lambda: train(strict))] == 2 * [RecompileError]
    lenient = model(strict=False)
    predict(lenient)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert at_once(lambda: train(lenient), lambda: predict(lenient)) == []
    assert [each.category for each in seen] == [RecompileWarning]


class Shared(types.SimpleNamespace):
    """A config module of which all threads see the same values, as torch 2.11's."""

    @contextmanager
    def patch(self, values: dict[str, Any]) -> Iterator[None]:
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


@contextmanager
def another_compiles() -> Iterator[None]:
    """Another thread is inside of torch's compiler, of which torch 2.13 says in every thread that it compiles."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(graph: Any, _: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return graph

    other = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow)(torch.ones(2)))
    other.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        may_end.set()
        other.join()


def test_a_call_while_another_thread_compiles_is_compiled() -> None:
    calls: list[int] = []

    def counting(graph: Any, _: Any) -> Any:
        return lambda *arguments: [calls.append(1), graph(*arguments)][1]

    torch._dynamo.register_backend(counting, "counting")
    model = cogx_fast.load(upstream(CONFIG), compile=CompileConfig(backend="counting"))
    arguments = inputs(CONFIG)
    with torch.no_grad():
        model(**arguments)
        of_a_call = len(calls)
        with another_compiles():
            model(**arguments)
    assert len(calls) == 2 * of_a_call > 0


def test_an_eager_call_while_another_thread_compiles_computes_as_alone() -> None:
    """Compiled, a plan's blocks are left to the kernel, which an eager call has none of: it would be dense."""
    plan = AttentionPlan(
        patterns=(FULL, Pattern(kind="temporal", space=0.1)),
        choice=((1,) * CONFIG.num_attention_heads,) * CONFIG.num_layers,
        block_size=16, tile=(2, 2), dense_above=2000.0,
    )  # fmt: skip
    for options in ({}, {"attention_plan": plan}):
        model, arguments = cogx_fast.load(upstream(CONFIG), **options), inputs(CONFIG)
        with torch.no_grad():
            alone = model(**arguments).sample
            with another_compiles():
                assert torch.equal(model(**arguments).sample, alone), options


def test_flags_that_threads_share_are_set_back_by_the_last_to_go() -> None:
    config = Shared(error_on_recompile=False)
    flags = Flags(config, {"error_on_recompile": True})
    entered, left = threading.Barrier(2), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        with flags.held():
            entered.wait()
        left.set()

    def last() -> None:
        with flags.held():
            entered.wait()
            left.wait()
            seen.append(config.error_on_recompile)

    assert at_once(first, last) == []
    assert seen == [True]
    assert config.error_on_recompile is False
