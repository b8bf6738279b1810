"""What half precision does to head outputs and predictions: `python -m benchmarks.precision`.

Heads of every clip in float32 and in each other precision, as `calm extract` reads them, and once more with float32
arithmetic on weights that were rounded to bfloat16: what the rounding of the weights alone does, below which no
arithmetic of a bfloat16 model gets. Then every method is fitted on support sets of every fold:

    same classifier   fitted on float32 heads, asked float32 queries and the other ones: how often both get one answer
    support too       the same, of a classifier fitted on the other heads

Shapes: N clips, K heads, D head dimension.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.vote import RESULTS
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.clip import Clip
from calm_pl.commands.lightning import hush
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.recipes import Esc10, Synthetic
from calm_pl.data.splits import draw_support
from calm_pl.headstore import HeadStore
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.calm import Calm
from calm_pl.methods.compare import Fold
from calm_pl.training.comparison import clips_and_folds, stored_heads
from calm_pl.training.extraction import HeadExtraction, extract_missing

METHODS: dict[str, Callable[[], HeadClassifier]] = {
    "sav": SAV,
    "calm": Calm,
    "calm_whitened": lambda: Calm(metric="whitened"),
}
EXACT, ROUNDED = "32-true", "bf16 weights, 32-true"
PRECISIONS = ("16-true", "bf16-mixed", "bf16-true")
HIGH_COSINE = 0.999


def trainer(precision: str) -> L.Trainer:
    return L.Trainer(
        precision=precision, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def rounded_heads(backbone: Backbone, clips: list[Clip], root: Path, batch_size: int) -> Tensor:
    """Heads (N, K, D) by float32 arithmetic on weights that a bfloat16 number holds."""
    lalm = backbone.load("float32")
    for weight in lalm.model.parameters():
        weight.copy_(weight.bfloat16())
    store = HeadStore({"rounded": backbone.path}, root, dtype="float32")
    extract_missing(trainer(EXACT), clips, HeadExtraction(backbone, lalm), store, batch_size)
    return store.read(store.clip_keys(clips))


def cosines(heads_NKD: Tensor, exact_NKD: Tensor) -> dict[str, float]:
    cosine_NK = torch.cosine_similarity(heads_NKD, exact_NKD, dim=-1)
    return {
        "median": float(cosine_NK.median()),
        "mean": float(cosine_NK.mean()),
        "lowest": float(cosine_NK.min()),
        "above_0.999": float((cosine_NK > HIGH_COSINE).double().mean()),
    }


def answers(
    heads: dict[str, Tensor], labels_N: Tensor, clips: list[Clip], folds: list[Fold], shots: int, draws: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of test clips by precision and method: same answer as float32's, and right answers."""
    told: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    num_classes = int(labels_N.max()) + 1
    for fold in folds:
        pool = [clips[i] for i in fold.train.tolist()]
        for seed in range(draws):
            support = fold.train[draw_support(pool, shots, seed)]
            for name, make in METHODS.items():
                exact = make().fit(heads[EXACT][support], labels_N[support], num_classes)
                expected_N = exact(heads[EXACT][fold.test]).argmax(1)
                for precision, heads_NKD in heads.items():
                    fitted = make().fit(heads_NKD[support], labels_N[support], num_classes)
                    answer_N, queries_NKD = fitted(heads_NKD[fold.test]).argmax(1), heads_NKD[fold.test]
                    for column, right_N in {
                        "same_classifier": exact(queries_NKD).argmax(1) == expected_N,
                        "support_too": answer_N == expected_N,
                        "accuracy": answer_N == labels_N[fold.test],
                    }.items():
                        told[precision][name][column].append(float(right_N.double().mean()))
    return {
        precision: {name: {c: statistics.fmean(v) for c, v in columns.items()} for name, columns in methods.items()}
        for precision, methods in told.items()
    }


def measure(path: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    recipe = Esc10(data_dir=options.esc10) if options.esc10 else Synthetic()
    recipe.prepare()
    data = AudioEpisodeDataModule(
        recipe, Backbone(path, heads=options.heads), batch_size=options.batch_size, num_workers=1, store=str(root),
        store_dtype="float32",
    )  # fmt: skip
    clips, folds = clips_and_folds(recipe)
    clips = data.asked(clips)
    heads, labels_N = {}, torch.empty(0)
    for precision in (EXACT, *PRECISIONS):
        heads[precision], labels_N, usable_N = stored_heads(trainer(precision), data, clips)
        assert bool(usable_N.all())
    heads[ROUNDED] = rounded_heads(data.backbone, clips, root, options.batch_size)
    said = answers(heads, labels_N, clips, folds, options.shots, options.draws)
    return {
        "clips": len(clips),
        "heads": heads[EXACT].shape[1],
        "precisions": {p: {"cosine": cosines(h, heads[EXACT]), "methods": said[p]} for p, h in heads.items()},
    }


def show(path: str, result: dict[str, Any]) -> None:
    print(f"\n{path}: {result['clips']} clips, {result['heads']} heads")
    print(f"{'':22} cosine: median     mean   lowest  >{HIGH_COSINE}   same classifier, support too, accuracy, %")
    for precision, found in result["precisions"].items():
        cosine = found["cosine"]
        figures = "  ".join(f"{cosine[name]:.5f}" for name in ("median", "mean", "lowest"))
        said = "   ".join(
            f"{name} " + " ".join(f"{100 * share:.1f}" for share in columns.values())
            for name, columns in found["methods"].items()
        )
        print(f"{precision:22}        {figures}  {cosine['above_0.999']:7.2%}   {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["calm-tiny"], help="shipped names, folders or hub ids")
    parser.add_argument("--esc10", help="folder of ESC-10, laid out as ESC-50 is; default: the built-in sounds")
    parser.add_argument("--heads", default="both", choices=("decoder", "encoder", "both"))
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2, help="support sets a fold")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--name", default="precision", help="results/<name>.json")
    options = parser.parse_args()
    hush()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in options.backbones:
            results[path] = measure(path, options, Path(scratch))
            show(path, results[path])
    RESULTS.mkdir(exist_ok=True)
    named = {Path(path).name: result for path, result in results.items()}
    (RESULTS / f"{options.name}.json").write_text(json.dumps({"options": vars(options), **named}, indent=2) + "\n")


if __name__ == "__main__":
    main()
