"""CalmClassifier: labelled clips in, a classifier out that can be saved, loaded and used.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import Self

from calm_pl.backbone.checkpoints import WITHOUT_DOWNLOAD, resolve_checkpoint
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import ClipLike, FrozenLALM, as_clip
from calm_pl.backbone.named import named_backbone
from calm_pl.backbone.spec import Backbone
from calm_pl.classifier_files import (
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    check_number_of_classes,
    class_path,
    classifier_folder,
    method_class,
    named_if_damaged,
    write_files,
)
from calm_pl.clip import DEFAULT_QUESTION, Clip, labels_per_clip
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.metric_space import Whitened


class CalmClassifier:
    """A few-shot audio classifier on the heads of a frozen audio-language model.

    >>> classifier = CalmClassifier().fit(["a.wav", "b.wav"], ["dog", "rain"], backbone="calm-tiny")
    >>> classifier.predict(["c.wav"])
    ['rain']

    Args:
        method: how heads become probabilities; None is CALM in the within-head metric.
        device: where the backbone runs: ``cpu``, ``cuda``, ``cuda:1``; None takes a GPU if there is one.

    Attributes:
        classes: class names (whole numbers, where the labels were), in the order of the columns of
            :meth:`predict_proba`.
        backbone: which model's heads it reads.
        question: what clips are asked that bring no question of their own; None is the usual question.
        labels_per_clip: how many labels a clip that it learned from had on average.

    Raises:
        ValueError: there is no such device here.
    """

    def __init__(self, method: HeadClassifier | None = None, device: str | None = None) -> None:
        self.method = method or _default_method()
        self.device = _usable(device) if device else "cuda" if torch.cuda.is_available() else "cpu"
        self.classes: list[str] = []
        self.backbone: Backbone | None = None
        self.question: str | None = None
        self.labels_per_clip = 1.0
        self.fingerprint: dict[str, str] = {}
        self.dtype = "float32"
        self._lalm: FrozenLALM | None = None

    def fit(
        self,
        files: Iterable[ClipLike],
        labels: Iterable[str] | Iterable[int] | Iterable[Sequence[str]] | Tensor,
        backbone: str | Backbone = "calm-tiny",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> Self:
        """Learn from labelled clips. A fit that fails leaves what was learned before.

        Args:
            files: paths or Clips; a question that all Clips share is asked of clips in use, too.
            labels: class name of each: all text, or all whole numbers; a list, an array or a tensor. A clip with
                several has a list of text, and is an example of each.
            backbone: a shipped name, a folder, a hub id, or a Backbone.
            dtype: of the frozen weights: ``float32``, ``bfloat16`` or ``float16``.
            batch_size: clips in one pass of the backbone.

        Raises:
            ValueError: files and labels differ in number, a label is no name, there are fewer than two classes, or
                files is one path.
            AudioError: a clip that cannot be used, named.
            BackboneError: the backbone cannot be loaded.
        """
        clips, names_of = _several(files), _plain(labels)
        if len(clips) != len(names_of):
            raise ValueError(
                f"{len(clips)} files and {len(names_of)} labels: each clip needs one label, or one list of them."
            )
        names = [name for several in names_of for name in several]
        classes = sorted(set(names))
        if len(classes) < 2:
            known = ", ".join(map(str, classes))
            raise ValueError(f"labels name {len(classes)} class ({known}): at least two are needed.")
        chosen = backbone if isinstance(backbone, Backbone) else named_backbone(backbone)
        fingerprint = _fingerprint(chosen)
        self._lalm = None  # two models may not fit into memory, and an older one can be loaded again
        lalm = chosen.load(dtype, self.device)
        index = {name: i for i, name in enumerate(classes)}
        counts_N = torch.tensor([len(several) for several in names_of])
        heads_NKD = lalm.head_outputs(clips, batch_size=batch_size).repeat_interleave(counts_N, 0)  # a row a label
        self.method.fit(heads_NKD, torch.tensor([index[name] for name in names]), len(classes))
        self.backbone, self.fingerprint, self.dtype = chosen, fingerprint, dtype
        self.classes, self._lalm = classes, lalm
        self.question = _question_of(map(as_clip, clips))
        self.labels_per_clip = len(names) / len(clips)
        return self

    @classmethod
    def from_fitted(
        cls, method: HeadClassifier, classes: Sequence[str], backbone: Backbone, dtype: str, clips: Sequence[Clip] = ()
    ) -> Self:
        """Wrap a method that was fitted elsewhere (by ``CalmModule``) on heads of ``backbone`` for these clips."""
        classifier = cls(method)
        classifier.classes = list(classes)
        classifier.backbone = backbone
        classifier.fingerprint = _fingerprint(backbone)
        classifier.dtype = dtype
        classifier.question = _question_of(clips)
        classifier.labels_per_clip = labels_per_clip(clips)
        return classifier

    @property
    def lalm(self) -> FrozenLALM:
        """The loaded backbone; loaded on first use, and refused if it is not the one that was fitted on."""
        if self._lalm is None:
            backbone = self._fitted()
            _check_same_backbone(self.fingerprint, backbone)
            self._lalm = backbone.load(self.dtype, self.device)
        return self._lalm

    def predict_proba(self, files: Iterable[ClipLike], batch_size: int = 8) -> Tensor:
        """Class probabilities (N, C), float32, columns in the order of ``classes``.

        Raises:
            AudioError: a clip that cannot be used, named.
            ValueError: files is one path, and no list.
        """
        self._fitted()
        return self.probabilities(self.lalm.head_outputs(self.asked(_several(files)), batch_size=batch_size))

    @torch.inference_mode()
    def probabilities(self, heads_NKD: Tensor) -> Tensor:
        """:meth:`predict_proba` of clips whose head outputs are known: those of :attr:`lalm`, float32 on the CPU."""
        probabilities_NC: Tensor = self.method(heads_NKD)
        return probabilities_NC

    def asked(self, files: Iterable[ClipLike]) -> list[Clip]:
        """The clips, with the question of the support set where they bring none."""
        return [clip if clip.question else replace(clip, question=self.question) for clip in map(as_clip, files)]

    def predict(self, files: Iterable[ClipLike], batch_size: int = 8) -> list[str]:
        """The most probable class of each clip. Raises as :meth:`predict_proba`."""
        return [self.classes[i] for i in self.predict_proba(files, batch_size).argmax(1).tolist()]

    def predict_top(
        self, files: Iterable[ClipLike], n: int | None = None, batch_size: int = 8
    ) -> list[list[tuple[str, float]]]:
        """The most probable classes of each clip with their probabilities, the most probable first.

        How many: see :meth:`top`. Raises as it and as :meth:`predict_proba`.
        """
        count = self.top(n)
        return self.most_probable(self.predict_proba(files, batch_size), count)

    def most_probable(self, probabilities_NC: Tensor, n: int) -> list[list[tuple[str, float]]]:
        """The n most probable classes of each clip, as :meth:`predict_top` tells them."""
        order_NC = probabilities_NC.argsort(dim=1, descending=True, stable=True)  # of ties the earlier class
        return [
            [(self.classes[c], float(probabilities_C[c])) for c in order_C[:n].tolist()]
            for probabilities_C, order_C in zip(probabilities_NC, order_NC, strict=True)
        ]

    def top(self, n: int | None = None) -> int:
        """How many classes :meth:`predict_top` tells of a clip: n; by default `labels_per_clip`, rounded.

        Raises:
            ValueError: n is below 1, or more than there are classes.
        """
        self._fitted()
        count = round(self.labels_per_clip) if n is None else n
        if not 1 <= count <= len(self.classes):
            raise ValueError(f"top {count}: of each clip, 1 to {len(self.classes)} classes can be told.")
        return count

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
        known = ", ".join(f"{row['coverage']:g}" for row in rows) or (
            f"none: {type(self.method).__name__} keeps no such figure, or nothing could be left out of its support set"
        )
        raise ValueError(f"coverage={coverage:g}: this classifier knows the confidence for a coverage of {known}.")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``classifier.json`` and ``classifier.safetensors``; the backbone stays where it is.

        One that fails leaves an older classifier in the folder as it was.
        """
        backbone = self._fitted()
        target = Path(folder).expanduser()
        # So that the classifier works from any working directory; a shipped name means the same in each.
        if backbone.path not in WITHOUT_DOWNLOAD and (local := Path(backbone.path).expanduser()).is_dir():
            backbone = replace(backbone, path=str(local.resolve()))
        if backbone.adapter is not None and (local := Path(backbone.adapter).expanduser()).is_dir():
            inside = resolve_checkpoint(backbone.path, backbone.revision) / backbone.adapter
            if not inside.exists():
                backbone = replace(backbone, adapter=str(local.resolve()))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.method.state_dict().items()}
        weights = save(state)
        config = {
            "format": FORMAT,
            "classes": self.classes,
            "method": class_path(self.method),
            "whitened": class_path(self.method.method) if isinstance(self.method, Whitened) else None,
            "backbone": asdict(backbone),
            "backbone_files": self.fingerprint,
            "question": self.question,
            "labels_per_clip": self.labels_per_clip,
            "dtype": self.dtype,
            "choices": self.method.choices(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        contents = {WEIGHTS_FILE: weights, CONFIG_FILE: text.encode()}
        write_files(target, contents)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        backbone: str | Backbone | None = None,
        device: str | None = None,
        adapter: str | None = None,
    ) -> Self:
        """Load a saved classifier: a folder, a run folder (its ``classifier/``), or a hub id.

        Args:
            folder_or_hub_id: where it is.
            backbone: where the backbone lies on this machine, if not where it lay when fitting.
            device: where the backbone runs.
            adapter: where its adapter lies on this machine, if not where it lay when fitting.

        Raises:
            FileNotFoundError: no classifier there.
            BackboneError: ``backbone`` is another one than the classifier was fitted on.
            ValueError: the files are damaged or of an unknown format, or do not belong together; or there is no such
                device here.
        """
        folder = classifier_folder(folder_or_hub_id)
        with named_if_damaged(folder / CONFIG_FILE):
            config = json.loads((folder / CONFIG_FILE).read_bytes())
            if not isinstance(config, dict):
                raise ValueError("it holds no JSON object")
            if config.get("format") != FORMAT:
                raise ValueError(f"it has format {config.get('format')}; this version reads {FORMAT}")
            whitened = config.get("whitened")
            method = Whitened(method_class(whitened)()) if whitened else method_class(config["method"])()
            classes, dtype, fingerprint = list(config["classes"]), config["dtype"], dict(config["backbone_files"])
            # Older classifiers have neither question nor number of labels.
            fitted_on, question = Backbone(**config["backbone"]), config.get("question")
            labels_per_clip = float(config.get("labels_per_clip", 1))
            if not 1 <= labels_per_clip <= len(classes):
                raise ValueError(f"labels_per_clip is {labels_per_clip}, of {len(classes)} classes")
        with named_if_damaged(folder / WEIGHTS_FILE):
            weights = (folder / WEIGHTS_FILE).read_bytes()
            state = load(weights)
            # Older classifiers name no digest.
            if config.get("weights_sha256") not in (None, hashlib.sha256(weights).hexdigest()):
                raise ValueError(f"these are other weights than {CONFIG_FILE} was saved with")
            check_number_of_classes(state, len(classes))
            method.load_state_dict(state)
        classifier = cls(method, device)
        classifier.classes, classifier.dtype, classifier.fingerprint = classes, dtype, fingerprint
        classifier.question, classifier.labels_per_clip = question, labels_per_clip
        moved = fitted_on
        if backbone is not None:
            given = backbone if isinstance(backbone, Backbone) else named_backbone(backbone)
            adapter = adapter or given.adapter
            moved = replace(moved, path=given.path, revision=given.revision)
        if adapter is not None:
            moved = replace(moved, adapter=adapter)
        if moved is not fitted_on:
            _check_same_backbone(fingerprint, moved)
        classifier.backbone = moved
        return classifier

    def _fitted(self) -> Backbone:
        if self.backbone is None:
            raise RuntimeError("this classifier is not fitted yet: call fit(files, labels) or from_pretrained(folder).")
        return self.backbone


def _default_method() -> HeadClassifier:
    from calm_pl.methods.calm import Calm

    return Calm(metric="whitened")


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}): give cpu, cuda or cuda:1, or leave it out."
        ) from error
    return device


def _several(files: Iterable[ClipLike]) -> list[ClipLike]:
    if isinstance(files, (str, bytes, os.PathLike, Clip)):
        raise ValueError(f"files is one clip ({files!r}): give a list, [file], also of one.")
    return list(files)


def _plain(labels: Iterable[Any]) -> list[list[Any]]:
    """Each clip's class names as plain str or int, as JSON keeps them, of whatever arrays, tensors and numpy values
    hold them; each once."""
    if isinstance(labels, (str, bytes)):
        raise ValueError(f"labels is one text ({labels!r}): give a list with one label a clip.")
    given = [_bare(label) for label in labels]
    names_of = [[_bare(name) for name in one] if isinstance(one, (list, tuple)) else [one] for one in given]
    # Whole numbers in a row may be one 0 or 1 a class, and are not guessed at.
    kinds = (str,) if any(isinstance(one, (list, tuple)) for one in given) else (str, int, bool)
    for i, names in enumerate(names_of):
        if not names or any(
            type(name) not in kinds or type(name) is not type(names_of[0][0]) or name == "" for name in names
        ):
            raise ValueError(
                f"labels[{i}] is {given[i]!r}: give names that are all text, none empty, or all whole numbers; several "
                "labels of a clip as a list of text."
            )
    return [list(dict.fromkeys(names)) for names in names_of]


def _bare(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _question_of(clips: Iterable[Clip]) -> str | None:
    """The question that all clips share; without one, tells that clips in use will be asked another."""
    questions = sorted({clip.question or "" for clip in clips})
    if len(questions) > 1:
        warnings.warn(
            f"the classifier was fitted on clips with {len(questions)} different questions; in use, a clip that brings "
            f"none is asked {DEFAULT_QUESTION!r}, and its heads may differ for that",
            stacklevel=3,
        )
        return None
    return next(iter(questions), None) or None


def _fingerprint(backbone: Backbone) -> dict[str, str]:
    """Content hashes of all files that decide what the backbone says, its adapter's too."""
    return {**backbone.fingerprint(), **{f"adapter/{name}": x for name, x in backbone.adapter_fingerprint().items()}}


def _check_same_backbone(fitted_on: dict[str, str], backbone: Backbone) -> None:
    found = _fingerprint(backbone)
    different = sorted(name for name in fitted_on.keys() | found.keys() if fitted_on.get(name) != found.get(name))
    if different:
        raise BackboneError(
            f"the backbone {backbone.path} is not the one this classifier was fitted on: {', '.join(different)} "
            "differ. Give the folder or revision that it was fitted on, or fit it again."
        )
