"""A checkpoint on the hub is read as one in a directory is: from the cache where it is there, else headers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dflash import checkpoints
from sglang_dflash.checkpoints import Checkpoint
from sglang_dflash.draft.checkpoint import INDEX, tensor_shapes_on_disk
from sglang_dflash.embedded import DRAFT

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the config of some/draft in two revisions, block_size 16 and 5; no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for function in (checkpoints._cached_folder, checkpoints._shapes_on_hub):
        function.cache_clear()
    config = json.loads((DRAFT / "config.json").read_text())
    for revision, commit in COMMITS.items():
        snapshot = snapshot_of(tmp_path, revision)
        snapshot.mkdir(parents=True)
        size = 16 if revision == "main" else 5
        (snapshot / "config.json").write_text(json.dumps({**config, "block_size": size}))
        refs = tmp_path / "models--some--draft" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(commit)
    return tmp_path


def snapshot_of(cache: Path, revision: str) -> Path:
    return cache / "models--some--draft" / "snapshots" / COMMITS[revision]


def draft(cache: Path, revision: str | None = None) -> Checkpoint:
    return Checkpoint("some/draft", revision, str(cache))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub that knows headers alone, and what it was asked."""
    asked: list[tuple[str, str | None]] = []

    def metadata(repository: str, *, revision: str | None) -> Any:
        asked.append((repository, revision))
        tensors = {name: SimpleNamespace(shape=list(s)) for name, s in tensor_shapes_on_disk(DRAFT).items()}
        tensors["norm.weight"].shape = [7]
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    return asked


@pytest.mark.parametrize(("revision", "where"), [(None, "main"), ("main", "main"), ("v2", "v2")])
def test_a_revision_is_a_folder_of_its_own(cache: Path, revision: str | None, where: str) -> None:
    assert draft(cache, revision).folder() == snapshot_of(cache, where)


def test_weights_in_the_cache_are_read_there(cache: Path, hub: list[Any]) -> None:
    shutil.copy(DRAFT / "model.safetensors", snapshot_of(cache, "v2"))
    assert draft(cache, "v2").tensor_shapes() == tensor_shapes_on_disk(DRAFT)
    assert draft(cache, "v2").tensor_names() == set(tensor_shapes_on_disk(DRAFT))
    assert hub == []


def test_weights_that_are_not_there_are_known_by_their_headers(cache: Path, hub: list[Any]) -> None:
    (snapshot_of(cache, "v2") / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": "not-here.safetensors"}}))
    for revision in ("main", "v2"):
        shapes = draft(cache, revision).tensor_shapes()
        assert shapes.keys() == tensor_shapes_on_disk(DRAFT).keys() and shapes["norm.weight"] == (7,)
    assert hub == [("some/draft", "main"), ("some/draft", "v2")]
    assert draft(cache, "v2").tensor_names() == {"norm.weight"}


def test_a_repository_without_safetensors_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import NotASafetensorsRepoError

    def none(*_: Any, **__: Any) -> Any:
        raise NotASafetensorsRepoError("no")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", none)
    with pytest.raises(ValueError, match=r"some/draft has no \.safetensors file on the hub"):
        draft(cache).tensor_shapes()


def test_a_directory_is_itself_and_an_address_is_left_to_sglang(tmp_path: Path) -> None:
    assert Checkpoint(str(DRAFT)).folder() == DRAFT
    assert Checkpoint(str(DRAFT)).tensor_shapes() == tensor_shapes_on_disk(DRAFT)
    for path in ("s3://bucket/draft", str(DRAFT / "config.json")):
        assert Checkpoint(path).folder() is None and Checkpoint(path).tensor_shapes() == {}
    assert Checkpoint(str(tmp_path)).tensor_names() == set()
