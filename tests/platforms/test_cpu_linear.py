"""Packed linear layers against the plain product."""

from __future__ import annotations

import psutil
import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from torch.nn import functional as F

from sglang_dflash.platforms.cpu import linear
from sglang_dflash.platforms.cpu.linear import PackedLinearMethod, PackedWeight, pack_linear_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3, 16, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_any_width_gives_the_plain_product(dtype: torch.dtype, width: int, biased: bool) -> None:
    torch.manual_seed(width)
    weight, x = torch.randn(96, 48).to(dtype), torch.randn(width, 48).to(dtype)
    bias = torch.randn(96).to(dtype) if biased else None
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-1}
    torch.testing.assert_close(PackedWeight(weight)(x, bias), F.linear(x, weight, bias), **tolerance)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = ReplicatedLinear(48, 96, bias=False, params_dtype=torch.float32)
    layer.weight.data.normal_()
    model = torch.nn.Module()
    model.layer = layer
    return model


def test_a_layer_runs_on_its_packed_weight() -> None:
    model, x = make_model(), torch.randn(5, 48)
    plain, _ = model.layer(x)
    pack_linear_layers(model)
    assert isinstance(model.layer.quant_method, PackedLinearMethod)
    torch.testing.assert_close(model.layer(x)[0], plain, rtol=1e-5, atol=1e-4)


def test_a_convolution_s_weights_stay_as_they_are() -> None:
    """SGLang keeps those of gated delta nets in a linear layer."""
    model = make_model()
    before, model.layer.weight.data = model.layer.quant_method, torch.randn(96, 1, 4)
    pack_linear_layers(model)
    assert model.layer.quant_method is before


def test_new_weights_are_packed_again() -> None:
    model, x = make_model(), torch.randn(5, 48)
    pack_linear_layers(model)
    model.layer.weight.data.normal_()
    model.layer.quant_method.process_weights_after_loading(model.layer)  # as SGLang does on a weight update
    torch.testing.assert_close(model.layer(x)[0], F.linear(x, model.layer.weight), rtol=1e-5, atol=1e-4)


def test_a_model_too_large_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before, memory = model.layer.quant_method, psutil.virtual_memory().total
    monkeypatch.setattr(linear, "MAX_MEMORY_SHARE", model.layer.weight.nbytes / memory / 2)
    pack_linear_layers(model)
    assert model.layer.quant_method is before
