"""A run folder read back: figures, predictions, and which heads its classifier trusts.

Shapes: K heads, C classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from calm_pl.classifier import CalmClassifier
from calm_pl.methods.base import HeadClassifier
from calm_pl.training.metrics import wilson_interval
from calm_pl.training.results import columns_of, leading_of

CALIBRATION_BINS = 10
OWN_OPTIONS = ("manifest", "shards")  # data sets whose clips may come with options of their own, as many as they like


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.csv``; ``start`` and ``end`` in seconds where the clip is a part of the file."""

    path: str
    label: str
    prediction: str
    confidence: float
    start: float | None = None
    end: float | None = None

    @classmethod
    def read(cls, row: Mapping[str, str]) -> Prediction:
        part = {name: float(row[name]) if row.get(name) else None for name in ("start", "end")}
        return cls(row["path"], row["label"], row["prediction"], float(row["confidence"]), **part)

    @property
    def correct(self) -> bool:
        return self.label == self.prediction


@dataclass(frozen=True)
class ClassAccuracy:
    """How many of a class's test clips were told right, with Wilson's 95 % interval, and what others were taken for."""

    name: str
    correct: int
    total: int
    taken_for: dict[str, int]  # clips by the wrong class that they were given

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> list[float]:
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of similar confidence: what they promised and what they kept."""

    confidence: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> list[float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.count)


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        results: ``results.json``.
        config: ``config.yaml``; empty where there is none.
        predictions: the kept classifier's, one a test clip.
        classes: class names in the classifier's order.
        weights_KC: how much each class trusts each head, columns summing to 1; None where the classifier has no
            such weights (a linear probe) or was not kept.
    """

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]
    predictions: list[Prediction]
    classes: list[str]
    weights_KC: Tensor | None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            FileNotFoundError: it holds no ``results.json``.
        """
        folder = Path(folder)
        if not (folder / "results.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no finished run: it has no results.json. `calm fit` leaves one when it has tested."
            )
        results = json.loads((folder / "results.json").read_text())
        config = yaml.safe_load(_text(folder / "config.yaml")) or {}
        rows = csv.DictReader(io.StringIO(_text(folder / "predictions.csv"), newline=""))
        predictions = list(map(Prediction.read, rows))
        said = {name for p in predictions for name in (p.label, p.prediction) if name}
        if "map" in columns_of(results):  # several labels are joined
            said = {name for joined in said for name in joined.split("|")}
        classes = sorted(said)
        weights_KC = None
        if (folder / "classifier").is_dir():
            classifier = CalmClassifier.from_pretrained(folder, device="cpu")
            classes, weights_KC = classifier.classes, trusted_weights(classifier.method, len(classifier.classes))
        return cls(folder, results, config, predictions, classes, weights_KC)

    @property
    def kept(self) -> str | None:
        """Name of the method that predicts; None where the configuration does not tell."""
        name: str | None = self.config.get("model", {}).get("classifier")
        return name if name in self.results["methods"] else None

    @property
    def all_trust_alike(self) -> bool:
        """Whether all classes have the same weights, as where learning found too little to tell them apart."""
        weights_KC = self.weights_KC
        return weights_KC is not None and bool(torch.allclose(weights_KC, weights_KC[:, :1], rtol=1e-4, atol=1e-7))

    @property
    def columns(self) -> dict[str, str]:
        """Names and titles of the figures that tables show of a method."""
        return columns_of(self.results)

    @property
    def leading(self) -> tuple[str, str]:
        """Name and title of the figure that methods are ranked by; it is a share, more is better."""
        return leading_of(self.results)

    @property
    def multi_label(self) -> bool:
        """Whether clips may have several labels: those that have are of no one class."""
        return "map" in self.columns

    @property
    def ranking(self) -> list[tuple[str, dict[str, Any]]]:
        """Methods that have figures, the best first."""
        measured = [(name, figures) for name, figures in self.results["methods"].items() if figures]
        return sorted(measured, key=lambda named: -float(named[1][self.leading[0]]))

    @property
    def shots(self) -> str:
        return "all" if self.results["shots"] is None else str(self.results["shots"])

    @property
    def unlabelled(self) -> int:
        """How many test clips have no label: figures do not count them."""
        return sum(not p.label for p in self.predictions)

    def among_options(self, method: str) -> bool:
        """Whether a method's answers are among the options that a clip's question lists, not among all classes."""
        results = self.results
        return results["protocol"] == "mcq" and (method == "zero_shot" or results["within_options"])

    def chance(self, method: str) -> float | None:
        """Accuracy of guessing in a method's place; None where clips have several labels, or options of their own."""
        if self.multi_label:
            return None
        if not self.among_options(method):
            return 1 / int(self.results["num_classes"])
        return None if self.results["dataset"] in OWN_OPTIONS else 1 / int(self.results["num_options"])

    @cached_property
    def labelled(self) -> list[Prediction]:
        """Predictions of clips with exactly one known label."""
        known = set(self.classes)
        return [p for p in self.predictions if p.label in known]

    @property
    def mistakes(self) -> list[Prediction]:
        """Wrong predictions, the most confident first."""
        return sorted((p for p in self.labelled if not p.correct), key=lambda p: -p.confidence)

    @property
    def confusion_CC(self) -> Tensor:
        """Counts of test clips: rows are true classes, columns predictions."""
        index = {name: i for i, name in enumerate(self.classes)}
        counts_CC = torch.zeros(len(index), len(index), dtype=torch.long)
        for p in self.labelled:
            counts_CC[index[p.label], index[p.prediction]] += 1
        return counts_CC

    @property
    def per_class(self) -> list[ClassAccuracy]:
        """Accuracy of each class that has test clips, and what it was taken for, in the classes' order."""
        said = {name: Counter(p.prediction for p in self.labelled if p.label == name) for name in self.classes}
        return [
            ClassAccuracy(
                name,
                counts[name],
                counts.total(),
                {other: counts[other] for other in self.classes if other != name and counts[other]},
            )
            for name, counts in said.items()
            if counts
        ]

    @property
    def calibration(self) -> list[CalibrationBin]:
        """Predictions in ten bins of equal width by confidence; empty bins are left out."""
        bins: dict[int, list[Prediction]] = {}
        for p in self.labelled:
            bins.setdefault(min(int(p.confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1), []).append(p)
        return [
            CalibrationBin(sum(p.confidence for p in inside) / len(inside), sum(p.correct for p in inside), len(inside))
            for _, inside in sorted(bins.items())
        ]

    @cached_property
    def specialisation(self) -> dict[str, Any] | None:
        """``heads.json``: how few heads are enough, and what `calm heads` found if it was asked of these results."""
        file = self.folder / "heads.json"
        return json.loads(file.read_text()) if self.is_of_these_results(file) else None

    def is_of_these_results(self, file: Path) -> bool:
        """Whether a file is there and was made after ``results.json``, and not for the results of an earlier run."""
        return file.is_file() and file.stat().st_mtime_ns >= (self.folder / "results.json").stat().st_mtime_ns

    @property
    def heads_kept(self) -> dict[int, float]:
        """Number of heads kept -> accuracy; empty where it was not measured."""
        kept = (self.specialisation or {}).get("accuracy_with_heads_kept", {})
        return {int(count): accuracy for count, accuracy in kept.items()}

    def enough_heads(self, share: float = 0.9) -> int:
        """The fewest heads, of the counts in `heads_kept`, that reach a share of the accuracy of all."""
        kept = self.heads_kept
        return min(count for count, accuracy in kept.items() if accuracy >= share * kept[max(kept)])

    @property
    def head_sites(self) -> dict[str, int]:
        """Where the heads lie, in the order of K: name of the attention block -> its number of heads."""
        sites: dict[str, int] = self.results.get("head_sites") or {"heads": self.results["num_heads"]}
        return sites

    @property
    def head_names(self) -> list[str]:
        """K names such as ``decoder.3.self_attn.5``."""
        return [f"{site}.{head}" for site, count in self.head_sites.items() for head in range(count)]


def trusted_weights(method: HeadClassifier, num_classes: int) -> Tensor | None:
    """How much each class trusts each head, (K, C); None for a method that does not weigh heads."""
    if callable(weights := getattr(method, "weights", None)):
        with torch.no_grad():
            learned_KC: Tensor = weights()
        return learned_KC.detach()
    buffers = dict(method.named_buffers())
    if "weights_KC" in buffers:
        return buffers["weights_KC"]
    if "weights_K" in buffers:
        return buffers["weights_K"][:, None].expand(-1, num_classes)
    return None


def heads_for(weights_KC: Tensor, share: float = 0.9) -> Tensor:
    """How many heads, strongest first, carry ``share`` of each class's weight: (C,) integers."""
    carried_KC = weights_KC.sort(0, descending=True).values.cumsum(0) / weights_KC.sum(0)
    return 1 + (carried_KC < share - 1e-6).sum(0)


def head_sites(names: list[str] | tuple[str, ...]) -> dict[str, int]:
    """Attention blocks and their numbers of heads, from names such as ``decoder.3.self_attn.5``."""
    return dict(Counter(name.rpartition(".")[0] for name in names))


def _text(file: Path) -> str:
    """A file as it is, nothing where there is none: names in CSV may hold what Python takes for the end of a line."""
    if not file.is_file():
        return ""
    with file.open(newline="") as opened:
        return opened.read()
