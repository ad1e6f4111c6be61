from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cogx_fast.assets import digits
from cogx_fast.extras import MissingDependencyError
from cogx_fast.video import quality
from tests.cases import for_each


@pytest.fixture(scope="module")
def video() -> Any:
    rng = np.random.default_rng(0)
    return rng.random((5, 16, 24, 3))


def test_psnr_is_the_formula(video: Any) -> None:
    noisy = video + 0.1
    assert quality.psnr(noisy, video) == pytest.approx(20.0)
    assert quality.psnr(video, video) == math.inf


def test_bytes_and_floats_are_on_one_scale() -> None:
    white, black = np.full((2, 8, 8, 3), 255, np.uint8), np.zeros((2, 8, 8, 3))
    assert quality.psnr(white, black) == pytest.approx(0.0)
    assert quality.psnr(white, np.ones((2, 8, 8, 3), np.float32)) == math.inf


def test_ssim_is_one_for_equals_and_falls_with_noise(video: Any) -> None:
    rng = np.random.default_rng(1)
    little, much = (video + rng.normal(0, sigma, video.shape) for sigma in (0.02, 0.2))
    assert quality.ssim(video, video) == pytest.approx(1.0)
    assert 1.0 > quality.ssim(little, video) > quality.ssim(much, video) > 0.0


def test_each_frame_has_its_own_figures(video: Any) -> None:
    changed = video.copy()
    changed[3] += 0.1
    figures = quality.per_frame(changed, video)
    assert [math.isinf(psnr) for psnr, _ in figures] == [True, True, True, False, True]
    assert figures[3][0] == pytest.approx(20.0)
    assert figures[3][1] < 1.0


@for_each("measure", [quality.psnr, quality.ssim, quality.per_frame], "shape", [(4, 16, 24, 3), (5, 16, 16, 3)])
def test_videos_of_other_sizes_are_refused(measure: Any, shape: tuple[int, ...], video: Any) -> None:
    with pytest.raises(ValueError, match=r"make them of one size and length"):
        measure(np.zeros(shape), video)


def test_consistency_over_time(video: Any) -> None:
    assert quality.temporal_consistency(np.repeat(video[:1], 4, axis=0)) == pytest.approx(1.0)
    assert quality.temporal_consistency(video) < 0.3
    with pytest.raises(ValueError, match="has 1 frame"):
        quality.temporal_consistency(video[:1])


def test_the_judge_knows_real_digits_it_has_not_seen() -> None:
    videos, shown = quality.real_clips(297)
    accuracy = quality.measure(videos, shown)
    assert accuracy.count == 297
    assert accuracy.digit >= 0.95
    assert accuracy.motion >= 0.99
    assert accuracy.frame_agreement >= 0.95
    assert min(accuracy.digit_by_motion.values()) >= 0.95
    assert set(accuracy.digit_by_digit) == set(range(10))
    assert accuracy.digit_error == pytest.approx(math.sqrt(accuracy.digit * (1 - accuracy.digit) / 297))


def test_the_judge_is_made_the_same_again() -> None:
    videos, _ = quality.real_clips(20)
    again = quality.Judge()
    assert [again(video) for video in videos] == [quality.judge()(video) for video in videos]


def test_bytes_are_judged_as_floats_are() -> None:
    videos, _ = quality.real_clips(10)
    for video in videos:
        assert quality.judge()((video * 255).round().astype(np.uint8)) == quality.judge()(video)


def test_a_wrong_digit_or_motion_counts_as_wrong() -> None:
    videos, shown = quality.real_clips(10)
    asked = [((digit + 1) % 10, "moving up" if motion == "moving down" else "moving down") for digit, motion in shown]
    accuracy = quality.measure(videos, asked)
    assert accuracy.digit <= 0.1
    assert accuracy.motion == 0.0


def test_a_blank_clip_is_no_digit() -> None:
    judged = quality.judge()(np.zeros((17, 64, 64, 3)))
    assert judged.digit is None
    assert judged.agreement == 0.0
    assert judged.motion == "standing still"


def test_a_clip_that_changes_its_digit_does_not_agree_with_itself() -> None:
    videos, shown = quality.real_clips(20)
    other = next(i for i, (digit, _) in enumerate(shown) if digit != shown[0][0])
    mixed = quality.judge()(np.concatenate([videos[0][:9], videos[other][9:]]))
    assert len(set(mixed.frame_digits)) == 2
    assert mixed.agreement < 0.6


def test_counts_must_fit() -> None:
    videos, shown = quality.real_clips(2)
    for wrong in (([], []), (videos, shown[:1])):
        with pytest.raises(ValueError, match="one for each"):
            quality.measure(*wrong)


def test_without_its_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, video: Any) -> None:
    for name in ("skimage", "skimage.metrics", "sklearn", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cogx-fast\[.*quality"):
        quality.psnr(video, video)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cogx-fast\[.*quality"):
        quality.Judge()


# -- the clips ---------------------------------------------------------------------------------------------------------


def test_the_splits_share_no_digit() -> None:
    (train, train_labels), (held, held_labels) = digits.load("train"), digits.load("held-out")
    assert (len(train), len(held)) == (len(train_labels), len(held_labels)) == (1500, 297)
    assert torch.cdist(train.flatten(1), held.flatten(1)).min() > 0


def test_digits_stay_whole_on_the_canvas() -> None:
    motions = torch.arange(500) % len(digits.MOTIONS)
    clips = digits.draw_clips(torch.arange(500), motions, torch.Generator().manual_seed(0))
    for time in (0, digits.FRAMES - 1):
        place = clips.start + clips.velocity * time
        assert place.min() >= 0
        assert place.max() <= digits.CANVAS - digits.SIDE


def test_a_whole_pixel_place_is_a_copy_and_half_a_pixel_a_mean() -> None:
    pictures = torch.rand(1, digits.SIDE, digits.SIDE, generator=torch.Generator().manual_seed(0))
    clips = digits.Clips(
        picture=torch.tensor([0]), motion=torch.tensor([1]), start=torch.tensor([[3.0, 5.0]]),
        velocity=torch.tensor([[0.5, 0.0]]),
    )  # fmt: skip
    first, second = digits.render(clips, pictures, frames=2)[0]
    assert torch.equal(first[5 : 5 + digits.SIDE, 3 : 3 + digits.SIDE], pictures[0])
    assert first.sum() == pytest.approx(pictures.sum().item(), rel=1e-5)
    inner = (pictures[0, :, 1:] + pictures[0, :, :-1]) / 2
    assert torch.allclose(second[5 : 5 + digits.SIDE, 4 : 3 + digits.SIDE], inner)


def test_every_prompt_names_its_digit_and_motion() -> None:
    prompts = digits.all_prompts()
    assert len({words for _, _, words in prompts}) == len(prompts) == 50
    assert prompts[0] == (0, "moving left", "the digit zero moving left")
    assert prompts[-1] == (9, "standing still", "the digit nine standing still")
