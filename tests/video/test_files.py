from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cogx_fast.video import files
from cogx_fast.video.quality import psnr
from tests.cases import for_each


def _ramp(length: int = 17, height: int = 64, width: int = 96) -> files.Frames:
    """A bright square that moves to the right over a gradient."""
    frames = np.zeros((length, height, width, 3), dtype=np.float32)
    frames += np.linspace(0, 0.5, width, dtype=np.float32)[None, None, :, None]
    for index in range(length):
        frames[index, 16:48, 2 * index : 2 * index + 32] = (1.0, 0.5, 0.1)
    return frames


def test_a_video_is_what_was_written(tmp_path: Path) -> None:
    frames = _ramp()
    files.write_video(tmp_path / "video.mp4", frames, fps=8)
    read = files.read_video(tmp_path / "video.mp4")
    assert read.shape == (17, 64, 96, 3)
    assert read.dtype == np.uint8
    assert psnr(read / 255, frames) > 30
    assert psnr(read / 255, frames[::-1]) < 25  # in the right order
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    frames = _ramp()

    def failing(_: files.Frames) -> list[files.Frames]:
        raise RuntimeError("stopped")

    monkeypatch.setattr(files, "to_bytes", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        files.write_video(path, frames, fps=8)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write_video(tmp_path / "video.mp4", _ramp(2), fps=8)
    assert (tmp_path / "video.mp4").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio-ffmpeg: pipes left to the garbage collector
def test_files_that_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not there"):
        files.read_video(tmp_path / "video.mp4")
    (tmp_path / "video.mp4").write_text("no video")
    with pytest.raises(OSError, match="cannot be read as one: give a whole"):
        files.read_video(tmp_path / "video.mp4")


def test_a_rate_is_what_was_written(tmp_path: Path) -> None:
    files.write_video(tmp_path / "video.mp4", _ramp(3), fps=12)
    assert files.read_rate(tmp_path / "video.mp4") == 12


@for_each("size, scale", [((64, 96), 4), ((75, 33), 7), ((300, 400), 1)])
def test_side_by_side_shows_both_whole(size: tuple[int, int], scale: int) -> None:
    frames = np.zeros((2, *size, 3), dtype=np.uint8)
    red, green = frames + np.uint8([255, 0, 0]), frames + np.uint8([0, 255, 0])
    both = files.side_by_side([("a name × " * 20, red), ("green", green / np.float32(255))])
    assert both.shape[0] == 2
    assert (both.shape[1] % 2, both.shape[2] % 2, both.dtype) == (0, 0, np.uint8)
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert (both[1] == colour).all(-1).sum() == scale**2 * size[0] * size[1]


def test_contact_sheet_shows_each_video(tmp_path: Path) -> None:
    from PIL import Image

    frames = _ramp()
    red = np.zeros_like(frames)
    red[..., 0] = 1.0
    rows = [("diffusers", "1.0 s", frames), ("cogx_fast", "0.5 s\nshows seven", red)]
    sheet = files.contact_sheet(rows, title="a prompt " * 100, note="a note", fps=8, columns=5)
    files.write_image(tmp_path / "sheet.png", sheet)
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 5 * 96
    reds = (pixels == (255, 0, 0)).all(-1)
    assert reds.sum() == 5 * (2 * 96) * (2 * 64)  # five moments, doubled in size
    assert reds[: pixels.shape[0] // 2].sum() < reds[pixels.shape[0] // 2 :].sum()  # in the lower row


@for_each("size, cell", [((64, 64), (128, 128)), ((480, 720), (240, 160)), ((200, 100), (100, 200))])
def test_cells_are_neither_tiny_nor_huge(size: tuple[int, int], cell: tuple[int, int]) -> None:
    red = np.zeros((2, *size, 3), dtype=np.float32)
    red[..., 0] = 1.0
    sheet = files.contact_sheet([("a row", "a note", red)], title="", note="", fps=8, columns=1)
    reds = (np.asarray(sheet)[..., :3] == (255, 0, 0)).all(-1)
    rows, columns = reds.any(1), reds.any(0)
    assert (columns.sum(), rows.sum()) == cell


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.mp4"):
        files.check_writable(tmp_path / "video.avi", ".mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a directory"):
        files.check_writable(tmp_path / "folder.mp4", ".mp4")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to"):
        files.check_writable(tmp_path / "file" / "video.mp4", ".mp4")
    assert files.check_writable(tmp_path / "new" / "deep" / "video.mp4", ".mp4").parent.is_dir()
    assert os.listdir(tmp_path / "new" / "deep") == []
