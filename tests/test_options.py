from __future__ import annotations

import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.clip import Clip
from calm_pl.data.options import mcq
from calm_pl.data.protocol import Protocol

LABELS = ["Dog bark", "Rain", "Rooster", "Fire crackling", "Sea waves"]
CLIPS = [Clip(f"/data/{n}.wav", LABELS[n % 5], "train") for n in range(40)]


@given(st.integers(2, 5), st.booleans(), st.integers(0, 2**32))
def test_the_true_label_is_one_of_the_options(num_options: int, letters: bool, seed: int) -> None:
    for before, after in zip(CLIPS, mcq(CLIPS, LABELS, num_options, letters, seed), strict=True):
        assert after.options is not None
        assert len(set(after.options)) == len(after.options) == num_options
        assert set(after.options) <= set(LABELS)
        assert before.label in after.options
        assert replace(after, question=None, options=None) == before


def test_it_is_written_as_the_published_code_writes_it() -> None:
    (clip,) = mcq([Clip("/a.wav", "Rain")], LABELS[:4])
    assert clip.options is not None
    a, b, c, d = clip.options
    assert clip.question == f"What sound is this?\nA. {a} B. {b} C. {c} D. {d}"
    (plain,) = mcq([Clip("/a.wav", "Rain", question="Which?")], LABELS[:4], letters=False)
    assert plain.question == f"Which?\n{a}\n{b}\n{c}\n{d}"


def test_options_never_change() -> None:
    (clip,) = mcq([Clip("/data/7.wav", "Rain")], LABELS, seed=3)
    assert clip.options == ("Rooster", "Fire crackling", "Dog bark", "Rain")


def test_options_depend_on_the_clip_alone() -> None:
    clip = Clip("/data/7.wav", "Rooster")
    assert mcq([clip], LABELS)[0] in mcq([*CLIPS, clip], LABELS[::-1] * 2)
    moved = mcq([replace(clip, audio="/elsewhere/7.wav")], LABELS)[0]
    assert moved.options == mcq([clip], LABELS)[0].options


def test_options_and_their_order_vary() -> None:
    rows = mcq(CLIPS, LABELS)
    assert len({row.options for row in rows}) > 20
    positions = [row.options.index(row.label) for row in rows]  # type: ignore[union-attr, arg-type]
    assert set(positions) == {0, 1, 2, 3}
    assert [row.options for row in mcq(CLIPS, LABELS, seed=1)] != [row.options for row in rows]


def test_a_multi_label_clip_asks_for_each_label() -> None:
    rows = mcq([Clip("/a.wav", ("Rain", "Sea waves"))], LABELS, num_options=3)
    assert [row.label for row in rows] == ["Rain", "Sea waves"]
    assert all(len({"Rain", "Sea waves"} & set(row.options or ())) == 1 for row in rows)


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_options is 6; with 5 labels it must be 2 to 5"):
        mcq(CLIPS, LABELS, num_options=6)
    with pytest.raises(ValueError, match="must be 2 to 26"):
        mcq([Clip("/a.wav", "a")], [*string.ascii_letters], num_options=27)
    with pytest.raises(ValueError, match=r"/a\.wav: has no label"):
        mcq([Clip("/a.wav")], LABELS)
    with pytest.raises(ValueError, match="4 options need 3 labels that it does not have"):
        mcq([Clip("/a.wav", ("Rain", "Rooster", "Dog bark"))], LABELS)
    with pytest.raises(ValueError, match=r"/a\.wav: has no answer options"):
        Protocol("mcq").check_own(Clip("/a.wav"))  # of a stream
