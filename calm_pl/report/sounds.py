"""Clips as a web page holds them: audio and spectrogram inside the file. T: samples, F: mel bands."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import matplotlib
import numpy as np
import soundfile
import torch
from matplotlib.image import imsave
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from calm_pl.audio import AudioError, load_audio

RATE = 16_000
SECONDS = 5.0
RANGE_DB = 70.0


@dataclass(frozen=True)
class Sound:
    """A clip's first seconds: ``audio`` (FLAC, 16 kHz, mono) and ``spectrogram`` (PNG) as data URIs, or why not."""

    audio: str = ""
    spectrogram: str = ""
    seconds: float = 0.0
    problem: str = ""


def embed(path: str, start: float | None = None, end: float | None = None) -> Sound:
    """Read a clip for a page, a part of a file by its seconds; what cannot be read comes back with its ``problem``."""
    try:
        wave_T = load_audio(path, RATE, start, end, SECONDS)
    except AudioError as error:
        return Sound(problem=error.reason)
    return Sound(_uri("audio/flac", _flac(wave_T)), _uri("image/png", _spectrogram(wave_T)), len(wave_T) / RATE)


def _flac(wave_T: Tensor) -> bytes:
    peak = float(wave_T.abs().max())
    quiet_T = wave_T / max(1.0, peak)  # resampling can overshoot full scale
    file = io.BytesIO()
    soundfile.write(file, quiet_T.numpy(), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _spectrogram(wave_T: Tensor) -> bytes:
    """Mel spectrogram in dB below its peak, low bands at the bottom."""
    hop = max(160, len(wave_T) // 320)
    power_FT = MelSpectrogram(RATE, n_fft=1024, hop_length=hop, n_mels=64)(wave_T)
    decibel_FT = 10 * torch.log10(power_FT.clamp_min(1e-10))
    shown_FT = (decibel_FT - decibel_FT.max()).clamp_min(-RANGE_DB)
    file = io.BytesIO()
    colours = matplotlib.colormaps["magma"](shown_FT.flip(0).numpy() / RANGE_DB + 1)
    imsave(file, np.ascontiguousarray((colours[..., :3] * 255).astype(np.uint8)), format="png")
    return file.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
