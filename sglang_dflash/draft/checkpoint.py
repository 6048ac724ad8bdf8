"""A draft checkpoint's files: which tensors it must hold, checked from headers before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_dflash.draft.config import DraftConfig

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"
MASK_EMBEDDING = "mask_embedding.pt"  # beside the weights, where the mask's embedding was trained too
# Some exports add copies of the target's embedding and head, or constants: nothing of the draft.
_NOT_THE_DRAFTS = ("embed_tokens.weight", "lm_head.weight")


def own_name(name: str) -> str | None:
    """The tensor's name in our network, or None for one that is no part of the draft."""
    name = name.removeprefix("model.").replace("_codebook.weight", "_codebook")  # z-lab's class has them as embeddings
    return None if name in _NOT_THE_DRAFTS or name.endswith("rotary_emb.inv_freq") else name


def expected_shapes(config: DraftConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this config, with its shape. Linear weights are [out, in].

    The q and k norms are in it always; `optional_names` says when a checkpoint may lack them.
    """
    h = config.hidden_size
    shapes: dict[str, Shape] = {
        "fc.weight": (h, config.num_features * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for i in range(config.num_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in _layer_shapes(config).items()})
    shapes.update({f"candidate_selector.{name}": shape for name, shape in _selector_shapes(config).items()})
    return shapes


def optional_names(config: DraftConfig) -> set[str]:
    """Tensors that a checkpoint lacks all together or holds all together: a Llama-style draft has no q and k
    norms.
    """
    if config.model_type != "llama":
        return set()
    return {f"layers.{i}.self_attn.{name}_norm.weight" for i in range(config.num_layers) for name in "qk"}


def missing_names(config: DraftConfig, present: set[str]) -> list[str]:
    """Names, in order, of the tensors that a checkpoint holding `present` should hold too."""
    optional = optional_names(config)
    if not optional & present:
        present = present | optional
    return [name for name in expected_shapes(config) if name not in present]


def _layer_shapes(config: DraftConfig) -> dict[str, Shape]:
    h, inner, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (inner, h),
        "mlp.up_proj.weight": (inner, h),
        "mlp.down_proj.weight": (h, inner),
    }
    if config.attention_bias:
        for name, width in (("q", q), ("k", kv), ("v", kv), ("o", h)):
            shapes[f"self_attn.{name}_proj.bias"] = (width,)
    if config.conv_taps:
        for name in ("attention_conv", "mlp_conv"):
            shapes[f"{name}.base_kernel"] = (2, config.conv_taps, h)
            shapes[f"{name}.kernel_projection.weight"] = (
                2 * config.conv_taps * (h // config.conv_group_size),
                h,
            )
    return shapes


def _selector_shapes(config: DraftConfig) -> dict[str, Shape]:
    if config.selector == "none":
        return {}
    r, h, v = config.selector_rank, config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"hidden_projection.weight": (r, h)}
    for name in ("predecessor", "successor"):
        if config.selector == "tied":
            shapes[f"{name}_projection.weight"] = (r, h)
        else:
            shapes[f"{name}_codebook"] = (v, r)
    return shapes


def tensor_shapes_on_disk(path: str | Path) -> dict[str, Shape]:
    """Name and shape of every tensor in the checkpoint directory, from the headers alone.

    Raises ValueError for a directory without safetensors files, a missing or damaged file, and an index that
    names a tensor its file does not hold.
    """
    folder = Path(path)
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"Checkpoint {folder} has no .safetensors file: convert or download its weights."
            )
        return {name: shape for file in files for name, shape in _header(file).items()}
    weight_map = files_of_index(index)
    headers = {file: _header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(
                f"{index} places tensor {name} in {file}, which does not hold it: download both again."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def files_of_index(index: Path) -> dict[str, str]:
    """Every tensor's file, as a safetensors index names them. Raises ValueError where it is none."""
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error!r}): download it again.") from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} is not a safetensors index (its weight_map names no files): download it again.")
    return files


def _header(file: Path) -> dict[str, Shape]:
    try:
        if not file.is_file():
            raise ValueError(f"Checkpoint file {file} is missing: download it.")
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}): make it readable, or download it.") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}): download it again.") from error


def check_tensors(tensors: Mapping[str, Shape], config: DraftConfig, *, source: str) -> None:
    """Raise ValueError, naming the tensor, unless a checkpoint's tensors are those that its config says."""
    shapes = {own: shape for name, shape in tensors.items() if (own := own_name(name)) is not None}
    check_shapes(shapes, config, source=source)


def check_shapes(shapes: dict[str, Shape], config: DraftConfig, *, source: str) -> None:
    """The same for tensors already named as in our network; source: what the message calls the checkpoint."""
    for name, shape in expected_shapes(config).items():
        if name in shapes and shapes[name] != shape:
            raise ValueError(
                f"Draft checkpoint {source}: tensor {name} has shape {list(shapes[name])}, but its "
                f"config.json asks for {list(shape)}. They are of two checkpoints: download both again."
            )
    missing = missing_names(config, set(shapes))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"Draft checkpoint {source}: tensor {missing[0]}{more} missing, which its config.json asks for. "
            "Download its weights again."
        )


def load_mask_embedding(file: Path, config: DraftConfig) -> Tensor:
    """The trained embedding of the mask token, [H], as training wrote it: with the token, or alone.

    Raises ValueError, naming the cure, for a file of another kind, token or width.
    """
    import torch

    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch tells broken files apart by errors of many kinds
        raise ValueError(f"{file} cannot be read as tensors ({error}): download it again.") from error
    if isinstance(saved, dict):
        token = saved.get("mask_token_id", config.mask_token_id)
        if int(token) != config.mask_token_id:
            raise ValueError(
                f"{file} is of mask token {token}, and the draft's mask_token_id is {config.mask_token_id}: they are "
                "of two checkpoints. Download both again."
            )
        saved = saved.get("embedding")
    if not isinstance(saved, torch.Tensor) or saved.numel() != config.hidden_size:
        shape = list(saved.shape) if isinstance(saved, torch.Tensor) else type(saved).__name__
        raise ValueError(
            f"{file} holds {shape}, and not one embedding of {config.hidden_size} numbers (one a position is not "
            "served): give a draft with one for all positions."
        )
    return saved.flatten()


def unknown_names(names: Iterable[str], config: DraftConfig) -> list[str]:
    """Checkpoint tensors that no network of ours holds: the checkpoint is of another kind than its config
    says.
    """
    expected = expected_shapes(config)
    return [name for name in names if (own := own_name(name)) is not None and own not in expected]
