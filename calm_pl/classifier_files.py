"""The folder of a saved classifier: what lies there, and how it is found, written and read with care."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from calm_pl.methods.base import HeadClassifier

CONFIG_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"
FORMAT = 1
# A saved classifier names the class that reads it; nothing outside this package is ever imported for it.
TRUSTED_PACKAGE = "calm_pl."
# What the reading of a damaged file can end in.
DAMAGE = (SafetensorError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, ValueError)


def write_files(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write a classifier's files by name, its config last; a failure leaves an older classifier as it was."""
    scratch = {name: target / f".{name}.{os.getpid()}" for name in contents}
    target.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in contents.items():
            scratch[name].write_bytes(content)
        # The config goes first and comes last: a folder with one is complete, and never half an older classifier.
        (target / CONFIG_FILE).unlink(missing_ok=True)
        for name in contents:
            scratch[name].replace(target / name)
    finally:
        for file in scratch.values():
            file.unlink(missing_ok=True)


def class_path(method: HeadClassifier) -> str:
    """The name that a saved classifier has its method by, for `method_class`."""
    return f"{type(method).__module__}.{type(method).__qualname__}"


def method_class(path: str) -> type[HeadClassifier]:
    """The class of that name. Raises ValueError where it is no method, or none of this package."""
    if not path.startswith(TRUSTED_PACKAGE):
        raise ValueError(f"it names {path}, which is no method of calm_pl: it is not loaded")
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, HeadClassifier)):
        raise ValueError(f"it names {path}, which is no method")
    return found


@contextmanager
def named_if_damaged(file: Path) -> Iterator[None]:
    """Make any `DAMAGE` a ValueError that names the file."""
    try:
        yield
    except DAMAGE as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{file}: damaged, or of another version of calm_pl ({reason}). Copy the folder again from where it was "
            "saved, or fit and save the classifier again."
        ) from error


def check_number_of_classes(state: dict[str, Tensor], num_classes: int) -> None:
    """The names of tensors tell which of their dimensions counts the classes: prototypes_CKD, weights_KC."""
    for name, tensor in state.items():
        shape = name.rpartition("_")[2]
        if shape.isupper() and "C" in shape and tensor.shape[shape.index("C")] != num_classes:
            raise ValueError(
                f"{name} is for {tensor.shape[shape.index('C')]} classes, {CONFIG_FILE} names {num_classes}"
            )


def classifier_folder(folder_or_hub_id: str | os.PathLike[str]) -> Path:
    """Where a classifier's files lie: in the folder, in its ``classifier/`` (of a run), or in the cache of the hub.

    Raises:
        FileNotFoundError: no classifier is there, or the hub cannot be reached.
    """
    folder = Path(folder_or_hub_id).expanduser()
    for candidate in (folder, folder / "classifier"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    name = os.fspath(folder_or_hub_id)
    if folder.exists() or name.count("/") != 1:
        raise FileNotFoundError(
            f"{folder} holds no classifier ({CONFIG_FILE} is not there): give a folder written by save_pretrained, "
            "a run folder, or a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and https://huggingface.co/{name} cannot be reached or does not exist ({error})"
        ) from error
