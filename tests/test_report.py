"""The report: what it says, that it is one file which fetches nothing, and how it looks and works in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl import cli
from calm_pl.backbone.spec import Backbone
from calm_pl.classifier import CalmClassifier
from calm_pl.clip import Clip
from calm_pl.methods.calm import Calm
from calm_pl.report import plots
from calm_pl.report.comparison import Comparison
from calm_pl.report.page import headline, write_report
from calm_pl.report.run import Run, head_sites, heads_for
from calm_pl.training.results import write_predictions
from tests.browser import chromium
from tests.conftest import tone

# A class name that would break out of the page if anything were pasted unescaped.
CLASSES = ["cat & <i>dog</i>", "rain", "siren"]
SITES = {"decoder.0.self_attn": 4, "decoder.1.self_attn": 4, "encoder.0.self_attn": 2}
FIGURES = {"macro_f1": 0.5, "macro_f1_interval": [0.2, 0.8], "nll": 1.0, "brier": 0.5, "ece": 0.1}


def figures(accuracy: float) -> dict:
    return {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.1, accuracy + 0.1], **FIGURES}


def results(shots: int | None = 5, seed: int = 0, **accuracies: float) -> dict:
    return {
        "dataset": "sounds", "backbone": "tiny", "protocol": "open", "shots": shots, "seed": seed,
        "num_classes": 3, "num_heads": 10, "head_dim": 4, "splits": {"support": 15, "test": 6},
        "methods": {name: figures(accuracy) for name, accuracy in accuracies.items()},
        "timing": {"fit_seconds": 1.0}, "head_sites": SITES,
        "skipped": [{"audio": "/x/broken.wav", "reason": "/x/broken.wav: the file is empty (0 bytes)"}],
        "cut": 2,
    }  # fmt: skip


def write_run(folder: Path, content: dict, predictions: list[tuple[str, str, str, float]] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text("model:\n  classifier: calm\ndata:\n  shots: 5\n")
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "prediction", "confidence"), *predictions])
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_lalm) -> Path:
    """A finished run of three classes, made up but for its sounds: 4 of 6 right, one mistake's file is gone."""
    folder = tmp_path_factory.mktemp("run")
    sounds = [str(tone(folder / "audio" / f"{i}.wav", 300 * (i + 1), seconds=1.5 * (i + 1), seed=i)) for i in range(5)]
    predictions = [
        (sounds[0], CLASSES[0], CLASSES[0], 0.9),
        (sounds[1], CLASSES[0], "rain", 0.55),
        (sounds[2], "rain", "rain", 0.8),
        (sounds[3], "siren", "siren", 0.7),
        (sounds[4], "siren", "siren", 0.65),
        (str(folder / "audio" / "gone.wav"), "siren", "rain", 0.85),
    ]
    write_run(folder, results(calm=4 / 6, sav=0.5, zero_shot=1 / 3), predictions)
    generator = torch.Generator().manual_seed(0)
    heads_NKD = torch.randn(15, 10, 4, generator=generator)
    method = Calm(top_k=4).fit(heads_NKD, torch.arange(15) % 3, 3)
    CalmClassifier.from_fitted(method, CLASSES, Backbone(tiny_lalm), "float32").save_pretrained(folder / "classifier")
    write_report(folder)
    return folder


def test_the_headline_says_what_was_reached(run_folder):
    said = headline(Run.read(run_folder)).replace("\N{NO-BREAK SPACE}", " ")
    assert "From 5 labelled clips a class, calm tells 66.7 % of 6 test clips right" in said
    assert "interval 57 to 77 %" in said and "gives 33 %" in said and "in words, the same model reaches 33.3 %" in said


def test_the_headline_counts_the_clips_that_have_a_label(tmp_path):
    predictions = [("a.wav", "rain", "rain", 0.9), ("b.wav", "siren", "rain", 0.8)]
    folder = write_run(tmp_path, results(calm=0.5), [*predictions, *4 * [("c.wav", "", "rain", 0.9)]])
    said = headline(Run.read(folder)).replace("\N{NO-BREAK SPACE}", " ")
    assert "50.0 % of 2 labelled test clips right" in said and said.endswith(" 4 more test clips have no label.")
    assert "6 clips, 4 of them without a label" in write_report(folder).read_text()


OPTIONS_OF_A_QUESTION = "guessing among the 2 options of a question gives 50 %. Asked in words, "
ASKED_OF_FEWER = "guessing among the 3 classes gives 33 %. Asked in words among the options of a question, "


@pytest.mark.parametrize(
    ("dataset", "within", "chances", "phrase"),
    [
        ("sounds", True, {"zero_shot": 0.5, "calm": 0.5}, OPTIONS_OF_A_QUESTION),
        ("sounds", False, {"zero_shot": 0.5, "calm": 1 / 3}, ASKED_OF_FEWER),
        # Clips of a manifest may list options of their own, and results do not say how many.
        ("manifest", True, {}, "interval 50 to 70 %). Asked in words, "),
    ],
)
def test_chance_is_among_the_options_where_only_they_count(tmp_path, dataset, within, chances, phrase):
    asked = {"dataset": dataset, "protocol": "mcq", "num_options": 2, "within_options": within}
    run = Run.read(write_run(tmp_path, {**results(calm=0.6, zero_shot=0.4), **asked}))
    assert {name: run.chance(name) for name, _ in run.ranking} == {"calm": None, "zero_shot": None, **chances}
    assert phrase in headline(run).replace("\N{NO-BREAK SPACE}", " ")
    lines = plots.methods(dict(run.ranking), chances, "calm").axes[0].lines
    dotted = [line.get_xdata()[0] for line in lines if line.get_linestyle() == ":"]
    assert dotted == pytest.approx([100 * chance for chance in chances.values()])  # the least accurate at the bottom


def test_figures_by_class_come_from_the_predictions(run_folder):
    run = Run.read(run_folder)
    assert run.confusion_CC.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 2]]
    assert [(one.name, one.correct, one.total) for one in run.per_class] == [
        (CLASSES[0], 1, 2), ("rain", 1, 1), ("siren", 2, 3),
    ]  # fmt: skip
    assert [mistake.confidence for mistake in run.mistakes] == [0.85, 0.55]
    bins = {round(one.confidence, 3): (one.correct, one.count) for one in run.calibration}
    assert bins == {0.55: (0, 1), 0.65: (1, 1), 0.7: (1, 1), 0.825: (1, 2), 0.9: (1, 1)}


@pytest.fixture(scope="module")
def several_labels(tmp_path_factory) -> Path:
    """A run of clips with one or two labels; by mAP calm is best, by its most probable class alone sav is."""
    content = results(calm=0.4, sav=0.6, zero_shot=0.3)
    for name, figure in {"calm": 0.8, "sav": 0.7, "zero_shot": 0.2}.items():
        for column in ("map", "sample_f1", "exact_match"):
            content["methods"][name] |= {column: figure, f"{column}_interval": [figure - 0.1, figure + 0.1]}
    predictions = [
        ("a.wav", "rain", "siren", 0.5),
        ("b.wav", "siren", "siren", 0.6),
        *3 * [("c.wav", "rain|siren", "siren|rain", 0.6)],
        ("d.wav", "", "rain", 0.4),
    ]
    folder = write_run(tmp_path_factory.mktemp("several"), content, predictions)
    write_report(folder)
    return folder


def test_several_labels_are_told_by_map_and_its_like(several_labels):
    page = (several_labels / "report.html").read_text()
    table = page[page.index("<thead>") : page.index("</table>")]
    assert re.findall(r'class="number">([^<]*)</th>', table) == ["mAP %", "sample F1 %", "exact", "top-1"]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["calm", "sav", "zero_shot"]
    assert '80.0 <span class="interval">[70.0, 90.0]</span>' in table and ">40.0</td>" in table
    said = headline(Run.read(several_labels)).replace("\N{NO-BREAK SPACE}", " ")
    assert "calm reaches a mean average precision (mAP) of 80.0 % on 5 labelled test clips" in said
    assert "guessing" not in said and "the same model reaches 20.0 %" in said
    assert "mAP on the test clips, %" in (several_labels / "plots" / "methods.svg").read_text()
    noted = re.findall(r'<h2 id="(\w+)">[^<]*</h2>\s*<p class="note">Counts the 2 of 5 test clips that have one', page)
    assert noted == ["classes", "calibration"]
    assert "1 of 1 mistakes among 2 test clips that have one label" in page


def test_spoofing_is_told_by_equal_error_rates(tmp_path):
    content = results(calm=0.9, sav=0.8)
    for figures_of in content["methods"].values():
        figures_of |= {"eer": 0.125, "eer_interval": [0.05, 0.25]}
    content["attacks"] = {
        name: {"A07": {"clips": 4, "eer": eer, "accuracy": 0.5}} for name, eer in (("calm", 0.25), ("sav", 0.5))
    }
    page = write_report(write_run(tmp_path, content)).read_text()
    assert '12.5 <span class="interval">[5.0, 25.0]</span>' in page and "EER, NLL: lower is better" in page
    row = '<th scope="row">A07</th><td class="number">4</td><td class="number">25.0</td><td class="number">50.0</td>'
    assert row in page


def test_the_page_says_what_each_class_was_taken_for(run_folder):
    cells = re.findall(r"</span></td>\n<td>(.*?)</td></tr>", (run_folder / "report.html").read_text())
    assert cells == ["rain 1", "", "rain 1"]


def test_the_page_is_one_file_that_names_nothing_outside(run_folder):
    page = (run_folder / "report.html").read_text()
    assert (run_folder / "report.html").stat().st_size < 5_000_000
    assert "default-src 'none'" in page
    assert "<i>dog</i>" not in page and "&lt;i&gt;dog&lt;/i&gt;" in page
    assert "the file is empty (0 bytes)" in page  # the clip that was left out
    assert "2 clips longer than the model's window" in unescape(page)
    assert "no such file" in page  # the mistake whose sound is gone
    assert f"calm fit --config {run_folder}/config.yaml" in unquote(page)


def test_every_plot_is_there_for_a_paper(run_folder):
    names = {"methods", "confusion", "classes", "calibration", "heads", "heads-by-class", "head-share"}
    assert {file.name for file in (run_folder / "plots").iterdir()} == {
        f"{n}.{e}" for n in names for e in ("png", "svg")
    }
    for name in names:
        assert (run_folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_letters_that_no_font_has_are_told_once_and_not_by_matplotlib(tmp_path, capsys, recwarn):
    """A code point for private use is in no font; class names in Chinese are where no such font is installed."""
    strange = "rain \U000f1234"
    predictions = [("a.wav", strange, "siren", 0.9), ("b.wav", "siren", strange, 0.9)]
    folder = write_run(tmp_path, results(calm=0.5), predictions)
    write_report(folder)
    assert capsys.readouterr().err.count("no font installed here has the letters \U000f1234:") == 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert strange in (folder / "plots" / "confusion.svg").read_text()


def test_a_run_of_a_sweep_shows_accuracy_over_shots_until_it_is_run_again(tmp_path):
    folders = [write_run(tmp_path / str(shots), results(shots, calm=0.1 * shots)) for shots in (1, 5)]
    comparison = Comparison(folders)
    comparison.write(tmp_path / "out")
    comparison.add_curves(tmp_path / "out")
    assert 'id="shots"' in (folders[0] / "report.html").read_text()
    assert 'id="shots"' in write_report(folders[0]).read_text()
    later = (folders[0] / "plots" / "accuracy-over-shots.svg").stat().st_mtime + 1
    os.utime(folders[0] / "results.json", (later, later))
    assert 'id="shots"' not in write_report(folders[0]).read_text()


def test_a_run_of_a_sweep_of_several_labels_shows_map_over_shots(tmp_path):
    folders = []
    for shots in (1, 5):
        content = results(shots, calm=0.1 * shots)
        for name in ("map", "sample_f1", "exact_match"):
            content["methods"]["calm"] |= {name: 0.3, f"{name}_interval": [0.2, 0.4]}
        folders.append(write_run(tmp_path / str(shots), content))
    comparison = Comparison(folders)
    comparison.write(tmp_path / "out")
    comparison.add_curves(tmp_path / "out")
    page = (folders[0] / "report.html").read_text()
    assert '<h2 id="shots">mAP over shots</h2>' in page and "belongs to: mAP over labelled clips" in page


def test_plots_are_drawn_once_where_nothing_changed(run_folder):
    drawn = {file: file.stat().st_mtime_ns for file in (run_folder / "plots").iterdir()}
    page = (run_folder / "report.html").read_text()
    assert write_report(run_folder, redraw=False).read_text() == page
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn


def test_the_same_run_gives_the_same_bytes(run_folder):
    before = {file: file.read_bytes() for file in run_folder.rglob("*") if file.suffix in (".html", ".svg")}
    assert cli.main(["report", str(run_folder)]) == 0
    assert {file: file.read_bytes() for file in before} == before


def test_recordings_stay_out_when_asked(run_folder, tmp_path):
    copy = write_run(tmp_path / "run", json.loads((run_folder / "results.json").read_text()))
    (copy / "predictions.csv").write_text((run_folder / "predictions.csv").read_text())
    assert cli.main(["report", str(copy), "--mistakes", "0"]) == 0
    assert "data:audio" in (run_folder / "report.html").read_text()
    assert "data:audio" not in (copy / "report.html").read_text()


def test_a_part_of_a_file_is_heard_from_its_start_to_its_end(tmp_path):
    low, high = (soundfile.read(tone(tmp_path / f"{f}.wav", f, 1.0))[0] for f in (300, 3000))
    soundfile.write(tmp_path / "long.wav", np.concatenate([low, high]), 16_000)
    clips = [Clip(str(tmp_path / "long.wav"), "siren", start=1.25, end=1.75), Clip(str(tmp_path / "300.wav"), "siren")]
    write_run(tmp_path, results(calm=0.5))
    write_predictions(tmp_path / "predictions.csv", clips, ["rain", "siren"], torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    page = write_report(tmp_path).read_text()
    assert "long.wav, from 1.25 s to 1.75 s" in page and "300.wav</code>" in page
    heard = base64.b64decode(page.partition("data:audio/flac;base64,")[2].partition('"')[0])
    wave, rate = soundfile.read(io.BytesIO(heard))
    assert len(wave) == 0.5 * rate
    assert np.abs(np.fft.rfft(wave)).argmax() * 2 == pytest.approx(3000, abs=10)


def test_class_names_with_dollars_are_names(tmp_path):
    costly = "costs $5_{ or $6"
    folder = write_run(tmp_path, results(calm=0.5), [("a.wav", costly, "rain", 0.5), ("b.wav", "rain", costly, 0.5)])
    assert costly in write_report(folder).read_text()


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0b", "\n", "\r", "\r\n"])
def test_names_may_hold_ends_of_lines(tmp_path, end):
    clips = [Clip(f"/a{end}b.wav", f"rain{end}drops"), Clip("/c.wav", "siren")]
    write_run(tmp_path, results(calm=0.5))
    classes = [f"rain{end}drops", "siren"]
    write_predictions(tmp_path / "predictions.csv", clips, classes, torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    run = Run.read(tmp_path)
    assert [(p.path, p.label) for p in run.predictions] == [(clip.audio, clip.label) for clip in clips]
    assert run.classes == classes and [p.path for p in run.mistakes] == ["/c.wav"]
    assert write_report(tmp_path).is_file()


def test_a_run_without_labels_or_weights_has_a_page(tmp_path):
    folder = write_run(tmp_path, results(), [("a.wav", "", "rain", 0.5)])
    page = write_report(folder).read_text()
    assert "No test clip has a label" in page and "Trusted heads" not in page


def test_no_run_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no finished run: it has no results\.json"):
        cli.main(["report", str(tmp_path)])


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=3))
def test_heads_for_counts_the_fewest_heads(columns):
    weights_KC = torch.tensor(columns, dtype=torch.float64).T
    for column, count in zip(weights_KC.T, heads_for(weights_KC).tolist(), strict=True):
        strongest = column.sort(descending=True).values / column.sum()
        assert strongest[:count].sum() >= 0.9 - 1e-5
        assert strongest[: count - 1].sum() < 0.9 + 1e-5


def test_head_sites_keep_order_and_size():
    names = [f"{site}.{head}" for site, count in SITES.items() for head in range(count)]
    assert list(head_sites(names).items()) == list(SITES.items())


def test_comparison_means_over_seeds_and_keeps_questions_apart(tmp_path):
    accuracies = {(1, 0): 0.5, (1, 1): 0.6, (1, 2): 0.7, (5, 0): 0.9}
    folders = [write_run(tmp_path / f"{s}-{r}", results(s, r, calm=a)) for (s, r), a in accuracies.items()]
    other = {**results(5, 0, calm=0.1), "protocol": "mcq"}
    folders.append(write_run(tmp_path / "mcq", other))
    comparison = Comparison(folders)
    rows = {(q.protocol, row.shots): row for q, rows in comparison.rows.items() for row in rows}
    assert rows["open", 1].mean == pytest.approx(0.6)
    assert rows["open", 1].half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=0.01)  # Student's t, 2 degrees
    assert rows["open", 5].mean == 0.9 and rows["mcq", 5].mean == 0.1

    page = comparison.write(tmp_path / "out").read_text()
    assert "sounds · tiny · mcq" in page and "60.0" in page and "± 24." in page
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(row["shots"], row["protocol"], row["runs"]) for row in table] == [
        ("1", "open", "3"), ("5", "open", "1"), ("5", "mcq", "1"),
    ]  # fmt: skip
    assert table[1]["low"] == ""  # one run has no interval
    assert (tmp_path / "out" / "plots" / "accuracy-over-shots-sounds-tiny-open.svg").is_file()


def test_runs_of_other_settings_have_a_table_of_their_own(tmp_path):
    folders = [write_run(tmp_path / str(alpha), results(calm=0.5)) for alpha in (1.0, 1.5)]
    for folder in folders:
        config = (
            f"model:\n  methods: {{calm: {{init_args: {{alpha: {folder.name}}}}}}}\ndata: {{seed: {folder.name}}}\n"
        )
        (folder / "config.yaml").write_text(config)
    assert [str(question) for question in Comparison(folders).rows] == [
        "sounds · tiny · open · alpha=1.0", "sounds · tiny · open · alpha=1.5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_at_every_width_and_scheme(browser, run_folder, width, dark):
    browser.open(run_folder / "report.html", width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [(run_folder / "report.html").resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing makes the page scroll sideways
    page, ink = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
    )
    brightness = [sum(int(part) for part in colour.strip("rgb()").split(",")) / 3 for colour in (page, ink)]
    assert brightness[0] < 60 < 180 < brightness[1] if dark else brightness[1] < 60 < 180 < brightness[0]


@pytest.mark.parametrize("page", ["run_folder", "several_labels"])
def test_on_a_phone_nothing_is_cut_off(browser, request, page):
    """What is wider than the screen scrolls in a place of its own; texts over it do not."""
    browser.open(request.getfixturevalue(page) / "report.html", width=390)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    cut = browser.evaluate("""
        [...document.querySelectorAll("table, caption")].filter(one => {
            const place = one.closest(".scroll"), right = it => it.getBoundingClientRect().right;
            if (one.tagName == "CAPTION") return right(one) > right(place);
            return place.scrollWidth > place.clientWidth && getComputedStyle(place).overflowX != "auto";
        }).map(one => one.innerText)""")
    assert cut == []


def test_players_play(browser, run_folder):
    browser.open(run_folder / "report.html")
    seconds = browser.evaluate("""
        Promise.all([...document.querySelectorAll("audio")].map(audio => new Promise((heard, failed) => {
            audio.onerror = () => failed(audio.error.message);
            audio.onplaying = () => heard(audio.duration);
            audio.play();
        })))""")
    assert seconds == pytest.approx([3.0], abs=0.01)  # of two mistakes, the one whose file is still there
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 100)")


def test_everything_is_reached_by_keyboard_and_named(browser, run_folder):
    browser.open(run_folder / "report.html")
    reached = set()
    for _ in range(40):
        browser.press_tab()
        reached.add(browser.evaluate("document.activeElement.tagName"))
    assert reached >= {"A", "AUDIO", "SUMMARY", "PRE", "DIV"}
    broken = browser.evaluate(
        "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    )
    unnamed = browser.evaluate(
        "document.querySelectorAll('img:not([alt]), audio:not([aria-label]), figure:not(:has(figcaption))').length"
    )
    doubled = browser.evaluate(
        "(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))"
    )
    assert (broken, unnamed, doubled) == (0, 0, 0)


def test_the_comparison_opens_on_a_phone(browser, tmp_path):
    folders = [write_run(tmp_path / str(s), results(s, 0, calm=0.1 * s, sav=0.05 * s)) for s in (1, 5)]
    page = Comparison(folders).write(tmp_path / "out")
    browser.open(page, width=390)
    assert browser.complaints == [] and browser.evaluate("document.documentElement.scrollWidth") <= 390
