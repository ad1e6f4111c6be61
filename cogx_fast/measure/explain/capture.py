"""Watches Dynamo and Inductor at work, and keeps what they made: graphs, breaks, recompiles, kernels, seconds.

What is compiled is not run: its inputs hold no values (fake tensors). In place of each compiled graph stands the
captured one, which gives its results' shapes.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import logging
import re
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cogx_fast.measure.explain import traffic
from cogx_fast.measure.explain.report import Break, Graph, Kernel, Recompile
from cogx_fast.runtime.compiling.recompiles import told_of_compilation

PHASES = ("dynamo", "aot", "inductor", "build")
_SERIAL = re.compile(r"_\d+$")
_CALL = re.compile(r"^\s+(?:\w+ = )?(?:triton_\w+\.run|cpp_\w+|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.\w+)\(", re.M)
_BREAK = re.compile(
    r"in user code at (?P<file>.*):(?P<line>\d+)\nGraph Break Reason: (?:Encountered graph break [^\n]*\n\s*)?"
    r"(?P<reason>[^\n]*)(?P<rest>.*)",
    re.S,
)
_EXPLANATION = re.compile(r"Explanation: (.*?)\n\s*(?:Hint|Developer debug context)", re.S)


@dataclass
class Watched:
    """One graph, as it is filled."""

    function: str
    size: int
    is_symbolic: bool
    operators: int
    runs: Counter[int] = field(default_factory=Counter)
    launches: int = 0
    works: list[traffic.Work] = field(default_factory=list)
    inductor_bytes: int = 0
    peak_bytes: int = 0

    def graph(self, sizes: int) -> Graph:
        """As it is reported, with how often it runs at each of so many sizes."""
        kernels = [
            Kernel(
                name=work.name,
                kind=work.kind,
                is_generated=not work.is_library,
                read_bytes=work.read_bytes,
                written_bytes=work.written_bytes,
                flops=work.flops,
            )
            for work in self.works
        ]
        return Graph(
            function=self.function,
            size=self.size,
            runs=self.runs[self.size],
            runs_at=tuple(self.runs[size] for size in range(sizes)),
            is_symbolic=self.is_symbolic,
            operators=self.operators,
            launches=self.launches,
            kernels=tuple(kernels),
            inductor_bytes=self.inductor_bytes,
            peak_bytes=self.peak_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What was counted of a generated graph, which is kept so that no other gets its id."""

    lowering: Any
    works: list[traffic.Work]
    launches: int
    inductor_bytes: int
    peak_bytes: int


class Clock:
    """Seconds by phase; while an inner phase runs, the outer one's stand still."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phases: list[str] = []
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self._book()
        self._phases.append(phase)

    def leave(self) -> None:
        """The innermost phase ends."""
        self._book()
        self._phases.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._phases:
            self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase, as a ``with`` block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


class Capture:
    """What ``compiler``, which takes ``torch.compile``'s place, compiles inside ``watching``.

    Args:
        build: compile the generated code to machine code as well.
        code_of_first_only: generate code for graphs of the first size alone.
    """

    def __init__(self, *, build: bool, code_of_first_only: bool = False) -> None:
        self.size = 0
        """Which size the model is called with now."""
        self.clock = Clock()
        self.breaks: list[Break] = []
        self.recompiles: list[Recompile] = []
        self.lowered = 0
        """Graphs that were in no cache."""
        self.bypassed = 0
        """Graphs that AOTAutograd's cache does not take."""
        self._build, self._code_of_first_only = build, code_of_first_only
        self._watched: list[Watched] = []
        self._current: Watched | None = None
        self._regions: dict[int, _Counted] = {}
        self._seen: set[Any] = set()

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """What was captured and compiled."""
        return tuple(watched.graph(self.size + 1) for watched in self._watched)

    def compiler(self, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        """As ``torch.compile``, but where capturing has to stop that is kept, and not raised."""
        chosen: Any = settings.pop("backend", "inductor")
        options = settings.pop("options", None)
        if isinstance(chosen, torch._TorchCompileInductorWrapper):  # Inductor, with options of its own
            chosen, options = "inductor", chosen.config
        backend = functools.partial(self._compile, options=dict(options or {}), lowers=chosen == "inductor")
        return torch.compile(function, **{**settings, "fullgraph": False, "backend": backend})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and leave the process's flags and counters as they were."""
        from torch._dynamo import config as dynamo_config
        from torch._dynamo.symbolic_convert import graph_break_log
        from torch._functorch import config as functorch_config
        from torch._inductor import config

        with contextlib.ExitStack() as stack:
            counters = stack.enter_context(_kept_counters())
            if not self._build:  # what was never built must not be found again
                stack.enter_context(config.patch({"fx_graph_cache": False}))
                stack.enter_context(functorch_config.patch({"enable_autograd_cache": False}))
            if hasattr(dynamo_config, "allow_ignore_mark_dynamic"):  # after a break a size may no longer be symbolic
                stack.enter_context(dynamo_config.patch(allow_ignore_mark_dynamic=True))
            stack.enter_context(self._lowering())
            stack.enter_context(unbacked_sizes_of_fake_tensors())
            stack.enter_context(listening(graph_break_log, _Listener(self._heard_of_a_break), logging.DEBUG))
            self.called([])
            self.recompiles.clear()
            stack.enter_context(told_of_compilation(lambda _: self.clock.enter("dynamo"), lambda _: self.clock.leave()))
            yield
            self.bypassed = counters["aot_autograd"]["autograd_cache_bypass"]

    def called(self, told: list[str]) -> None:
        """The model was called: keep what was compiled again.

        Args:
            told: what the model itself says of the recompiles, better than torch: which of its inputs caused them.
        """
        from torch._dynamo.utils import get_compilation_metrics

        found = []
        for metrics in get_compilation_metrics():
            key = (metrics.compile_id, metrics.start_time_us)
            if key not in self._seen and metrics.recompile_reason:
                found.append((metrics.co_name or "", metrics.recompile_reason.splitlines()[0]))
            self._seen.add(key)
        for name, reason in found:
            cause = told[0] if told else re.sub(r"^\d+/\d+: ", "", reason)
            self.recompiles.append(Recompile(function=_SERIAL.sub("", name), cause=cause, size=self.size))

    # -- the backend ---------------------------------------------------------------------------------------------------

    def _compile(
        self, graph: Any, inputs: list[Any], *, options: dict[str, Any], lowers: bool, **_: Any
    ) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        watched = Watched(
            function=_function(graph),
            size=self.size,
            is_symbolic=any(isinstance(item, torch.SymInt) for item in inputs),
            operators=sum(node.op in ("call_function", "call_method", "call_module") for node in graph.graph.nodes),
        )
        self._watched.append(watched)
        if lowers and (self.size == 0 or not self._code_of_first_only):
            self._current = watched
            with self.clock.phase("aot"), unset_fake_temporarily():  # autotuning runs on tensors with values
                compile_fx(graph, inputs, inner_compile=self._inner, config_patches=options)

        def run(*arguments: Any) -> Any:
            watched.runs[self.size] += 1
            return graph(*arguments)

        return run

    def _inner(self, *arguments: Any, **settings: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        with self.clock.phase("inductor"):
            return compile_fx_inner(*arguments, **settings)

    @contextlib.contextmanager
    def _lowering(self) -> Iterator[None]:
        """Examine each graph when its code is written, and build it or not."""
        from torch._inductor.graph import GraphLowering

        codegen, compile_to_module = GraphLowering.codegen, GraphLowering.compile_to_module

        def write(lowering: Any) -> Any:
            with self.clock.phase("inductor"):
                written = codegen(lowering)
                self._examine(lowering, written[0].value)
            return written

        def build(lowering: Any) -> Any:
            self.lowered += 1
            if self._build:
                with self.clock.phase("build"):
                    return compile_to_module(lowering)
            lowering.codegen()
            return types.SimpleNamespace(call=None, runner=None, __file__="", key="")

        patched: Any = GraphLowering
        patched.codegen, patched.compile_to_module = write, build
        try:
            yield
        finally:
            patched.codegen, patched.compile_to_module = codegen, compile_to_module

    def _examine(self, lowering: Any, code: str) -> None:
        regions = [self._regions[id(region)] for region in traffic.regions(lowering)]
        counted = _Counted(
            lowering=lowering,
            works=traffic.count(lowering, {key: region.works for key, region in self._regions.items()}),
            launches=len(_CALL.findall(code)) + sum(region.launches for region in regions),
            inductor_bytes=sum(int(node.get_read_write_buffers_sizes()) for node in lowering.scheduler.nodes)
            + sum(region.inductor_bytes for region in regions),
            peak_bytes=traffic.peak_bytes(lowering) + max((region.peak_bytes for region in regions), default=0),
        )
        if "def call(" not in code:  # a region that the graph uses, maybe several times
            self._regions[id(lowering)] = counted
            return
        watched = self._current
        assert watched is not None
        watched.works, watched.launches = counted.works, counted.launches
        watched.inductor_bytes, watched.peak_bytes = counted.inductor_bytes, counted.peak_bytes

    def _heard_of_a_break(self, message: str) -> None:
        found = _BREAK.search(message)
        if found is None:
            return
        explained = _EXPLANATION.search(found["rest"])
        reason = found["reason"].strip().rstrip(":")
        if explained:
            reason = f"{reason}: {' '.join(explained[1].split())}"
        line = int(found["line"])
        code = linecache.getline(found["file"], line).strip()
        self.breaks.append(Break(reason=reason, file=found["file"], line=line, code=code))


def _function(graph: Any) -> str:
    """The function whose graph it is, without the serial number that each model's own copy has."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    stack = getattr(reason, "user_stack", None)
    return _SERIAL.sub("", stack[0].name) if stack else "forward"


@contextlib.contextmanager
def _kept_counters() -> Iterator[Any]:
    """Dynamo's counters from nothing, and afterwards as they were."""
    from torch._dynamo.utils import counters

    before = {group: Counter(counts) for group, counts in counters.items()}
    counters.clear()
    try:
        yield counters
    finally:
        counters.clear()
        counters.update(before)


@contextlib.contextmanager
def unbacked_sizes_of_fake_tensors() -> Iterator[None]:
    """Where a size of a fake tensor is marked unbacked, torch 2.13 takes it, and all others of the tensor, for fixed.

    It reads them as symbols of another graph, which these are not: so they are treated as a real tensor's are.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    name = "transfer_symbols_from_foreign_shape_env"
    patched: Any = ShapeEnv
    original = getattr(patched, name, None)
    if original is None:  # other versions have no such case
        yield
        return

    def create(self: Any, sizes: Any, strides: Any, offset: Any, source: Any, **settings: Any) -> Any:
        numbers = (*sizes, *strides, offset)
        if settings.get("symbolic_context") is None or not all(isinstance(number, int) for number in numbers):
            return original(self, sizes, strides, offset, source, **settings)
        return self._create_symbolic_sizes_strides_storage_offset(
            tuple(sizes), tuple(strides), offset, [False] * len(sizes), source, **settings
        )

    setattr(patched, name, create)
    try:
        yield
    finally:
        setattr(patched, name, original)


class _Listener(logging.Handler):
    """Hands on what is logged."""

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__()
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard(record.getMessage())


@contextlib.contextmanager
def listening(log: logging.Logger, listener: logging.Handler, level: int) -> Iterator[None]:
    """Hear what is logged from that level on, which nobody else does meanwhile: torch counts and explains some things
    only while someone listens."""
    before, propagates = log.level, log.propagate
    log.addHandler(listener)
    log.setLevel(level)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(listener)
        log.setLevel(before)
        log.propagate = propagates


__all__ = ["PHASES", "Capture", "Clock", "listening", "unbacked_sizes_of_fake_tensors"]
