"""A video file's pictures, sampled at a set rate. F: frames, H, W: pixels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calm_pl.audio import AudioError, check_file
from calm_pl.container import open_container, packet_seconds, seek, start_seconds, stream_seconds

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

# Processors shrink frames to about this area (Qwen's 768 patches of 28 x 28); larger ones only fill memory.
MAX_PIXELS = 768 * 28 * 28
# A film may end this much before its header says.
SLACK_SECONDS = 0.5
# Time stamps are rounded, in Matroska to milliseconds.
ROUNDING_SECONDS = 0.0006


class VideoError(AudioError):
    """A video that cannot be seen, and why; counted where clips that cannot be heard are."""


def load_frames(
    path: str | os.PathLike[str],
    rate: float,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
    hold_last: bool = False,
) -> Tensor:
    """The pictures shown at `start`, `start + 1 / rate`, ... until `end`.

    Args:
        path: any file that FFmpeg reads.
        rate: pictures a second.
        start: first second; None is the beginning.
        end: last second; None is the end of the pictures, and so is a later one: a clip's sound may go on longer.
        max_seconds: look at no more than this many seconds from `start`.
        hold_last: where `start` lies behind the pictures, show the last of them.

    Returns:
        uint8 tensor (F, 3, H, W), RGB, F at least 1; frames larger than `MAX_PIXELS` are shrunk in proportion.

    Raises:
        AudioError: the file is missing or empty, or FFmpeg cannot read it.
        VideoError: it has no pictures, is truncated or damaged, or `start` lies behind its pictures.
    """
    check_file(path)
    begin, stop = start or 0.0, math.inf if end is None else end
    if max_seconds is not None:
        stop = min(stop, begin + max_seconds)
    with open_container(path) as container:
        import av
        from av.video.reformatter import VideoReformatter

        # One of its own: PyAV's shared one keeps threads, for which a forked worker would wait for ever.
        reformatter = VideoReformatter()
        stream = _pictures(path, container)
        seconds = stream_seconds(container, stream)
        if seconds is not None and hold_last:
            begin = min(begin, seconds)
        elif seconds is not None:
            _check_inside(path, begin, seconds)
        try:
            shown = _sampled(container, stream, begin, stop, 1 / rate, hold_last)
            frames = [_rgb(frame, reformatter) for frame in shown]
        except av.error.FFmpegError as error:
            raise VideoError(path, f"truncated or damaged ({error.strerror}); fetch it again") from None
    if not frames:
        video_seconds(path, start)  # raises where they end before `start`
        raise VideoError(path, "not one of its frames can be decoded; fetch it again")
    wanted = None if seconds is None else (min(stop, seconds) - begin) * rate
    if wanted is not None and len(frames) < wanted - SLACK_SECONDS * rate:
        raise VideoError(path, f"truncated: {wanted - len(frames):.0f} of its last frames are missing; fetch it again")
    return torch.stack(frames)


def video_seconds(path: str | os.PathLike[str], start: float | None = None, end: float | None = None) -> float:
    """Length in seconds of a file's pictures, or of those from `start` to `end`, without decoding them.

    Raises:
        AudioError, VideoError: as `load_frames`, where headers tell.
    """
    check_file(path)
    with open_container(path) as container:
        import av

        stream = _pictures(path, container)
        try:
            seconds = stream_seconds(container, stream) or packet_seconds(container, stream)
        except av.error.FFmpegError as error:
            raise VideoError(path, f"truncated or damaged ({error.strerror}); fetch it again") from None
    begin = start or 0.0
    _check_inside(path, begin, seconds)
    return (seconds if end is None else min(end, seconds)) - begin


def _check_inside(path: str | os.PathLike[str], begin: float, seconds: float) -> None:
    if begin >= seconds:
        raise VideoError(path, f"{begin:g} s lies outside its pictures, which last {seconds:.3f} s")


def _pictures(path: str | os.PathLike[str], container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of an album does not move
            return stream
    raise VideoError(path, "has no pictures, only sound; give the clip a video, or set modality: audio")


def _sampled(
    container: InputContainer, stream: VideoStream, begin: float, stop: float, step: float, hold_last: bool
) -> Iterator[VideoFrame]:
    """The frame shown at each wanted time; one is shown until the next one's time, the first also before its own."""
    zero = start_seconds(container)
    seek(container, begin)
    wanted, count, until = begin, 0, 0.0
    shown: VideoFrame | None = None
    for frame in container.decode(stream):
        time = (frame.time or 0.0) - zero
        while shown is not None and wanted < min(time, stop) - ROUNDING_SECONDS:
            yield shown
            count += 1
            wanted = begin + count * step
        if time >= stop:
            return
        shown, until = frame, time + float(1 / stream.average_rate if stream.average_rate else 0)
    while shown is not None and (
        wanted < min(until, stop) - ROUNDING_SECONDS or (not count and (hold_last or wanted <= until))
    ):
        yield shown
        count += 1
        wanted = begin + count * step


def _rgb(frame: VideoFrame, reformatter: VideoReformatter) -> Tensor:
    """(3, H, W)."""
    scale = min(1.0, math.sqrt(MAX_PIXELS / (frame.width * frame.height)))
    size = max(1, int(frame.width * scale)), max(1, int(frame.height * scale))
    small = reformatter.reformat(frame, *size, format="rgb24")
    upright = np.rot90(small.to_ndarray(), round(frame.rotation / 90))  # a telephone films sideways and says so
    return torch.from_numpy(np.ascontiguousarray(upright.transpose(2, 0, 1)))
