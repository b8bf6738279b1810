"""``test_fold: all``: every fold of a data set is fitted and tested once, and the figures are averaged."""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from calm_pl.backbone.processing import CUT_WARNING
from calm_pl.data.recipes import Recipe
from calm_pl.methods.compare import half_width
from calm_pl.progress import quiet, say
from calm_pl.run.finished import is_finished
from calm_pl.training.results import NO_SHARE, print_table, write_json, write_text
from calm_pl.training.trainer import CalmTrainer

if TYPE_CHECKING:
    from calm_pl.data.datamodule import AudioEpisodeDataModule
    from calm_pl.run.cli import CalmCLI


def folds_of(recipe: Recipe) -> list[int]:
    """The folds that a recipe with ``test_fold: all`` is run on; none where it names one, or has none."""
    if getattr(recipe, "test_fold", None) != "all":
        return []
    return list(range(1, recipe.num_folds + 1))  # type: ignore[attr-defined]  # what has a test_fold has num_folds


def run_folds(cli: CalmCLI) -> None:
    """Fit and test each fold in a folder of its own, then average into the run folder.

    Folds whose results are there already are left alone. Every rank runs every fold, so it does not matter who
    started the ranks.
    """
    out = Path(cli.asked["fit"].run_dir)
    folders = {number: out / f"fold{number}" for number in folds_of(cli.datamodule.recipe)}
    left = [n for n, folder in folders.items() if not is_finished(folder, _fold_config(cli.config_dump, n))]
    if len(left) < len(folders):
        say(f"{len(folders) - len(left)} of {len(folders)} folds are finished already")
    if left:  # every clip is tested once, so that none is read in vain; the backbone is loaded once
        assert isinstance(cli.trainer, CalmTrainer)
        cli.trainer.extract(cli.model, cli.datamodule)
    for number in left:
        config = cli.asked.clone()
        config["fit"].data.recipe.init_args.test_fold = number
        config["fit"].run_dir = str(folders[number])
        (folders[number] / "results.json").unlink(missing_ok=True)  # of another configuration
        with quiet(), warnings.catch_warnings():  # the folds are told one by one, in a line each
            warnings.filterwarnings("ignore", message=CUT_WARNING)  # told of all clips above
            type(cli)(config, about=f"fold {number}")
        if "wandb" in sys.modules:  # else the next fold would go on in this one's W&B run
            sys.modules["wandb"].finish()
    if all((folder / "results.json").is_file() for folder in folders.values()):
        write_average(list(folders.values()), out, cli.config_dump, cli.datamodule)


def _fold_config(config: Mapping[str, Any], number: int) -> dict[str, Any]:
    recipe = config["data"]["recipe"]
    of_fold = {**recipe, "init_args": {**recipe["init_args"], "test_fold": number}}
    return {**config, "data": {**config["data"], "recipe": of_fold}}


@rank_zero_only
def write_average(folders: Sequence[Path], out: Path, config: Mapping[str, Any], data: AudioEpisodeDataModule) -> None:
    """Leave in ``out`` what a run leaves of one fold, the classifier apart: there is one in each fold's folder."""
    from calm_pl.report.page import write_report

    results = average({folder.name: json.loads((folder / "results.json").read_text()) for folder in folders})
    # Of the whole set, each of whose clips is tested once: those of the folds have support clips in common.
    results["cut"] = sum(map(data.backbone.clip_processor().is_cut, data.recipe.clips()))
    write_text(out / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    lines = [(folder / "predictions.csv").read_text().splitlines(keepends=True) for folder in folders]
    write_text(out / "predictions.csv", lines[0][0] + "".join(line for of_fold in lines for line in of_fold[1:]))
    write_json(out / "results.json", results)
    write_report(out)
    print_table(results, results["splits"]["test"])
    print(f"run folder: {out.resolve()}")


def average(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One ``results.json`` of several: means over folds, intervals of the mean by Student's t over folds.

    ``splits`` counts every clip that was tested, and the support clips of a fold on average.
    """
    each = list(folds.values())
    names = [name for name in each[0]["methods"] if all(one["methods"].get(name) for one in each)]
    return {
        **each[0],
        "splits": {
            "support": round(statistics.fmean(one["splits"]["support"] for one in each)),
            "test": sum(one["splits"]["test"] for one in each),
        },
        "methods": {name: _mean_figures([one["methods"][name] for one in each]) for name in names},
        "folds": {fold: {name: one["methods"][name]["accuracy"] for name in names} for fold, one in folds.items()},
        "timing": {name: sum(one["timing"].get(name, 0.0) for one in each) for name in each[0]["timing"]},
        "skipped": list({item["audio"]: item for one in each for item in one["skipped"]}.values()),
    }


def _mean_figures(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in figures[0]:
        if name.endswith("_interval"):
            continue
        values = [one[name] for one in figures]
        mean, half = statistics.fmean(values), half_width(values)
        highest = float("inf") if name in NO_SHARE else 1.0
        found[name], found[f"{name}_interval"] = mean, [max(0.0, mean - half), min(highest, mean + half)]
    return found
