"""Clipping against a plain computation on any bits, and its undo."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from bnn_utils.faults import inject
from bnn_utils.layers import BinarizeConv2d, BinarizeLinear
from bnn_utils.repair import REPAIRS, clip, none

SPECIAL = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF)
PATTERNS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        BinarizeConv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), BinarizeLinear(8, 3), nn.BatchNorm1d(3)
    ).eval()


def fill(model, draw):
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            pattern = draw(hnp.arrays(np.uint32, tuple(tensor.shape), elements=PATTERNS))
            tensor.detach().view(torch.int32).copy_(torch.from_numpy(pattern.view(np.int32)))


def bits_of(model):
    return {name: x.numpy().tobytes() for name, x in model.state_dict().items()}


def clipped(value, low, high):
    """Return one number clipped by the definition, without arrays."""
    value = 0.0 if math.isnan(value) or math.isinf(value) else value
    return min(max(value, low), high)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([(-1.0, 1.0), (-0.5, 0.25), (0.5, 2.0), (-3.0, -2.0), (0.0, 0.0)]))
def test_clip_is_the_plain_computation_on_any_bits(data, bounds):
    low, high = bounds
    model = small()
    fill(model, data.draw)
    before = bits_of(model)
    statistics = {name for name, _ in model.named_buffers()}
    expected = {
        name: [clipped(value, low, high) for value in parameter.flatten().tolist()]
        for name, parameter in model.named_parameters()
    }
    with clip(model, low, high):
        inside = bits_of(model)
        for name, parameter in model.named_parameters():
            assert parameter.flatten().tolist() == expected[name], name
        assert all(inside[name] == before[name] for name in statistics)
    assert bits_of(model) == before


def test_default_bounds_are_those_published():
    layer = BinarizeLinear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.5, -1.5, math.nan, math.inf]]))
        layer.bias.copy_(torch.tensor([-math.inf]))
    with clip(layer):
        assert layer.weight.flatten().tolist() == [1, -1, 0, 0]
        assert layer.bias.item() == 0


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_undone_after_an_exception(raised, layout):
    model = small().to(memory_format=layout)
    with torch.no_grad():
        model[1].weight.mul_(7)
        model[4].bias[0] = math.nan
    before = bits_of(model)
    with pytest.raises(raised), clip(model):
        assert bits_of(model) != before
        raise raised
    assert bits_of(model) == before


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (math.nan, 1.0), (-1.0, math.nan)])
def test_bounds_that_make_no_sense(bounds):
    model = small()
    before = bits_of(model)
    with pytest.raises(ValueError, match="low"), clip(model, *bounds):
        pytest.fail("it clipped")
    assert bits_of(model) == before


def test_inside_an_injection():
    model = small()
    with torch.no_grad():
        model[1].weight.mul_(7)
    before = bits_of(model)
    with inject(model, 0.2, seed=0):
        damaged = bits_of(model)
        with clip(model):
            assert bits_of(model) != damaged
            assert all(parameter.abs().max() <= 1 for parameter in model.parameters())
        assert bits_of(model) == damaged
    assert bits_of(model) == before


def test_an_injection_inside():
    model = small()
    with torch.no_grad():
        model[1].weight.mul_(7)
    before = bits_of(model)
    with clip(model):
        inside = bits_of(model)
        with inject(model, 0.2, seed=0):
            assert bits_of(model) != inside
        assert bits_of(model) == inside
    assert bits_of(model) == before


def test_none_changes_nothing():
    model = small()
    before = bits_of(model)
    with none(model):
        assert bits_of(model) == before
    assert bits_of(model) == before
    assert REPAIRS["none"] is none
    assert REPAIRS["clip"] is clip
