"""``calm compare``: every method on the same heads over shots, seeds and folds, and its rows on disk.

Shapes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from calm_pl.backbone.precision import arithmetic
from calm_pl.clip import Clip
from calm_pl.conf import flat
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.recipes import Recipe
from calm_pl.data.splits import check_disjoint, draw_support
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.compare import Fold, Row, compare
from calm_pl.progress import Task
from calm_pl.training.extraction import HeadExtraction, extract_missing
from calm_pl.training.results import write_json

ROWS_FILE = "rows.csv"
QUESTION_FILE = "question.json"


def run_comparison(
    trainer: L.Trainer,
    data: AudioEpisodeDataModule,
    methods: dict[str, HeadClassifier],
    settings: Mapping[str, Any],
    shots: Sequence[int],
    seeds: Sequence[int],
    out: Path,
    splits: int = 1,
) -> list[Row]:
    """Fill ``out/rows.csv`` (rows that are there already are kept) and return its rows of these shots and seeds.

    Args:
        trainer: whose device and precision the backbone runs on, where head outputs are missing.
        data: recipe, backbone and store; its own shots and seed are not used.
        methods: unfitted classifiers by name.
        settings: what each of them was made with.
        shots: clips a class.
        seeds: one support set is drawn for each, in every fold.
        out: folder for the results.
        splits: random splits of a data set that has no folds.

    Raises:
        ValueError: ``out`` holds rows of another question; clips cannot be split as asked; the data have an option
            that counts in `calm fit` alone.
    """
    check_options(data)
    data.recipe.prepare()
    clips, folds = clips_and_folds(data.recipe, splits)
    clips = data.asked(clips)
    check_same_question(trainer, data, settings, out, splits=splits)
    heads_NKD, labels_N, usable = stored_heads(trainer, data, clips)
    folds = [_only(fold, usable) for fold in folds]
    rows = [row for row in read_rows(out / ROWS_FILE) if row.shots in shots and row.seed in seeds]
    made = compare(
        heads_NKD,
        labels_N,
        int(labels_N.max()) + 1,
        folds,
        shots,
        seeds,
        {name: anew(method) for name, method in methods.items()},
        _drawer(clips),
        done={row.key for row in rows},
    )
    asked = len(folds) * len(set(shots)) * len(set(seeds)) * len(methods)
    total = asked - sum(row.method in methods for row in rows)
    with Task("fitting and testing", max(total, 0), "fits") as task:
        for row in kept(made, out / ROWS_FILE):
            rows.append(row)
            task.advance(note=f"{row.method}, {row.shots} shots")
    return rows


def check_options(data: AudioEpisodeDataModule) -> None:
    """Refuse what would be ignored: every method here learns from true labels, and is tested among all classes.

    Raises:
        ValueError: names the option and what takes it.
    """
    for name, given in (
        ("within_options", data.protocol.within_options),
        ("pseudo_labels", data.pseudo_labels),
        ("by_confidence", data.by_confidence),
        ("unlabelled", data.unlabelled),
    ):
        if given:
            option = f"--data.{name} {given if isinstance(given, str) else 'true'}"
            raise ValueError(
                f"{option} does not count here. `calm fit` takes it, and so does a sweep over shots and seeds: "
                f"calm sweep shots {option}"
            )


def check_same_question(
    trainer: L.Trainer, data: AudioEpisodeDataModule, settings: Mapping[str, Any], out: Path, **more: Any
) -> None:
    """Remember what a folder's rows are about; rows of another question never join them. Further methods may.

    Raises:
        ValueError: the folder's rows are of other data, head outputs or settings; names what differs.
    """
    recipe = asdict(data.recipe)  # type: ignore[call-overload]  # recipes are dataclasses
    recipe.pop("test_fold", None)  # each is tested
    head_outputs = data.backbone.store_key(arithmetic(trainer.precision), data.store_root)
    asked = {"dataset": data.recipe.name, **data.protocol.description(), "recipe": recipe, **head_outputs, **more}
    asked = json.loads(json.dumps({**asked, "methods": settings}))
    file = out / QUESTION_FILE
    known = json.loads(file.read_text()) if file.exists() else asked
    methods = {**asked["methods"], **known.get("methods", {})}
    before = dict(flat({**known, "methods": methods}))
    now = dict(flat({**asked, "methods": {**methods, **asked["methods"]}}))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        was, wanted = (", ".join(f"{name} {one.get(name)}" for name in differing) for one in (before, now))
        raise ValueError(f"{out} holds a comparison of {was}; this one is of {wanted}: give it another folder (--out).")
    write_json(file, {**asked, "methods": methods})


def clips_and_folds(recipe: Recipe, splits: int = 1) -> tuple[list[Clip], list[Fold]]:
    """All clips of a recipe, and its folds: as many as it says, else its one split, or so many random ones.

    Raises:
        ValueError: a fold's training and test clips share a source; several splits of a recipe that fixes them.
    """
    divisions = _divisions(recipe, splits)
    clips = next(iter(divisions.values()))
    folds = []
    for name, divided in divisions.items():
        train = [i for i, clip in enumerate(divided) if clip.split == "train"]
        test = [i for i, clip in enumerate(divided) if clip.split == "test"]
        check_disjoint([divided[i] for i in train], [divided[i] for i in test])
        folds.append(Fold(name, torch.tensor(train), torch.tensor(test)))
    return clips, folds


def _divisions(recipe: Recipe, splits: int) -> dict[str, list[Clip]]:
    def varied(**change: int) -> list[Clip]:
        clips: list[Clip] = replace(recipe, **change).clips()  # type: ignore[type-var]  # recipes are dataclasses
        return clips

    num_folds = getattr(recipe, "num_folds", None)
    if splits == 1:
        return {str(n): varied(test_fold=n) for n in range(1, num_folds + 1)} if num_folds else {"test": recipe.clips()}
    if not num_folds and hasattr(recipe, "test_fraction"):
        first: int = recipe.seed  # type: ignore[attr-defined]  # it chooses the fraction
        divisions = {str(seed): varied(seed=seed) for seed in range(first, first + splits)}
        if len({tuple(clip.split for clip in clips) for clips in divisions.values()}) > 1:
            return divisions
    own = f"{num_folds} folds" if num_folds else "a split"
    raise ValueError(f"{recipe.name} comes with {own} of its own, which count: leave --splits {splits} away.")


def stored_heads(trainer: L.Trainer, data: AudioEpisodeDataModule, clips: list[Clip]) -> tuple[Tensor, Tensor, Tensor]:
    """Head outputs (N, K, D) and labels of all clips; clips that cannot be used are False in the mask.

    Raises:
        ValueError: clips have several labels.
    """
    if any(len(clip.labels) > 1 for clip in clips):
        raise ValueError(
            f"{data.recipe.name}: clips have several labels, which compare cannot count: use `calm fit`, or "
            "--data.protocol mcq, which asks for each label alone."
        )
    store = data.make_store(arithmetic(trainer.precision))
    if trainer.is_global_zero:
        data.backbone.clip_processor().warn_of_cut_clips(clips)
    unusable = extract_missing(trainer, clips, HeadExtraction(data.backbone), store, data.batch_size, data.num_workers)
    for reason in unusable.values():
        print(f"left out: {reason}")
    unlabelled = [clip.audio for clip in clips if not clip.labels]
    if unlabelled:
        print(f"left out: {len(unlabelled)} clips without a label, such as {unlabelled[0]}")
    classes = sorted({label for clip in clips for label in clip.labels})
    labels_N = torch.tensor([classes.index(clip.labels[0]) if clip.labels else -1 for clip in clips])
    usable = [i for i in range(len(clips)) if i not in unusable and clips[i].labels]
    heads_NKD = torch.zeros(len(clips), store.num_heads, store.head_dim)
    heads_NKD[usable] = store.read(store.clip_keys([clips[i] for i in usable]))
    mask_N = torch.zeros(len(clips), dtype=torch.bool)
    mask_N[usable] = True
    return heads_NKD, labels_N, mask_N


def _only(fold: Fold, usable_N: Tensor) -> Fold:
    return Fold(fold.name, fold.train[usable_N[fold.train]], fold.test[usable_N[fold.test]])


def anew(method: HeadClassifier) -> Callable[[], HeadClassifier]:
    return lambda: copy.deepcopy(method)


def _drawer(clips: Sequence[Clip]) -> Callable[[Tensor, int, int], list[int]]:
    return lambda pool, shots, seed: draw_support([clips[i] for i in pool.tolist()], shots, seed)


# Rows on disk


def read_rows(file: Path) -> list[Row]:
    """Rows of an earlier, perhaps interrupted comparison, each once; a half-written last line is left out."""
    if not file.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {"method": str, "fold": str, "shots": int, "seed": int}
    names = [field.name for field in fields(Row)]
    with file.open(newline="") as handle:
        whole = [line for line in handle if line.endswith("\n")]
    rows = [
        Row(**{name: kinds.get(name, float)(line[name]) for name in names})
        for line in csv.DictReader(whole)
        if all(line.get(name) not in (None, "") for name in names)
    ]
    return list({row.key: row for row in rows}.values())


def kept(made: Iterator[Row], file: Path) -> Iterator[Row]:
    """Append each row to the file as it comes."""
    names = [field.name for field in fields(Row)]
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(file)
    with file.open("w", newline="") as handle:  # without the half line that a kill may have left
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row.as_dict())
        for row in made:
            writer.writerow(row.as_dict())
            handle.flush()
            yield row
