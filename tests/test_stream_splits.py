"""Which clips of a stream a test counts: never those of training, and never none in silence."""

from __future__ import annotations

import tarfile
from dataclasses import replace

import pytest

from calm_pl.backbone.spec import Backbone
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Shards
from calm_pl.data.shards import write_shards
from calm_pl.data.stream import ShardBatches
from tests.test_shard_extraction import listen


def test_clips_of_other_splits_are_left_out_and_counted(tones, tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    write_shards(read_manifest(tones), tmp_path, per_shard=6)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    batches = list(ShardBatches(urls, Backbone(tiny_lalm), 4, split="test"))
    assert {clip.split for batch in batches for clip in batch.clips} == {"test"}
    counts = sum(len(batch) for batch in batches), sum(batch.left_out for batch in batches)
    assert counts == (9, 12)
    assert sum(len(batch) for batch in ShardBatches(urls, Backbone(tiny_lalm), 4)) == 21


def test_a_test_on_a_stream_counts_its_test_clips(tones, tiny_lalm, tmp_path, capsys):
    listen(Folder(str(tones)), tiny_lalm, tmp_path / "files", str(tmp_path / "heads"), fit=True)
    write_shards(read_manifest(tones), tmp_path / "tar", per_shard=6)
    listen(Shards(str(tmp_path / "tar")), tiny_lalm, tmp_path / "stream", "none")
    assert "12 clips of other splits than test were left out" in capsys.readouterr().err
    assert len((tmp_path / "stream" / "predictions.csv").read_text().splitlines()) == 1 + 9


@pytest.mark.parametrize("kind", ["empty", "training"])
def test_a_stream_without_a_clip_to_test_is_an_error(tones, tiny_lalm, tmp_path, kind):
    listen(Folder(str(tones)), tiny_lalm, tmp_path / "files", str(tmp_path / "heads"), fit=True)
    clips = [replace(clip, split="train") for clip in read_manifest(tones)[:2]] if kind == "training" else []
    (tmp_path / "tar").mkdir()
    if clips:
        write_shards(clips, tmp_path / "tar")
    else:
        tarfile.open(tmp_path / "tar" / "none.tar", "w").close()
    with pytest.raises(ValueError, match="no clip was heard"):
        listen(Shards(str(tmp_path / "tar")), tiny_lalm, tmp_path / "stream", "none")
