"""Run in a fresh interpreter by test_architecture: imports each module of a package and reports what that did.

    python import_probe.py PACKAGE FORBIDDEN[,FORBIDDEN…] LEFT_OUT[,LEFT_OUT…]

Prints one JSON list of "module: what it did". torch, its compiler included, is imported beforehand: what torch itself
does on import is not laid to us, and every flag of it can be compared.
"""

import contextlib
import importlib
import io
import json
import os
import pkgutil
import sys

import torch
import torch._dynamo.config
import torch._inductor.config

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "subprocess.Popen", "os.system",
          "socket.connect", "os.putenv"}  # fmt: skip
actions: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: notes every write to the disk, new process and connection."""
    if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        actions.append(f"{event} {arguments[0]!r}")


def global_state() -> dict[str, object]:
    """Every process-wide setting that an import could change, by name."""
    state: dict[str, object] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "number of interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "sdp kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "random state": hash(bytes(torch.get_rng_state().numpy())),
        "environment": dict(os.environ),
        "CUDA initialised": torch.cuda.is_initialized(),
    }
    for config in (torch._dynamo.config, torch._inductor.config):
        state |= {f"{config.__name__}.{name}": repr(value) for name, value in config.get_config_copy().items()}
    return state


def probe(module: str, forbidden: set[str]) -> list[str]:
    """Import one module and say what it did beside defining names."""
    actions.clear()
    before, loaded, printed = global_state(), set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        importlib.import_module(module)
    done = list(actions)
    after = global_state()
    found = [f"imports {name}" for name in sorted(forbidden & (set(sys.modules) - loaded))]
    found += [f"changes {name}" for name in after if after[name] != before.get(name)]
    found += [f"acts: {action}" for action in done]
    found += [f"prints {printed.getvalue()!r}"] if printed.getvalue() else []
    return [f"{module}: {what}" for what in found]


def main() -> None:
    """Probe the package, then all modules below it."""
    del sys.path[0]  # this folder, where quant is a package of tests
    package, forbidden, left_out = sys.argv[1], set(sys.argv[2].split(",")), set(sys.argv[3].split(","))
    assert not forbidden & set(sys.modules), f"torch itself imports {forbidden & set(sys.modules)}"
    if "torchao" not in forbidden:  # for the same reason: it logs which of its extensions it cannot load
        importlib.import_module("torchao.quantization")
    sys.addaudithook(watch)
    report = probe(package, forbidden)
    for info in pkgutil.walk_packages(sys.modules[package].__path__, prefix=f"{package}."):
        if not info.name.endswith("__main__") and info.name not in left_out:
            report += probe(info.name, forbidden)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
