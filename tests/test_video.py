"""Videos keep the times of their frames when they are read and written."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.prediction.video import VideoReader, write_video
from util.errors import InputError

av = pytest.importorskip("av")

MILLISECOND = Fraction(1, 1000)
SIZE = (64, 48)
UNEVEN = [0, 33, 67, 100, 1100, 2100, 2133, 5000]  # milliseconds


def picture(number: int) -> Image.Image:
    return Image.new("RGB", SIZE, (20 * number, 90, 255 - 20 * number))


def record(
    path: Path, times: Sequence[int], codec: str = "libx264", unit: Fraction = MILLISECOND, sound: int = 0, **options
) -> Path:
    """Write a video with frames at the given times, in units of `unit`, and with `sound` seconds of silence."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"bf": "3", **options})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = unit
        audio = file.add_stream("aac", rate=44_100) if sound else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(picture(number))
            frame.pts, frame.time_base = time, unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        for _ in range(sound * 43):  # a second has about 43 frames of 1024 samples
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            silence.rate = 44_100
            file.mux(audio.encode(silence))
        if audio:
            file.mux(audio.encode())
    return path


def stamps(path: Path) -> tuple[list[Fraction], Fraction]:
    """Return the times of a video's frames, and of its end, in seconds as a player shows them."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [(frame.pts * stream.time_base, frame.duration * stream.time_base) for frame in file.decode(stream)]
    return [time for time, _ in frames], sum(frames[-1])


def copied(source: Path, every: int = 1) -> Path:
    """Write the frames of a video to another one, as predict does, and return its path."""
    path = source.with_name("copy.mp4")
    reader = VideoReader(source, every)
    with write_video(path, reader.rate, reader.time_base, SIZE) as write:
        for frame in reader:
            write(Image.fromarray(frame.pixels), frame.time, frame.duration)
    return path


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_uneven_times_are_kept(codec, name, every, tmp_path, monkeypatch):
    """Frames may be stored in another order than they are shown, and the writer may lack H.264."""
    source = record(tmp_path / name, UNEVEN, codec)
    monkeypatch.setattr(av, "codecs_available", {codec})
    times, end = stamps(source)
    assert times == [time * MILLISECOND for time in UNEVEN]
    assert stamps(copied(source, every)) == (times[::every], end)


@pytest.mark.parametrize(
    ("unit", "times"),
    [
        (Fraction(1, 90_000), [0, 3003, 6006, 90_000]),
        (Fraction(1001, 30_000), [0, 1, 2, 5]),
        (Fraction(1, 1_000_000), [0, 16_683, 33_367, 1_000_001]),
        (Fraction(1, 24), [0, 1, 2, 40]),
    ],
    ids=str,
)
def test_times_in_other_units_are_kept(unit, times, tmp_path):
    source = record(tmp_path / "a.mp4", times, unit=unit)
    times, end = stamps(source)
    got, got_end = stamps(copied(source))
    assert got == pytest.approx(times, abs=1e-6)
    assert got_end == pytest.approx(end, abs=1e-6)


def test_times_in_units_that_mpeg4_lacks_are_close(tmp_path, monkeypatch):
    source = record(tmp_path / "a.mp4", [0, 3003, 6006, 90_000], unit=Fraction(1, 90_000))
    monkeypatch.setattr(av, "codecs_available", set())
    assert stamps(copied(source))[0] == pytest.approx(stamps(source)[0], abs=1e-4)


def test_a_late_start_is_kept_if_it_is_seconds_and_removed_if_it_is_hours(tmp_path):
    """A start after hours is the time in a recording that the video was cut from."""
    some = record(tmp_path / "some.mkv", [2000, 2040, 2080])
    hours = record(tmp_path / "hours.mkv", [7_200_000, 7_200_040, 7_200_080])
    assert stamps(copied(some))[0] == stamps(some)[0]
    assert stamps(copied(hours))[0] == [0, Fraction(40, 1000), Fraction(80, 1000)]


def test_sound_does_not_change_the_times_of_frames(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        source = record(tmp_path / name, [0, 40, 80], sound=5)
        assert stamps(copied(source))[0] == stamps(source)[0]


class Undated:
    """A frame of a file that has lost time stamps."""

    def __init__(self, frame, pts: int | None) -> None:
        self.pts, self.duration, self.rotation = pts, 0, 0
        self.to_ndarray = frame.to_ndarray


@pytest.mark.parametrize(
    ("stamped", "expected"),
    [
        ([None] * 4, [0, 40, 80, 120]),
        ([0, None, None, 500], [0, 40, 80, 500]),
        ([0, 40, 20, 120], [0, 40, 80, 120]),
        ([-80, -40, 0, 40], [0, 40, 80, 120]),
    ],
    ids=["none", "some", "backwards", "negative"],
)
def test_missing_and_wrong_times_are_replaced(stamped, expected, tmp_path, monkeypatch):
    """Frames without a usable time follow the previous frame at the average rate."""
    reader = VideoReader(record(tmp_path / "a.mkv", [0, 40, 80, 120]))
    frames = [Undated(frame, pts) for frame, pts in zip(reader._file.decode(reader._stream), stamped, strict=True)]

    class File:
        def decode(self, _stream):
            return iter(frames)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            reader_file.close()

    reader_file, reader._file = reader._file, File()
    assert [frame.time / MILLISECOND for frame in reader] == expected


def test_readable_frames_of_a_damaged_video_come_before_the_error(tmp_path):
    source = record(tmp_path / "a.mkv", range(0, 8000, 40), codec="mpeg4")
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    seen = []
    with pytest.raises(InputError, match=r"damaged, only [2-6]\.\d of about 8\.0 seconds could be read"):
        for frame in VideoReader(source):
            seen.append(frame.time / MILLISECOND)
    assert seen == list(range(0, len(seen) * 40, 40))
    assert 50 < len(seen) < 150
