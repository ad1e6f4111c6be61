"""The shape of the code: which room imports which, and that importing does nothing else."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("import_probe.py")
HEAVY = {"accelerate", "diffusers", "huggingface_hub", "imageio", "matplotlib", "PIL", "torchao", "transformers"}
ON_DIFFUSERS = "cogx_fast.runtime.diffusers_model"
"""The one module that imports diffusers when it is imported itself; so importing it counts as that."""
COMPILER = ("torch._dynamo", "torch._inductor")
COMPILER_OWNERS = (
    "cogx_fast/runtime/compile.py",
    "cogx_fast/runtime/warm_start.py",  # what Inductor left on the disk, and where the next process looks for it
    "cogx_fast/runtime/export.py",  # compiles ahead of time
    "cogx_fast/runtime/calls.py",  # its part that holds torch's flags during a call
    "cogx_fast/runtime/compiled.py",  # its part that runs what was compiled
    "cogx_fast/runtime/symbols.py",  # its part that marks symbolic sizes
    "cogx_fast/runtime/candidates.py",  # its part that says what Inductor times
    "cogx_fast/runtime/merged_loops.py",  # its part that says which loops stay apart
    "cogx_fast/runtime/toolkit.py",  # whether there is what generated code is built with
    "cogx_fast/runtime/recompiles.py",  # its part that watches torch compile
    "cogx_fast/measure/explain/",  # reads what the compiler made of a model: its graphs, schedule and generated code
)


# ----------------------------------------------------------------------------------------------- reading the sources


@dataclass(frozen=True)
class Source:
    """One parsed file of the tree under `root`."""

    root: Path
    path: Path
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def package(self) -> list[str]:
        return list(self.path.relative_to(self.root).parent.parts)


@dataclass(frozen=True)
class Import:
    """`module` is imported at `line`, `eager` if that happens when the file itself is imported."""

    module: str
    line: int
    eager: bool


def sources(root: Path, *packages: str) -> list[Source]:
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return [Source(root, path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in paths]


def nodes(tree: ast.AST, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `tree`, and whether it runs on import: not so in a function or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            deferred = True
        yield child, eager
        yield from nodes(child, eager and not deferred)


def imports(source: Source) -> Iterator[Import]:
    for node, eager in nodes(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, eager)
        elif isinstance(node, ast.ImportFrom):
            above = source.package[: len(source.package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module` imports package.module
                inside = source.root.joinpath(*module.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield Import(f"{module}.{alias.name}" if is_module else module, node.lineno, eager)


def below(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


# --------------------------------------------------------------------------------------------------------- the rules


def check_directions(root: Path) -> list[str]:
    """`config` stands alone, `model` knows only it; `weights` and `runtime` know both, but not each other."""
    found = []
    for source in sources(root, "cogx_fast", "quant"):
        room = ".".join(source.name.removesuffix(".py").split("/")[:2])
        for item in imports(source):
            ours, foundation = below(item.module, "cogx_fast"), ("cogx_fast.config", "cogx_fast.model")
            wrong = {
                "cogx_fast.config": ours,
                "cogx_fast.model": ours and not below(item.module, *foundation),
                "cogx_fast.weights": below(item.module, "cogx_fast.runtime")
                or (ours and item.eager and not below(item.module, *foundation, "cogx_fast.weights")),
                "cogx_fast.runtime": ours and item.eager and not below(item.module, *foundation, "cogx_fast.runtime"),
            }.get(room, ours and source.package[0] == "quant")
            if wrong:
                found.append(f"{source.name}:{item.line}: must not import {item.module}")
    return found


def check_heavy_imports(root: Path) -> list[str]:
    """Heavy third parties are imported where they are used, never on import; in `model/` not even there."""
    found = []
    for source in sources(root, "cogx_fast"):
        if source.name == f"{ON_DIFFUSERS.replace('.', '/')}.py":
            continue
        in_model = source.name.startswith("cogx_fast/model/")
        for item in imports(source):
            heavy = item.module.split(".")[0] in HEAVY or below(item.module, ON_DIFFUSERS)
            if heavy and (item.eager or in_model):
                found.append(f"{source.name}:{item.line}: imports {item.module}")
    return found


def check_compiler_owner(root: Path) -> list[str]:
    """Only `runtime/compile.py` and its parts touch the compiler's internals (prose may name them)."""
    found = []
    for source in sources(root, "cogx_fast", "quant"):
        if source.name.startswith(COMPILER_OWNERS):
            continue
        for node, _ in nodes(source.tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                names = [node.value]  # for importlib.import_module and getattr
            if any(below(name, *COMPILER) for name in names) or set(names) & {"_dynamo", "_inductor"}:
                found.append(f"{source.name}:{node.lineno}: touches {names[0]}")
    return found


def check_environment(root: Path) -> list[str]:
    """The environment is read when something is called, not on import."""
    found = []
    for source in sources(root, "cogx_fast", "quant"):
        for node, eager in nodes(source.tree):
            if eager and isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
                found.append(f"{source.name}:{node.lineno}: reads the environment on import")
    return found


RULES: list[Callable[[Path], list[str]]] = [
    check_directions,
    check_heavy_imports,
    check_compiler_owner,
    check_environment,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_sources_keep_the_rule(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (check_directions, "cogx_fast/config.py", "import cogx_fast.model"),
        (check_directions, "cogx_fast/model/a.py", "from cogx_fast.runtime import module"),
        (check_directions, "cogx_fast/model/a.py", "from ..weights import layout"),
        (check_directions, "cogx_fast/model/a.py", "from cogx_fast import load"),
        (check_directions, "cogx_fast/model/a.py", "def f():\n    from cogx_fast import cli"),
        (check_directions, "cogx_fast/runtime/a.py", "from cogx_fast.weights import layout"),
        (check_directions, "cogx_fast/weights/a.py", "def f():\n    from cogx_fast.runtime.module import M"),
        (check_directions, "cogx_fast/weights/a.py", "import cogx_fast.pipelines.accelerate"),
        (check_directions, "quant/a.py", "def f():\n    import cogx_fast.config"),
        (check_heavy_imports, "cogx_fast/a.py", "import diffusers.models"),
        (check_heavy_imports, "cogx_fast/a.py", "from cogx_fast.runtime.diffusers_model import A"),
        (check_heavy_imports, "cogx_fast/a.py", "try:\n    from PIL import Image\nexcept ImportError:\n    pass"),
        (check_heavy_imports, "cogx_fast/a.py", "class A:\n    import torchao"),
        (check_heavy_imports, "cogx_fast/model/a.py", "def f():\n    import diffusers"),
        (check_compiler_owner, "cogx_fast/a.py", "import torch\ntorch._inductor.config.max_autotune = True"),
        (check_compiler_owner, "cogx_fast/a.py", "from torch import _dynamo"),
        (check_compiler_owner, "cogx_fast/runtime/a.py", "def f():\n    import torch._dynamo.utils"),
        (check_compiler_owner, "quant/a.py", "import importlib\nimportlib.import_module('torch._inductor.config')"),
        (check_compiler_owner, "quant/a.py", "import torch\ngetattr(torch, '_dynamo').reset()"),
        (check_environment, "cogx_fast/a.py", "import os\nHOME = os.environ.get('HF_HOME')"),
        (check_environment, "quant/a.py", "import os\nclass A:\n    home = os.getenv('HF_HOME')"),
    ],
)
def test_a_planted_violation_is_reported(rule, path, text, tmp_path):
    for package in ("cogx_fast/model", "cogx_fast/runtime", "cogx_fast/weights", "quant"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / path).write_text(text)
    found = rule(tmp_path)
    assert len(found) >= 1
    assert all(line.startswith(f"{path}:") for line in found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cogx_fast/model/a.py", "from cogx_fast.config import TransformerConfig\nfrom .b import f\nimport os"),
        ("cogx_fast/runtime/a.py", "def f():\n    from cogx_fast.weights import layout"),
        ("cogx_fast/runtime/compile.py", "def f():\n    import torch._dynamo as d\n    return d.config"),
        (
            "cogx_fast/pipelines/accelerate.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers",
        ),
        ("cogx_fast/cli.py", "import os\ndef f():\n    import matplotlib\n    return os.environ"),
        ("quant/a.py", '"""Leaves torch._inductor alone."""\nimport torchao'),
    ],
)
def test_what_is_allowed_is_not_reported(path, text, tmp_path):
    for package in ("cogx_fast/model", "cogx_fast/runtime", "quant"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert [line for rule in RULES for line in rule(tmp_path)] == []


# ------------------------------------------------------------------------------------------------------ inert imports


def import_everything(package: str, root: Path, home: Path, forbidden: set[str]) -> list[str]:
    """What importing `package` and every module below it does, in a fresh interpreter."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    env |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, str(PROBE), package, ",".join(sorted(forbidden)), ON_DIFFUSERS]
    child = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize(("package", "forbidden"), [("cogx_fast", HEAVY), ("quant", HEAVY - {"torchao"})])
def test_importing_does_nothing_else(package, forbidden, tmp_path):
    assert import_everything(package, ROOT, tmp_path, forbidden) == []


def test_an_import_that_does_something_is_reported(tmp_path):
    planted = {
        "heavy": ("import diffusers", "imports diffusers"),
        "dtype": ("import torch; torch.set_default_dtype(torch.float64)", "changes default dtype"),
        "threads": ("import torch; torch.set_num_threads(torch.get_num_threads() + 1)", "changes number of threads"),
        "flag": (
            "import torch._inductor.config as c; c.max_autotune = not c.max_autotune",
            "changes torch._inductor.config.max_autotune",
        ),
        "dynamo": ("import torch._dynamo.config as c; c.recompile_limit += 1", "changes torch._dynamo.config."),
        "seed": ("import torch; torch.manual_seed(1234)", "changes random state"),
        "device": ("import torch; torch.cuda.is_initialized = lambda: True", "changes CUDA initialised"),
        "environment": ("import os; os.environ['PLANTED'] = '1'", "changes environment"),
        "file": ("open('planted.txt', 'w').close()", "acts: open 'planted.txt'"),
        "folder": ("import os; os.mkdir('made')", "acts: os.mkdir 'made'"),
        "process": ("import subprocess; subprocess.run(['true'])", "acts: subprocess.Popen 'true'"),
        "output": ("print('hello')", r"prints 'hello\n'"),
    }
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "innocent.py").write_text("import json, torch\nX = torch.zeros(1)\n")
    for name, (text, _) in planted.items():
        (package / f"{name}.py").write_text(text + "\n")
    (tmp_path / "diffusers.py").touch()  # stands in for the real one
    found = import_everything("planted", tmp_path, tmp_path, {"diffusers"})
    for name, (_, what) in planted.items():
        assert any(line.startswith(f"planted.{name}: {what}") for line in found), (name, found)
    assert {line.split(":")[0] for line in found} == {f"planted.{name}" for name in planted}
