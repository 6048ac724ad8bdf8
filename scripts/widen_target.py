"""Give a small target and its draft a large model's cost, and keep what they compute.

    python scripts/widen_target.py TARGET DRAFT OUT_TARGET OUT_DRAFT

A drafter is worth what it accepts on real text, at what it costs beside a target of the size that is served. This makes
both out of the embedded pair, without a download: checkpoints of Llama-3.1-8B's shape (the vocabulary aside) that give
the text, the features and the lattices of the small ones. It needs torch, safetensors, typer and rich alone.

- A hidden vector holds the original's H entries first, then W - H zeros. An RMSNorm takes its mean over W, so its
  weight is scaled by sqrt(H/W) and its eps by H/W: what leaves it is the original's, number for number. Embedding, head
  and selector therefore meet vectors of the original scale.
- A rotary pair (i, i + d/2) of a d-dim head turns by theta^(-2i/d) a position; in D dims the pair (mi, mi + D/2) does,
  m = D/d. Queries are scaled by sqrt(D/d), for scores are divided by sqrt(D).
- Where queries and keys have an RMSNorm of their own, d of D entries are not zero: both norms' weights are scaled by
  sqrt(d/D), the queries' by sqrt(D/d) as well. The config has one eps for all norms, right for vectors of W entries. It
  would be right for heads if q_proj and k_proj were scaled by sqrt((H/W)(D/d)); the nearest power of two rounds no
  weight, and the eps that acts is the original's times 1.125 (Llama-3.1-8B's shape; 0.5 to 2 for any).
- Query head j of KV group g becomes query head j of group g in the wider groups.
- Added heads, MLP rows and layers read through random weights, as a GPU's clock depends on the bits that toggle, and
  write through zeros. Added layers come last: those that `target_layer_ids` names keep their numbers.

In float32 the results are equal but for rounding. In bfloat16 the scaled weights (norms; q_proj, or k_norm) are rounded
once more, by up to 2^-9 of each: the text is as real, and parts from the original's at near-ties.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

TARGETS = ("LlamaForCausalLM", "Qwen3ForCausalLM")
DRAFTS = ("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel")
# The others' frequencies are not a function of the original frequency alone, so pairs could not keep theirs.
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BESIDE_THE_WEIGHTS = (
    "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip
OPTIONAL = ("embed_tokens.weight", "lm_head.weight")  # the target has either or both, a draft perhaps copies
SHARD_BYTES = 4 * 10**9
RANDOM_STD = 0.02  # as Llama's own initialisation
console = Console(stderr=True, soft_wrap=True)


@dataclass(frozen=True)
class Widths:
    """What is widened of a target or a draft."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        return cls(hidden, heads, kv_heads, config.get("head_dim") or hidden // heads, config["intermediate_size"])

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def as_config(self) -> dict[str, int]:
        return {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
        }


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory's config and tensors, these by name without a leading `model.`"""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    """Name without a leading `model.` -> name in the files."""

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        files = sorted(path.glob("*.safetensors"))
        if not files or not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json with .safetensors files: give a checkpoint directory.")
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        names = {name.removeprefix("model."): name for name in state if not name.endswith("rotary_emb.inv_freq")}
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return cls(path, config, {name: state[there] for name, there in names.items()}, names)

    @property
    def has_qk_norm(self) -> bool:
        return "layers.0.self_attn.q_norm.weight" in self.tensors


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor: where the original's entries go among `size`."""

    index: Tensor
    size: int
    zeroed: Tensor | None = None
    """Rows that are zero where the original has no entry: the further dims of its heads."""


@dataclass(frozen=True)
class Rule:
    """How tensors of one kind are widened: the axis of each dimension ("": as it is), what is put around the
    original, and by what it is scaled.
    """

    axes: tuple[str, ...]
    padding: Literal["random", "zeros", "ones"] = "zeros"
    scale: float = 1.0


@dataclass(frozen=True)
class Part:
    """One tensor to write; original None: of an added layer."""

    rule: Rule
    axes: tuple[Axis, ...]
    original: Tensor | None

    @property
    def shape(self) -> list[int]:
        return [axis.size for axis in self.axes]


def model_axes(checkpoint: Checkpoint, new: Widths) -> dict[str, Axis]:
    """The axes by name that targets and drafts share."""
    old = Widths.of(checkpoint.config)
    half = torch.arange(old.head_dim // 2) * (new.head_dim // old.head_dim)
    dims = torch.cat([half, half + new.head_dim // 2])
    head = torch.arange(old.heads)
    return {
        "hidden": Axis(torch.arange(old.hidden), new.hidden),
        "mlp": Axis(torch.arange(old.mlp), new.mlp),
        "head": Axis(dims, new.head_dim),
        "query": _head_axis(head // old.group * new.group + head % old.group, new.heads, dims, new.head_dim),
        "kv": _head_axis(torch.arange(old.kv_heads), new.kv_heads, dims, new.head_dim),
    }


def _head_axis(heads: Tensor, count: int, dims: Tensor, head_dim: int) -> Axis:
    """heads: the new number of each original head; dims: the new place of each of its entries."""
    first = heads[:, None] * head_dim
    return Axis((first + dims).flatten(), count * head_dim, (first + torch.arange(head_dim)).flatten())


def draft_axes(draft: Checkpoint, new: Widths) -> dict[str, Axis]:
    """A draft's: those of fc (target layers' features side by side) and of the convolutions' coefficients too."""
    old, dflash, made = Widths.of(draft.config), draft.config["dflash_config"], model_axes(draft, new)
    feature = torch.arange(len(dflash["target_layer_ids"]))[:, None] * new.hidden
    made["features"] = Axis((feature + torch.arange(old.hidden)).flatten(), len(feature) * new.hidden)
    if taps := dflash.get("conv_kernel_size"):
        size = dflash["conv_group_size"]  # channels that share a coefficient
        kernel = torch.arange(2 * taps)[:, None] * (new.hidden // size)
        made["kernel"] = Axis((kernel + torch.arange(old.hidden // size)).flatten(), len(kernel) * (new.hidden // size))
    return made


def layer_rules(old: Widths, new: Widths, *, qk_norm: bool, bias: bool) -> dict[str, Rule]:
    norm, stretch = math.sqrt(old.hidden / new.hidden), math.sqrt(new.head_dim / old.head_dim)
    query, key = (stretch, 1.0) if not qk_norm else (2.0 ** round(math.log2(norm * stretch)),) * 2
    rules = {
        "input_layernorm.weight": Rule(("hidden",), "ones", norm),
        "self_attn.q_proj.weight": Rule(("query", "hidden"), "random", query),
        "self_attn.k_proj.weight": Rule(("kv", "hidden"), "random", key),
        "self_attn.v_proj.weight": Rule(("kv", "hidden"), "random"),
        "self_attn.o_proj.weight": Rule(("hidden", "query")),
        "post_attention_layernorm.weight": Rule(("hidden",), "ones", norm),
        "mlp.gate_proj.weight": Rule(("mlp", "hidden"), "random"),
        "mlp.up_proj.weight": Rule(("mlp", "hidden"), "random"),
        "mlp.down_proj.weight": Rule(("hidden", "mlp")),
    }
    if qk_norm:
        # A mean over D entries of which d are not zero, and for the queries the scores' sqrt(D) too.
        rules["self_attn.q_norm.weight"] = Rule(("head",), "ones")
        rules["self_attn.k_norm.weight"] = Rule(("head",), "ones", 1 / stretch)
    if bias:
        rules["self_attn.q_proj.bias"] = Rule(("query",), "zeros", query)
        rules["self_attn.k_proj.bias"] = Rule(("kv",), "zeros", key)
        rules["self_attn.v_proj.bias"] = Rule(("kv",))
        rules["self_attn.o_proj.bias"] = Rule(("hidden",))
    return rules


def model_rules(checkpoint: Checkpoint, new: Widths, layers: int) -> dict[str, Rule]:
    """The rules by tensor name that targets and drafts share, for that many layers."""
    old = Widths.of(checkpoint.config)
    bias = bool(checkpoint.config.get("attention_bias"))
    layer = layer_rules(old, new, qk_norm=checkpoint.has_qk_norm, bias=bias)
    rules = {name: Rule(("", "hidden")) for name in OPTIONAL}
    rules |= {f"layers.{i}.{name}": rule for i in range(layers) for name, rule in layer.items()}
    rules["norm.weight"] = Rule(("hidden",), "ones", math.sqrt(old.hidden / new.hidden))
    return rules


def draft_rules(draft: Checkpoint, new: Widths) -> dict[str, Rule]:
    dflash, layers = draft.config["dflash_config"], draft.config["num_hidden_layers"]
    rules = model_rules(draft, new, layers)
    rules["fc.weight"] = Rule(("hidden", "features"))
    rules["hidden_norm.weight"] = rules["norm.weight"]
    if dflash.get("conv_kernel_size"):
        for name in (f"layers.{i}.{side}_conv" for i in range(layers) for side in ("attention", "mlp")):
            rules[f"{name}.base_kernel"] = Rule(("", "", "hidden"))
            rules[f"{name}.kernel_projection.weight"] = Rule(("kernel", "hidden"), "random")
    if dflash.get("selector_rank"):
        rules["candidate_selector.hidden_projection.weight"] = Rule(("", "hidden"))
        for side in ("predecessor", "successor"):
            if dflash.get("selector_tied"):
                rules[f"candidate_selector.{side}_projection.weight"] = Rule(("", "hidden"))
            else:
                rules[f"candidate_selector.{side}_codebook"] = Rule(("", ""))
    return rules


def plan(checkpoint: Checkpoint, rules: Mapping[str, Rule], axes: Mapping[str, Axis]) -> dict[str, Part]:
    """The parts of the wide checkpoint by name. Raises ValueError naming an unknown, missing or misshaped tensor."""
    unknown = [name for name in checkpoint.tensors if name not in rules]
    if unknown:
        raise ValueError(f"{checkpoint.path}: no rule for how to widen tensor {checkpoint.names[unknown[0]]}.")
    parts = {}
    for name, rule in rules.items():
        original = checkpoint.tensors.get(name)
        if original is not None:
            own = _axes_of(checkpoint, name, rule, axes)
            parts[checkpoint.names[name]] = Part(rule, own, original)
        elif _layer(name) >= checkpoint.config["num_hidden_layers"]:
            parts[f"model.{name}"] = Part(rule, tuple(axes[axis] for axis in rule.axes), None)
        elif name not in OPTIONAL:
            raise ValueError(f"{checkpoint.path}: tensor {name} is missing: download its weights again.")
    return parts


def _layer(name: str) -> int:
    """Number of the layer that a tensor is of; -1: of none."""
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


def _axes_of(checkpoint: Checkpoint, name: str, rule: Rule, axes: Mapping[str, Axis]) -> tuple[Axis, ...]:
    shape = list(checkpoint.tensors[name].shape)
    known = [axes.get(axis) for axis in rule.axes]
    if len(shape) != len(known) or any(a is not None and len(a.index) != n for a, n in zip(known, shape, strict=True)):
        asked = ["any" if a is None else len(a.index) for a in known]
        raise ValueError(
            f"{checkpoint.path}: tensor {checkpoint.names[name]} has shape {shape}, but its config.json asks for "
            f"{asked}. They are of two checkpoints: download both again."
        )
    return tuple(a or Axis(torch.arange(n), n) for a, n in zip(known, shape, strict=True))


class Widener:
    """Makes wide tensors, on one device and in one dtype."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def widen(self, part: Part) -> Tensor:
        out = self._padding(part)
        if part.original is not None:
            if (zeroed := part.axes[0].zeroed) is not None:
                out[zeroed.to(self.device)] = 0
            value = part.original.to(self.device)
            if part.rule.scale != 1:
                value = value.float() * part.rule.scale
            out[self._grid(part.axes)] = value.to(self.dtype)
        return out

    def _padding(self, part: Part) -> Tensor:
        out = torch.empty(part.shape, dtype=self.dtype, device=self.device)
        if part.rule.padding == "random":
            return out.normal_(std=RANDOM_STD, generator=self.generator)
        return out.fill_(part.rule.padding == "ones")

    def _grid(self, axes: tuple[Axis, ...]) -> tuple[Tensor, ...]:
        """Indices that meet as a grid, as numpy's ix_."""
        last = len(axes) - 1
        return tuple(
            axis.index.to(self.device).view(-1, *[1] * (last - dimension)) for dimension, axis in enumerate(axes)
        )


def shards(parts: Mapping[str, Part], itemsize: int) -> list[list[str]]:
    """Names of the tensors of each file, in order: files of about SHARD_BYTES."""
    files: list[list[str]] = [[]]
    held = 0
    for name, part in parts.items():
        size = math.prod(part.shape) * itemsize
        if files[-1] and held + size > SHARD_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def write(parts: Mapping[str, Part], widener: Widener, out: Path, what: str) -> int:
    """Write the weights, shard by shard, and their index. Returns how many parameters there are."""
    parameters = sum(math.prod(part.shape) for part in parts.values())
    files = shards(parts, widener.dtype.itemsize)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(track(files, f"{what}, files of weights", console=console), 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: widener.widen(parts[name]) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": parameters * widener.dtype.itemsize}, "weight_map": weight_map}
    write_json(index, out / "model.safetensors.index.json")
    return parameters


def copy_the_rest(source: Path, out: Path) -> None:
    for file in {file for pattern in BESIDE_THE_WEIGHTS for file in source.glob(pattern)}:
        shutil.copy(file, out)


def write_json(value: object, file: Path) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def wide_config(config: dict[str, Any], new: Widths, dtype: str) -> dict[str, Any]:
    """What changes alike in a target's and a draft's config.json."""
    eps = config.get("rms_norm_eps", 1e-6) * config["hidden_size"] / new.hidden
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**kept, **new.as_config(), "rms_norm_eps": eps, "dtype": dtype}


def target_config(config: dict[str, Any], new: Widths, layers: int, dtype: str) -> dict[str, Any]:
    wide = {**wide_config(config, new, dtype), "num_hidden_layers": layers}
    if config.get("layer_types"):
        added = layers - config["num_hidden_layers"]
        wide["layer_types"] = [*config["layer_types"], *["full_attention"] * added]
    return wide


def draft_config(config: dict[str, Any], new: Widths, layers: int, dtype: str) -> dict[str, Any]:
    """layers: the target's, which the draft's config repeats, at either level."""
    told = {"num_target_layers": layers, "target_hidden_size": new.hidden}
    wide = {**wide_config(config, new, dtype), "num_target_layers": layers}
    dflash = config["dflash_config"]
    return {**wide, "dflash_config": {**dflash, **{key: value for key, value in told.items() if key in dflash}}}


def check_model(checkpoint: Checkpoint, architectures: tuple[str, ...]) -> None:
    """Raise ValueError unless the checkpoint is of a kind that the rules are right for."""
    config = checkpoint.config
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in architectures:
        raise ValueError(f"{checkpoint.path}: architecture {architecture}; only {', '.join(architectures)} is widened.")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope not in ROPE_TYPES:
        raise ValueError(f"{checkpoint.path}: rope_type {rope}; only {', '.join(ROPE_TYPES)} is widened.")
    neox = (config.get("rope_is_neox_style"), config.get("is_neox_style"))
    if {**config, **scaling}.get("partial_rotary_factor") not in (None, 1.0) or False in neox:
        raise ValueError(f"{checkpoint.path}: partial or interleaved rotary positions are not widened.")


def check_pair(target: Checkpoint, draft: Checkpoint) -> None:
    """Raise ValueError unless the draft is one for the target, and says which layers it reads."""
    for key in ("hidden_size", "vocab_size"):
        if draft.config.get(key) != target.config[key]:
            raise ValueError(
                f"{draft.path}: {key} is {draft.config.get(key)}, the target's {target.config[key]}: "
                "give a draft made for this target."
            )
    if not (draft.config.get("dflash_config") or {}).get("target_layer_ids"):
        raise ValueError(
            f"{draft.path}: target_layer_ids is missing, whose default depends on the target's number of layers: "
            "write it into the config.json's dflash_config."
        )


def check_widths(checkpoint: Checkpoint, new: Widths) -> None:
    """Raise typer.BadParameter, naming option and cure, unless the checkpoint fits into the new widths."""
    old, whose = Widths.of(checkpoint.config), f"of {checkpoint.path}"
    for option, was, is_ in (
        ("--hidden", old.hidden, new.hidden),
        ("--kv-heads", old.kv_heads, new.kv_heads),
        ("--mlp", old.mlp, new.mlp),
    ):
        if is_ < was:
            raise typer.BadParameter(f"{option} {is_} is less than the {was} {whose}: give {was} or more.")
    if new.heads % new.kv_heads:
        raise typer.BadParameter(f"--heads {new.heads} is no multiple of --kv-heads {new.kv_heads}.")
    if new.hidden % new.heads:  # whatever the head_dim: transformers' Llama config asks for it
        raise typer.BadParameter(f"--hidden {new.hidden} is no multiple of --heads {new.heads}.")
    if new.group < old.group:
        raise typer.BadParameter(
            f"--heads {new.heads} with --kv-heads {new.kv_heads} gives {new.group} query heads a KV head, fewer than "
            f"the {old.group} {whose}: give --heads {old.group * new.kv_heads} or more."
        )
    if new.head_dim % old.head_dim:
        raise typer.BadParameter(
            f"--head-dim {new.head_dim} is no multiple of the {old.head_dim} {whose}: rotary pairs would lose their "
            f"frequencies. Give {2 * old.head_dim}, say."
        )
    group_size = (checkpoint.config.get("dflash_config") or {}).get("conv_group_size")
    if group_size and new.hidden % group_size:
        raise typer.BadParameter(f"--hidden {new.hidden} is no multiple of the conv_group_size {group_size} {whose}.")


def read_pair(target: Path, draft: Path, new: Widths, layers: int) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, checked against each other and against what they are to become."""
    pair = Checkpoint.read(target), Checkpoint.read(draft)
    for checkpoint, architectures in zip(pair, (TARGETS, DRAFTS), strict=True):
        check_model(checkpoint, architectures)
        check_widths(checkpoint, new)
    check_pair(*pair)
    was = pair[0].config["num_hidden_layers"]
    if layers < was:
        raise typer.BadParameter(f"--layers {layers} is less than the {was} of {target}: give {was} or more.")
    return pair


def main(
    target: Annotated[Path, typer.Argument(help="the target's checkpoint directory")],
    draft: Annotated[Path, typer.Argument(help="the draft's")],
    out_target: Annotated[Path, typer.Argument(help="where the wide target goes")],
    out_draft: Annotated[Path, typer.Argument(help="where the wide draft goes")],
    hidden: int = 4096,
    layers: Annotated[int, typer.Option(help="the target's; the draft keeps its own")] = 32,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: Annotated[int, typer.Option(help="a multiple of the original's")] = 128,
    mlp: int = 14336,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; cuda where there is one")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, or float32 for exact comparisons")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write OUT_TARGET and OUT_DRAFT; the widths' defaults are Llama-3.1-8B's.

    A target that OUT_TARGET already holds in these widths is kept, for one more draft.
    """
    start, new = time.monotonic(), Widths(hidden, heads, kv_heads, head_dim, mlp)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    narrow, drafting = read_pair(target, draft, new, layers)
    config = target_config(narrow.config, new, layers, dtype)
    made = any(out_target.glob("*.safetensors"))
    if made and json.loads((out_target / "config.json").read_text(encoding="utf-8")) != config:
        raise typer.BadParameter(f"{out_target} holds weights of another shape: give a new directory.")
    if any(out_draft.glob("*.safetensors")):
        raise typer.BadParameter(f"{out_draft} already holds weights: give a new directory.")
    # Both are planned, and so checked, before anything is written.
    target_plan = plan(narrow, model_rules(narrow, new, layers), model_axes(narrow, new))
    draft_plan = plan(drafting, draft_rules(drafting, new), draft_axes(drafting, new))
    widener = Widener(device or ("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[dtype], seed)
    parameters = {} if made else {"target": write(target_plan, widener, out_target, "target")}
    parameters["draft"] = write(draft_plan, widener, out_draft, "draft")
    write_json(config, out_target / "config.json")
    write_json(draft_config(drafting.config, new, layers, dtype), out_draft / "config.json")
    copy_the_rest(target, out_target)
    copy_the_rest(draft, out_draft)
    seconds = round(time.monotonic() - start, 1)
    report = {"target": str(out_target), "draft": str(out_draft), "parameters": parameters, "seconds": seconds}
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
