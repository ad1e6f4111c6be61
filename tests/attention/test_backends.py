"""Each backend says what it needs, and runs or is refused accordingly; all of them are traced as one graph."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.attend import attend
from cogx_fast.attention.backends import BACKENDS, Backend, get_backend, ready_backend
from cogx_fast.attention.masks import full_block_mask
from cogx_fast.runtime.compiling.compile import watch_compilation
from tests.attention.test_attend import plain, qkv
from tests.cases import for_each
from tests.support import relative_error

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_names_are_the_keys_and_only_sage_is_approximate() -> None:
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert [name for name, backend in BACKENDS.items() if not backend.exact] == ["sage"]
    assert all(backend.install for backend in BACKENDS.values() if backend.module)


@for_each(
    "name, device, dtype, head_dim, reason",
    [
        ("sdpa-cudnn", CPU, BF16, 64, "it runs on cuda, and the model is on cpu"),
        ("sdpa-flash", CUDA, torch.float32, 64, "it takes float16 and bfloat16, and the model is in float32"),
        ("sage", CUDA, BF16, 80, "it takes heads of width 64, 96, 128, and the model has 80"),
        ("sage", CUDA, BF16, 64, "it needs the package sageattention: pip install sageattention"),
        ("fa3", CUDA, BF16, 64, "it needs the package flash_attn_interface: build hopper/ of https://"),
        ("fa4", CUDA, BF16, 64, "it needs the package flash_attn.cute: pip install --pre flash-attn-4"),
        ("flex-flash", CUDA, BF16, 64, "it needs the package flash_attn.cute"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_a_backend_that_cannot_run_says_why(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    assert reason in str(get_backend(name).why_not(device, dtype, head_dim))
    with pytest.raises(ValueError, match=rf"backend '{name}' cannot run here: .*\. Here run sdpa, flex,"):
        ready_backend(name, device=device, dtype=dtype, head_dim=head_dim)


def test_an_older_gpu_is_told_which_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert "capability 9.x, and this one has 8.x" in str(get_backend("fa3").why_not(CUDA, BF16, 64))
    assert get_backend("sdpa-flash").why_not(CUDA, BF16, 64) is None


def test_turing_takes_bf16_by_torchs_own_choice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    able = [name for name, backend in BACKENDS.items() if backend.why_not(CUDA, BF16, 64) is None]
    assert able == ["sdpa", "sdpa-math"]
    assert "load the model in float16" in str(get_backend("flex").why_not(CUDA, BF16, 64))
    assert {"flex", "sdpa-efficient"} <= {
        name for name, backend in BACKENDS.items() if backend.why_not(CUDA, torch.float16, 64) is None
    }


@pytest.mark.usefixtures("hopper")
def test_what_a_hopper_gpu_runs_without_other_packages() -> None:
    able = [name for name, backend in BACKENDS.items() if backend.why_not(CUDA, BF16, 64) is None]
    assert able == ["sdpa", "flex", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math"]


def test_a_backend_of_ones_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Backend(name="bare", run=lambda q, k, v, mask: v, exact=False, about="values")
    monkeypatch.setitem(BACKENDS, "bare", bare)
    assert ready_backend("bare", device=CPU, dtype=BF16, head_dim=64) is bare
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v, backend="bare"), v)


# -- torch's kernels, pinned -------------------------------------------------------------------------------------------


def kernels_allowed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that are allowed in each call, in order of priority."""
    seen: list[Any] = []
    attention = F.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> Tensor:
        seen.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):  # the only one of them that the CPU has
            return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@for_each("name, kernel", [
    ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION), ("sdpa-math", SDPBackend.MATH),
    ("fa3", SDPBackend.FLASH_ATTENTION), ("fa4", SDPBackend.FLASH_ATTENTION),
])  # fmt: skip
def test_a_pinned_backend_allows_its_kernel_alone(
    name: str, kernel: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    seen = kernels_allowed(monkeypatch)
    attend(*qkv(), backend=name)
    assert seen == [[kernel]]
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_sdpa_leaves_the_kernel_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    seen = kernels_allowed(monkeypatch)
    attend(*qkv(), backend="sdpa")
    assert seen == [before]


@for_each("backend", ["sdpa", "sdpa-math", "flex"])
def test_a_backend_is_traced_as_one_graph(backend: str) -> None:
    q, k, v = qkv(40)
    mask = full_block_mask("cpu") if BACKENDS[backend].masks is BlockMask else None
    compiled = torch.compile(lambda *qkv: attend(*qkv, backend=backend, mask=mask), fullgraph=True, backend="eager")
    with watch_compilation() as compilation:
        out = compiled(q, k, v)
    assert (compilation.graphs, compilation.breaks) == (1, 0)
    assert relative_error(out, plain(q, k, v)) <= 1e-5


def test_a_pinned_kernel_is_part_of_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda *qkv: attend(*qkv, backend="sdpa-math"), fullgraph=True, backend=keep)(*qkv())
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    attention = called.index(F.scaled_dot_product_attention)
    assert called.index(torch.nn.attention._sdpa_kernel) < attention
    assert torch.nn.attention._sdpa_kernel in called[attention:]  # and put back behind it


# -- other packages' kernels -------------------------------------------------------------------------------------------


@pytest.fixture
def flash_slot(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch's slot for a flash kernel, filled by what only notes that it was."""
    filled: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", filled.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: filled[-1] if filled else None)
    return filled


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every optional package were there."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.usefixtures("hopper", "packages")
def test_fa3_is_activated_once_and_fa4_not_beside_it(flash_slot: list[str]) -> None:
    for _ in range(2):
        ready_backend("fa3", device=CUDA, dtype=BF16, head_dim=64)
    assert flash_slot == ["FA3"]
    with pytest.raises(ValueError, match="FA4 is asked for, but FA3 is active in this process"):
        ready_backend("fa4", device=CUDA, dtype=BF16, head_dim=64)
    assert flash_slot == ["FA3"]


def test_sage_is_one_operator_in_the_models_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
        calls.append(tensor_layout)
        assert not is_causal
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    package = types.ModuleType("sageattention")
    package.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", package)
    prepare: Any = BACKENDS["sage"].prepare
    prepare()
    q, k, v = qkv(40)
    compiled = torch.compile(lambda *qkv: attend(*qkv, backend="sage"), fullgraph=True)
    for run in (lambda *qkv: attend(*qkv, backend="sage"), compiled):
        out = run(q, k, v)
        assert out.is_contiguous()
        assert relative_error(out, plain(q, k, v)) <= 1e-5
    assert set(calls) == {"NHD"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_softmax_attention_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    reason = BACKENDS[name].why_not(CUDA, dtype, 64)
    if reason is not None:
        pytest.skip(reason)
    backend = ready_backend(name, device=CUDA, dtype=dtype, head_dim=64)
    q, k, v = (x.to("cuda") for x in qkv(1000, dtype=dtype))
    mask = full_block_mask("cuda") if backend.masks is BlockMask else None
    compiled = torch.compile(lambda *qkv: attend(*qkv, backend=name, mask=mask), fullgraph=True)
    bound = 2 * torch.finfo(dtype).eps if backend.exact else 0.05
    assert relative_error(compiled(q, k, v), plain(q, k, v)) <= max(bound, 1e-5)
