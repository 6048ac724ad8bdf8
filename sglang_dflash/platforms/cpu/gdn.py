"""Gated delta nets in plain torch: the linear layers of Qwen3-Next and Qwen3.5, over prompts, tokens, chains and trees.

Of a request such a layer keeps its last inputs, which a short convolution reads, and a state: a matrix [value, key] a
head that each token decays, corrects and is answered from. A window of tokens is read from where the request stands,
each token behind its own path; what it leaves is kept until it is known which path is taken, and only then written.

A prompt is read as windows of CHUNK tokens, a decoded token as a window of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.plugins.hook_registry import HookType
from torch import Tensor
from torch.nn import functional as F

from sglang_dflash.kernels.tree import parents_of

CHUNK = 64  # tokens; also the grid of the states that SGLang's prefix cache keeps

# Of windows, what a layer is given: inputs [windows, w, channels] of the convolution; a, b [windows, w, heads], which
# come to decay and correction.
Tokens = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Paths:
    """Who is on whose path in windows of w tokens.

    seen [b, w, w] bool: token j is token i or before it on its path; a token's path precedes it. lines [b, w, K] int64:
    the last K inputs of each path, the token's own the last, as rows of the K - 1 kept from before and the window's.
    """

    seen: Tensor
    lines: Tensor

    @classmethod
    def of(cls, seen: Tensor, kernel: int) -> Paths:
        b, w, _ = seen.shape
        index, kept = torch.arange(w), kernel - 1
        before = torch.cat([torch.arange(-1, kept - 1).expand(b, -1), parents_of(seen) + kept], 1)
        before[:, kept] = kept - 1  # the root comes behind what was kept
        line = [(index + kept).expand(b, -1)]
        for _ in range(kept):
            line.append(before.gather(1, line[-1]))
        return cls(seen, torch.stack(line[::-1], -1))


@cache
def chain(w: int, kernel: int) -> Paths:
    """One window of w tokens, each behind all before it."""
    return Paths.of(torch.ones(1, w, w, dtype=torch.bool).tril(), kernel)


@dataclass(frozen=True)
class Read:
    """What a window of w tokens leaves behind at each of its tokens, in one layer.

    inputs [b, K - 1 + w, channels]: of the convolution, those kept from before first. keys [b, heads, w, key] and
    updates [b, heads, w, value]: token j adds their product to the state. decay [b, heads, w]: in logarithm, from
    before the window to the token.
    """

    paths: Paths
    inputs: Tensor
    keys: Tensor
    updates: Tensor
    decay: Tensor

    def after(self, nodes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [b, channels, K - 1] and state as they are behind one token of each window.

        nodes [b] int64; state [b, heads, value, key]: before the window.
        """
        rows = torch.arange(len(nodes))
        paths = self.paths.lines.expand(len(nodes), -1, -1)[rows, nodes, 1:]
        seen = self.paths.seen.expand(len(nodes), -1, -1)[rows, nodes][:, None]
        end = self.decay[rows, :, nodes][..., None]
        weights = torch.where(seen, end - self.decay, float("-inf")).exp()
        added = (self.updates * weights[..., None]).transpose(-1, -2) @ self.keys
        return self.inputs[rows[:, None], paths].transpose(1, 2), state.float() * end.exp()[..., None] + added


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers [b, heads, w, value] of the state behind each token; updates; decay from before the window on.

    q, k [b, heads, w, key], of length 1 but for q's scale; v [b, heads, w, value]; log_decay, beta [b, heads, w]; state
    [b, heads, value, key]; seen as in Paths. One token of it: S = a S' + u k^T, where u = beta (v - a S' k); with what
    tokens of its path have added written out, the u of a window solve one triangular system.
    """
    seen = seen[:, None]
    decay = (seen * log_decay[..., None, :]).sum(-1)
    between = torch.where(seen, decay[..., None] - decay[..., None, :], float("-inf")).exp()
    since = decay.exp()[..., None]
    old = since * (k @ state.transpose(-1, -2))
    system = beta[..., None] * between * (k @ k.transpose(-1, -2))
    updates = torch.linalg.solve_triangular(system, beta[..., None] * (v - old), upper=False, unitriangular=True)
    answers = since * (q @ state.transpose(-1, -2)) + (between * (q @ k.transpose(-1, -2))) @ updates
    return answers, updates, decay


def read_windows(
    layer: Any, paths: Paths, tokens: Tokens, kept: Tensor, state: Tensor
) -> tuple[Tensor, Read]:
    """One layer over windows of tokens: its answers [windows, w, heads, value], and what it leaves.

    layer: a RadixLinearAttention. kept [windows, channels, K - 1] and state [windows, heads, value, key]: where each
    begins.
    """
    inputs, a, b = tokens
    inputs = torch.cat([kept.transpose(1, 2).to(inputs.dtype), inputs], 1)
    rows = torch.arange(len(inputs))[:, None, None]
    mixed = (inputs[rows, paths.lines] * layer.conv_weights.t()).sum(-2)
    if layer.bias is not None:
        mixed = mixed + layer.bias
    q, k, v = F.silu(mixed).float().split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
    q, k, v = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, heads in ((q, layer.num_q_heads), (k, layer.num_k_heads), (v, layer.num_v_heads))
    )
    q, k = (_unit(x).repeat_interleave(layer.num_v_heads // x.shape[1], 1) for x in (q, k))
    log_decay = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())
    answers, updates, decay = delta_rule(
        q * layer.head_k_dim**-0.5, k, v, log_decay.transpose(1, 2), b.float().sigmoid().transpose(1, 2),
        state.float(), paths.seen,
    )  # fmt: skip
    return answers.transpose(1, 2).to(inputs.dtype), Read(paths, inputs, k, updates, decay)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class GatedDeltaNets(MambaAttnBackendBase):
    """SGLang's backend of linear layers, beside whatever serves the others.

    A window pass (TARGET_VERIFY) leaves inputs and states as they are; `commit` writes them at the tokens accepted.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.conv_states_shape = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0].shape
        self._kernel = self.conv_states_shape[-1] + 1
        self._windows: Paths
        self._read: dict[int, Read] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._read.clear()
        if forward_batch.forward_mode.is_target_verify():
            self._windows = Paths.of(forward_batch.spec_info.window_mask, self._kernel)

    def forward_decode(
        self, layer: Any, forward_batch: Any, mixed_qkv: Tensor, a: Tensor, b: Tensor, **unused: Any
    ) -> Tensor:
        slots, kept, states = self._pools(layer)
        one = mixed_qkv[:, None], a[:, None], b[:, None]
        answers, read = read_windows(layer, chain(1, self._kernel), one, kept[slots], states[slots])
        _write(kept, states, slots, read.after(torch.zeros_like(slots), states[slots]))
        if forward_batch.mamba_track_mask is not None:
            rows = forward_batch.mamba_track_mask.nonzero()[:, 0]
            to = self.forward_metadata.mamba_track_indices[rows]
            kept[to], states[to] = kept[slots[rows]], states[slots[rows]]
        return answers.transpose(0, 1)

    def forward_extend(
        self, layer: Any, forward_batch: Any, mixed_qkv: Tensor, a: Tensor, b: Tensor, **unused: Any
    ) -> Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            return self._prompts(layer, forward_batch, mixed_qkv, a, b)
        slots, kept, states = self._pools(layer)
        shape = len(slots), -1
        windows = mixed_qkv.unflatten(0, shape), a.unflatten(0, shape), b.unflatten(0, shape)
        answers, read = read_windows(layer, self._windows, windows, kept[slots], states[slots])
        self._read[layer.layer_id] = read
        return answers.flatten(0, 1)[None]

    def _prompts(self, layer: Any, forward_batch: Any, mixed_qkv: Tensor, a: Tensor, b: Tensor) -> Tensor:
        slots, kept, states = self._pools(layer)
        starts, tracked = self.forward_metadata.query_start_loc.tolist(), self.forward_metadata.has_mamba_track_mask
        if tracked:
            inputs = mixed_qkv[self.forward_metadata.track_conv_indices].transpose(1, 2)
            kept[forward_batch.mamba_track_indices[forward_batch.mamba_track_mask]] = inputs.to(kept.dtype)
            chunks, at_chunk = self.forward_metadata.track_chunk_idx.tolist(), torch.zeros_like(states[slots])
        answers = []
        for i, (start, end) in enumerate(pairwise(starts)):
            slot = slots[i : i + 1]
            for chunk, first in enumerate(range(start, end, CHUNK)):
                if tracked and chunks[i] == chunk:
                    at_chunk[i] = states[slot[0]]
                rows = slice(first, min(first + CHUNK, end))
                paths = chain(rows.stop - first, self._kernel)
                window = mixed_qkv[None, rows], a[None, rows], b[None, rows]
                out, read = read_windows(layer, paths, window, kept[slot], states[slot])
                _write(kept, states, slot, read.after(torch.tensor([rows.stop - first - 1]), states[slot]))
                answers.append(out[0])
        if tracked:
            self._track_mamba_state_extend(
                forward_batch, None, states, self.forward_metadata, h_track_buf=at_chunk
            )
        return torch.cat(answers)[None]

    def commit(self, nodes: Tensor, tracked: Tensor | None, track_nodes: Tensor | None) -> None:
        """Write what the last window pass left at nodes [bs] of its windows.

        tracked [bs]: slots that keep what it left at track_nodes [bs] for the prefix cache, where neither is negative.
        """
        for layer_id, read in self._read.items():
            cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
            kept, states = cache.conv[0], cache.temporal
            slots = self.forward_metadata.mamba_cache_indices.to(torch.int64)
            before = states[slots]
            if tracked is not None and track_nodes is not None:
                rows = ((track_nodes >= 0) & (tracked >= 0)).nonzero()[:, 0]
                inputs, after = read.after(track_nodes.clamp(min=0), before)
                _write(kept, states, tracked[rows], (inputs[rows], after[rows]))
            _write(kept, states, slots, read.after(nodes.to(torch.int64), before))

    def _pools(self, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Each request's slot [bs], and a layer's inputs [slots, channels, K - 1] and states by slot."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        return self.forward_metadata.mamba_cache_indices.to(torch.int64), cache.conv[0], cache.temporal


def _write(kept: Tensor, states: Tensor, slots: Tensor, after: tuple[Tensor, Tensor]) -> None:
    inputs, state = after
    kept[slots], states[slots] = inputs.to(kept.dtype), state.to(states.dtype)


def commit_states(
    hybrid: Any, last_correct_step_indices: Tensor, mamba_track_indices: Tensor | None,
    mamba_steps_to_track: Tensor | None, model: Any, req_pool_indices: Tensor | None = None,
) -> None:  # fmt: skip
    """In place of the scatter that follows SGLang's verify passes: there is nothing to scatter, but paths to follow."""
    hybrid.linear_attn_backend.commit(last_correct_step_indices, mamba_track_indices, mamba_steps_to_track)


# -- what the models around it have as Triton kernels ----------------------------------------------------------------


def split_by_kind(qkvz: Tensor, ba: Tensor, k_heads: int, v_heads: int, key: int, value: int) -> tuple[Tensor, ...]:
    """Qwen3.5's projections [tokens, all q, all k, all v, all z] and [tokens, all b, all a]: qkv; z by head; b; a."""
    qkv, z = qkvz.split([2 * k_heads * key + v_heads * value, v_heads * value], -1)
    b, a = ba.split(v_heads, -1)
    return qkv, z.unflatten(-1, (v_heads, value)), b, a


def split_by_head(qkvz: Tensor, ba: Tensor, k_heads: int, v_heads: int, key: int, value: int) -> tuple[Tensor, ...]:
    """The same of Qwen3-Next, which has a key head's q, k, v, z side by side, and its b and a."""
    group = v_heads // k_heads
    parts = qkvz.unflatten(-1, (k_heads, -1)).split([key, key, group * value, group * value], -1)
    q, k, v, z = (part.flatten(1) for part in parts)
    b, a = (part.flatten(1) for part in ba.unflatten(-1, (k_heads, -1)).split(group, -1))
    return torch.cat([q, k, v], -1), z.unflatten(-1, (v_heads, value)), b, a


def gate(x: Tensor, gates: Tensor, inplace: bool = False) -> Tensor:
    """Attention's output x [tokens, heads * size], gated by gates of as many numbers."""
    return x * gates.reshape(x.shape).sigmoid()


def add_shared_expert(hidden: Tensor, weight: Tensor, shared: Tensor, experts: Tensor) -> None:
    """To experts [tokens, hidden], in place, what the shared expert says, gated by its weight [hidden]."""
    experts += (hidden @ weight).sigmoid()[:, None] * shared


def gated_norm(original: Callable[..., Tensor], norm: Any, x: Tensor, z: Tensor) -> Tensor:
    """Around the norm of a linear layer's answers, x [rows, value], each gated by its z afterwards."""
    activation = torch.sigmoid if norm.activation == "sigmoid" else F.silu
    normal = F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps)
    return (normal * activation(z.float())).to(x.dtype)


_OPS = "sglang.kernels.ops.attention"
_ELEMENTWISE = "sglang.kernels.ops.elementwise.elementwise"
_LINEAR = "sglang.srt.layers.attention"
HOOKS: dict[str, tuple[Any, HookType]] = {
    f"{_LINEAR}.linear.gdn_backend.GDNAttnBackend": (GatedDeltaNets, HookType.REPLACE),
    f"{_LINEAR}.hybrid_linear_attn_backend.HybridLinearAttnBackend.update_mamba_state_after_mtp_verify":
        (commit_states, HookType.REPLACE),
    f"{_OPS}.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous": (split_by_kind, HookType.REPLACE),
    f"{_OPS}.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": (split_by_head, HookType.REPLACE),
    f"{_ELEMENTWISE}.fused_sigmoid_mul": (gate, HookType.REPLACE),
    f"{_ELEMENTWISE}.fused_gate_sigmoid_mul_add": (add_shared_expert, HookType.REPLACE),
    f"{_OPS}.fla.layernorm_gated.RMSNorm.forward": (gated_norm, HookType.AROUND),
    f"{_OPS}.fla.fused_norm_gate.FusedRMSNormGated.forward": (gated_norm, HookType.AROUND),
}  # fmt: skip
