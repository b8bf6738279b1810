"""CalmClassifier: labelled clips in, a classifier out that can be saved, loaded and used.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import ClipLike, FrozenLALM
from calm_pl.backbone.named import named_backbone
from calm_pl.backbone.spec import Backbone
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.metric_space import Whitened

CONFIG_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"
FORMAT = 1
# A saved classifier names the class that reads it; nothing outside this package is ever imported for it.
TRUSTED_PACKAGE = "calm_pl."


class CalmClassifier:
    """A few-shot audio classifier on the heads of a frozen audio-language model.

    >>> classifier = CalmClassifier().fit(["a.wav", "b.wav"], ["dog", "rain"], backbone="calm-tiny")
    >>> classifier.predict(["c.wav"])
    ['rain']

    Args:
        method: how heads become probabilities; None is CALM in the within-head metric.
        device: where the backbone runs; None takes a GPU if there is one.

    Attributes:
        classes: class names, in the order of the columns of :meth:`predict_proba`.
        backbone: which model's heads it reads.
    """

    def __init__(self, method: HeadClassifier | None = None, device: str | None = None) -> None:
        self.method = method or _default_method()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.classes: list[str] = []
        self.backbone: Backbone | None = None
        self.fingerprint: dict[str, str] = {}
        self.dtype = "float32"
        self._lalm: FrozenLALM | None = None

    def fit(
        self,
        files: Sequence[ClipLike],
        labels: Sequence[str],
        backbone: str | Backbone = "calm-tiny",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> Self:
        """Learn from labelled clips.

        Args:
            files: paths or Clips.
            labels: class name of each.
            backbone: a shipped name, a folder, a hub id, or a Backbone.
            dtype: of the frozen weights: ``float32``, ``bfloat16`` or ``float16``.
            batch_size: clips in one pass of the backbone.

        Raises:
            ValueError: files and labels differ in number, or there are fewer than two classes.
            AudioError: a clip that cannot be used, named.
            BackboneError: the backbone cannot be loaded.
        """
        if len(files) != len(labels):
            raise ValueError(f"{len(files)} files and {len(labels)} labels: each clip needs one label.")
        classes = sorted(set(labels))
        if len(classes) < 2:
            raise ValueError(f"labels name {len(classes)} class ({', '.join(classes)}): at least two are needed.")
        self.backbone = backbone if isinstance(backbone, Backbone) else named_backbone(backbone)
        self.dtype = dtype
        self.fingerprint = self.backbone.fingerprint()
        self._lalm = None
        self.classes = classes
        index = {name: i for i, name in enumerate(classes)}
        heads_NKD = self.lalm.head_outputs(files, batch_size=batch_size)
        self.method.fit(heads_NKD, torch.tensor([index[label] for label in labels]), len(classes))
        return self

    @classmethod
    def from_fitted(cls, method: HeadClassifier, classes: Sequence[str], backbone: Backbone, dtype: str) -> Self:
        """Wrap a method that was fitted elsewhere (by ``CalmModule``) on heads of ``backbone``."""
        classifier = cls(method)
        classifier.classes = list(classes)
        classifier.backbone = backbone
        classifier.fingerprint = backbone.fingerprint()
        classifier.dtype = dtype
        return classifier

    @property
    def lalm(self) -> FrozenLALM:
        """The loaded backbone; loaded on first use, and refused if it is not the one that was fitted on."""
        if self._lalm is None:
            backbone = self._fitted()
            _check_same_backbone(self.fingerprint, backbone)
            self._lalm = backbone.load(self.dtype, self.device)
        return self._lalm

    def predict_proba(self, files: Sequence[ClipLike], batch_size: int = 8) -> Tensor:
        """Class probabilities (N, C), float32, columns in the order of ``classes``. Raises AudioError."""
        self._fitted()
        with torch.inference_mode():
            probabilities_NC: Tensor = self.method(self.lalm.head_outputs(files, batch_size=batch_size))
        return probabilities_NC

    def predict(self, files: Sequence[ClipLike], batch_size: int = 8) -> list[str]:
        """The most probable class of each clip. Raises AudioError."""
        return [self.classes[i] for i in self.predict_proba(files, batch_size).argmax(1).tolist()]

    def threshold(self, coverage: float) -> float:
        """The confidence that this share of the support clips reached when they were left out.

        A clip whose greatest probability in :meth:`predict_proba` is below it may be none of the classes.

        Raises:
            ValueError: the method keeps no such figure for this coverage; the message tells for which it does.
        """
        rows = self.method.choices().get("calibration", {}).get("unknown_thresholds", [])
        for row in rows:
            if row["coverage"] == coverage:
                return float(row["threshold"])
        known = (
            ", ".join(f"{row['coverage']:g}" for row in rows) or "none: nothing could be left out of its support set"
        )
        raise ValueError(f"coverage={coverage:g}: this classifier knows the confidence for a coverage of {known}.")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``classifier.json`` and ``classifier.safetensors``; the backbone stays where it is."""
        backbone = self._fitted()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        local = Path(backbone.path).expanduser()
        if local.is_dir():  # so that the classifier works from any working directory
            backbone = replace(backbone, path=str(local.resolve()))
        config = {
            "format": FORMAT,
            "classes": self.classes,
            "method": _class_path(self.method),
            "whitened": _class_path(self.method.method) if isinstance(self.method, Whitened) else None,
            "backbone": asdict(backbone),
            "backbone_files": self.fingerprint,
            "dtype": self.dtype,
            "choices": self.method.choices(),
        }
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.method.state_dict().items()}
        weights_scratch, config_scratch = (target / f".{name}.{os.getpid()}" for name in (WEIGHTS_FILE, CONFIG_FILE))
        save_file(state, weights_scratch)
        config_scratch.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        # The config goes first and comes last: a folder with one is complete, and never half an older classifier.
        (target / CONFIG_FILE).unlink(missing_ok=True)
        weights_scratch.replace(target / WEIGHTS_FILE)
        config_scratch.replace(target / CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        backbone: str | Backbone | None = None,
        device: str | None = None,
    ) -> Self:
        """Load a saved classifier: a folder, a run folder (its ``classifier/``), or a hub id.

        Args:
            folder_or_hub_id: where it is.
            backbone: where the backbone lies on this machine, if not where it lay when fitting.
            device: where the backbone runs.

        Raises:
            FileNotFoundError: no classifier there.
            BackboneError: ``backbone`` is another one than the classifier was fitted on.
            ValueError: the files are damaged or of an unknown format.
        """
        folder = _classifier_folder(folder_or_hub_id)
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        if config.get("format") != FORMAT:
            raise ValueError(f"{folder / CONFIG_FILE} has format {config.get('format')}; this version reads {FORMAT}.")
        whitened = config.get("whitened")
        method = Whitened(_method_class(whitened)()) if whitened else _method_class(config["method"])()
        method.load_state_dict(load_file(folder / WEIGHTS_FILE))
        classifier = cls(method, device)
        classifier.classes = config["classes"]
        classifier.dtype = config["dtype"]
        classifier.fingerprint = config["backbone_files"]
        fitted_on = Backbone(**config["backbone"])
        if backbone is None:
            classifier.backbone = fitted_on
        else:
            given = backbone if isinstance(backbone, Backbone) else named_backbone(backbone)
            classifier.backbone = replace(fitted_on, path=given.path, revision=given.revision)
            _check_same_backbone(classifier.fingerprint, classifier.backbone)
        return classifier

    def _fitted(self) -> Backbone:
        if self.backbone is None:
            raise RuntimeError("this classifier is not fitted yet: call fit(files, labels) or from_pretrained(folder).")
        return self.backbone


def _default_method() -> HeadClassifier:
    from calm_pl.methods.calm import Calm

    return Calm(metric="whitened")


def _check_same_backbone(fitted_on: dict[str, str], backbone: Backbone) -> None:
    found = backbone.fingerprint()
    different = sorted(name for name in fitted_on.keys() | found.keys() if fitted_on.get(name) != found.get(name))
    if different:
        raise BackboneError(
            f"the backbone {backbone.path} is not the one this classifier was fitted on: {', '.join(different)} "
            "differ. Give the folder or revision that it was fitted on, or fit it again."
        )


def _class_path(method: HeadClassifier) -> str:
    return f"{type(method).__module__}.{type(method).__qualname__}"


def _method_class(class_path: str) -> type[HeadClassifier]:
    if not class_path.startswith(TRUSTED_PACKAGE):
        raise ValueError(f"the classifier names {class_path}, which is no method of calm_pl: it is not loaded.")
    module, _, name = class_path.rpartition(".")
    method_class = getattr(import_module(module), name)
    if not issubclass(method_class, HeadClassifier):
        raise ValueError(f"the classifier names {class_path}, which is no method.")
    return method_class  # type: ignore[no-any-return]


def _classifier_folder(folder_or_hub_id: str | os.PathLike[str]) -> Path:
    folder = Path(folder_or_hub_id).expanduser()
    for candidate in (folder, folder / "classifier"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    name = os.fspath(folder_or_hub_id)
    if folder.exists() or name.count("/") != 1:
        raise FileNotFoundError(
            f"{folder} holds no classifier ({CONFIG_FILE} is not there): give a folder written by save_pretrained, "
            "a run folder, or a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and https://huggingface.co/{name} cannot be reached or does not exist ({error})"
        ) from error
