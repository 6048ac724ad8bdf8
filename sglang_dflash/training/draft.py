"""The draft network as it is trained: DFlash (arXiv 2602.06036), many blocks of a row at once.

Tensor names are those of published DFlash checkpoints, so that what is saved here is what a server loads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from sglang_dflash.training.attention import attend
from sglang_dflash.training.target import Target, apply_rope, head_dim, rms_norm


@dataclass(frozen=True)
class DraftShape:
    """What is chosen of a draft; the rest follows from its target.

    selector: "none", "tied" (to the target's embedding and head) or "free" (DFlash2's codebooks). mask_token: id of
    the token that stands for a position to be drafted. window: how many of the committed tokens, the last ones, a block
    sees; 0: all.
    """

    layers: int = 3
    features: tuple[int, ...] = (1, 14, 27)
    block: int = 16
    intermediate: int = 1536
    causal: bool = True
    selector: str = "tied"
    rank: int = 128
    candidates: int = 16
    mask_token: int = 0
    eps: float = 1e-6
    window: int = 0


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class DraftAttention(nn.Module):
    def __init__(self, config: dict, eps: float) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], head_dim(config)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = linear(hidden, heads * self.head_dim)
        self.k_proj = linear(hidden, kv_heads * self.head_dim)
        self.v_proj = linear(hidden, kv_heads * self.head_dim)
        self.o_proj = linear(heads * self.head_dim, hidden)
        self.q_norm, self.k_norm = Norm(self.head_dim, eps), Norm(self.head_dim, eps)

    def forward(self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor], mask: BlockMask) -> Tensor:
        both = torch.cat([context, x], dim=1)
        q, k, v = (
            f(y).unflatten(-1, (-1, self.head_dim))
            for f, y in ((self.q_proj, x), (self.k_proj, both), (self.v_proj, both))
        )
        cos, sin = rotation
        queries = slice(context.shape[1], None)
        q = apply_rope(self.q_norm(q), cos[:, queries], sin[:, queries])
        k = apply_rope(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v.to(q.dtype), mask).flatten(-2))


class DraftMLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, intermediate), linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    def __init__(self, config: dict, shape: DraftShape) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.self_attn = DraftAttention(config, shape.eps)
        self.mlp = DraftMLP(hidden, shape.intermediate)
        self.input_layernorm = Norm(hidden, shape.eps)
        self.post_attention_layernorm = Norm(hidden, shape.eps)

    def forward(self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor], mask: BlockMask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TiedSelector(nn.Module):
    """Transition scores <A[p] * (G h), B[c]> with A = rmsnorm(E P^T), B = W S^T tied to embedding E and head W."""

    def __init__(self, hidden: int, rank: int, eps: float) -> None:
        super().__init__()
        self.predecessor_projection = linear(hidden, rank)
        self.hidden_projection = linear(hidden, rank)
        self.successor_projection = linear(hidden, rank)
        self.eps = eps
        for layer in (self.predecessor_projection, self.hidden_projection):
            nn.init.normal_(layer.weight, std=hidden**-0.5)
        nn.init.zeros_(self.successor_projection.weight)

    def conditional(self, h: Tensor, predecessor: Tensor, target: Target) -> Tensor:
        """The hidden state whose head product is the conditional logits. h [N, hidden], predecessor [N] ids."""
        a = rms_norm(self.predecessor_projection(F.embedding(predecessor, target.embedding)), None, self.eps)
        return h + F.linear(a * self.hidden_projection(h), self.successor_projection.weight.T)

    def codebooks(self, target: Target) -> tuple[Tensor, Tensor]:
        """A, B [vocab, rank]."""
        a = rms_norm(F.linear(target.embedding.float(), self.predecessor_projection.weight), None, self.eps)
        return a, F.linear(target.head.float(), self.successor_projection.weight)


class FreeSelector(nn.Module):
    """DFlash2's selector: the same scores from two free codebooks."""

    def __init__(self, hidden: int, vocab: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.randn(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab, rank))
        self.hidden_projection = linear(hidden, rank)
        nn.init.normal_(self.hidden_projection.weight, std=hidden**-0.5)

    def codebooks(self, target: Target) -> tuple[Tensor, Tensor]:
        return self.predecessor_codebook, self.successor_codebook


class Draft(nn.Module):
    """The trainable draft: float32 parameters, run under bf16 autocast."""

    candidate_selector: TiedSelector | FreeSelector | None

    def __init__(self, shape: DraftShape, target_config: dict) -> None:
        super().__init__()
        self.shape, self.target_config = shape, target_config
        hidden = target_config["hidden_size"]
        self.fc = linear(len(shape.features) * hidden, hidden)
        self.hidden_norm = Norm(hidden, shape.eps)
        self.layers = nn.ModuleList(DraftLayer(target_config, shape) for _ in range(shape.layers))
        self.norm = Norm(hidden, shape.eps)
        self.candidate_selector = {
            "none": lambda: None,
            "tied": lambda: TiedSelector(hidden, shape.rank, shape.eps),
            "free": lambda: FreeSelector(hidden, target_config["vocab_size"], shape.rank),
        }[shape.selector]()

    @torch.no_grad()
    def start_from(self, target: Target) -> None:
        """Copy what a layer of the target can lend: MLP, v, o and norms, layers spread over the target's depth."""
        if self.shape.intermediate != self.target_config["intermediate_size"]:
            return
        last, kv = len(target.layers) - 1, self.layers[0].self_attn.v_proj.out_features
        for i, layer in enumerate(self.layers):
            source = target.layers[
                round(i * last / max(len(self.layers) - 1, 1)) if len(self.layers) > 1 else last // 2
            ]
            gate, up = source.gate_up.chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(source.down)
            layer.self_attn.v_proj.weight.copy_(source.qkv[-kv:])
            layer.self_attn.o_proj.weight.copy_(source.o)
            layer.input_layernorm.weight.copy_(source.norm1)
            layer.post_attention_layernorm.weight.copy_(source.norm2)
        self.norm.weight.copy_(target.norm)

    def forward(self, blocks: Tensor, features: Tensor, rotation: tuple[Tensor, Tensor], mask: BlockMask) -> Tensor:
        """Hidden states of every block token, after the final norm: [B, Q, hidden].

        blocks [B, Q, hidden]: embeddings of `bonus, MASK, MASK, ...` block after block. features [B, T, F * hidden]
        of the target. rotation: cos, sin [B, T + Q, head_dim / 2] of the positions of both.
        """
        context, x = self.hidden_norm(self.fc(features)), blocks
        for layer in self.layers:
            x = layer(x, context, rotation, mask)
        return self.norm(x)


def config_json(shape: DraftShape, target_config: dict) -> dict:
    """config.json of a draft checkpoint, as servers read it."""
    kept = ["hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "vocab_size"]
    kept += ["rope_theta", "rope_parameters"]
    dflash: dict = {"mask_token_id": shape.mask_token, "target_layer_ids": list(shape.features)}
    if shape.causal:
        dflash["causal_head"] = True
    if shape.window:
        dflash["draft_window"] = shape.window
    if shape.selector != "none":
        dflash |= {"selector_rank": shape.rank, "selector_top_k": shape.candidates}
    if shape.selector == "tied":
        dflash |= {"selector_tied": True, "selector_eps": shape.eps}
    return {
        "architectures": ["DFlash2DraftModel" if shape.selector == "free" else "DFlashDraftModel"],
        "model_type": "qwen3",
        **{k: target_config[k] for k in kept if k in target_config},
        "head_dim": head_dim(target_config),
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "bfloat16",
        "block_size": shape.block,
        "num_target_layers": target_config["num_hidden_layers"],
        "dflash_config": dflash,
        "use_sliding_window": False,
        "max_window_layers": shape.layers,
        "layer_types": ["full_attention"] * shape.layers,
    }


def shape_of(config: dict) -> DraftShape:
    """The DraftShape that config_json wrote down."""
    dflash = config["dflash_config"]
    rank = dflash.get("selector_rank", 0)
    return DraftShape(
        layers=config["num_hidden_layers"],
        features=tuple(dflash["target_layer_ids"]),
        block=config["block_size"],
        intermediate=config["intermediate_size"],
        causal=dflash.get("causal_head", False),
        selector="none" if not rank else "tied" if dflash.get("selector_tied") else "free",
        rank=rank or DraftShape.rank,
        candidates=dflash.get("selector_top_k", DraftShape.candidates),
        mask_token=dflash["mask_token_id"],
        eps=config["rms_norm_eps"],
        window=dflash.get("draft_window", 0),
    )


def save(draft: Draft, weights: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `weights` (the draft's own or their moving average) as a checkpoint directory a server loads."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = config_json(draft.shape, draft.target_config) | {"dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(path: Path, target_config: dict) -> Draft:
    """Read a checkpoint directory back, float32. Raises RuntimeError naming tensors that are missing or misshapen."""
    draft = Draft(shape_of(json.loads((path / "config.json").read_text())), target_config)
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    draft.load_state_dict({k: v.float() for k, v in weights.items()})
    return draft


def describe(shape: DraftShape) -> str:
    return ", ".join(f"{k}={v}" for k, v in asdict(shape).items())
