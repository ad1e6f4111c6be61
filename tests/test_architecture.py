"""The shape of the code: which room imports which, and that importing does nothing else."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases import for_each
from tests.imports_of import below, imports, nodes, sources

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("import_probe.py")
PRIVATE_NAMES = Path(__file__).with_name("private_names.py")
HEAVY = {
    "accelerate", "diffusers", "huggingface_hub", "imageio", "matplotlib", "peft", "PIL", "torchao", "transformers"
}  # fmt: skip
ON_DIFFUSERS = tuple(
    f"cogx_fast.runtime.for_diffusers.{name}" for name in ("diffusers_model", "diffusers_adapters", "adapters")
)
"""The modules that import diffusers or peft when they are imported themselves; so importing them counts as that."""
COMPILER = ("torch._dynamo", "torch._inductor")
COMPILER_OWNERS = (
    "cogx_fast/runtime/compiling/",
    "cogx_fast/runtime/packages/",  # compiles ahead of time
    "cogx_fast/measure/explain/",  # reads what the compiler made of a model: its graphs, schedule and generated code
)


# --------------------------------------------------------------------------------------------------------- the rules


BELOW = {
    "config": set(),
    "extras": set(),
    "terminal": set(),
    "version": set(),
    "whole_file": set(),
    "sizes": {"config"},
    "assets": {"config", "extras"},
    "model": {"config", "sizes", "attention"},
    "attention": {"config", "sizes", "whole_file", "model"},
    "weights": {"config", "sizes", "model", "attention"},
    "runtime": {"config", "sizes", "whole_file", "extras", "version", "model", "attention", "weights"},
    "loading": {"config", "sizes", "assets", "model", "attention", "weights", "runtime"},
    "video": {"config", "sizes", "extras", "assets"},
}
"""What each room (a folder or a file of the package) may import, lazily or not. What is not named may import all of
``FOUNDATION`` and what ``ABOVE`` says."""
FOUNDATION = {*BELOW} - {"video"}
ABOVE = {
    "measure": FOUNDATION,
    "pipelines": FOUNDATION | {"video", "measure"},
    "tune": FOUNDATION | {"video", "measure", "pipelines"},
    "cli": FOUNDATION | {"video", "measure", "pipelines", "tune"},
    "__init__": {"config", "loading", "pipelines", "runtime", "version", "weights"},
    "__main__": {"cli"},
}
INSIDE_RUNTIME = {
    "step_caching": set(),
    "compiling": {"step_caching"},
    "distributed": {"step_caching"},
    "packages": {"compiling", "distributed"},
    "for_diffusers": set(),
}
"""What each folder of ``runtime`` may import of the others; all of them may import the files beside them."""
DOORS = {
    ("cogx_fast.runtime.module", "cogx_fast.measure.explain"): "model.explain() is a method of what users hold",
    ("cogx_fast.runtime.for_diffusers.diffusers_model", "cogx_fast.loading"): "from_pretrained is a class method there",
}
"""The arrows that point up, each for a method that users expect on the class itself, and called when it is."""


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def check_directions(root: Path) -> list[str]:
    """Rooms import as the architecture draws it, in functions, too; what serves types alone is free."""
    allowed = BELOW | ABOVE
    found = []
    for source in sources(root, "cogx_fast", "quant"):
        module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        room = [*module.split("."), "__init__"][1]
        for item in imports(source):
            if not below(item.module, "cogx_fast") or item.types or (module, item.module) in DOORS:
                continue
            parts = item.module.split(".")
            target = parts[1] if len(parts) > 1 and is_module(root, ".".join(parts[:2])) else "__init__"
            if source.package[0] == "quant" or target not in {room, *allowed.get(room, ())}:
                found.append(f"{source.name}:{item.line}: must not import {item.module}")
    return found


def check_directions_inside(root: Path) -> list[str]:
    """The folders of ``runtime`` import each other in one order."""
    found = []
    for source in sources(root, "cogx_fast/runtime"):
        folder = source.package[-1]
        for item in imports(source):
            target = item.module.removeprefix("cogx_fast.runtime.").split(".")[0]
            allowed = {folder, *INSIDE_RUNTIME.get(folder, INSIDE_RUNTIME)}
            if target in INSIDE_RUNTIME and not item.types and target not in allowed:
                found.append(f"{source.name}:{item.line}: must not import {item.module}")
    return found


def check_cycles(root: Path) -> list[str]:
    """No two files import each other, directly or not, in functions neither."""
    arrows: dict[str, dict[str, str]] = {}
    for source in sources(root, "cogx_fast", "quant"):
        module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for item in imports(source):
            if below(item.module, "cogx_fast", "quant") and not item.types and (module, item.module) not in DOORS:
                arrows.setdefault(module, {}).setdefault(item.module, f"{source.name}:{item.line}")
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            first = path[path.index(module) :]
            return [f"{arrows[first[-1]][module]}: closes the circle {' → '.join([*first, module])}"]
        if module in done:
            return []
        done.add(module)
        return [line for target in arrows.get(module, ()) for line in walk(target, [*path, module])]

    return [line for module in list(arrows) for line in walk(module, [])]


def check_heavy_imports(root: Path) -> list[str]:
    """Heavy third parties are imported where they are used, never on import; in `model/` not even there."""
    found = []
    for source in sources(root, "cogx_fast"):
        if source.name.removesuffix(".py").replace("/", ".") in ON_DIFFUSERS:
            continue
        in_model = source.name.startswith("cogx_fast/model/")
        for item in imports(source):
            heavy = item.module.split(".")[0] in HEAVY or below(item.module, *ON_DIFFUSERS)
            if heavy and (item.eager or in_model):
                found.append(f"{source.name}:{item.line}: imports {item.module}")
    return found


def check_compiler_owner(root: Path) -> list[str]:
    """Only `runtime/compiling/compile.py` and its parts touch the compiler's internals (prose may name them)."""
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
    check_directions_inside,
    check_cycles,
    check_heavy_imports,
    check_compiler_owner,
    check_environment,
]


def plant(root: Path, path: str, text: str) -> None:
    for room in BELOW | ABOVE:
        (root / "cogx_fast" / room).mkdir(parents=True, exist_ok=True)
    (root / "cogx_fast/measure/explain").mkdir()
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@for_each("rule", RULES)
def test_the_sources_keep_the_rule(rule):
    assert rule(ROOT) == []


@for_each(
    "rule, path, text",
    [
        (check_directions, "cogx_fast/config.py", "import cogx_fast.model"),
        (check_directions, "cogx_fast/model/a.py", "from cogx_fast.runtime import module"),
        (check_directions, "cogx_fast/model/a.py", "from ..weights import layout"),
        (check_directions, "cogx_fast/model/a.py", "from cogx_fast import load"),
        (check_directions, "cogx_fast/model/a.py", "def f():\n    from cogx_fast import cli"),
        (check_directions, "cogx_fast/runtime/a.py", "def f():\n    from cogx_fast.pipelines import accelerate"),
        (check_directions, "cogx_fast/runtime/a.py", "import cogx_fast.measure.costs"),
        (check_directions, "cogx_fast/loading.py", "def f():\n    from cogx_fast import measure"),
        (check_directions, "cogx_fast/pipelines/a.py", "import cogx_fast.tune.steps"),
        (check_directions, "cogx_fast/new_room/a.py", "import cogx_fast.config"),
        (check_directions_inside, "cogx_fast/runtime/compiling/a.py", "from cogx_fast.runtime.packages import export"),
        (check_directions_inside, "cogx_fast/runtime/packages/a.py", "import cogx_fast.runtime.for_diffusers.upstream"),
        (check_cycles, "cogx_fast/runtime/a.py", "def f():\n    from cogx_fast.runtime import a"),
        (check_directions, "cogx_fast/weights/a.py", "def f():\n    from cogx_fast.runtime.module import M"),
        (check_directions, "cogx_fast/weights/a.py", "import cogx_fast.pipelines.accelerate"),
        (check_directions, "quant/a.py", "def f():\n    import cogx_fast.config"),
        (check_heavy_imports, "cogx_fast/a.py", "import diffusers.models"),
        (check_heavy_imports, "cogx_fast/a.py", "from cogx_fast.runtime.for_diffusers.diffusers_model import A"),
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
    plant(tmp_path, path, text)
    found = rule(tmp_path)
    assert len(found) >= 1
    assert all(line.startswith(f"{path}:") for line in found)


@for_each(
    "path, text",
    [
        ("cogx_fast/model/a.py", "from cogx_fast.config import TransformerConfig\nfrom .b import f\nimport os"),
        ("cogx_fast/runtime/a.py", "def f():\n    from cogx_fast.weights import layout"),
        ("cogx_fast/weights/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cogx_fast.cli"),
        ("cogx_fast/runtime/module.py", "def f():\n    from cogx_fast.measure import explain"),
        ("cogx_fast/runtime/compiling/compile.py", "def f():\n    import torch._dynamo as d\n    return d.config"),
        (
            "cogx_fast/pipelines/accelerate.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers",
        ),
        ("cogx_fast/cli/a.py", "import os\ndef f():\n    import matplotlib\n    return os.environ"),
        ("quant/a.py", '"""Leaves torch._inductor alone."""\nimport torchao'),
    ],
)
def test_what_is_allowed_is_not_reported(path, text, tmp_path):
    plant(tmp_path, path, text)
    assert [line for rule in RULES for line in rule(tmp_path)] == []


def test_a_circle_of_three_is_reported(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        text = f"def f():\n    from cogx_fast.runtime.{other} import f"
        (tmp_path / "cogx_fast/runtime").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"cogx_fast/runtime/{name}.py").write_text(text)
    assert len(check_cycles(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------------ inert imports


def import_everything(package: str, root: Path, home: Path, forbidden: set[str]) -> list[str]:
    """What importing `package` and every module below it does, in a fresh interpreter."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    env |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, str(PROBE), package, ",".join(sorted(forbidden)), ",".join(ON_DIFFUSERS)]
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


# -------------------------------------------------------------------------------------------- torch's private names


def test_the_package_is_imported_and_runs_eagerly_where_torchs_private_names_are_others(tmp_path):
    allowed = "import torch.nn.functional as F; F.linear; __version__ = F.torch.__version__"
    used = [
        "from torch import _dynamo",
        "from torch._dynamo import config",
        "from torch.utils import _pytree",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "import torch._inductor.config as config",
        "import torch; torch._C",
        "import torch.nn.functional as F; F._in_projection",
        "import torch; torch.ops._c10d_functional",
    ]
    command = [sys.executable, "-W", "ignore", str(PRIVATE_NAMES), *used, allowed]
    child = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == [allowed]
