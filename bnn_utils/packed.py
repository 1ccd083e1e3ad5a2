"""The deployed form of a binarized network: 1 bit a weight, integer thresholds, XNOR and popcount on the CPU."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnn_utils.kernels import workers
from bnn_utils.layers import BINARIZED
from bnn_utils.models import BasicBlock, BinarizedResNet, BinarizedVGG, BiRealResNet, BiRealUnit, Network, build
from bnn_utils.packed_layers import Affine, Numbers, PackedLayer, shifted_signs
from bnn_utils.system import one_thread

State = tuple[Tensor, ...]  # of a chunk of images, between two stages


class PackedModel(Network):
    """A packed network, made by `pack`: from images (batch, channels, height, width) to logits (batch, classes).

    It computes on the CPU, with torch's number of threads. Its layers bear the names of the float network's.

    Attributes:
        stages: what is computed one after another, as the float network's modules, by name, that each stage stands for.
    """

    # How many images go through together: as many as keep what the first layer on the way puts out, in numbers, within
    # the caches, but at least so many that the calls themselves do not show.
    images, numbers = 16, 3 << 16

    def __init__(self, model: BinarizedVGG | BinarizedResNet | BiRealResNet, stages: list[tuple[str, ...]]):
        super().__init__()
        self.name, self.config = model.name, dict(model.config)
        self.trained_on = model.trained_on
        self.stages = stages

    def _packed(self, model: Any, stage: int) -> dict[str, nn.Module]:
        """Return the modules of one stage, by name, packed from those of `model`."""
        raise NotImplementedError

    def _step(self, stage: int, state: State) -> State:
        """Run one stage on what the one before put out; the first takes a chunk of images, the last gives logits."""
        raise NotImplementedError

    def _pack(self, model: nn.Module, stages: Iterable[int]) -> None:
        for stage in stages:
            for name, packed in self._packed(model, stage).items():
                holder, _, own = name.rpartition(".")
                self.get_submodule(holder).add_module(own, packed)

    def repack(self, model: nn.Module, stages: Iterable[int]) -> None:
        """Pack some stages anew, from the numbers that `model` has now.

        Args:
            model: a network that `pack` takes, with the name and the configuration of the one packed here.
            stages: numbers of stages, from 0.

        Raises:
            TypeError: a network that `pack` refuses.
            ValueError: a network of another name or configuration, or a stage that there is not.
        """
        _check(model)
        stages = [self._checked(stage) for stage in stages]
        own, other = ((network.name, network.config) for network in (self, model))
        if other != own:
            raise ValueError("expected a {} of {}, got a {} of {}".format(*own, *other))
        self._pack(model, stages)

    def stage_of(self, name: str) -> int:
        """Return the number of the stage that computes with a tensor.

        Args:
            name: in the state_dict of the packed network, or of the float network, whose BatchNorm belongs to the
                stage that it is folded into.

        Raises:
            ValueError: no stage does.
        """
        for stage, modules in enumerate(self.stages):
            if any(name.startswith(f"{module}.") for module in modules):
                return stage
        raise ValueError(f"no stage of {self.name} computes with {name!r}, expected the name of a stored tensor")

    def _run(self, state: State, start: int, stop: int) -> State:
        for stage in range(start, stop):
            state = self._step(stage, state)
        return state

    def _each(self, function: Callable[[Any], Any], chunks: Sequence[Any]) -> list[Any]:
        threads = min(torch.get_num_threads(), len(chunks))
        if threads == 1:
            return [function(chunk) for chunk in chunks]
        # A thread a chunk: they never wait for each other, so another program's work slows them no more than it must.
        with one_thread():
            return list(workers("chunks", threads).map(function, chunks))

    def _chunks(self, x: Tensor) -> Sequence[Tensor]:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4:
            raise ValueError(
                "a packed network wants float32 images (batch, channels, height, width) on the CPU, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        return x.detach().tensor_split(self._count(0, len(x), x[:1, 0].numel()))

    def _count(self, stage: int, images: int, positions: int) -> int:
        """Return how many chunks a stage takes images in, from the size of the map that it reads."""
        modules = (module for name in self.stages[stage] for module in self.get_submodule(name).modules())
        first = next(own for own in modules if isinstance(own, PackedLayer | Numbers) and hasattr(own, "weight"))
        channels, stride = (first.channels, first.stride) if isinstance(first, PackedLayer) else (len(first.weight), 1)
        numbers = channels * positions // stride**2
        return max(1, -(-images // max(self.images, self.numbers // max(1, numbers))))

    def _checked(self, stage: int) -> int:
        if not 0 <= stage < len(self.stages):
            raise ValueError(f"stage must lie in 0..{len(self.stages) - 1}, got {stage}")
        return stage

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._each(lambda chunk: self._run((chunk,), 0, len(self.stages))[0], self._chunks(x)))

    @torch.no_grad()
    def before(self, stage: int, x: Tensor) -> list[State]:
        """Return what the stages before `stage` make of images, a state a chunk, for `after` to go on from.

        A state is a tuple of tensors: words of bits, and where a ResNet's shortcut carries numbers on, float32 too.

        Args:
            stage: in 0..len(stages) - 1; 0 leaves the images as they are.
            x: images, as the network takes them.

        Raises:
            ValueError: another stage, or other images.
        """
        self._checked(stage)
        states = self._each(lambda chunk: self._run((chunk,), 0, stage), self._chunks(x))
        if stage == 0:
            return states
        # Maps become smaller on the way: what comes later can take more images together.
        count = min(len(states), self._count(stage, len(x), states[0][-1][:1, ..., 0].numel()))
        return list(zip(*(torch.cat(parts).tensor_split(count) for parts in zip(*states, strict=True)), strict=True))

    @torch.no_grad()
    def after(self, stage: int, states: Sequence[State]) -> Tensor:
        """Return the logits that `forward` gives, to the last bit, from states that `before` gave.

        Args:
            stage: that `before` was given.
            states: of this network, or of one whose stages before `stage` are the same.

        Raises:
            ValueError: another stage.
        """
        self._checked(stage)
        return torch.cat(self._each(lambda state: self._run(state, stage, len(self.stages))[0], states))


class PackedVGG(PackedModel):
    """`BinarizedVGG`, packed: an image layer in floats, then integers and bits alone up to the last BatchNorm.

    A stage is a layer and the BatchNorm after it.
    """

    features: nn.ModuleDict
    classifier: nn.ModuleDict

    def __init__(self, model: BinarizedVGG):
        stages: list[tuple[str, ...]] = []
        pools: list[int] = []
        for part in ("features", "classifier"):
            layers = getattr(model, part)
            for index, layer in enumerate(layers):
                if isinstance(layer, BINARIZED):
                    pooled = isinstance(layers[index + 1], nn.MaxPool2d)
                    stages.append((f"{part}.{index}", f"{part}.{index + 1 + pooled}"))
                    pools.append(2 if pooled else 1)
        super().__init__(model, stages)
        self.pools = pools  # of each stage
        self.features, self.classifier = nn.ModuleDict(), nn.ModuleDict()
        self._pack(model, range(len(stages)))

    def _packed(self, model: Any, stage: int) -> dict[str, nn.Module]:
        name, norm_name = self.stages[stage]
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        side = int(self.config["input_size"]) // 8 if name == "classifier.0" else 1
        if 0 < stage < len(self.stages) - 1:
            return {name: PackedLayer(layer, side).fold(norm, layer.bias)}
        return {name: PackedLayer(layer, side, keep_bias=True), norm_name: Affine(norm)}

    def _step(self, stage: int, state: State) -> State:
        (x,), (name, norm_name), size = state, self.stages[stage], self.config["input_size"]
        layer: Any = self.get_submodule(name)
        if 0 < stage < len(self.stages) - 1:
            return (layer.bits(x, self.pools[stage]),)
        norm: Any = self.get_submodule(norm_name)
        if stage > 0:
            return (norm(layer(x) + layer.bias)[0].flatten(1),)
        if x.shape[2:] != (size, size):
            raise ValueError(f"this network wants images of {size} x {size} pixels, got {tuple(x.shape)}")
        return (norm.bits(layer.image(x)),)


def _means(maps: Tensor, images: int) -> Tensor:
    """Return the means over maps (images, height, width, channels), which come from images of so many channels.

    Sums round in the order of memory, in torch that of the image layer; images of one channel are laid out either way.
    """
    layout = torch.contiguous_format if images == 1 else torch.channels_last
    return maps.permute(0, 3, 1, 2).contiguous(memory_format=layout).mean((2, 3))


class _PackedLayers(PackedModel):
    """A packed ResNet: a stage for the image layer, one for each block of layer1 to layer3, and one for what follows.

    The stage of the last block takes the means over its maps too.
    """

    last: tuple[str, ...]
    bn1: Affine
    layer1: nn.ModuleList
    layer2: nn.ModuleList
    layer3: nn.ModuleList

    def __init__(self, model: BinarizedResNet | BiRealResNet):
        layers = ("layer1", "layer2", "layer3")
        blocks = [(f"{layer}.{index}",) for layer in layers for index in range(len(getattr(model, layer)))]
        super().__init__(model, [("conv1", "bn1"), *blocks, self.last])
        self._pack(model, [0])
        for layer in layers:  # after the image layer in memory, as in the float network
            self.add_module(layer, nn.ModuleList())
        self._pack(model, range(1, len(self.stages)))


class PackedBlock(nn.Module):
    """`BasicBlock`, packed: the shortcut stays in floats, the convolution inside becomes bits by a threshold."""

    def __init__(self, block: BasicBlock):
        super().__init__()
        self.conv1 = PackedLayer(block.conv1).fold(block.bn1, None)
        self.conv2 = PackedLayer(block.conv2)
        self.bn2 = None if block.bn2 is None else Affine(block.bn2)
        self.downsample: nn.ModuleList | None = None
        if block.downsample is not None:
            convolution, norm = block.downsample.children()
            self.downsample = nn.ModuleList([PackedLayer(convolution), Affine(norm)])
        self.shortcut, self.clamp = block.shortcut, block.tanh2 is not None

    @property
    def reads_values(self) -> bool:
        """Whether the shortcut carries the values of the block before, not their signs alone."""
        return self.shortcut and self.downsample is None

    def forward(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's values and their signs, from those of the block before."""
        dots = self.conv2(self.conv1.bits(words))
        if self.downsample is not None:
            convolution, norm = self.downsample
            x, _ = norm(convolution(words))
        shortcut = x if self.shortcut else None
        if self.bn2 is None:
            return (dots.float() if shortcut is None else dots + shortcut), words
        return self.bn2(dots, shortcut, clamp=self.clamp)


class PackedResNet(_PackedLayers):
    """`BinarizedResNet`, packed: floats along the shortcuts, bits inside the blocks."""

    last = ("bn2", "fc", "bn3")
    conv1: PackedLayer
    bn2: Affine
    fc: PackedLayer
    bn3: Affine

    def _packed(self, model: Any, stage: int) -> dict[str, nn.Module]:
        if stage == 0:
            return {"conv1": PackedLayer(model.conv1), "bn1": Affine(model.bn1)}
        if stage == len(self.stages) - 1:
            return {"bn2": Affine(model.bn2), "fc": PackedLayer(model.fc, keep_bias=True), "bn3": Affine(model.bn3)}
        (name,) = self.stages[stage]
        return {name: PackedBlock(model.get_submodule(name))}

    def _step(self, stage: int, state: State) -> State:
        if stage == len(self.stages) - 1:
            (means,) = state
            words = self.bn2.bits(means[:, None, None])
            return (self.bn3(self.fc(words) + self.fc.bias)[0].flatten(1),)
        blocks = [*self.layer1, *self.layer2, *self.layer3]
        if stage == 0:
            values, words = self.bn1(self.conv1.image(*state), clamp=True)
        else:
            values, words = blocks[stage - 1](*state)
        if stage == len(blocks):
            return (_means(values, self.conv1.inputs),)
        # What the next block does not read would only take memory where states are kept.
        return values if blocks[stage].reads_values else values.new_empty(0), words


class PackedUnit(nn.Module):
    """`BiRealUnit`, packed: the stream and all that is added to it stay in floats, the convolution reads bits."""

    def __init__(self, unit: BiRealUnit):
        super().__init__()
        self.shift = Numbers(offset=unit.shift.shift)
        self.conv = PackedLayer(unit.conv)
        self.bn = Affine(unit.bn)
        self.act = Numbers(slope=unit.act.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after the unit, float32 (images, height', width', channels), from that before it."""
        dots = self.conv(shifted_signs(x, self.shift.offset))
        if self.conv.stride > 1:
            with one_thread():
                x = functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).repeat(1, 1, 1, 2)
        return self.bn.rectified(dots, x, self.act.slope)


class PackedBiReal(_PackedLayers):
    """`BiRealResNet`, packed: bits in the convolutions, floats in the stream, the image layer and the last one."""

    last = ("fc",)
    conv1: Numbers
    fc: Numbers

    def _packed(self, model: Any, stage: int) -> dict[str, nn.Module]:
        if stage == 0:
            return {"conv1": Numbers(weight=model.conv1.weight), "bn1": Affine(model.bn1)}
        if stage == len(self.stages) - 1:
            return {"fc": Numbers(weight=model.fc.weight, bias=model.fc.bias)}
        (name,) = self.stages[stage]
        return {name: PackedUnit(model.get_submodule(name))}

    def _step(self, stage: int, state: State) -> State:
        (x,) = state
        if stage == 0:
            with one_thread():
                x = functional.conv2d(x.contiguous(memory_format=torch.channels_last), self.conv1.weight, padding=1)
            return (self.bn1(x.permute(0, 2, 3, 1).contiguous())[0],)
        if stage == len(self.stages) - 1:
            # In double precision and row by row: the result is the same in whatever batches images come.
            products = x[:, None].double() * self.fc.weight.double()
            return ((products.sum(2) + self.fc.bias.double()).float(),)
        unit: Any = self.get_submodule(self.stages[stage][0])
        x = unit(x)
        return (_means(x, self.conv1.weight.shape[1]) if stage == len(self.stages) - 2 else x,)


@lru_cache(maxsize=8)
def _as_built(name: str, *config: tuple[str, Any]) -> str:
    """Return what a network's layers print when nobody has replaced any."""
    with torch.random.fork_rng(devices=[]):  # building draws weights
        return str(build(name, **dict(config)))


_KINDS: dict[type[nn.Module], Any] = {
    BinarizedVGG: PackedVGG,
    BinarizedResNet: PackedResNet,
    BiRealResNet: PackedBiReal,
}


def _check(model: nn.Module) -> None:
    """Raise TypeError for a network that cannot be packed."""
    if not isinstance(model, Network) or type(model) not in _KINDS:  # no subclass: it may differ
        raise TypeError(f"only networks of bnn_utils.models can be packed, got {type(model).__name__}")
    if not model.config.get("binary", True):
        raise TypeError(f"only binarized networks can be packed, got the float form of {model.name}")
    known = _as_built(model.name, *model.config.items())
    for own, line in zip_longest(str(model).splitlines(), known.splitlines(), fillvalue="nothing"):
        if own != line:
            raise TypeError(f"only networks as bnn_utils.models builds them can be packed, got {own.strip()}")
    if any(parameter.dtype != torch.float32 or parameter.device.type != "cpu" for parameter in model.parameters()):
        raise TypeError("only float32 networks on the CPU can be packed")


def pack(model: nn.Module) -> PackedModel:
    """Return the deployed form of a trained VGG or ResNet; the integers of its layers are the float network's.

    BatchNorm and sign become one integer threshold and a direction per channel where only the sign goes on (hidden
    layers of the VGG, the convolution inside a block of the published ResNet). They stay a scale and a shift in floats
    after the image layer, along a ResNet's shortcuts, and after the last layer. Numbers of a damaged network, NaN and
    infinity too, are taken as they are. The packed network holds copies; it does not follow later changes of `model`.

    Args:
        model: a network of `bnn_utils.models`, float32, on the CPU.

    Returns:
        A module from float32 images (batch, channels, height, width) to logits (batch, classes), whose buffers are
        what a device stores; see `PackedLayer`, `Affine` and `Numbers`.

    Raises:
        TypeError: another kind of network, one whose layers were replaced by others, or one that is not float32 on
            the CPU.
    """
    _check(model)
    return _KINDS[type(model)](model).eval()


def deployed(model: nn.Module) -> nn.Module:
    """Return `model` packed where it can be; else `model` itself.

    The predictions are the same up to coincidences of rounding: torch adds a bias and the pixels of an image in an
    order of its own, which can decide a sign only where BatchNorm gives zero up to the last digits.
    """
    try:
        return pack(model)
    except TypeError:
        return model
