"""Clips: which frame of the model each frame is of, overlays with one scale of colours, and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdit_probe.errors import UserError
from mmdit_probe.plots.overlay import overlay
from mmdit_probe.results.clip import Clip


def clip(count: int, size: tuple[int, int] = (12, 8)) -> Clip:
    return Clip.of([Image.new("RGB", size, (20 * k, 0, 0)) for k in range(count)])


@pytest.mark.parametrize(
    ("pixels", "count", "times"),
    [
        (9, 3, [0, 1, 1, 1, 1, 2, 2, 2, 2]),  # a causal autoencoder: one frame, then four of each
        (7, 2, [0, 1, 1, 1, 1, 1, 1]),  # Mochi: one, then six
        (5, 5, [0, 1, 2, 3, 4]),
        (8, 2, [0, 0, 0, 0, 1, 1, 1, 1]),  # CogVideoX with an even number: four of each
        (7, 3, [0, 1, 1, 1, 2, 2, 2]),
        (8, 3, [0, 0, 0, 1, 1, 1, 2, 2]),  # neither: shared out
        (4, 1, [0, 0, 0, 0]),
        (1, 1, [0]),
        (1, 2, [0]),
    ],
)
def test_frames_are_those_of_the_autoencoder(pixels: int, count: int, times: list[int]) -> None:
    assert clip(pixels).times(count) == times
    keys = clip(pixels).keyframes(count)
    assert len(keys) == count
    reds = [frame.getpixel((0, 0))[0] // 20 for frame in keys]
    assert all(times[red] == k for k, red in enumerate(reds) if k in times)


def test_an_overlay_has_one_scale_for_all_frames() -> None:
    heat = np.zeros((3, 2, 3), np.float32)
    heat[1], heat[2, 0, 0] = 0.5, 1.0
    shown = overlay(clip(9), heat, 1.0)
    middle = [np.asarray(frame)[4, 6].astype(int) for frame in shown]
    # viridis at 0, one half and 1
    assert np.abs(middle[0] - [68, 1, 84]).max() <= 2 and np.abs(middle[3] - [33, 145, 140]).max() <= 2
    assert np.abs(np.asarray(shown[8])[0, 0].astype(int) - [253, 231, 37]).max() <= 2
    assert (np.asarray(shown[1]) == np.asarray(shown[4])).all()
    with pytest.raises(UserError, match=r"of a video has shape \(frames, h, w\)"):
        overlay(clip(9), heat[None])
    with pytest.raises(UserError, match=r"has shape \(h, w\); found \(3, 2, 3\)"):
        overlay(clip(9).middle, heat)


def test_a_gif_has_every_frame_and_loops(tmp_path: Path) -> None:
    path = clip(4).save(tmp_path / "a.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.info["duration"] == 120
        gif.seek(2)
        assert abs(gif.convert("RGB").getpixel((0, 0))[0] - 40) <= 4
    with pytest.raises(UserError, match="written as gif or mp4; found 'avi'"):
        clip(2).save(tmp_path / "a.avi")
    assert "data:image/gif;base64," in clip(2)._repr_html_()


def test_an_mp4_has_every_frame(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    path = clip(5, (32, 18)).save(tmp_path / "a.mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert frames == 5
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (32, 18)
