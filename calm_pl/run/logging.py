"""Weights & Biases: Lightning's logger that never stops a run, and what a finished run shows there.

wandb takes two seconds to import, so it is imported where it is used: runs that log elsewhere do not wait for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from calm_pl.audio import AudioError, load_audio
from calm_pl.progress import is_quiet
from calm_pl.training.module import CalmModule

if TYPE_CHECKING:
    import wandb

    from calm_pl.report.run import Run

AUDIO_RATE = 16_000
AUDIO_SECONDS = 5.0


class RunLogger(WandbLogger):
    """Lightning's WandbLogger, which goes on offline where there is no key or no network.

    Args:
        project: W&B's project.
        name: the run's name there; null lets W&B choose.
        save_dir: where W&B keeps its files; empty is the run folder on the command line, else here.
        mode: ``online``, ``offline`` (everything stays here; `wandb sync` sends it later) or ``disabled``; null is
            what the environment's WANDB_MODE says, else online.
        seconds_to_connect: how long W&B's server is waited for before the run goes on offline.
        mistakes: recordings of how many of the most confident mistakes are sent; 0 keeps all audio here.
        classifier: send the classifier as an artifact.
        **kwargs: further arguments of `wandb.init`.
    """

    def __init__(
        self,
        project: str = "calm-pl",
        name: str | None = None,
        save_dir: str = "",
        mode: Literal["online", "offline", "disabled"] | None = None,
        seconds_to_connect: float = 30.0,
        mistakes: int = 8,
        classifier: bool = True,
        **kwargs: Any,
    ) -> None:
        import wandb

        # What was not asked for stays here: the state of a git repository, code, the screen, installed packages.
        settings = wandb.Settings(
            init_timeout=seconds_to_connect,
            disable_git=True,
            disable_code=True,
            console="off",
            x_save_requirements=False,
            silent=is_quiet(),
        )
        super().__init__(name=name, save_dir=save_dir or ".", project=project, mode=mode, settings=settings, **kwargs)
        self.mistakes = mistakes
        self.classifier = classifier

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; started on first use, on rank 0 alone."""
        from wandb.errors import CommError, UsageError

        try:
            return super().experiment
        except (UsageError, CommError) as error:
            reason = str(error).strip().splitlines()[0]
            if isinstance(error, CommError):
                reason = f"no connection to its server ({reason})"
            print(
                f"W&B: {reason}\nThis run is logged offline: `wandb login`, then `wandb sync`, sends it.",
                file=sys.stderr,
            )
            # In the environment too, so that the next run of a sweep does not wait again.
            os.environ["WANDB_MODE"] = self._wandb_init["mode"] = "offline"
            return super().experiment


class LogRun(Callback):
    """Sends W&B what the run folder holds: configuration, figures by class, plots, mistakes to hear, the classifier.

    Must come after `RunFolder`, which writes them. Does nothing for other loggers; metrics go to all of them.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, CalmModule)
        if trainer.is_global_zero and pl_module.run_config:
            for logger in _wandb_loggers(trainer):
                config = yaml.safe_load(pl_module.run_config)
                logger.experiment.config.update(config, allow_val_change=True)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not (loggers := _wandb_loggers(trainer)):
            return
        from calm_pl.report.run import Run

        run = Run.read(trainer.default_root_dir)
        for logger in loggers:
            log_run(logger, run)


def log_run(logger: RunLogger, run: Run) -> None:
    """Send a finished run folder to W&B."""
    import wandb

    experiment = logger.experiment
    experiment.log(
        {
            **{f"test/class_accuracy/{one.name}": one.accuracy for one in run.per_class},
            **{f"plots/{file.stem}": wandb.Image(str(file)) for file in sorted(run.folder.glob("plots/*.png"))},
            "mistakes": _mistakes_table(run, logger.mistakes),
        }
    )
    if run.labelled:
        index = {name: i for i, name in enumerate(run.classes)}
        confusion = wandb.plot.confusion_matrix(
            y_true=[index[p.label] for p in run.labelled],
            preds=[index[p.prediction] for p in run.labelled],
            class_names=run.classes,
        )
        experiment.log({"confusion_matrix": confusion})
    if logger.classifier and (run.folder / "classifier").is_dir():
        artifact = wandb.Artifact(f"classifier-{experiment.id}", type="model", metadata=run.results["methods"])
        artifact.add_dir(str(run.folder / "classifier"))
        experiment.log_artifact(artifact)


def _mistakes_table(run: Run, count: int) -> wandb.Table:
    """The most confident mistakes with their sounds; a clip that cannot be read any more has none."""
    import wandb

    table = wandb.Table(columns=["audio", "label", "prediction", "confidence", "path"])
    for mistake in run.mistakes[:count]:
        try:
            part = (mistake.start, mistake.end, AUDIO_SECONDS)
            wave_T = load_audio(mistake.path, AUDIO_RATE, *part).clamp(-1, 1)
            audio = wandb.Audio(wave_T.numpy(), sample_rate=AUDIO_RATE, caption=Path(mistake.path).name)
        except AudioError:
            audio = None
        table.add_data(audio, mistake.label, mistake.prediction, mistake.confidence, mistake.path)
    return table


def _wandb_loggers(trainer: L.Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
