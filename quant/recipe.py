"""Recipes: which linear of a model is quantized how, as a TOML file that one can read, write and share."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant.errors import QuantError
from quant.requirements import ANY, Requirement
from quant.schemes import EMULATED, SCHEMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "recipes"

_HEADER = re.compile(r"\s*\[\[\s*rule\s*\]\]\s*(#.*)?$")
_RULE_KEYS = {"match", "scheme", "skip", "optional"}
_REQUIRES_KEYS = {"device", "compute_capability", "packages"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Modules by name, and what becomes of them: a scheme, or left alone for a reason."""

    match: tuple[str, ...]
    """Names of linears; ``*`` in them stands for any characters but a dot."""
    scheme: str | None = None
    skip: str | None = None
    """Why they are left in full precision."""
    optional: bool = False
    """May match nothing, in a recipe for several models; otherwise each pattern must match."""
    line: int | None = field(default=None, compare=False)
    """Of the rule in its file."""

    def matches(self, name: str, pattern: str | None = None) -> bool:
        """Whether a linear of that name is meant, by the rule or one pattern of it."""
        return any(_expression(each).fullmatch(name) for each in (self.match if pattern is None else (pattern,)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A quantization recipe.

    Raises:
        QuantError: it cannot be meant so; the message says which line of which file.
    """

    name: str
    description: str
    requires: Requirement = ANY
    """What it needs beyond or as well as its schemes do."""
    rules: tuple[Rule, ...]
    calibration: Mapping[str, Any] | None = None
    """Settings for what has to see activations first; read by those who calibrate."""
    quality: Mapping[str, Any] | None = None
    """What was measured with it, on which model."""
    origin: str = field(default="a recipe made in Python", compare=False)
    """The file."""

    def __post_init__(self) -> None:
        for key in ("name", "description"):
            value: Any = getattr(self, key)
            if not isinstance(value, str) or not value.strip():
                raise QuantError(f"{self.origin}: {key} is {value!r}, expected some text")
        if not self.rules:
            raise QuantError(f"{self.origin}: it has no rules: add a [[rule]] with match and scheme")
        for index, rule in enumerate(self.rules):
            _check_rule(rule, self.where(index))

    def where(self, index: int) -> str:
        """Where a rule stands, for messages."""
        line = self.rules[index].line
        return f"{self.origin}, rule {index + 1}" if line is None else f"{self.origin}, line {line}"

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes in use, each once."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    @property
    def dynamic(self) -> bool:
        """Whether some activations are quantized as they come, which is slow unless the model is compiled."""
        return any(SCHEMES[scheme].dynamic for scheme in self.schemes)

    def emulated(self) -> Recipe:
        """The same recipe with fp8-dynamic schemes emulated: for quality figures on machines without fp8 matmul."""
        rules = tuple(
            replace(rule, scheme=rule.scheme + EMULATED) if f"{rule.scheme}{EMULATED}" in SCHEMES else rule  # type: ignore[operator]
            for rule in self.rules
        )
        if rules == self.rules:
            raise QuantError(f"{self.origin}: none of its schemes ({', '.join(self.schemes)}) has an emulation")
        return replace(
            self,
            name=self.name + EMULATED,
            description=f"Emulated, for quality figures only: {self.description}",
            requires=Requirement(packages=self.requires.packages),
            rules=rules,
        )

    def to_toml(self) -> str:
        """As a file: ``parse_recipe`` of it is an equal recipe."""
        lines = [f"name = {_toml(self.name)}", f"description = {_toml(self.description)}"]
        requires = {key: getattr(self.requires, key) for key in sorted(_REQUIRES_KEYS) if getattr(self.requires, key)}
        for key, values in (("requires", requires), ("calibration", self.calibration), ("quality", self.quality)):
            if values:
                lines += ["", f"[{key}]", *(f"{_key(name)} = {_toml(value)}" for name, value in values.items())]
        for rule in self.rules:
            match = rule.match[0] if len(rule.match) == 1 else list(rule.match)
            lines += ["", "[[rule]]", f"match = {_toml(match)}"]
            lines += [f"scheme = {_toml(rule.scheme)}"] if rule.scheme is not None else [f"skip = {_toml(rule.skip)}"]
            lines += ["optional = true"] if rule.optional else []
        return "\n".join(lines) + "\n"


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load_recipe(source: str | os.PathLike[str] | Recipe) -> Recipe:
    """A recipe.

    Args:
        source: the name of a shipped one (``recipe_names``), with "-emulated" behind it for ``Recipe.emulated``; the
            path of a ``.toml`` file; or a recipe, which is returned.

    Raises:
        QuantError: no such recipe, or one that cannot be meant so.
    """
    if isinstance(source, Recipe):
        return source
    given: Any = source
    if not isinstance(given, str | os.PathLike):
        raise QuantError(f"recipe is a {type(source).__name__}, expected a name, the path of a .toml file or a Recipe")
    text = str(os.fspath(source))
    names = recipe_names()
    if text in names:
        path = SHIPPED / f"{text}.toml"
    elif isinstance(source, str) and text.endswith(EMULATED) and text.removesuffix(EMULATED) in names:
        return load_recipe(text.removesuffix(EMULATED)).emulated()
    elif text.endswith(".toml"):
        path = Path(text)
    else:
        raise QuantError(f"recipe is {text!r}, expected the path of a .toml file or one of {', '.join(names)}")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), origin=str(path))
    except FileNotFoundError:
        raise QuantError(f"{path}: there is no such recipe; those that come along are {', '.join(names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise QuantError(f"{path}: cannot be read as a recipe ({error})") from error


def parse_recipe(text: str, *, origin: str = "the recipe") -> Recipe:
    """A recipe from the text of its file.

    Raises:
        QuantError: it is none; the message says which line.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuantError(f"{origin}: not a TOML file: {error}") from None
    lines = _rule_lines(text)
    known = {"name", "description", "requires", "rule", "calibration", "quality"}
    _refuse_unknown(table, known, text, 0, origin)
    rules = table.get("rule", [])
    if not isinstance(rules, list) or len(lines) != len(rules):
        raise QuantError(f"{origin}: rules are written as [[rule]] tables, one under another, not as a list or table")
    parsed = []
    for rule, line in zip(rules, lines, strict=True):
        _refuse_unknown(rule, _RULE_KEYS, text, line, origin)
        match = rule.get("match")
        parsed.append(
            Rule(
                match=(match,) if isinstance(match, str) else tuple(match) if isinstance(match, list) else (),
                scheme=rule.get("scheme"),
                skip=rule.get("skip"),
                optional=rule.get("optional", False),
                line=line,
            )
        )
    return Recipe(
        name=table.get("name", ""),
        description=table.get("description", ""),
        requires=_requirement(table.get("requires", {}), text, origin),
        rules=tuple(parsed),
        calibration=_flat(table, "calibration", origin),
        quality=_flat(table, "quality", origin),
        origin=origin,
    )


def of_all_blocks(name: str) -> str:
    """A linear's name with its block's number as ``*``: the pattern for the same linear of all blocks."""
    return name if "*" in name else re.sub(r"\.\d+\.", ".*.", name, count=1)


def _check_rule(rule: Any, where: str) -> None:
    """What is wrong with a rule; files can hold anything."""
    if not rule.match or not all(isinstance(each, str) and each for each in rule.match):
        raise QuantError(f"{where}: match is {list(rule.match)!r}, expected the name of a module or a list of names")
    for pattern in rule.match:
        if not re.fullmatch(r"[\w.*-]+", pattern):
            raise QuantError(
                f"{where}: match is {pattern!r}, expected the name of a module, in which * stands for any characters "
                "but a dot, e.g. 'transformer_blocks.*.ff.net.2'"
            )
    if (rule.scheme is None) == (rule.skip is None):
        raise QuantError(f"{where}: a rule has either a scheme or a reason to skip; this one has both or neither")
    if rule.scheme is not None and rule.scheme not in SCHEMES:
        raise QuantError(f"{where}: scheme is {rule.scheme!r}, expected one of {', '.join(SCHEMES)}")
    if rule.skip is not None and (not isinstance(rule.skip, str) or not rule.skip.strip()):
        raise QuantError(f"{where}: skip is {rule.skip!r}, expected the reason as text")
    if not isinstance(rule.optional, bool):
        raise QuantError(f"{where}: optional is {rule.optional!r}, expected true or false")


def _rule_lines(text: str) -> list[int]:
    """Line numbers of the ``[[rule]]`` headers; what looks like one inside a longer string is none."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        if _HEADER.match(line):
            try:
                tomllib.loads("\n".join(lines[:number]))
            except tomllib.TOMLDecodeError:
                continue
            found.append(number)
    return found


def _refuse_unknown(table: Mapping[str, Any], known: set[str], text: str, first: int, origin: str) -> None:
    for key in table:
        if key not in known:
            after = enumerate(text.splitlines()[first:], start=first + 1)
            expression = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*[=\].]")
            line = next((number for number, line in after if expression.match(line)), first or 1)
            raise QuantError(f"{origin}, line {line}: {key!r} is not known, expected {', '.join(sorted(known))}")


def _requirement(table: Any, text: str, origin: str) -> Requirement:
    if not isinstance(table, dict):
        raise QuantError(f"{origin}: requires is {table!r}, expected a table of {', '.join(sorted(_REQUIRES_KEYS))}")
    header = next((n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith("[requires]")), 0)
    _refuse_unknown(table, _REQUIRES_KEYS, text, header, origin)
    packages = table.get("packages", [])
    for key in ("device", "compute_capability"):
        if not isinstance(table.get(key, ""), str):
            raise QuantError(f"{origin}, line {header}: {key} is {table[key]!r}, expected text")
    if not isinstance(packages, list) or not all(isinstance(package, str) for package in packages):
        raise QuantError(f"{origin}, line {header}: packages is {packages!r}, expected a list of import names")
    try:
        return Requirement(**{**table, "packages": tuple(packages)})
    except QuantError as error:
        raise QuantError(f"{origin}, line {header}: {error}") from None


def _flat(table: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any] | None:
    """A table of plain values, as ``to_toml`` can write it."""
    values = table.get(key)

    def plain(value: Any) -> bool:
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float)

    if values is not None and not (isinstance(values, dict) and all(map(plain, values.values()))):
        raise QuantError(f"{origin}: {key} is {values!r}, expected a table of texts, numbers and lists")
    return values


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]*"))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's strings, numbers, true and false


__all__ = ["Recipe", "Rule", "load_recipe", "of_all_blocks", "parse_recipe", "recipe_names"]
