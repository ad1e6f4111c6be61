"""README, docs and examples: links lead somewhere, the picture of the house is true, and the scripts run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.cases import for_each
from tests.pipes import FRAMES, HEIGHT, WIDTH, make_pipe

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., str]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@for_each("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_the_picture_of_the_house_is_true() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = next(block for block in re.findall(r"```\n(.*?)```", text, flags=re.DOTALL) if "cogx_fast/\n" in block)
    drawn: set[str] = set()
    room = ""
    for line in picture.splitlines():
        name = re.match(r"( *)([\w.]+/?)(?: |$)", line)
        if name is None or len(name[1]) > 2:
            continue
        room = name[2] if not name[1] else room
        drawn.add(name[2] if not name[1] else room + name[2])
    for name in drawn:
        assert (ROOT / name).exists(), name
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("no git checkout")
    files = [Path(line) for line in tracked.stdout.splitlines()]
    rooms = {f"{file.parts[0]}/" for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    rooms |= {f"cogx_fast/{file.parts[1]}/" for file in files if file.parts[0] == "cogx_fast" and len(file.parts) > 2}
    assert rooms - drawn == set()


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """An example as ``python examples/it.py`` runs it, but for what this process has imported already."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: object) -> str:
        path = ROOT / "examples" / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run() -> None:
    tests = Path(__file__), Path(__file__).with_name("test_serving.py")
    here = "".join(path.read_text(encoding="utf-8") for path in tests)
    run = [path.name for path in (ROOT / "examples").glob("*.py") if f'run("{path.name}"' in here]
    assert {path.name for path in (ROOT / "examples").glob("*.py")} - {*run} <= {"serve_ray.py"}
    assert '"examples" / "serve_ray.py"' in here


def test_text_to_video(run: Run, tmp_path: Path) -> None:
    assert "17 frames" in run("text_to_video.py", "--steps", 2)
    assert (tmp_path / "video.mp4").stat().st_size > 1000


def test_image_to_video(run: Run, tmp_path: Path) -> None:
    make_pipe("CogVideoXImageToVideoPipeline", "1.5-5b-i2v").save_pretrained(tmp_path / "pipe")
    Image.new("RGB", (WIDTH, HEIGHT), "orange").save(tmp_path / "image.png")
    size = ("--frames", FRAMES, "--size", HEIGHT, WIDTH)
    given = ("--model", tmp_path / "pipe", "--image", "image.png", "--prompt", "it waves", "--steps", 2)
    assert f"{FRAMES} frames" in run("image_to_video.py", *given, *size)


def test_quantize_and_compare(run: Run, tmp_path: Path) -> None:
    said = run("quantize_and_compare.py", "--steps", 2)
    found = re.search(r"int8-weight-only: ([\d.]+) dB", said)
    assert found is not None
    assert 20 < float(found[1]) < 80
    assert (tmp_path / "quantized" / "config.json").is_file()


def test_warm_start(run: Run) -> None:
    assert run("warm_start.py").startswith("cold start")
    assert run("warm_start.py").startswith("warm start")


def test_train_lora(run: Run, tmp_path: Path) -> None:
    said = run("train_lora.py", "--steps", 2)
    assert re.search(r"loss [\d.]+, after 2 steps [\d.]+; saved in lora, and loaded again", said) is not None
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in file.keys()  # noqa: SIM118


def test_finetune_step(run: Run, tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    said = run("finetune_step.py")
    found = re.search(r"loss ([\d.]+), after one step ([\d.]+)", said)
    assert found is not None
    assert float(found[2]) < float(found[1])
    CogVideoXTransformer3DModel.from_pretrained(tmp_path / "finetuned")
