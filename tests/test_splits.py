from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.data import Clip
from calm_pl.data.splits import check_disjoint, draw_support, split_clips, without_repeats


def pool(counts: dict[str, int], groups: int | None = None) -> list[Clip]:
    """Clips of every class; with `groups`, each class is spread over that many sources of its own."""
    return [
        Clip(f"/{label}/{n}.wav", label, group=f"{label}-{n % groups}" if groups else None)
        for label, count in counts.items()
        for n in range(count)
    ]


counts = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(6, 30), min_size=1)
seeds = st.integers(0, 2**32)


@given(counts, st.integers(1, 6), seeds)
def test_support_is_stratified_and_nested(counts: dict[str, int], shots: int, seed: int) -> None:
    clips = pool(counts)
    drawn = draw_support(clips, shots, seed)
    assert Counter(clips[index].label for index in drawn) == dict.fromkeys(counts, shots)
    assert len(set(drawn)) == len(drawn)
    assert set(draw_support(clips, 1, seed)) <= set(drawn) <= set(draw_support(clips, None, seed))
    assert drawn == draw_support(clips, shots, seed)


@given(counts, seeds, st.randoms())
def test_a_class_draws_the_same_whatever_other_classes_there_are(counts, seed, random) -> None:
    clips = pool(counts)
    labels = sorted(counts)
    kept = random.sample(labels, random.randint(1, len(labels)))
    random.shuffle(kept)
    fewer = [clip for label in kept for clip in clips if clip.label == label]
    drawn = {clips[index] for index in draw_support(clips, 3, seed)}
    assert {fewer[index] for index in draw_support(fewer, 3, seed)} == {c for c in drawn if c.label in kept}


@given(st.integers(1, 12), seeds)
def test_support_covers_groups_before_it_repeats_one(shots: int, seed: int) -> None:
    clips = pool({"dog": 12, "cat": 12}, groups=4)
    drawn = [clips[index] for index in draw_support(clips, shots, seed)]
    for label in ("dog", "cat"):
        sizes = Counter(clip.group for clip in drawn if clip.label == label)
        assert len(sizes) == min(shots, 4)
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_seeds_differ() -> None:
    clips = pool({"dog": 30})
    assert len({tuple(draw_support(clips, 5, seed)) for seed in range(20)}) > 15


def test_the_draw_never_changes() -> None:
    assert draw_support(pool({"dog": 30, "cat": 30}), 3, seed=0) == [46, 50, 51, 25, 19, 5]


def test_every_label_of_multi_label_clips_gets_its_shots() -> None:
    clips = [Clip(f"/{n}.wav", ("a", "b") if n % 2 else ("b", "c")) for n in range(20)]
    for shots in (1, 3):
        drawn = draw_support(clips, shots, seed=0)
        assert len(set(drawn)) == len(drawn)
        found = Counter(label for index in drawn for label in clips[index].labels)
        assert min(found[label] for label in "abc") >= shots


def test_too_few_clips_are_listed() -> None:
    with pytest.raises(ValueError, match=r"5 shots need .* fewer: cat \(2\), owl \(4\); ask for 2 shots"):
        draw_support(pool({"dog": 9, "owl": 4, "cat": 2}), 5, seed=0)


def test_support_errors() -> None:
    with pytest.raises(ValueError, match=r"/a\.wav: has no label"):
        draw_support([Clip("/a.wav")], 1, seed=0)
    with pytest.raises(ValueError, match="shots is 0"):
        draw_support(pool({"dog": 3}), 0, seed=0)


@given(counts, st.sampled_from([None, 2, 3, 5]), st.floats(0.05, 0.95), seeds)
def test_a_split_is_stratified_and_keeps_groups_together(counts, groups, fraction, seed) -> None:
    clips = pool(counts, groups)
    parted = split_clips(clips, fraction, seed)
    assert [replace(clip, split=None) for clip in parted] == clips
    train, test = ([clip for clip in parted if clip.split == split] for split in ("train", "test"))
    check_disjoint(train, test)
    for label, count in counts.items():
        tested = sum(clip.label == label for clip in test)
        largest = 1 if groups is None else -(-count // groups)
        assert 1 <= tested <= count - 1
        assert abs(tested - fraction * count) <= max(1, largest)
        if groups is None:
            assert tested == min(max(1, round(fraction * count)), count - 1)
    assert parted == split_clips(clips, fraction, seed)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), min_size=2, max_size=40), seeds)
def test_groups_of_several_classes_stay_on_one_side(rows: list[tuple[str, int]], seed: int) -> None:
    clips = [Clip(f"/{n}.wav", label, group=str(group)) for n, (label, group) in enumerate(rows)]
    try:
        parted = split_clips(clips, 0.3, seed)
    except ValueError as error:
        assert "without a group on both sides" in str(error)
        return
    check_disjoint(*([clip for clip in parted if clip.split == split] for split in ("train", "test")))
    assert {(clip.split, clip.label) for clip in parted} == {
        (split, label) for split in ("train", "test") for label, _ in rows
    }


@given(seeds)
def test_a_share_that_the_groups_allow_is_met(seed: int) -> None:
    clips = [Clip(f"/{n}.wav", "dog", group=group) for n, group in enumerate("aa" + "b" * 10 + "cc")]
    assert sum(clip.split == "test" for clip in split_clips(clips, 4 / 14, seed)) == 4


def test_parts_of_one_file_stay_together() -> None:
    clips = [Clip(f"/{n // 4}.wav", "ab"[n % 2], start=n, end=n + 1) for n in range(40)]
    parted = split_clips(clips, 0.5, seed=0)
    assert all(len({clip.split for clip in parted if clip.audio == f"/{n}.wav"}) == 1 for n in range(10))


def test_classes_that_cannot_be_split_are_listed() -> None:
    clips = [*pool({"dog": 8}), *pool({"cat": 5}, groups=1), *pool({"owl": 1})]
    with pytest.raises(ValueError, match=r"cat \(5\), owl \(1\); add clips of another group"):
        split_clips(clips, 0.3, seed=0)
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="test_fraction"):
            split_clips(clips, fraction, seed=0)


def test_leaks_are_found() -> None:
    for count, named in ((1, "a"), (5, "a, b, c, d, e"), (6, "a, b, c, d, e and 1 more")):
        sides = ([Clip(f"/{side}{group}.wav", group=group) for group in "abcdef"[:count]] for side in "xy")
        with pytest.raises(ValueError, match=f"^{count} groups are in training and in test: {named}$"):
            check_disjoint(*sides)
    with pytest.raises(ValueError, match=r"1 test clips are also training clips: /a\.wav"):
        check_disjoint([Clip("/a.wav")], [Clip("/a.wav", start=3.0)])
    with pytest.raises(ValueError, match="also training clips"):
        check_disjoint([Clip("/a.wav", start=0, end=5)], [Clip("/a.wav", start=4, end=9)])
    first, second = Clip("/a.wav", start=0, end=5), Clip("/a.wav", start=5, end=9)
    check_disjoint([first], [second, Clip("/b.wav")])
    check_disjoint([second], [first])


def test_a_clip_listed_twice_counts_once() -> None:
    clips = [Clip("/a.wav", "dog"), Clip("/b.wav", "dog"), Clip("/a.wav", "dog"), Clip("/a.wav", "dog", start=1.0)]
    with pytest.warns(UserWarning, match=r"1 training clips are listed twice, and count once: /a\.wav"):
        assert without_repeats(clips) == [clips[0], clips[1], clips[3]]
    with pytest.raises(ValueError, match=r"/a\.wav: is listed as dog and as cat; where both are right"):
        without_repeats([Clip("/a.wav", "dog"), Clip("/a.wav", "cat")])
