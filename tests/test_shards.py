from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shlex
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from calm_pl.audio import AudioError, load_audio
from calm_pl.clip import Clip
from calm_pl.commands.shards import main
from calm_pl.data.manifest import write_manifest
from calm_pl.data.shards import ShardClip, ShardClips, write_shards
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
    clips += [Clip(clips[1].audio, start=0.03), Clip(clips[2].audio, end=0.02)]
    shards, _ = write_shards(clips, tmp_path / "shards", per_shard=4)
    read, _ = stream([str(path) for path in shards])
    for item, clip in zip(read, clips, strict=True):
        assert torch.equal(item.content, heard(clip))
        for name in ("label", "group", "split", "question", "options"):
            assert getattr(item.clip, name) == getattr(clip, name)
    assert [item.key for item in read[:6]] == HeadStore({}, tmp_path).clip_keys(clips[:6])
    assert len({item.key for item in read}) == len(clips)


def test_equal_clips_give_equal_archives(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 3)
    clips.append(Clip(clips[0].audio, start=0.02))
    digests = []
    for name in ("one", "two"):
        (shard,), _ = write_shards(clips, tmp_path / name)
        digests.append(hashlib.sha256(shard.read_bytes()).hexdigest())
        os.utime(clips[0].audio, (0, 0))
    assert digests[0] == digests[1]


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
    shard.write_bytes(content)
    clips, errors = stream(str(shard))
    assert [item.clip.group for item in clips] == ["0"]
    assert len(errors) == 1 and "damaged header" in errors[0]


def test_addresses(tmp_path: Path) -> None:
    shards, _ = write_shards(make_clips(tmp_path / "audio", 4), tmp_path / "shards", per_shard=2)
    piped = f"pipe:cat {shlex.quote(str(shards[0]))}"
    half = f"pipe:cat {shlex.quote(str(shards[1]))} && exit 3"
    gone = [half, "pipe:cat nowhere.tar", str(tmp_path / "gone.tar")]
    clips, errors = stream([piped, f"file:{shards[1]}"])
    assert ([item.clip.group for item in clips], errors) == (["0", "1", "2", "3"], [])
    _, errors = stream(gone)
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


def test_stopping_early_is_no_error(tmp_path: Path) -> None:
    shards, _ = write_shards(make_clips(tmp_path / "audio", 30, (".wav",)), tmp_path / "shards")
    clips = iter(ShardClips(f"pipe:cat {shlex.quote(str(shards[0]))}", heard))
    assert isinstance(next(clips), ShardClip)
    clips.close()  # type: ignore[attr-defined]


# calm shards make


def test_make_leaves_out_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = make_clips(tmp_path / "audio", 5)
    Path(clips[1].audio).write_bytes(b"")
    Path(clips[3].audio).unlink()
    write_manifest(clips, tmp_path / "clips.jsonl")
    assert main(["make", str(tmp_path / "clips.jsonl"), str(tmp_path / "out"), "--per-shard", "2"]) == 1
    output = capsys.readouterr().out
    assert clips[1].audio in output
    assert clips[3].audio in output
    address = output.splitlines()[-1].split(" clips in ")[1].split(",")[0]
    read, errors = stream(address)
    assert [item.clip.group for item in read] == ["0", "2", "4"]
    assert errors == []


def test_make_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(make_clips(tmp_path / "audio", 2), tmp_path / "clips.jsonl")
    arguments = ["make", str(tmp_path / "clips.jsonl"), str(tmp_path / "out")]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "clips-000000.tar").read_bytes()
    for wrong, message in ((arguments, "clips-000000.tar exists"), (["make", "nowhere.jsonl", "out"], "nowhere.jsonl")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "clips-000000.tar").read_bytes() == before


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
