"""Lightning's Trainer with one more verb: ``extract``."""

from __future__ import annotations

import sys
from itertools import chain

from calm_pl.backbone.precision import arithmetic
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.recipes import Shards
from calm_pl.data.stream import of_all_ranks, share_of_rank
from calm_pl.headstore import HeadStore
from calm_pl.progress import say
from calm_pl.training.extraction import ExtractingTrainer, HeadExtraction, StoreWriter
from calm_pl.training.extraction_data import ClipDataModule, ShardDataModule, unusable_clips
from calm_pl.training.module import CalmModule
from calm_pl.training.progress import ExtractionProgress, shows_progress


class CalmTrainer(ExtractingTrainer):
    """``Trainer`` whose ``extract`` fills the head store by ``predict``; everything else is Lightning's."""

    def extract(self, model: CalmModule, datamodule: AudioEpisodeDataModule) -> None:
        """Read the heads of every clip of a data set into the head store.

        Devices, strategy, nodes and precision are this Trainer's. Clips that are stored already are left alone, so
        an interrupted extraction goes on where it was.

        Raises:
            ValueError: not a single clip can be used.
            HeadStoreError: the store lacks a clip that can be used.
        """
        recipe, backbone = datamodule.recipe, datamodule.backbone
        store = datamodule.make_store(arithmetic(self.precision))
        options = (backbone, store, datamodule.batch_size, datamodule.num_workers)
        recipe.prepare()
        data: ClipDataModule | ShardDataModule
        if isinstance(recipe, Shards):
            data = ShardDataModule(recipe.urls(), *options)
        else:
            data = ClipDataModule(datamodule.asked(recipe.clips()), *options)
        errors, read = self.fill(store, HeadExtraction(backbone), data)
        if isinstance(data, ClipDataModule):
            if not self.stops_early:
                unusable_clips(data)  # which ends the run where a clip can be used, and another node keeps it to itself
            stored = len(data.keys) - len(store.missing(data.keys))
            told = f"{stored:,} of {len(data.keys):,} clips are in {store.folder}"
        else:
            stored = len(store)
            told = f"{len(errors):,} clips or shards cannot be used; {store.folder} holds {stored:,} clips, of any set"
        nothing = not stored
        if isinstance(recipe, Shards) and not read:  # the store may hold what was heard of other sets alone
            nothing |= {error.partition(": ")[0] for error in errors} >= set(recipe.urls())
        if errors and nothing:
            raise ValueError(f"nothing could be read: {errors[0]}" + (", and others" if len(errors) > 1 else ""))
        if self.is_global_zero:
            print(told)

    @property
    def stops_early(self) -> bool:
        """Whether it is to run a part of the batches alone (``limit_predict_batches``, ``fast_dev_run``)."""
        return isinstance(self.limit_predict_batches, int) or self.limit_predict_batches < 1

    def fill(
        self, store: HeadStore, extraction: HeadExtraction, data: ClipDataModule | ShardDataModule
    ) -> tuple[list[str], int]:
        """Let ``extraction`` write what the store lacks of the clips; return why clips of any rank cannot be used, and
        how many were."""
        progress = ExtractionProgress(shows_progress(self))
        self.callbacks = [StoreWriter(store), progress]
        self.loggers = []  # there is nothing to log, and an empty run at W&B helps nobody
        processor = extraction.backbone.clip_processor() if self.is_global_zero else None
        if processor and isinstance(data, ClipDataModule):
            processor.warn_of_cut_clips(data.clips)
        self.predict(extraction, datamodule=data, return_predictions=False)
        self.strategy.barrier("head store written")
        _, ranks = share_of_rank(self, extraction.backbone)
        told = of_all_ranks([(progress.errors, progress.cut, progress.clips)])[:ranks]
        errors_of_ranks, cuts, totals = zip(*told, strict=True)
        errors = list(chain.from_iterable(errors_of_ranks))
        if processor:
            processor.warn_of_cut(sum(cuts), sum(totals))
            store.compact()
            say(f"{extraction.title}: {progress.summary(ranks)}")
            for error in sorted(set(errors)):
                print(f"not stored: {error}", file=sys.stderr)
        return errors, sum(totals) - len(errors)
