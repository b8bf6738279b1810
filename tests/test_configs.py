"""Every file in conf/ is found, parsed by the real command line and builds what it names."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import yaml

from calm_pl import cli
from calm_pl.backbone.named import named_backbone
from calm_pl.conf import CONF_DIR, config_names, find_config
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights

GROUPS = ("backbone", "data", "logger", "model", "trainer")


def parsed(*arguments: str) -> dict:
    """What `calm fit` would run with: the whole configuration, after parsing and before anything starts."""
    from contextlib import redirect_stdout
    from io import StringIO

    shown = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["calm", "fit", *arguments, "--print_config"])
        cli.main()
    assert stop.value.code in (0, None), stop.value
    return yaml.safe_load(shown.getvalue())


def test_no_file_is_left_out():
    found = {file.relative_to(CONF_DIR).parts[0] for file in CONF_DIR.rglob("*.yaml")}
    assert found >= {"calm.yaml", *GROUPS}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in config_names(group)])
def test_every_config_parses_and_says_when_to_use_it(group, name):
    file = find_config(group, name)
    assert file.read_text().startswith("# "), f"{file} does not say what it is for"
    config = parsed(f"--{group}", name)
    content = yaml.safe_load(file.read_text())
    home = {"backbone": config["data"]["backbone"], "logger": config["trainer"]["logger"]}.get(group, config.get(group))
    for key, value in content.items():
        if not isinstance(value, dict):
            assert home[key] == value


@pytest.mark.parametrize("name", config_names("backbone"))
def test_backbone_files_fix_the_heads(name):
    assert "heads" in yaml.safe_load(find_config("backbone", name).read_text())  # else calm-tiny's would stay
    assert named_backbone(name).path


@pytest.mark.parametrize("name", config_names("model"))
def test_model_configs_build(name):
    from jsonargparse import ArgumentParser

    from calm_pl.training.module import CalmModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CalmModule, "model")
    config = parser.parse_args(["--model", str(find_config("model", name))])
    assert isinstance(parser.instantiate(config).model, CalmModule)


@pytest.mark.parametrize(
    ("file", "name", "method", "changed"),
    [("learned", "calm_learned", LearnedWeights, {}), ("formula", "calm_whitened", Calm, {"metric": "whitened"})],
)
def test_files_of_one_method_have_every_option_at_its_default(file, name, method, changed):
    written = yaml.safe_load(find_config("model", file).read_text())["methods"][name]["init_args"]
    defaults = {option: parameter.default for option, parameter in inspect.signature(method).parameters.items()}
    plain = {option: asdict(value) if is_dataclass(value) else value for option, value in defaults.items()}
    assert written == json.loads(json.dumps(plain | changed))


def test_later_options_win():
    config = parsed("--data", "esc50", "--data.recipe.init_args.test_fold", "3", "--backbone", "some/model")
    assert config["data"]["recipe"]["class_path"].endswith("Esc50")
    assert config["data"]["recipe"]["init_args"]["test_fold"] == 3
    assert config["data"]["backbone"]["path"] == "some/model" and config["data"]["backbone"]["heads"] == "decoder"


def test_single_options_hold_wherever_they_stand(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {batch_size: 3, num_workers: 1}\n")
    single = ["--data.backbone.heads=both", "--data.num_workers", "0", "--data.recipe.init_args.test_fold", "3"]
    named = ["--backbone=some/model", "--data", "esc50", "--config", str(tmp_path / "own.yaml")]
    config = parsed(*single, *named)
    assert config == parsed(*named, *single)
    assert config["data"]["backbone"] | {"path": "some/model", "heads": "both"} == config["data"]["backbone"]
    assert (config["data"]["batch_size"], config["data"]["num_workers"]) == (3, 0)
    assert config["data"]["recipe"]["init_args"]["test_fold"] == 3


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed("--data", "esc50")["data"]["shots"] == 5
    assert Path(CONF_DIR).is_dir()
