"""What compiles, and why again: counts for whoever watches, a line on a terminal, the reason of a recompile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

_FIRST_SHOWN_AFTER = 1.0
_SHOWN_EVERY = 0.5


class RecompileError(ValueError):
    """A compiled model would compile again, and ``CompileConfig(strict=True)`` forbids it; the message says why."""


class RecompileWarning(UserWarning):
    """A compiled model compiles again; the message says which input caused it."""


@dataclass
class CompilationStats:
    """What torch compiled while it was watched."""

    graphs: int = 0
    """Graphs captured, first ones and recompiled ones."""
    breaks: int = 0
    """Graph breaks."""
    recompiles: int = 0
    """Compilations of code that had been compiled before, for other inputs."""
    seconds: float = 0.0
    """Wall-clock seconds spent compiling."""


@contextmanager
def told_of_compilation(start: Callable[[Any], None], end: Callable[[Any], None]) -> Iterator[None]:
    """Inside the ``with`` block torch calls these when it begins to compile something, and when it is done."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


@contextmanager
def watch_compilation() -> Iterator[CompilationStats]:
    """Count what torch compiles inside the ``with`` block, in this process; the numbers are there when it ends."""
    from torch._dynamo.utils import counters

    stats = CompilationStats()
    started: list[float] = []
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def start(args: Any) -> None:
        started.append(time.perf_counter())
        frame_compile_id = args.compile_id.rsplit("/", 1)[-1].split("_")[0]
        stats.recompiles += frame_compile_id.isdigit() and int(frame_compile_id) > 0

    def end(_: Any) -> None:
        if started:  # what another thread began before was not seen
            stats.seconds += time.perf_counter() - started.pop()

    try:
        with told_of_compilation(start, end):
            yield stats
    finally:
        stats.graphs = counters["stats"]["unique_graphs"] - graphs
        stats.breaks = sum(counters["graph_break"].values()) - breaks


# -- why again --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as its caller sees it: what may make a compiled model compile again."""

    sizes: Mapping[str, Any]
    """The size of each input by name."""
    settings: Mapping[str, Any]
    """All else: dtypes, the kind of mask, gradients, the attention backend."""

    def causes(self, earlier: Call, *, sizes_matter: bool) -> dict[str, tuple[Any, Any]]:
        """What is another than in an earlier call, as (then, now).

        Args:
            earlier: the other call.
            sizes_matter: False leaves sizes out where something else differs too: a graph of symbolic sizes holds for
                all of them.
        """
        settings = _differences(earlier.settings, self.settings)
        sizes = _differences(earlier.sizes, self.sizes)
        return settings if settings and not sizes_matter else {**settings, **sizes}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}


def explain_recompile(now: Call, earlier: list[Call], guards: str, *, what: str, dynamic: bool) -> str:
    """Which input makes a compiled model compile again, and what to do about it.

    Args:
        now: the call that does.
        earlier: the calls before it.
        guards: torch's own account.
        what: what compiles, e.g. "the block".
        dynamic: whether sizes are symbolic.

    Returns:
        The message, for a warning or an error.
    """
    candidates = [now.causes(call, sizes_matter=not dynamic) for call in earlier]
    causes = min(filter(None, candidates), key=len, default={})
    listed = "; ".join(f"{name} is {_show(new)}, was {_show(old)}" for name, (old, new) in causes.items())
    reasons = "; ".join(line.strip(" -") for line in guards.splitlines()[2:]) or guards
    only_sizes = bool(causes) and causes.keys() <= now.sizes.keys()
    if only_sizes and not dynamic:
        remedy = (
            "CompileConfig(dynamic=False) compiles each size apart: use dynamic=True, or keep to the sizes compiled"
        )
    elif causes:
        remedy = "keep it as it was, or call the model once in each way before it counts: both graphs are kept"
    else:
        remedy = "nothing about the inputs changed, so the model itself or a setting of torch did: see torch's reason"
    return f"{what} compiles again: {listed or 'the cause is not an input'} ({remedy}). torch's reason: {reasons}"


def _show(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# -- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def show_progress(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """While torch compiles inside the ``with`` block, say so on a terminal: what, for how long, choices timed.

    One line on stderr, taken away when it ends; nothing where stderr is a pipe or a file, or for what takes less than a
    second.

    Args:
        what: what may compile, e.g. "the block".
        stream: in place of stderr.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield
        return
    tickers: list[_Ticker] = []

    def start(_: Any) -> None:
        tickers.append(_Ticker(what, stream))
        tickers[-1].start()

    def end(_: Any) -> None:
        if tickers:  # what another thread began before was not seen
            tickers.pop().stop()

    try:
        with told_of_compilation(start, end):
            yield
    finally:
        for ticker in tickers:
            ticker.stop()


class _Ticker(threading.Thread):
    """Writes the line about one compilation until it is stopped."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(daemon=True, name="cogx_fast compile progress")
        self._what, self._stream = what, stream
        self._stopped = threading.Event()
        self._began = time.perf_counter()
        self._autotuned = _autotuned()
        self._shown = False

    def run(self) -> None:
        wait = _FIRST_SHOWN_AFTER
        while not self._stopped.wait(wait):
            wait = _SHOWN_EVERY
            tuned = _autotuned() - self._autotuned
            tuning = f", {tuned} product{'s' * (tuned != 1)} autotuned" if tuned else ""
            seconds = time.perf_counter() - self._began
            self._write(f"compiling {self._what} … {seconds:.0f} s{tuning}")

    def stop(self) -> None:
        """Take the line away and wait for the thread's end."""
        self._stopped.set()
        self.join()
        if self._shown:
            self._write("")

    def _write(self, line: str) -> None:
        self._shown = True
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()


def _autotuned() -> int:
    """Products and attentions whose candidates torch has timed in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["select_algorithm_autotune"])


__all__ = [
    "Call",
    "CompilationStats",
    "RecompileError",
    "RecompileWarning",
    "explain_recompile",
    "show_progress",
    "told_of_compilation",
    "watch_compilation",
]
