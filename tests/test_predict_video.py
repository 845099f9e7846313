"""Prediction on videos."""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from scripts.prediction.video import VideoReader, write_video
from tests.predicting import DETECTIONS, assert_same, page_data, scene


class TestVideos:
    """Prediction on videos; skipped if PyAV is not installed."""

    @pytest.fixture(autouse=True)
    def _needs_av(self):
        pytest.importorskip("av")

    @pytest.fixture
    def clip(self, tmp_path) -> Path:
        """Write 10 frames of 64×48 pixels, each of another scene."""
        return self.write(tmp_path / "clip.mp4")

    def write(self, path: Path, frames: int = 10, size=(64, 48)) -> Path:
        rate = Fraction(30000, 1001)
        with write_video(path, rate, Fraction(1, 30000), size) as write:
            for number in range(frames):
                write(scene(number).resize(size), number / rate, 1 / rate)
        return path

    def test_all_frames_of_a_clip_are_predicted_and_drawn(self, run_predict, clip, photos, tmp_path):
        code, results, _ = run_predict(clip, photos / "a.jpg", "--batch_size", 3)
        assert code == 0
        assert list(results) == [*(f"clip.mp4#{number:06}" for number in range(10)), "a.jpg"]
        assert all(len(found) == DETECTIONS for found in results.values())
        drawn = VideoReader(tmp_path / "out" / "pictures" / "clip.mp4")
        assert drawn.rate == Fraction(30000, 1001)
        assert [frame.pixels.shape for frame in drawn] == [(48, 64, 3)] * 10
        video, image = page_data(tmp_path / "out")["entries"]
        assert video == {"name": "clip.mp4", "file": "pictures/clip.mp4", "video": True, "boxes": []}
        assert image["boxes"]

    def test_every_third_frame_keeps_its_time(self, run_predict, clip, tmp_path):
        _, all_frames, _ = run_predict(clip)
        _, results, _ = run_predict(clip, "--every", 3)
        assert list(results) == [f"clip.mp4#{number:06}" for number in (0, 3, 6, 9)]
        for name, found in results.items():
            assert_same(found, all_frames[name])
        drawn = list(VideoReader(tmp_path / "out" / "pictures" / "clip.mp4"))
        frame = Fraction(1001, 30000)
        assert [shown.time / frame for shown in drawn] == [0, 3, 6, 9]
        assert [shown.duration / frame for shown in drawn] == [3, 3, 3, 1]  # up to the clip's end

    def test_damaged_videos_are_reported_and_their_readable_frames_used(self, run_predict, tmp_path):
        size, folder = (65, 47), tmp_path / "in"
        folder.mkdir()
        whole = self.write(tmp_path / "whole.mp4", frames=60, size=size).read_bytes()
        (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (folder / "text.avi").write_text("hello")
        (folder / "image.mkv").touch()
        code, results, printed = run_predict(folder)
        assert code == 1
        assert 5 < len(results) < 55
        assert f"cut.mp4: damaged, only {len(results)} of about 60 frames" in printed
        assert "text.avi: not a video" in printed
        assert "image.mkv: not a video" in printed
        drawn = VideoReader(tmp_path / "out" / "pictures" / "cut.mp4")
        assert {frame.pixels.shape for frame in drawn} == {(46, 64, 3)}

    def test_a_turned_video_is_read_upright(self, tmp_path):
        av = pytest.importorskip("av")
        image = Image.new("RGB", (64, 32), "white")
        image.paste((255, 0, 0), (0, 0, 16, 32))  # red on the left: at the bottom after a quarter turn to the left
        with av.open(str(tmp_path / "turned.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV reads turned videos but cannot write them")
            stream.set_display_rotation(90)
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
            file.mux(stream.encode())
        (frame,) = VideoReader(tmp_path / "turned.mp4")
        assert frame.pixels.shape == (64, 32, 3)
        assert frame.pixels[60, 16, 1] < 80 < 200 < frame.pixels[4, 16, 1]

    def test_the_package_is_named_if_it_is_missing(self, run_predict, clip, photos, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        code, results, printed = run_predict(clip, photos / "a.jpg")
        assert code == 1
        assert list(results) == ["a.jpg"]
        assert "clip.mp4: reading videos needs av: pip install av" in printed
