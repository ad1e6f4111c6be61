"""diffusers' own tests of CogVideoX, with our class in the place of theirs: what differs is listed here, with why.

``COGX_FAST_DIFFUSERS_CHECKOUT`` names a checkout of diffusers, best of the installed version, of which only the folder
``tests`` is used; they need ``parameterized``. Run with ``-m slow``; it takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = os.environ.get("COGX_FAST_DIFFUSERS_CHECKOUT")
ROOT = Path(__file__).resolve().parents[2]
SUITES = (
    "tests/models/transformers/test_models_transformer_cogvideox.py",
    "tests/pipelines/cogvideo",
    "tests/lora/test_lora_layers_cogvideox.py",
)
FEWEST_PASSED = 90

DIFFERENT: dict[str, str] = {
    r"LoRA.*\.test_(logs_info_when_no_lora_keys_found|lora_(missing|unexpected)_keys_warning)": (
        "a file that is not wholly for this model is refused by its tensors' names; theirs takes what it knows"
    ),
    r"TransformerLoRA\.test_save_load_lora_adapter": (
        "an adapter that is loaded is merged into the weights: there is none of PEFT's layers to read it from"
    ),
    r"TransformerLoRA\.test_lora_adapter_wrong_metadata_raises_error": (
        "of the metadata only what says how strong the adapter is is read; theirs makes a LoraConfig of all of it"
    ),
    r"TransformerLoRA\.test_correct_lora_configs_with_different_ranks": (
        "it looks for to_k when there is no adapter any more: query, key and value are apart only while there is one"
    ),
    r"PyramidAttentionBroadcast\.|FasterCache\.|FirstBlockCache\.": (
        "diffusers' caches hook into text and video streams of its blocks, and are refused: this model has one stream"
    ),
    r"test_fuse(_unfuse|d)_qkv_projections": (
        "query, key and value are one projection from the start: fusing changes nothing, and no processor tells of it"
    ),
    r"test_(get_set_processor|attention_processor_(dict|count_mismatch_raises_error))": (
        "they set diffusers' general AttnProcessor, which cannot run in this model, and is refused by its name"
    ),
    r"Pipeline\.test_(save_load_local|loading_with_variants|torch_dtype_dict)": (
        "they save .bin files, which our class in the place of theirs does not read: pickles are never loaded. Outside "
        "of these tests pipelines are read with diffusers' class, which does"
    ),
    r"Transformer\.test_from_save_pretrained_variant": (
        "a file that is missing is an OSError as theirs, but names the .safetensors that was looked for, not a .bin"
    ),
    r"Pipeline\.test_inference$": (
        "the numbers expected are those of a T5 on the hub; with the one made here (local_t5) theirs differ, too"
    ),
}
"""Tests that fail, as patterns of their names, and why."""


def run(report: Path, *options: str) -> dict[str, bool]:
    """Diffusers' tests, by name: whether they passed; without those that are skipped."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *options, *SUITES, "-q", "-p", "no:cacheprovider"]
    assert CHECKOUT is not None
    finished = subprocess.run(
        [*command, "--timeout", "900", "--junitxml", str(report)],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode in (0, 1), finished.stdout[-4000:] + finished.stderr[-2000:]
    outcomes = {
        f"{case.get('classname')}.{case.get('name')}": {child.tag for child in case}
        for case in ElementTree.parse(report).iter("testcase")  # pytest's own
    }
    return {name: not tags & {"failure", "error"} for name, tags in outcomes.items() if "skipped" not in tags}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(CHECKOUT is None, reason="COGX_FAST_DIFFUSERS_CHECKOUT names no checkout of diffusers")
def test_what_differs_is_written_here(tmp_path: Path) -> None:
    passed = run(tmp_path / "report.xml", "-p", "local_t5", "-p", "cogx_fast_in_place")
    failed = [name for name, well in passed.items() if not well]
    unknown = [name for name in failed if not any(re.search(pattern, name) for pattern in DIFFERENT)]
    assert not unknown, "these differ for a reason that is not written here"
    stale = [pattern for pattern in DIFFERENT if not any(re.search(pattern, name) for name in failed)]
    assert not stale, "these are written here, but nothing of the kind differs any more"
    assert len(passed) - len(failed) >= FEWEST_PASSED, "most of the tests were not found"
