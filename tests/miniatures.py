"""Every data set small enough to be run in a second, laid out as the real one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from calm_pl.clip import Clip
from calm_pl.data import write_manifest
from tests.conftest import tone

PITCHES = (200, 500, 1200, 3000)


def sound(path: Path, kind: int, number: int = 0) -> Path:
    """A short tone: of one kind one pitch, and no two files alike."""
    return tone(path, PITCHES[kind % 4] * (1 + 0.02 * number), 0.2, 100 * kind + number)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def folder(root: Path) -> Path:
    for kind, label in enumerate(("low", "high")):
        for number in range(5):
            sound(root / label / f"{number}.wav", kind, number)
    return root


def manifest(root: Path) -> Path:
    clips = [
        Clip(str(sound(root / f"{label}{number}.wav", kind, number)), label, "test" if number > 2 else "train")
        for kind, label in enumerate(("low", "high"))
        for number in range(5)
    ]
    write_manifest(clips, root / "clips.jsonl")
    return root / "clips.jsonl"


def esc50(root: Path) -> Path:
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for kind, category in enumerate(("dog", "rain")):
            name = f"{fold}-{fold}{kind}-A-{kind}.wav"
            lines.append(f"{name},{fold},{kind},{category},True,{fold}{kind},A")
            sound(root / "audio" / name, kind, fold)
    text(root / "meta/esc50.csv", *lines)
    return root


def urbansound8k(root: Path) -> Path:
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, 11):
        for kind, label in enumerate(("dog_bark", "air_conditioner")):
            name = f"{fold}{kind}-{kind}-0-0.wav"
            lines.append(f"{name},{fold}{kind},0.0,0.2,1,{fold},{kind},{label}")
            sound(root / f"audio/fold{fold}" / name, kind, fold)
    text(root / "metadata/UrbanSound8K.csv", *lines)
    return root


def fsd50k(root: Path) -> Path:
    labels = ("Bark,Dog", "Rain,Water")
    for part, name, split in (("dev", "dev", ",train"), ("eval", "eval", "")):
        lines = ["fname,labels,mids" + (",split" if split else "")]
        for kind, label in enumerate(labels):
            for number in range(3):
                file = f"{kind}{number}{len(part)}"
                lines.append(f'{file},"{label}","/m/1,/m/2"{split}')
                sound(root / f"FSD50K.{name}_audio/{file}.wav", kind, number + 5 * (part == "eval"))
        text(root / f"FSD50K.ground_truth/{part}.csv", *lines)
    return root


def vggsound(root: Path) -> Path:
    lines = []
    for kind, label in enumerate(("people marching", '"cattle, bovinae cowbell"')):
        for number, split in enumerate(("train", "train", "test", "test")):
            name = f"video-{kind}{number}___"
            lines.append(f"{name},30,{label},{split}")
            sound(root / f"audio/{name}_000030.wav", kind, number)
    text(root / "vggsound.csv", *lines)
    return root


def audioset(root: Path) -> Path:
    text(root / "class_labels_indices.csv", "index,mid,display_name", '0,/m/1,"Domestic animals, pets"', "1,/m/2,Dog",
         "2,/m/3,Rain")  # fmt: skip
    for part, number in (("balanced_train", 0), ("eval", 5)):
        lines = ["# Segments csv", "# num_ytids=3", "# YTID, start_seconds, end_seconds, labels"]
        for kind, mids in enumerate(("/m/1,/m/2", "/m/3", "/m/1")):
            for more in range(2):
                name = f"id{number}{kind}{more}"
                lines.append(f'{name}, 0.000, 10.000, "{mids}"')
                sound(root / f"audio/Y{name}.wav", kind, number + more)
        text(root / f"{part}_segments.csv", *lines)
    return root


def speech_commands(root: Path) -> Path:
    for kind, word in enumerate(("yes", "no")):
        for number in range(5):
            sound(root / word / f"{number}a7c2a8d_nohash_0.wav", kind, number)
    text(root / "testing_list.txt", *(f"{word}/{n}a7c2a8d_nohash_0.wav" for word in ("yes", "no") for n in (3, 4)))
    text(root / "validation_list.txt", "yes/2a7c2a8d_nohash_0.wav")
    return root


def fsdd(root: Path) -> Path:
    for kind, digit in enumerate((0, 7)):
        for take in (0, 1, 5, 6):
            sound(root / f"recordings/{digit}_theo_{take}.wav", kind, take)
    return root


def gtzan(root: Path) -> Path:
    from torchaudio.datasets.gtzan import filtered_test, filtered_train

    for names in (filtered_train, filtered_test):
        for kind, genre in enumerate(("blues", "jazz")):
            for number, name in enumerate([name for name in names if name.startswith(genre)][:2]):
                sound(root / "genres" / genre / f"{name}.wav", kind, number + 5 * (names is filtered_test))
    return root


def nsynth(root: Path) -> Path:
    for place, part in enumerate(("train", "valid", "test")):
        notes = {}
        for kind, family in enumerate(("guitar", "bass")):
            for number in range(2):
                instrument = f"{family}_acoustic_{place}{number:02d}"
                notes[f"{instrument}-060-100"] = {
                    "instrument_str": instrument,
                    "instrument_family_str": family,
                    "instrument_source_str": "acoustic",
                }
                sound(root / f"nsynth-{part}/audio/{instrument}-060-100.wav", kind, number + 3 * place)
        text(root / f"nsynth-{part}/examples.json", json.dumps(notes))
    return root


def crema_d(root: Path) -> Path:
    for actor in range(1001, 1005):
        for kind, emotion in enumerate(("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")):
            sound(root / f"AudioWAV/{actor}_DFA_{emotion}_XX.wav", kind, actor - 1000)
    return root


def ravdess(root: Path) -> Path:
    for actor in range(1, 5):
        for emotion in range(1, 9):
            sound(root / f"Actor_{actor:02d}/03-01-{emotion:02d}-01-02-01-{actor:02d}.wav", emotion, actor)
    return root


def asvspoof2019_la(root: Path) -> Path:
    lists = {"train": ("train.trn", "T", ("A01",)), "dev": ("dev.trl", "D", ("A02",)),
             "eval": ("eval.trl", "E", ("A07", "A19"))}  # fmt: skip
    for place, (part, (suffix, letter, attacks)) in enumerate(lists.items()):
        lines = []
        for kind, attack in enumerate(("-", *attacks)):
            for number in range(2):
                name = f"LA_{letter}_{1000000 + 10 * kind + number}"
                lines.append(f"LA_00{place}{kind} {name} - {attack} {'spoof' if kind else 'bonafide'}")
                sound(root / f"ASVspoof2019_LA_{part}/flac/{name}.flac", min(kind, 1), number + 3 * place + kind)
        text(root / f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{suffix}.txt", *lines)
    return root


def mlaad(root: Path) -> Path:
    head = "path|original_file|language|is_original_language|duration|training_data|model_name|architecture|transcript"
    originals = [f"en_UK/by_book/female/reader_{n}/book/wavs/en_{n:06d}.wav" for n in range(4)]
    for number, original in enumerate(originals):
        sound(root / "bonafide" / original, 0, number)
    for kind, generator in enumerate(("bark", "vits", "tortoise"), start=1):
        lines = [head]
        for number, original in enumerate(originals):
            name = Path(original).name
            lines.append(f"./fake/en/{generator}/{name}|{original}|en|True|0.2|LJ|{generator}|x|He said: no")
            sound(root / "fake/en" / generator / name, 1, number + 4 * kind)
        text(root / "fake/en" / generator / "meta.csv", *lines)
    return root


MINIATURES: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (
        folder, manifest, esc50, urbansound8k, fsd50k, vggsound, audioset, speech_commands, fsdd, gtzan, nsynth,
        crema_d, ravdess, asvspoof2019_la, mlaad,
    )
} | {"esc10": esc50}  # fmt: skip
