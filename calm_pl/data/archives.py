"""Tar archives at an address, as streams of their members: local ones, remote ones, and what a command prints.

An archive that breaks off, is damaged, or goes on after its end is an error, but only after all that was whole.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shlex
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

_PACKED: dict[bytes, Callable[[Any], Any]] = {  # by how the archive begins; addresses are called anything
    rb"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    rb"BZh[1-9]1AY&SY": bz2.BZ2File,
    rb"\xfd7zXZ\0|\]\0\0\x80": lzma.LZMAFile,
}
_NAMED_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|lzma|zst))?|tgz|tbz2|txz)$")  # in a folder; no checksums beside them
_ZSTD = b"\x28\xb5\x2f\xfd"
# What reading an archive that is damaged or breaks off raises.
BROKEN = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
_CURL_ENDED = {
    6: "the host cannot be reached",
    7: "the host cannot be reached",
    18: "broken off",
    22: "an HTTP error such as 404",
}


def shard_urls(urls: str | Sequence[str]) -> list[str]:
    """The shards that addresses name: braces are expanded, and a folder stands for its tar files.

    Raises:
        ImportError: `webdataset` is not installed.
        ValueError: an address has a scheme that nothing here can read.
    """
    try:
        from webdataset.gopen import gopen_schemes, rewrite_url
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("reading shards needs webdataset: pip install 'calm-pl[shards]'") from error
    found: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        if os.path.isdir(pattern):
            found += sorted(str(file) for file in Path(pattern).iterdir() if _NAMED_TAR.search(file.name))
        else:
            found += expand_urls(pattern)
    schemes = {"file", "s3", *gopen_schemes} - {"__default__"}
    for url in found:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", rewrite_url(url))
        if scheme and scheme[1] not in schemes:
            raise ValueError(
                f"{url}: nothing here reads {scheme[1]}: (but {', '.join(sorted(schemes))}); a command that prints the "
                "archive does too, such as 'pipe:hdfs dfs -cat hdfs://host/clips.tar'"
            )
    return found


def samples(url: str, links: list[str]) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The members of each clip, by lower-case suffix.

    Of an archive that breaks off, the last clip comes too if it has as many members as any before it, and at least a
    sound and what is known of it: with fewer, it might lack its label or the stretch that it is.

    Raises:
        OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError: see `_members`; after the last clip.
    """
    held: list[tuple[str, bytes]] = []
    last, most = "", 2
    try:
        for member in _members(url, links):
            if held and (member is None or member[0] != last):
                whole, held, most = held, [], max(most, len(held))
                yield last, whole
            if member is not None:
                last, suffix, data = member
                held.append((suffix, data))
    except BROKEN:
        if len(held) >= most:
            yield last, held
        raise


def _members(url: str, links: list[str]) -> Iterator[tuple[str, str, bytes] | None]:
    """Sample name, lower-case suffix and content of each file in an archive, and None at its end mark; `links` gets the
    names of those that are links, which a stream cannot follow. Hidden files (of macOS: `._x`) are passed over.

    Raises:
        OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError: it cannot be opened, is damaged, ends early or
            goes on after its end mark.
    """
    from webdataset.gopen import gopen, set_options

    # webdataset knows http(s) and gs, but not s3.
    stream = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)
    set_options(stream, ignore_errors=True)  # of a command that fails, all that it printed is read first
    with (
        _Source(stream) as source,
        tarfile.open(fileobj=source.unpacked(), mode="r|", tarinfo=_Member) as archive,
    ):
        for info in archive:
            folder, name = os.path.split(info.name)
            if name.startswith("."):
                continue
            if info.islnk() or info.issym():
                links.append(info.name)
            elif file := archive.extractfile(info):
                sample, dot, suffix = name.partition(".")
                yield os.path.join(folder, sample), dot + suffix.lower(), file.read()
        yield None
        rest: IO[bytes] = archive.fileobj  # type: ignore[assignment]
        second = rest.read(tarfile.BLOCKSIZE)
        more = bool(second.strip(b"\0"))
        while data := rest.read(1 << 16):
            more = more or bool(data.strip(b"\0"))
        source.drain()
        if more:
            raise EOFError("more follows its end mark, as of archives joined by cat: give each its own address")
        if len(second) < tarfile.BLOCKSIZE:
            raise EOFError("it has no end mark")


class _Member(tarfile.TarInfo):
    """A damaged or missing header is an error: tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Member:  # type: ignore[override]
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header: {error}") from error


class _Source:
    """Reads a stream to the end, where a failed download shows."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.head = stream.read(10)
        self.over = False

    def unpacked(self) -> Any:
        """What was packed, or the stream itself: tarfile unpacks too, but looks at no checksum, and at no second part.

        Raises:
            OSError: it is packed as Python cannot unpack.
        """
        if self.head.startswith(_ZSTD):
            raise OSError("packed by zstd: use pipe:zstd -dc FILE")
        unpack = next((unpack for begin, unpack in _PACKED.items() if re.match(begin, self.head)), None)
        return unpack(self) if unpack else self

    def read(self, size: int) -> bytes:
        begun, self.head = self.head[:size], self.head[size:]
        data = begun + self.stream.read(size - len(begun))
        self.over = not data
        return data

    def drain(self) -> None:
        while self.read(1 << 16):
            pass

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stream.close()
        failed = getattr(self.stream, "status", 0) not in getattr(self.stream, "ignore_status", [0])
        # A command that nobody reads on from fails rightly.
        if failed and self.over and kind is not GeneratorExit:
            raise OSError(_how_ended(self.stream))


def _how_ended(pipe: Any) -> str:
    """How a command ended, in words."""
    (command,), _ = pipe.args
    name = (command.split() if isinstance(command, str) else command)[0]
    meaning = _CURL_ENDED.get(pipe.status) if name == "curl" else None
    return f"{name} ended with {pipe.status}" + (f" ({meaning})" if meaning else "")
