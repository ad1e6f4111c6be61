"""TorchInductor for a described GPU: every patch of torch and triton that this needs, and the compilation.

Only for a process that does nothing else (``worker.py``): the patches are global and stay, and must come before
``torch._dynamo`` is imported. Written for the versions that ``benchmarks/expected/codegen.csv`` names.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.codegen import resources
from benchmarks.codegen.report import CodegenError
from cogx_fast.measure.devices import Device
from cogx_fast.measure.explain.capture import listening
from cogx_fast.runtime.compiling.candidates import candidates

CONFIG = {
    "force_disable_caches": True,  # a cached graph is not lowered, so not counted
    "compile_threads": 1,
    "shape_padding": False,  # times both choices on the device
    "use_static_triton_launcher": False,  # loads machine code through torch's own driver, not through triton's
}
"""Inductor options of every report, for described and real GPUs alike."""


Examine = Callable[[Any], Any]
StandIn = Callable[[list[Any]], Callable[[list[Any]], list[Any]]]


def describe(device: Device) -> None:
    """Make this process believe that it has this one GPU.

    Raises:
        CodegenError: it has a GPU, or it is too late.
    """
    if torch.cuda.is_available():
        raise CodegenError(
            f"this machine has a {torch.cuda.get_device_name()}: its code would be taken for a described GPU's; "
            "hide it with CUDA_VISIBLE_DEVICES= or ask for real=True"
        )
    if "torch._dynamo.device_interface" in sys.modules:
        raise CodegenError(
            "torch._dynamo was imported before the device was described, and has already copied what it asks"
        )
    _answer_for_the_device(device)
    _keep_fake_tensors_off_the_device()
    _set_triton_driver(device)
    _fold_constants_on_the_cpu()


def _answer_for_the_device(device: Device) -> None:
    """torch.cuda's questions; dynamo's device interface copies some of these functions when it is imported."""
    properties = types.SimpleNamespace(
        name=device.name, major=device.capability[0], minor=device.capability[1],
        multi_processor_count=device.multiprocessors, regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=device.threads_per_multiprocessor, max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=device.shared_per_block,
        shared_memory_per_multiprocessor=device.shared_per_multiprocessor, L2_cache_size=device.l2_bytes,
        total_memory=device.memory_bytes, clock_rate=device.clock_khz, memory_clock_rate=device.memory_clock_khz,
        memory_bus_width=device.memory_bus_bits, is_integrated=0, is_multi_gpu_board=0, gcnArchName="",
    )  # fmt: skip
    random_state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": random_state,
        "set_rng_state": lambda state, device="cuda": None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.version.cuda = resources.ptxas_version().rpartition(".")[0]  # None: torchao finds no fp8
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # generated code imports it; builds for CPUs lack it
        torch._C._cuda_getCurrentRawStream = lambda index=0: 0  # type: ignore[misc]


def _keep_fake_tensors_off_the_device() -> None:
    import torch._subclasses.fake_tensor as fake

    fake.init_gpu_context = lambda device: None  # type: ignore[assignment]
    fake.FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]


def _set_triton_driver(device: Device) -> None:
    """A driver that knows the target and reads a kernel's resources from its machine code; it launches nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Utils:
        @staticmethod
        def get_device_properties(index: int = 0) -> dict[str, int]:
            return {
                "max_shared_mem": device.shared_per_block, "max_num_regs": 65536,
                "multiprocessor_count": device.multiprocessors, "warpSize": 32, "sm_clock_rate": device.clock_khz,
                "mem_clock_rate": device.memory_clock_khz, "mem_bus_width": device.memory_bus_bits,
            }  # fmt: skip

        @staticmethod
        def load_binary(name: str, code: bytes, shared: int, index: int) -> tuple[int, int, int, int, int]:
            registers, local_bytes = resources.of_machine_code(code)
            return 0, 0, registers, local_bytes // 4, 1024

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils = Utils()
            self.launcher_cls = lambda source, metadata: _no_launch
            self.get_current_device = lambda: 0
            self.set_current_device = lambda index: None
            self.get_current_stream = lambda index=0: 0
            self.get_device_capability = lambda index=0: device.capability

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", device.arch, 32)

    triton.runtime.driver.set_active(Driver())
    # Inductor's is a new one for each graph, as caches are off; so a kernel that two cases share is built once
    triton.knobs.cache.dir = tempfile.mkdtemp(prefix="cogx-fast-triton-")
    atexit.register(shutil.rmtree, triton.knobs.cache.dir, ignore_errors=True)


def _no_launch(*args: Any, **kwargs: Any) -> None:
    raise CodegenError("a kernel would be launched, but the GPU is only described")


def _fold_constants_on_the_cpu() -> None:
    """Folding evaluates uniform constants on real tensors of one element (flex-attention's mask has some)."""
    from torch._inductor.fx_passes import joint_graph
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), (args, kwargs or {}))
            return func(*args, **kwargs)

    class Folder(joint_graph.UniformValueConstantFolder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with OnCpu():
                super().__init__(*args, **kwargs)

        def run(self, *args: Any, **kwargs: Any) -> Any:
            with OnCpu():
                return super().run(*args, **kwargs)

    joint_graph.UniformValueConstantFolder = Folder  # type: ignore[misc]


def state_sdpa(kernel: str | None) -> None:
    """Decide what ``scaled_dot_product_attention`` becomes, which torch's own chooser cannot without the device.

    Args:
        kernel: "cudnn", "flash" or "efficient"; None: a call raises.
    """
    aten = torch.ops.aten
    operators = {
        "cudnn": lambda q, k, v, mask, lse, causal, scale: aten._scaled_dot_product_cudnn_attention(
            q, k, v, mask, lse, 0.0, causal, False, scale=scale
        ),
        "flash": lambda q, k, v, mask, lse, causal, scale: aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        ),
        "efficient": lambda q, k, v, mask, lse, causal, scale: aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, lse, 0.0, causal, scale=scale
        ),
    }

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        if kernel not in operators:
            raise CodegenError(
                f"the case calls scaled_dot_product_attention and states {kernel!r}: state {', '.join(operators)}"
            )
        half = q.dtype in (torch.bfloat16, torch.float16)
        if (
            dropout_p
            or enable_gqa
            or not (half or kernel == "efficient")
            or (kernel == "flash" and attn_mask is not None)
        ):
            raise CodegenError(
                f"{kernel} attention cannot take this call ({q.dtype}, mask {attn_mask is not None}, "
                f"dropout {dropout_p}, grouped {enable_gqa}): torch would fall to another kernel; state one that can"
            )
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        return operators[kernel](q, k, v, attn_mask, save, is_causal, scale)[0]

    operator, key = aten.scaled_dot_product_attention.default, torch._C.DispatchKey.CompositeImplicitAutograd
    operator.py_kernels.pop(key, None)
    operator._dispatch_cache.clear()
    operator.py_impl(key)(attend)


@contextlib.contextmanager
def own_sdpa() -> Iterator[None]:
    """What ``scaled_dot_product_attention`` was before ``state_sdpa``, meanwhile: for tensors with values."""
    operator, key = torch.ops.aten.scaled_dot_product_attention.default, torch._C.DispatchKey.CompositeImplicitAutograd
    stated = operator.py_kernels.pop(key, None)
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        if stated is not None:
            operator.py_kernels[key] = stated
        operator._dispatch_cache.clear()


# ---------------------------------------------------------------------------------------------------- compilation


class Capture:
    """What Inductor produced during one ``compile_only``."""

    def __init__(self) -> None:
        self.graphs: list[tuple[str, Any, Any]] = []
        """(source, generated module, what ``examine`` returned)."""
        self.sdpa_calls = 0
        self.inductor_bytes = 0


def compile_only(
    module: Any, arguments: tuple[Any, ...], examine: Examine, options: Mapping[str, Any] | None = None
) -> Capture:
    """Compile ``module(*arguments)`` as one graph; its kernels are built, not run.

    Args:
        examine: called with each lowered graph while it is Inductor's current one.
        options: Inductor options besides ``CONFIG``.

    Returns:
        What was captured.
    """
    from torch._inductor import compile_fx, metrics

    capture = Capture()
    torch._dynamo.reset()
    metrics.reset()
    counting_bytes = listening(compile_fx.inductor_metrics_log, logging.NullHandler(), logging.INFO)
    with lowering(capture, examine, options), counting_bytes:
        compiler(capture)(module, dynamic=False)(*arguments)
    capture.inductor_bytes = metrics.num_bytes_accessed
    return capture


def compiler(capture: Capture, stand_in: StandIn | None = None) -> Callable[..., Any]:
    """As ``torch.compile``; of its settings only ``dynamic`` is taken. What it compiles is called inside ``lowering``.

    Args:
        capture: where the graphs are noted.
        stand_in: given the outputs' shapes, makes what is called in a compiled graph's place with its inputs.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: Any, example_inputs: Any, **kwargs: Any) -> Any:
        outputs = [getattr(node, "meta", {}).get("val", node) for node in graph.graph.output_node().args[0]]
        compile_fx_inner(graph, example_inputs, **kwargs)
        return (stand_in or _stand_in)(outputs)

    def backend(graph: Any, inputs: Any) -> Any:
        sdpa = (
            torch.nn.functional.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention.default,  # in a graph that was exported
        )
        capture.sdpa_calls += sum(node.target in sdpa for node in graph.graph.nodes)
        return compile_fx(graph, inputs, inner_compile=inner)

    def compile(function: Any, *, dynamic: bool | None = None, **_: Any) -> Any:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

    return compile


@contextlib.contextmanager
def lowering(capture: Capture, examine: Examine, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While graphs are lowered: as ``compile_only`` says."""
    from torch._inductor import config

    with (
        config.patch({**CONFIG, **(options or {})}),
        candidates(torch.device("cuda"), options or {}),
        _lowered_graphs(capture, examine),
    ):
        yield


def hash_of_source(source: str) -> str:
    """The same for the same generated code: without comments, which hold paths, and without the code that times it."""
    code = source.partition("\ndef get_args():")[0].splitlines()
    return hashlib.sha256("\n".join(line for line in code if not line.startswith("#")).encode()).hexdigest()[:16]


def _stand_in(outputs: list[Any]) -> Any:
    """In the compiled graph's place: its results' shapes without values."""

    def run(inputs: list[Any]) -> list[Any]:
        inputs.clear()
        return [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            if isinstance(value, torch.Tensor)
            else value
            for value in outputs
        ]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _lowered_graphs(capture: Capture, examine: Examine) -> Iterator[None]:
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []
    compile_to_module, save_output_code = GraphLowering.compile_to_module, GraphLowering.save_output_code

    def compile_and_examine(self: Any) -> Any:
        module = compile_to_module(self)
        capture.graphs.append((sources[-1], module, examine(self)))
        return module

    GraphLowering.compile_to_module = compile_and_examine  # type: ignore[method-assign]
    GraphLowering.save_output_code = staticmethod(sources.append)
    try:
        yield
    finally:
        GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]
        GraphLowering.save_output_code = save_output_code
