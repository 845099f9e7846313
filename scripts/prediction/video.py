"""Reading and writing of videos, frame by frame, with PyAV, an optional library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from util.command import need
from util.errors import InputError, reason
from util.text import counted

MISSING_SECONDS = 1  # a header may state a longer time than the pictures take, for example if the sound is longer
MAX_DELAY = 10  # seconds; a video that begins later was cut from a longer recording, and begins at 0 here
MPEG4_MAX_TICKS = 65_535  # per second


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        number: the position in the video, counted from 0.
        time: the start of the frame's display, in seconds.
        duration: the duration of the frame's display, in seconds.
        pixels: uint8 [H, W, 3], with the file's rotation applied.
    """

    number: int
    time: Fraction
    duration: Fraction
    pixels: np.ndarray


class VideoReader:
    """Reader of every `every`-th frame of a video file; each frame lasts until the next frame that is kept.

    Iterating yields `Frame`s with the time stamps of the file. It raises InputError after the last frame that can be
    read, if more frames should follow.

    Attributes:
        rate: the average number of kept frames per second.
        time_base: the unit of the time stamps in seconds.
        length: the number of frames that are kept, often an estimate; None if the file does not say.

    Raises:
        InputError: if the file is not a video, or PyAV is not installed.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        self.every = every
        self._av = need("av", "av", "reading videos")
        try:
            self._file = self._av.open(str(path))
            self._stream = self._file.streams.video[0]
        except IndexError as error:
            raise InputError("has no pictures") from error
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})") from error
        except ValueError as error:  # most of FFmpeg's errors
            cause = getattr(error, "strerror", None) or reason(error)
            raise InputError(f"not a video, or a damaged one ({cause})") from error
        self._stream.thread_type = "AUTO"
        self._rate = Fraction(self._stream.average_rate or 25)
        self.rate = self._rate / every
        self.time_base = self._stream.time_base or 1 / self._rate
        self._seconds = self._length_of_pictures()
        self._frames = self._stream.frames  # 0 if the file does not say
        frames = self._frames or round(self._seconds * self._rate)
        self.length = -(-frames // every) or None

    def _length_of_pictures(self) -> Fraction:
        """Return the length of the pictures in seconds; if the file lacks it, the length of the file; 0: unknown."""
        tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", self._stream.metadata.get("DURATION", ""))  # of Matroska
        if tag:
            hours, minutes, seconds = map(Fraction, tag.groups())
            return (60 * hours + minutes) * 60 + seconds
        if self._stream.duration:
            return self._stream.duration * self.time_base
        return Fraction(self._file.duration or 0, self._av.time_base)

    def __iter__(self) -> Iterator[Frame]:
        number, start, end, origin = -1, Fraction(-1), Fraction(0), Fraction(0)
        kept: tuple[int, Fraction, np.ndarray] | None = None
        cause = "it ends"
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
                stamp = end if frame.pts is None else frame.pts * self.time_base - origin
                if number == 0 and not 0 <= stamp <= MAX_DELAY:
                    origin, stamp = stamp, Fraction(0)
                start = stamp if stamp > start else end  # stamps of damaged files may run backwards
                end = start + (frame.duration * self.time_base if frame.duration else 1 / self._rate)
                if number % self.every == 0:
                    if kept:
                        yield Frame(kept[0], kept[1], start - kept[1], kept[2])
                    turns = round(frame.rotation / 90)  # counterclockwise
                    kept = number, start, np.rot90(frame.to_ndarray(format="rgb24"), turns)
        if kept:
            yield Frame(kept[0], kept[1], end - kept[1], kept[2])
        self._check_end(number + 1, end + origin, cause)

    def _check_end(self, frames: int, end: Fraction, cause: str) -> None:
        """Raise InputError if more frames should follow those that were read; the last one ends at `end` seconds."""
        if self._frames:
            missing, read = (self._frames - frames) / self._rate, f"{frames} of about {counted(self._frames, 'frame')}"
        else:
            missing = self._seconds - end
            read = f"{float(end):.1f} of about {float(self._seconds):.1f} seconds"
        if cause != "it ends" or missing > MISSING_SECONDS:
            raise InputError(f"damaged, only {read} could be read ({cause})")


@contextmanager
def write_video(
    path: Path, rate: Fraction, time_base: Fraction, size: tuple[int, int]
) -> Iterator[Callable[[Image.Image, Fraction, Fraction], None]]:
    """Write an mp4 file in H.264, or in MPEG-4 if PyAV has no H.264 encoder; sound is not written.

    Yield the function that adds a picture, with the time and the duration of its frame in seconds.

    Args:
        path: the file.
        rate: frames per second, on average.
        time_base: the unit to which times are rounded, in seconds.
        size: (width, height); an odd side becomes a pixel smaller, since both formats need even sides.

    Raises:
        InputError: if the file cannot be written.
    """
    av = need("av", "av", "writing videos")
    width, height = (max(2, side - side % 2) for side in size)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    if codec == "mpeg4":
        time_base = max(time_base, Fraction(1, MPEG4_MAX_TICKS)).limit_denominator(MPEG4_MAX_TICKS)
    earliest = 0
    durations: dict[int, int] = {}  # by time stamp: encoders give the last frame the average duration
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
            stream = file.add_stream(codec, rate=rate, options={"bf": "0"})  # frames are stored in the order of time
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = time_base

            def write(image: Image.Image, time: Fraction, duration: Fraction) -> None:
                frame = av.VideoFrame.from_image(image).reformat(width, height, "yuv420p")
                nonlocal earliest
                frame.pts, frame.time_base = max(round(time / time_base), earliest), time_base
                earliest = frame.pts + 1  # encoders refuse two frames at one time
                durations[frame.pts] = round(duration / time_base)
                mux(stream.encode(frame))

            def mux(packets: list[Any]) -> None:
                for packet in packets:
                    packet.duration = durations.pop(packet.pts, 0)
                    file.mux(packet)

            yield write
            mux(stream.encode())  # the frames that the encoder has kept back
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from error
