"""The main job from the command line: fit, test again, predict; and what a run folder holds."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from calm_pl import cli
from calm_pl.classifier import CalmClassifier
from calm_pl.data.manifest import read_manifest
from calm_pl.data.shard_writer import write_shards
from tests.conftest import damaged, tone

METHODS = {"sav", "grw", "calm", "calm_whitened", "linear_probe", "zero_shot"}


def calm(*arguments: str | Path) -> None:
    """Run the command in this process, which has paid for its imports already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["calm", *map(str, arguments)])
        assert cli.main() == 0


def calm_process(*arguments: str | Path, program: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command, or a program around it, in a process of its own."""
    command = [sys.executable, *(["-c", program] if program else ["-m", "calm_pl"]), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def options(tones: Path, tiny_lalm: str, *more: str | Path) -> list[str | Path]:
    return [
        "--data", "folder", "--data.recipe.init_args.data_dir", tones, "--backbone", tiny_lalm,
        "--data.shots", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tones, tiny_lalm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = calm_process("fit", *options(tones, tiny_lalm, "--run_dir", folder))
    assert run.returncode == 0, run.stderr
    assert "calm_whitened" in run.stdout and str(folder) in run.stdout
    return folder


def test_run_folder_is_complete(run_folder):
    assert {file.name for file in run_folder.iterdir()} >= {
        "config.yaml", "results.json", "predictions.csv", "choices.json", "classifier", "checkpoints",
    }  # fmt: skip


def test_results_are_as_designed(run_folder, tones):
    results = json.loads((run_folder / "results.json").read_text())
    assert results["dataset"] == "folder" and results["backbone"] == "tiny-random"
    assert results["protocol"] == "open" and results["shots"] == 2 and results["seed"] == 0
    assert (results["num_classes"], results["num_heads"], results["head_dim"]) == (3, 16, 16)
    assert results["splits"] == {"support": 6, "test": 9} and results["skipped"] == []
    assert results["cut"] == 0
    assert results["methods"].keys() >= METHODS
    for figures in results["methods"].values():
        assert 0 <= figures["accuracy"] <= 1 and figures["nll"] > 0
        low, high = figures["accuracy_interval"]
        assert 0 <= low <= figures["accuracy"] <= high <= 1
    assert results["timing"]["extraction_seconds"] > 0


def test_predictions_agree_with_the_figures(run_folder):
    rows = list(csv.DictReader((run_folder / "predictions.csv").open()))
    assert list(rows[0]) == ["path", "label", "prediction", "confidence"]
    accuracy = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    results = json.loads((run_folder / "results.json").read_text())
    classifier = json.loads((run_folder / "classifier" / "classifier.json").read_text())
    assert len(rows) == 9 and len({row["path"] for row in rows}) == 9
    kept = next(name for name in ("calm_learned", "calm_whitened") if name in results["methods"])
    assert accuracy == pytest.approx(results["methods"][kept]["accuracy"])
    assert classifier["classes"] == ["high", "low", "middle"]


def test_a_run_is_tested_again_from_its_checkpoint_alone(run_folder, tmp_path, monkeypatch):
    before = json.loads((run_folder / "results.json").read_text())
    moved = tmp_path / "elsewhere.ckpt"
    moved.write_bytes((run_folder / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for checkpoint, folder in ((run_folder, run_folder), (moved, tmp_path / "elsewhere")):
        (run_folder / "results.json").unlink(missing_ok=True)
        calm("test", "--ckpt_path", checkpoint)
        after = json.loads((folder / "results.json").read_text())
        assert after["methods"] == before["methods"] and after["splits"] == before["splits"]
        assert (run_folder / "results.json").exists() == (folder == run_folder)
    assert not list((tmp_path / "here").iterdir())
    calm("test", "--ckpt_path", run_folder)


def test_findings_of_other_settings_do_not_stay(tones, tiny_lalm, tmp_path):
    found = ("results.json", "predictions.csv", "report.html", "plots")
    formula = options(tones, tiny_lalm, "--run_dir", tmp_path, "--model", "formula", "--model.zero_shot", "false")
    calm("fit", *formula)
    assert all((tmp_path / name).exists() for name in found)
    calm("fit", *formula, "--test_after_fit", "false", "--data.seed", "1")
    assert not any((tmp_path / name).exists() for name in found)
    assert (tmp_path / "classifier" / "classifier.json").is_file()


def test_validate_tells_where_there_is_nothing_to_validate(run_folder, capsys):
    calm("validate", "--ckpt_path", run_folder / "checkpoints" / "last.ckpt")
    assert "folder has no validation clips" in capsys.readouterr().out


def test_validate_shows_the_validation_clips(tones, tiny_lalm, tmp_path, capsys):
    data = Path(shutil.copytree(tones, tmp_path / "data"))
    (data / "val").mkdir()
    for label in ("low", "middle", "high"):
        (data / "val" / label).mkdir()
        (data / "train" / label / "3.wav").rename(data / "val" / label / "3.wav")
    calm("fit", *options(data, tiny_lalm, "--run_dir", tmp_path / "run"))
    calm("validate", "--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert "3 validation clips" in capsys.readouterr().out


def test_predict_from_a_checkpoint_writes_the_same_predictions(run_folder, capsys):
    before = (run_folder / "predictions.csv").read_text()
    calm("predict", "--ckpt_path", run_folder / "checkpoints" / "last.ckpt")
    assert (run_folder / "predictions.csv").read_text() == before
    assert capsys.readouterr().out.endswith(f"predictions: {run_folder / 'predictions.csv'}\n")


def test_checkpoints_hold_no_backbone_and_no_pickle(run_folder):
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["calm_pl"]["classes"] == ["high", "low", "middle"]
    assert not any("audio_tower" in name or "language_model" in name for name in checkpoint["state_dict"])


def test_the_run_folder_is_a_classifier(run_folder, tones):
    rows = list(csv.DictReader((run_folder / "predictions.csv").open()))
    classifier = CalmClassifier.from_pretrained(run_folder)
    assert classifier.predict([row["path"] for row in rows]) == [row["prediction"] for row in rows]


def test_a_second_run_with_other_shots_loads_no_backbone(run_folder, tones, tiny_lalm, tmp_path, monkeypatch):
    from calm_pl.backbone import content
    from calm_pl.backbone.lalm import FrozenLALM

    def refuse(*args, **kwargs):
        raise AssertionError("the backbone was loaded, or a clip decoded")

    monkeypatch.setattr(FrozenLALM, "from_pretrained", refuse)
    monkeypatch.setattr(content, "load_audio", refuse)
    calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path), "--data.shots", "1")
    assert json.loads((tmp_path / "results.json").read_text())["shots"] == 1


def test_two_processes_give_what_one_gives(run_folder, tones, tiny_lalm, tmp_path):
    two_processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", *two_processes)
    run = calm_process("fit", *arguments, CALM_STORE=str(tmp_path / "heads"))
    assert run.returncode == 0, run.stderr
    one = json.loads((run_folder / "results.json").read_text())
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    assert two["splits"] == one["splits"]
    for name, figures in one["methods"].items():
        assert two["methods"][name]["accuracy"] == figures["accuracy"], name
        # Not likelihoods: two processes round heads otherwise, and of settings as good another may be chosen.
        assert two["methods"][name]["macro_f1"] == figures["macro_f1"], name
    paths = [row["path"] for row in csv.DictReader((tmp_path / "run" / "predictions.csv").open())]
    assert len(paths) == len(set(paths)) == 9


def test_a_process_without_a_test_clip_is_no_fault(tones, tiny_lalm, tmp_path):
    data = Path(shutil.copytree(tones, tmp_path / "data"))
    for file in list((data / "test").rglob("*.wav"))[1:]:
        file.unlink()
    two_processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    run = calm_process("fit", *options(data, tiny_lalm, "--run_dir", tmp_path / "run", *two_processes))
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["splits"]["test"] == 1


def test_unusable_clips_are_named_and_counted(tones, tiny_lalm, tmp_path, capsys):
    data = Path(shutil.copytree(tones, tmp_path / "data"))
    (data / "test" / "low" / "1.wav").write_bytes(b"")
    (data / "test" / "low" / "2.wav").unlink()
    (data / "test" / "low" / "2.wav").symlink_to("gone.wav")
    damaged(data / "test" / "high" / "0.wav")
    calm("fit", *options(data, tiny_lalm, "--run_dir", tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["splits"]["test"] == 6
    reasons = {str(Path(clip["audio"]).relative_to(data)): clip["reason"] for clip in results["skipped"]}
    assert reasons.keys() == {"test/low/1.wav", "test/low/2.wav", "test/high/0.wav"}
    assert "1.wav" in reasons["test/low/1.wav"]
    assert "a link to gone.wav" in reasons["test/low/2.wav"]
    assert "a sample of 3e+38" in reasons["test/high/0.wav"]
    assert "3 clips could not be used" in capsys.readouterr().out


def cut_clips(*arguments: str | Path) -> tuple[int, list[str]]:
    """Of a command that ends in its run folder: `cut` of its results, and what was said of long clips."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calm(*arguments)
    said = [str(warning.message) for warning in told if "longer than the model's window of 5 s" in str(warning.message)]
    return json.loads((Path(arguments[-1]) / "results.json").read_text())["cut"], said


def test_clips_that_are_cut_are_counted_in_every_run(tones, tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    data = Path(shutil.copytree(tones, tmp_path / "data"))
    for number, name in enumerate(("train/low/0", "test/low/1", "test/high/2")):
        tone(data / f"{name}.wav", 500, 6 + number)
    run, every = tmp_path / "run", ("--data.shots", "null", "--data.store", tmp_path / "heads")
    for _ in "cold", "warm":
        cut, said = cut_clips("fit", *options(data, tiny_lalm, *every, "--run_dir", run))
        assert cut == 3 and len(said) == 1 and said[0].startswith("3 of 21 clips")
    split = ("--data.backbone.long_clips", "split")
    assert cut_clips("fit", *options(data, tiny_lalm, *split, "--run_dir", tmp_path / "split")) == (0, [])
    write_shards([clip for clip in read_manifest(data) if clip.split == "test"], tmp_path / "shards", per_shard=4)
    streamed = (
        "test", "--ckpt_path", run / "checkpoints/last.ckpt", "--data", "shards", "--data.recipe.init_args.data_dir",
        tmp_path / "shards", "--data.store", "none", "--data.num_workers", "1", "--run_dir", tmp_path / "stream",
    )  # fmt: skip
    cut, said = cut_clips(*streamed)
    assert cut == 2 and len(said) == 1 and said[0].startswith("2 of 9 clips")


# What a newcomer gets wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "esc51"], "no esc51.yaml .* shipped are .*esc50"),
        (["--data"], "--data needs a value"),
        (["--data", "folder"], "DATA_DIR"),
        (
            ["--data", "folder", "TONES", "--data.shots", "1", "--backbone", "./nowhere"],
            "neither a folder .* nor a hub id",
        ),
        (["--data", "folder", "TONES", "--backbone", "qwen2audio"], r"nor a hub id .*, qwen2-audio, .*, whisper-tiny;"),
        (["--data.shotz", "3"], "unrecognized arguments: --data.shotz 3"),
        (["--shots", "3"], r"--shots is called --data\.shots here"),
        (["--data", "folder", "TONES", "--data.shots", "500"], "500 shots need"),
    ],
)
def test_errors_are_one_line_that_helps(arguments, message, tones, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        calm("fit", *(f"--data.recipe.init_args.data_dir={tones}" if one == "TONES" else one for one in arguments))
    said = str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code != 0 and re.search(message, said), said
    assert len(said.splitlines()) < 6


def test_warnings_are_told_without_lines_of_code(tones, tiny_lalm, tmp_path):
    data = Path(shutil.copytree(tones, tmp_path / "data"))
    (data / "train" / "silence").mkdir()
    told = calm_process("extract", *options(data, tiny_lalm)[:6], "--data.store", tmp_path / "heads")
    assert told.returncode == 0 and f"calm: warning: {data}: no audio in train/silence\n" in told.stderr
    assert "manifest.py" not in told.stderr and "read_manifest" not in told.stderr


def test_shards_that_are_not_there_are_an_error(tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    missing = ("--data.recipe.init_args.data_dir", tmp_path / "none.tar", "--data.store", tmp_path / "heads")
    with pytest.raises(SystemExit, match=r"nothing could be read: .*none\.tar"):
        calm("extract", "--data", "shards", *missing, "--backbone", tiny_lalm, "--trainer.accelerator", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test"], "name it by --ckpt_path RUN"),
        (["test", "--ckpt_path", "."], "is a folder without checkpoints/last.ckpt"),
        (["test", "--ckpt_path", "runs/nope"], "--ckpt_path runs/nope is not there: name a folder that `calm fit`"),
        (["predict", "--ckpt_path=torn.ckpt"], "torn.ckpt is damaged, or no checkpoint of `calm fit`"),
        (["fit", "--config", "none.yaml"], "none.yaml: there is no such file"),
        (["fit", "--trainer.devices", "two"], "the Trainer cannot be made: `devices`"),
        (["compare", "--shots", "1,two"], "numbers from 1"),
        (["heads", "run"], "holds no classifier"),
    ],
)
def test_runs_that_cannot_be_used_are_told(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("torn.ckpt").write_bytes(b"PK torn")
    Path("run").mkdir()
    Path("run/results.json").write_text('{"methods": {}}')
    with pytest.raises(SystemExit, match=message):
        calm(*arguments)


def test_nobody_reading_on_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "calm_pl", "datasets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as listing:
        assert listing.stdout is not None and listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == ""


def test_what_the_system_refuses_is_told_in_one_line(run_folder, tmp_path):
    (tmp_path / "file").touch()
    test = calm_process("test", "--ckpt_path", run_folder, "--run_dir", tmp_path / "file")
    assert test.returncode == 1 and "Traceback" not in test.stderr
    assert re.search(r"calm: error: .*File exists", test.stderr), test.stderr


def test_a_mistyped_backbone_is_told_before_any_data_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="neither a folder"):
        calm("fit", "--backbone", "./nowhere", f"--data.recipe.init_args.data_dir={tmp_path / 'sounds'}")
    assert not (tmp_path / "sounds").exists()


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fti"])
    assert "choose one of: fit" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    heavy = ("torch", "lightning", "transformers", "wandb")
    program = (
        "import sys\nfrom calm_pl import cli\ncli.main(['--help'])\n"
        f"sys.exit(','.join(sorted(set({heavy!r}) & set(sys.modules))) or 0)"
    )
    run = calm_process(program=program)
    assert run.returncode == 0, run.stderr


def test_what_an_output_cannot_encode_is_escaped(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(cli, "_run", lambda argv: print("5 shots · Vögel", flush=True) or 0)
    assert cli.main(["report"]) == 0
    assert shown.getvalue() == b"5 shots \\xb7 V\\xf6gel\n"


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_with_the_way_out(tones, tiny_lalm, tmp_path):
    with pytest.raises(SystemExit, match="torch sees no GPU here. --trainer.accelerator auto"):
        calm("fit", "--trainer", "gpu", "--data", "folder", "--data.recipe.init_args.data_dir", tones,
             "--backbone", tiny_lalm, "--run_dir", tmp_path)  # fmt: skip
