"""A draft's forward pass written a second time, in plain torch, one request and one token at a time where
that is plainer. It reads checkpoint tensors by name and config.json's own keys, and shares nothing with the
package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

State = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def rope(x: Tensor, positions: Tensor, raw: dict[str, Any]) -> Tensor:
    """x [T, heads, head_dim]."""
    dim = x.shape[-1]
    inv_freq = 1.0 / raw["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    if raw.get("rope_scaling"):
        parameters = {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}
        config = Qwen3Config(head_dim=dim, rope_parameters=parameters)
        inv_freq, _ = ROPE_INIT_FUNCTIONS[raw["rope_scaling"]["rope_type"]](config, "cpu")
    angle = (positions[:, None].float() * inv_freq)[:, None]
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], dim=-1)


def convolve(x: Tensor, source: Tensor, state: State, name: str, side: int, raw: dict[str, Any]) -> Tensor:
    """x [w, H], source [w, H]: the sublayer's input, which the coefficients come from. Token by token."""
    taps, size = raw["dflash_config"]["conv_kernel_size"], raw["dflash_config"]["conv_group_size"]
    groups = x.shape[1] // size
    delta = linear(source, state[f"{name}.kernel_projection.weight"]).view(len(x), 2, taps, groups)
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for tap in range(min(taps, i + 1)):
            base = state[f"{name}.base_kernel"][side, tap]
            out[i] += (base + delta[i, side, tap].repeat_interleave(size)) * x[i - tap]
    return out


class Reference:
    """One checkpoint: its tensors and config.json."""

    def __init__(self, raw: dict[str, Any], state: State) -> None:
        self.raw, self.state, self.eps = raw, state, raw["rms_norm_eps"]

    def context(self, features: Tensor) -> Tensor:
        return rms(linear(features, self.state["fc.weight"]), self.state["hidden_norm.weight"], self.eps)

    def heads(self, layer: int, kind: str, x: Tensor, positions: Tensor) -> Tensor:
        """Queries, keys or values of x [T, H] as [T, heads, head_dim]."""
        name = f"layers.{layer}.self_attn.{kind}"
        out = linear(x, self.state[f"{name}_proj.weight"], self.state.get(f"{name}_proj.bias"))
        out = out.view(len(x), -1, self.raw["head_dim"])
        if kind == "v":
            return out
        if f"{name}_norm.weight" in self.state:
            out = rms(out, self.state[f"{name}_norm.weight"], self.eps)
        return rope(out, positions, self.raw)

    def seen(self, layer: int, positions: Tensor, context: int) -> Tensor:
        """[w, context + w]; positions of the context's tokens, then of the block's."""
        w = len(positions) - context
        block = torch.ones(w, w, dtype=torch.bool)
        if self.raw["expected_causal"][layer]:
            block = block.tril()
        seen = torch.cat([torch.ones(w, context, dtype=torch.bool), block], dim=1)
        if self.raw.get("layer_types", ["full_attention"] * 9)[layer] == "sliding_attention":
            distance = positions[context:, None] - positions[None]
            seen &= distance.abs() < self.raw["sliding_window"]
        return seen

    def forward(self, context: Tensor, block: Tensor) -> Tensor:
        """context [C, H] from `context`, block [w, H] embedded tokens. Returns [w, H]."""
        c, state = len(context), self.state
        positions = torch.arange(c + len(block))
        groups = self.raw["num_attention_heads"] // self.raw["num_key_value_heads"]
        x = block
        for i in range(self.raw["num_hidden_layers"]):
            name = f"layers.{i}"
            h = source = rms(x, state[f"{name}.input_layernorm.weight"], self.eps)
            conv = f"{name}.attention_conv.base_kernel" in state
            if conv:
                h = convolve(h, source, state, f"{name}.attention_conv", 0, self.raw)
            q = self.heads(i, "q", h, positions[c:])
            k = torch.cat([self.heads(i, "k", context, positions[:c]), self.heads(i, "k", h, positions[c:])])
            v = torch.cat([self.heads(i, "v", context, positions[:c]), self.heads(i, "v", h, positions[c:])])
            out = scaled_dot_product_attention(
                q.transpose(0, 1),
                k.repeat_interleave(groups, dim=1).transpose(0, 1),
                v.repeat_interleave(groups, dim=1).transpose(0, 1),
                attn_mask=self.seen(i, positions, c),
            )
            out = out.transpose(0, 1).reshape(len(block), -1)
            o_proj = f"{name}.self_attn.o_proj"
            out = linear(out, state[f"{o_proj}.weight"], state.get(f"{o_proj}.bias"))
            if conv:
                out = convolve(out, source, state, f"{name}.attention_conv", 1, self.raw)
            x = x + out
            h = source = rms(x, state[f"{name}.post_attention_layernorm.weight"], self.eps)
            if conv:
                h = convolve(h, source, state, f"{name}.mlp_conv", 0, self.raw)
            gate, up = (linear(h, state[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
            out = linear(silu(gate) * up, state[f"{name}.mlp.down_proj.weight"])
            if conv:
                out = convolve(out, source, state, f"{name}.mlp_conv", 1, self.raw)
            x = x + out
        return rms(x, state["norm.weight"], self.eps)

    def lattice(
        self, hidden: Tensor, bonus: int, embedding: Tensor, head: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """hidden [d, H] at the masks. Returns tokens [d, k] and log-probabilities [d, k, k], or [d, 1, k]
        without a selector.
        """
        dflash = self.raw["dflash_config"]
        logits = hidden @ head.T * dflash.get("output_multiplier", 1.0)
        cap = dflash.get("final_logit_softcapping")
        if cap:
            logits = cap * torch.tanh(logits / cap)
        full = logits.log_softmax(-1)
        _, tokens = full.topk(k, dim=-1)
        if "candidate_selector.hidden_projection.weight" not in self.state:
            return tokens, full.gather(1, tokens)[:, None]
        logp = torch.empty(len(hidden), k, k)
        for i, h in enumerate(hidden):
            candidates, share = tokens[i], full[i, tokens[i]].exp().sum().log()
            for row, predecessor in enumerate([bonus] * k if i == 0 else tokens[i - 1].tolist()):
                a, b = self.codes(predecessor, candidates, embedding, head)
                state = linear(h, self.state["candidate_selector.hidden_projection.weight"])
                logp[i, row] = (logits[i, candidates] + b @ (a * state)).log_softmax(-1) + share
        return tokens, logp

    def codes(
        self, predecessor: int, candidates: Tensor, embedding: Tensor, head: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The predecessor's code [r] and the candidates' [k, r]."""
        name = "candidate_selector"
        if f"{name}.predecessor_codebook" in self.state:
            codebooks = (self.state[f"{name}.{side}_codebook"] for side in ("predecessor", "successor"))
            before, after = codebooks
            return before[predecessor], after[candidates]
        before = linear(embedding[predecessor], self.state[f"{name}.predecessor_projection.weight"])
        after = linear(head[candidates], self.state[f"{name}.successor_projection.weight"])
        return rms(before, None, self.raw["dflash_config"].get("selector_eps", 1e-6)), after
