"""Data sets that fit nowhere: clips in WebDataset tar shards, read as a stream. `shard_writer` makes them.

A sample of a shard is a run of members that share a name up to its first dot: the sound or the film (`00000042.flac`,
`00000042.mp4`) or both, and what is known of it, as JSON with the fields of a `Clip` (`00000042.json`), its label alone
(`.cls` or `.txt`), or both. A clip's `video`, where it names one, is the member `00000042.video.mp4`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from calm_pl.audio import EXTENSIONS, VIDEO_EXTENSIONS, AudioError
from calm_pl.clip import Clip
from calm_pl.data.archives import BROKEN, samples, shard_urls
from calm_pl.data.manifest import clip_of_row, parsed_json
from calm_pl.headstore import clip_key

T = TypeVar("T")
Files = dict[str, bytes]

KNOWN = ("label", "confidence", "split", "group", "question", "options")
VIDEO = ".video"  # before the suffix of a file that a clip names as its video
_LABEL_SUFFIXES = (".cls", ".txt")
_ABOUT_SUFFIXES = (".json", *_LABEL_SUFFIXES)


@dataclass(frozen=True)
class ShardClip(Generic[T]):
    """One clip of a shard.

    Attributes:
        clip: `audio` and `video` are the shard's address and the member's name; nothing lies there on disk.
        content: what was decoded of it; before that, its files' bytes by `audio` and `video` (`Files`).
        key: the clip's key in a `HeadStore`; the same as of files with the same bytes.
    """

    clip: Clip
    content: T
    key: str


class ShardClips(IterableDataset[ShardClip[T] | AudioError]):
    """Streams the decoded clips of tar shards; memory holds one clip at a time.

    A clip that cannot be used, and a shard that cannot be opened or ends early, comes as an `AudioError` that names
    it, so that whoever loops can count it; the stream goes on with the next.

    Args:
        urls: one address or several; braces are expanded (`clips-{000..099}.tar`). A path, `https:`, `s3:` (by the
            `aws` tool), `gs:` (by `gsutil`), or `pipe:` and a shell command that prints the archive.
        load: decodes a clip of files, as `ClipProcessor.load` does; raises `AudioError` for one that cannot be used.
        pictures: whether films beside the sound are wanted; else they are passed over, and a film alone is its sound.
        share: (rank, world size). Whole shards are dealt to ranks, and those of a rank to its DataLoader's workers, so
            there should be at least as many shards as workers in all.

    Raises:
        ImportError: `webdataset` is not installed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        load: Callable[[Clip], T],
        pictures: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.urls = shard_urls(urls)
        self.load = load
        self.pictures = pictures
        self.share = share

    def __iter__(self) -> Iterator[ShardClip[T] | AudioError]:
        for shard in self.shards():
            for item in shard:
                yield item if isinstance(item, AudioError) else decoded(item, self.load)

    def shards(self) -> Iterator[Iterator[ShardClip[Files] | AudioError]]:
        """The clips of each shard that is this process's, not decoded yet; one shard at a time."""
        rank, world_size = self.share
        urls = self.urls[rank::world_size]
        if worker := get_worker_info():
            urls = urls[worker.id :: worker.num_workers]
        return map(self._shard, urls)

    def _shard(self, url: str) -> Iterator[ShardClip[Files] | AudioError]:
        links: list[str] = []
        try:
            for sample, members in samples(url, links):
                yield self._clip(f"{url}/{sample}", members)
        except BROKEN as error:
            yield AudioError(url, f"the shard cannot be read to its end ({error}); clips are missing")
        if links:
            yield AudioError(
                url, f"{len(links)} of its members are links, such as {links[0]}: write the files themselves (tar -h)"
            )

    def _clip(self, name: str, found: Sequence[tuple[str, bytes]]) -> ShardClip[Files] | AudioError:
        members = dict(found)
        try:
            _check_names(name, [suffix for suffix, _ in found])
            heard, seen = _heard_and_seen(members, self.pictures)
            if heard is None:
                apart = "; members of one name must stand next to each other: tar --sort=name"
                raise AudioError(
                    name,
                    f"no sound and no film among its members ({', '.join(members)})"
                    + (apart if set(members) <= set(_ABOUT_SUFFIXES) else ""),
                )
            clip = replace(_about(name, heard, members), audio=name + heard, video=seen and name + seen)
        except AudioError as error:
            return error
        files = {name + suffix: members[suffix] for suffix in (heard, seen) if suffix}
        digests = {address: hashlib.sha256(data).hexdigest() for address, data in files.items()}
        return ShardClip(clip, files, clip_key(clip, digests[clip.audio], digests[clip.video] if clip.video else None))


def decoded(item: ShardClip[Files], load: Callable[[Clip], T]) -> ShardClip[T] | AudioError:
    """Decode one clip; the error of one that cannot be used names the shard and the member."""
    clip = item.clip
    with tempfile.TemporaryDirectory() as folder:
        # The decoders look at a file from several sides, so they get files.
        paths: dict[str, str] = {}
        for address, data in item.content.items():
            paths[address] = os.path.join(folder, f"clip{len(paths)}{os.path.splitext(address)[1]}")
            Path(paths[address]).write_bytes(data)
        try:
            content = load(replace(clip, audio=paths[clip.audio], video=clip.video and paths[clip.video]))
        except AudioError as error:
            return AudioError(next(address for address, path in paths.items() if path == error.path), error.reason)
    return ShardClip(clip, content, item.key)


def _check_names(name: str, suffixes: Sequence[str]) -> None:
    """All after a name's first dot is suffix: `rain_0.5s.wav` and `rain_0.7s.wav` would be one clip, heard in part.

    Raises:
        AudioError: members of several clips share the name, or a label would not be seen.
    """
    for suffix, count in Counter(suffixes).items():
        if count > 1:
            raise AudioError(name + suffix, f"{count} members have this name: rename")
    heard = [suffix for suffix in suffixes if suffix.endswith(EXTENSIONS)]
    for kind, count in Counter(map(_kind, heard)).items():
        if count > 1:
            alike = [suffix for suffix in heard if _kind(suffix) == kind]
            raise AudioError(
                name + alike[0], f"{count} {kind} share the name up to the first dot ({', '.join(alike)}): rename"
            )
    for suffix in heard:
        stem = os.path.splitext(suffix)[0]
        about = next((stem + end for end in _ABOUT_SUFFIXES if stem + end in suffixes), None)
        if about and stem not in ("", VIDEO):
            raise AudioError(name + suffix, f"the name ends at its first dot, so {about} is not seen: rename")


def _kind(suffix: str) -> str:
    if suffix.startswith(VIDEO):
        return "films to see"
    return "films" if suffix.endswith(VIDEO_EXTENSIONS) else "sounds"


def _heard_and_seen(members: Mapping[str, bytes], pictures: bool) -> tuple[str | None, str | None]:
    """Which members are a clip's `audio` and `video`. A film alone is both, and is its `video` only if named so."""
    sounds = [suffix for suffix in members if suffix.endswith(EXTENSIONS) and not suffix.startswith(VIDEO)]
    sounds.sort(key=lambda suffix: suffix.endswith(VIDEO_EXTENSIONS))
    films = [suffix for suffix in members if suffix.startswith(VIDEO)]
    heard = next(iter([*sounds, *films]), None)
    films += [suffix for suffix in sounds if suffix.endswith(VIDEO_EXTENSIONS) and suffix != heard]
    return heard, films[0] if films and pictures else None


def _about(name: str, heard: str, members: Mapping[str, bytes]) -> Clip:
    """What is known of a clip from its members, checked as a manifest's line is; `audio` and `video` mean nothing yet.

    Raises:
        AudioError: its JSON does not describe a clip, or its label is no text.
    """
    row: dict[str, Any] = {}
    suffix = ""
    try:
        for suffix in (suffix for suffix in _ABOUT_SUFFIXES if suffix in members):
            text = members[suffix].decode("utf-8-sig")
            if suffix == ".json":
                known = parsed_json(text, "its JSON")
                if not isinstance(known, dict):
                    raise ValueError(f"its JSON: expected an object, found {known!r}")
                row = {field: known[field] for field in (*KNOWN, "start", "end") if field in known}
            elif text.strip() and row.get("label") is None:
                row["label"] = text.strip()
        return clip_of_row({**row, "audio": heard}, Path(), "its JSON", Counter())
    except UnicodeDecodeError:
        raise AudioError(name + suffix, "it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise AudioError(name + heard, f"its JSON: not JSON ({error})") from None
    except ValueError as error:
        raise AudioError(name + heard, str(error)) from None
