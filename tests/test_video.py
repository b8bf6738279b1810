"""Films: pictures at a set rate, sound tracks, what cannot be seen or heard, and the three modalities end to end."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.audio import AudioError, audio_seconds, load_audio
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.classifier import CalmClassifier
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Shards
from calm_pl.data.shards import write_shards
from calm_pl.headstore import HeadStore
from calm_pl.training.module import CalmModule
from calm_pl.training.trainer import CalmTrainer
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


# Qwen-Omni


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("torchvision") is None:
        pytest.skip("Qwen2.5-Omni needs torchvision")
    from tests.families import FAMILIES

    folder = tmp_path_factory.mktemp("omni")
    FAMILIES["qwen2.5-omni"].write(folder)
    return folder


def test_sound_and_pictures_are_interleaved_by_two_seconds(omni, tmp_path):
    path = str(write_film(tmp_path / "long.mp4", grey(5.0), tone(5.0)))
    processor = Backbone(str(omni), modality="audiovisual", frame_rate=1.0).clip_processor()
    processor.max_seconds = 30.0  # the tiny checkpoint's window is two seconds
    processor.cut_window = False
    processor.extractor.n_samples, processor.extractor.nb_max_frames = 30 * RATE, 3000
    inputs = processor([Clip(path)], [processor.load(Clip(path))])
    text = processor.tokenizer.decode(inputs.model_inputs["input_ids"][0])
    order = [token for token in text.replace("<|AUDIO|>", "|A").replace("<|VIDEO|>", "|V").split("|") if token in "AV"]
    turns = [token for i, token in enumerate(order) if token and (i == 0 or order[i - 1] != token)]
    assert turns == ["V", "A"] * 3  # 0 to 2 s, 2 to 4 s, 4 to 5 s
    assert bool(inputs.model_inputs["use_audio_in_video"])
    assert "<|vision_bos|><|audio_bos|>" in text


@pytest.mark.parametrize("modality", ["video", "audiovisual"])
def test_long_films_are_split_by_time_and_averaged(omni, tmp_path, modality):
    whole, split = (FrozenLALM.from_pretrained(omni, modality=modality, long_clips=way) for way in ("cut", "split"))
    long, short = (str(write_film(tmp_path / f"{s}.mkv", grey(s), tone(s))) for s in (5.0, 1.0))  # the window is 2 s
    heads_NKD = split.head_outputs([Clip(long, start=0.25), Clip(short)], batch_size=2)
    end = 0.25 + split.processor.content.seconds(Clip(long, start=0.25))
    thirds = np.linspace(0.25, end, 4).tolist()
    pieces_NKD = whole.head_outputs([Clip(long, start=a, end=b) for a, b in pairwise(thirds)], batch_size=1)
    assert (pieces_NKD[0] - pieces_NKD[2]).abs().max() > 1e-3
    torch.testing.assert_close(heads_NKD[0], pieces_NKD.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(heads_NKD[1:], whole.head_outputs([short]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("extension", ["mp4", "webm", "avi"])
def test_pieces_beyond_the_pictures_show_the_last_of_them(omni, tmp_path, extension):
    film = str(write_film(tmp_path / f"short.{extension}", grey(1.0), None))
    soundfile.write(tmp_path / "long.wav", tone(5.3), RATE)
    clip = Clip(str(tmp_path / "long.wav"), video=film)
    processor = Backbone(str(omni), modality="audiovisual", long_clips="split").clip_processor()
    pieces = processor.load(clip)
    whole_F3HW = load_frames(film, 10.0)
    for waveform_S, _ in pieces:
        assert len(waveform_S) == pytest.approx(5.3 / 3 * RATE, abs=2)
    for _, frames_F3HW in pieces[1:]:
        assert torch.equal(frames_F3HW, whole_F3HW[-1:])
    if extension == "mp4":
        lalm = FrozenLALM.from_pretrained(omni, modality="audiovisual", long_clips="split")
        assert torch.isfinite(lalm.head_outputs([clip])).all()


def test_long_silent_films_are_counted_where_they_are_cut(omni, tmp_path):
    films = [Clip(str(write_film(tmp_path / f"{s}.mp4", grey(s), None))) for s in (3.0, 1.0)]
    processor = Backbone(str(omni), modality="video").clip_processor()
    with pytest.warns(UserWarning, match="1 of 2 clips are longer than the model's window of 2 s"):
        assert processor.warn_of_cut_clips(films) == [0]


def test_a_classifier_of_films_can_be_kept_and_used(omni, tmp_path):
    films, labels = [], []
    for label, level in (("dark", 20), ("bright", 220)):
        for number in range(3):
            frames_FHW3 = np.full((4, 56, 56, 3), level + number, dtype=np.uint8)
            films.append(str(write_film(tmp_path / f"{label}{number}.mp4", frames_FHW3, None)))
            labels.append(label)
    classifier = CalmClassifier(device="cpu").fit(films[1:], labels[1:], Backbone(str(omni), modality="video"))
    classifier.save_pretrained(tmp_path / "kept")
    assert CalmClassifier.from_pretrained(tmp_path / "kept", device="cpu").predict(films[:1]) == ["dark"]


def test_options_that_need_sound_are_refused_without_it(omni, tmp_path):
    with pytest.raises(BackboneError, match="with modality video nothing is heard; read the decoder"):
        FrozenLALM.from_pretrained(omni, modality="video", heads="both")
    pooled = FrozenLALM.from_pretrained(omni, modality="video", pooling="audio")
    with pytest.raises(BackboneError, match="there are no audio tokens in the decoder"):
        pooled.head_outputs([str(write_film(tmp_path / "a.mp4", grey(0.5), None))])


def test_bad_films_are_left_out_and_named_in_the_results(omni, tmp_path, capsys):
    """By the command line, as a user would: one silent film, one sound without pictures, one torn file."""
    from calm_pl import cli

    for label, level in (("dark", 20), ("bright", 220)):
        for number in range(4):
            frames_FHW3 = np.full((4, 56, 56, 3), level + number, dtype=np.uint8)
            write_film(tmp_path / "films" / label / f"{number}.mp4", frames_FHW3, tone(0.4))
    bad = tmp_path / "films" / "dark"
    write_film(bad / "silent.mp4", grey(0.4), None)
    write_sound(bad / "blind.m4a", "aac", "ipod", tone(0.4))
    (bad / "torn.mp4").write_bytes((bad / "0.mp4").read_bytes()[:700])
    model = tmp_path / "model.yaml"
    model.write_text("classifier: calm\nzero_shot: true\nmethods:\n  calm: {class_path: calm_pl.methods.calm.Calm}\n")
    arguments = [
        *("fit", "--data", "folder", "--backbone", str(omni), "--model", str(model)),
        *("--data.recipe.init_args.data_dir", str(tmp_path / "films"), "--data.shots", "null"),
        *("--data.backbone.modality", "audiovisual", "--data.num_workers", "0"),
        *("--run_dir", str(tmp_path / "run"), "--data.store", str(tmp_path / "heads")),
    ]
    assert cli.main(arguments) in (0, None)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    reasons = {Path(entry["audio"]).name: entry["reason"] for entry in results["skipped"]}
    assert reasons.keys() == {"silent.mp4", "blind.m4a", "torn.mp4"}
    assert "no sound track" in reasons["silent.mp4"] and "no pictures" in reasons["blind.m4a"]
    assert set(results["methods"]) == {"zero_shot", "calm"}


@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_films_from_shards_are_heard_and_seen_as_files_are(omni, tmp_path, modality, capsys):
    pytest.importorskip("webdataset")
    sound, film, other = (str(tmp_path / name) for name in ("sound.wav", "film.mp4", "other.webm"))
    soundfile.write(sound, tone(1.5)[::-1], RATE)
    write_film(Path(film), grey(1.5), tone(1.5))
    write_film(Path(other), grey(1.0)[::-1], tone(1.0))
    clips = [
        *(Clip(film), Clip(film, video=film), Clip(film, start=0.5, end=1.25), Clip(sound, video=film)),
        *(Clip(other), Clip(film, video=other), Clip(sound, start=0.25, end=1.0, video=film)),
    ]
    torn, cut = tmp_path / "torn.mp4", tmp_path / "cut.webm"  # a header tells of the first; of the second, decoding
    torn.write_bytes(Path(film).read_bytes()[:700])
    whole = write_film(tmp_path / "whole.webm", grey(3.0), tone(3.0)).read_bytes()
    cut.write_bytes(whole[: len(whole) // 5])
    unusable = [Clip(str(torn)), Clip(sound, video=str(torn)), Clip(str(cut))]
    (shard,), errors = write_shards([*clips, *unusable], tmp_path / "tar")
    assert [error.path for error in errors] == [str(torn)] * 2

    backbone = Backbone(str(omni), modality=modality)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    data = AudioEpisodeDataModule(Shards(str(shard.parent)), backbone, batch_size=3, store=str(store.root))
    trainer = CalmTrainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.extract(CalmModule({"sav": SAV()}, "sav"), data)
    told = capsys.readouterr()
    assert "1 clips or shards cannot be used" in told.out and f"{shard}/00000009.webm: truncated" in told.err
    if modality == "audio":
        clips = [replace(clip, video=None) for clip in clips]
    keys = store.clip_keys(clips)
    assert store.missing(keys) == []
    direct_NKD = backbone.load().head_outputs(clips, batch_size=1)
    torch.testing.assert_close(store.read(keys), direct_NKD, atol=2e-3, rtol=2e-3)


def test_the_example_finds_that_both_together_tell_more(monkeypatch, tmp_path):
    if find_spec("torchvision") is None:
        pytest.skip("Qwen2.5-Omni needs torchvision")
    from examples import audiovisual

    monkeypatch.setattr(audiovisual, "TEST_FILMS", 3)
    accuracy = {name: methods["calm"]["accuracy"] for name, methods in audiovisual.run(tmp_path).items()}
    assert accuracy["audiovisual"] > max(accuracy["audio"], accuracy["video"])
