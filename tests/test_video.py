"""Films: pictures at a set rate, sound tracks, what cannot be seen or heard, and what clips of films are known by."""

from __future__ import annotations

import struct
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.audio import AudioError, audio_seconds, load_audio
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder
from calm_pl.headstore import HeadStore
from tests.conftest import RATE

av = pytest.importorskip("av")

from calm_pl.container import SoundTrack  # noqa: E402
from calm_pl.video import MAX_PIXELS, VideoError, load_frames, video_seconds  # noqa: E402
from examples.audiovisual import FILM_RATE, write_film  # noqa: E402


def grey(seconds: float = 2.0, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose brightness is their number times ten."""
    levels_F = 10 * np.arange(round(seconds * FILM_RATE), dtype=np.uint8)
    return np.broadcast_to(levels_F[:, None, None, None], (len(levels_F), height, width, 3)).copy()


def tone(seconds: float = 2.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)


@pytest.fixture(scope="module", params=["mp4", "webm"])
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("films") / f"film.{request.param}", grey(), tone())


def write_sound(path: Path, codec: str, container: str, wave_S: np.ndarray, rate: int = RATE) -> Path:
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave_S[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_late(path: Path, sound_from: float, pictures_from: float, **options: str) -> Path:
    """A film of 2 s of grey frames and 2 s of sound, silent but for a tone in its last half second; each may start
    later than the file's clock."""
    codecs = ("libvpx", "libopus") if path.suffix == ".webm" else ("libx264", "aac")
    wave_S = np.where(np.arange(2 * RATE) < 1.5 * RATE, 0, tone()).astype(np.float32)
    packets = []
    with av.open(str(path), "w", options=options) as film:
        pictures = film.add_stream(codecs[0], rate=FILM_RATE, options={"bf": "0"})
        pictures.height, pictures.width, pictures.pix_fmt, pictures.time_base = 48, 64, "yuv420p", Fraction(1, 1000)
        sound = film.add_stream(codecs[1], rate=RATE, layout="mono")
        for number, pixels_HW3 in enumerate(grey()):
            picture = av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")
            picture.pts, picture.time_base = round(1000 * (pictures_from + number / FILM_RATE)), Fraction(1, 1000)
            packets += pictures.encode(picture)
        samples = av.AudioFrame.from_ndarray(wave_S[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = RATE, round(sound_from * RATE), Fraction(1, RATE)
        packets += [*pictures.encode(), *sound.encode(samples), *sound.encode()]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            film.mux(packet)
    return path


def check_late(path: Path, sound_from: float, pictures_from: float) -> None:
    """Whether both are there to their ends, at the times of the file's clock, which starts with the earlier one."""
    first = min(sound_from, pictures_from)
    sound_ends, pictures_end = 2 + sound_from - first, 2 + pictures_from - first
    assert audio_seconds(path) == pytest.approx(sound_ends, abs=0.13)
    assert video_seconds(path) == pytest.approx(pictures_end, abs=0.13)
    loud_T = load_audio(path, RATE).abs() > 0.1
    assert int(loud_T.nonzero()[0]) / RATE == pytest.approx(sound_ends - 0.5, abs=0.13)
    assert int(loud_T.sum()) / RATE > 0.3
    seen_F = load_frames(path, 2, pictures_end - 1.0, pictures_end).float().mean((1, 2, 3))
    torch.testing.assert_close(seen_F, torch.tensor([100.0, 150.0]), atol=12, rtol=0)
    with pytest.raises(VideoError, match="lies outside its pictures"):
        load_frames(path, 2, pictures_end + 0.2)


# Pictures


@pytest.mark.parametrize(
    ("options", "brightness"),
    [
        ({"rate": 2}, [0, 50, 100, 150]),
        ({"rate": 1}, [0, 100]),
        ({"rate": 2, "start": 0.55, "end": 1.6}, [50, 100, 150]),
        ({"rate": 20, "max_seconds": 0.2}, [0, 0, 10, 10]),  # faster than the film: the frame that is still shown
        ({"rate": 0.1}, [0]),
        ({"rate": 2, "start": 1.95}, [190]),
    ],
)
def test_frames_are_those_shown_at_the_wanted_times(film, options, brightness):
    frames_F3HW = load_frames(film, **options)
    assert frames_F3HW.dtype == torch.uint8 and frames_F3HW.shape == (len(brightness), 3, 48, 64)
    seen_F = frames_F3HW.float().mean((1, 2, 3))
    torch.testing.assert_close(seen_F, torch.tensor(brightness, dtype=torch.float32), atol=4, rtol=0)


@pytest.mark.parametrize("container", ["mp4", "webm", "ts"])  # the last tells no length
def test_length_is_that_of_the_pictures(tmp_path, container):
    path = write_film(tmp_path / f"film.{container}", grey(), tone(0.4))
    assert video_seconds(path) == pytest.approx(2.0, abs=0.01)
    assert video_seconds(path, 0.5, 1.25) == pytest.approx(0.75)
    assert video_seconds(path, 0.5, 100.0) == pytest.approx(1.5, abs=0.01)
    assert len(load_frames(path, 2, 0.5, 100.0)) == 3
    for read in (video_seconds, partial(load_frames, rate=2.0)):
        with pytest.raises(VideoError, match="2.5 s lies outside its pictures, which last 2.000 s"):
            read(path, start=2.5)


@pytest.mark.parametrize("starts", [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0)], ids=["sound", "pictures", "both"])
@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "webm"])
def test_sound_and_pictures_that_start_late_keep_their_ends(tmp_path, container, starts):
    check_late(write_late(tmp_path / f"late.{container}", *starts), *starts)


def test_a_late_start_that_the_header_counts_already_is_not_counted_twice(tmp_path):
    fragments = write_late(tmp_path / "fragments.mp4", 1.0, 0.0, movflags="dash+global_sidx+delay_moov")
    with av.open(str(fragments)) as film:
        stream = film.streams.audio[0]
        assert stream.start_time > 0 and float(stream.duration * stream.time_base) == pytest.approx(3.0, abs=0.13)
    check_late(fragments, 1.0, 0.0)


def test_mkvmerge_tells_the_length_of_a_track_without_its_late_start(tmp_path):
    path = write_late(tmp_path / "merged.mkv", 0.0, 1.0)
    content = path.read_bytes()
    with av.open(str(path)) as film:
        writer = film.metadata["ENCODER"].encode()
    assert content.count(b"00:00:03.000000000") == 1
    path.write_bytes(
        content.replace(b"00:00:03.000000000", b"00:00:02.000000000")
        .replace(b"ENCODER", b"REMARKS")
        .replace(writer, b"libebml v1.4.5 + lib"[: len(writer)])
    )
    check_late(path, 0.0, 1.0)


def test_large_frames_are_shrunk_in_proportion(tmp_path):
    path = write_film(tmp_path / "large.mp4", grey(0.1, 900, 1600), None)
    *_, height, width = load_frames(path, 1).shape
    assert 0.95 * MAX_PIXELS < height * width <= MAX_PIXELS
    assert width / height == pytest.approx(16 / 9, rel=0.01)


def test_a_film_taken_sideways_is_shown_upright(tmp_path):
    white_top = np.zeros((4, 48, 64, 3), dtype=np.uint8)
    white_top[:, :24] = 255
    path = write_film(tmp_path / "sideways.mp4", white_top, None)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44  # its matrix, the identity; a quarter turn clockwise instead
    assert content[at : at + 4] == struct.pack(">i", 1 << 16)
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turn + content[at + 36 :])
    (pixels_3HW,) = load_frames(path, 1)
    assert pixels_3HW.shape == (3, 64, 48)
    assert pixels_3HW[..., 24:].float().mean() > 200 and pixels_3HW[..., :24].float().mean() < 50  # top is right


def test_what_cannot_be_seen_is_named(film, tmp_path):
    def reason(path: Path, **segment: float) -> str:
        with pytest.raises(AudioError) as raised:
            load_frames(path, 2, **segment)
        assert raised.value.path == str(path)
        return raised.value.reason

    sound = write_sound(tmp_path / "sound.m4a", "aac", "ipod", tone())
    assert "has no pictures, only sound" in reason(sound)
    assert "no such file" in reason(tmp_path / "missing.mp4")
    assert "5 s lies outside its pictures, which last 2.000 s" in reason(film, start=5.0)
    (tmp_path / "text.mp4").write_text("no film in here")
    assert "not audio or video" in reason(tmp_path / "text.mp4")
    for kept in (0.3, 0.5):
        (tmp_path / "torn").write_bytes(film.read_bytes()[: int(kept * film.stat().st_size)])
        with pytest.raises(AudioError):
            load_frames(tmp_path / "torn", 2)


def test_a_film_whose_frames_are_noise_is_damaged(tmp_path):
    path = write_film(tmp_path / "noise.mp4", grey(), None)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4
    content[begin:end] = np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(content)
    with pytest.raises(VideoError, match="damaged|can be decoded"):
        load_frames(path, 2)


# Sound that libsndfile does not read


@pytest.mark.parametrize(
    ("name", "codec", "container", "rate"),
    [
        ("a.m4a", "aac", "ipod", RATE),
        ("a.aac", "aac", "adts", RATE),
        ("a.opus", "libopus", "ogg", 48_000),
        ("a.webm", "libopus", "webm", 48_000),
        ("a.mp4", "aac", "mp4", 22_050),
    ],
)
def test_compressed_sound_decodes_to_the_same_sound(tmp_path, name, codec, container, rate):
    time_S = np.arange(2 * rate) / rate
    path = write_sound(tmp_path / name, codec, container, 0.5 * np.sin(2 * np.pi * 440 * time_S), rate)
    wave_S = load_audio(path, RATE)
    assert audio_seconds(path) == pytest.approx(2.0, abs=0.13)  # AAC pads to whole frames, before and behind
    spectrum = torch.fft.rfft(wave_S[: 2 * RATE]).abs()
    assert abs(int(spectrum.argmax()) - 880) <= 1  # 440 Hz in bins of 0.5 Hz
    steady_S = wave_S[RATE // 2 : 3 * RATE // 2]  # FFmpeg's AAC overshoots at the start, by version more or less
    assert steady_S.abs().max() == pytest.approx(0.5, abs=0.01)
    part_S = load_audio(path, RATE, start=0.5, end=1.25)
    assert len(part_S) == 12_000
    torch.testing.assert_close(part_S[100:-100], wave_S[8100:19900], atol=0.02, rtol=0)


def test_a_films_sound_track_is_its_sound(film):
    wave_S = load_audio(film, RATE)
    assert abs(int(torch.fft.rfft(wave_S[: 2 * RATE]).abs().argmax()) - 880) <= 1
    assert len(load_audio(film, RATE, max_seconds=0.5)) == RATE // 2


def test_sound_that_cannot_be_heard_is_named(film, tmp_path):
    silent = write_film(tmp_path / "silent.mp4", grey(), None)
    with pytest.raises(AudioError, match=r"silent.mp4: has no sound track; give the clip an audio file"):
        load_audio(silent, RATE)
    torn = tmp_path / "torn.aac"
    write_sound(torn, "aac", "adts", tone())
    content = bytearray(torn.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    torn.write_bytes(content)
    with pytest.raises(AudioError, match="outside the file"):
        load_audio(torn, RATE, start=1.8)
    whole = write_sound(tmp_path / "whole.webm", "libopus", "webm", np.repeat(tone(), 3), 48_000)
    (tmp_path / "cut.webm").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(AudioError, match="truncated"):
        load_audio(tmp_path / "cut.webm", RATE)


def test_channels_are_averaged_and_a_late_track_starts_with_silence(tmp_path):
    path = tmp_path / "late.mp4"
    stereo = np.stack([tone(), -tone()]).astype(np.float32)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
        frame.sample_rate = RATE
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert load_audio(path, RATE).abs().max() < 0.02
    with SoundTrack(path) as track:
        assert (track.samplerate, track.frames) == (RATE, pytest.approx(2 * RATE, abs=2100))


# Clips


def test_a_manifest_may_name_videos_alone(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video": "a.mp4", "label": "dog"}\n{"audio": "b.wav", "video": "b.mp4"}\n')
    first, second = read_manifest(tmp_path / "m.jsonl")
    assert first == Clip(f"{tmp_path}/a.mp4", "dog", video=f"{tmp_path}/a.mp4")
    assert second == Clip(f"{tmp_path}/b.wav", video=f"{tmp_path}/b.mp4")


def test_modality_rate_and_the_videos_bytes_are_part_of_the_keys(tiny_lalm, tmp_path):
    options = [{}, {"modality": "video"}, {"modality": "audiovisual"}, {"modality": "audiovisual", "frame_rate": 1.0}]
    keys = [Backbone(tiny_lalm, **chosen).store_key() for chosen in options]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert Backbone(tiny_lalm, frame_rate=1.0).store_key() == keys[0]  # nothing is seen
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, tone(), RATE)
    films = [write_film(tmp_path / f"{i}.mp4", grey()[::step], None) for i, step in enumerate((1, -1))]
    store = HeadStore({}, tmp_path / "heads")
    assert len(set(store.clip_keys([Clip(str(sound), video=str(film)) for film in films]))) == 2


def test_audio_alone_never_opens_the_video(tiny_lalm, tones, tmp_path):
    class Dubbed(Folder):
        def clips(self) -> list[Clip]:
            return [replace(clip, video=str(tmp_path / "missing.mp4")) for clip in super().clips()]

    data = AudioEpisodeDataModule(Dubbed(str(tones)), Backbone(tiny_lalm), shots=2, store=str(tmp_path / "heads"))
    data.setup()
    assert all(clip.video is None for clip in data.clips)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "smell"}, "choose one of audio, video, audiovisual"),
        ({"modality": "video"}, "Qwen2AudioProcessor takes no pictures: set modality to audio"),
        ({"frame_rate": 0}, "more than 0 frames a second"),
    ],
)
def test_what_a_modality_cannot_do_is_said(tiny_lalm, options, message):
    with pytest.raises(BackboneError, match=message):
        FrozenLALM.from_pretrained(tiny_lalm, **options)
