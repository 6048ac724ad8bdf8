"""Weight updates: what is refused writes nothing, what is taken is followed, and "all" leaves the draft alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from sglang_dflash import updates
from sglang_dflash.draft.checkpoint import INDEX, expected_shapes
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.updates import DraftUpdater, TargetUpdater, select_runners

DRAFT = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 128, "vocab_size": 61, "block_size": 7, "num_target_layers": 6,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 4]},
}  # fmt: skip
NAMES = {"a.weight": (2, 3), "b.weight": (3,)}


class Target(torch.nn.Module):
    """Ignores names that it does not know, as SGLang's Llama does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 2, bias=False), torch.nn.LayerNorm(3, bias=False)

    def load_weights(self, weights: Any) -> None:
        own = dict(self.named_parameters())
        for name, tensor in weights:
            if name in own:
                own[name].data.copy_(tensor)


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def followed() -> list[str]:
    return []


@pytest.fixture
def updater(target: Target, followed: list[str], monkeypatch: pytest.MonkeyPatch) -> TargetUpdater:
    monkeypatch.setattr(updates, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    for method in ("update_weights_from_tensor", "load_weights_from_distributed", "update_weights_from_disk"):
        monkeypatch.setattr(WeightUpdater, method, taker(method))
    monkeypatch.setattr(WeightUpdater, "end_weight_update", lambda self, run_post_load: None)
    plain = WeightUpdater(
        tp_rank=0, device="cpu", gpu_id=0, model_config=SimpleNamespace(model_path="first"),
        custom_weight_loaders={"mine": "mine"}, get_model=lambda: target,
        update_model_fields=print, recapture_cuda_graph=print, get_model_runner=print,
    )  # fmt: skip
    return TargetUpdater.around(plain, follow=lambda: followed.append("now"), tensors=NAMES, tied=True)


def taker(method: str) -> Any:
    """SGLang's method, without its server: it writes what it is given."""

    def take(self: WeightUpdater, weights: Any, *rest: object) -> tuple[bool, str]:
        if method != "update_weights_from_disk":
            self.get_model().load_weights(weights)
        return True, "taken"

    return take


def whole() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in NAMES.items()}


BAD = {
    "shape": ({**whole(), "b.weight": torch.ones(4)}, "b.weight has shape [4]"),
    "name": ({**whole(), "c.weight": torch.ones(4)}, "no tensor c.weight"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", ["update_weights_from_tensor", "load_weights_from_distributed"])
def test_tensors_without_a_place_are_refused_before_any_is_written(
    updater: TargetUpdater, target: Target, method: str, bad: str
) -> None:
    tensors, why = BAD[bad]
    before = target.a.weight.clone()
    taken, message = getattr(updater, method)(list(tensors.items()))
    assert not taken
    assert why in message
    assert torch.equal(target.a.weight, before)


@pytest.mark.parametrize("method", ["update_weights_from_tensor", "load_weights_from_distributed"])
def test_some_of_the_target_s_tensors_are_taken(updater: TargetUpdater, target: Target, method: str) -> None:
    some = [("a.weight", torch.full((2, 3), 5.0)), ("lm_head.weight", torch.ones(9, 3))]  # tied: read nowhere
    assert getattr(updater, method)(some) == (True, "taken")
    assert (target.a.weight == 5).all()


def test_a_bucket_is_checked_by_what_it_says_of_itself(updater: TargetUpdater) -> None:
    bucket = {"metadata": [SimpleNamespace(name="a.weight", shape=torch.Size([3, 2]))], "flattened_tensor": None}
    taken, message = updater.update_weights_from_tensor(bucket, "flattened_bucket")
    assert not taken
    assert "[3, 2]" in message


def test_load_formats(updater: TargetUpdater) -> None:
    assert updater.update_weights_from_tensor([("whatever", torch.ones(1))], "mine")[0]
    assert updater.update_weights_from_tensor([("a.weight", torch.ones(2, 3))], "direct")[0]
    assert "no parameter x" in updater.update_weights_from_tensor([("x", torch.ones(2, 3))], "direct")[1]
    assert "'other' is none" in updater.update_weights_from_tensor([("a.weight", torch.ones(2, 3))], "other")[1]


def test_the_draft_s_copies_follow_once_weights_are_whole(
    updater: TargetUpdater, followed: list[str], tmp_path: Path
) -> None:
    updater.update_weights_from_tensor(list(whole().items()))
    assert not followed
    updater.end_weight_update(run_post_load=False)
    assert len(followed) == 1
    save_file(whole(), tmp_path / "model.safetensors")
    assert updater.update_weights_from_disk(str(tmp_path), "auto")[0]
    assert len(followed) == 2


@pytest.mark.parametrize(
    ("tensors", "load_format", "why"),
    [
        *[(tensors, "auto", why) for tensors, why in BAD.values()],
        ({"a.weight": torch.ones(2, 3)}, "auto", "lacks tensor b.weight"),
        ({}, "auto", "no .safetensors"),
        (whole(), "bogus", "load_format is 'bogus'"),
    ],
)
def test_another_checkpoint_is_refused(
    updater: TargetUpdater,
    followed: list[str],
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    load_format: str,
    why: str,
) -> None:
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    taken, message = updater.update_weights_from_disk(str(tmp_path), load_format)
    assert not taken
    assert why in message
    assert not followed


def test_a_missing_directory_is_refused(updater: TargetUpdater, tmp_path: Path) -> None:
    taken, message = updater.update_weights_from_disk(str(tmp_path / "none"), "auto")
    assert not taken
    assert "no directory" in message


def truncated(file: Path) -> None:
    save_file(whole(), file)
    file.write_bytes(file.read_bytes()[:-4])


def index(text: str) -> Callable[[Path], None]:
    """What writes it where an index is looked for."""

    def write(file: Path) -> None:
        file.with_name(INDEX).write_text(text)

    return write


BROKEN: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "dangling link": lambda file: file.symlink_to("nowhere"),
    "link to itself": lambda file: file.symlink_to(file),
    "truncated": truncated,
    "empty": Path.touch,
    "web page": lambda file: file.write_text("<html>not found</html>"),
    "index cut": index('{"weight_map": {"a.wei'),
    "index nested": index("[" * 100_000),
    "index a list": index('{"weight_map": ["a.weight"]}'),
    "index of numbers": index('{"weight_map": {"a.weight": 1}}'),
    "index of lists": index('{"weight_map": {"a.weight": ["model.safetensors"]}}'),
    "index of a file that is not there": index('{"weight_map": {"a.weight": "model.safetensors"}}'),
    "index of a name that no system takes": index(json.dumps({"weight_map": {"a.weight": "x" * 300}})),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_files_that_cannot_be_read_are_refused(updater: TargetUpdater, tmp_path: Path, broken: str) -> None:
    BROKEN[broken](tmp_path / "model.safetensors")
    taken, message = updater.update_weights_from_disk(str(tmp_path), "auto")
    assert not taken
    assert message.startswith("The update is refused") and str(tmp_path) in message
    assert updater.model_config.model_path == "first"


def test_a_path_that_no_system_takes_is_refused(updater: TargetUpdater) -> None:
    taken, message = updater.update_weights_from_disk("x" * 5000, "auto")
    assert not taken
    assert "File name too long" in message


def test_a_load_that_fails_is_told_and_ends_nothing(
    updater: TargetUpdater, followed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's way back to the old weights reads the new files again, and raises again."""

    def load(self: WeightUpdater, path: str, *_: object) -> tuple[bool, str]:
        self.model_config.model_path = path
        raise SafetensorError("I/O error")

    monkeypatch.setattr(WeightUpdater, "update_weights_from_disk", load)
    save_file(whole(), tmp_path / "model.safetensors")
    taken, message = updater.update_weights_from_disk(str(tmp_path), "auto")
    assert not taken
    assert "I/O error" in message and "update again" in message
    assert not followed and updater.model_config.model_path == "first"


def test_a_draft_takes_its_own_tensors_and_all_of_them(updater: TargetUpdater) -> None:
    config = DraftConfig.from_dict(DRAFT)
    tensors = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
    plain = {field.name: getattr(updater, field.name) for field in dataclasses.fields(WeightUpdater)}
    draft = DraftUpdater.around(WeightUpdater(**plain), follow=print, config=config)
    assert draft.update_weights_from_tensor(list(tensors.items())) == (True, "taken")
    assert "selector 'target'" in draft.update_weights_from_tensor([("a.weight", torch.ones(2, 3))])[1]
    some = list(tensors.items())[1:]
    assert f"{next(iter(tensors))} missing" in draft.load_weights_from_distributed(some)[1]
    assert "'direct'" in draft.update_weights_from_tensor(some, "direct")[1]


def test_only_who_names_the_draft_reaches_it() -> None:
    manager = SimpleNamespace(
        tp_worker=SimpleNamespace(weight_update_runners=lambda: ["target"]),
        draft_worker=SimpleNamespace(weight_update_runners=lambda: ["draft"]),
    )

    def reached(*selector: str) -> list[Any]:
        return select_runners(SchedulerWeightUpdaterManager._select_runners, manager, *selector)

    assert reached() == reached("all") == reached("target") == ["target"]
    assert reached("draft") == ["draft"]
    with pytest.raises(ValueError, match="bogus"):
        reached("bogus")
