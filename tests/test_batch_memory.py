"""Batches that do not fit into memory are halved, and the largest that fits is found."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip, length_batches
from calm_pl.data.manifest import read_manifest
from calm_pl.data.stream import ClipBatches, stream_loader
from calm_pl.headstore import HeadStore
from calm_pl.training.batch_size import fitting_batch_size, is_out_of_memory, run_in_halves
from calm_pl.training.extraction import HeadExtraction, extract_missing
from tests.conftest import tone
from tests.extracting import trainer
from tests.families import FAMILIES


@pytest.fixture
def small_gpu(tiny_lalm) -> FrozenLALM:
    """A model on a device whose memory ends at three clips."""
    lalm = FrozenLALM.from_pretrained(tiny_lalm)

    def limit(module: torch.nn.Module, args: tuple, inputs: dict) -> None:
        if len(inputs["input_ids"]) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    lalm.model.register_forward_pre_hook(limit, with_kwargs=True)
    return lalm


def test_a_batch_that_does_not_fit_is_run_in_halves(small_gpu, unbroken, tones, tiny_lalm, tmp_path):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with pytest.warns(UserWarning, match="out of memory") as told:
        extract_missing(trainer(), clips, HeadExtraction(backbone, small_gpu), store, batch_size=8)
    assert sum("out of memory" in str(warning.message) for warning in told) == 1
    torch.testing.assert_close(store.read(store.clip_keys(clips)), unbroken, atol=2e-3, rtol=2e-3)


def test_pieces_of_long_clips_are_halved_too(small_gpu, tiny_lalm, tmp_path):
    clips = [Clip(str(tone(tmp_path / f"{index}.wav", 300 * (index + 1), 4.0 + 4 * index))) for index in range(4)]
    backbone = Backbone(tiny_lalm, long_clips="split")
    inputs = backbone.clip_processor()(clips, [backbone.clip_processor().load(clip) for clip in clips])
    assert max(len(part.last_token_B) for part in inputs.parts) == 4  # more than there is memory for
    store = HeadStore(backbone.store_key(), tmp_path, dtype="float32")
    with pytest.warns(UserWarning, match="out of memory with a batch of 4 clips"):
        extract_missing(trainer(), clips, HeadExtraction(backbone, small_gpu), store, batch_size=4)

    def full(_: LALMInputs) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(BackboneError, match="cannot be halved"):
        run_in_halves(full, inputs, lambda _: None)
    expected_NKD = FrozenLALM.from_pretrained(tiny_lalm, long_clips="split").head_outputs(clips)
    torch.testing.assert_close(store.read(store.clip_keys(clips)), expected_NKD, atol=1e-5, rtol=1e-5)


def test_clips_of_several_windows_are_halved_too(tmp_path):
    FAMILIES["audio-flamingo-3"].write(tmp_path / "model")
    lalm = FrozenLALM.from_pretrained(tmp_path / "model", heads="both")
    clips = [Clip(str(tone(tmp_path / f"{index}.wav", 300 * (index + 1), 1.0 + 2 * index))) for index in range(3)]

    def run(inputs: LALMInputs) -> torch.Tensor:
        if len(inputs.last_token_B) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return lalm.forward(inputs)

    sizes: list[int] = []
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    heads_NKD = run_in_halves(run, inputs, sizes.append)
    assert sizes == [3, 2] and inputs.windows_B.tolist() == [1, 2, 3]
    torch.testing.assert_close(heads_NKD, lalm.head_outputs(clips), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_alone_is_an_error(small_gpu, tones, tiny_lalm, tmp_path):
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    small_gpu.model.register_forward_pre_hook(full)
    backbone = Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with pytest.raises(BackboneError, match="batch of 1 clips"), pytest.warns(UserWarning, match="out of memory"):
        extract_missing(trainer(), read_manifest(tones)[:4], HeadExtraction(backbone, small_gpu), store)


def test_the_largest_batch_that_fits_is_found(small_gpu, tones, tmp_path):
    longest = tmp_path / "longest by its header, but no sound.wav"
    soundfile.write(longest, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    clips = [*read_manifest(tones), Clip(str(longest))]
    here = torch.device("cpu")
    assert fitting_batch_size(small_gpu.forward, small_gpu.processor, clips, here) == 2
    assert fitting_batch_size(small_gpu.forward, small_gpu.processor, clips, here, largest=1) == 1


def test_batches_are_of_clips_of_similar_length_the_longest_first(tmp_path):
    paths = [tone(tmp_path / f"{index}.wav", 300, seconds) for index, seconds in enumerate((0.2, 0.5, 0.9, 0.5))]
    clips = [Clip(str(tmp_path / "gone.wav")), *(Clip(str(path)) for path in paths), Clip(str(paths[2]), end=0.4)]
    assert length_batches(clips, 2) == [[3, 2], [4, 5], [1, 0]]


def test_auto_is_a_constant_on_cpu(unbroken, tones, tiny_lalm, tmp_path):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    auto, eight = (HeadStore(backbone.store_key(), tmp_path / name) for name in ("auto", "eight"))
    extract_missing(trainer(), clips, HeadExtraction(backbone), auto, batch_size="auto")
    extract_missing(trainer(), clips, HeadExtraction(backbone), eight, batch_size=8)
    keys = auto.clip_keys(clips)
    assert torch.equal(auto.read(keys), eight.read(keys))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_out_of_memory_is_known_in_other_words(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(RuntimeError("shapes do not meet"))


def test_auto_goes_on_with_the_batches_of_the_run_before(unbroken, tones, tiny_lalm, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("the cat pulled the plug")

    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the cat"):
        patch.setattr(HeadExtraction, "vectors", broken)
        extract_missing(trainer(), clips, HeadExtraction(backbone), store, batch_size=2)
    extract_missing(trainer(), clips, HeadExtraction(backbone), store, batch_size="auto")
    assert torch.equal(store.read(store.clip_keys(clips)), unbroken)


def test_workers_may_have_as_many_files_open_as_there_can_be(tones, tiny_lalm):
    """Clips that no two of may share a batch are tensors of their own, and each is an open file on its way."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(least, 256), most))
    stream_loader(ClipBatches(read_manifest(tones), [], [], [], Backbone(tiny_lalm)), num_workers=1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
