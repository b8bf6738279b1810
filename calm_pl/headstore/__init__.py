"""Head outputs on disk: computed once, shared by every run (docs/explanation/head-store.md)."""

from calm_pl.headstore.digests import Stamp, file_digest, file_digests, file_stamp
from calm_pl.headstore.files import HeadStoreError, store_root
from calm_pl.headstore.store import HeadStore, clip_key

__all__ = [
    "HeadStore",
    "HeadStoreError",
    "Stamp",
    "clip_key",
    "file_digest",
    "file_digests",
    "file_stamp",
    "store_root",
]
