"""Videos as files and as pictures: .mp4, contact sheets, videos side by side.

Frames are arrays of shape (F, H, W, 3): uint8, or floats between 0 and 1 as the pipelines give them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogx_fast.extras import require

Frames = NDArray[Any]

_QUALITY = 9  # of 10: the demo compares pictures
_BACKGROUND, _INK, _FAINT = (250, 250, 248), (32, 33, 36), (120, 122, 128)
_LEAST_CELL = 128  # pixels along a frame's longer side on a contact sheet
_MOST_CELL = 240
_MARGIN, _GAP = 24, 6
_TITLE_SIZE, _LABEL_SIZE, _NOTE_SIZE = 22, 17, 13
_LINE = 18  # pixels from one line of a note to the next
_STRIP = 34  # pixels of the strip with the names over videos side by side
_LEAST_PANEL = 256  # pixels along a frame's shorter side in there


def check_writable(path: str | os.PathLike[str], suffix: str) -> Path:
    """The path, once it is sure that a file of that name can be written there; makes its folder.

    Raises:
        ValueError: it does not end in ``suffix``.
        OSError: it is a directory, or its folder cannot be made or written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != suffix:
        raise ValueError(f"output is {str(path)!r}, expected a name that ends in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"output {path} is a directory: name a file in it, e.g. {path / ('video' + suffix)}")
    check_directory(path.parent)
    return path


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory, once it is there and sure to take files.

    Raises:
        OSError: it cannot be made or written.
    """
    directory = Path(directory).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to {directory} ({reason}): choose another place with --out") from None
    return directory


def write_video(path: str | os.PathLike[str], frames: Frames, *, fps: float) -> None:
    """Write an .mp4 (H.264, readable by browsers); a file of that name is replaced only when the new one is whole.

    Args:
        path: where to.
        frames: ``(F, H, W, 3)``, even height and width.
        fps: frames a second.

    Raises:
        MissingDependencyError: imageio-ffmpeg is not installed.
        OSError: the place cannot be written.
    """
    ffmpeg = require("imageio_ffmpeg", why="to write videos")
    height, width = frames.shape[1:3]
    with _replacing(path) as temporary:
        writer = ffmpeg.write_frames(
            str(temporary), (width, height), fps=fps, codec="libx264", quality=_QUALITY, macro_block_size=1
        )
        with contextlib.closing(writer):
            writer.send(None)
            for frame in to_bytes(frames):
                writer.send(np.ascontiguousarray(frame))


def read_video(path: str | os.PathLike[str]) -> Frames:
    """Every frame of a video file, ``(F, H, W, 3)`` uint8.

    Raises:
        MissingDependencyError: imageio-ffmpeg is not installed.
        OSError: there is no such file, or it is no video.
    """
    with _reading(path) as (reader, facts):
        width, height = facts["size"]
        frames = [np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in reader]
        if not frames:
            raise OSError("no frames")
        return np.stack(frames)


def read_rate(path: str | os.PathLike[str]) -> float:
    """Frames a second of a video file; raises as ``read_video`` does."""
    with _reading(path) as (_, facts):
        return float(facts["fps"])


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    ffmpeg = require("imageio_ffmpeg", why="to read videos")
    if not Path(path).is_file():
        raise FileNotFoundError(f"video {str(path)!r} is not there")
    with warnings.catch_warnings(), contextlib.closing(ffmpeg.read_frames(str(path))) as reader:
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its pipes to the garbage collector
        try:
            yield reader, next(reader)
        except (OSError, RuntimeError) as error:  # with ffmpeg's whole log in it
            raise OSError(f"video {str(path)!r} cannot be read as one: give a whole .mp4") from error


def to_bytes(frames: Frames) -> Frames:
    """Frames as uint8."""
    if frames.dtype == np.uint8:
        return frames
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[tuple[str, str, Frames]], *, title: str, note: str, fps: float, columns: int = 9
) -> Any:
    """Videos under each other, a few moments of each from left to right, as one picture.

    Args:
        rows: for each video its name, a word about it (of a few short lines), and its frames; all of one length.
        title: line at the top.
        note: line at the bottom.
        fps: frames a second, for the times over the columns.
        columns: moments to show, at most.

    Returns:
        A ``PIL.Image.Image``.

    Raises:
        MissingDependencyError: pillow is not installed.
    """
    image_module, draw_module = require("PIL.Image", why="to draw"), require("PIL.ImageDraw", why="to draw")
    font = require("PIL.ImageFont", why="to draw").load_default
    length, height, width = rows[0][2].shape[:3]
    shown = np.unique(np.linspace(0, length - 1, min(columns, length)).round().astype(int))
    cell_width, cell_height = _cell_size(width, height)
    smooth = image_module.Resampling.NEAREST if cell_width > width else image_module.Resampling.LANCZOS

    label_width = 24 + int(max(font(_LABEL_SIZE).getlength(name) for name, _, _ in rows))
    rows = [(_drawable(name), _drawable(word), frames) for name, word, frames in rows]
    lines = [line for _, word, _ in rows for line in word.splitlines()]
    label_width = max(label_width, 24 + int(max((font(_NOTE_SIZE).getlength(line) for line in lines), default=0)))
    left, top = _MARGIN + label_width, _MARGIN + _TITLE_SIZE + 38
    sheet_width = left + len(shown) * (cell_width + _GAP) - _GAP + _MARGIN
    sheet_height = top + len(rows) * (cell_height + _GAP) + 34 + _MARGIN // 2
    sheet = image_module.new("RGB", (sheet_width, sheet_height), _BACKGROUND)
    draw = draw_module.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _fit(title, font(_TITLE_SIZE), sheet_width - 2 * _MARGIN), _INK, font(_TITLE_SIZE))
    for column, moment in enumerate(shown):
        centre = left + column * (cell_width + _GAP) + cell_width / 2
        draw.text((centre, top - 8), f"{moment / fps:.2f} s", _FAINT, font(_NOTE_SIZE), anchor="ms")
    for row, (name, word, frames) in enumerate(rows):
        y = top + row * (cell_height + _GAP)
        words = word.splitlines()
        middle = y + cell_height / 2 - _LINE * (len(words) - 1) / 2
        draw.text((_MARGIN, middle - 3), name, _INK, font(_LABEL_SIZE), anchor="ls")
        for index, line in enumerate(words):
            draw.text((_MARGIN, middle + 17 + _LINE * index), line, _FAINT, font(_NOTE_SIZE), anchor="ls")
        for column, frame in enumerate(to_bytes(frames[shown])):
            picture = image_module.fromarray(frame).resize((cell_width, cell_height), smooth)
            sheet.paste(picture, (left + column * (cell_width + _GAP), y))
    note = _fit(note, font(_NOTE_SIZE), sheet_width - 2 * _MARGIN)
    draw.text((_MARGIN, sheet_height - _MARGIN), note, _FAINT, font(_NOTE_SIZE), anchor="ls")
    return sheet


def side_by_side(panels: Sequence[tuple[str, Frames]]) -> Frames:
    """Videos beside each other as one, with their names over them; small ones are enlarged by a whole factor.

    Args:
        panels: for each video its name and its frames, all of one shape.

    Returns:
        ``(F, H, W, 3)`` uint8 of even height and width.

    Raises:
        MissingDependencyError: pillow is not installed.
    """
    image_module, draw_module = require("PIL.Image", why="to draw"), require("PIL.ImageDraw", why="to draw")
    font = require("PIL.ImageFont", why="to draw").load_default(_LABEL_SIZE)
    length, height, width = panels[0][1].shape[:3]
    scale = max(1, _LEAST_PANEL // min(height, width))
    cell_height, cell_width = height * scale, width * scale
    sheet_width = len(panels) * (cell_width + _GAP) + _GAP
    sheet_height = _STRIP + cell_height + _GAP
    even = (sheet_width + sheet_width % 2, sheet_height + sheet_height % 2)  # as H.264 wants it
    sheet = image_module.new("RGB", even, _BACKGROUND)
    draw = draw_module.Draw(sheet)
    for index, (name, _) in enumerate(panels):
        centre = _GAP + index * (cell_width + _GAP) + cell_width / 2
        draw.text((centre, _STRIP / 2 + 1), _fit(name, font, cell_width), _INK, font, anchor="mm")
    video = np.repeat(np.asarray(sheet)[None], length, axis=0)
    for index, (_, frames) in enumerate(panels):
        left = _GAP + index * (cell_width + _GAP)
        enlarged = to_bytes(frames).repeat(scale, axis=1).repeat(scale, axis=2)
        video[:, _STRIP : _STRIP + cell_height, left : left + cell_width] = enlarged
    return video


def write_image(path: str | os.PathLike[str], image: Any) -> None:
    """Write a picture; a file of that name is replaced only when the new one is whole."""
    with _replacing(path) as temporary:
        image.save(temporary)


def _cell_size(width: int, height: int) -> tuple[int, int]:
    longer = max(width, height)
    scale = -(-_LEAST_CELL // longer) if longer < _LEAST_CELL else min(1.0, _MOST_CELL / longer)
    return round(width * scale), round(height * scale)


def _fit(text: str, font: Any, width: float) -> str:
    text = _drawable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _drawable(text: str) -> str:
    """Without what pillow's own font lacks."""
    return text.replace("×", "x").replace("–", "-")


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside ``path`` that takes its place at the end, and is gone after an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = [
    "Frames", "check_directory", "check_writable", "contact_sheet", "read_rate", "read_video", "side_by_side",
    "to_bytes", "write_image", "write_video",
]  # fmt: skip
