"""The two published networks and a modern ResNet, at any width, binarized or not; what their layers cost."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils.layers import BINARIZED, BinarizeConv2d, BinarizeLinear, Conv2d, PReLU, Shift


class Network(nn.Module):
    """A network that tells what it is, as all of this module and their packed forms do.

    Attributes:
        name: in MODELS.
        config: the arguments that build it again.
        trained_on: what is known of the images that it was trained on, see `bnn_utils.checkpoints.load`.
    """

    name: str
    config: dict[str, Any]
    trained_on: Mapping[str, Any] = {}


# A network that torch.compile has wrapped is no Network, but gives the attributes of the one inside.


def name_of(model: nn.Module) -> str:
    """Return the name that tables give to a network: its own, or that of its class."""
    return getattr(model, "name", type(model).__name__)


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments that build a network of this module again; None for others."""
    return getattr(model, "config", None)


def trained_on(model: nn.Module) -> Mapping[str, Any]:
    """Return what a network that `bnn_utils.checkpoints.load` returned knows of its images; nothing of another one."""
    return getattr(model, "trained_on", {})


def _channels(published: int, width: float) -> int:
    return max(1, round(published * width))


def _convolution(
    binary: bool, before: int, after: int, kernel: int, *, binarize_input: bool = True, **options: Any
) -> nn.Conv2d:
    if not binary:
        return Conv2d(before, after, kernel, **options)
    return BinarizeConv2d(before, after, kernel, binarize_input=binarize_input, **options)


def _linear(binary: bool, before: int, after: int) -> nn.Linear:
    return BinarizeLinear(before, after) if binary else nn.Linear(before, after)


def _checked(divisor: int, binary: bool, **config: Any) -> dict[str, Any]:
    """Return the configuration of a network whose images have sides of a multiple of `divisor` pixels, as it is kept.

    Raises:
        ValueError: an argument outside its range.
    """
    if config["num_classes"] < 2:
        raise ValueError(f"num_classes must be at least 2, got {config['num_classes']}")
    if not 0 < config["width"] <= 4:
        raise ValueError(f"width must lie in (0, 4], got {config['width']}")
    if config["in_channels"] < 1:
        raise ValueError(f"in_channels must be at least 1, got {config['in_channels']}")
    if config["input_size"] < divisor or config["input_size"] % divisor:
        raise ValueError(f"input_size must be a positive multiple of {divisor}, got {config['input_size']}")
    if not isinstance(config.get("shortcut", True), bool):
        raise ValueError(f"shortcut must be True or False, got {config['shortcut']!r}")
    if config.get("depth", 8) < 8:
        raise ValueError(f"depth must be at least 8, got {config['depth']}")
    # Nothing for binarized networks: their files and runs say the same as before there were float ones.
    return config if binary else {**config, "binary": False}


class BinarizedVGG(Network):
    """The binarized VGG of BinaryNet, untrained.

    At width 1.0: convolutions 384, 384 + pool, 768, 768 + pool, 1536, 512 + pool (pooling before BatchNorm), then
    linear layers 1024, 1024, num_classes; BatchNorm and Hardtanh after each, the last BatchNorm without scale and
    shift and not followed by Hardtanh. Parameter names are those of itayhubara/BinaryNet.pytorch; that network ends
    in a log-softmax, which this one leaves to the loss.

    Args:
        num_classes: outputs, at least 2.
        width: factor on every channel and hidden count, in (0, 4].
        in_channels: of the image, which is not binarized.
        input_size: height and width of the image in pixels, a multiple of 8.
        binary: False builds the float network of the same shape: ordinary convolutions and linear layers in the place
            of the binarized ones, everything else the same.

    Shapes: images (batch, in_channels, input_size, input_size) -> logits (batch, num_classes).

    Raises:
        ValueError: an argument outside its range.

    Source: Hubara et al., Binarized Neural Networks, NeurIPS 2016; the layer list of BinaryNet.pytorch.
    """

    name = "vgg_cifar10_binary"

    def __init__(
        self, num_classes: int = 10, width: float = 1.0, in_channels: int = 3, input_size: int = 32, binary: bool = True
    ):
        super().__init__()
        sizes = dict(num_classes=num_classes, width=width, in_channels=in_channels, input_size=input_size)
        self.config = _checked(8, binary, **sizes)
        channels = [_channels(c, width) for c in (384, 384, 768, 768, 1536, 512)]
        hidden = _channels(1024, width)

        features: list[nn.Module] = []
        before = in_channels
        for index, after in enumerate(channels):
            features.append(_convolution(binary, before, after, 3, padding=1, binarize_input=index > 0))
            if index % 2:
                features.append(nn.MaxPool2d(2))
            features += [nn.BatchNorm2d(after), nn.Hardtanh()]
            before = after
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            _linear(binary, before * (input_size // 8) ** 2, hidden),
            nn.BatchNorm1d(hidden),
            nn.Hardtanh(),
            _linear(binary, hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.Hardtanh(),
            _linear(binary, hidden, num_classes),
            nn.BatchNorm1d(num_classes, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class BasicBlock(nn.Module):
    """Two binarized 3x3 convolutions and a shortcut, added before the second BatchNorm and Hardtanh.

    The shortcut carries real values: the block's input, or its binarized 1x1 convolution with BatchNorm where the
    shape changes. `last` leaves out the second BatchNorm and Hardtanh; `shortcut=False` leaves out the shortcut.
    """

    def __init__(
        self,
        before: int,
        after: int,
        stride: int = 1,
        *,
        last: bool = False,
        shortcut: bool = True,
        binary: bool = True,
    ):
        super().__init__()
        self.conv1 = _convolution(binary, before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.tanh1 = nn.Hardtanh()
        self.conv2 = _convolution(binary, after, after, 3, padding=1, bias=False)
        self.bn2 = None if last else nn.BatchNorm2d(after)
        self.tanh2 = None if last else nn.Hardtanh()
        self.downsample: nn.Module | None = None
        if shortcut and (stride != 1 or before != after):
            self.downsample = nn.Sequential(
                _convolution(binary, before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.tanh1(self.bn1(self.conv1(x))))
        if self.shortcut:
            out = out + (x if self.downsample is None else self.downsample(x))
        if self.bn2 is not None:
            out = self.bn2(out)
        return out if self.tanh2 is None else self.tanh2(out)


class BinarizedResNet(Network):
    """The binarized ResNet of BinaryNet for small images, untrained.

    At width 1.0: a convolution to 80 channels, three stages of (depth - 2) // 6 basic blocks with 80, 160 and 320
    channels, average pooling, BatchNorm, Hardtanh, a binarized linear layer and a last BatchNorm. The last block ends
    without BatchNorm and Hardtanh. Parameter names are those of itayhubara/BinaryNet.pytorch, whose network also
    declares, and never uses, a BatchNorm in that block: such keys are dropped on loading.

    Args:
        depth: at least 8; 18 gives two blocks a stage.
        input_size: height and width of the image in pixels, a multiple of 4.
        shortcut: True adds it to the sums of the second convolution, as published, beside which it is small; False
            leaves out every shortcut, to see what they carry.
        num_classes, width, in_channels, binary: as in `BinarizedVGG`; shapes and errors too.

    Source: He et al., Deep Residual Learning, CVPR 2016, section 4.2; the layer list of BinaryNet.pytorch.
    """

    name = "resnet_binary"
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 18,
        width: float = 1.0,
        in_channels: int = 3,
        input_size: int = 32,
        shortcut: bool = True,
        binary: bool = True,
    ):
        super().__init__()
        sizes = dict(num_classes=num_classes, depth=depth, width=width, in_channels=in_channels, input_size=input_size)
        self.config = _checked(4, binary, **sizes, shortcut=shortcut)
        blocks = (depth - 2) // 6
        channels = [_channels(c, width) for c in (80, 160, 320)]
        self.conv1 = _convolution(binary, in_channels, channels[0], 3, padding=1, bias=False, binarize_input=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.tanh1 = nn.Hardtanh()
        before = channels[0]
        for stage, after in enumerate(channels, start=1):
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                last = stage == 3 and block == blocks - 1
                layer.append(BasicBlock(before, after, stride, last=last, shortcut=shortcut, binary=binary))
                before = after
            setattr(self, f"layer{stage}", layer)
        self.bn2 = nn.BatchNorm1d(before)
        self.tanh2 = nn.Hardtanh()
        self.fc = _linear(binary, before, num_classes)
        self.bn3 = nn.BatchNorm1d(num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The published network declares a BatchNorm in its last block and never calls it.
        last = f"{prefix}layer3.{len(self.layer3) - 1}.bn2."
        for key in [key for key in state_dict if key.startswith(last)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tanh1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.tanh2(self.bn2(x.mean((2, 3))))
        return self.bn3(self.fc(x))


class BiRealUnit(nn.Module):
    """One binarized 3x3 convolution with a shortcut of its own: y = PReLU(BN(conv(sign(x + shift))) + shortcut(x)).

    x and y are real-valued, and nothing clamps them: only the convolution's input is binarized. With `stride` 2 the
    shortcut averages 2x2 pixels and lays two copies of the result side by side, so it has no weights.
    """

    def __init__(self, before: int, stride: int = 1, *, binary: bool = True):
        super().__init__()
        after = before * stride
        options: dict[str, Any] = dict(gradient="polynomial") if binary else {}
        self.shift = Shift(before)
        self.conv = _convolution(binary, before, after, 3, stride=stride, padding=1, bias=False, **options)
        self.bn = nn.BatchNorm2d(after)
        self.act = PReLU(after)
        self.stride = stride

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return functional.avg_pool2d(x, 2).repeat(1, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.shift(x))) + self.shortcut(x))


class BiRealResNet(Network):
    """A modern binarized ResNet for small images, untrained: one shortcut a convolution, a real-valued stream.

    At width 1.0: a float convolution to 80 channels and BatchNorm, three stages of 2 * ((depth - 2) // 6) units of 80,
    160 and 320 channels, average pooling and a float linear layer; see `BiRealUnit`. ReActNet's activation shifts its
    input and its output as well, by a learned number a channel: here the BatchNorm before it, the threshold of the
    next sign and the next BatchNorm can say the same, so these shifts are left out, and fewer floats are stored.

    Args:
        depth: at least 8; 18 gives four units a stage.
        width: factor on the first channel count, in (0, 4]; each stage has twice the channels of the one before.
        input_size: height and width of the image in pixels, a multiple of 4.
        num_classes, in_channels, binary: as in `BinarizedVGG`; shapes and errors too.

    Source: Liu et al., Bi-Real Net, ECCV 2018 (arXiv:1808.00278): a shortcut a convolution, the polynomial gradient;
    Liu et al., ReActNet, ECCV 2020 (arXiv:2003.03488): learned thresholds and slopes, shortcuts without weights.
    """

    name = "resnet_bireal"
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 18,
        width: float = 1.0,
        in_channels: int = 3,
        input_size: int = 32,
        binary: bool = True,
    ):
        super().__init__()
        sizes = dict(num_classes=num_classes, depth=depth, width=width, in_channels=in_channels, input_size=input_size)
        self.config = _checked(4, binary, **sizes)
        channels = _channels(80, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage in (1, 2, 3):
            layer = nn.Sequential()
            for unit in range(2 * ((depth - 2) // 6)):
                stride = 2 if stage > 1 and unit == 0 else 1
                layer.append(BiRealUnit(channels, stride, binary=binary))
                channels *= stride
            setattr(self, f"layer{stage}", layer)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


# The names by which networks are built.
vgg_cifar10_binary, resnet_binary, resnet_bireal = BinarizedVGG, BinarizedResNet, BiRealResNet
MODELS: dict[str, Callable[..., Network]] = {kind.name: kind for kind in (BinarizedVGG, BinarizedResNet, BiRealResNet)}


def build(name: str, **config: Any) -> Network:
    """Return the network called `name` in MODELS, built with `config`.

    Raises:
        ValueError: there is no such network.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}")
    return MODELS[name](**config)


def summary(model: Network) -> pd.DataFrame:
    """Return what each layer of a network of this module holds and does, one row each, in the order of the pass.

    Columns: layer, type, output (channels x height x width), binary_weights, floats (biases, BatchNorm scale and
    shift, all weights of a float network), statistics (BatchNorm running mean and variance), float32_bytes (every
    number a 32-bit float), packed_bytes (1 bit a binarized weight, the rest 32-bit floats), macs
    (multiply-accumulates for one image). What several layers share counts in the first of them.
    """
    rows: list[dict[str, Any]] = []
    counted: set[int] = set()

    def record(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weights = module.weight.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
        fresh = [x for x in [*module.parameters(), *module.buffers()] if id(x) not in counted]
        counted.update(map(id, fresh))
        binary = weights if isinstance(module, BINARIZED) and any(x is module.weight for x in fresh) else 0
        parameters = sum(x.numel() for x in fresh if isinstance(x, nn.Parameter))
        statistics = sum(x.numel() for x in fresh if x.is_floating_point() and not isinstance(x, nn.Parameter))
        floats = parameters - binary
        rows.append(
            dict(
                layer=name,
                type=type(module).__name__,
                output="x".join(str(n) for n in output.shape[1:]),
                binary_weights=binary,
                floats=floats,
                statistics=statistics,
                float32_bytes=4 * (parameters + statistics),
                packed_bytes=-(-binary // 8) + 4 * (floats + statistics),
                macs=weights * output[0, 0].numel(),
            )
        )

    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_modules()
        if not [*module.children()] and [*module.parameters(), *module.buffers()]
    ]
    side, device = model.config["input_size"], next(model.parameters()).device
    image = torch.zeros(1, model.config["in_channels"], side, side, device=device)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(rows)
