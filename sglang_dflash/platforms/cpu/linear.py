"""Linear layers with oneDNN-packed weights.

A packed weight is laid out once for the CPU's matrix kernels; a plain one is read as it is. One token is a
stream of weights through memory, where plain float32 is faster; from a few tokens on packing wins. So float32
layers keep both, bfloat16 layers use the packed one alone.
"""

from __future__ import annotations

import logging

import psutil
import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

logger = logging.getLogger(__name__)

# Tokens from which the packed weight is the faster one. Measured on SmolLM2-135M's shapes, 2 cores.
PACKED_FROM = {torch.float32: 3, torch.bfloat16: 1}

# Width the layout is chosen for; oneDNN takes any width with it.
LAYOUT_WIDTH = 16

# A packed copy doubles what a layer holds: models above this share of the memory stay plain.
MAX_MEMORY_SHARE = 0.25


class PackedWeight:
    """A weight [out, in] and its packed copy."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.plain = weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_WIDTH)
        self.packed_from = PACKED_FROM[weight.dtype]

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] @ weight.T + bias, in x's dtype."""
        if x.numel() < self.packed_from * x.shape[-1]:
            return torch.nn.functional.linear(x, self.plain, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class _OnPackedWeight:
    """What the two methods below have in common."""

    weight: PackedWeight

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.weight = PackedWeight(layer.weight.data)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight(x, bias)


class PackedLinearMethod(_OnPackedWeight, UnquantizedLinearMethod):
    """SGLang's way to run an unquantized linear layer, on a packed weight."""


class PackedEmbeddingMethod(_OnPackedWeight, UnquantizedEmbeddingMethod):
    """The same for the head, which may be the embedding too."""


def pack_linear_layers(model: torch.nn.Module) -> None:
    """Give every unquantized linear layer of a loaded model, and its head, a packed weight.

    Where the layers are more than a quarter of the memory they are left as they are, and the log says so.
    """
    layers = [m for m in model.modules() if isinstance(m, LinearBase) and _runs(m, UnquantizedLinearMethod)]
    head = getattr(model, "lm_head", None)
    if isinstance(head, VocabParallelEmbedding) and _runs(head, UnquantizedEmbeddingMethod):
        layers.append(head)
    size, memory = sum(layer.weight.nbytes for layer in layers), psutil.virtual_memory().total
    if size > MAX_MEMORY_SHARE * memory:
        logger.info("Weights stay unpacked: %.1f GB of a machine's %.1f GB.", size / 1e9, memory / 1e9)
        return
    for layer in layers:
        layer.quant_method = PackedEmbeddingMethod() if layer is head else PackedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)


def _runs(layer: torch.nn.Module, method: type) -> bool:
    """Whether the layer runs this very method, on a matrix of a type that is worth packing (a convolution has none)."""
    return type(layer.quant_method) is method and layer.weight.dtype in PACKED_FROM and layer.weight.ndim == 2
