"""How a network is trained: one dataclass, from whose fields the command line's flags, help and checks follow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class Allowed(NamedTuple):
    """Which numbers a setting may be: in words that go after "must", and as a test."""

    words: str
    test: Callable[[Any], bool]


POSITIVE = Allowed("be a positive number", lambda x: 0 < x < math.inf)
SHARE = Allowed("lie in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_ONE = Allowed("lie in [0, 1)", lambda x: 0 <= x < 1)


def _setting(
    default: Any, allowed: Allowed | tuple[str, ...] | None = None, help: str | None = None, **more: str
) -> Any:
    """Return a field of Recipe.

    Args:
        default: of the setting; its type is the flag's.
        allowed: which numbers, or which words, it may be; None for any.
        help: what the command line says of it.
        more: metavar, as argparse has it; flag, where that is not named as the field is; also, a word that the command
            line takes and turns into one of those allowed.
    """
    numbers, choices = (allowed, None) if isinstance(allowed, Allowed) else (None, allowed)
    return field(default=default, metadata={"allowed": numbers, "choices": choices, "help": help, **more})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the published recipe.

    Attributes:
        epochs: passes over the training part.
        batch_size: images a step, of all processes together; a last incomplete batch is left out.
        lr: learning rate of the first step, which a cosine takes down to 1e-5 (or to lr, if that is less).
        weight_decay: L2 penalty on every parameter, added to its gradient as torch's Adam and SGD do.
        optimizer: "adam", or "sgd" with momentum 0.9.
        precision: of the arithmetic in training, "float32" or "bfloat16" (weights stay float32).
        seed: of the order of images, their crops and flips, and of the bit errors.
        damage_rate: bit error probability of the binarized weights in training, in [0, 1); 0 trains without errors.
            Otherwise a step averages the gradient of the clean loss and that of the loss at weights of which each is
            flipped with this probability, drawn anew every step. The latent weights take the average; errors never
            change them.
        damage_spare: the weights of a layer that has less than this share, in [0, 1], of all binarized weights are
            not flipped: those that a repair can guard for little, see `bnn_utils.repair.few_bits`.
        damage_statistics: by which BatchNorm normalizes the damaged network in training. "batch", its own batch's,
            take out of each channel what its wrong weights add to all images alike, which a deployed network has to
            stand; "running", those of the clean network, are what is deployed, and suit a network that is trained
            already (from random weights, training with them can fail).
        damage_below: errors start after the first epoch whose mean clean cross-entropy in training was below this
            many nats, and then stay. The default is the source's for 10 classes; more classes need a higher one.
        loss: what is trained, "cross-entropy" or "margin", see `bnn_utils.losses.margin_loss`.
        margin: of the margin loss, in units of a logit. Both published networks end with a BatchNorm that has no scale
            and no shift, so that a unit is the standard deviation of the class's logit over a batch. The default is
            the largest value that all images of a class can reach if c = 10 classes are equally frequent, sqrt(c - 1).
        label_smoothing: the share of the cross-entropy's target, in [0, 1), that all classes get alike; the image's
            own class gets the rest.
        teacher_share: the share of the loss, in [0, 1], that is `distillation_loss` of a teacher's logits; the rest is
            the cross-entropy. Above 0 it takes a teacher, see `train`.
        temperature: of that loss, a positive number.
        compile: train with torch.compile, which joins the many passes over activations into few; it takes up to a
            minute first, and a C++ compiler on the CPU.

    Raises:
        ValueError: a field outside its range.

    Source: the published recipe, see README.md. Errors: D. Stutz et al., Bit Error Robustness for Energy-Efficient
    DNN Accelerators, MLSys 2021 (arXiv:2006.13977), whose published code starts them below 1.75 on CIFAR-10. Label
    smoothing: C. Szegedy et al., Rethinking the Inception Architecture, CVPR 2016 (arXiv:1512.00567), section 7.
    """

    epochs: int = _setting(100, Allowed("be at least 1", lambda x: x >= 1))
    batch_size: int = _setting(256, Allowed("be at least 2, since BatchNorm compares images", lambda x: x >= 2))
    lr: float = _setting(5e-3, POSITIVE, "falls to 1e-5 along a cosine")
    weight_decay: float = _setting(0.0, Allowed("be zero or a positive number", lambda x: 0 <= x < math.inf))
    optimizer: str = _setting("adam", ("adam", "sgd"))
    precision: str = _setting(
        "float32", ("float32", "bfloat16"), "of training's arithmetic; auto: the fastest on this processor", also="auto"
    )
    seed: int = _setting(0, Allowed("lie in [0, 2**64)", lambda x: 0 <= x < 2**64))  # torch takes no more
    damage_rate: float = _setting(
        0.0,
        BELOW_ONE,
        "train for errors: flip each binarized weight with this probability, anew every step",
        metavar="P",
        flag="--damage-train-rate",
    )
    damage_spare: float = _setting(
        0.0, SHARE, "spare layers with less than this share of all weights, which a repair guards", metavar="S"
    )
    damage_statistics: str = _setting(
        "batch", ("batch", "running"), "by which BatchNorm normalizes the damaged network in training"
    )
    damage_below: float = _setting(
        1.75, POSITIVE, "the cross-entropy in nats below which errors start (%(default)s)", metavar="L"
    )
    loss: str = _setting("cross-entropy", ("cross-entropy", "margin"), "what is trained")
    margin: float = _setting(3.0, POSITIVE, "of the margin loss (%(default)s)", metavar="B")
    label_smoothing: float = _setting(
        0.0, BELOW_ONE, "the share of the cross-entropy's target that all classes get alike", metavar="S"
    )
    teacher_share: float = _setting(
        0.0, SHARE, "the share of the loss that follows the teacher; the rest is cross-entropy", metavar="A"
    )
    temperature: float = _setting(
        1.0, POSITIVE, "of the teacher's and the network's softmax in that share (%(default)g)", metavar="T"
    )
    compile: bool = _setting(False, help="train with torch.compile, which needs a C++ compiler")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, allowed = getattr(self, setting.name), setting.metadata["allowed"]
            choices = setting.metadata["choices"]
            if allowed is not None and not allowed.test(value):
                raise ValueError(f"{setting.name} must {allowed.words}, got {value}")
            if choices is not None and value not in choices:
                raise ValueError(f"unknown {setting.name} {value!r}, expected one of {', '.join(choices)}")
        for name in ("label_smoothing", "teacher_share"):
            if self.loss != "cross-entropy" and getattr(self, name):
                raise ValueError(f"{name} goes with the loss cross-entropy, got {getattr(self, name)} with {self.loss}")
