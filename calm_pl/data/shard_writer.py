"""WebDataset tar shards of clips, as `calm_pl.data.shards` reads them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import soundfile

from calm_pl.audio import EXTENSIONS, VIDEO_EXTENSIONS, AudioError, audio_rate, audio_seconds, load_audio
from calm_pl.clip import Clip
from calm_pl.data.shards import KNOWN, VIDEO
from calm_pl.headstore.files import DISK_FULL
from calm_pl.progress import Task

# Lies in a folder until all of its shards are written.
UNFINISHED = ".unfinished"


def write_shards(
    clips: Sequence[Clip], folder: str | Path, per_shard: int = 1000
) -> tuple[list[Path], list[AudioError]]:
    """Write clips as `clips-000000.tar`, ... with up to `per_shard` clips each, in their order.

    A whole file goes in byte by byte. Of a sound with `start` or `end` only that part goes in, mono at its own rate as
    32-bit floats, so that what a model hears stays the same to the last bit (AU, because libsndfile writes the time of
    day into float WAV). Films cannot be cut without loss, so they go in whole, with `start` and `end` in the JSON.
    Equal clips give equal archives, and so equal keys in a head store.

    What was interrupted goes on: shards that are whole already stay.

    Returns:
        The shards, and an error for each clip that was left out because its file cannot be read.

    Raises:
        FileExistsError: the folder holds tar files already, which are not of these clips, or all there are to be.
        OSError: the disk is full.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shards = [target / f"clips-{number:06d}.tar" for number in range(-(-len(clips) // per_shard))]
    unfinished = target / UNFINISHED
    known = shards if unfinished.exists() else []
    if found := next((file for file in sorted(target.glob("*.tar")) if file not in known), None):
        raise FileExistsError(f"{found} exists; write to an empty folder")
    parent = os.path.commonpath([os.path.dirname(clip.audio) for clip in clips])
    errors: list[AudioError] = []
    with Task("writing shards", len(clips), "clips") as task:
        unfinished.touch()
        for first, shard in zip(range(0, len(clips), per_shard), shards, strict=True):
            samples = {f"{index:08d}": clip for index, clip in enumerate(clips[first : first + per_shard], first)}
            if shard.exists():
                errors += _left_out(shard, samples, parent)
                task.advance(len(samples))
            else:
                errors += _write(shard, samples, parent, task)
    unfinished.unlink()
    return shards, errors


def _write(shard: Path, samples: Mapping[str, Clip], parent: str, task: Task) -> list[AudioError]:
    """Write one shard, whole or not at all; why clips are not in it."""
    errors = []
    partial = shard.with_suffix(".partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, clip in samples.items():
                try:
                    for suffix, content in {**_media(clip), ".json": _about(clip, parent)}.items():
                        _add(archive, name + suffix, content)
                except AudioError as error:
                    errors.append(error)
                task.advance()
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in DISK_FULL:
            raise
        message = f"{error.strerror}: free some room, and run the same command again, which goes on"
        raise OSError(error.errno, message, str(shard)) from error
    partial.replace(shard)
    return errors


def _left_out(shard: Path, samples: Mapping[str, Clip], parent: str) -> list[AudioError]:
    """Why clips are not in a shard that was written before an interruption.

    Raises:
        FileExistsError: it holds other clips than these.
    """
    with tarfile.open(shard) as archive:
        about = [(member.name, archive.extractfile(member)) for member in archive if member.name.endswith(".json")]
        held = {name.removesuffix(".json"): file.read() for name, file in about if file is not None}
    if any(name not in samples or text != _about(samples[name], parent) for name, text in held.items()):
        raise FileExistsError(f"{shard} holds other clips than these; write to an empty folder")
    errors = []
    for name, clip in samples.items():
        if name not in held:
            try:
                _media(clip)
            except AudioError as error:
                errors.append(error)
            else:
                raise FileExistsError(f"{shard} lacks {clip.audio}, which can be read by now; remove that shard")
    return errors


def _about(clip: Clip, parent: str) -> bytes:
    """What a shard's JSON says of a clip."""
    names = (*KNOWN, "start", "end") if _is_film(clip) else KNOWN
    about = {name: value for name in names if (value := getattr(clip, name)) is not None}
    about["audio"] = os.path.relpath(clip.audio, parent)  # for people; nothing reads it
    return json.dumps(about, ensure_ascii=False).encode()


def _media(clip: Clip) -> dict[str, bytes]:
    """The files that a shard holds of a clip, by suffix. Raises AudioError for one that cannot be used."""
    return _film(clip) if _is_film(clip) else _sound(clip)


def _is_film(clip: Clip) -> bool:
    return clip.video is not None or clip.audio.lower().endswith(VIDEO_EXTENSIONS)


def _film(clip: Clip) -> dict[str, bytes]:
    """The files of a clip with pictures, by suffix. Raises AudioError for one that holds neither sound nor pictures."""
    from calm_pl.video import video_seconds

    stretch = (clip.start, clip.end)
    if clip.video in (None, clip.audio):
        try:
            video_seconds(clip.audio, *stretch)
        except AudioError:
            audio_seconds(clip.audio, *stretch)  # a film's container may hold sound alone
    else:
        audio_seconds(clip.audio, *stretch)
        video_seconds(clip.video, *stretch)
    members = {}
    if clip.audio != clip.video:
        members[_suffix(clip.audio)] = Path(clip.audio).read_bytes()
    if clip.video:
        members[VIDEO + Path(clip.video).suffix.lower()] = Path(clip.video).read_bytes()
    return members


def _sound(clip: Clip) -> dict[str, bytes]:
    """The file that a shard holds of a clip without pictures, by suffix. Raises AudioError."""
    audio_seconds(clip.audio, clip.start, clip.end)
    if clip.start is None and clip.end is None:
        return {_suffix(clip.audio): Path(clip.audio).read_bytes()}
    rate = audio_rate(clip.audio)
    file = io.BytesIO()
    waveform_S = load_audio(clip.audio, rate, clip.start, clip.end)
    soundfile.write(file, waveform_S.numpy(), rate, format="AU", subtype="FLOAT")
    return {".au": file.getvalue()}


def _suffix(audio: str) -> str:
    """Of the member that holds a sound. Decoders look at the bytes; of one with another suffix nobody would know that
    it is a sound (`.wave`, or none at all)."""
    suffix = Path(audio).suffix.lower()
    return suffix if suffix in EXTENSIONS else ".wav"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
