from __future__ import annotations

import json
import os
import string
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.data import Clip, ManifestError, read_manifest, write_manifest

SHARED = Path(os.environ.get("CALM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def no_silent_warnings() -> None:
    warnings.simplefilter("error")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    return str(raised.value)


def test_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl",
        '{"audio": "a/1.wav", "label": "dog", "split": "train", "group": 7, "start": 1, "end": 2.5}\n'
        '\n{"audio": "/abs/2.wav", "label": ["rain", "a, b"], "question": "What?", "options": ["a", "b"]}\n'
        '{"audio": "3.wav", "video": "3.mp4"}\n',
    )
    assert read_manifest(path) == [
        Clip(f"{tmp_path}/a/1.wav", "dog", split="train", group="7", start=1.0, end=2.5),
        Clip("/abs/2.wav", ("rain", "a, b"), question="What?", options=("a", "b")),
        Clip(f"{tmp_path}/3.wav", video=f"{tmp_path}/3.mp4"),
    ]


def test_csv_with_a_byte_order_mark_quotes_and_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        '\ufeffaudio,label,split,start\n1.wav,"dog, big",train,\n2.wav,"[""a"", ""b""]",,0.5\n3.wav,7,,\n',
    )
    assert read_manifest(path) == [
        Clip(f"{tmp_path}/1.wav", "dog, big", split="train"),
        Clip(f"{tmp_path}/2.wav", ("a", "b"), start=0.5),
        Clip(f"{tmp_path}/3.wav", "7"),
    ]


def test_csv_with_spaces_around_cells(tmp_path: Path) -> None:
    for name in (" begins.wav", "ends.wav "):
        write(tmp_path / name, "")
    path = write(
        tmp_path / "m.csv",
        'audio , label, start\n\n1.wav, dog ,1\n"2.wav", "dog",\n'
        '" begins.wav",dog \nends.wav ,\t,\n3.wav , "[""a"", ""b""]"\n',
    )
    assert read_manifest(path) == [
        Clip(f"{tmp_path}/1.wav", "dog", start=1.0),
        Clip(f"{tmp_path}/2.wav", "dog"),
        Clip(f"{tmp_path}/ begins.wav", "dog"),
        Clip(f"{tmp_path}/ends.wav "),
        Clip(f"{tmp_path}/3.wav", ("a", "b")),
    ]


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
def test_spaces_around_a_text_make_no_other_class(tmp_path: Path, name: str) -> None:
    rows = [
        {"audio": "1.wav", "label": " dog", "split": "train ", "group": "a ", "options": ["dog ", "\tcat"]},
        {"audio": "2.wav", "label": ["dog ", " dog", "big cat\n"], "group": " a"},
    ]
    lines = {
        "m.jsonl": "\n".join(map(json.dumps, rows)),
        "m.json": json.dumps(rows),
        "m.csv": 'audio,label,split,group,options\n1.wav, dog,train ,a ,"[""dog "", ""\\tcat""]"\n'
        '2.wav,"[""dog "", "" dog"", ""big cat\\n""]",, a,\n',
    }
    assert read_manifest(write(tmp_path / name, lines[name])) == [
        Clip(f"{tmp_path}/1.wav", "dog", split="train", group="a", options=("dog", "cat")),
        Clip(f"{tmp_path}/2.wav", ("dog", "big cat"), group="a"),
    ]


def test_only_lists_are_lists_in_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", 'audio,label,group\n[1] a.wav,[music],[7]\n"[""b""].wav","[""a""] big",\n')
    assert read_manifest(path) == [
        Clip(f"{tmp_path}/[1] a.wav", "[music]", group="[7]"),
        Clip(f'{tmp_path}/["b"].wav', '["a"] big'),
    ]


def test_a_label_given_twice_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", '{"audio": "a.wav", "label": ["b", "a", "b"]}\n')
    assert read_manifest(path)[0].label == ("b", "a")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('audio,label\n1.wav,x\n"a.wav,dog\nb.wav,cat\n', "line 3: not CSV (unexpected end of data); close each quote"),
        ('audio,label\n"a.wav"x,dog\n', "line 2: not CSV"),
        ('audio,label\n"a\nb.wav",dog\nc.wav,dog,1\n', "line 4: more cells"),
        ("audio,label, label\na.wav,dog,cat\n", "line 1: 2 columns are called 'label'; keep one"),
        (
            "audio,label,mapped_label\na.wav,dog,cat\n",
            "line 2: 'label' and 'mapped_label' mean the same, but are 'dog'",
        ),
        (
            "audio,options\na.wav,[dog]\n",
            'line 2: options must be a list of texts such as ["one", "two"], found \'[dog]\'',
        ),
    ],
)
def test_errors_in_csv(tmp_path: Path, text: str, complaint: str) -> None:
    assert f"m.csv, {complaint}" in error_of(write(tmp_path / "m.csv", text))


def test_json_by_split_and_the_published_names(tmp_path: Path) -> None:
    row = {
        "wav": "1.wav",
        "mapped_label": "Dog",
        "question": "Q?\nA. Dog B. Cat",
        "answer": "A",
        "options": ["Dog", "Cat"],
    }
    path = write(tmp_path / "m.json", json.dumps({"support": [row], "test": [{"wav": "2.wav", "mapped_label": "Cat"}]}))
    assert read_manifest(path) == [
        Clip(f"{tmp_path}/1.wav", "Dog", "train", question="Q?\nA. Dog B. Cat", options=("Dog", "Cat")),
        Clip(f"{tmp_path}/2.wav", "Cat", "test"),
    ]


@pytest.mark.skipif(not (SHARED / "oracle").is_dir(), reason="no ../shared/oracle")
def test_the_published_codes_own_file() -> None:
    clips = read_manifest(SHARED / "oracle/pipeline/split.json")
    assert [sum(clip.split == split for clip in clips) for split in ("train", "val", "test")] == [12, 12, 16]
    assert {clip.label for clip in clips} == {"Dog bark", "Rain", "Rooster", "Fire crackling"}
    assert all(Path(clip.audio).is_file() and clip.options and clip.question for clip in clips)


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for name in ("dog/b.WAV", "dog/deep/a.flac", "rain/1.ogg", "rain/.hidden.wav", ".git/x.wav"):
        write(tmp_path / name, "")
    assert read_manifest(tmp_path) == [
        Clip(f"{tmp_path}/dog/b.WAV", "dog"),
        Clip(f"{tmp_path}/dog/deep/a.flac", "dog"),
        Clip(f"{tmp_path}/rain/1.ogg", "rain"),
    ]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for name in ("train/dog/1.wav", "test/dog/1.wav", "test/rain/1.wav"):
        write(tmp_path / name, "")
    assert [(clip.split, clip.label) for clip in read_manifest(tmp_path)] == [
        ("test", "dog"), ("test", "rain"), ("train", "dog"),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "TESTING"), ("support", "test")])
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name / "dog").mkdir(parents=True)
        (tmp_path / name / "dog" / "a.wav").touch()
    assert [(clip.label, clip.split) for clip in read_manifest(tmp_path)] in (
        [("dog", "train"), ("dog", "test")],
        [("dog", "test"), ("dog", "train")],
    )


def test_splits_beside_classes_are_refused(tmp_path: Path) -> None:
    for name in ("train/dog", "test/dog", "cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.wav").touch()
    with pytest.raises(ManifestError, match="test, train are splits, and cat would be classes"):
        read_manifest(tmp_path)


def test_a_class_without_audio_is_said(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "dog" / "a.wav").touch()
    with pytest.warns(UserWarning, match="no audio in cat"):
        assert len(read_manifest(tmp_path)) == 1


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    try:
        (tmp_path / "dog" / os.fsdecode(b"h\xfcndin.wav")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(ManifestError, match=r"h\\xfcndin.wav.*its name is not UTF-8"):
        read_manifest(tmp_path)


def test_what_a_folder_leaves_out_is_said(tmp_path: Path) -> None:
    for name in ("dog/1.wav", "dog/2.mid", "loose.wav", "dog/notes.txt"):
        write(tmp_path / name, "")
    with pytest.warns(UserWarning, match=r"1 \.mid, 1 \.txt, 1 \.wav"):
        assert len(read_manifest(tmp_path)) == 1


def test_a_link_to_a_file_that_is_gone_is_a_clip(tmp_path: Path) -> None:
    write(tmp_path / "dog/1.wav", "")
    for name in ("dog/2.wav", "dog/notes.txt", "cat"):
        (tmp_path / name).symlink_to("gone")
    with pytest.warns(UserWarning, match=r"1 unnamed, 1 \.txt"):
        assert [Path(clip.audio).name for clip in read_manifest(tmp_path)] == ["1.wav", "2.wav"]


def test_unknown_columns_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "audio,lable\n1.wav,dog\n")
    with pytest.warns(UserWarning, match="ignored lable; a clip has audio, label"):
        assert read_manifest(path)[0].label is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{audio: 1}", "not JSON"),
        ('["a.wav"]', "expected an object"),
        ('{"label": "dog"}', "no 'audio'"),
        ('{"audio": 3.5}', "audio must be a text, found 3.5"),
        ('{"audio": "a.wav", "label": {"a": 1}}', "label must be a text"),
        ('{"audio": "a.wav", "label": []}', "label must be a list of texts"),
        ('{"audio": "a.wav", "label": " "}', "label must be a text"),
        ('{"audio": "a.wav", "label": ["dog", "\\t"]}', "label must be a text, found '\\t'"),
        ('{"audio": "a.wav", "options": "dog"}', "options must be a list of texts"),
        ('{"audio": "a.wav", "split": "dev"}', "split 'dev' is none of train, val, test"),
        ('{"audio": "a.wav", "start": "soon"}', "start must be seconds, 0 or more, found 'soon'"),
        ('{"audio": "a.wav", "start": -1}', "start must be seconds"),
        ('{"audio": "a.wav", "end": NaN}', "end must be seconds"),
        ('{"audio": "a.wav", "start": true}', "start must be seconds, 0 or more, found True"),
        ('{"audio": "a.wav", "confidence": true}', "confidence must be a number from 0 to 1"),
        ('{"audio": "a.wav", "wav": "b.wav"}', "'audio' and 'wav' mean the same, but are"),
        ('{"audio": "a.wav", "label": "a", "label": "b"}', "'label' is there 2 times in one object"),
        ('{"audio": "a.wav", "start": 2, "end": 1}', "end 1 s is not after start 2 s"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "m.jsonl", '{"audio": "fine.wav"}\n' + line + "\n")
    message = error_of(path)
    assert message.startswith(f"{path}, line 2: ")
    assert complaint in message


def test_errors_of_whole_files(tmp_path: Path) -> None:
    assert "no such manifest" in error_of(tmp_path / "missing.jsonl")
    assert "a manifest is a .jsonl, .json or .csv file" in error_of(write(tmp_path / "m.txt", "x"))
    assert "holds no clips" in error_of(write(tmp_path / "empty.jsonl", "\n"))
    assert "expected a list of clips" in error_of(write(tmp_path / "number.json", "3"))
    assert "line 2: not JSON" in error_of(write(tmp_path / "broken.json", "[\n{]"))
    assert "'train' is there 2 times" in error_of(write(tmp_path / "twice.json", '{"train": [], "train": []}'))
    assert "entry 1 of 'dev'" in error_of(write(tmp_path / "split.json", '{"dev": [{"audio": "a.wav"}]}'))
    assert "line 2: more cells" in error_of(write(tmp_path / "m.csv", "audio,label\na.wav,dog, big\n"))
    (tmp_path / "latin.csv").write_bytes(b"audio,label\na.wav,ca\xf1on\n")
    assert "not UTF-8" in error_of(tmp_path / "latin.csv")
    (tmp_path / "hollow" / "dog").mkdir(parents=True)
    assert "one sub-folder a class" in error_of(tmp_path / "hollow")


def test_what_is_too_large_to_be_meant_is_an_error_with_its_line(tmp_path: Path) -> None:
    deep, digits = "[" * 100_000, "1" * 5_000
    for number, (name, text, complaint) in enumerate(
        [
            ("m.json", deep, ": lists in lists, too deep"),
            ("m.jsonl", '\n{"audio": "a.wav", "label": ' + deep, ", line 2: lists in lists, too deep"),
            ("m.csv", f"audio,label\na.wav,{deep}", ", line 2: lists in lists, too deep"),
            ("m.csv", 'audio\n\n"a.wav\n' + "b.wav\n" * 30_000, ", line 3: not CSV (field larger than field limit"),
            ("m.jsonl", f'{{"audio": "a.wav", "end": {digits}}}', ", line 1: "),
            ("m.jsonl", f'{{"audio": "a.wav", "end": {digits[:400]}}}', ", line 1: end must be seconds"),
        ]
    ):
        path = write(tmp_path / str(number) / name, text)
        assert error_of(path).startswith(f"{path}{complaint}")


texts = st.text(string.ascii_letters + string.digits + " ,\"é'[]", min_size=1).map(str.strip).filter(bool)
clips = st.builds(
    Clip,
    audio=st.sampled_from(["in/a.wav", "b ü.flac", "/else/c.wav"]),
    label=st.none() | texts | st.lists(texts, min_size=1, unique=True).map(tuple),
    split=st.sampled_from([None, "train", "val", "test"]),
    group=st.none() | texts,
    start=st.none() | st.floats(0, 10),
    end=st.none() | st.floats(11, 20),
    options=st.none() | st.lists(texts, min_size=1).map(tuple),
)


@given(st.lists(clips, min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[Clip]) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    given_clips = [Clip(**{**vars_of(clip), "audio": str(folder / clip.audio)}) for clip in drawn]
    write_manifest(given_clips, folder / "m.jsonl")
    assert read_manifest(folder / "m.jsonl") == given_clips


def vars_of(clip: Clip) -> dict[str, object]:
    return {name: getattr(clip, name) for name in Clip.__dataclass_fields__}


def test_written_paths_move_with_the_folder(tmp_path: Path) -> None:
    write_manifest([Clip(f"{tmp_path}/old/a.wav", "dog"), Clip("/else/b.wav", "cat")], tmp_path / "old/m.jsonl")
    (tmp_path / "old").rename(tmp_path / "new")
    assert [clip.audio for clip in read_manifest(tmp_path / "new/m.jsonl")] == [
        f"{tmp_path}/new/a.wav",
        "/else/b.wav",
    ]


def test_only_json_lines_are_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"end the name in \.jsonl"):
        write_manifest([], tmp_path / "m.csv")
