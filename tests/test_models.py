"""The networks: names, sizes and values against lists and computations written out here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bnn_utils.layers import binarized_weights
from bnn_utils.models import build, resnet_binary, resnet_bireal, summary, vgg_cifar10_binary

BATCHNORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
STATISTICS = BATCHNORM[2:]


def keys(layers):
    """The state_dict names of a list of (layer, its entries)."""
    return {f"{layer}.{entry}" for layer, entries in layers for entry in entries}


VGG_KEYS = keys(
    [(f"features.{i}", ("weight", "bias")) for i in (0, 3, 7, 10, 14, 17)]
    + [(f"features.{i}", BATCHNORM) for i in (1, 5, 8, 12, 15, 19)]
    + [(f"classifier.{i}", ("weight", "bias")) for i in (0, 3, 6)]
    + [("classifier.1", BATCHNORM), ("classifier.4", BATCHNORM), ("classifier.7", STATISTICS)]
)
RESNET_BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
RESNET_KEYS = keys(
    [("conv1", ("weight",)), ("bn1", BATCHNORM), ("bn2", BATCHNORM), ("fc", ("weight", "bias")), ("bn3", BATCHNORM)]
    + [(f"{block}.conv{i}", ("weight",)) for block in RESNET_BLOCKS for i in (1, 2)]
    + [(f"{block}.bn1", BATCHNORM) for block in RESNET_BLOCKS]
    + [(f"{block}.bn2", BATCHNORM) for block in RESNET_BLOCKS[:-1]]
    + [(f"layer{stage}.0.downsample.0", ("weight",)) for stage in (2, 3)]
    + [(f"layer{stage}.0.downsample.1", BATCHNORM) for stage in (2, 3)]
)
SMALL = dict(num_classes=7, width=0.05, in_channels=2, input_size=16)
every_network = pytest.mark.parametrize("make", [vgg_cifar10_binary, resnet_binary, resnet_bireal])


def randomized(model, seed=0):
    """The model in double precision and evaluation mode, every parameter and statistic drawn anew.

    BatchNorm scales take both signs, so that pooling after BatchNorm would give other values than before it.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 60.0, generator=generator)
        elif value.is_floating_point():
            value.normal_(generator=generator)
    return model


def image(model, batch=3, seed=1):
    config = model.config
    shape = (batch, config["in_channels"], config["input_size"], config["input_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- names and sizes


def test_vgg_names():
    assert set(vgg_cifar10_binary().state_dict()) == VGG_KEYS


def test_resnet_names():
    assert set(resnet_binary().state_dict()) == RESNET_KEYS


def test_vgg_shapes_at_published_size():
    state = vgg_cifar10_binary().state_dict()
    channels = (384, 384, 768, 768, 1536, 512)
    convolutions, norms = (0, 3, 7, 10, 14, 17), (1, 5, 8, 12, 15, 19)
    for index, norm, before, after in zip(convolutions, norms, (3, *channels), channels):
        assert state[f"features.{index}.weight"].shape == (after, before, 3, 3)
        assert state[f"features.{norm}.running_var"].shape == (after,)
    linear = {0: (1024, 8192), 3: (1024, 1024), 6: (10, 1024)}
    assert {index: tuple(state[f"classifier.{index}.weight"].shape) for index in linear} == linear
    assert state["classifier.7.running_mean"].shape == (10,)


def test_resnet_shapes_at_published_size():
    state = resnet_binary().state_dict()
    expected = {"conv1": (80, 3, 3, 3), "fc": (10, 320)}
    before = 80
    for stage, after in ((1, 80), (2, 160), (3, 320)):
        expected |= {f"layer{stage}.0.conv1": (after, before, 3, 3), f"layer{stage}.0.conv2": (after, after, 3, 3)}
        expected |= {f"layer{stage}.1.conv{i}": (after, after, 3, 3) for i in (1, 2)}
        if stage > 1:
            expected[f"layer{stage}.0.downsample.0"] = (after, before, 1, 1)
        before = after
    assert {name: tuple(weight.shape) for name, weight in binarized_named(state).items()} == expected


def binarized_named(state):
    return {name[: -len(".weight")]: value for name, value in state.items() if value.ndim >= 2}


# Layer by layer, by hand: weights of each binarized layer at width 1.0, and the positions that each is applied at.
VGG_WEIGHTS = {
    3 * 384 * 9: 32 * 32,
    384 * 384 * 9: 32 * 32,
    384 * 768 * 9: 16 * 16,
    768 * 768 * 9: 16 * 16,
    768 * 1536 * 9: 8 * 8,
    1536 * 512 * 9: 8 * 8,
    8192 * 1024: 1,
    1024 * 1024: 1,
    1024 * 10: 1,
}
RESNET_WEIGHTS = [
    (3 * 80 * 9, 1024),
    *[(80 * 80 * 9, 1024)] * 4,
    (80 * 160 * 9, 256),
    *[(160 * 160 * 9, 256)] * 3,
    (80 * 160, 256),
    (160 * 320 * 9, 64),
    *[(320 * 320 * 9, 64)] * 3,
    (160 * 320, 64),
    (320 * 10, 1),
]


@pytest.mark.parametrize(
    "make, layers, floats, statistics",
    [
        # biases 6,410 and BatchNorm scale and shift of 6,400 units; statistics of 6,410
        (vgg_cifar10_binary, list(VGG_WEIGHTS.items()), 6_410 + 2 * 6_400, 2 * 6_410),
        # fc's bias; BatchNorms of 80 (5), 160 (5), 320 (4 in the last stage and bn2) and 10 units
        (resnet_binary, RESNET_WEIGHTS, 10 + 2 * (5 * 80 + 5 * 160 + 5 * 320 + 10), 2 * (2_800 + 10)),
    ],
)
def test_counts_by_hand(make, layers, floats, statistics):
    model = make()
    binary = sum(weights for weights, _ in layers)
    assert sum(w.numel() for w in binarized_weights(model).values()) == binary
    assert sum(p.numel() for p in model.parameters()) == binary + floats
    assert sum(b.numel() for b in model.buffers() if b.is_floating_point()) == statistics

    table = summary(model)
    assert table["binary_weights"].sum() == binary
    assert table["floats"].sum() == floats
    assert table["statistics"].sum() == statistics
    assert table["float32_bytes"].sum() == 4 * (binary + floats + statistics)
    assert table["packed_bytes"].sum() == sum(-(-w // 8) for w, _ in layers) + 4 * (floats + statistics)
    assert table["macs"].sum() == sum(weights * positions for weights, positions in layers)


def test_vgg_published_totals():
    table = summary(vgg_cifar10_binary())
    assert table["floats"].sum() == 19_210
    assert table["statistics"].sum() == 12_820
    assert table["binary_weights"].sum() == 36_442_240


@pytest.mark.parametrize(
    "width, input_size, channels, flat, hidden",
    [(0.125, 8, (48, 48, 96, 96, 192, 64), 64, 128), (0.0625, 24, (24, 24, 48, 48, 96, 32), 9 * 32, 64)],
)
def test_vgg_scales(width, input_size, channels, flat, hidden):
    model = vgg_cifar10_binary(num_classes=7, width=width, in_channels=1, input_size=input_size)
    shapes = [tuple(weight.shape) for weight in binarized_weights(model).values()]
    convolutions = [(after, before, 3, 3) for before, after in zip((1, *channels), channels)]
    assert shapes == [*convolutions, (hidden, flat), (hidden, hidden), (7, hidden)]
    assert model(torch.zeros(2, 1, input_size, input_size)).shape == (2, 7)


def test_resnet_scales():
    model = resnet_binary(num_classes=7, width=0.25, depth=26, in_channels=1, input_size=12)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [4, 4, 4]
    assert [stage[-1].conv2.weight.shape[0] for stage in (model.layer1, model.layer2, model.layer3)] == [20, 40, 80]
    assert model.conv1.weight.shape == (20, 1, 3, 3) and model.fc.weight.shape == (7, 80)
    assert model(torch.zeros(2, 1, 12, 12)).shape == (2, 7)


@every_network
def test_a_tiny_width_leaves_a_channel(make):
    model = make(width=1e-3, input_size=8)
    assert min(weight.shape[0] for weight in binarized_weights(model).values()) == 1
    assert torch.isfinite(model.eval()(torch.zeros(2, 3, 8, 8))).all()


@every_network
def test_config_builds_the_same_network(make):
    model = make(**SMALL)
    again = build(model.name, **model.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@every_network
@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_classes=1),
        dict(width=0),
        dict(width=-0.5),
        dict(width=4.5),
        dict(width=float("nan")),
        dict(in_channels=0),
        dict(input_size=0),
        dict(input_size=30),
    ],
    ids=str,
)
def test_wrong_sizes(make, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        make(**wrong)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="depth must be at least 8, got 7"):
        resnet_binary(depth=7)
    with pytest.raises(ValueError, match="shortcut must be True or False, got 'wide'"):
        resnet_binary(shortcut="wide")
    with pytest.raises(ValueError, match=r"unknown model 'vgg'.*vgg_cifar10_binary, resnet_binary, resnet_bireal"):
        build("vgg")


# ---------------------------------------------------------------- values


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def batchnorm(x, state, name):
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    x = (x - state[f"{name}.running_mean"].view(shape)) / (state[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
    if f"{name}.weight" in state:
        x = x * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)
    return x


def vgg_oracle(state, x, sign=sign):
    for index, norm, pooled in ((0, 1, 0), (3, 5, 1), (7, 8, 0), (10, 12, 1), (14, 15, 0), (17, 19, 1)):
        x = x if index == 0 else sign(x)
        x = functional.conv2d(x, sign(state[f"features.{index}.weight"]), state[f"features.{index}.bias"], padding=1)
        x = functional.max_pool2d(x, 2) if pooled else x
        x = batchnorm(x, state, f"features.{norm}").clamp(-1, 1)
    x = x.flatten(1)
    for index in (0, 3, 6):
        x = sign(x) @ sign(state[f"classifier.{index}.weight"]).T + state[f"classifier.{index}.bias"]
        x = batchnorm(x, state, f"classifier.{index + 1}")
        x = x if index == 6 else x.clamp(-1, 1)
    return x


def resnet_oracle(state, x, shortcut=True, sign=sign):
    x = functional.conv2d(x, sign(state["conv1.weight"]), padding=1)
    x = batchnorm(x, state, "bn1").clamp(-1, 1)
    for block in RESNET_BLOCKS:
        stride = 2 if block in ("layer2.0", "layer3.0") else 1
        out = functional.conv2d(sign(x), sign(state[f"{block}.conv1.weight"]), stride=stride, padding=1)
        out = batchnorm(out, state, f"{block}.bn1").clamp(-1, 1)
        out = functional.conv2d(sign(out), sign(state[f"{block}.conv2.weight"]), padding=1)
        if shortcut and stride == 2:
            x = functional.conv2d(sign(x), sign(state[f"{block}.downsample.0.weight"]), stride=2)
            x = batchnorm(x, state, f"{block}.downsample.1")
        x = out + x if shortcut else out
        x = x if block == RESNET_BLOCKS[-1] else batchnorm(x, state, f"{block}.bn2")
        x = x if block == RESNET_BLOCKS[-1] else x.clamp(-1, 1)
    x = batchnorm(x.mean((2, 3)), state, "bn2").clamp(-1, 1)
    return batchnorm(sign(x) @ sign(state["fc.weight"]).T + state["fc.bias"], state, "bn3")


def bireal_oracle(state, x, sign=sign):
    x = batchnorm(functional.conv2d(x, state["conv1.weight"], padding=1), state, "bn1")
    for unit in [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(4)]:
        stride = 2 if unit in ("layer2.0", "layer3.0") else 1
        out = sign(x + state[f"{unit}.shift.shift"].view(-1, 1, 1))
        out = functional.conv2d(out, sign(state[f"{unit}.conv.weight"]), stride=stride, padding=1)
        if stride == 2:
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
            x = torch.cat([x, x], 1)
        x = batchnorm(out, state, f"{unit}.bn") + x
        x = x.clamp(min=0) + state[f"{unit}.act.weight"].view(-1, 1, 1) * x.clamp(max=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_bireal_counts_by_hand():
    table = summary(resnet_bireal(width=0.5))
    units = [(40, 40)] * 4 + [(40, 80)] + [(80, 80)] * 3 + [(80, 160)] + [(160, 160)] * 3
    assert table["binary_weights"].sum() == sum(9 * before * after for before, after in units)
    # The image layer, its BatchNorm, thresholds, BatchNorm and slopes of the units, the last layer.
    floats = 27 * 40 + 2 * 40 + sum(before + 3 * after for before, after in units) + 161 * 10
    assert table["floats"].sum() == floats
    assert table["statistics"].sum() == 2 * 40 + sum(2 * after for _, after in units)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_bireal_forward(seed, binary):
    model = randomized(resnet_bireal(**SMALL, binary=binary), seed)
    x = image(model)
    expected = bireal_oracle(model.state_dict(), x, sign if binary else lambda values: values)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_vgg_forward(seed):
    model = randomized(vgg_cifar10_binary(**SMALL), seed)
    x = image(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), vgg_oracle(model.state_dict(), x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_resnet_forward(seed, shortcut):
    model = randomized(resnet_binary(**SMALL, shortcut=shortcut), seed)
    x = image(model)
    expected = resnet_oracle(model.state_dict(), x, shortcut)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def by_hand_vgg(channels, hidden, before, classes):
    """The float VGG as one flat list of torch's own layers."""
    layers = []
    for index, after in enumerate(channels):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        layers += [nn.MaxPool2d(2)] if index % 2 else []
        layers += [nn.BatchNorm2d(after), nn.Hardtanh()]
        before = after
    layers += [nn.Flatten(), nn.Linear(4 * before, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes), nn.BatchNorm1d(classes, affine=False))


def test_float_vgg_is_the_sequential_of_torchs_layers():
    torch.manual_seed(0)
    model = vgg_cifar10_binary(**SMALL, binary=False)
    torch.manual_seed(0)
    twin = by_hand_vgg((19, 19, 38, 38, 77, 26), 51, before=2, classes=7)
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
    x, labels = image(model, batch=8).float(), torch.arange(8) % 7
    for network in (model, twin):
        functional.cross_entropy(network(x), labels).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs) and torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("shortcut", [True, False])
def test_float_resnet_forward(shortcut):
    model = randomized(resnet_binary(**SMALL, shortcut=shortcut, binary=False))
    x = image(model)
    expected = resnet_oracle(model.state_dict(), x, shortcut, sign=lambda values: values)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@every_network
def test_float_form_has_the_names_shapes_and_first_weights_of_the_binarized(make):
    networks = []
    for binary in (True, False):
        torch.manual_seed(0)
        networks.append(make(**SMALL, binary=binary))
    binarized, floats = networks
    states = [network.state_dict() for network in networks]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert floats.config == binarized.config | {"binary": False} and "binary" not in binarized.config
    assert not binarized_weights(floats)
    assert not [m for m in floats.modules() if type(m).__name__.startswith("Binarize") and hasattr(m, "weight")]
    again = build(floats.name, **floats.config)
    assert str(again) == str(floats)


@every_network
def test_summary_of_the_float_form(make):
    floats, binarized = summary(make(**SMALL, binary=False)), summary(make(**SMALL))
    assert floats["binary_weights"].sum() == 0
    assert list(floats["floats"]) == list(binarized["floats"] + binarized["binary_weights"])
    assert list(floats["packed_bytes"]) == list(floats["float32_bytes"]) == list(binarized["float32_bytes"])
    assert list(floats["macs"]) == list(binarized["macs"]) and floats["macs"].sum() > 0
    assert set(floats["type"]) == {name.removeprefix("Binarize") for name in binarized["type"]}


@pytest.mark.parametrize("make", [vgg_cifar10_binary, resnet_binary])
def test_only_the_first_layer_sees_real_inputs(make):
    model = make(**SMALL).eval()
    seen = {}
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in binarized_weights(model)]
    hooks = [layer.register_forward_hook(lambda m, i, o: seen.update({m: (i[0], o)})) for layer in layers]
    with torch.no_grad():
        model(image(model).float())
        for hook in hooks:
            hook.remove()
        unchanged = [torch.equal(layer(sign(seen[layer][0])), seen[layer][1]) for layer in layers]
    assert unchanged == [False] + [True] * (len(layers) - 1)


def test_vgg_pools_before_batchnorm():
    model = vgg_cifar10_binary(**SMALL)
    sizes = []
    for module in model.features:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, i, o: sizes.append(i[0].shape[-1]))
    model(torch.zeros(2, 2, 16, 16))
    assert sizes == [16, 8, 8, 4, 4, 2]


def test_last_block_ends_without_batchnorm_and_hardtanh():
    model = randomized(resnet_binary(**SMALL))
    blocks = {name: model.get_submodule(name) for name in RESNET_BLOCKS}
    highest = {}
    for name, block in blocks.items():
        block.register_forward_hook(lambda m, i, o, name=name: highest.update({name: o.abs().max().item()}))
    with torch.no_grad():
        model(image(model))
    assert all(highest[name] <= 1 for name in RESNET_BLOCKS[:-1])
    assert highest[RESNET_BLOCKS[-1]] > 2


@every_network
def test_gradients_reach_every_parameter(make):
    torch.manual_seed(0)
    model = make(**SMALL).double().train()
    x = image(model, batch=8)
    labels = torch.arange(8) % 7
    functional.cross_entropy(model(x), labels).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # A bias before BatchNorm changes nothing, so its gradient may be zero; a weight's may not.
    assert [name for name in binarized_weights(model) if not model.get_parameter(name).grad.any()] == []


# ---------------------------------------------------------------- loading, copying, the summary


def published_resnet_state(model, prefix=""):
    """The state_dict of the published network, which declares a BatchNorm it never uses."""
    width = model.layer3[-1].conv2.weight.shape[0]
    unused = {"weight": torch.ones(width), "bias": torch.zeros(width), "running_mean": torch.zeros(width)}
    unused |= {"running_var": torch.ones(width), "num_batches_tracked": torch.tensor(3)}
    state = model.state_dict() | {f"layer3.1.bn2.{entry}": value for entry, value in unused.items()}
    return {prefix + name: value for name, value in state.items()}


def test_resnet_loads_the_published_keys_strictly():
    source, model = randomized(resnet_binary(**SMALL), seed=1), resnet_binary(**SMALL).double().eval()
    state = published_resnet_state(source)
    names = set(state)
    model.load_state_dict(state, strict=True)
    assert set(state) == names, "the caller's dict was changed"
    x = image(model)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_other_unknown_keys_are_refused():
    model = resnet_binary(**SMALL)
    state = published_resnet_state(model)
    state["layer3.0.bn9.weight"] = state.pop("layer3.1.bn2.weight")
    with pytest.raises(RuntimeError, match=r"layer3\.0\.bn9\.weight"):
        model.load_state_dict(state)


def test_published_keys_load_into_a_copy_and_a_wrapped_network():
    source = randomized(resnet_binary(**SMALL), seed=1)
    copied = copy.deepcopy(resnet_binary(**SMALL)).double().eval()
    copied.load_state_dict(published_resnet_state(source))
    wrapped = nn.DataParallel(resnet_binary(**SMALL).double()).eval()
    wrapped.load_state_dict(published_resnet_state(source, prefix="module."))
    x = image(source)
    with torch.no_grad():
        assert torch.equal(copied(x), source(x)) and torch.equal(wrapped(x), source(x))


@every_network
def test_deepcopy_is_independent(make):
    model = randomized(make(**SMALL))
    x = image(model)
    with torch.no_grad():
        before = model(x)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), before)
        for weight in binarized_weights(copied).values():
            weight.neg_()
        assert not torch.equal(copied(x), before)
        assert torch.equal(model(x), before)


@every_network
@pytest.mark.parametrize("training", [True, False])
def test_summary_changes_nothing(make, training):
    model = make(**SMALL).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = summary(model), summary(model)
    assert first.equals(second)  # and no hook of the first call is left
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_summary_counts_what_layers_share_once():
    model = resnet_bireal(width=0.05, input_size=8, depth=20)
    expected = summary(model)
    first, second = model.layer1[1:3]
    second.conv.weight = first.conv.weight  # a weight in two layers
    model.layer1[3] = first  # layers that are used twice
    table = summary(model)
    weights = first.conv.weight.numel()
    assert table["binary_weights"].sum() == expected["binary_weights"].sum() - 2 * weights
    assert table["macs"].tolist() == expected["macs"].tolist()
    parameters = sum(x.numel() for x in model.parameters())
    assert table["binary_weights"].sum() + table["floats"].sum() == parameters
    assert table["statistics"].sum() == sum(x.numel() for x in model.buffers() if x.is_floating_point())


def test_summary_rows_follow_the_forward_pass():
    table = summary(vgg_cifar10_binary(width=0.125, in_channels=1, input_size=8)).set_index("layer")
    convolutions, norms = (0, 3, 7, 10, 14, 17), (1, 5, 8, 12, 15, 19)
    expected = [f"features.{i}" for pair in zip(convolutions, norms) for i in pair]
    expected += [f"classifier.{i}" for i in (0, 1, 3, 4, 6, 7)]
    assert list(table.index) == expected
    assert list(table["output"].iloc[:4]) == ["48x8x8", "48x8x8", "48x8x8", "48x4x4"]
    row = table.loc["features.3"]
    assert (row["type"], row["binary_weights"], row["floats"]) == ("BinarizeConv2d", 48 * 48 * 9, 48)
    assert (row["packed_bytes"], row["macs"]) == (48 * 48 * 9 // 8 + 4 * 48, 48 * 48 * 9 * 64)
    last = table.loc["classifier.7"]
    assert (last["output"], last["floats"], last["statistics"], last["float32_bytes"]) == ("10", 0, 20, 80)
