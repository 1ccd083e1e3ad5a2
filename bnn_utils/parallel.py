"""One training shared by the processes that torchrun starts: gradients, BatchNorm and sums over whole batches.

Everything here does nothing where torchrun has not started the process, so that training reads the same.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

T = TypeVar("T")
WAIT_SECONDS = 30  # as long as processes that start together may be apart


class ProcessError(RuntimeError):
    """Another process of the run has ended; what was finished before is kept."""


def launched() -> bool:
    """Return whether torchrun, or what sets the same variables of the environment, has started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def first() -> bool:
    """Return whether this process is the one that writes and prints, before a group is there too."""
    return not launched() or os.environ["RANK"] == "0"


def tell(message: str) -> None:
    """Print what is wrong, once where torchrun has started several processes, in which the same is wrong.

    torchrun ends the others as soon as it sees one end, so they wait until the first has told. Where they wait in
    vain, nothing is wrong there, and they tell themselves.
    """
    if not first():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(WAIT_SECONDS)
    print(message, file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print what is good to know, once."""
    if first():
        print(message, flush=True)


def device(name: str) -> torch.device:
    """Return where this process computes.

    Args:
        name: auto (a GPU if there is one), cpu, cuda or cuda:N; of several processes, each takes a GPU of its own.

    Raises:
        ValueError: another name, or a device that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or cuda:N")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return found


def processes() -> int:
    """Return how many processes train together: those of the group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _end(*_: Any, reason: str = "or torchrun was told to end") -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending; what it says shall not be cut short
    raise ProcessError(f"another process of this run has ended ({reason}); go on with --resume") from None


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, until the context ends; they talk by gloo on the CPU, NCCL on GPUs.

    Args:
        device: where this process computes; on GPUs, one of its own.

    Raises:
        ProcessError: another process has ended, or torchrun, which ends all when one has, was told to end.
    """
    if not launched():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # who waits for a GPU would not hear the signal
        signal.signal(signal.SIGTERM, _end)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        with warnings.catch_warnings():  # of convolutions of one channel, whose layout has two names
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo raises no kind of its own
            _end(reason=str(error).splitlines()[0][:200])
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, handler)


def share(batch: Tensor) -> Tensor:
    """Return this process's part of a batch (n, ...): n / processes neighbours, in the order of the processes."""
    if processes() == 1:
        return batch
    return batch.chunk(processes())[dist.get_rank()]


def total(value: Tensor) -> Tensor:
    """Return `value` summed over all processes, without a gradient."""
    if processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def of_the_first(value: T) -> T:
    """Return what the first process has for `value`, anything that pickle can hold."""
    values = [value]
    if processes() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def averaging(model: nn.Module) -> nn.Module:
    """Return `model`, or a form of it with the same parameters whose backward averages gradients over all processes.

    The gradient of two backward passes is right too: what the first has averaged is the same everywhere, and so it
    is its own average in the second.
    """
    if processes() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model)


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each of them uses it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class _BatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm, which computes on GPUs only, and on the CPU the same written out."""

    process_group = None  # all processes

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        mean = _Sum.apply(wide.mean(axes)) / processes()  # the shares of a batch are equal
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(axes)) / processes()
        if self.track_running_stats:
            n = x.numel() // x.shape[1] * processes()
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), self.momentum)
                self.get_buffer("num_batches_tracked").add_(1)
        normalized = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)


@cache
def _uncompiled() -> type[nn.Module]:
    """Return _BatchNorm for torch.compile, which has no gradient of a sum over processes, to leave out."""

    class Uncompiled(_BatchNorm):
        forward = torch.compiler.disable(_BatchNorm.forward)  # imports the compiler, so not before it is wanted

    return Uncompiled


@contextmanager
def whole_batch_norm(model: nn.Module) -> Iterator[None]:
    """Have every BatchNorm of `model`, in training mode, normalize by the batches of all processes together.

    The modules stay what they are, parameters, buffers and all; they only compute otherwise, until the context ends.
    The running variance is the unbiased one of all images, as in torch.nn.BatchNorm2d on the whole batch. Shares of
    a batch must be equal; momentum must be a number.

    Source: S. Ioffe and C. Szegedy, Batch Normalization, ICML 2015 (arXiv:1502.03167), algorithm 1.
    """
    norms: list[nn.Module] = []
    if processes() > 1:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [type(module) for module in norms]
    try:
        for module in norms:
            module.__class__ = _uncompiled()
        yield
    finally:
        for module, kind in zip(norms, before):
            module.__class__ = kind
