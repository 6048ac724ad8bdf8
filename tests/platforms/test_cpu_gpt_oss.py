"""gpt-oss on a plain CPU: its experts against transformers', and how its arguments are settled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.topk import StandardTopKOutput
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from sglang_dflash.platforms import PLAIN_ATTENTION
from sglang_dflash.platforms.cpu import gpt_oss

EXPERTS, HIDDEN, INNER, TOKENS = 5, 24, 16, 70


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_the_experts_are_transformers(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    torch.manual_seed(0)
    shape = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INNER}
    experts = GptOssExperts(GptOssConfig(**shape, swiglu_limit=limit))
    for weight in experts.parameters():
        weight.data.normal_()
    x, top = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS).topk(2)
    weights, chosen = top.values.softmax(-1), top.indices
    layer = SimpleNamespace(
        num_experts=EXPERTS,
        w13_weight=experts.gate_up_proj.data.transpose(1, 2), w13_weight_bias=experts.gate_up_proj_bias.data,
        w2_weight=experts.down_proj.data.transpose(1, 2), w2_weight_bias=experts.down_proj_bias.data,
    )  # fmt: skip
    config = SimpleNamespace(
        apply_router_weight_on_input=False, activation="silu", gemm1_alpha=1.702, gemm1_clamp_limit=limit
    )
    (target, (ours, _)) = next(iter(gpt_oss.HOOKS.items()))
    monkeypatch.setattr(fused_moe_native, target.rpartition(".")[2], ours)
    got = fused_moe_native.moe_forward_native(layer, x, StandardTopKOutput(weights, chosen, x), config)
    with torch.no_grad():
        torch.testing.assert_close(got, experts(x, chosen, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "named"), [("gpt_oss", torch.float32), ("llama", torch.bfloat16)])
def test_its_config_names_the_type_that_it_is_served_in(family: str, named: torch.dtype) -> None:
    """SGLang makes some of its layers by that; a checkpoint in 16 bits is served in 32."""
    config = SimpleNamespace(model_type=family, dtype=torch.bfloat16)
    ((_, (hook, _)),) = gpt_oss.SETTLED.items()
    assert hook(lambda *given: torch.float32, config, "float32") == torch.float32
    assert config.dtype == named


@pytest.mark.parametrize(
    ("architecture", "backend", "seen"),
    [
        ("GptOssForCausalLM", PLAIN_ATTENTION, "triton"),
        ("GptOssForCausalLM", "torch_native", "torch_native"),  # which has no sinks, as SGLang says
        ("LlamaForCausalLM", PLAIN_ATTENTION, PLAIN_ATTENTION),
    ],
)
def test_where_sglang_lists_backends_with_sinks_ours_goes_by_another_name(
    monkeypatch: pytest.MonkeyPatch, architecture: str, backend: str, seen: str
) -> None:
    """And experts stay where they are, though triton_kernels can be imported."""
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    monkeypatch.setattr(gpt_oss, "model_config_of", lambda args: model)
    args = SimpleNamespace(
        attention_backend=backend, prefill_attention_backend=None, decode_attention_backend=backend,
        moe_runner_backend="auto",
    )  # fmt: skip
    told: list[Any] = []

    def previous(server_args: Any) -> None:
        view = resolving_view(server_args)
        told.append((view.attention_backend, view.prefill_attention_backend, view.decode_attention_backend))
        declare_resolution(server_args, "SGLang", moe_runner_backend="triton_kernel")

    gpt_oss.settle_model(args, previous)
    view = resolving_view(args)
    assert told == [(seen, None, seen)]
    assert (view.attention_backend, view.decode_attention_backend) == (backend, backend)
    assert view.moe_runner_backend == ("auto" if seen == "triton" else "triton_kernel")
