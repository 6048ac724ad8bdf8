"""The draft network of DFlash (arXiv 2602.06036), DFlash2 and causal drafts, from SGLang's layers.

The context of a draft is not its own past: each of its layers reads keys and values made from the target's
features. `write_context` makes them for committed tokens; `forward` runs one block behind them, as a window
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn

from sglang_dflash import kernels
from sglang_dflash.draft.checkpoint import check_shapes, expected_shapes, own_name
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.draft.selector import make_selector
from sglang_dflash.kernels import Pools

# Checkpoint tensors that SGLang's layers keep side by side in one weight: ours, its shard.
_STACKED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class Attention(nn.Module):
    """Attention of one layer over the context and the window."""

    def __init__(self, config: DraftConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_heads,
            config.num_kv_heads,
            bias=config.attention_bias,
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        )
        self.q_norm: RMSNorm | None = RMSNorm(config.head_dim, eps=config.rms_eps)
        self.k_norm: RMSNorm | None = RMSNorm(config.head_dim, eps=config.rms_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            rotary_dim=config.head_dim,
            max_position=config.max_positions,
            base=config.rope_theta,
            rope_scaling=config.rope_scaling,
        )
        # This process's share of the heads under tensor parallelism.
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.q_size = self.qkv_proj.num_heads * config.head_dim
        self.kv_size = self.num_kv_heads * config.head_dim
        self.attn = RadixAttention(
            num_heads=self.qkv_proj.num_heads,
            head_dim=config.head_dim,
            scaling=config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer,
            sliding_window_size=config.window_left[layer],
            # A backend lets a DECODER layer see no window token after its own, whatever the pass's mask says.
            attn_type=AttentionType.DECODER if config.causal_layers[layer] else AttentionType.ENCODER_ONLY,
        )

    def forward(self, positions: Tensor, hidden: Tensor, forward_batch: Any) -> Tensor:
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v, forward_batch))[0]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = SiluAndMul()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden)[0]))[0]


class GroupedConv(nn.Module):
    """DFlash2's convolution along the block, around a sublayer: one kernel for its input, one for its output.

    A kernel is depthwise: tap t weighs the token t places before in the same block, never one after. To its
    base, the sublayer's input adds one coefficient a group of channels.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.taps, self.group_size = config.conv_taps, config.conv_group_size
        self.groups = config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.empty(2, self.taps, config.hidden_size))
        self.kernel_projection = ReplicatedLinear(config.hidden_size, 2 * self.taps * self.groups, bias=False)

    def kernels(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The input's and the output's kernel, each [T, taps, groups, channels of a group], from hidden [T,
        H].
        """
        delta = self.kernel_projection(hidden)[0].view(-1, 2, self.taps, self.groups, 1)
        kernel = self.base_kernel.view(2, self.taps, self.groups, self.group_size) + delta
        return kernel[:, 0], kernel[:, 1]

    def convolve(self, hidden: Tensor, kernel: Tensor, block: int) -> Tensor:
        """hidden [T, H], T a multiple of the tokens in a block. Returns [T, H]."""
        x = hidden.view(-1, block, self.groups, self.group_size)
        kernel = kernel.view(-1, block, *kernel.shape[1:])
        out = kernel[:, :, 0] * x
        for tap in range(1, min(self.taps, block)):
            out[:, tap:] += kernel[:, tap:, tap] * x[:, :-tap]
        return out.view_as(hidden)


class Layer(nn.Module):
    """Pre-norm attention and MLP, each within a convolution where the checkpoint has one."""

    def __init__(self, config: DraftConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_eps)
        self.mlp = MLP(config)
        self.attention_conv = GroupedConv(config) if config.conv_taps else None
        self.mlp_conv = GroupedConv(config) if config.conv_taps else None

    def forward(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None, forward_batch: Any
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        block = forward_batch.spec_info.draft_token_num

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(positions, x, forward_batch)

        hidden = _within(self.attention_conv, attend, hidden, block)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return _within(self.mlp_conv, self.mlp, hidden, block), residual


def _within(
    conv: GroupedConv | None, sublayer: Callable[[Tensor], Tensor], hidden: Tensor, block: int
) -> Tensor:
    if conv is None:
        return sublayer(hidden)
    before, after = conv.kernels(hidden)
    return conv.convolve(sublayer(conv.convolve(hidden, before, block)), after, block)


class DFlashDraftModel(nn.Module):
    """A draft checkpoint as SGLang's model loader builds and fills it.

    config: the checkpoint's transformers config (or the dict of its config.json). Raises ValueError where it
    makes no network; `DraftConfig.check` asks the rest against the target, before anything is loaded.
    """

    draft_parallel_spec = DraftParallelSpec(tp_execution=DraftTPExecution.SINGLE_GROUP)

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        if quant_config is not None:
            raise ValueError(
                f"The draft was given quantisation {type(quant_config).__name__}, but quantised drafts are "
                "not served here: remove --speculative-draft-model-quantization."
            )
        self.config = config
        self.draft_config = c = DraftConfig.from_dict(
            config if isinstance(config, dict) else config.to_dict()
        )
        c.check_draft()
        self.fc = ReplicatedLinear(c.num_features * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, eps=c.rms_eps)
        self.layers = nn.ModuleList([Layer(c, i) for i in range(c.num_layers)])
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_eps)
        self.candidate_selector = make_selector(c)
        self._add_context_kv()
        self.requires_grad_(False)
        self.embed: Callable[[Tensor], Tensor]
        """The target's embedding, [T] int64 -> [T, H]; set once by who loads the draft. A function, not a
        module: the target's weights are no part of ours.
        """
        self.mask_embedding: Tensor | None = None
        """What stands for the mask token instead, [H]; set with it, where the checkpoint has one."""

    def get_attention_sliding_window_size(self) -> int | None:
        """Positions a sliding layer sees before its own, None without such layers. SGLang asks."""
        widest = max(self.draft_config.window_left)
        return widest if widest >= 0 else None

    def project_features(self, features: Tensor) -> Tensor:
        """Context rows [T, H] of the target's features [T, features * H]: its layers' outputs, side by side
        in `target_layer_ids` order.
        """
        return self.hidden_norm(self.fc(features)[0])

    def write_context(self, context: Tensor, positions: Tensor, slots: Tensor, pools: Pools) -> None:
        """Write every layer's keys and values of committed tokens into the draft's KV pool.

        context [T, H] from `project_features`; positions and slots [T] int64; pools: of all layers' keys, then values.
        A row for slot 0, SGLang's sink, may be dropped. The context passes no convolution: only a block does.
        """
        attention = self.layers[0].self_attn
        kv = self.context_kv(context)[0]
        kernels.write_context(
            kv.view(-1, 2, len(self.layers), attention.num_kv_heads, attention.head_dim),
            self.context_k_norm if attention.k_norm is not None else None,
            attention.rotary_emb.cos_sin_cache,  # SGLang may have made it longer since it was loaded
            positions,
            slots,
            pools,
            self.draft_config.rms_eps,
        )

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> LogitsProcessorOutput:
        """One block a request, as a window pass of w = forward_batch.spec_info.draft_token_num tokens.

        input_ids [bs * w] int64: the bonus token and the masks, looked up in the target's embedding, as a
        draft has none of its own, but for the mask's; positions [bs * w] int64. Returns hidden_states [bs * w, H]
        after the final norm, for the target's head to read.
        """
        hidden, residual = self._embed(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, forward_batch)
        hidden, _ = self.norm(hidden, residual)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden)

    def _embed(self, input_ids: Tensor) -> Tensor:
        config, hidden = self.draft_config, self.embed(input_ids)
        if self.mask_embedding is not None:
            hidden = torch.where((input_ids == config.mask_token_id)[:, None], self.mask_embedding, hidden)
        return hidden if config.embedding_scale == 1 else hidden * config.embedding_scale

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the network. Raises ValueError naming a missing, unknown or misshaped tensor."""
        params = dict(self.named_parameters())
        expected = expected_shapes(self.draft_config)
        shapes = {}
        for raw_name, tensor in weights:
            name = own_name(raw_name)
            if name is None:
                continue
            if name not in expected:
                raise ValueError(f"Draft checkpoint: the network has no place for tensor {raw_name}.")
            shapes[name] = tuple(tensor.shape)
            if shapes[name] == expected[name]:
                self._load(params, name, tensor)
        check_shapes(shapes, self.draft_config, source=getattr(self.config, "_name_or_path", ""))
        if "layers.0.self_attn.q_norm.weight" not in shapes:
            for layer in self.layers:
                layer.self_attn.q_norm = layer.self_attn.k_norm = None
        self._fill_context_kv()

    @staticmethod
    def _load(params: dict[str, nn.Parameter], name: str, tensor: Tensor) -> None:
        parts = name.split(".")
        stacked, shard = _STACKED.get(parts[-2], (None, None))
        if stacked is None:
            param = params[name]
            getattr(param, "weight_loader", default_weight_loader)(param, tensor)
        else:
            param = params[".".join([*parts[:-2], stacked, parts[-1]])]
            param.weight_loader(param, tensor, shard)

    def _add_context_kv(self) -> None:
        """One product for all layers' context keys and values: rows of their qkv weights, all keys first."""
        c, kv_size = self.draft_config, self.layers[0].self_attn.kv_size
        self.context_kv = ReplicatedLinear(c.hidden_size, 2 * c.num_layers * kv_size, bias=c.attention_bias)
        self.register_buffer("context_k_norm", torch.empty(c.num_layers, 1, c.head_dim), persistent=False)

    def _fill_context_kv(self) -> None:
        attention = [layer.self_attn for layer in self.layers]
        for name in ("weight", "bias") if self.draft_config.attention_bias else ("weight",):
            qkv = [getattr(a.qkv_proj, name) for a in attention]
            kv = [w.split([a.q_size, a.kv_size, a.kv_size])[1:] for w, a in zip(qkv, attention, strict=True)]
            getattr(self.context_kv, name).copy_(torch.cat([k for k, _ in kv] + [v for _, v in kv]))
        if attention[0].k_norm is not None:
            self.context_k_norm.copy_(torch.stack([a.k_norm.weight for a in attention])[:, None])


class DFlash2DraftModel(DFlashDraftModel):
    """The same, under the name of checkpoints with free codebooks."""


class DFlash2BeamDraftModel(DFlashDraftModel):
    """The same, under the name some DFlash2 checkpoints give."""


EntryClass = [DFlashDraftModel, DFlash2DraftModel, DFlash2BeamDraftModel]
