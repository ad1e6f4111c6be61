"""The loop over the blocks and its slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import ComputeBlocks, ForBlocks, Runner, Slots, Whole
from tests.support import inputs, relative_error, small


def make(name: str = "5b", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return CogVideoXModel(small(name, num_layers=3)).eval()


def run(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**inputs(model.config, **options)).sample
        return sample


@pytest.fixture
def model() -> Any:
    return make()


def test_reuse_decides_which_blocks_are_computed(model: Any) -> None:
    def without_the_second(compute: ComputeBlocks, x_BSD: Tensor, num_layers: int, *_: Any) -> Tensor:
        return compute(compute(x_BSD, 0, 1), 2, num_layers)

    model.runner = Runner(Slots(reuse=without_the_second))
    skipped = run(model)
    model.transformer_blocks[1].forward = lambda x_BSD, *_: x_BSD
    model.runner = Runner()
    assert torch.equal(skipped, run(model))


def test_residency_says_which_block_computes_a_layer(model: Any) -> None:
    seen: list[int] = []

    def told(blocks: Iterable[Any], first: int, last: int, _: torch.device) -> Iterable[tuple[int, Any]]:
        for layer in range(first, last):
            seen.append(layer)
            yield layer, list(blocks)[layer]

    expected = run(model)
    model.runner = Runner(Slots(residency=told))
    assert torch.equal(run(model), expected)
    assert seen == [0, 1, 2]


def test_split_sees_the_stream_before_and_after_the_blocks(model: Any) -> None:
    class Padded(Whole):
        """Blocks compute one token more, which nobody sees."""

        def enter(self, x_BSD: Tensor, inputs: ForBlocks) -> tuple[Tensor, ForBlocks]:
            tokens = x_BSD.shape[1]
            mask = (torch.arange(tokens + 1) < tokens)[None, None, None]
            padded = [torch.cat([each, each[-1:]]) for each in (inputs.is_text_S1, *(inputs.rotary or ()))]
            rotary = (padded[1], padded[2]) if inputs.rotary is not None else None
            inputs = inputs._replace(is_text_S1=padded[0], rotary=rotary, mask=mask)
            return torch.cat([x_BSD, x_BSD[:, -1:]], dim=1), inputs

        def leave(self, x_BSD: Tensor, text_len: int, video_len: int, head: Callable[[Tensor], Tensor]) -> Tensor:
            return head(x_BSD)[:, text_len : text_len + video_len]

    expected = run(model)
    model.runner = Runner(Slots(split=Padded()))
    assert relative_error(run(model), expected) <= 1e-6


@pytest.mark.parametrize("scope", ["block", "model"])
def test_two_compiled_models_in_two_threads_compute_as_alone(scope: Any) -> None:
    models = [make("5b"), make("2b", seed=1)]
    sizes: list[dict[str, Any]] = [{}, {"batch": 1}, {"frames": 3}]
    expected = [[run(model, **size) for size in sizes] for model in models]
    for model in models:
        compile_model(model, CompileConfig(scope=scope, backend="eager", strict=True))
    found: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []
    together = threading.Barrier(len(models))

    def work(index: int) -> None:
        try:
            together.wait()
            found[index] = [run(models[index], **size) for _ in range(3) for size in sizes]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for index, outputs in found.items():
        for output, want in zip(outputs, expected[index] * 3, strict=True):
            assert relative_error(output, want) <= 1e-6
