"""What each file of a tree imports, where, and whether that happens when the file itself is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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
    types: bool = False
    """Under TYPE_CHECKING: it never happens."""


def sources(root: Path, *packages: str) -> list[Source]:
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return [Source(root, path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in paths]


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes(tree: ast.AST, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `tree`, and whether it runs on import: not so in a function or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types(child)
        yield child, eager
        yield from nodes(child, eager and not deferred)


def imports(source: Source) -> Iterator[Import]:
    typed = {id(each) for node in ast.walk(source.tree) if for_types(node) for each in ast.walk(node)}
    for node, eager in nodes(source.tree):
        types = id(node) in typed
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, eager, types)
        elif isinstance(node, ast.ImportFrom):
            above = source.package[: len(source.package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module` imports package.module
                inside = source.root.joinpath(*module.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield Import(f"{module}.{alias.name}" if is_module else module, node.lineno, eager, types)


def below(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)
