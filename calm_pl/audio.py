"""One file in, mono float32 at the model's rate out. T: samples, O: samples of one block of output, W: of a window."""

from __future__ import annotations

import math
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
NOT_UTF8 = "its name is not UTF-8, so no table could name it; rename it (convmv -f latin1 -t utf8 does whole folders)"
MIN_SECONDS = 0.01
# What a header may say, in Hz. Slower than any recorder of sounds, a short file would be resampled to hours; faster
# than any converter (bat detectors and studios end at 768 kHz) is a damaged header.
MIN_RATE, MAX_RATE = 1_000, 1_000_000
# Full scale is 1, but some float files hold integers of up to 32 bits. Larger samples are damage, and overflow in the
# spectrogram.
MAX_AMPLITUDE = 2.0**31

# The kernel of torchaudio has rate x new rate / gcd^2 values: 71,000 from 44,100 to 16,000 Hz, 706 million from 44,099.
_MAX_KERNEL = 2**20
_KERNELS = 32  # kept: little more than 128 MiB of float32 at most
# Torchaudio's defaults: zero crossings on each side of the windowed sinc, and its share of the band.
_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99
_BLOCK = 2**20  # values of the filter computed at once

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
        sampling_rate: rate to resample to, in Hz, with torchaudio's windowed-sinc filter. Where its kernel would be
            huge, because the two rates have no large common divisor (44,099 Hz), the same filter is computed piece by
            piece: pitch and length are exact at every rate.
        start: first second to read, reached by seeking; None is the beginning.
        end: last second to read; None is the end of the file.
        max_seconds: read no more than this many seconds from `start`.

    Returns:
        float32 tensor (T,): the mean of the channels, in [-1, 1] for integer formats; floats are taken as they are.

    Raises:
        AudioError: the file is missing, empty, not audio, truncated, shorter than 10 ms, holds a sample that
            is no finite number or beyond 2^31 (one is enough: resampling and the spectrogram would spread it), its
            header tells a rate below 1 kHz or above 1 MHz, or `start` and `end` lie outside it. The message names
            the file and says what to do.
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
    if (peak := float(wave.abs().max())) > MAX_AMPLITUDE:
        raise AudioError(path, f"holds a sample of {peak:.3g}, where full scale is 1: damaged; export it again")
    return wave if rate == sampling_rate else _resampled(wave, rate, sampling_rate)


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


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether the name can be written in a manifest or a table."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_file(path: str | os.PathLike[str]) -> Path:
    """A file that is there and not empty.

    Raises:
        AudioError: it is missing, a folder, or empty.
    """
    file = Path(path)
    if not is_utf8(path):
        raise AudioError(os.fsencode(path).decode(errors="backslashreplace"), NOT_UTF8)
    if not file.exists():
        if file.is_symlink():
            raise AudioError(path, f"a link to {os.readlink(file)}, which is not there; fetch that, or leave it out")
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
    opened = _opened(path)
    if not MIN_RATE <= opened.samplerate <= MAX_RATE:
        opened.close()
        raise AudioError(
            path, f"its header says {opened.samplerate} Hz; rates from 1 kHz to 1 MHz are read, export it at one"
        )
    return opened


def _opened(path: str | os.PathLike[str]) -> soundfile.SoundFile | SoundTrack:
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


def _resampled(wave_T: Tensor, rate: int, sampling_rate: int) -> Tensor:
    common = math.gcd(rate, sampling_rate)
    if (rate // common) * (sampling_rate // common) > _MAX_KERNEL:
        return _resampled_piecewise(wave_T, rate, sampling_rate)
    resampled_T: Tensor = _resampler(rate, sampling_rate)(wave_T)
    return resampled_T


def _resampled_piecewise(wave_T: Tensor, rate: int, sampling_rate: int) -> Tensor:
    """What torchaudio's `Resample` gives, without its kernel: each output's filter is computed where it is needed.

    Takes about 10 ms a second of sound, and some tens of MB.
    """
    band = _ROLLOFF * min(1, sampling_rate / rate)  # in parts of the input's
    reach = math.ceil(_ZERO_CROSSINGS / band)
    offsets_W = torch.arange(-reach, reach + 2)
    windows_TW = torch.nn.functional.pad(wave_T, (reach, reach + 1)).unfold(0, len(offsets_W), 1)
    length = -(-len(wave_T) * sampling_rate // rate)
    pieces: list[Tensor] = []
    for positions_O in torch.arange(length).split(max(1, _BLOCK // len(offsets_W))):
        ticks_O = positions_O * rate  # in units of 1 / (rate x sampling_rate) s: whole numbers do not drift
        distance_OW = band * (offsets_W - (ticks_O % sampling_rate / sampling_rate)[:, None])
        hann_OW = torch.cos(distance_OW.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * (math.pi / 2 / _ZERO_CROSSINGS)) ** 2
        filters_OW = band * torch.sinc(distance_OW) * hann_OW
        pieces.append((windows_TW[ticks_O // sampling_rate] * filters_OW).sum(dim=1))
    return torch.cat(pieces)


@lru_cache(maxsize=_KERNELS)
def _resampler(rate: int, sampling_rate: int) -> Resample:
    return Resample(rate, sampling_rate)
