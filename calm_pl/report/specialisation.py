"""Do classes rely on different heads? Overlap of their heads, where these lie, and what breaks without them.

Shapes: N clips, B batch, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_pl.backbone.precision import arithmetic
from calm_pl.classifier import CalmClassifier
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.labelled import TEST_CHUNK, LabelledHeads, StoredHeads
from calm_pl.methods.base import HeadClassifier
from calm_pl.report.run import Run, heads_for, trusted_weights
from calm_pl.training.module import CalmModule, full_precision

# A class's top heads carry this share of its weight. Those that carry 90 % are nearly all heads that it uses at all.
TOP_SHARE = 0.5


@dataclass(frozen=True)
class Specialisation:
    """What :func:`specialisation` found.

    Attributes:
        heads_per_class: m, the size of each class's head set: its m strongest heads, which carry half of its weight
            (median over classes).
        overlap: mean Jaccard overlap of two classes' sets.
        chance_overlap: the same for random sets of m heads.
        site_share: share of the weight in each attention block, mean over classes.
        accuracy: of each class with all heads; NaN where it has no test clip (in JSON null), so in `ablation_CC`.
        ablation_CC: [a, c] change in the accuracy of class c when the heads of class a are mean-ablated.
        kept: number of heads kept -> accuracy; those with most weight stay, the others are mean-ablated.
        clips: test clips that this was measured on.
    """

    heads_per_class: int
    overlap: float
    chance_overlap: float
    site_share: dict[str, float]
    accuracy: list[float]
    ablation_CC: Tensor
    kept: dict[int, float]
    clips: int

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "heads_per_class": self.heads_per_class,
            "overlap": self.overlap,
            "chance_overlap": self.chance_overlap,
            "site_share": self.site_share,
            "accuracy": _by_class(classes, self.accuracy),
            "ablation": {
                name: _by_class(classes, row) for name, row in zip(classes, self.ablation_CC.tolist(), strict=True)
            },
            "accuracy_with_heads_kept": self.kept,
            "clips": self.clips,
        }


def specialisation(folder: str | Path) -> Specialisation:
    """Measure a run's classifier on its own test clips, from its head store: nothing is decoded or computed anew.

    Heads are mean-ablated: their output is replaced by its mean over the support set, so that they say the same of
    every clip.

    Raises:
        FileNotFoundError: no finished run, or one without a classifier.
        ValueError: its method does not weigh heads, or the head store lacks its clips.
    """
    run = Run.read(folder)
    if not (run.folder / "classifier").is_dir():
        raise FileNotFoundError(f"{folder} holds no classifier: name the folder that `calm fit` left.")
    if run.weights_KC is None:
        raise ValueError(f"{folder}: the method it keeps ({run.kept}) does not weigh heads.")
    method = CalmClassifier.from_pretrained(run.folder, device="cpu").method
    data = _open_data(run)
    if data.multi_label:
        raise ValueError(f"{folder}: its clips have several labels; accuracy by class is for one label a clip.")
    support = data.support()
    batches = list(StoredHeads(data.store, data.keys, data.labels, data.usable("test")))

    size = max(1, round(float(heads_for(run.weights_KC, TOP_SHARE).float().median())))
    sets_CM = run.weights_KC.topk(size, dim=0).indices.T
    mean_KD = support.heads_BKD.mean(0)
    C, K = len(run.classes), len(run.weights_KC)
    full_C, _ = _accuracy(method, batches, mean_KD, torch.tensor([], dtype=torch.long), C)
    without = [_accuracy(method, batches, mean_KD, heads_M, C)[0] for heads_M in sets_CM]
    return Specialisation(
        heads_per_class=size,
        overlap=mean_overlap(sets_CM),
        chance_overlap=chance_overlap(K, size),
        site_share=_site_share(run.weights_KC, run.head_sites),
        accuracy=full_C.tolist(),
        ablation_CC=torch.stack(without) - full_C,
        kept=accuracy_with_heads_kept(method, batches, mean_KD, run.weights_KC),
        clips=sum(len(batch.labels_B) for batch in batches),
    )


def heads_kept(module: CalmModule) -> dict[str, Any] | None:
    """What every run has of :func:`specialisation`: how few heads reach its accuracy, on a chunk of test clips.

    Costs log2(K) passes of the kept method over at most 256 clips: milliseconds for 60 heads; for 1,024 heads and 50
    classes, some seconds of one core.

    Returns:
        None where the method that the run keeps does not weigh heads, or where no head outputs are stored, or
            clips have several labels.
    """
    method, data, device = module.methods[module.classifier], module.data, module.device
    weights_KC = trusted_weights(method, len(module.classes))
    positions = [] if data.streams or data.multi_label else [i for i in data.usable("test") if data.labels[i] >= 0]
    if weights_KC is None or not positions:
        return None
    spread = positions[:: -(-len(positions) // TEST_CHUNK)]
    with full_precision(device):
        mean_KD = data.support().heads_BKD.mean(0).to(device)
        batches = [batch.to(device) for batch in StoredHeads(data.store, data.keys, data.labels, spread)]
        kept = accuracy_with_heads_kept(method, batches, mean_KD, weights_KC)
    return {"accuracy_with_heads_kept": kept, "clips": len(spread)}


def accuracy_with_heads_kept(
    method: HeadClassifier, batches: Sequence[LabelledHeads], mean_KD: Tensor, weights_KC: Tensor
) -> dict[int, float]:
    """Accuracy with the 1, 2, 4, ..., K heads of most weight; the others are mean-ablated."""
    K, C = weights_KC.shape
    ranked_K = weights_KC.mean(1).argsort(descending=True)
    counts = [*(2**power for power in range((K - 1).bit_length())), K]
    return {count: _accuracy(method, batches, mean_KD, ranked_K[count:], C)[1] for count in counts}


def mean_overlap(sets_CM: Tensor) -> float:
    """Mean Jaccard overlap (intersection over union) over all pairs of rows, each a set of M indices."""
    sets = [set(row) for row in sets_CM.tolist()]
    pairs = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i]]
    return sum(pairs) / len(pairs)


def chance_overlap(num_heads: int, size: int) -> float:
    """Expected Jaccard overlap of two random sets of ``size`` out of ``num_heads`` (hypergeometric), exactly."""
    total = math.comb(num_heads, size)
    return sum(
        math.comb(size, shared) * math.comb(num_heads - size, size - shared) / total * shared / (2 * size - shared)
        for shared in range(size + 1)
    )


def _accuracy(
    method: HeadClassifier, batches: Iterable[LabelledHeads], mean_KD: Tensor, ablated: Tensor, num_classes: int
) -> tuple[Tensor, float]:
    """Accuracy of each class (C,), NaN without clips, and of all clips, with some heads replaced by their mean."""
    right_C, total_C = torch.zeros(num_classes), torch.zeros(num_classes)
    for batch in batches:
        heads_BKD = batch.heads_BKD.clone()
        heads_BKD[:, ablated] = mean_KD[ablated]
        with torch.no_grad():
            correct_B = (method(heads_BKD).argmax(1) == batch.labels_B).float().cpu()
        labels_B = batch.labels_B.cpu()
        known_B = labels_B >= 0
        right_C.index_add_(0, labels_B[known_B], correct_B[known_B])
        total_C.index_add_(0, labels_B[known_B], torch.ones(int(known_B.sum())))
    return right_C / total_C, float(right_C.sum() / total_C.sum().clamp_min(1))


def _by_class(classes: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(classes, values, strict=True)}


def _site_share(weights_KC: Tensor, sites: Mapping[str, int]) -> dict[str, float]:
    parts = weights_KC.mean(1).cpu().split(list(sites.values()))
    return {name: float(part.sum()) for name, part in zip(sites, parts, strict=True)}


def _open_data(run: Run) -> AudioEpisodeDataModule:
    """The run's data module with its head store, as its config says."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AudioEpisodeDataModule, "data")
    data: AudioEpisodeDataModule = parser.instantiate(parser.parse_object({"data": run.config["data"]})).data
    data.setup()
    store = data.open_store(arithmetic(run.config["trainer"]["precision"]))
    skipped = {clip["audio"] for clip in run.results["skipped"]}
    missing = {i: "left out by the run" for i in store.missing(data.keys)}
    if absent := [data.clips[i].audio for i in missing if data.clips[i].audio not in skipped]:
        raise ValueError(
            f"the head store lacks {len(absent)} clips of this run, such as {absent[0]}: "
            f"`calm extract --config {run.folder / 'config.yaml'}` reads them again."
        )
    data.leave_out(missing)
    return data
