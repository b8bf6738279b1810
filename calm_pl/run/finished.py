"""Whether a run folder holds the results of a configuration, so that it need not be run again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm_pl.conf import flat

# Where a run lies, not what it computes.
PLACES = {"run_dir", "trainer.default_root_dir", "trainer.logger.init_args.save_dir"}


def is_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run folder holds the results of exactly this configuration."""
    import yaml

    if not (folder / "results.json").is_file() or not (folder / "config.yaml").is_file():
        return False
    return _what(yaml.safe_load((folder / "config.yaml").read_text())) == _what(config)


def _what(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _whole(value) for name, value in flat(config) if name not in PLACES}


def _whole(value: Any) -> Any:
    """A path as a run keeps it, wherever it is looked at from."""
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
