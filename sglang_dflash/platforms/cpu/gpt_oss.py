"""gpt-oss on a plain CPU: what SGLang has for it on other platforms alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.plugins.hook_registry import HookType
from torch import Tensor

from sglang_dflash.platforms import PLAIN_ATTENTION
from sglang_dflash.targets import GPT_OSS

_LISTED = "triton"  # an attention backend that SGLang takes to have sinks and windows


def settle_model(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around what SGLang settles by the model: of gpt-oss it takes backends of attention by a list that ours is not on,
    and gives its experts to Triton wherever that can be imported.
    """
    view = resolving_view(server_args)
    architectures = model_config_of(server_args).hf_config.architectures
    names = "attention_backend", "prefill_attention_backend", "decode_attention_backend"
    settled = {name: PLAIN_ATTENTION for name in names if getattr(view, name) == PLAIN_ATTENTION}
    if GPT_OSS not in architectures or not settled:
        return previous(server_args)
    experts = view.moe_runner_backend
    declare_resolution(server_args, "sglang_dflash", **dict.fromkeys(settled, _LISTED))
    previous(server_args)
    declare_resolution(server_args, "sglang_dflash", **settled, moe_runner_backend=experts)


def of_one_type(original: Callable[[Any, Any], Any], config: Any, asked: Any) -> Any:
    """Around the choice of a model's type: half of gpt-oss's layers are made of the type that its config names, which
    is not the one that a CPU serves it in.
    """
    dtype = original(config, asked)
    if getattr(config, "model_type", "") == "gpt_oss":
        config.dtype = dtype
    return dtype


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """What an expert makes of its first products [..., 2 * inner], gate and up in turns; SGLang's is for a compiler."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * (gate * alpha).sigmoid() * (up + 1)


# Before a model is known, and once it is loaded.
SETTLED: dict[str, tuple[Any, HookType]] = {
    "sglang.srt.configs.model_config._get_and_verify_dtype": (of_one_type, HookType.AROUND),
}
HOOKS: dict[str, tuple[Any, HookType]] = {
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.swiglu_gpt_oss_sigmoid_alpha":
        (clamped_swiglu, HookType.REPLACE),
}  # fmt: skip
