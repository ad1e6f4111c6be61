"""``cogx-fast bench`` sees a slower transformer as slower, and its statistics are what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogx_fast.cli.bench import verdict
from cogx_fast.measure import timing
from cogx_fast.measure.contest import Contest, Work
from cogx_fast.model import layers
from cogx_fast.sizes import Tokens
from tests.cases import for_each
from tests.clock import work_for_time
from tests.conftest import report, run_cli
from tests.support import small

WORK = ("bench", "tiny", "--no-compile", "--height", "128", "--width", "128", "--layers", "2", "--dtype", "fp32")
ROUNDS = ("--rounds", "2")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "baseline.json"
    with work_for_time():
        path.write_text(json.dumps(report(run_cli(*WORK, *ROUNDS, "--json"))))
    return path


def test_the_report_says_what_was_timed(baseline: Path) -> None:
    facts = json.loads(baseline.read_text())
    assert facts["work"] == {
        "model": "tiny", "frames": 17, "height": 128, "width": 128, "batch": 2, "layers": 2, "dtype": "fp32",
        "compile": False, "attention": "auto", "quant": None, "device": "cpu",
    }  # fmt: skip
    assert facts["ratio"]["low"] <= facts["ratio"]["median"] <= facts["ratio"]["high"]
    for seconds in facts["seconds"].values():
        assert 0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"]
    assert facts["machine"]["torch"] == torch.__version__


def test_the_same_work_passes_and_needs_no_other_argument(baseline: Path) -> None:
    with work_for_time():
        finished = run_cli("bench", "--against", baseline, "--margin", "1%", *ROUNDS)
    assert finished.status == 0, finished.out + finished.err
    assert "as fast as it was" in finished.out


def test_a_slower_path_fails_and_the_report_is_still_one_object(
    baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = layers.FeedForward.forward

    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (honest(self, x) + honest(self, x) + honest(self, x)) / 3

    monkeypatch.setattr(layers.FeedForward, "forward", twice)
    with work_for_time():
        finished = run_cli("bench", "--against", baseline, "--margin", "0.2", *ROUNDS, "--json")
    assert finished.status == 1
    facts = json.loads(finished.out)
    assert facts["passed"] is False
    assert facts["rounds"] == 4  # measured again before it failed
    assert facts["ratio"]["median"] > facts["baseline"]["limit"]


@for_each(
    "low, high, word",
    [
        (0.80, 0.90, "as fast"),
        (0.771, 1.120, "cannot tell"),  # a median of 0.950 over a limit of 0.905
        (0.90, 0.91, "cannot tell"),
        (0.91, 0.95, "slower"),
    ],
)
def test_a_verdict_needs_the_interval_on_one_side_of_the_limit(low: float, high: float, word: str) -> None:
    assert verdict({"low": low, "high": high}, limit=0.905) == word


def test_what_cannot_be_told_is_no_failure(baseline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wide = timing.Interval(median=0.95, low=0.5, high=2.0)
    monkeypatch.setattr(timing, "ratio", lambda *_: wide)
    known = json.loads(baseline.read_text()) | {"ratio": {"median": 0.9, "low": 0.85, "high": 0.95}}
    (tmp_path / "known.json").write_text(json.dumps(known))
    finished = run_cli("bench", "--against", tmp_path / "known.json", "--rounds", "2")
    assert finished.status == 0
    assert "cannot tell, measure longer (--rounds 16)" in finished.out
    assert "SLOWER" not in finished.out


@for_each(
    "arguments, message",
    [
        (("bench",), "no model is named"),
        (("bench", "--against", "{tmp}/none.json"), "No such file"),
        (("bench", "--against", "{tmp}/other.json"), "is no report of cogx-fast bench"),
        (("bench", "5b", "--against", "{baseline}"), "model is 5b, but the baseline is of tiny"),
        (("bench", "tiny", "--margin", "fast"), "expected a share such as 5%"),
        (("bench", "tiny", "--dtype", "fp4"), "invalid choice"),
        (("bench", "6b"), "presets are"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], message: str, baseline: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"work": {}}')
    finished = run_cli(*(argument.format(tmp=tmp_path, baseline=baseline) for argument in arguments))
    assert (finished.status, finished.out) == (2, "")
    assert message in finished.err


# ---------------------------------------------------------------------------------------------------------- statistics


def test_steps_take_turns_and_the_order_alternates() -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    seconds = timing.take_turns({"a": note("a"), "b": note("b")}, rounds=3)
    assert "".join(calls) == "abbaab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_clock_of_a_gpu_adds_up_pairs_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = [1000.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at, self.done = float("nan"), False

        def record(self, stream: str) -> None:
            assert stream == "the stream of cuda:1"
            self.at = milliseconds[0]

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, later: Event) -> float:
            assert self.done
            assert later.done
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    now = timing.clock(torch.device("cuda:1"))

    def step() -> None:
        milliseconds[0] += 250

    assert timing.take_turns({"a": step}, rounds=3, now=now) == {"a": [0.25, 0.25, 0.25]}
    assert now() == 0.75


def test_the_ratio_is_found_on_a_machine_that_others_slow_down() -> None:
    generator = random.Random(0)
    load = [1 + 3 * generator.random() for _ in range(41)]  # of each round, common to both
    above = [1.2 * each * generator.uniform(0.97, 1.03) for each in load]
    found = timing.ratio(above, load)
    assert found.low < 1.2 < found.high
    assert found.high - found.low < 0.05
    assert timing.median(load).high - timing.median(load).low > 0.5  # the times themselves are no use


@for_each(
    "what, compiled", [("model", ["CogVideoXTransformer3DModel"]), ("blocks", 2 * ["CogVideoXBlock"]), (None, [])]
)
def test_what_of_diffusers_is_compiled(what: Any, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_(function: Any, **options: Any) -> Any:
        assert options == {"fullgraph": True}
        seen.append(type(getattr(function, "__self__", function)).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    work = Work(config=small("5b"), tokens=Tokens(text=8, grid=(2, 4, 4)), dtype=torch.float32, peer_compile=what)
    Contest(work)
    assert seen == compiled


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(100):
        interval = timing.median([generator.gauss(5, 1) for _ in range(25)])
        covered += interval.low <= 5 <= interval.high
    assert 88 <= covered <= 100


@for_each("share, value", [(0, 1), (0.5, 2.5), (1, 4), (0.2, 1.6)])
def test_percentiles(share: float, value: float) -> None:
    assert timing.percentile([4, 1, 3, 2], share) == pytest.approx(value)
