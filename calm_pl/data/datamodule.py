"""AudioEpisodeDataModule: a data set as support and test clips, and their head outputs as episodes.

Shapes: N clips, B batch, K heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.labelled import LabelledHeads, StepNumbers, StoredHeads
from calm_pl.data.protocol import Protocol
from calm_pl.data.recipes import Recipe, Shards
from calm_pl.data.splits import check_disjoint, draw_support, without_repeats
from calm_pl.data.stream import (
    BatchSize,
    ClipBatch,
    ShardBatches,
    of_all_ranks,
    on_gpu,
    share_of_rank,
    stream_batch_size,
    stream_loader,
)
from calm_pl.data.unlabelled import relabelled, unlabelled_clips
from calm_pl.headstore import HeadStore

PARTS = ("support", "test", "val", "unlabelled")


class AudioEpisodeDataModule(L.LightningDataModule):
    """A recipe's clips: a support set of ``shots`` clips a class, and the test clips.

    Audio is only touched for clips that the head store lacks (`calm_pl.training.extraction`); training and testing
    read head outputs from there.

    Args:
        recipe: where the clips come from.
        backbone: the frozen model whose heads are read.
        shots: labelled clips a class in the support set; null takes all training clips.
        seed: draws the support set. Of one seed, the 5-shot set contains the 1-shot set.
        protocol: ``open`` (the prompt names no class) or ``mcq`` (it lists options, the true one among them).
        num_options: answers listed in a prompt of the ``mcq`` protocol.
        letters: write options as "A. Dog bark B. Rain" on one line; else one option a line.
        options_seed: draws the wrong answers and their order; one clip gets the same options in every run.
        pseudo_labels: manifest of `calm pseudolabel`: training clips get its labels, and those that it lacks are left
            out; test clips keep the true ones.
        by_confidence: the surer a clip's label, the likelier it is in the support set (clips without a confidence
            count as sure).
        unlabelled: folder or manifest of clips without labels, for the within-head metric where every class has but
            one clip. Not the test clips, unless you mean to.
        within_options: in the ``mcq`` protocol, predict only among the options that a clip's question lists.
        batch_size: clips in one pass of the backbone; ``auto`` finds what fits the GPU.
        num_workers: processes that decode audio while the backbone computes.
        store: folder of the head store; null is CALM_STORE or the user's cache. ``none`` is for testing on shards:
            head outputs go straight to the classifiers, and only scores are kept.
        store_dtype: ``float16``, ``bfloat16`` or ``float32`` on disk.
    """

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        shots: int | None = 5,
        seed: int = 0,
        protocol: str = "open",
        num_options: int = 4,
        letters: bool = True,
        options_seed: int = 0,
        within_options: bool = False,
        pseudo_labels: str | None = None,
        by_confidence: bool = False,
        unlabelled: str | None = None,
        batch_size: BatchSize = 8,
        num_workers: int = 2,
        store: str | None = None,
        store_dtype: str = "float16",
    ) -> None:
        super().__init__()
        if batch_size != "auto" and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 clip a batch.")
        self.recipe = recipe
        self.backbone = backbone
        self.shots = shots
        self.seed = seed
        self.protocol = Protocol(protocol, num_options, letters, options_seed, within_options)
        for name, given in (("pseudo_labels", pseudo_labels), ("unlabelled", unlabelled)):
            if given and protocol != "open":
                raise ValueError(f"{name} is for protocol=open: listed options hold the true label.")
        self.pseudo_labels = pseudo_labels
        self.by_confidence = by_confidence
        self.unlabelled = unlabelled
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.store_root = store
        self.store_dtype = store_dtype
        self.clips: list[Clip] = []
        self.skipped: dict[int, str] = {}
        self.cut: set[int] | None = None  # positions of clips longer than the model's window; None: not looked for
        self.heads: HeadStore | FrozenLALM  # whose numbers of heads results tell: the store, or a stream's backbone
        self.streamed: dict[int, Clip] = {}
        self.stream_errors: list[str] = []
        self.streamed_cut = 0
        self.streamed_past = 0

    # What there is

    @property
    def streams(self) -> bool:
        """Whether the clips are a stream, of which nothing is known beforehand and only scores are kept."""
        return isinstance(self.recipe, Shards)

    def prepare_data(self) -> None:
        """Download or generate the data and hash the files, on one rank of each node; the others wait."""
        # The store comes first: who mistypes a backbone shall not wait for data.
        store = None if self.streams else self.make_store("float32")
        self.recipe.prepare()
        if store is not None:
            self.setup()
            store.clip_keys(self.clips)

    def setup(self, stage: str | None = None) -> None:
        """Draw the support set. The same on every rank; repeated calls change nothing.

        Raises:
            ValueError: shards are to be learned from or kept; too few clips or classes; a test clip is known from
                training, or of a class that is not.
        """
        if self.clips:
            return
        if self.streams:
            if stage == "fit" or self.store_root != "none":
                raise ValueError(
                    "shards are a stream, whose head outputs are not kept: fit on files (folder, manifest), then "
                    "`calm test --ckpt_path ... --data shards --data.store none`."
                )
            self.parts = dict.fromkeys(PARTS, range(0))
            self.expect([])
            return
        self._draw_parts()
        self._number_classes()

    def _draw_parts(self) -> None:
        """The clips of every part, one part behind another."""
        clips = self.asked(self.recipe.clips())
        pool = [clip for clip in clips if clip.split == "train"]
        test = [clip for clip in clips if clip.split == "test"]
        validation = [clip for clip in clips if clip.split == "val"]
        check_disjoint(pool, test)
        try:
            check_disjoint(pool, validation, "validation")
        except ValueError as error:  # nothing is learned from it
            rank_zero_warn(f"{self.recipe.name}: {error}. Figures of `calm validate` are too good for it.")
        true = {(clip.audio, clip.start, clip.end): clip.labels for clip in pool}
        if self.pseudo_labels:
            pool = relabelled(pool, self.pseudo_labels)
        pool = without_repeats(pool)
        support = [pool[i] for i in draw_support(pool, self.shots, self.seed, self.by_confidence)]
        self.support_right = sum({*clip.labels} <= {*true[clip.audio, clip.start, clip.end]} for clip in support)
        others = self.protocol.asked(unlabelled_clips(self.unlabelled), self.recipe) if self.unlabelled else []
        self.clips, self.parts = [], {}
        for part, clips in zip(PARTS, (support, test, validation, others), strict=True):
            self.parts[part] = range(len(self.clips), len(self.clips) + len(clips))
            self.clips += clips

    def _number_classes(self) -> None:
        """The classes of the support set by name, and those of each clip by number."""
        self.classes = sorted({label for i in self.parts["support"] for label in self.clips[i].labels})
        class_index = {label: index for index, label in enumerate(self.classes)}
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.recipe.name}: all training clips are of one class ({', '.join(self.classes)}), and there is "
                "nothing to tell apart: add clips of another class, if only of what it is not."
            )
        unknown = sorted({label for clip in self.clips for label in clip.labels} - class_index.keys())
        if unknown:
            raise ValueError(
                f"{self.recipe.name}: test clips have labels that no training clip has: {', '.join(unknown)}. "
                "Add labelled training clips of these classes, or take them out of the test set."
            )
        if self.multi_label:
            self.labels = torch.zeros(len(self.clips), len(self.classes), dtype=torch.uint8)
            for row, clip in enumerate(self.clips):
                self.labels[row, [class_index[label] for label in clip.labels]] = 1
        else:
            self.labels = torch.tensor([class_index[clip.labels[0]] if clip.labels else -1 for clip in self.clips])

    @property
    def multi_label(self) -> bool:
        """Whether a clip has several labels. ``labels`` then is (N, C), 1 for each label of a clip, else (N,)."""
        return any(len(clip.labels) > 1 for clip in (self.streamed.values() if self.streams else self.clips))

    def asked(self, clips: list[Clip]) -> list[Clip]:
        """The clips with the question of the protocol, see `Protocol.asked`.

        Films that nobody watches are left out: they would be hashed for the clips' keys.
        """
        if self.backbone.modality == "audio":
            clips = [replace(clip, video=None) for clip in clips]
        return self.protocol.asked(clips, self.recipe)

    def open_store(self, arithmetic: str) -> HeadStore:
        """The store of this backbone's head outputs; remembers the clips' keys."""
        self.heads = self.store = self.make_store(arithmetic)
        self.keys = self.store.clip_keys(self.clips)
        self._tell_copies()
        return self.store

    def told_apart(self, part: str) -> list[str]:
        """The clips of a part by name and content: the same wherever the data set lies, and not those of a copy."""
        return [f"{self.keys[i]} {Path(self.clips[i].audio).name}" for i in self.parts[part]]

    def _tell_copies(self) -> None:
        """Say which clips are the same sound under several names: known from training, or vouching for one another."""
        first = {}
        for i in reversed(self.parts["support"]):
            first[self.keys[i]] = i
        told = {"support": "support", "test": "test", "val": "validation"}
        copies = [
            f"{self.clips[i].audio} ({told[part]}) is {self.clips[first[self.keys[i]]].audio}"
            for part in told
            for i in self.parts[part]
            if first.get(self.keys[i], i) != i
        ]
        if copies:
            more = f", and {len(copies) - 5} more" if len(copies) > 5 else ""
            rank_zero_warn(
                f"clips are copies, byte for byte, of support clips, and make results better than they are: "
                f"{'; '.join(copies[:5])}{more}. Leave them out."
            )

    def make_store(self, arithmetic: str) -> HeadStore:
        """The head store that this backbone's vectors belong to.

        Raises:
            ValueError: the user wants none.
        """
        if self.store_root == "none":
            raise ValueError("store none is for `calm test` and `calm predict` on shards (--data shards).")
        return HeadStore(self.backbone.store_key(arithmetic, self.store_root), self.store_root, self.store_dtype)

    def leave_out(self, unusable: Mapping[int, str]) -> None:
        """Take clips that cannot be used out of every part; they are named in the results.

        Raises:
            ValueError: a class is left without any support clip.
        """
        self.skipped = dict(unusable)
        labels = self.labels[self.usable("support")]
        left = set((labels.any(0).nonzero()[:, 0] if self.multi_label else labels).tolist())
        emptied = [name for index, name in enumerate(self.classes) if index not in left]
        if emptied:
            raise ValueError(
                f"no usable support clip is left of {', '.join(emptied)}. " + "; ".join(list(self.skipped.values())[:5])
            )

    def find_cut_clips(self) -> None:
        """Find the clips that are cut at the model's window, and warn of them; once, whatever the store holds."""
        if self.cut is None:
            self.cut = set(self.backbone.clip_processor().warn_of_cut_clips(self.clips))

    def usable(self, part: str) -> list[int]:
        """Positions in ``clips`` of one of the PARTS, without clips that cannot be used."""
        return [i for i in self.parts[part] if i not in self.skipped]

    def usable_clips(self, part: str) -> list[Clip]:
        """The clips at those positions."""
        return [self.clips[i] for i in self.usable(part)]

    # What is streamed

    def support(self) -> LabelledHeads:
        """The support set's head outputs and labels, whole: it is what few-shot learning keeps in memory.

        A clip with several labels comes once for each of them, as an example of that class.
        """
        found = self._whole("support")
        if not self.multi_label:
            return found
        rows, labels = found.labels_B.nonzero(as_tuple=True)
        return LabelledHeads(found.indices_B[rows], found.heads_BKD[rows], labels)

    def unlabelled_heads(self) -> Tensor | None:
        """Head outputs (N, K, D) of the clips without labels, whole; None where there are none."""
        return self._whole("unlabelled").heads_BKD if self.usable("unlabelled") else None

    def _whole(self, part: str) -> LabelledHeads:
        positions = self.usable(part)
        return next(iter(StoredHeads(self.store, self.keys, self.labels, positions, chunk=max(1, len(positions)))))

    def among_options(self, indices_B: Tensor, probabilities_BC: Tensor) -> Tensor:
        """Probabilities of the clips at these positions, restricted to their options where that is asked for."""
        if not self.protocol.within_options:
            return probabilities_BC
        return self.protocol.among_options(probabilities_BC, self.clips_at(indices_B.tolist()), self.classes)

    def train_dataloader(self) -> DataLoader[int]:
        """One item an optimiser step, whose episodes follow from its number; how many steps, the module decides."""
        return DataLoader(StepNumbers(), batch_size=None)

    def test_dataloader(self) -> DataLoader[LabelledHeads] | DataLoader[ClipBatch]:
        return self._stream() if self.streams else self._loader("test")

    def predict_dataloader(self) -> DataLoader[LabelledHeads] | DataLoader[ClipBatch]:
        return self.test_dataloader()

    def val_dataloader(self) -> DataLoader[LabelledHeads] | list[Any]:
        return self._loader("val") if self.usable("val") else []

    def _loader(self, part: str) -> DataLoader[LabelledHeads]:
        trainer = self.trainer
        share = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return DataLoader(StoredHeads(self.store, self.keys, self.labels, self.usable(part), *share), batch_size=None)

    def _stream(self) -> DataLoader[ClipBatch]:
        assert isinstance(self.recipe, Shards) and self.trainer is not None
        size = stream_batch_size(self.batch_size)
        share = share_of_rank(self.trainer, self.backbone)
        self.streamed, self.stream_errors, self.streamed_cut, self.streamed_past = {}, [], 0, 0
        batches = ShardBatches(self.recipe.urls(), self.backbone, size, share=share, split="test")
        return stream_loader(batches, self.num_workers, pin_memory=on_gpu(self.trainer))

    def expect(self, classes: Sequence[str]) -> None:
        """The classes that labels of a stream may be; any of its clips may have several."""
        self.classes = list(classes)
        self.labels = torch.empty(0, len(classes), dtype=torch.uint8)

    def label_streamed(self, batch: ClipBatch, heads_BKD: Tensor) -> LabelledHeads:
        """Give clips of a stream their positions and labels (B, C), and remember who they were.

        Raises:
            ValueError: a clip has a label that is none of the classes, or its question is of the other protocol.
        """
        assert self.trainer is not None
        self.stream_errors += batch.errors
        self.streamed_cut += batch.cut
        self.streamed_past += batch.left_out
        indices: list[int] = []
        labels_BC = torch.zeros(len(batch.clips), len(self.classes), dtype=torch.uint8)
        for clip, labels_C in zip(batch.clips, labels_BC, strict=True):
            self.protocol.check_own(clip)
            for label in clip.labels:
                if label not in self.classes:
                    known = ", ".join(self.classes)
                    raise ValueError(f"{clip.audio}: its label {label} is none of the classes {known}.")
                labels_C[self.classes.index(label)] = 1
            # Ranks do not know how many clips the others have, so they take turns.
            indices.append(len(self.streamed) * self.trainer.world_size + self.trainer.global_rank)
            self.streamed[indices[-1]] = clip
        return LabelledHeads(torch.tensor(indices, dtype=torch.long), heads_BKD, labels_BC)

    def gather_streamed(self) -> None:
        """Tell all ranks of all clips that were streamed. A collective call.

        Raises:
            ValueError: there are none.
        """
        self.streamed = dict(of_all_ranks(list(self.streamed.items())))
        self.stream_errors = of_all_ranks(self.stream_errors)
        self.streamed_cut, self.streamed_past = (
            sum(of_all_ranks([count])) for count in (self.streamed_cut, self.streamed_past)
        )
        if not self.streamed:
            why = f": {self.stream_errors[0]}" if self.stream_errors else ", or all are of other splits than test"
            raise ValueError(f"no clip was heard: the shards hold none that can be used{why}")
        self.parts["test"] = range(len(self.streamed))

    def clips_at(self, positions: Sequence[int]) -> list[Clip]:
        """The clips that results know by these positions."""
        known = self.streamed if self.streams else self.clips
        return [known[i] for i in positions]

    # What results are filed under

    def description(self) -> dict[str, Any]:
        """The part of ``results.json`` that says what was asked."""
        return {
            "dataset": self.recipe.name,
            "backbone": self.backbone.name,
            **self.protocol.description(),
            **self._pseudo_description(),
            "shots": self.shots,
            "seed": self.seed,
            "num_classes": len(self.classes),
            "num_heads": self.heads.num_heads,
            "head_dim": self.heads.head_dim,
            "splits": {"support": len(self.usable("support")), "test": len(self.usable("test"))},
            "skipped": [
                *({"audio": self.clips[i].audio, "reason": reason} for i, reason in sorted(self.skipped.items())),
                *({"audio": error.partition(": ")[0], "reason": error} for error in self.stream_errors),
            ],
            "cut": self.streamed_cut + len((self.cut or set()) - self.skipped.keys()),
        }

    def _pseudo_description(self) -> dict[str, Any]:
        """Where the support labels come from a model: of how many clips they are right, all of them true labels."""
        if not self.pseudo_labels:
            return {}
        return {"pseudo_labels": {"right": self.support_right, "of": len(self.parts["support"])}}


def default_run_dir(dataset: str, backbone: str, shots: int | None, seed: int) -> Path:
    """Where a run's results lie unless the user says otherwise: the same question has the same folder."""
    name = backbone.rstrip("/").rsplit("/", 1)[-1]
    return Path("runs") / f"{dataset}-{name}-{'all' if shots is None else shots}shot-seed{seed}"
