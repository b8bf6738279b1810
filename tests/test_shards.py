from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from calm_pl.audio import AudioError, load_audio
from calm_pl.clip import Clip
from calm_pl.data.archives import shard_urls
from calm_pl.data.shard_writer import write_shards
from calm_pl.data.shards import ShardClip, ShardClips
from calm_pl.headstore import HeadStore

pytest.importorskip("webdataset")
RATE = 16_000


def make_clips(folder: Path, count: int, kinds: tuple[str, ...] = (".wav", ".flac", ".ogg")) -> list[Clip]:
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for index in range(count):
        path = folder / f"{index}{kinds[index % len(kinds)]}"
        samples = np.random.default_rng(index).uniform(-0.5, 0.5, (1600 + 10 * index, 2))
        soundfile.write(path, samples, 8_000 if index % 2 else 22_050)
        clips.append(Clip(str(path), label=f"class {index % 3}", group=str(index), split="train"))
    return clips


def heard(clip: Clip) -> torch.Tensor:
    return load_audio(clip.audio, RATE, clip.start, clip.end)


def stream(
    urls: str | list[str], share: tuple[int, int] = (0, 1), workers: int = 0
) -> tuple[list[ShardClip[torch.Tensor]], list[str]]:
    """The clips and the errors of one rank, read by real DataLoader workers."""
    clips, errors = [], []
    for item in DataLoader(ShardClips(urls, heard, share=share), batch_size=None, num_workers=workers):
        if isinstance(item, AudioError):
            errors.append(str(item))
        else:
            clips.append(item)
    return clips, errors


def pattern(shards: list[Path]) -> str:
    return f"{shards[0].parent}/clips-{{{shards[0].stem[6:]}..{shards[-1].stem[6:]}}}.tar"


def test_every_clip_once_over_two_ranks_of_two_workers(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 23)
    shards, errors = write_shards(clips, tmp_path / "shards", per_shard=3)
    assert (len(shards), errors) == (8, [])
    groups: Counter[str | None] = Counter()
    for rank in range(2):
        mine, broken = stream(pattern(shards), share=(rank, 2), workers=2)
        assert broken == []
        assert mine
        groups.update(item.clip.group for item in mine)
    assert groups == Counter(clip.group for clip in clips)


def test_a_clip_comes_as_it_is_heard_from_its_file(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 6)
    clips += [Clip(clips[0].audio, ("a", "b"), question="Which?", options=("a", "b", "c"), start=0.01, end=0.05)]
    clips += [Clip(clips[1].audio, "a", start=0.03, confidence=0.7), Clip(clips[2].audio, end=0.02)]
    shards, _ = write_shards(clips, tmp_path / "shards", per_shard=4)
    read, _ = stream([str(path) for path in shards])
    for item, clip in zip(read, clips, strict=True):
        assert torch.equal(item.content, heard(clip))
        for name in ("label", "confidence", "group", "split", "question", "options"):
            assert getattr(item.clip, name) == getattr(clip, name)
    assert [item.key for item in read[:6]] == HeadStore({}, tmp_path).clip_keys(clips[:6])
    assert len({item.key for item in read}) == len(clips)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_broken_members_are_named_and_the_rest_is_heard(tmp_path: Path) -> None:
    sound = Path(make_clips(tmp_path / "audio", 1)[0].audio).read_bytes()
    shard = tmp_path / "mixed.tar"
    with tarfile.open(shard, "w") as archive:
        add(archive, "set/1.wav", sound)
        add(archive, "set/1.txt", b"dog\n")
        add(archive, "set/2.wav", b"no sound at all")
        add(archive, "set/3.jpg", b"a picture")
        add(archive, "set/4.wav", sound[: len(sound) // 2])
        add(archive, "set/5.wav", sound)
        add(archive, "set/5.json", b"{")
        add(archive, "set/6.WAV", sound)
        add(archive, "set/6.json", json.dumps({"label": 7, "caption": "unknown here"}).encode())
        add(archive, "set/7.wav", sound)
        add(archive, "set/7.json", b'["dog"]')
        add(archive, "set/8.wav", sound)
    clips, errors = stream(str(shard))
    assert [(item.clip.audio, item.clip.label) for item in clips] == [
        (f"{shard}/set/1.wav", "dog"),
        (f"{shard}/set/6.wav", "7"),
        (f"{shard}/set/8.wav", None),
    ]
    assert len(errors) == 5
    for error, name in zip(errors, ("2.wav", "3", "4.wav", "5.wav", "7.wav"), strict=True):
        assert error.startswith(f"{shard}/set/{name}: ")


@pytest.mark.parametrize("kept", [0, 512, 700, 0.5, "members"])
def test_a_shard_that_ends_early_is_named(tmp_path: Path, kept: float | str) -> None:
    shards, _ = write_shards(make_clips(tmp_path / "audio", 6, (".wav",)), tmp_path / "shards", per_shard=3)
    content = shards[0].read_bytes()
    with tarfile.open(shards[0]) as archive:
        second = archive.getmembers()[2].offset  # a cut between two members looks like an end
    length = second if kept == "members" else int(kept * len(content) if kept == 0.5 else kept)
    shards[0].write_bytes(content[:length])
    clips, errors = stream([str(path) for path in shards])
    assert {item.clip.group for item in clips} >= {"3", "4", "5"}
    assert len(errors) == 1
    assert errors[0].startswith(f"{shards[0]}: the shard cannot be read to its end")


def test_a_damaged_header_is_not_the_end_of_a_shard(tmp_path: Path) -> None:
    (shard,), _ = write_shards(make_clips(tmp_path / "audio", 3, (".wav",)), tmp_path / "shards")
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        start = archive.getmembers()[4].offset
    content[start : start + 512] = b"\x01" * 512
    shard.write_bytes(content + bytes(1 << 20))  # more than a pipe holds
    for address in (str(shard), f"pipe:cat {shlex.quote(str(shard))} || exit 3"):  # fails, as nobody reads on
        clips, errors = stream(address)
        assert [item.clip.group for item in clips] == ["0", "1"]  # also that right before the damage
        assert len(errors) == 1 and "damaged header" in errors[0]


def test_addresses(tmp_path: Path) -> None:
    shards, _ = write_shards(make_clips(tmp_path / "audio", 4), tmp_path / "shards", per_shard=2)
    piped = f"pipe:cat {shlex.quote(str(shards[0]))}"
    half = f"pipe:cat {shlex.quote(str(shards[1]))} && exit 3"
    gone = [half, "pipe:cat nowhere.tar", str(tmp_path / "gone.tar")]
    clips, errors = stream([piped, f"file:{shards[1]}"])
    assert ([item.clip.group for item in clips], errors) == (["0", "1", "2", "3"], [])
    clips, errors = stream(gone)
    assert [item.clip.group for item in clips] == ["2", "3"]  # printed whole before the command failed
    assert [error.split(": the shard")[0] for error in errors] == gone


def test_compressed_shards(tmp_path: Path) -> None:
    sound = Path(make_clips(tmp_path / "audio", 1)[0].audio).read_bytes()
    for name in ("whole.tar.gz", "cut.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            add(archive, "1.wav", sound)
            add(archive, "2.wav", random.Random(0).randbytes(50_000))
    packed = bytearray((tmp_path / "whole.tar.gz").read_bytes())
    packed[-8] ^= 1  # of the checksum
    (tmp_path / "changed.tar.gz").write_bytes(packed)
    assert str(tmp_path / "changed.tar.gz") in stream([str(tmp_path / "changed.tar.gz")])[1][-1]
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "cut.tar.gz").read_bytes()[:-20_000])
    clips, errors = stream([str(tmp_path / "whole.tar.gz"), str(tmp_path / "cut.tar.gz")])
    assert [item.clip.audio for item in clips] == [f"{tmp_path}/whole.tar.gz/1.wav"]
    assert [error.split(": ")[0] for error in errors] == [f"{tmp_path}/whole.tar.gz/2.wav", f"{tmp_path}/cut.tar.gz"]


def shard_of(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            add(archive, name, content)
    return path.read_bytes()


@pytest.fixture
def sound(tmp_path: Path) -> bytes:
    return Path(make_clips(tmp_path / "audio", 1)[0].audio).read_bytes()


def names(clips: list[ShardClip[torch.Tensor]]) -> list[str]:
    return [Path(item.clip.audio).name for item in clips]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (("a_0.5s.wav", "a_0.7s.wav"), "a_0.5s.wav: 2 sounds share the name up to the first dot (.5s.wav, .7s.wav)"),
        (("a_0.5s.mp4", "a_0.7s.mp4"), "a_0.5s.mp4: 2 films share the name up to the first dot"),
        (("a_0.mp4", "a_0.5s.wav", "a_0.7s.wav"), "a_0.5s.wav: 2 sounds share the name"),
        (("a.wav", "a.wav"), "a.wav: 2 members have this name"),
        (("a_0.5s.wav", "a_0.5s.txt"), "a_0.5s.wav: the name ends at its first dot, so .5s.txt is not seen"),
    ],
)
def test_sounds_that_share_a_name_are_an_error(
    tmp_path: Path, sound: bytes, members: tuple[str, ...], message: str
) -> None:
    shard_of(tmp_path / "x.tar", [(name, sound) for name in (*members, "b.wav")])
    clips, errors = stream(str(tmp_path / "x.tar"))
    assert names(clips) == ["b.wav"]
    assert len(errors) == 1 and errors[0].startswith(f"{tmp_path}/x.tar/{message}")


def test_hidden_files_are_passed_over(tmp_path: Path, sound: bytes) -> None:
    members = [(name, sound) for name in ("._a.wav", "a.wav", "set/.DS_Store", "set/._b.wav", "set/b.wav")]
    shard_of(tmp_path / "x.tar", members)
    clips, errors = stream(str(tmp_path / "x.tar"))
    assert (names(clips), errors) == (["a.wav", "b.wav"], [])


def in_two_parts(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: pack(content[:3000]) + pack(content[3000:])


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_shards_are_told_by_their_bytes(tmp_path: Path, sound: bytes, pack: Callable[[bytes], bytes]) -> None:
    content = shard_of(tmp_path / "x.tar", [("1.wav", sound), ("1.txt", b"dog"), ("2.wav", sound)])
    (tmp_path / "packed.tar").write_bytes(in_two_parts(pack)(content))  # as pbzip2 packs
    (tmp_path / "plain.tar.bz2").write_bytes(content)
    (tmp_path / "cut.tar.bz2").write_bytes(pack(content[:-10_240]))  # an archive without its end, packed whole
    (tmp_path / "broken.tar.gz").write_bytes(pack(content)[:-20])
    piped = f"pipe:cat {shlex.quote(str(tmp_path / 'plain.tar.bz2'))}"
    for whole in (str(tmp_path / "packed.tar"), str(tmp_path / "plain.tar.bz2"), piped):
        clips, errors = stream(whole)
        assert (names(clips), errors) == (["1.wav", "2.wav"], [])
    _, errors = stream([str(tmp_path / "cut.tar.bz2"), str(tmp_path / "broken.tar.gz")])
    assert [error.split(":")[0] for error in errors] == [f"{tmp_path}/cut.tar.bz2", f"{tmp_path}/broken.tar.gz"]


def test_of_zstd_the_way_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    _, errors = stream([str(tmp_path / "x.tar.zst"), f"pipe:cat {shlex.quote(str(tmp_path / 'x.tar.zst'))} && exit 3"])
    assert len(errors) == 2 and all("zstd: use pipe:zstd -dc FILE" in error for error in errors)


def test_archives_joined_by_cat_are_told_and_the_first_is_heard(tmp_path: Path, sound: bytes) -> None:
    content = shard_of(tmp_path / "x.tar", [("1.wav", sound), ("2.wav", sound)])
    (tmp_path / "joined.tar").write_bytes(content + content)
    for address in (str(tmp_path / "joined.tar"), f"pipe:cat {shlex.quote(str(tmp_path / 'joined.tar'))}"):
        clips, errors = stream(address)
        assert names(clips) == ["1.wav", "2.wav"]
        assert len(errors) == 1 and errors[0].startswith(address) and "archives joined by cat" in errors[0]
    (tmp_path / "long.tar").write_bytes(content + bytes(20_000))  # padded by a tape
    assert stream(str(tmp_path / "long.tar"))[1] == []


def test_a_last_clip_that_may_lack_its_label_is_left_out(tmp_path: Path, sound: bytes) -> None:
    members = [(f"{number}{suffix}", sound) for number in (1, 2) for suffix in (".wav", ".txt")]
    content = shard_of(tmp_path / "x.tar", [(name, b"dog" if ".txt" in name else data) for name, data in members])
    with tarfile.open(tmp_path / "x.tar") as archive:
        label = archive.getmembers()[3].offset
    for length, kept in ((label, ["1.wav"]), (label + 1024, ["1.wav", "2.wav"])):
        (tmp_path / "x.tar").write_bytes(content[:length])
        clips, errors = stream(str(tmp_path / "x.tar"))
        assert names(clips) == kept
        assert len(errors) == 1 and "it has no end mark" in errors[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"label": {"a": 1}}', "a.wav: its JSON: label must be a text, found {'a': 1}"),
        ("a.json", b'{"label": ["low", null]}', "a.wav: its JSON: label must be a text, found None"),
        ("a.json", b'{"label": "low", "label": "up"}', "a.wav: its JSON: 'label' is there 2 times"),
        ("a.json", b'{"split": "dev"}', "a.wav: its JSON: split 'dev' is none of train, val, test"),
        ("a.json", b'{"end": 0}', "a.wav: its JSON: end 0 s is not after start 0 s"),
        ("a.json", b"\xff", "a.json: it is not UTF-8 text"),
        ("a.txt", b"caf\xe9", "a.txt: it is not UTF-8 text"),
    ],
)
def test_what_is_known_of_a_clip_is_checked_as_in_a_manifest(
    tmp_path: Path, sound: bytes, name: str, content: bytes, message: str
) -> None:
    shard_of(tmp_path / "x.tar", [("a.wav", sound), (name, content)])
    clips, errors = stream(str(tmp_path / "x.tar"))
    assert clips == []
    assert len(errors) == 1 and errors[0].startswith(f"{tmp_path}/x.tar/{message}")


def test_a_blank_text_is_no_label(tmp_path: Path, sound: bytes) -> None:
    shard_of(tmp_path / "x.tar", [("a.wav", sound), ("a.txt", b""), ("b.wav", sound), ("b.cls", b" \n")])
    clips, errors = stream(str(tmp_path / "x.tar"))
    assert ([item.clip.label for item in clips], errors) == ([None, None], [])


def test_a_label_beside_json_without_one_is_read(tmp_path: Path, sound: bytes) -> None:
    about = b'{"group": "g", "caption": "a dog"}'
    members = [("a.wav", sound), ("a.json", about), ("a.txt", b"a dog barks"), ("a.cls", b"dog")]
    shard_of(tmp_path / "x.tar", [*members, ("b.wav", sound), ("b.json", b'{"label": "cat"}'), ("b.txt", b"dog")])
    clips, errors = stream(str(tmp_path / "x.tar"))
    assert ([(item.clip.label, item.clip.group) for item in clips], errors) == ([("dog", "g"), ("cat", None)], [])


def test_labels_apart_from_their_sounds_are_told(tmp_path: Path, sound: bytes) -> None:
    shard_of(tmp_path / "x.tar", [("a.wav", sound), ("b.wav", sound), ("a.txt", b"dog"), ("b.txt", b"cat")])
    _, errors = stream(str(tmp_path / "x.tar"))
    assert len(errors) == 2 and all("stand next to each other: tar --sort=name" in error for error in errors)


def test_an_unknown_scheme_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^hdfs://x/y\.tar: .*https.*pipe.*s3.*pipe:hdfs dfs -cat"):
        shard_urls(["clips.tar", "hdfs://x/y.tar"])
    known = ["s3://a/b.tar", "https://a/b.tar", "pipe:hdfs dfs -cat hdfs://x/y.tar", "file:a.tar", "./a:b.tar"]
    assert shard_urls(known) == known


class Missing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_failed_commands_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Missing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.tar"
        found = stream(address)[1]
        server.shutdown()
    found += stream([address, "pipe:cat nowhere.tar"])[1]
    told = ("curl ended with 22 (an HTTP error such as 404)", "curl ended with 7 (the host cannot be reached)")
    for error, message in zip(found, (*told, "cat ended with 1"), strict=True):
        assert f"({message}); clips are missing" in error


def test_stopping_early_is_no_error(tmp_path: Path) -> None:
    shards, _ = write_shards(make_clips(tmp_path / "audio", 30, (".wav",)), tmp_path / "shards")
    clips = iter(ShardClips(f"pipe:cat {shlex.quote(str(shards[0]))}", heard))
    assert isinstance(next(clips), ShardClip)
    clips.close()  # type: ignore[attr-defined]


# calm shards make


def test_a_checksum_beside_a_shard_is_no_shard(tmp_path: Path) -> None:
    write_shards(make_clips(tmp_path / "audio", 2), tmp_path / "out")
    (tmp_path / "out" / "clips-000000.tar.md5").write_text("0123  clips-000000.tar")
    assert [Path(url).name for url in shard_urls(str(tmp_path / "out"))] == ["clips-000000.tar"]


def test_links_in_an_archive_are_told_and_the_others_heard(tmp_path: Path) -> None:
    (clip,) = make_clips(tmp_path / "sounds", 1)
    with tarfile.open(tmp_path / "linked.tar", "w") as archive:
        archive.add(clip.audio, "1.wav")
        for name, kind in (("2.wav", tarfile.LNKTYPE), ("3.wav", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "1.wav"
            archive.addfile(link)
        archive.add(clip.audio, "4.wav")
    clips, errors = stream([str(tmp_path / "linked.tar")])
    assert [Path(item.clip.audio).name for item in clips] == ["1.wav", "4.wav"]
    assert len(errors) == 1 and "2 of its members are links, such as 2.wav" in errors[0]
