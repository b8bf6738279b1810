"""The callbacks that leave a run folder: configuration, checkpoint, classifier, results and predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from calm_pl.clip import labels_per_clip
from calm_pl.progress import say
from calm_pl.training.module import CalmModule
from calm_pl.training.results import write_json, write_predictions, write_text

PREDICTIONS_FILE = "predictions.csv"
CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
ON_OTHER_DATA = "on-"  # and the name of a data set: what the classifier of a run was found to do on it
# What a fit and its test leave, besides the configuration.
FOUND = (
    "choices.json", "classifier", "results.json", "heads.json", PREDICTIONS_FILE, "report.html", "plots", CHECKPOINTS,
)  # fmt: skip


class RunFolder(Callback):
    """Writes what people and programs want of a run into the Trainer's ``default_root_dir``, on rank 0.

    ``fit`` leaves ``choices.json`` and ``classifier/``; ``test`` leaves ``results.json``, ``heads.json``,
    ``predictions.csv``, ``report.html`` and ``plots/``; ``predict`` leaves ``predictions.csv``.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CalmModule)
        pl_module.finish()  # callbacks come before the module's own on_fit_end
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_json(folder / "choices.json", pl_module.choices())
            pl_module.to_classifier().save_pretrained(folder / "classifier")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CalmModule)
        self._write_predictions(trainer, pl_module)
        results = pl_module.results()
        if trainer.is_global_zero:
            from calm_pl.report.page import write_report
            from calm_pl.report.run import head_sites
            from calm_pl.report.specialisation import heads_kept

            folder = Path(trainer.default_root_dir)
            results["head_sites"] = head_sites(pl_module.data.heads.head_names or ())
            write_json(folder / "results.json", results)
            if kept := heads_kept(pl_module):
                write_json(folder / "heads.json", kept)
            say("writing the report")
            write_report(folder)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CalmModule)
        self._write_predictions(trainer, pl_module)

    def _write_predictions(self, trainer: L.Trainer, module: CalmModule) -> None:
        indices_N, probabilities_NC, _ = module.scores[module.classifier].of_all_ranks()
        if trainer.is_global_zero:
            data = module.data
            write_predictions(
                Path(trainer.default_root_dir) / PREDICTIONS_FILE,
                data.clips_at(indices_N.tolist()),
                module.classes,
                probabilities_NC,
                round(labels_per_clip(data.usable_clips("support"))),
            )


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that is not a run's, but has files of the names that a run writes.

    Raises:
        ValueError: naming them.
    """
    strange = [name for name in FOUND if (folder / name).exists()]
    if strange and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has {', '.join(strange)}, but no {CONFIG_FILE} as runs of `calm fit` do: what lies there is "
            "kept; name another folder by --run_dir."
        )


def remove_findings(folder: Path, but: str | Path | None = None) -> None:
    """Of a run that is fitted anew with other settings: nothing found by the old ones may stand beside the new.

    Checkpoints stay where the fit goes on from one of them.
    """
    resumed = but is not None and Path(but).absolute().is_relative_to(folder.absolute())
    old = [folder / name for name in FOUND if (folder / name).exists() and not (resumed and name == CHECKPOINTS)]
    old += sorted(folder.glob(f"{ON_OTHER_DATA}*"))
    if old:
        say(f"{folder}: its settings change, so what was found with the old ones goes")
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class SaveRunConfig(SaveConfigCallback):
    """Lightning's configuration callback, writing to the run folder itself whatever the logger is called."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: what is wrong with the data or the backbone must not cost what an earlier run found."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.already_saved:
            return
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False, format="yaml")
            file = folder / self.config_filename
            if file.is_file() and file.read_text() != text:
                remove_findings(folder, but=trainer.ckpt_path)
            write_text(file, text)
        self.already_saved = True
