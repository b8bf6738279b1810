"""``calm classify``: a run's classifier, or one from the hub, on audio files."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calm_pl.classifier import CalmClassifier
    from calm_pl.data.stream import ClipBatch


def main(argv: list[str]) -> int:
    """Print ``path,prediction,confidence``, a line for each class told of a file; exit code 1 if a file, or a folder,
    could not be used."""
    options = _parser().parse_args(argv)
    from calm_pl.audio import EXTENSIONS, NOT_UTF8, is_utf8
    from calm_pl.backbone.errors import BackboneError
    from calm_pl.backbone.processing import CUT_WARNING
    from calm_pl.classifier import CalmClassifier
    from calm_pl.data.unlabelled import audio_files
    from calm_pl.progress import Task

    if options.batch_size < 1:
        sys.exit(f"calm: error: --batch-size {options.batch_size}: at least 1 clip a batch")
    if options.workers < 0:
        sys.exit(f"calm: error: --workers {options.workers}: 0, or more")
    found = [(path, audio_files(path) if path.is_dir() else [path]) for path in options.files]
    named = [file for _, inside in found for file in inside]
    files = [file for file in named if is_utf8(file)]
    unusable = len(named) - len(files)
    for file in named:
        if not is_utf8(file):
            print(f"calm: {os.fsencode(file).decode(errors='backslashreplace')}: {NOT_UTF8}", file=sys.stderr)
    empty = [path for path, inside in found if not inside]
    for path in empty:
        print(f"calm: {path}: no audio file in this folder; looked for {', '.join(EXTENSIONS)}", file=sys.stderr)
    if not files:
        return 1
    try:
        classifier = CalmClassifier.from_pretrained(
            options.classifier, options.backbone, options.device, options.adapter
        )
        top = classifier.top(options.top)
        threshold = 0.0 if options.coverage is None else classifier.threshold(options.coverage)
        # Loads the backbone, so that a wrong one is told before any file.
        classifier.lalm.processor.warn_of_cut_clips(classifier.asked(files))
    except (BackboneError, FileNotFoundError, ValueError) as error:
        sys.exit(f"calm: error: {error}")
    writer = csv.writer(sys.stdout)
    writer.writerow(["path", "prediction", "confidence"])
    # In a terminal the lines themselves show how far it is.
    shown = len(files) > options.batch_size and not sys.stdout.isatty()
    with warnings.catch_warnings(), Task("classifying", len(files), "files", shown) as task:
        warnings.filterwarnings("ignore", message=CUT_WARNING)  # of each batch again
        for batch in _batches(classifier, files, options.batch_size, options.workers):
            for reason in batch.errors:
                print(f"calm: {reason}", file=sys.stderr)
            unusable += len(batch.errors)
            for file, classes in zip(batch.keys, _classes_of(batch, classifier, top), strict=True):
                sure = classes[0][1] >= threshold
                for name, confidence in classes if sure else [("unknown", classes[0][1])]:
                    writer.writerow([file, name, f"{confidence:.4f}"])
            sys.stdout.flush()
            task.advance(len(batch) + len(batch.errors))
    return 1 if unusable or empty else 0


def _batches(classifier: CalmClassifier, files: list[Path], batch_size: int, workers: int) -> Iterable[ClipBatch]:
    """The files, decoded, in their order; the keys of a batch are its files as they were named."""
    from calm_pl.data.stream import ClipBatches, stream_loader

    assert classifier.backbone is not None
    every = range(len(files))
    positions = [list(every[first : first + batch_size]) for first in range(0, len(files), batch_size)]
    batches = ClipBatches(classifier.asked(files), list(map(str, files)), every, positions, classifier.backbone)
    # The first batch of each worker is no sooner there than without workers.
    return stream_loader(batches, min(workers, len(positions) - 1), classifier.lalm.device.type == "cuda")


def _classes_of(batch: ClipBatch, classifier: CalmClassifier, top: int) -> list[list[tuple[str, float]]]:
    """The most probable classes of each of the files; of no file, none."""
    from calm_pl.training.batch_size import run_in_halves

    if batch.inputs is None:
        return []
    heads_BKD = run_in_halves(classifier.lalm.forward, batch.inputs, _tell_halved).cpu()
    return classifier.most_probable(classifier.probabilities(heads_BKD), top)


def _tell_halved(size: int) -> None:
    warnings.warn(
        f"out of memory with a batch of {size} clips: it is run in halves; with a smaller --batch-size none has to be "
        "tried twice",
        stacklevel=2,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calm classify",
        description="Classify audio files; prints CSV: path, prediction, confidence. Where a clip may have several "
        "classes, a line for each, the most probable first.",
        epilog="example: calm classify runs/synthetic-calm-tiny-5shot-seed0 recordings/ > predictions.csv",
    )
    parser.add_argument("classifier", help="run folder, folder written by save_pretrained, or hub id")
    parser.add_argument("files", nargs="+", type=Path, help="audio files, or folders of them")
    parser.add_argument("--backbone", help="where the backbone lies here, if not where it lay when fitting")
    parser.add_argument("--adapter", help="the same of its low-rank adapter, where it was fitted with one")
    parser.add_argument(
        "--top",
        type=int,
        metavar="N",
        help="print the N most probable classes of each clip; default: as many labels as the labelled clips had on "
        "average, rounded, so 1 where each had one",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        help="say 'unknown', in one line, where the most probable class is below the confidence that this share (0.95, "
        "0.9, 0.8, 0.7, 0.5) of the labelled clips reached when they were left out; default: always a class",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=8, help="clips in one pass (default: 8)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes that decode while the model computes; 0: none (default: 2)",
    )
    return parser
