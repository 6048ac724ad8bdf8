"""A checkpoint by directory or hub id: its config and what tensors it holds, known before its weights are there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from sglang_dflash.draft.checkpoint import INDEX, Shape, files_of_index, tensor_shapes_on_disk


class Checkpoint(NamedTuple):
    """Where a checkpoint is. revision, cache: of a hub id, as SGLang is told them; None is the hub's own choice."""

    path: str
    revision: str | None = None
    cache: str | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether it is named by a hub id, and not by a directory, a file, or an address."""
        return "://" not in self.path and not Path(self.path).exists()

    def folder(self) -> Path | None:
        """The directory that holds its config.json, from the hub if need be; None where only SGLang knows the way."""
        if Path(self.path).is_dir():
            return Path(self.path)
        return _cached_folder(self) if self.is_on_hub else None

    def beside(self, name: str) -> Path | None:
        """A file beside its config.json, from the hub if need be; None where there is none."""
        folder = self.folder()
        if folder is not None and (folder / name).is_file():
            return folder / name
        return _cached_file(self, name) if self.is_on_hub else None

    def tensor_shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor, from headers alone; none where only SGLang knows the way to them.

        Raises ValueError as `tensor_shapes_on_disk` does, and for a hub repository without safetensors.
        """
        folder = self.folder()
        if folder is None:
            return {}
        if not self.is_on_hub or _is_whole(folder):
            return tensor_shapes_on_disk(folder)
        return _shapes_on_hub(self)

    def shapes_here(self) -> dict[str, Shape]:
        """The same of a checkpoint whose safetensors are all on this machine; none of any other."""
        folder = self.folder()
        return tensor_shapes_on_disk(folder) if folder is not None and _is_whole(folder) else {}

    def tensor_names(self) -> set[str]:
        """The names alone; none where it has no safetensors."""
        folder = self.folder()
        if folder is not None and (folder / INDEX).is_file():
            return set(files_of_index(folder / INDEX))
        if folder is None or not (self.is_on_hub or _is_whole(folder)):
            return set()
        return set(self.tensor_shapes())


def _is_whole(folder: Path) -> bool:
    """Whether a directory holds all weights: a hub cache may hold the config alone."""
    if (folder / INDEX).is_file():
        return all((folder / file).is_file() for file in files_of_index(folder / INDEX).values())
    return any(folder.glob("*.safetensors"))


@functools.cache
def _cached_folder(checkpoint: Checkpoint) -> Path:
    from huggingface_hub import hf_hub_download

    path, revision, cache = checkpoint
    return Path(hf_hub_download(path, "config.json", revision=revision, cache_dir=cache)).parent


@functools.cache
def _cached_file(checkpoint: Checkpoint, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError  # also where the hub is not asked, and the cache has none

    path, revision, cache = checkpoint
    try:
        return Path(hf_hub_download(path, name, revision=revision, cache_dir=cache))
    except EntryNotFoundError:
        return None


@functools.cache
def _shapes_on_hub(checkpoint: Checkpoint) -> dict[str, Shape]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(checkpoint.path, revision=checkpoint.revision).files_metadata
    except NotASafetensorsRepoError as error:
        raise ValueError(
            f"Checkpoint {checkpoint.path} has no .safetensors file on the hub: give one that has, or convert it."
        ) from error
    return {name: tuple(info.shape) for file in files.values() for name, info in file.tensors.items()}
