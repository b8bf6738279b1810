"""The example that builds real sets from packages: unpacked packages that are there are not fetched again."""

from __future__ import annotations

from pathlib import Path

import pytest

from calm_pl.data import read_manifest
from examples import real_sets
from tests.conftest import tone

LAYOUT = {
    "words": ("ktuberling-data/usr/share/ktuberling/sounds/{label}/{number}.wav", ("da", "uk"), 20),
    "samples": ("sonic-pi-samples/usr/share/sonic-pi/samples/{label}_tick{number}.flac", ("elec", "tabla"), 8),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_classes_with_enough_clips_become_a_manifest(name: str, tmp_path: Path):
    pattern, labels, enough = LAYOUT[name]
    sizes = dict(zip((*labels, "rare"), (enough, real_sets.MAX_CLIPS + 3, enough - 1), strict=True))
    for label, count in sizes.items():
        for number in range(count):
            tone(tmp_path / "packages" / pattern.format(label=label, number=number), 300 + number, seconds=0.1)
    clips = read_manifest(real_sets.build(name, tmp_path))
    found = [clip.label for clip in clips]
    assert {label: found.count(label) for label in found} == {labels[0]: enough, labels[1]: real_sets.MAX_CLIPS}
    assert all(Path(clip.audio).exists() for clip in clips)
    groups = {clip.group for clip in clips if clip.label == labels[0]}
    # Takes of one studio sound, told by their numbers, are one source; words are sources of their own.
    assert len(groups) == (1 if name == "samples" else enough)
