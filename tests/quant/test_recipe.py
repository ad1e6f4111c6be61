"""Recipes are read, checked and written; every complaint names the file and the line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

import quant
from cogx_fast.model.transformer import CogVideoXTransformer
from quant.recipe import SHIPPED, parse_recipe
from quant.requirements import Requirement
from quant.schemes import SCHEMES
from tests.cases import for_each
from tests.support import small

GOOD = '''name = "mine"          # line 1
description = """
[[rule]]
text that only looks like a rule
"""

[requires]
device = "cuda"
compute_capability = "8.9"
packages = ["torchao"]

[calibration]
steps = 8
prompts = ["the digit \\"seven\\"", "ü\\n"]
strength = 0.5

[[rule]]               # line 17
match = "blocks.*.attn.to_qkv"
scheme = "fp8-dynamic"

  [[ rule ]]           # line 21
match = ["blocks.*.ff.net.0", "head"]
skip = "because"
optional = true
'''


def test_a_file_is_read():
    recipe = parse_recipe(GOOD, origin="mine.toml")
    assert recipe.requires == Requirement(device="cuda", compute_capability="8.9", packages=("torchao",))
    assert recipe.calibration == {"steps": 8, "prompts": ['the digit "seven"', "ü\n"], "strength": 0.5}
    first, second = recipe.rules
    assert (first.match, first.scheme, first.skip) == (("blocks.*.attn.to_qkv",), "fp8-dynamic", None)
    assert (second.match, second.skip, second.optional) == (("blocks.*.ff.net.0", "head"), "because", True)
    assert (first.line, second.line) == (17, 21)
    assert recipe.where(1) == "mine.toml, line 21"


def test_written_and_read_again_it_is_equal(tmp_path):
    recipe = parse_recipe(GOOD)
    odd = dataclasses.replace(recipe, name='a"\\\n\x7fé', quality={"a key": float("inf"), "psnr_db": 1e-05, "n": [[1]]})
    for each in (recipe, odd, *map(quant.load_recipe, quant.recipe_names())):
        path = tmp_path / "written.toml"
        path.write_text(each.to_toml(), encoding="utf-8")
        again = quant.load_recipe(path)
        assert again == each
        assert [rule.line for rule in again.rules] == sorted(rule.line for rule in again.rules)


@for_each(
    "old, new, message",
    [
        ("optional = true", "optional = true\nskp = 1", r"mine\.toml, line 25: 'skp' is not known"),
        ("optional = true", "optional = 1", r"mine\.toml, line 21: optional is 1"),
        ("[calibration]", "[calibraton]", r"mine\.toml, line 12: 'calibraton' is not known"),
        ("packages =", "package =", r"mine\.toml, line 10: 'package' is not known"),
        ('"8.9"', "8.9", r"line 7: compute_capability is 8.9, expected text"),
        ('"8.9"', '"new"', r"line 7: compute_capability is 'new'"),
        ('device = "cuda"', 'device = "cpu"', r"line 7: compute_capability is given with device 'cpu'"),
        ('["torchao"]', '"torchao"', r"line 7: packages is 'torchao'"),
        ("strength = 0.5", "strength = {}", "calibration is"),
        ('"fp8-dynamic"', '"fp9"', r"line 17: scheme is 'fp9', expected one of int8-weight-only, "),
        ('"because"', '" "', r"line 21: skip is ' '"),
        ('skip = "because"', "", r"line 21: a rule has either a scheme or a reason"),
        ('skip = "because"', 'skip = "x"\nscheme = "int8-dynamic"', r"line 21: a rule has either"),
        ('match = "blocks.*.attn.to_qkv"', "", r"line 17: match is \[\]"),
        ('match = "blocks.*.attn.to_qkv"', "match = [1]", r"line 17: match is \[1\]"),
        ('"blocks.*.attn.to_qkv"', '"re:blocks.+"', r"line 17: match is 're:blocks\.\+', .*e\.g\."),
        ('name = "mine"', "", "name is ''"),
        ('name = "mine"', "name = 3", "name is 3"),
        ("steps = 8", "steps = 08", r"not a TOML file: .*line 13"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old, new, message):
    assert old in GOOD
    with pytest.raises(quant.QuantError, match=message):
        parse_recipe(GOOD.replace(old, new), origin="mine.toml")


@for_each("text", ["rule = 3", 'rule = [{match = "a", skip = "b"}]', "[rule]\nmatch = 'a'"])
def test_rules_in_another_form_are_refused(text):
    with pytest.raises(quant.QuantError, match=r"written as \[\[rule\]\] tables"):
        parse_recipe(f'name = "n"\ndescription = "d"\n{text}')


def test_a_recipe_without_rules_is_refused():
    with pytest.raises(quant.QuantError, match="has no rules"):
        parse_recipe('name = "n"\ndescription = "d"')


def test_names_and_paths(tmp_path, monkeypatch):
    assert quant.load_recipe("int8-dynamic").name == "int8-dynamic"
    recipe = quant.load_recipe(SHIPPED / "int8-dynamic.toml")
    assert quant.load_recipe(recipe) is recipe
    with pytest.raises(quant.QuantError, match=r"recipe is 'int9', expected the path of a \.toml file or one of fp8-"):
        quant.load_recipe("int9")
    with pytest.raises(quant.QuantError, match=r"nowhere\.toml: there is no such recipe"):
        quant.load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(quant.QuantError, match="recipe is a int"):
        quant.load_recipe(3)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(quant.QuantError, match="cannot be read"):
        quant.load_recipe(tmp_path / "binary.toml")


def test_the_shipped_recipes_say_what_their_schemes_need():
    needed = {"int8-weight-only", "int8-dynamic", "fp8-weight-only", "fp8-dynamic", "fp8-dynamic-tensor"}
    assert needed <= set(quant.recipe_names())
    for name in quant.recipe_names():
        recipe = quant.load_recipe(name)
        assert recipe.name == name
        requirements = {SCHEMES[scheme].requires for scheme in recipe.schemes} - {Requirement()}
        assert requirements <= {recipe.requires}, name


def test_the_docs_recipe_is_one():
    page = (SHIPPED.parents[1] / "docs" / "quantize.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    planned = quant.plan(CogVideoXTransformer(small("5b")), parse_recipe(text))
    assert planned.choices["transformer_blocks.1.ff.net.2"].scheme == "int8-weight-only"
    assert planned.choices["transformer_blocks.1.attn1.to_qkv"].scheme == "int8-dynamic"


def test_a_star_stands_for_one_part_of_a_name():
    (rule,) = parse_recipe('name="n"\ndescription="d"\n[[rule]]\nmatch="a.*.b"\nskip="s"').rules
    assert [name for name in ("a.1.b", "a.12.b", "a.1.2.b", "a.1.bc", "xa.1.b", "a1xb") if rule.matches(name)] == [
        "a.1.b", "a.12.b"
    ]  # fmt: skip


def test_emulated_is_the_same_recipe_with_emulated_schemes():
    real, emulated = quant.load_recipe("fp8-dynamic"), quant.load_recipe("fp8-dynamic-emulated")
    assert emulated == real.emulated()
    assert emulated.schemes == ("fp8-dynamic-emulated",)
    assert emulated.description.startswith("Emulated, for quality figures only")
    assert emulated.requires == Requirement()
    assert [rule.match for rule in emulated.rules] == [rule.match for rule in real.rules]
    with pytest.raises(quant.QuantError, match="none of its schemes"):
        quant.load_recipe("int8-dynamic-emulated")


def test_reading_recipes_imports_neither_torch_nor_torchao():
    read = "import sys, quant; [*map(quant.load_recipe, quant.recipe_names())]"
    code = f"{read}; print({{'torch', 'torchao'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
