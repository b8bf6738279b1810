"""Real labelled sets from packages of a Debian or Ubuntu system: `python examples/real_sets.py FOLDER`.

    drums      hits by instrument, from Hydrogen's drum kits
               (hydrogen-drumkits, hydrogen-drumkits-effects)
    languages  spoken words by language, several voices a language
               (tuxpaint-stamps-default, asterisk-core-sounds-*)
    syllables  letters and syllables by language, one voice each
               (klettres-data)
    words      names of things by language, one voice each
               (ktuberling-data)
    samples    studio samples by kind, the first word of their names
               (sonic-pi-samples)

Each becomes FOLDER/NAME/manifest.jsonl beside the unpacked packages. Packages are fetched with `apt-get
download` and unpacked with `dpkg -x`, so nothing is installed and no rights are needed. Every package states
its licence in usr/share/doc.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import soundfile

PACKAGES = {
    "drums": ["hydrogen-drumkits", "hydrogen-drumkits-effects"],
    "languages": [
        "tuxpaint-stamps-default",
        *(f"asterisk-core-sounds-{c}-wav" for c in ("en", "es", "fr", "it", "ru")),
    ],
    "syllables": ["klettres-data"],
    "words": ["ktuberling-data"],
    "samples": ["sonic-pi-samples"],
}
INSTRUMENTS = {
    "kick": r"kick|bass ?drum",
    "snare": r"snare|^sr_",
    "hihat": r"hi-?_? ?hat|^hh|_hh|chh|ohh|^h[oc]_",
    "tom": r"tom|^[tf][t12]_",
    "crash": r"crash|^cc_",
    "ride": r"ride|^rc_",
    "cowbell": r"bell",
    "conga": r"conga|bongo|djemb",
}
SPOKEN = ("fr", "ru", "ro", "ca", "bg", "es", "be", "el", "da", "it", "en")
MIN_CLIPS, MAX_CLIPS = dict.fromkeys(PACKAGES, 20) | {"samples": 8}, 60
MIN_SECONDS = 0.05

# A clip found: its file, its label, and the group that must stay on one side of a split.
Found = tuple[Path, str, str]


def drums(root: Path) -> Iterator[Found]:
    """The group is the kit and the file's name without numbers: the loudness layers of one drum stay
    together."""
    for path in root.glob("hydrogen-drumkits*/usr/share/hydrogen/data/drumkits/*/*"):
        for instrument, pattern in INSTRUMENTS.items():
            if path.suffix in (".flac", ".wav", ".ogg") and re.search(pattern, path.name.lower()):
                yield path, instrument, f"{path.parent.name}/{re.sub('[0-9]+', '', path.stem)}"
                break


def languages(root: Path) -> Iterator[Found]:
    """The group is the word, as far as a file's name tells it."""
    for path in root.glob("tuxpaint-stamps-default/usr/share/tuxpaint/stamps/**/*_desc_*.ogg"):
        yield path, path.stem[-2:], path.stem[:-3]
    for path in root.glob("asterisk-core-sounds-*-wav/usr/share/asterisk/sounds/*/*.wav"):
        yield path, path.parent.name[:2], path.stem


def syllables(root: Path) -> Iterator[Found]:
    for path in root.glob("klettres-data/usr/share/klettres/*/*/*.ogg"):
        yield path, path.parts[-3], f"{path.parts[-3]}/{path.stem}"


def words(root: Path) -> Iterator[Found]:
    for path in root.glob("ktuberling-data/usr/share/ktuberling/sounds/*/*"):
        if path.suffix in (".ogg", ".wav"):
            yield path, path.parent.name, f"{path.parent.name}/{path.stem}"


def samples(root: Path) -> Iterator[Found]:
    """The group is the name without numbers: takes of one sound stay together."""
    for path in root.glob("sonic-pi-samples/usr/share/sonic-pi/samples/*.flac"):
        yield path, path.stem.split("_")[0], re.sub("[0-9]+", "", path.stem)


RECIPES = {"drums": drums, "languages": languages, "syllables": syllables, "words": words, "samples": samples}


def unpack(packages: list[str], root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (root / package).exists():
            subprocess.run(["apt-get", "download", package], cwd=root, check=True)
            (archive,) = root.glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", str(archive), str(root / package)], check=True)
            archive.unlink()


def long_enough(path: Path) -> bool:
    try:
        return bool(soundfile.info(str(path)).duration >= MIN_SECONDS)
    except soundfile.LibsndfileError:
        return False


def build(name: str, folder: Path) -> Path:
    """Write FOLDER/NAME/manifest.jsonl: up to MAX_CLIPS of every class that has MIN_CLIPS, the same at every
    run."""
    root = folder / "packages"
    unpack(PACKAGES[name], root)
    members: dict[str, list[Found]] = defaultdict(list)
    for found in sorted(RECIPES[name](root)):
        if (name != "languages" or found[1] in SPOKEN) and long_enough(found[0]):
            members[found[1]].append(found)
    manifest = folder / name / "manifest.jsonl"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.open("w", encoding="utf-8") as file:
        for label, clips in sorted(members.items()):
            if len(clips) >= MIN_CLIPS[name]:
                random.Random(label).shuffle(clips)
                for path, _, group in sorted(clips[:MAX_CLIPS]):
                    audio = Path("..") / path.relative_to(folder)
                    file.write(json.dumps({"audio": str(audio), "label": label, "group": group}) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", default=",".join(PACKAGES), help="names, separated by commas")
    args = parser.parse_args()
    for name in args.sets.split(","):
        manifest = build(name, args.folder)
        labels = [json.loads(line)["label"] for line in manifest.read_text(encoding="utf-8").splitlines()]
        print(f"{manifest}: {len(labels)} clips, {len(set(labels))} classes")


if __name__ == "__main__":
    main()
