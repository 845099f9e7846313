"""Reading videos frame by frame and writing them, by PyAV (an extra)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from util.command import need
from util.errors import InputError, reason

MAX_RATE_DENOMINATOR = 1001  # 30000/1001 and the like; mpeg4 takes no large ones
MISSING_SECONDS = 1  # a sound track may be that much longer than the pictures


class VideoReader:
    """Every `every`-th frame of a video file, as it is to be shown: turned as the file says.

    Iterating yields (frame number from 0, uint8 [H, W, 3]), and raises InputError behind the last frame that can be
    read where others should follow.

    Attributes:
        rate: frames a second, of those that are read.
        length: how many that will be; None where the file does not say.

    Raises:
        InputError: where it is not a video, or PyAV is not installed.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        self.every = every
        self._av = need("av", "av", "reading videos")
        try:
            self._file = self._av.open(str(path))
            self._stream = self._file.streams.video[0]
        except IndexError as error:
            raise InputError("holds no pictures") from error
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})") from error
        except ValueError as error:  # most of FFmpeg's errors
            raise InputError(f"not a video, or a damaged one ({error.strerror})") from error
        self._stream.thread_type = "AUTO"
        self._rate = Fraction(self._stream.average_rate or 25).limit_denominator(MAX_RATE_DENOMINATOR)
        self.rate = self._rate / every
        seconds = self._file.duration / self._av.time_base if self._file.duration else 0
        self._frames = self._stream.frames or round(seconds * self._rate)
        self.length = -(-self._frames // every) or None

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        number, cause = -1, "it ends"
        with self._file:
            frames = self._file.decode(self._stream)
            while True:
                try:
                    frame = next(frames)
                except StopIteration:
                    break
                except self._av.error.FFmpegError as error:
                    cause = reason(error)
                    break
                number += 1
                if number % self.every == 0:
                    turns = round(frame.rotation / 90)  # counterclockwise
                    yield number, np.rot90(frame.to_ndarray(format="rgb24"), turns)
        missing = self._frames - number - 1
        if cause != "it ends" or missing > MISSING_SECONDS * self._rate:
            raise InputError(f"damaged, only {number + 1} of about {self._frames} frames could be read ({cause})")


@contextmanager
def write_video(path: Path, rate: Fraction, size: tuple[int, int]) -> Iterator[Callable[[Image.Image], None]]:
    """An mp4 file of H.264 pictures, or of MPEG-4 ones where that is missing; gives the function that adds one.

    Args:
        path: the file.
        rate: frames a second.
        size: (width, height); an odd side becomes a pixel smaller, as both formats want it.

    Raises:
        InputError: where it cannot be written.
    """
    av = need("av", "av", "writing videos")
    width, height = (max(2, side - side % 2) for side in size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            stream = file.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"

            def write(image: Image.Image) -> None:
                frame = av.VideoFrame.from_image(image).reformat(width, height, "yuv420p")
                file.mux(stream.encode(frame))

            yield write
            file.mux(stream.encode())  # what the encoder still holds
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
