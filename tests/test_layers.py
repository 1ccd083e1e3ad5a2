"""Binarization and its layers, against plain numpy and the definitions."""

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn
from torch.nn import functional

from bnn_utils.layers import (
    BinarizeConv2d,
    BinarizeLinear,
    PReLU,
    Shift,
    binarize,
    binarized_weights,
    clamp_latent_weights,
)
from bnn_utils.models import BasicBlock

FLOATS = st.floats(width=16)  # infinities and NaN among them; exact in each of the three dtypes
DTYPES = (torch.float16, torch.float32, torch.float64)
FALSE_ALARM = 1e-6


def sign(x):
    """+1 or -1 by the definition, one Python float at a time: a comparison with NaN is false."""
    x = np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
    return np.array([1.0 if value >= 0 else -1.0 for value in x.ravel().tolist()]).reshape(x.shape)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- binarize


def test_binarize_at_its_edges():
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, -math.nan])
    assert binarize(x).tolist() == [1, 1, 1, -1, 1, -1, -1, -1]


@settings(deadline=None, max_examples=100)
@given(values=st.lists(FLOATS, max_size=12), dtype=st.sampled_from(DTYPES), stochastic=st.booleans())
def test_binarize_gives_a_sign_of_the_same_shape_and_dtype(values, dtype, stochastic):
    x = torch.tensor(values, dtype=dtype).reshape(len(values), 1, 1)
    before = x.clone()
    y = binarize(x, stochastic)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert set(y.flatten().tolist()) <= {-1.0, 1.0}
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    outside = (x.abs() >= 1) | x.isnan()
    assert y[outside].tolist() == sign(x[outside]).tolist()
    if not stochastic:
        assert y.tolist() == sign(x).tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_binarize_refuses_integers(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        binarize(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("stochastic", [False, True])
def test_gradient_passes_where_x_is_at_most_one(stochastic):
    just = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    x = torch.tensor([-math.inf, -2, -just, -1, -0.5, -0.0, 0, 0.5, 1, just, 2, math.inf, math.nan], requires_grad=True)
    incoming = torch.arange(1.0, 14.0)
    binarize(x, stochastic).backward(incoming)
    assert x.grad.tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0]


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12), incoming=st.floats(-4, 4, width=32))
def test_gradient_is_the_definition(values, incoming):
    x = torch.tensor(values, requires_grad=True)
    (binarize(x) * incoming).sum().backward()
    assert x.grad.tolist() == [incoming if abs(value) <= 1 else 0 for value in values]


def test_polynomial_gradient_is_its_formula():
    x = torch.tensor([-math.inf, -2, -1, -0.75, -0.25, -0.0, 0, 0.5, 1, 3, math.inf, math.nan], requires_grad=True)
    y = binarize(x, gradient="polynomial")
    assert torch.equal(y, binarize(x))
    y.backward(torch.full_like(x, 2.0))
    expected = torch.tensor([0, 0, 0, 1, 3, 4, 4, 2, 0, 0, 0], dtype=torch.float32)
    assert torch.equal(x.grad[:-1], expected)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="unknown gradient 'cubic', expected one of straight-through, polynomial"):
        binarize(torch.zeros(1), gradient="cubic")


def test_the_gradient_of_a_convolution_is_chosen():
    x = torch.full((1, 1, 1, 1), 0.75, requires_grad=True)
    for gradient, slope in (("straight-through", 1), ("polynomial", 0.5)):
        layer = BinarizeConv2d(1, 1, 1, bias=False, gradient=gradient)
        (grad,) = torch.autograd.grad(layer(x), x)
        assert grad.item() == slope * binarize(layer.weight).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift_and_prelu_by_definition_in_the_dtype_of_their_input(dtype):
    x = torch.tensor([-2.0, -0.5, 0, 0.5, 2]).view(1, 1, 1, 5).repeat(1, 2, 1, 1).to(dtype)
    shift, prelu = Shift(2), PReLU(2)
    with torch.no_grad():
        shift.shift.copy_(torch.tensor([0.5, -1]))
        prelu.weight.copy_(torch.tensor([0.5, -2]))
    assert shift(x).dtype == prelu(x).dtype == dtype
    assert shift(x).flatten().tolist() == [-1.5, 0, 0.5, 1, 2.5, -3, -1.5, -1, -0.5, 1]
    assert prelu(x).flatten().tolist() == [-1, -0.25, 0, 0.5, 2, 4, 1, 0, 0.5, 2]


@pytest.mark.parametrize("value", [-0.999, -0.5, 0.0, 0.3, 0.9])
def test_stochastic_probability_is_the_hard_sigmoid(value):
    torch.manual_seed(0)
    n = 100_000
    ones = int((binarize(torch.full((n,), value), stochastic=True) > 0).sum())
    low, high = binom.interval(1 - FALSE_ALARM, n, (value + 1) / 2)
    assert low <= ones <= high


@pytest.mark.parametrize("value", [-math.inf, -3.0, -1.0, 1.0, 3.0, math.inf])
def test_stochastic_ends_are_certain(value):
    y = binarize(torch.full((100_000,), value), stochastic=True)
    assert (y == math.copysign(1, value)).all()


def test_stochastic_draws_follow_the_seed_and_differ_between_elements():
    x = torch.zeros(1000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(binarize(x, stochastic=True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---------------------------------------------------------------- the layers' values


@pytest.mark.parametrize("binarize_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_against_numpy(binarize_input, bias):
    layer = BinarizeLinear(7, 4, bias=bias, binarize_input=binarize_input).double()
    x = randn(3, 2, 7)
    inputs = sign(x) if binarize_input else x.numpy()
    expected = np.zeros((3, 2, 4))
    for output, weights in enumerate(sign(layer.weight)):
        expected[..., output] = (inputs * weights).sum(-1)
        expected[..., output] += layer.bias[output].item() if bias else 0
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-12)


def convolve(x, weight, bias, stride, padding):
    """A convolution tap by tap; a tap outside the image is left out."""
    images, _, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    y = np.zeros((images, outputs, rows, columns)) + bias[:, None, None]
    for row, column, i, j in np.ndindex(rows, columns, kernel, kernel):
        at, beside = row * stride + i - padding, column * stride + j - padding
        if 0 <= at < height and 0 <= beside < width:
            y[:, :, row, column] += x[:, :, at, beside] @ weight[:, :, i, j].T
    return y


@pytest.mark.parametrize("binarize_input", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "bias"), [(3, 1, 1, True), (3, 2, 1, False), (1, 2, 0, True)])
def test_convolution_against_loops(kernel, stride, padding, bias, binarize_input):
    layer = BinarizeConv2d(2, 3, kernel, stride, padding, bias, binarize_input=binarize_input).double()
    x = randn(2, 2, 6, 5)
    inputs = sign(x) if binarize_input else x.numpy()
    biases = layer.bias.detach().numpy() if bias else np.zeros(3)
    expected = convolve(inputs, sign(layer.weight), biases, stride, padding)
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_the_layout_of_an_image_changes_no_rounding(images):
    layer = BinarizeConv2d(3, 16, 3, 1, 1, binarize_input=False)
    x = torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(images))
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), expected)
        assert torch.equal(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize("layer", [BinarizeLinear(8, 3), BinarizeConv2d(2, 3, 3)])
def test_layers_binarize_their_input_unless_told_otherwise(layer):
    x = randn(2, 8).float() if isinstance(layer, BinarizeLinear) else randn(2, 2, 4, 4).float()
    assert torch.equal(layer(x), layer(5 * x))
    assert "binarize_input=True" in repr(layer)


# ---------------------------------------------------------------- gradients through the layers


def test_linear_gradients_by_the_chain_rule():
    layer = BinarizeLinear(4, 2).double()
    layer.weight.data = torch.tensor([[0.5, -1.0, 1.5, 0.0], [-0.2, 1.0, -3.0, 0.9]], dtype=torch.float64)
    x = torch.tensor([[0.3, -0.7, 2.0, -1.0], [-1.2, 0.0, 0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    incoming = randn(2, 2)
    layer(x).backward(incoming)
    g, w_inside, x_inside = (t.detach().numpy() for t in (incoming, layer.weight.abs() <= 1, x.abs() <= 1))
    np.testing.assert_allclose(layer.weight.grad, g.T @ sign(x) * w_inside, atol=1e-12)
    np.testing.assert_allclose(x.grad, g @ sign(layer.weight) * x_inside, atol=1e-12)
    np.testing.assert_allclose(layer.bias.grad, g.sum(0), atol=1e-12)


def test_convolution_weight_gradient_by_the_chain_rule():
    layer = BinarizeConv2d(2, 3, 3, padding=1, binarize_input=False).double()
    layer.weight.data.mul_(8)  # some beyond 1
    x, incoming = randn(2, 2, 4, 4), randn(2, 3, 4, 4, seed=1)
    layer(x).backward(incoming)
    # The output is linear in the signs, so the gradient of each is what that sign alone lets through.
    for index in np.ndindex(*layer.weight.shape):
        alone = np.zeros(layer.weight.shape)
        alone[index] = 1
        through = (convolve(x.numpy(), alone, np.zeros(3), 1, 1) * incoming.numpy()).sum()
        expected = through if abs(layer.weight[index].item()) <= 1 else 0
        assert layer.weight.grad[index].item() == pytest.approx(expected, abs=1e-12)
    assert 0 < (layer.weight.grad == 0).sum() < layer.weight.numel()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shortcut_picks_its_pixels_and_computes_the_same(binary, layout):
    convolution = BasicBlock(20, 40, 2, binary=binary).downsample[0]
    x = randn(4, 20, 9, 16).float().to(memory_format=layout)
    inputs, weight = (sign(x), sign(convolution.weight)) if binary else (x, convolution.weight)
    expected = functional.conv2d(torch.as_tensor(inputs), torch.as_tensor(weight), stride=2)
    y = convolution(x)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected.to(y.dtype), rtol=0, atol=0 if binary else 1e-5)  # sums of signs are exact


SHORTCUT_GRADIENTS = """
import torch
from bnn_utils.models import BasicBlock

torch.manual_seed(0)
torch.set_num_threads(2)
x = torch.rand(64, 3, 8, 8).mul(2).sub(1).to(memory_format=torch.channels_last)
incoming = torch.randn(64, 7, 4, 4)
for binary in (True, False):
    convolution = BasicBlock(3, 7, 2, binary=binary).downsample[0]
    gradients = []
    for dtype in [torch.float64] + 8 * [torch.float32]:
        inputs = x.to(dtype, copy=True).requires_grad_()
        convolution.to(dtype).weight.grad = None
        convolution(inputs).backward(incoming.to(dtype))
        gradients.append((inputs.grad, convolution.weight.grad))
    for exact, *others in zip(*gradients):
        print(((torch.stack(others) - exact).abs().max() / exact.abs().max()).item())
"""


def test_gradients_of_a_shortcut_in_an_instruction_set_where_torch_alone_gets_them_wrong():
    """oneDNN, issue 6035: with AVX2, errors between 0.1 and 2.4, or the process dies."""
    run = [sys.executable, "-c", SHORTCUT_GRADIENTS]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run(run, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    errors = [float(line) for line in ran.stdout.split()]
    assert len(errors) == 4 and all(error < 1e-5 for error in errors), errors


# ---------------------------------------------------------------- a layer is an ordinary module


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        BinarizeConv2d(1, 4, 3, padding=1, binarize_input=False),
        nn.BatchNorm2d(4),
        nn.Hardtanh(),
        nn.Flatten(),
        BinarizeLinear(4 * 5 * 5, 3),
    )


IMAGES = randn(6, 1, 5, 5).float()


def test_forward_and_backward_leave_latent_weights_and_input_alone():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    images = IMAGES.clone()
    model(images).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert torch.equal(images, IMAGES)
    assert all(vars(parameter) == {} for parameter in model.parameters())  # no state hidden on parameters


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_is_its_own(clone):
    model = network().eval()
    model(IMAGES).sum().backward()
    other = clone(model)
    expected = model(IMAGES)
    assert torch.equal(other(IMAGES), expected)
    for weight in binarized_weights(other).values():
        weight.data.neg_()
    assert torch.equal(model(IMAGES), expected) and not torch.equal(other(IMAGES), expected)


def test_state_dict_roundtrip():
    model, other = network().eval(), network().eval()
    for parameter in other.parameters():
        parameter.data.neg_()
    state = model.state_dict()
    assert list(state)[:2] == ["0.weight", "0.bias"] and {"4.weight", "4.bias"} <= set(state)
    assert not torch.equal(other(IMAGES), model(IMAGES))
    other.load_state_dict(state)
    assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_network_gives_the_same_values_and_gradients(backend):
    model = network()
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    results = []
    for module in (model, compiled):
        x = IMAGES.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())])
    assert results[0][2].abs().sum() > 0
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)
    torch.compiler.reset()


def test_per_sample_gradients_with_vmap():
    layer = BinarizeLinear(5, 2)
    x = randn(4, 5).float()

    def loss(weight, sample):
        return torch.func.functional_call(layer, {"weight": weight}, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.weight.detach(), x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(each.sum(0), layer.weight.grad)


# ---------------------------------------------------------------- helpers over a network


def test_binarized_weights_are_named_as_in_the_state_dict():
    model = nn.Sequential(nn.Linear(3, 4), network())
    weights = binarized_weights(model)
    assert list(weights) == ["1.0.weight", "1.4.weight"]
    assert all(weights[name].data_ptr() == model.state_dict()[name].data_ptr() for name in weights)
    assert list(binarized_weights(BinarizeLinear(2, 2))) == ["weight"]


def test_clamp_touches_binarized_weights_only():
    model = nn.Sequential(network(), nn.Linear(3, 3))
    for parameter in model.parameters():
        parameter.data.copy_(torch.linspace(-3, 3, parameter.numel()).view_as(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clamp_latent_weights(model)
    for name, tensor in model.state_dict().items():
        expected = np.clip(before[name].numpy(), -1, 1) if name in ("0.0.weight", "0.4.weight") else before[name]
        assert torch.equal(tensor, torch.as_tensor(expected)), name
    assert all(parameter.requires_grad for parameter in model.parameters())
