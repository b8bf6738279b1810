"""From a name to a folder with a checkpoint: shipped, local, or on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from calm_pl.backbone.errors import BackboneError, HubUnreachable
from calm_pl.conf import config_names

# Everything a transformers checkpoint can need, and no pickle: weights come as safetensors only. Python code of a
# checkpoint's own can so be read, and is run only with trust_remote_code.
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
SHIPPED = {"calm-tiny": Path(__file__).parent / "calm-tiny"}
RANDOM = "random-qwen2-audio"  # made on the fly
WITHOUT_DOWNLOAD = (*SHIPPED, RANDOM)  # these names win over folders that are called so


def resolve_checkpoint(
    path_or_hub_id: str | os.PathLike[str], revision: str | None = None, weights: bool = True
) -> Path:
    """Return a local folder holding the checkpoint; download it from the hub when it is not here yet.

    Args:
        path_or_hub_id: ``calm-tiny`` (shipped), ``random-qwen2-audio`` (made on the fly, hears nothing), a folder,
            or a hub id such as ``Qwen/Qwen2-Audio-7B-Instruct``.
        revision: branch, tag or commit on the hub; ignored for folders.
        weights: False downloads all but the weights.

    Raises:
        BackboneError: when a folder is no checkpoint, or the hub cannot be reached and nothing is cached.
    """
    name = os.fspath(path_or_hub_id)
    if name in SHIPPED:
        return SHIPPED[name]
    if name == RANDOM:
        from calm_pl.backbone.random_checkpoint import random_qwen2_audio

        return random_qwen2_audio()
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"{folder} is no checkpoint: it has no config.json. Point to a folder written by "
                "save_pretrained, or to a Hugging Face hub id."
            )
        return folder.resolve()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BackboneError(
            f"{name!r} is neither a folder on this machine nor a hub id (owner/model). `--backbone` also takes "
            f"{', '.join(config_names('backbone'))}; of these {' and '.join(WITHOUT_DOWNLOAD)} need no download."
        )
    return _from_hub(name, revision, [p for p in CHECKPOINT_FILES if weights or p != "*.safetensors"])


def adapter_folder(adapter: str, checkpoint: Path) -> Path:
    """Return a low-rank adapter's folder: inside the checkpoint (Phi-4's ``speech-lora``), elsewhere, or the hub's.

    Raises:
        BackboneError: when a folder is no adapter, or the hub cannot be reached and nothing is cached.
    """
    folder = next((f for f in (checkpoint / adapter, Path(adapter).expanduser()) if f.exists()), None)
    if folder is None and adapter.count("/") == 1:
        folder = _from_hub(adapter, None)
    if folder is None or not (folder / "adapter_config.json").is_file():
        raise BackboneError(f"{adapter} is no adapter: it has no adapter_config.json (peft writes one).")
    return folder.resolve()


def _from_hub(hub_id: str, revision: str | None, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise BackboneError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id} and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"https://huggingface.co/{hub_id} does not exist, or is private: check the name, or run `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise HubUnreachable(
            f"{hub_id} is not in the local cache and https://huggingface.co/{hub_id} cannot be reached. On a machine "
            f"with a network run `hf download {hub_id} --local-dir DIR`, copy DIR here, and give its path instead of "
            f"the name. ({error})"
        ) from error
