"""Weight updates on a running server: refused whole before anything is written, or taken whole.

An update is the target's unless it names the draft (selector "draft"). What the draft reads off the target's weights
follows them, in place, as captured graphs read it.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor, WeightUpdater
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

from sglang_dflash.draft.checkpoint import Shape, check_tensors, tensor_shapes_on_disk, unknown_names
from sglang_dflash.draft.config import DraftConfig

logger = logging.getLogger(__name__)

DISK_FORMATS = ("auto", "safetensors")

Answer = tuple[bool, str]


def select_runners(original: Callable[..., Any], manager: Any, selector: str = "all") -> list[tuple[str, Any]]:
    """SGLang's choice of whom an update is for, made narrower: its default, "all", offers the draft the target's."""
    runners: list[tuple[str, Any]] = original(manager, "target" if selector == "all" else selector)
    return runners


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedUpdater(WeightUpdater, ABC):
    """SGLang's updater of one model, asked only for what the model has a place for.

    follow: called when new weights are in place.
    """

    follow: Callable[[], None]

    @classmethod
    def around(cls, updater: WeightUpdater, **own: Any) -> CheckedUpdater:
        theirs = {field.name: getattr(updater, field.name) for field in dataclasses.fields(updater)}
        return cls(**theirs, **own)

    @abstractmethod
    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise ValueError, naming the tensor, unless the model has a place of that shape for each."""

    @abstractmethod
    def check_direct(self, shapes: Mapping[str, Shape]) -> None:
        """The same for tensors named as SGLang's parameters are (load format "direct")."""

    def update_weights_from_tensor(self, named_tensors: Any, load_format: str | None = None) -> Answer:
        monkey_patch_torch_reductions()  # before tensors of another process are opened
        try:
            if load_format == "flattened_bucket":
                self.check({part.name: tuple(part.shape) for part in named_tensors["metadata"]})
            else:
                rank = get_parallel().tp_rank
                named_tensors = [
                    (name, x.get(rank) if isinstance(x, LocalSerializedTensor) else x) for name, x in named_tensors
                ]
                self._check_as(load_format, shapes_of(named_tensors))
        except ValueError as error:
            return False, _refusal(error)
        answer: Answer = super().update_weights_from_tensor(named_tensors, load_format)
        return answer

    def _check_as(self, load_format: str | None, shapes: Mapping[str, Shape]) -> None:
        if load_format is None:
            self.check(shapes)
        elif load_format == "direct":
            self.check_direct(shapes)
        elif load_format not in self.custom_weight_loaders:  # whose names are their own
            raise ValueError(
                f"load_format {load_format!r} is none that SGLang knows: leave it out, or give the loader to "
                "--custom-weight-loader"
            )

    def load_weights_from_distributed(self, named_tensors: Any) -> Answer:
        try:
            self.check(shapes_of(named_tensors))
        except ValueError as error:
            return False, _refusal(error)
        answer: Answer = super().load_weights_from_distributed(named_tensors)
        return answer

    def end_weight_update(self, *, run_post_load: bool) -> None:
        super().end_weight_update(run_post_load=run_post_load)
        self.follow()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetUpdater(CheckedUpdater):
    """The target's. tensors: of the checkpoint that the server was started on, which an update must be like; empty
    where it is not of safetensors, and then SGLang checks what it does by itself.
    """

    tensors: Mapping[str, Shape]
    tied: bool

    def check(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items() if self.tensors else ():
            if self._is_no_part(name):
                continue
            if name not in self.tensors:
                raise ValueError(f"the target served here has no tensor {name}: give weights of that model")
            if self.tensors[name] != shape:
                raise ValueError(
                    f"tensor {name} has shape {list(shape)}, and the target's has {list(self.tensors[name])}: "
                    "give weights of that model, unsplit"
                )

    def check_direct(self, shapes: Mapping[str, Shape]) -> None:
        own = shapes_of(self.get_model().named_parameters())
        for name, shape in shapes.items():
            if own.get(name) != shape:
                raise ValueError(f"the target has no parameter {name} of shape {list(shape)}: it has {own.get(name)}")

    def _is_no_part(self, name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (self.tied and name.endswith("lm_head.weight"))

    def update_weights_from_disk(
        self, model_path: str, load_format: str, weight_name_filter: Any = None, recapture_cuda_graph: bool = False
    ) -> Answer:
        try:
            if self.tensors:
                self._check_directory(Path(model_path), load_format)
        except (OSError, ValueError) as error:  # OSError: a path that the system does not take
            return False, _refusal(error)
        before = self.model_config.model_path
        try:
            answer: Answer = super().update_weights_from_disk(
                model_path, load_format, weight_name_filter, recapture_cuda_graph
            )
        except Exception as error:  # as SGLang catches a load that fails; its way back reads the same files again
            logger.exception("An update from %s failed while weights were read.", model_path)
            answer = False, (
                f"The update failed while weights were read ({error}), and those in memory may be of both checkpoints: "
                "update again, from whole files, before you go on."
            )
        if answer[0]:
            self.follow()
        else:
            self.model_config.model_path = before
        return answer

    def _check_directory(self, folder: Path, load_format: str) -> None:
        if load_format not in DISK_FORMATS:
            raise ValueError(f"load_format is {load_format!r}: give one of {', '.join(DISK_FORMATS)}")
        if not folder.is_dir():
            raise ValueError(f"{folder} is no directory here: save or download the weights to one first")
        shapes = tensor_shapes_on_disk(folder)
        self.check(shapes)
        missing = [name for name in self.tensors if name not in shapes and not self._is_no_part(name)]
        if missing:
            raise ValueError(f"{folder} lacks tensor {missing[0]}, and {len(missing)} in all: save the whole model")

    def update_weights_from_ipc(self, recv_req: Any) -> Answer:
        answer: Answer = super().update_weights_from_ipc(recv_req)
        if answer[0]:
            self.follow()
        return answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftUpdater(CheckedUpdater):
    """The draft's, which takes all its tensors at once."""

    config: DraftConfig

    def check(self, shapes: Mapping[str, Shape]) -> None:
        unknown = unknown_names(shapes, self.config)
        if unknown:
            raise ValueError(f"the draft has no tensor {unknown[0]}: for the target, give the selector 'target'")
        check_tensors(shapes, self.config, source="of this update")

    def check_direct(self, shapes: Mapping[str, Shape]) -> None:
        raise ValueError("load_format is 'direct', which a draft's derived weights cannot follow: leave it out")


def shapes_of(named_tensors: Any) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors}


def _refusal(error: OSError | ValueError) -> str:
    return f"The update is refused, and the old weights are served on: {str(error).rstrip('.')}."
