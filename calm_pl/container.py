"""What libsndfile does not read: the sound tracks of m4a, aac, webm and video files, through PyAV (FFmpeg).

T: samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calm_pl.audio import AudioError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.stream import Stream

# Codecs need what comes before a position to decode it well; Opus asks for 80 ms.
PREROLL_SECONDS = 0.2
# Only these have an index; in others a seek lands nowhere in particular.
SEEKABLE = ("mov", "matroska")
# MP4 in fragments, by these brands, counts a late start into a stream's length or not, as its writer had it.
FRAGMENTED = ("iso5", "iso6", "dash", "cmfc")
# A length in a header may count the codec's own padding: two of AAC's frames.
LENGTH_SLACK = 2 * 2048
CLOCK_RATE = 1_000_000  # of FFmpeg's times of a file, a second
# Streams that start within this time of one another start together.
CLOCK_SECONDS = 0.01


def open_container(path: str | os.PathLike[str]) -> InputContainer:
    """Open a file that FFmpeg reads.

    Raises:
        AudioError: PyAV is not installed, or FFmpeg does not know the file.
    """
    try:
        import av
    except ImportError:
        raise AudioError(
            path, "not audio that libsndfile reads; m4a, aac, webm and videos need PyAV: pip install 'calm-pl[video]'"
        ) from None
    # Titles in some other encoding are nothing to fail for; from 19 on PyAV sees to that itself.
    lenient: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        container: InputContainer = av.open(os.fspath(path), **lenient)
        return container
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(
            path, f"not audio or video that libsndfile or FFmpeg reads ({_said(error)}); export it again"
        ) from None


def stream_seconds(container: InputContainer, stream: Stream) -> float | None:
    """Where one stream ends on the file's clock, in seconds, by the header: a stream may start later than the others.

    None where the header tells nothing, or guesses (as for bare AAC).
    """
    if not container.format.name.startswith(SEEKABLE) or stream.time_base is None:
        return None
    zero = start_seconds(container)
    late = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base) - zero
    if stream.duration is not None:
        brands = "".join(container.metadata.get(name, "") for name in ("major_brand", "compatible_brands"))
        if late > CLOCK_SECONDS and any(brand in brands for brand in FRAGMENTED):
            return None
        return late + float(stream.duration * stream.time_base)
    if tag := stream.metadata.get("DURATION"):  # Matroska's, as in 00:00:02.014000000
        hours, minutes, seconds = tag.split(":")
        told = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        # mkvmerge's is the length of the track, FFmpeg's the time of its end.
        return late + told if container.metadata.get("encoder", "").startswith("libebml") else told - zero
    return None


def packet_seconds(container: InputContainer, stream: Stream) -> float:
    """Length by the packets' times: reads the file to its end, decodes nothing."""
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in container.demux(stream)
        if packet.pts is not None and packet.time_base is not None
    ]
    return max(ends, default=0.0) - start_seconds(container)


def start_seconds(container: InputContainer) -> float:
    """Where the file's clock starts; all times that people give count from there."""
    return (container.start_time or 0) / CLOCK_RATE


def seek(container: InputContainer, seconds: float) -> None:
    """Go to the last point before this time that can be decoded from; to the beginning where the file has no index."""
    if seconds > 0 and container.format.name.startswith(SEEKABLE):
        container.seek(round((seconds + start_seconds(container)) * CLOCK_RATE))


class SoundTrack:
    """The first sound track of a file, opened. Has the attributes of a `soundfile.SoundFile` that `audio.py` asks for.

    Raises:
        AudioError: FFmpeg does not know the file, or it has no sound.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.container = open_container(path)
        if not self.container.streams.audio:
            self.container.close()
            raise AudioError(path, "has no sound track; give the clip an audio file, or set modality: video")
        self.stream = self.container.streams.audio[0]
        self.samplerate = int(self.stream.codec_context.sample_rate)
        known = stream_seconds(self.container, self.stream)
        self.frames = round((self._demuxed_seconds() if known is None else known) * self.samplerate)

    def read(self, first: int, last: int) -> Tensor:
        """Samples `first` to `last` as float32 mono (T,), the mean of the channels.

        Raises:
            AudioError: the sound is damaged, or ends before its header says.
        """
        import av

        zero = start_seconds(self.container)
        seek(self.container, first / self.samplerate - PREROLL_SECONDS)
        pieces: list[np.ndarray] = []
        at = have = 0
        try:
            for frame in self._decoded():
                if not pieces:
                    at = max(0, round(((frame.time or 0.0) - zero) * self.samplerate))
                pieces.append(frame.to_ndarray().mean(axis=0))
                have += len(pieces[-1])
                if at + have >= last:
                    break
        except av.error.FFmpegError as error:
            raise AudioError(self.path, f"truncated or damaged ({_said(error)}); fetch it again") from None
        if at + have < last - LENGTH_SLACK:
            missing = (last - at - have) / self.samplerate
            raise AudioError(self.path, f"truncated: its last {missing:.2f} s are missing; fetch it again")
        # A track that starts after the pictures is silent until then.
        wave_T = np.concatenate([np.zeros(max(0, at - first), dtype=np.float32), *pieces])
        return torch.from_numpy(wave_T[max(0, first - at) :][: last - first])

    def _decoded(self) -> Iterator[AudioFrame]:
        """Frames as planar float32."""
        from av.audio.resampler import AudioResampler

        to_float = AudioResampler(format="fltp")
        for frame in self.container.decode(self.stream):
            yield from to_float.resample(frame)

    def _demuxed_seconds(self) -> float:
        seconds = packet_seconds(self.container, self.stream)
        self.container.close()
        self.container = open_container(self.path)
        self.stream = self.container.streams.audio[0]
        return seconds

    def close(self) -> None:
        self.container.close()

    def __enter__(self) -> SoundTrack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _said(error: Exception) -> str:
    """FFmpeg's words without the file's name, which the message starts with anyway."""
    return getattr(error, "strerror", None) or str(error)
