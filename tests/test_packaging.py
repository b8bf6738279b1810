"""The wheel holds everything: configurations and the built-in model are found where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build/ folder behind that would find its way into the next wheel.
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "runs", "tests", "wandb", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return next(folder.glob("calm_pl-*.whl"))


def test_every_config_and_the_model_are_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"calm_pl/_conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    model = {f"calm_pl/backbone/calm-tiny/{file.name}" for file in (ROOT / "calm_pl/backbone/calm-tiny").iterdir()}
    templates = {str(file.relative_to(ROOT)) for file in (ROOT / "calm_pl").rglob("*.j2")}
    assert len(configs) > 10 and "calm_pl/backbone/calm-tiny/model.safetensors" in model
    assert configs | model | templates | {"calm_pl/py.typed"} <= inside
    assert not any(name.startswith(("tests/", "pretraining/", "benchmarks/")) for name in inside)


def test_installed_elsewhere_it_finds_both(wheel, tmp_path):
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)  # all that installing a pure wheel does, without pip's seconds
    program = (
        "import calm_pl; from calm_pl.conf import find_config; from calm_pl.backbone.named import named_backbone\n"
        "print(calm_pl.__file__); print(find_config('data', 'esc50'))\n"
        "print(named_backbone('calm-tiny').load().num_heads)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stderr
    package, config, heads = run.stdout.split()
    assert Path(package).is_relative_to(target) and Path(config).is_relative_to(target)
    assert int(heads) == 60  # 36 of the decoder, 24 of the encoder
