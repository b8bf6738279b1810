"""CalmModule under Lightning's own Trainer: learning, resuming, precision, processes, callbacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from calm_pl import AudioEpisodeDataModule, Backbone, CalmModule
from calm_pl.data.recipes import Folder
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights

STEPS = 25


def data_module(tones: Path, tiny_lalm: str, **options: object) -> AudioEpisodeDataModule:
    return AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), num_workers=0, **{"shots": 4, **options})


def module(**options: object) -> CalmModule:
    learned = LearnedWeights(steps=STEPS, shrinkage=0.3, tau=0.15, to_start=0.1, to_shared=0.1, **options)
    return CalmModule({"calm": Calm(), "calm_learned": learned}, classifier="calm_learned", zero_shot=False)


def trainer(folder: Path, **options: object) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def moves(model: CalmModule) -> torch.Tensor:
    return model.methods["calm_learned"].get_parameter("moves_KC").detach()


@pytest.fixture(scope="module")
def unbroken(tones, tiny_lalm, tmp_path_factory) -> CalmModule:
    model = module()
    trainer(tmp_path_factory.mktemp("unbroken")).fit(model, datamodule=data_module(tones, tiny_lalm))
    return model


def test_it_takes_the_steps_the_support_set_asked_for_and_learns(unbroken):
    assert unbroken.trainer.global_step == STEPS
    assert moves(unbroken).abs().max() > 0.01
    weights_KC = unbroken.methods["calm_learned"].weights()
    torch.testing.assert_close(weights_KC.sum(0), torch.ones(3))


def test_the_trainers_loop_and_the_plain_loop_agree(unbroken, tones, tiny_lalm):
    data = data_module(tones, tiny_lalm)
    data.setup()
    data.open_store("float32")
    support = data.support()
    alone = LearnedWeights(steps=STEPS, shrinkage=0.3, tau=0.15, to_start=0.1, to_shared=0.1)
    alone.fit(support.heads_BKD, support.labels_B, 3)
    torch.testing.assert_close(alone.get_parameter("moves_KC").detach(), moves(unbroken), atol=1e-5, rtol=0)


def test_learners_take_as_many_steps_as_each_asked_for(tones, tiny_lalm, tmp_path):
    def learner(steps: int) -> LearnedWeights:
        return LearnedWeights(steps=steps, shrinkage=0.3, tau=0.15, to_start=0.1, to_shared=0.1, averaging=0.5)

    learners = {f"of_{steps}": learner(steps) for steps in (0, 4, 11)}
    run = trainer(tmp_path)
    run.fit(CalmModule({**learners}, classifier="of_4"), datamodule=data_module(tones, tiny_lalm))
    assert run.global_step == 11
    support = run.datamodule.support()
    for steps, together in zip((0, 4, 11), learners.values(), strict=True):
        alone = learner(steps).fit(support.heads_BKD, support.labels_B, 3)
        moved, expected = (one.get_parameter("moves_KC").detach() for one in (together, alone))
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
        assert bool(moved.any()) == bool(steps)


def test_resuming_goes_on_averaging(tones, tiny_lalm, tmp_path):
    whole, first, resumed = (module(averaging=0.9) for _ in range(3))
    trainer(tmp_path).fit(whole, datamodule=data_module(tones, tiny_lalm))
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=13, save_top_k=-1, filename="{step}")
    stopped = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=13)
    stopped.fit(first, datamodule=data_module(tones, tiny_lalm))
    trainer(tmp_path).fit(resumed, datamodule=data_module(tones, tiny_lalm), ckpt_path=tmp_path / "step=13.ckpt")
    torch.testing.assert_close(moves(resumed), moves(whole), atol=1e-6, rtol=0)


def test_resuming_in_the_middle_gives_the_same_weights(unbroken, tones, tiny_lalm, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=13, save_top_k=-1, filename="{step}")
    first = module()
    trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=13).fit(
        first, datamodule=data_module(tones, tiny_lalm)
    )
    assert not torch.allclose(moves(first), moves(unbroken), atol=1e-4)
    resumed = module()
    trainer(tmp_path).fit(resumed, datamodule=data_module(tones, tiny_lalm), ckpt_path=tmp_path / "step=13.ckpt")
    assert resumed.trainer.global_step == STEPS
    torch.testing.assert_close(moves(resumed), moves(unbroken), atol=1e-5, rtol=0)


PROGRAM = """
import sys, torch, lightning as L
from pathlib import Path
from tests.test_module import data_module, module, moves, trainer
folder, tones, model, noise = sys.argv[1:]
calm = module()
run = trainer(folder, devices=2, strategy="ddp")
data = data_module(tones, model)
clean = data.support
def support():  # as sums on a GPU do
    found = clean()
    found.heads_BKD += run.global_rank * float(noise) * torch.randn(found.heads_BKD.shape)
    return found
data.support = support
run.fit(calm, datamodule=data)
if run.is_global_zero:
    torch.save(moves(calm), folder + "/moves.pt")
run.test(calm, datamodule=data_module(tones, model), verbose=False)
Path(folder, f"accuracy-{run.global_rank}").write_text(str(calm.figures["calm_learned"]["accuracy"]))
"""


@pytest.mark.parametrize("noise", ["0", "1e-7"])
def test_two_processes_learn_what_one_learns(unbroken, tones, tiny_lalm, tmp_path, noise):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(tmp_path), str(tones), tiny_lalm, noise]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    two = torch.load(tmp_path / "moves.pt", weights_only=True)
    torch.testing.assert_close(two, moves(unbroken), atol=1e-5, rtol=0)
    first, second = ((tmp_path / f"accuracy-{rank}").read_text() for rank in (0, 1))
    assert first == second  # both ranks know the same figure


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_learning_stays_in_float32(tones, tiny_lalm, tmp_path, precision):
    model = module()
    run = trainer(tmp_path, precision=precision)
    run.fit(model, datamodule=data_module(tones, tiny_lalm))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.methods["calm"].prototypes_CKD.dtype == torch.float32
    run.test(model, datamodule=data_module(tones, tiny_lalm), verbose=False)
    assert 0 <= model.figures["calm_learned"]["accuracy"] <= 1


def test_callbacks_watch_the_support_set(tones, tiny_lalm, tmp_path):
    stop = EarlyStopping("support/calm_learned/nll", min_delta=100.0, patience=1, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, monitor="support/calm_learned/nll", filename="best", save_on_train_epoch_end=True)
    model = module()
    run = trainer(tmp_path, callbacks=[stop, best], enable_checkpointing=True)
    run.fit(model, datamodule=data_module(tones, tiny_lalm))
    assert run.global_step == 20 < STEPS  # two epochs of ten steps, the second no better by 100
    assert best.best_model_score is not None and Path(best.best_model_path).is_file()
    assert torch.load(best.best_model_path, weights_only=True)["calm_pl"]["classes"] == ["high", "low", "middle"]


@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"overfit_batches": 2}, {"barebones": True}, {"gradient_clip_val": 0.1}],
    ids=lambda options: next(iter(options)),
)
def test_the_trainers_switches_work(tones, tiny_lalm, tmp_path, options):
    if "barebones" in options:
        run = L.Trainer(accelerator="cpu", devices=1, barebones=True, default_root_dir=tmp_path)
    else:
        run = trainer(tmp_path, **options)
    model = module()
    run.fit(model, datamodule=data_module(tones, tiny_lalm))
    assert 1 <= run.global_step <= STEPS and torch.isfinite(moves(model)).all()


def test_optimiser_and_scheduler_can_be_given(tones, tiny_lalm, tmp_path):
    model = CalmModule(
        {"calm_learned": LearnedWeights(steps=12, shrinkage=0.3, tau=0.15)},
        classifier="calm_learned",
        zero_shot=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    run = trainer(tmp_path)
    run.fit(model, datamodule=data_module(tones, tiny_lalm))
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert run.current_epoch == 2 and run.global_step == 12  # an epoch of ten steps, and one of two
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.1)  # stepped after the whole one


def test_one_shot_works_and_learns_nothing(tones, tiny_lalm, tmp_path):
    model = CalmModule({"calm_learned": LearnedWeights()}, classifier="calm_learned", zero_shot=False)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data_module(tones, tiny_lalm, shots=1))
    run.test(model, datamodule=data_module(tones, tiny_lalm, shots=1), verbose=False)
    assert run.global_step == 0 and not moves(model).any()
    assert model.figures["calm_learned"]["accuracy"] > 1 / 3  # of tones that are easily told


def test_clips_without_labels_shape_the_metric_at_one_shot(tones, tiny_lalm, tmp_path):
    weights = {}
    for unlabelled in (None, str(tones / "train")):
        learned = LearnedWeights()
        model = CalmModule({"calm_learned": learned}, classifier="calm_learned", zero_shot=False)
        data = data_module(tones, tiny_lalm, shots=1, unlabelled=unlabelled)
        trainer(tmp_path).fit(model, datamodule=data)
        assert len(data.parts["unlabelled"]) == (12 if unlabelled else 0)
        assert learned.unlabelled_NKD is None
        weights[unlabelled] = learned.stretch_KR
    assert not torch.equal(*weights.values())
    with pytest.raises(ValueError, match="unlabelled is for protocol=open"):
        data_module(tones, tiny_lalm, protocol="mcq", unlabelled=str(tones))


def test_a_checkpoint_of_other_classes_is_refused(unbroken, tones, tiny_lalm, tmp_path):
    import shutil

    file = tmp_path / "last.ckpt"
    unbroken.trainer.save_checkpoint(file)
    other = Path(shutil.copytree(tones, tmp_path / "data"))
    for split in ("train", "test"):
        shutil.rmtree(other / split / "low")
    with pytest.raises(ValueError, match="the checkpoint knows the classes"):
        trainer(tmp_path).test(module(), datamodule=data_module(other, tiny_lalm), ckpt_path=file)


def test_without_a_data_module_it_says_what_it_needs(tmp_path):
    with pytest.raises(TypeError, match="AudioEpisodeDataModule"):
        trainer(tmp_path).fit(module(), train_dataloaders=[0])


def test_an_unknown_classifier_lists_the_methods():
    with pytest.raises(ValueError, match="classifier='svm' is none of the methods: calm"):
        CalmModule({"calm": Calm()}, classifier="svm")
