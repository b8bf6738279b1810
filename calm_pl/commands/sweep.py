"""``calm sweep``: every point of a W&B sweep file, here and without a server."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calm_pl.conf import CONF_DIR, config_names, find_config
from calm_pl.progress import Task, is_quiet, quiet, say
from calm_pl.run.finished import is_finished

SECONDS_TO_STOP = 5.0
RUN_CAP = 20  # points of a random sweep that does not say how many


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its parameters and its whole command line after ``calm fit``.

    ``mark`` tells it from points whose parameters are spelled alike in a folder's name.
    """

    parameters: Mapping[str, Any]
    arguments: tuple[str, ...]
    mark: str = ""

    @property
    def name(self) -> str:
        """What its folder is called: ``shots=5,seed=0``."""
        text = ",".join(f"{name.rpartition('.')[2]}={_text(value)}" for name, value in self.parameters.items())
        return re.sub(r"[^\w.,=+-]+", "-", text) + self.mark

    def marked(self) -> Point:
        """The point with the first 8 digits of a hash of its parameters at the end of its name."""
        parameters = json.dumps(self.parameters, default=str)
        return replace(self, mark=f"-{hashlib.sha256(parameters.encode()).hexdigest()[:8]}")


def main(argv: list[str]) -> int:
    """Run what is not finished yet, then compare all points. Exit code 1 if a point failed."""
    options, extra = _parser().parse_known_args(argv)
    try:
        points = read_points(_sweep_file(options.sweep), extra)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"calm: error: {error}")
    configs = [fit_config(point) for point in points]
    out = options.out or default_folder(Path(options.sweep).stem, configs[0])
    folders = [out / point.name for point in points]
    if options.extract and not all(map(is_finished, folders, configs)):
        extract(points[0], configs[0], out)
    failed = run_points(points, configs, folders)

    from calm_pl.report.comparison import Comparison
    from calm_pl.training.results import wide_console

    finished = [folder for folder, config in zip(folders, configs, strict=True) if is_finished(folder, config)]
    if finished:
        comparison = Comparison(finished)
        wide_console().print(*comparison.tables())
        page = comparison.write(out)
        comparison.add_curves(out)
        print(f"{len(finished)} of {len(points)} points; table, CSV and plots: {page}")
    for name, reason in failed.items():
        print(f"calm: {name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def read_points(file: Path, extra: Sequence[str] = ()) -> list[Point]:
    """Points of a sweep file, in a fixed order, each once.

    A grid has all of its points, the last parameter varying fastest. ``random`` and ``bayes`` have ``run_cap`` points,
    drawn at random from a fixed seed: a Bayesian search needs W&B's server.

    Args:
        file: YAML in W&B's form: ``command``, ``method``, ``run_cap``, ``parameters`` with ``value``, ``values``, or
            ``min``, ``max`` and ``distribution``.
        extra: further arguments of every point, such as ``--data esc50``.

    Raises:
        ValueError: the file does not run ``calm fit``, or asks for what cannot be drawn here.
    """
    import yaml

    try:
        sweep = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error}).") from None
    if not isinstance(sweep, Mapping) or not isinstance(sweep.get("parameters"), Mapping):
        raise ValueError(f"{file} is no sweep: it has no parameters (see conf/sweep/shots.yaml for one).")
    fixed, parameters, drawn = _fixed_arguments(file, sweep), sweep["parameters"], _drawn(file, sweep)
    points = []
    for values in {json.dumps(values, default=str): values for values in drawn}.values():
        point = dict(zip(parameters, values, strict=True))
        arguments = [f"--{name}={_text(value)}" for name, value in point.items()]
        points.append(Point(point, (*fixed, *extra, *arguments)))
    if len(points) < len(drawn):
        say(f"{file.name}: {len(points)} of its {len(drawn)} points are left, the others repeat them")
    named = Counter(point.name for point in points)
    points = [point.marked() if named[point.name] > 1 else point for point in points]
    given = {argument.partition("=")[0].removeprefix("--") for argument in extra}
    if given & parameters.keys():
        say(f"{file.name} varies {', '.join(sorted(given & parameters.keys()))}: what is given for it does not count")
    return points


def _fixed_arguments(file: Path, sweep: Mapping[str, Any]) -> list[str]:
    """What the sweep's command gives to `calm fit` at every point."""
    command = [str(part) for part in sweep.get("command", ["${program}", "fit", "${args}"])]
    if "fit" not in command or sweep.get("program") != "calm":
        raise ValueError(f"{file} does not run `calm fit`: give it program: calm and a command with fit.")
    fixed = [part for part in command[command.index("fit") + 1 :] if not part.startswith("${")]
    # Without a server nothing is logged there, unless --logger is given to `calm sweep` itself.
    return [
        part
        for before, part in zip(["", *fixed], fixed, strict=False)
        if not part.startswith("--logger") and not (before == "--logger" and not part.startswith("--"))
    ]


def _drawn(file: Path, sweep: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The values of the parameters at every point, as the sweep's method has them; some may repeat."""
    parameters = sweep["parameters"]
    if sweep.get("method") == "grid":
        return list(itertools.product(*(_choices(file, name, about) for name, about in parameters.items())))
    if sweep.get("method") not in ("random", "bayes"):
        raise ValueError(f"{file} has method: {sweep.get('method')}: choose grid, random or bayes.")
    rng = random.Random(0)
    count = sweep.get("run_cap", RUN_CAP)
    drawn = [tuple(_draw(file, name, about, rng) for name, about in parameters.items()) for _ in range(count)]
    if sweep["method"] == "bayes":
        say(f"{file.name}: its {count} points are drawn at random; to search, wandb sweep {file}")
    return drawn


def fit_config(point: Point) -> dict[str, Any]:
    """The whole configuration that ``calm fit`` would run a point with, without the places where it lies."""
    import yaml

    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            _calm("fit", point, "--print_config")
    except SystemExit as stop:
        if stop.code:
            raise
    return yaml.safe_load(shown.getvalue())  # type: ignore[no-any-return]


def run_points(
    points: Sequence[Point], configs: Sequence[Mapping[str, Any]], folders: Sequence[Path]
) -> dict[str, str]:
    """Run what is not finished. Any number of processes may do so at once on the same folders: a point that another
    one works on is left to it, and waited for at the end.

    Returns:
        Why points failed, by name.
    """
    from filelock import FileLock, Timeout

    failed: dict[str, str] = {}
    left = [job for job in zip(points, configs, folders, strict=True) if not is_finished(job[2], job[1])]
    if len(left) < len(points):
        say(f"{len(points) - len(left)} of {len(points)} points are finished already")
    with Task("running points", len(left), "points") as task:
        for wait in (0, -1):
            for job in list(left):
                point, config, folder = job
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(folder / ".running", timeout=wait):
                        if not is_finished(folder, config):
                            (folder / "results.json").unlink(missing_ok=True)  # of another configuration
                            # A sweep tells how it gets on as a whole.
                            with quiet(), redirect_stdout(io.StringIO()):
                                _run("fit", point, config, f"--run_dir={folder}")
                        say(f"{point.name}: {_outcome(folder, config)}")
                except Timeout:
                    continue
                except SystemExit as stop:
                    if isinstance(stop.__context__, KeyboardInterrupt):  # how Lightning stops
                        raise
                    failed[point.name] = str(stop.code)
                left.remove(job)
                task.advance(note=point.name)
    return failed


def extract(point: Point, config: Mapping[str, Any], out: Path) -> None:
    """Read the heads of the whole data set first, so that the backbone is not loaded again for every point.

    Of several processes one does it; the others wait and find nothing missing.
    """
    from filelock import FileLock

    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".extracting"):
        _run("extract", point, config)


def default_folder(name: str, config: Mapping[str, Any]) -> Path:
    """The same sweep of the same data with the same model has the same folder."""
    from calm_pl.run.cli import dataset_name

    recipe = config["data"]["recipe"]
    dataset = dataset_name(recipe["class_path"], recipe.get("init_args", {}).get("data_dir"))
    backbone = Path(config["data"]["backbone"]["path"]).name
    return Path("runs") / f"sweep-{name}-{dataset}-{backbone}"


def _run(command: str, point: Point, config: Mapping[str, Any], *more: str) -> None:
    """Run a command here, so that it shares the loaded backbone; with several ranks in processes of their own, because
    Lightning starts the ranks of one run only in the life of a process.

    Raises:
        SystemExit: it failed, with the reason.
    """
    trainer = config["trainer"]
    if (trainer["devices"], trainer["num_nodes"]) == (1, 1):
        _calm(command, point, *more)
        return
    program = [sys.executable, "-m", "calm_pl", command, *point.arguments, *more]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL if is_quiet() else None) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # It ends its ranks where it ends by itself. A Ctrl-C in a terminal it has heard; a SIGTERM it has not.
            for insist in (process.terminate, process.kill):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS_TO_STOP)
                    break
                insist()
            raise
    if status:
        sys.exit(f"calm {command} ended with exit code {status}, see above")


def _outcome(folder: Path, config: Mapping[str, Any]) -> str:
    """``calm_learned 85.4 %``: the method that the run keeps."""
    from calm_pl.training.results import outcome

    kept = config["model"]["classifier"]
    results = json.loads((folder / "results.json").read_text())
    return outcome(results, kept) if results["methods"].get(kept) else "done"


def _calm(command: str, point: Point, *more: str) -> None:
    from calm_pl.commands import lightning

    lightning.main([command, *point.arguments, *more])
    if "wandb" in sys.modules:  # else the next point would go on in this one's W&B run
        sys.modules["wandb"].finish()


def _text(value: Any) -> str:
    """A value as a configuration spells it: ``null`` and ``true``, which Python calls None and True."""
    return json.dumps(value, default=str) if value is None or isinstance(value, bool | list | dict) else str(value)


def _choices(file: Path, name: str, about: Mapping[str, Any]) -> list[Any]:
    if not isinstance(about, Mapping):
        raise ValueError(f"{file}: {name} is {about!r}: give it value: or values:.")
    if isinstance(about.get("values"), list):
        return list(about["values"])
    if "value" in about:
        return [about["value"]]
    raise ValueError(f"{file}: {name} has neither value nor values, so there is no grid over it.")


def _draw(file: Path, name: str, about: Mapping[str, Any], rng: random.Random) -> Any:
    """One value of a parameter, by W&B's rules for what its description leaves out."""
    if not isinstance(about, Mapping) or "min" not in about or "max" not in about:
        values = _choices(file, name, about)
        chances = about.get("probabilities")
        if chances is None:
            return rng.choice(values)
        try:
            return rng.choices(values, chances)[0]
        except (TypeError, ValueError):
            raise ValueError(
                f"{file}: {name} has probabilities: {chances} for {len(values)} values: one number a value, not all 0."
            ) from None
    low, high = about["min"], about["max"]
    whole = isinstance(low, int) and isinstance(high, int)
    distribution = about.get("distribution", "int_uniform" if whole else "uniform")
    if distribution == "int_uniform":
        return rng.randint(low, high)
    if distribution == "uniform":
        return float(f"{rng.uniform(low, high):.4g}")
    if distribution == "log_uniform_values":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    raise ValueError(
        f"{file}: {name} has distribution: {distribution}, which is not drawn here: choose uniform, int_uniform or "
        "log_uniform_values."
    )


def _sweep_file(name: str) -> Path:
    """A file, or the name of a shipped one."""
    file = Path(name)
    if file.is_file():
        return file
    shipped = find_config("sweep", name)
    if shipped is None:
        raise FileNotFoundError(
            f"{name}: no such file, and no {name}.yaml in {CONF_DIR / 'sweep'}; "
            f"shipped are {', '.join(config_names('sweep'))}"
        )
    return shipped


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calm sweep",
        usage="calm sweep SWEEP [--out FOLDER] [--no-extract] [options of `calm fit`]",
        description="Run every point of a sweep file (W&B's form) here; finished points are skipped. "
        "Several of these commands at once share the work. All other options go to `calm fit`.",
        epilog="example: calm sweep shots --data esc50 --backbone qwen2-audio",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", metavar="SWEEP", help="sweep file, or the name of one in conf/sweep/")
    parser.add_argument("--out", type=Path, help="folder (default: runs/sweep-<sweep>-<data>-<backbone>)")
    parser.add_argument(
        "--no-extract", dest="extract", action="store_false",
        help="do not read the heads of the whole data set first; better where it is far larger than what is drawn",
    )  # fmt: skip
    return parser
