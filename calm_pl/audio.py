"""One file in, mono float32 at the model's rate out. T: samples."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

if TYPE_CHECKING:
    from calm_pl.container import SoundTrack

VIDEO_EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
EXTENSIONS = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf"),
    *(".m4a", ".aac", ".wma", *VIDEO_EXTENSIONS),  # by PyAV; of a video, its sound track
)
MIN_SECONDS = 0.01

# An MP3 header counts whole frames; decoders differ by the padding of the first and the last one.
_MP3_SLACK = 2 * 1152
# Writers that cannot seek back (pipes) leave a placeholder this large where the length belongs.
_UNKNOWN_LENGTH = 0x7FFF0000


class AudioError(ValueError):
    """A file that cannot be heard, and why. `path` is the file, `reason` the text without it."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # so that it survives the way back from a data worker


def load_audio(
    path: str | os.PathLike[str],
    sampling_rate: int,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> Tensor:
    """Decode a file to mono at one rate.

    WAV, FLAC, Ogg, MP3 and the like are read by libsndfile, m4a, aac, webm and the sound tracks of videos by PyAV.

    Args:
        path: the file.
        sampling_rate: rate to resample to, in Hz, with torchaudio's windowed-sinc filter.
        start: first second to read, reached by seeking; None is the beginning.
        end: last second to read; None is the end of the file.
        max_seconds: read no more than this many seconds from `start`.

    Returns:
        float32 tensor (T,): the mean of the channels, in [-1, 1] for integer formats.

    Raises:
        AudioError: the file is missing, empty, not audio, truncated, shorter than 10 ms, holds a sample that
            is no finite number (one is enough: resampling and the spectrogram would spread it), or `start`
            and `end` lie outside it. The message names the file and says what to do.
    """
    with _open(path) as file:
        first, last = _segment(file, path, start, end)
        if max_seconds is not None:
            last = min(last, first + round(max_seconds * file.samplerate))
        wave = _read(file, path, first, last) if isinstance(file, soundfile.SoundFile) else file.read(first, last)
        rate = file.samplerate

    if len(wave) < MIN_SECONDS * rate:
        raise AudioError(path, _too_short(len(wave) / rate))
    if not torch.isfinite(wave).all():
        bad = int((~torch.isfinite(wave)).sum())
        raise AudioError(path, f"{bad} of its {len(wave)} samples are NaN or infinite; export it again")
    return wave if rate == sampling_rate else _resampler(rate, sampling_rate)(wave)


def audio_seconds(path: str | os.PathLike[str], start: float | None = None, end: float | None = None) -> float:
    """Length in seconds of a file, or of the part from `start` to `end`, from its header alone.

    Raises:
        AudioError: as `load_audio`, where the header tells.
    """
    with _open(path) as file:
        first, last = _segment(file, path, start, end)
        return float((last - first) / file.samplerate)


def audio_rate(path: str | os.PathLike[str]) -> int:
    """Sampling rate of a file in Hz, from its header.

    Raises:
        AudioError: as `load_audio`, where the header tells.
    """
    with _open(path) as file:
        return int(file.samplerate)


def check_file(path: str | os.PathLike[str]) -> Path:
    """A file that is there and not empty.

    Raises:
        AudioError: it is missing, a folder, or empty.
    """
    file = Path(path)
    if not file.exists():
        raise AudioError(path, "no such file; a manifest's paths start from the manifest's folder")
    if not file.is_file():
        raise AudioError(
            path, "is a folder; name the file in it" if file.is_dir() else "is no ordinary file; copy it to one"
        )
    if not os.access(file, os.R_OK):
        raise AudioError(path, "may not be read: permission denied; give yourself the right to")
    if file.stat().st_size == 0:
        raise AudioError(path, "the file is empty (0 bytes); fetch or export it again")
    return file


def _open(path: str | os.PathLike[str]) -> soundfile.SoundFile | SoundTrack:
    file = check_file(path)
    try:
        opened = soundfile.SoundFile(str(file))
    except soundfile.LibsndfileError as error:
        if "malformed" in error.error_string:
            raise AudioError(path, f"truncated or damaged ({error.error_string}); fetch it again") from None
        from calm_pl.container import SoundTrack

        return SoundTrack(path)
    if _is_cut_off(opened, file):
        opened.close()
        raise AudioError(path, "truncated: the file ends before its header says; fetch it again")
    return opened


def _read(file: soundfile.SoundFile, path: str | os.PathLike[str], first: int, last: int) -> Tensor:
    """Samples `first` to `last`, mono (T,)."""
    try:
        file.seek(first)
        samples = file.read(last - first, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"truncated or damaged ({error.error_string}); fetch it again") from None
    slack = _MP3_SLACK if file.format == "MP3" else 0
    if len(samples) < last - first - slack:
        missing = (last - first - len(samples)) / file.samplerate
        raise AudioError(path, f"truncated: its last {missing:.2f} s are missing; fetch it again")
    return torch.from_numpy(samples).mean(dim=1)


def _is_cut_off(opened: soundfile.SoundFile, file: Path) -> bool:
    """WAV, AIFF and Ogg: libsndfile reads what is left without complaint. FLAC and MP3 show when decoded."""
    if opened.format == "OGG":
        return not _ogg_ends(file)
    claim = re.search(r"^(?:data|SSND) *: (\d+) \(should be (\d+)\)", opened.extra_info, re.MULTILINE)
    return claim is not None and int(claim[2]) < int(claim[1]) < _UNKNOWN_LENGTH


def _ogg_ends(file: Path) -> bool:
    """Whether the last Ogg page is whole (RFC 3533, section 6).

    Its end-of-stream flag says nothing: one file in twenty-five of Debian's packages lacks it and plays well.
    """
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 65307))  # the largest page
        tail = stream.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def _segment(
    opened: soundfile.SoundFile | SoundTrack, path: str | os.PathLike[str], start: float | None, end: float | None
) -> tuple[int, int]:
    """First frame and the one after the last."""
    rate, seconds = opened.samplerate, opened.frames / opened.samplerate
    if seconds < MIN_SECONDS:
        raise AudioError(path, _too_short(seconds))
    begin, stop = start or 0.0, seconds if end is None else end
    # Annotations are rounded: an end of 5.00 s in a file of 4.997 s is no mistake.
    if not (0 <= begin < seconds and stop <= seconds + MIN_SECONDS):
        raise AudioError(path, f"{begin:g} s to {stop:g} s lies outside the file, which lasts {seconds:.3f} s")
    first, last = round(begin * rate), min(round(stop * rate), opened.frames)
    if last - first < MIN_SECONDS * rate:
        raise AudioError(path, f"{begin:g} s to {stop:g} s is less than 10 ms; correct start and end")
    return first, last


def _too_short(seconds: float) -> str:
    return f"lasts {1000 * seconds:.1f} ms; less than 10 ms is no sound to classify, leave it out"


@lru_cache(maxsize=32)
def _resampler(rate: int, sampling_rate: int) -> Resample:
    return Resample(rate, sampling_rate)
