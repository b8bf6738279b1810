"""Each data set in miniature: the real folders, list formats and file names, with sounds made here."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from calm_pl.audio import load_audio
from calm_pl.clip import Clip
from calm_pl.data.recipes import (
    AsvSpoof2019La,
    AudioSet,
    CremaD,
    DataMissingError,
    Fsd50k,
    Fsdd,
    Gtzan,
    Mlaad,
    Nsynth,
    Ravdess,
    Recipe,
    SpeechCommands,
    UrbanSound8K,
    VggSound,
)
from calm_pl.data.splits import check_disjoint


def sound(path: Path, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(len(path.name)).uniform(-0.1, 0.1, rate // 10), rate)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def heard(recipe: Recipe, leaks: bool = False) -> list[Clip]:
    """Its clips, after making sure that nothing is downloaded, that all can be heard, and that no source leaks."""
    recipe.prepare()
    clips = recipe.clips()
    for clip in clips:
        assert len(load_audio(clip.audio, 16000)) == 1600
        assert clip.labels
        assert clip.split in ("train", "val", "test")
    check_disjoint([c for c in clips if c.split == "train"], [c for c in clips if c.split == "test"])
    return clips


def by_name(clips: list[Clip]) -> dict[str, Clip]:
    return {Path(clip.audio).name: clip for clip in clips}


@pytest.fixture
def urbansound(tmp_path: Path) -> Path:
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, 11):
        for number, label in enumerate(("dog_bark", "air_conditioner")):
            name = f"{100000 + fold}-{number}-0-0.wav"
            lines.append(f"{name},{100000 + fold},0.0,0.1,1,{fold},{number},{label}")
            sound(tmp_path / f"audio/fold{fold}/{name}", 44100)
    text(tmp_path / "metadata/UrbanSound8K.csv", "\n".join(lines))
    return tmp_path


def test_urbansound8k(urbansound: Path) -> None:
    clips = heard(UrbanSound8K(str(urbansound), test_fold=10))
    assert Counter(clip.split for clip in clips) == {"train": 18, "test": 2}
    assert by_name(clips)["100010-1-0-0.wav"] == Clip(
        f"{urbansound}/audio/fold10/100010-1-0-0.wav", "air conditioner", "test", "100010"
    )
    with pytest.raises(ValueError, match="folds 1 to 10"):
        UrbanSound8K(test_fold=11)


def test_urbansound8k_warns_of_shuffled_folds(urbansound: Path) -> None:
    with pytest.warns(UserWarning, match="folds are shuffled"):
        clips = heard(UrbanSound8K(str(urbansound), shuffle_seed=1))
    assert Counter(clip.split for clip in clips) == {"train": 18, "test": 2}


@pytest.mark.filterwarnings("ignore:urbansound8k")
def test_shuffled_folds_of_urbansound8k_test_every_clip_once(tmp_path: Path) -> None:
    # Recordings of one to four excerpts, thirty of each class.
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for number in range(60):
        for excerpt in range(1 + number % 4):
            label = ("dog_bark", "siren")[number // 30]
            lines.append(f"{number}-0-0-{excerpt}.wav,{number},0.0,0.1,1,{number % 10 + 1},0,{label}")
    text(tmp_path / "metadata/UrbanSound8K.csv", "\n".join(lines))

    def tested(fold: int, seed: int | None) -> list[Clip]:
        clips = UrbanSound8K(str(tmp_path), test_fold=fold, shuffle_seed=seed).clips()
        check_disjoint([c for c in clips if c.split == "train"], [c for c in clips if c.split == "test"])
        return [clip for clip in clips if clip.split == "test"]

    folds = [tested(fold, 1) for fold in range(1, 11)]
    assert Counter(clip.audio for fold in folds for clip in fold) == Counter(
        clip.audio for clip in UrbanSound8K(str(tmp_path)).clips()
    )
    for fold in folds:  # of 74 and 75 clips
        assert all(5 <= count <= 10 for count in Counter(clip.label for clip in fold).values())
        assert {clip.label for clip in fold} == {"dog bark", "siren"}
    assert tested(1, 1) == folds[0]
    assert tested(1, 2) != folds[0] != tested(1, None)
    assert {clip.split for clip in UrbanSound8K(str(tmp_path), test_fold="all", shuffle_seed=1).clips()} == {"train"}


def test_fsd50k(tmp_path: Path) -> None:
    truth = tmp_path / "FSD50K.ground_truth"
    text(
        truth / "dev.csv",
        'fname,labels,mids,split\n64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n'
        "16399,Bark,/m/05tny_,val\n",
    )
    text(truth / "eval.csv", 'fname,labels,mids\n37199,"Bark,Dog","/m/05tny_,/m/0bt9lr"\n')
    for name in ("dev_audio/64760", "dev_audio/16399", "eval_audio/37199"):
        sound(tmp_path / f"FSD50K.{name}.wav", 44100)
    assert [(clip.split, clip.label) for clip in heard(Fsd50k(str(tmp_path)))] == [
        ("train", ("Electric guitar", "Guitar", "Music")),
        ("val", ("Bark",)),
        ("test", ("Bark", "Dog")),
    ]


def test_speech_commands(tmp_path: Path) -> None:
    for name in ("yes/0a7c2a8d_nohash_0", "yes/0a7c2a8d_nohash_1", "no/004ae714_nohash_0", "no/105a0eea_nohash_0"):
        sound(tmp_path / f"{name}.wav")
    sound(tmp_path / "_background_noise_/white_noise.wav")
    text(tmp_path / "testing_list.txt", "no/105a0eea_nohash_0.wav\n")
    text(tmp_path / "validation_list.txt", "no/004ae714_nohash_0.wav\n")
    clips = heard(SpeechCommands(str(tmp_path)))
    assert [(clip.label, clip.split, clip.group) for clip in clips] == [
        ("no", "val", "004ae714"),
        ("no", "test", "105a0eea"),
        ("yes", "train", "0a7c2a8d"),
        ("yes", "train", "0a7c2a8d"),
    ]
    assert clips[0].question == "Which word is spoken?"


def test_fsdd(tmp_path: Path) -> None:
    for digit in (0, 7):
        for speaker in ("jackson", "theo"):
            for take in (0, 4, 5, 49):
                sound(tmp_path / f"recordings/{digit}_{speaker}_{take}.wav", 8000)
    clips = by_name(heard(Fsdd(str(tmp_path))))
    assert (clips["7_theo_4.wav"].split, clips["7_theo_5.wav"].split) == ("test", "train")
    assert clips["7_theo_4.wav"].label == "seven"
    unseen = heard(Fsdd(str(tmp_path), test_speaker="theo"))
    assert {clip.group for clip in unseen if clip.split == "test"} == {"theo"}
    with pytest.raises(ValueError, match="'nobody' is none of jackson, theo"):
        Fsdd(str(tmp_path), test_speaker="nobody").clips()


@pytest.mark.parametrize("folder", ["genres", "genres_original"])
def test_gtzan_in_its_filtered_split(tmp_path: Path, folder: str) -> None:
    for name in ("blues/blues.00029", "blues/blues.00012", "jazz/jazz.00002", "jazz/jazz.00054"):
        sound(tmp_path / folder / f"{name}.wav", 22050)
    with pytest.warns(UserWarning, match=r"gtzan: 92\d of 930 listed clips are not on disk"):
        clips = by_name(heard(Gtzan(str(tmp_path))))
    assert (clips["blues.00012.wav"].split, clips["blues.00029.wav"].split) == ("test", "train")
    assert clips["blues.00012.wav"].label == "blues"


def test_nsynth(tmp_path: Path) -> None:
    for part, name in (("train", "guitar_acoustic_001-082-050"), ("valid", "bass_synthetic_068-049-025"),
                       ("test", "synth_lead_synthetic_003-060-100")):  # fmt: skip
        instrument = name.rsplit("-", 2)[0]
        family, source, _ = instrument.rsplit("_", 2)
        note = {"instrument_str": instrument, "instrument_family_str": family, "instrument_source_str": source}
        text(tmp_path / f"nsynth-{part}/examples.json", json.dumps({name: note}))
        sound(tmp_path / f"nsynth-{part}/audio/{name}.wav")
    assert [(clip.label, clip.split, clip.group) for clip in heard(Nsynth(str(tmp_path)))] == [
        ("guitar", "train", "guitar_acoustic_001"),
        ("bass", "val", "bass_synthetic_068"),
        ("synth lead", "test", "synth_lead_synthetic_003"),
    ]
    assert [clip.label for clip in heard(Nsynth(str(tmp_path), source="acoustic"))] == ["guitar"]


def test_crema_d_tests_on_other_actors(tmp_path: Path) -> None:
    for actor in range(1001, 1011):
        for emotion in ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"):
            sound(tmp_path / f"AudioWAV/{actor}_DFA_{emotion}_XX.wav")
    clips = heard(CremaD(str(tmp_path)))
    assert by_name(clips)["1003_DFA_ANG_XX.wav"].label == "anger"
    assert Counter(clip.label for clip in clips if clip.split == "test")["sadness"] == 3


def test_ravdess_tests_on_other_actors(tmp_path: Path) -> None:
    for actor in range(1, 11):
        for emotion in range(1, 9):
            sound(tmp_path / f"Actor_{actor:02d}/03-01-{emotion:02d}-01-02-01-{actor:02d}.wav", 48000)
    clips = heard(Ravdess(str(tmp_path)))
    assert by_name(clips)["03-01-06-01-02-01-10.wav"].label == "fearful"
    assert by_name(clips)["03-01-06-01-02-01-10.wav"].group == "10"
    assert Counter(clip.split for clip in clips) == {"train": 56, "test": 24}


def test_songs_of_ravdess_are_no_speech(tmp_path: Path) -> None:
    for actor in range(1, 5):
        for emotion in range(1, 7):
            sound(tmp_path / f"Actor_{actor:02d}/03-02-{emotion:02d}-01-02-01-{actor:02d}.wav", 48000)
    with pytest.raises(DataMissingError, match=r": holds 24 songs of RAVDESS and no speech\. Unpack http"):
        heard(Ravdess(str(tmp_path)))
    for actor in range(1, 5):
        for emotion in range(1, 9):
            sound(tmp_path / f"Actor_{actor:02d}/03-01-{emotion:02d}-01-02-01-{actor:02d}.wav", 48000)
    clips = heard(Ravdess(str(tmp_path)))
    assert len(clips) == 32
    assert {Path(clip.audio).name[:5] for clip in clips} == {"03-01"}


@pytest.fixture
def vggsound(tmp_path: Path) -> Path:
    text(
        tmp_path / "vggsound.csv",
        '---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"waterfall burbling",train\n'
        '-0p7hKXZ1ww,30,"cattle, bovinae cowbell",train\n-0p7hKXZ1ww,30,"cattle, bovinae cowbell",train\n'
        "gone_video__,12,people marching,train\n---g-f_I2yQ,40,people marching,train\n",
    )
    for stem in ("---g-f_I2yQ_000001", "---g-f_I2yQ_000040", "--0PQM4-hqg_000030", "-0p7hKXZ1ww_000030"):
        sound(tmp_path / f"audio/{stem}.wav")
    text(tmp_path / "video/---g-f_I2yQ_000001.mp4", "")
    return tmp_path


def test_vggsound_with_odd_lines(vggsound: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clips = by_name(heard(VggSound(str(vggsound))))
    assert [str(warning.message) for warning in caught] == [
        "vggsound: 1 of 6 listed clips are not on disk; they are left out",
        "vggsound: left out 1 clips that are listed twice",
        "vggsound: left out 1 training clips whose source is also in the test",
    ]
    assert len(clips) == 3
    assert clips["-0p7hKXZ1ww_000030.wav"].label == "cattle, bovinae cowbell"
    marching = clips["---g-f_I2yQ_000001.wav"]
    assert (marching.split, marching.video) == ("test", f"{vggsound}/video/---g-f_I2yQ_000001.mp4")


@pytest.mark.filterwarnings("ignore:vggsound")
def test_vggsounder_labels_are_the_audible_ones(vggsound: Path) -> None:
    with pytest.raises(DataMissingError, match=r"vggsounder\.csv not found"):
        VggSound(str(vggsound), vggsounder=True).prepare()
    text(
        vggsound / "vggsounder.csv",
        "video_id,label,modality,background_music,static_image,voice_over\n"
        "---g-f_I2yQ_000001,people marching,AV,False,False,False\n"
        '---g-f_I2yQ_000001,"male speech, man speaking",A,False,False,False\n'
        "---g-f_I2yQ_000001,people running,V,False,False,False\n",
    )
    clips = by_name(heard(VggSound(str(vggsound), vggsounder=True)))
    assert clips["---g-f_I2yQ_000001.wav"].label == ("people marching", "male speech, man speaking")
    assert clips["--0PQM4-hqg_000030.wav"].label == ("waterfall burbling",)


def test_audioset(tmp_path: Path) -> None:
    head = (
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=2\n# YTID, start_seconds, end_seconds, labels\n"
    )
    train = '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"\nlost_video_, 1.000, 11.000, "/m/068hy"\n'
    text(tmp_path / "balanced_train_segments.csv", head + train)
    text(tmp_path / "eval_segments.csv", head + '-0RWZT-miFs, 420.000, 430.000, "/m/0bt9lr"\n')
    text(
        tmp_path / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/0bt9lr,"Dog"\n',
    )
    sound(tmp_path / "audio/balanced_train_segments/Y--4gqARaEJE.wav", 32000)
    sound(tmp_path / "audio/eval/-0RWZT-miFs_420000_430000.flac", 32000)
    with pytest.warns(UserWarning, match="audioset: 1 of 3 listed clips are not on disk"):
        clips = heard(AudioSet(str(tmp_path)))
    assert [(clip.split, clip.label) for clip in clips] == [
        ("train", ("Domestic animals, pets", "Dog")),
        ("test", ("Dog",)),
    ]


def test_asvspoof2019_la(tmp_path: Path) -> None:
    lists = {
        "train": ("train.trn", "LA_0079 LA_T_1138215 - - bonafide\nLA_0080 LA_T_1271820 - A01 spoof\n"),
        "dev": ("dev.trl", "LA_0069 LA_D_1047731 - - bonafide\n"),
        "eval": ("eval.trl", "LA_0039 LA_E_2834763 - A11 spoof\nLA_0014 LA_E_8877452 - A14 spoof\n"),
    }
    for part, (suffix, lines) in lists.items():
        text(tmp_path / f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{suffix}.txt", lines)
        for line in lines.splitlines():
            sound(tmp_path / f"ASVspoof2019_LA_{part}/flac/{line.split()[1]}.flac")
    recipe = AsvSpoof2019La(str(tmp_path))
    clips = heard(recipe)
    assert [(clip.label, clip.split, clip.group) for clip in clips] == [
        ("bonafide", "train", "LA_0079"),
        ("spoof", "train", "LA_0080"),
        ("bonafide", "val", "LA_0069"),
        ("spoof", "test", "LA_0039"),
        ("spoof", "test", "LA_0014"),
    ]
    assert {Path(path).stem: attack for path, attack in recipe.attacks().items()} == {
        "LA_T_1271820": "A01", "LA_E_2834763": "A11", "LA_E_8877452": "A14",
    }  # fmt: skip


@pytest.fixture
def mlaad(tmp_path: Path) -> Path:
    head = (
        "path|original_file|language|is_original_language|duration|training_data|model_name|architecture|transcript\n"
    )
    for language, code in (("en", "en_UK"), ("de", "de_DE")):
        texts = [f"{code}/by_book/female/reader_{n % 5}/book/wavs/{language}_{n:06d}.wav" for n in range(10)]
        for original in texts:
            sound(tmp_path / "bonafide" / original)
        for generator in ("bark", "vits", "xtts_v2", "tortoise"):
            folder = tmp_path / "fake" / language / generator
            lines = [
                f"./fake/{language}/{generator}/{Path(t).name}|{t}|{language}|True|0.1|LJ|{generator}|x|He said: no\n"
                for t in texts
            ]
            text(folder / "meta.csv", head + "".join(lines))
            for original in texts:
                sound(folder / Path(original).name, 22050)
    return tmp_path


def test_mlaad_never_shares_a_generator_or_a_reader(mlaad: Path) -> None:
    clips = heard(Mlaad(str(mlaad), test_fraction=0.5))
    assert Counter(clip.label for clip in clips) == {"spoof": 80, "bonafide": 20}
    generators = {
        split: {clip.group for clip in clips if clip.split == split and clip.label == "spoof"}
        for split in ("train", "test")
    }
    assert generators["train"] | generators["test"] == {"bark", "vits", "xtts_v2", "tortoise"}
    assert not generators["train"] & generators["test"]


def test_mlaad_in_one_language_by_sentence(mlaad: Path) -> None:
    clips = heard(Mlaad(str(mlaad), language="en", unseen_generators=False))
    assert len(clips) == 50
    sides = {clip.group: {c.split for c in clips if c.group == clip.group} for clip in clips}
    assert len(sides) == 10
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize(
    ("recipe", "address"),
    [
        (Fsd50k, "zenodo.org/records/4060432"),
        (Gtzan, "kaggle"),
        (CremaD, "github.com/CheyneyComputerScience/CREMA-D"),
        (VggSound, "robots.ox.ac.uk"),
        (AudioSet, "research.google.com/audioset"),
        (Mlaad, "deepfake-total.com/mlaad"),
    ],
)
def test_what_cannot_be_downloaded_comes_with_steps(recipe: type[Recipe], address: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError) as raised:
        recipe(data_dir=str(tmp_path)).prepare()
    assert str(raised.value).startswith(f"{tmp_path}: ")
    assert address.lower() in str(raised.value).lower()
