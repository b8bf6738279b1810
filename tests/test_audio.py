from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl import audio
from calm_pl.audio import AudioError, audio_seconds, load_audio

RATE = 16000


def tone(seconds: float = 2.0, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def error_of(path: Path, **segment: float) -> str:
    with pytest.raises(AudioError) as raised:
        load_audio(path, RATE, **segment)
    assert raised.value.path == str(path)
    assert str(raised.value).startswith(f"{path}: ")
    return raised.value.reason


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_format_decodes_to_the_same_sound(tmp_path: Path, suffix: str) -> None:
    wave = tone()
    soundfile.write(tmp_path / f"a.{suffix}", wave, RATE)
    decoded = load_audio(tmp_path / f"a.{suffix}", RATE)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (len(wave),)
    similarity = torch.cosine_similarity(decoded, torch.from_numpy(wave), dim=0)
    assert similarity > 0.99


def test_channels_are_averaged(tmp_path: Path) -> None:
    wave = tone()
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave, 0.3 * wave], axis=1), RATE, subtype="FLOAT")
    torch.testing.assert_close(load_audio(tmp_path / "a.wav", RATE), torch.from_numpy(0.1 * wave))


@pytest.mark.parametrize("rate", [8000, 11127, 16001, 22050, 44099, 44100, 48000])
def test_resampling_keeps_pitch_level_and_length(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(3.0, rate), rate, subtype="FLOAT")
    wave = load_audio(tmp_path / "a.wav", RATE)
    assert len(wave) == 3 * RATE
    torch.testing.assert_close(wave[800:-800], torch.from_numpy(tone(3.0))[800:-800], atol=5e-3, rtol=0)


@pytest.mark.parametrize("rate", [44099, 44100])
def test_resampling_does_not_alias(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate, hertz=15000), rate)
    assert load_audio(tmp_path / "a.wav", RATE)[800:-800].abs().max() < 0.01


def test_rates_without_a_common_divisor_make_no_huge_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels: list[int] = []

    class Recorded(audio.Resample):
        def __init__(self, rate: int, sampling_rate: int) -> None:
            assert rate * sampling_rate // math.gcd(rate, sampling_rate) ** 2 < 2**21, "gigabytes"
            super().__init__(rate, sampling_rate)
            kernels.append(self.kernel.numel())

    monkeypatch.setattr(audio, "Resample", Recorded)
    audio._resampler.cache_clear()
    for rate in (8000, 11025, 11127, 22254, 37800, 44056, 44099, 44100, 47952, 96000, 999_999):
        soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate)
        assert len(load_audio(tmp_path / "a.wav", RATE)) == RATE
    assert len(kernels) >= 5 and audio._resampler.cache_info().maxsize * max(kernels) * 4 < 2**28
    audio._resampler.cache_clear()


@pytest.mark.parametrize(("rate", "new"), [(44100, 16000), (48000, 16000), (11025, 24000), (1000, 16000)])
def test_the_filter_computed_piece_by_piece_is_torchaudios(rate: int, new: int) -> None:
    noise = torch.rand(2 * rate + 1, generator=torch.Generator().manual_seed(0)) - 0.5
    direct = audio._resampled_piecewise(noise, rate, new)
    torch.testing.assert_close(direct, audio.Resample(rate, new)(noise), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [10, 999, 2_000_000])
def test_a_rate_that_no_recorder_has_is_an_error(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(), rate)
    assert f"its header says {rate} Hz" in error_of(tmp_path / "a.wav")
    with pytest.raises(AudioError):
        audio_seconds(tmp_path / "a.wav")


def test_start_and_end_cut_the_same_samples_as_slicing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", noise, RATE)
    whole = load_audio(tmp_path / "a.flac", RATE)
    torch.testing.assert_close(load_audio(tmp_path / "a.flac", RATE, start=0.5, end=1.25), whole[8000:20000])
    torch.testing.assert_close(load_audio(tmp_path / "a.flac", RATE, start=2.5), whole[40000:])
    torch.testing.assert_close(load_audio(tmp_path / "a.flac", RATE, start=1, max_seconds=0.5), whole[16000:24000])
    assert audio_seconds(tmp_path / "a.flac") == 3.0
    assert audio_seconds(tmp_path / "a.flac", 0.5, 1.25) == 0.75


def test_an_end_rounded_past_the_file_is_accepted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(4.997), RATE)
    assert audio_seconds(tmp_path / "a.wav", 0, 5.0) == pytest.approx(4.997, abs=1e-3)


def test_missing_empty_folder_and_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound in here")
    assert "no such file" in error_of(tmp_path / "missing.wav")
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.wav")
    assert "is a folder" in error_of(tmp_path)
    (tmp_path / "link.wav").symlink_to("gone.wav")
    assert "a link to gone.wav, which is not there" in error_of(tmp_path / "link.wav")
    reason = error_of(tmp_path / "text.wav")
    assert "not audio" in reason
    assert "export it again" in reason


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("kept", [0.15, 0.6, 0.98])
def test_truncated_files_are_noticed(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE), RATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    if (suffix, kept) == ("mp3", 0.98):
        assert len(load_audio(path, RATE)) > 3.8 * RATE  # within the decoder's own padding
    else:
        assert "truncated" in error_of(path)


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), RATE)
    content = path.read_bytes()
    at = content.index(b"data") + 4
    path.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])
    assert len(load_audio(path, RATE)) == 2 * RATE


def test_an_ogg_file_without_an_end_of_stream_flag_is_not_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE), RATE)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])  # as recorders and splitters leave it: whole pages, no flag
    assert 3 * RATE < len(load_audio(path, RATE)) < 4 * RATE


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_sample_that_is_no_number_is_an_error(tmp_path: Path, value: float) -> None:
    wave = tone()
    wave[1000] = value
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    assert "1 of its 32000 samples are NaN or infinite" in error_of(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_a_sample_far_beyond_full_scale_is_an_error(tmp_path: Path, rate: int) -> None:
    wave = tone(rate=rate)
    wave[1000] = -3e38
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    assert "holds a sample of 3e+38, where full scale is 1" in error_of(tmp_path / "a.wav")
    wave[1000] = -(2.0**31)  # a float file that holds 32-bit integers
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    assert torch.isfinite(load_audio(tmp_path / "a.wav", RATE)).all()


def test_shorter_than_ten_milliseconds_is_an_error(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", tone(0), RATE)
    soundfile.write(tmp_path / "short.wav", tone(0.009), RATE)
    soundfile.write(tmp_path / "enough.wav", tone(0.010), RATE)
    assert "lasts 0.0 ms" in error_of(tmp_path / "none.wav")
    assert "lasts 9.0 ms" in error_of(tmp_path / "short.wav")
    assert len(load_audio(tmp_path / "enough.wav", RATE)) == 160


def test_segments_outside_the_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), RATE)
    for segment in ({"start": 2.0}, {"start": -0.5}, {"end": 2.1}, {"start": 1.0, "end": 3.0}):
        assert "outside the file, which lasts 2.000 s" in error_of(path, **segment)
    assert "1 s to 1.005 s is less than 10 ms; correct start and end" in error_of(path, start=1.0, end=1.005)
    with pytest.raises(AudioError, match="correct start and end"):
        audio_seconds(path, 1.0, 1.005)


def test_the_error_survives_a_worker_process(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(AudioError(tmp_path / "a.wav", "because")))
    assert (str(error), error.path) == (f"{tmp_path}/a.wav: because", f"{tmp_path}/a.wav")
