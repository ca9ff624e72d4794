"""A video in the place of a picture: its frames, the files it is kept as, and which frame of the model each one is.

    clip = model.generate("a red ring on grass")[0]
    clip.save("ring.gif"); clip.middle; clip.times(13)

Frames are PIL pictures of one size. GIF is written by Pillow and has 256 colours a frame; MP4 needs imageio-ffmpeg.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from mmdit_probe.errors import UserError, counted
from mmdit_probe.results import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

FPS = 8
"""Frames per second that clips are shown at, whatever the model was made for."""

VideoFile = Literal["gif", "mp4"]


@dataclass(frozen=True, eq=False)
class Clip:
    """A video of P frames."""

    frames: tuple[Image, ...]

    @classmethod
    def of(cls, frames: Any) -> Clip:
        """From a clip, or from PIL pictures or uint8 arrays [H, W, 3], one per frame."""
        from PIL import Image as pil

        if isinstance(frames, Clip):
            return frames
        found = (one if hasattr(one, "convert") else pil.fromarray(np.asarray(one)) for one in frames)
        return cls(tuple(one.convert("RGB") for one in found))

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.frames)

    def __getitem__(self, place: int) -> Image:
        return self.frames[place]

    def __repr__(self) -> str:
        width, height = self.size
        return f"Clip({counted(len(self), 'frame')} of {height} x {width} pixels)"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    @property
    def middle(self) -> Image:
        """The frame that stands for the clip where one picture is wanted."""
        return self.frames[len(self) // 2]

    def times(self, count: int) -> list[int]:
        """Which of the model's `count` frames each frame of the clip is decoded from.

        A causal autoencoder makes one frame of the first and r = (P - 1) / (count - 1) of every other one. CogVideoX's
        makes r = P / count of each where their number is even; r is even, as time is doubled, so it is one or the
        other. Where it is neither, frames are shared out evenly.
        """
        last = len(self) - 1
        alike = len(self) % (2 * count) == 0
        if last and count > 1 and last % (count - 1) == 0 and not alike:
            return [math.ceil(place * (count - 1) / last) for place in range(last + 1)]
        return [place * count // (last + 1) for place in range(last + 1)]

    def keyframes(self, count: int) -> Clip:
        """One frame for each of the model's `count` frames: the middle one of those decoded from it."""
        times = self.times(count)
        groups = [[place for place, time in enumerate(times) if time == of] for of in range(count)]
        return Clip(tuple(self.frames[group[len(group) // 2] if group else 0] for group in groups))

    def save(self, path: Path | str) -> Path:
        """Write a GIF or an MP4, by the name's ending. Errors as in `results.atomic.replacing`.

        Raises:
            UserError: another ending, or MP4 without imageio-ffmpeg.
        """
        kind = check_video_file(Path(path).suffix.removeprefix("."))
        with atomic.replacing(Path(path)) as temporary:
            (self._write_gif if kind == "gif" else self._write_mp4)(temporary)
        return Path(path)

    def _write_gif(self, file: Any) -> None:
        first, *others = self.frames
        first.save(file, format="GIF", save_all=True, append_images=others, loop=0, duration=1000 // FPS)

    def _write_mp4(self, path: Path) -> None:
        import imageio_ffmpeg

        # H.264 wants even sides.
        writer = imageio_ffmpeg.write_frames(
            str(path), self.size, fps=FPS, macro_block_size=2, output_params=["-f", "mp4"]
        )
        writer.send(None)
        for frame in self.frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()

    def _repr_html_(self) -> str:
        buffer = BytesIO()
        self._write_gif(buffer)
        return f'<img alt="{self!r}" src="data:image/gif;base64,{b64encode(buffer.getvalue()).decode()}">'


def check_video_file(kind: str) -> VideoFile:
    """A kind of file that clips are written as.

    Raises:
        UserError: it is none, or MP4 without imageio-ffmpeg.
    """
    if kind not in ("gif", "mp4"):
        raise UserError(f"a video is written as gif or mp4; found {kind!r}")
    if kind == "mp4" and find_spec("imageio_ffmpeg") is None:
        raise UserError("MP4 needs imageio-ffmpeg: pip install 'mmdit-probe[video]', or take gif")
    return cast(VideoFile, kind)


def still(picture: Image | Clip) -> Image:
    """A picture as it is, of a clip its middle frame."""
    return picture.middle if isinstance(picture, Clip) else picture


def stills(pictures: Sequence[Image | Clip]) -> list[Image]:
    """`still` of each."""
    return [still(picture) for picture in pictures]
