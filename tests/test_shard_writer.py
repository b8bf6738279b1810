"""Shards that are written from a manifest: what goes in, what is left out and told, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calm_pl.clip import Clip
from calm_pl.commands.shards import main
from calm_pl.data import shard_writer
from calm_pl.data.manifest import write_manifest
from calm_pl.data.shard_writer import write_shards
from tests.test_shards import heard, make_clips, stream

pytest.importorskip("webdataset")


def test_equal_clips_give_equal_archives(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 3)
    clips.append(Clip(clips[0].audio, start=0.02))
    digests = []
    for name in ("one", "two"):
        (shard,), _ = write_shards(clips, tmp_path / name)
        digests.append(hashlib.sha256(shard.read_bytes()).hexdigest())
        os.utime(clips[0].audio, (0, 0))
    assert digests[0] == digests[1]


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


def test_a_part_of_a_file_that_ffmpeg_decodes_is_heard_as_from_its_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.test_video import tone, write_sound

    clip = Clip(str(write_sound(tmp_path / "sound.m4a", "aac", "ipod", tone())), "a", start=0.2, end=0.6)
    _, errors = write_shards([clip], tmp_path / "out")
    (read,), not_heard = stream(str(tmp_path / "out"))
    assert errors == not_heard == [] and torch.equal(read.content, heard(clip))


@pytest.mark.parametrize("name", ["sound.wave", "sound", "sound.2"])
def test_a_sound_of_an_unknown_suffix_is_heard_all_the_same(tmp_path: Path, name: str) -> None:
    (clip,) = make_clips(tmp_path, 1)
    moved = Clip(str(Path(clip.audio).rename(tmp_path / name)), "a")
    assert write_shards([moved], tmp_path / "out")[1] == []
    (read,), errors = stream(str(tmp_path / "out"))
    assert errors == [] and torch.equal(read.content, heard(moved))


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


def test_an_interrupted_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = make_clips(tmp_path / "audio", 7)
    Path(clips[1].audio).write_bytes(b"no sound")
    whole, errors = write_shards(clips, tmp_path / "whole", per_shard=2)
    add, calls = shard_writer._add, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 8:  # two members a clip: within the third shard
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(shard_writer, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(clips, tmp_path / "again", per_shard=2)
    assert [file.name for file in sorted((tmp_path / "again").glob("*.tar"))] == [file.name for file in whole[:2]]
    for others, message in ((clips[::-1], "holds other clips than these"), (clips[:2], "clips-000001.tar exists")):
        with pytest.raises(FileExistsError, match=message):
            write_shards(others, tmp_path / "again", per_shard=2)
    calls.clear()
    again, told = write_shards(clips, tmp_path / "again", per_shard=2)
    assert len(calls) == 6  # of the last two shards
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in whole]
    assert list(map(str, told)) == list(map(str, errors)) and len(errors) == 1
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == [file.name for file in whole]
    with pytest.raises(FileExistsError, match="clips-000000.tar exists"):
        write_shards(clips, tmp_path / "again", per_shard=2)


def test_a_clip_that_can_be_read_by_now_is_not_left_out_in_silence(tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "audio", 2)
    sound = Path(clips[0].audio).read_bytes()
    Path(clips[0].audio).write_bytes(b"no sound")
    (shard,), _ = write_shards(clips, tmp_path / "out")
    (tmp_path / "out" / shard_writer.UNFINISHED).touch()
    Path(clips[0].audio).write_bytes(sound)
    with pytest.raises(FileExistsError, match=rf"{shard} lacks {clips[0].audio}, which can be read by now"):
        write_shards(clips, tmp_path / "out")


def test_a_full_disk_is_told_with_the_way_out(tmp_path: Path) -> None:
    write_manifest(make_clips(tmp_path / "audio", 4, (".wav",)), tmp_path / "clips.jsonl")
    make = [sys.executable, "-m", "calm_pl", "shards", "make", str(tmp_path / "clips.jsonl"), str(tmp_path / "out")]
    full = subprocess.run(["bash", "-c", 'ulimit -f 8; "$@"', "bash", *make], capture_output=True, text=True)
    assert full.returncode == 1 and "File too large: free some room, and run the same command again" in full.stderr
    assert f"{tmp_path}/out/clips-000000.tar" in full.stderr and "Traceback" not in full.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == [shard_writer.UNFINISHED]
    assert main(make[4:]) == 0 and len(stream(str(tmp_path / "out"))[0]) == 4


def test_make_takes_the_clips_of_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [Clip(clip.audio, split=split) for clip in make_clips(tmp_path / "a", 2) for split in ("train", "test")]
    write_manifest(clips, tmp_path / "clips.jsonl")
    arguments = ["make", str(tmp_path / "clips.jsonl")]
    assert (
        main([*arguments, str(tmp_path / "all")]) == main([*arguments, str(tmp_path / "one"), "--split", "test"]) == 0
    )
    for name, splits in (("all", ["train", "test"] * 2), ("one", ["test"] * 2)):
        assert [item.clip.split for item in stream(str(tmp_path / name))[0]] == splits
    for wrong, message in ((["--split", "val"], "no clip is of split val"), (["--per-shard", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            main([*arguments, str(tmp_path / "none"), *wrong])
        assert message in capsys.readouterr().err
