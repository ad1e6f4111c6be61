"""One step on several ranks: real processes over gloo, beside one process that computes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogx_fast.runtime.distributed.parallel import ParallelConfig
from tests import worlds

SHARED = "tests.runtime.shared_steps"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_mesh_computes_what_one_process_does(size: int, tmp_path: Path) -> None:
    backend = "aot_eager" if size == 2 else "eager"
    for errors in worlds.results(f"{SHARED}:meshes", size, tmp_path, seconds=280, backend=backend):
        wrong = {name: error for name, error in errors.items() if not error <= 1e-6}
        assert wrong == {}
        assert len(errors) >= 12


@pytest.mark.parametrize(("size", "heads"), [(6, 12), (8, 24)])
def test_a_node_of_six_or_eight_computes_what_one_process_does(size: int, heads: int, tmp_path: Path) -> None:
    for errors in worlds.results(f"{SHARED}:meshes", size, tmp_path, seconds=280, backend=None, heads=heads):
        assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}
        assert {name.partition(",")[0] for name in errors} >= {f"2 × {size // 2}", f"1 × {size}"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 6])
def test_code_of_inductor_computes_it_too(size: int, tmp_path: Path) -> None:
    for errors in worlds.results(f"{SHARED}:meshes", size, tmp_path, seconds=900, backend="inductor"):
        assert max(errors.values()) <= 1e-6


def test_a_mesh_goes_with_plans_caches_masks_and_quantized_weights(tmp_path: Path) -> None:
    for errors in worlds.results(f"{SHARED}:compositions", 4, tmp_path, seconds=280):
        rounded = errors.pop("products in int8")  # the last bit of an activation decides about its quantized value
        assert rounded <= 1e-3
        assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_what_is_sent_is_what_the_formula_says(tmp_path: Path) -> None:
    for found in worlds.results(f"{SHARED}:sent", 4, tmp_path, seconds=280):
        assert all(counted == said > 0 for counted, said in found), found


def test_tiles_that_ranks_share_make_the_video_of_one_process_bit_for_bit(tmp_path: Path) -> None:
    for found in worlds.results(f"{SHARED}:decode", 3, tmp_path, seconds=280):
        assert all(each["equal"] for each in found), found
        assert [each["sent"] for each in found] == [each["expected"] for each in found]
        assert [each["sent"] > 0 for each in found] == [True, True, True, False]


def test_what_does_not_go_with_a_mesh_says_so(tmp_path: Path) -> None:
    for said in worlds.results(f"{SHARED}:refusals", 2, tmp_path, seconds=280):
        for expected, message in said.items():
            assert expected in message


def test_what_cannot_be_a_mesh_is_refused() -> None:
    for options, expected in (
        ({"guidance": 0}, "guidance is 0"),
        ({"sequence": -1}, "sequence is -1"),
    ):
        with pytest.raises(ValueError, match=expected):
            ParallelConfig(**options)
    assert ParallelConfig.for_ranks(8, 48) == ParallelConfig(guidance=2, sequence=4)
    assert ParallelConfig.for_ranks(3, 48) == ParallelConfig(sequence=3)
    assert ParallelConfig.for_ranks(2, 48, guided=False) == ParallelConfig(sequence=2)
    with pytest.raises(ValueError, match="sequence=4 does not divide the model's 30 heads: use 2, 3, 5, 6, 10, 15, 30"):
        ParallelConfig.for_ranks(8, 30)
