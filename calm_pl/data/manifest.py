"""Lists of labelled clips: what every data set becomes, and how they are read and written."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from calm_pl.audio import EXTENSIONS, NOT_UTF8, is_utf8
from calm_pl.clip import Clip, absolute_path

SPLITS = ("train", "val", "test")


class ManifestError(ValueError):
    """A manifest that cannot be read; the message starts with the file and the line."""


# The published code's JSON calls these otherwise.
_ALIASES = {"wav": "audio", "mapped_label": "label"}
_SPLIT_ALIASES = {"support": "train"}
# What folders of splits are called, in whatever case.
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "support"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Told to people alone: "answer" repeats the label, "prediction" is what a model guesses of a clip to be labelled.
_HINTS = ("answer", "prediction")
_FIELDS = tuple(field.name for field in fields(Clip))


def read_manifest(path: str | os.PathLike[str]) -> list[Clip]:
    """Read a manifest: JSON Lines, JSON, CSV, or a folder with one sub-folder a class.

    A JSON file is a list of clips, or an object of such lists by split ("support" is read as "train"). In a CSV
    file, a JSON list as `label` or `options` is a list, any other text is a text, and spaces around a cell do not
    count (of a path in quotes they do where a file is so called); nor do they, in any of them, around a label, an
    option, a group or a split. A label that a clip has twice is one. Folders named
    train, val and test (or Training, dev and the like) may stand above the class folders; a link to a file that is
    gone is a clip that cannot be heard. The JSON of the published CALM code (`wav`, `mapped_label`) is read as it is.

    Returns:
        The clips in the order of the file (of a folder: sorted by path), `audio` and `video` made absolute.

    Raises:
        ManifestError: naming the file, the line (in JSON the entry) and what is wrong with it.
    """
    source = Path(path).absolute()
    if source.is_dir():
        return _read_folder(source)
    if not source.exists():
        raise ManifestError(
            f"{source}: no such manifest file or folder; give a .jsonl, .json or .csv file that lists clips, or a "
            f"folder of classes (a path that starts without / is looked for in {Path.cwd()})"
        )
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise ManifestError(f"{source}: a manifest is a .jsonl, .json or .csv file, or a folder of classes")
    ignored: Counter[str] = Counter()
    try:
        clips = [clip_of_row(row, source.parent, where, ignored) for where, row in reader(source)]
    except UnicodeDecodeError as error:
        raise ManifestError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not clips:
        raise ManifestError(f"{source}: holds no clips")
    if ignored:
        known = ", ".join(_FIELDS)
        warnings.warn(f"{source}: ignored {', '.join(ignored)}; a clip has {known}", stacklevel=2)
    return clips


def write_manifest(clips: Iterable[Clip], path: str | os.PathLike[str]) -> None:
    """Write clips as JSON Lines; paths below its folder become relative, so that the folder can be moved."""
    target = check_writable(path)
    lines = [json.dumps(_row(clip, target.parent), ensure_ascii=False) + "\n" for clip in clips]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Where `write_manifest` would write.

    Raises:
        ManifestError: the name does not end in .jsonl.
    """
    target = Path(path).absolute()
    if target.suffix.lower() != ".jsonl":
        raise ManifestError(f"{target}: manifests are written as JSON Lines; end the name in .jsonl")
    return target


def _row(clip: Clip, folder: Path) -> dict[str, Any]:
    row = {name: value for name in _FIELDS if (value := getattr(clip, name)) is not None}
    for name in ("audio", "video"):
        if name in row and Path(row[name]).is_relative_to(folder):
            row[name] = Path(row[name]).relative_to(folder).as_posix()
    return row


def _jsonl_rows(source: Path) -> Iterator[tuple[str, Any]]:
    with source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{source}, line {number}"
                try:
                    yield where, parsed_json(line, where)
                except json.JSONDecodeError as error:
                    raise ManifestError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None


def _json_rows(source: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = parsed_json(source.read_text(encoding="utf-8-sig"), str(source))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from None
    parts = content if isinstance(content, dict) else {"": content}
    for name, rows in parts.items():
        if not isinstance(rows, list):
            raise ManifestError(f"{source}: expected a list of clips, or an object of such lists by split")
        split = {"split": _SPLIT_ALIASES.get(name, name)} if name else {}
        for number, row in enumerate(rows, start=1):
            where = f"{source}, entry {number}" + (f" of {name!r}" if name else "")
            yield where, {**split, **row} if isinstance(row, dict) else row


def _csv_rows(source: Path) -> Iterator[tuple[str, Any]]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        header: list[str] = []
        line = 1  # where the row begins: quoted cells may hold line breaks
        try:
            for cells in reader:
                where, line = f"{source}, line {line}", reader.line_num + 1
                if not header:
                    header = _header(cells, where)
                elif len(cells) > len(header):
                    raise ManifestError(f"{where}: more cells than the header; quote a text that holds a comma")
                elif cells:
                    named = zip(header, cells, strict=False)
                    row = {name: _cell(_ALIASES.get(name, name), text, source.parent, where) for name, text in named}
                    yield where, {name: value for name, value in row.items() if value}
        except csv.Error as error:
            raise ManifestError(
                f"{source}, line {line}: not CSV ({error}); close each quote, and double one inside a quoted text"
            ) from None


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name, count in Counter(names).items():
        if name and count > 1:
            raise ManifestError(f"{where}: {count} columns are called {name!r}; keep one")
    return names


def _cell(name: str, text: str, folder: Path, where: str) -> Any:
    stripped = text.strip()
    if name in ("audio", "video") and stripped != text and os.path.exists(folder / text):
        return text
    if name in ("label", "options") and stripped.startswith("["):
        try:
            return parsed_json(stripped, where)
        except json.JSONDecodeError:  # a text such as [music]
            return stripped
    return stripped


def parsed_json(text: str, where: str) -> Any:
    """`json.loads`; what else than a JSONDecodeError may come of it is a ManifestError."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ManifestError(f"{where}: lists in lists, too deep to be read; a clip needs no more than one") from None
    except ValueError as error:  # a name that is there twice, a number of thousands of digits
        raise ManifestError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} is there {count} times in one object; keep one")
    return dict(pairs)


def clip_of_row(row: Any, folder: Path, where: str, ignored: Counter[str]) -> Clip:
    """The clip that a row describes.

    Args:
        row: what was read of it; anything.
        folder: what its paths are relative to.
        where: the file and line, for messages.
        ignored: counts the names that no clip has.

    Raises:
        ManifestError: it describes no clip; names what is wrong.
    """
    values = _fields_of(row, where, ignored)
    for name in ("audio", "video", "split", "group", "question"):
        if name in values:
            values[name] = _text(values[name], name, where)
    for name in ("audio", "video"):
        if name in values:
            values[name] = absolute_path(folder / values[name])
    if "label" in values:
        if isinstance(values["label"], list):
            values["label"] = tuple(dict.fromkeys(_texts(values["label"], "label", where)))
        else:
            values["label"] = _text(values["label"], "label", where)
    if "options" in values:
        values["options"] = _texts(values["options"], "options", where)
    if values.get("split") not in (None, *SPLITS):
        raise ManifestError(f"{where}: split {values['split']!r} is none of {', '.join(SPLITS)}")
    for name in ("start", "end"):
        if name in values:
            values[name] = _seconds(values[name], name, where)
    if "confidence" in values:
        values["confidence"] = _share(values["confidence"], where)
    if values.get("end", math.inf) <= values.get("start", 0.0):
        raise ManifestError(f"{where}: end {values['end']:g} s is not after start {values.get('start', 0):g} s")
    return Clip(**values)


def _fields_of(row: Any, where: str, ignored: Counter[str]) -> dict[str, Any]:
    """The row's values by the names of a clip's fields, not checked yet; `audio` is always among them."""
    if not isinstance(row, Mapping):
        raise ManifestError(f"{where}: expected an object with 'audio' and 'label', found {row!r}")
    values: dict[str, Any] = {}
    for key, value in row.items():
        name = _ALIASES.get(key, key)
        if name in _FIELDS and value is not None:
            if name in values and values[name] != value:
                other = next(alias for alias, meant in _ALIASES.items() if meant == name)
                raise ManifestError(
                    f"{where}: {name!r} and {other!r} mean the same, but are {values[name]!r} and {value!r}; keep one"
                )
            values[name] = value
        elif name not in (*_FIELDS, *_HINTS):
            ignored[key] += 1
    if not values.get("audio") and not values.get("video"):
        raise ManifestError(f"{where}: no 'audio' (a path); found {', '.join(row) or 'nothing'}")
    return {"audio": values.get("video"), **values}  # of a video alone, its sound track


def _text(value: Any, name: str, where: str) -> str:
    # Numbers are welcome as labels (digits) and groups (speaker ids).
    if isinstance(value, (str, int)) and not isinstance(value, bool) and (stripped := str(value).strip()):
        return str(value) if name in ("audio", "video", "question") else stripped  # a file may be called " 1.wav"
    raise ManifestError(f"{where}: {name} must be a text, found {value!r}")


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ManifestError(f'{where}: {name} must be a list of texts such as ["one", "two"], found {value!r}')
    return tuple(_text(item, name, where) for item in value)


def _seconds(value: Any, name: str, where: str) -> float:
    seconds = _number(value)
    if not (0 <= seconds < math.inf):
        raise ManifestError(f"{where}: {name} must be seconds, 0 or more, found {value!r}")
    return seconds


def _share(value: Any, where: str) -> float:
    share = _number(value)
    if not 0 <= share <= 1:
        raise ManifestError(f"{where}: confidence must be a number from 0 to 1, found {value!r}")
    return share


def _number(value: Any) -> float:
    """NaN for what is none; `true` is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _read_folder(root: Path) -> list[Clip]:
    folders = _subfolders(root)
    splits = {folder: split for folder in folders if (split := _SPLIT_FOLDERS.get(folder.name.lower()))}
    if len(splits) < len(folders):
        if {"train", "test"} <= set(splits.values()):
            others = ", ".join(folder.name for folder in folders if folder not in splits)
            raise ManifestError(
                f"{root}: {', '.join(folder.name for folder in splits)} are splits, and {others} would be classes: "
                "move the ones or the others elsewhere, or name the clips in a manifest"
            )
        splits = {}
    classes: list[tuple[Path, str | None]] = [(folder, None) for folder in folders if not splits]
    classes += [(folder, split) for above, split in splits.items() for folder in _subfolders(above)]
    clips: list[Clip] = []
    silent = []
    ignored = Counter(file.suffix for file in root.iterdir() if _is_visible_file(file, root))
    for folder, split in classes:
        before = len(clips)
        for file in sorted(path for path in folder.rglob("*") if _is_visible_file(path, root)):
            if file.suffix.lower() in EXTENSIONS:
                if not is_utf8(file):
                    raise ManifestError(f"{os.fsencode(file)!r}: {NOT_UTF8}")
                clips.append(Clip(str(file), label=folder.name, split=split))
            else:
                ignored[file.suffix] += 1
        if len(clips) == before:
            silent.append(str(folder.relative_to(root)))
    if not clips:
        raise ManifestError(f"{root}: no audio; expected one sub-folder a class, such as {root}/dog/1.wav")
    if silent:
        warnings.warn(f"{root}: no audio in {', '.join(silent)}", stacklevel=3)
    if ignored:
        kinds = ", ".join(f"{count} {suffix or 'unnamed'}" for suffix, count in sorted(ignored.items()))
        warnings.warn(f"{root}: ignored files that are no audio or in no class folder: {kinds}", stacklevel=3)
    return clips


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_visible_file(path: Path, root: Path) -> bool:
    # A link whose target is gone is told as a clip that cannot be used is.
    there = path.is_file() or (path.is_symlink() and not path.exists())
    return there and not any(part.startswith(".") for part in path.relative_to(root).parts)
