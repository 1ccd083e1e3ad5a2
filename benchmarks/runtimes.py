"""The contenders of `benchmarks.inference`: one network, made ready for each runtime as its user would.

Every function takes a float network of `bnn_utils.models`, a batch of images, the number of threads and a folder for
files, and returns a `Contender`. It raises `Missing` where the machine lacks what the runtime needs.
"""

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnn_utils.layers import BINARIZED, BinarizeConv2d, binarize
from bnn_utils.models import BasicBlock, BinarizedResNet
from bnn_utils.packed import pack

CALIBRATION = 32  # random images that int8 ranges are taken from
SIGN_ONLY = {BasicBlock: "tanh1", BinarizedResNet: "tanh2"}  # the Hardtanh of which only the sign is used


class Missing(Exception):
    """What a runtime needs is not there; the message says what."""


@dataclass(frozen=True)
class Contender:
    """`call` computes the logits of the batch, `batches` times over, and returns them once."""

    call: Callable[[], NDArray[np.float32]]
    batches: int = 1


class Sign(nn.Module):
    """+1 where x >= 0, else -1, in two operations that every runtime has."""

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        return torch.where(x >= 0, one, -one)


def deployable(network: nn.Module) -> nn.Module:
    """Return the same network for runtimes of floats: weights are constants +1 and -1, and only what is used is left.

    A Hardtanh of which the next layer reads only the sign is left out, since it changes no sign.
    """
    network = copy.deepcopy(network)
    for owner in list(network.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, BINARIZED):
                setattr(owner, name, _plain(layer))
            in_vgg = isinstance(owner, nn.Sequential)
            if isinstance(layer, nn.Hardtanh) and (in_vgg or SIGN_ONLY.get(type(owner)) == name):
                setattr(owner, name, nn.Identity())
    return network.eval()


def _plain(layer: Any) -> nn.Module:
    bias, convolution = layer.bias is not None, isinstance(layer, BinarizeConv2d)
    if convolution:
        size = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        plain: nn.Module = nn.Conv2d(*size, bias=bias)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias)
    plain.load_state_dict({**layer.state_dict(), "weight": binarize(layer.weight.detach())})
    return nn.Sequential(Sign(), plain) if layer.binarize_input else plain


def packed(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """1 bit a weight: `bnn_utils.packed`."""
    model = pack(network)
    return Contender(lambda: model(images).numpy())


def torch_float32(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """PyTorch, eager."""
    model: Any = deployable(network).to(memory_format=torch.channels_last)
    x = images.contiguous(memory_format=torch.channels_last)
    return Contender(lambda: model(x).numpy())


def torch_bfloat16(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """PyTorch, eager, everything in bfloat16."""
    model: Any = deployable(network).bfloat16().to(memory_format=torch.channels_last)
    x = images.to(torch.bfloat16, memory_format=torch.channels_last)
    return Contender(lambda: model(x).float().numpy())


def torch_compiled(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """torch.compile, which may fold the constants ("freezing")."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        raise Missing("no C++ compiler, which torch.compile needs")
    model = torch.compile(
        deployable(network).to(memory_format=torch.channels_last), dynamic=False, options={"freezing": True}
    )
    x = images.contiguous(memory_format=torch.channels_last)
    return Contender(lambda: model(x).numpy())


def _exported(network: nn.Module, images: Tensor, folder: Path) -> Path:
    """Return the ONNX file of a network, made at the first call, for any number of images."""
    path = folder / "float32.onnx"
    if not path.exists():
        try:
            import onnxscript  # noqa: F401  what torch exports with
        except ImportError as error:
            raise Missing(f"{error.name} is not installed") from None
        example = torch.zeros(2, *images.shape[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                deployable(network),
                (example,),
                path,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    return path


def _quantized(network: nn.Module, images: Tensor, folder: Path) -> Path:
    """Return the ONNX file of a network in static int8 (QDQ, a scale per channel), made at the first call."""
    path = folder / "int8.onnx"
    if not path.exists():
        try:
            from onnxruntime import quantization
            from onnxruntime.quantization.shape_inference import quant_pre_process
        except ImportError as error:
            raise Missing(f"{error.name} is not installed") from None

        class Calibration(quantization.CalibrationDataReader):
            batches = iter(
                torch.randn(CALIBRATION, *images.shape[1:], generator=torch.Generator().manual_seed(1)).split(8)
            )

            def get_next(self) -> dict[str, NDArray[np.float32]] | None:
                batch = next(self.batches, None)
                return None if batch is None else {"images": batch.numpy()}

        ready = folder / "ready.onnx"
        quant_pre_process(_exported(network, images, folder), ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            path,
            Calibration(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            # uint8 times int8 is what x86 multiplies fastest, and ONNX Runtime advises it there.
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MaxPool"],
        )
    return path


def _onnxruntime(path: Path, images: Tensor, threads: int) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = images.contiguous().numpy()
    return Contender(lambda: session.run(None, {"images": x})[0])


def onnxruntime_float32(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """ONNX Runtime."""
    return _onnxruntime(_exported(network, images, folder), images, threads)


def onnxruntime_int8(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """ONNX Runtime, int8."""
    return _onnxruntime(_quantized(network, images, folder), images, threads)


def _openvino(network: nn.Module, images: Tensor, threads: int, folder: Path, hint: str) -> Contender:
    try:
        import openvino
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None
    core = openvino.Core()
    model = core.read_model(_quantized(network, images, folder))
    model.reshape(list(images.shape))
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": threads})
    streams = compiled.get_property("NUM_STREAMS")
    queue = openvino.AsyncInferQueue(compiled, streams)
    x, logits = images.contiguous().numpy(), {}

    def done(request: Any, stream: int) -> None:
        logits[stream] = request.get_output_tensor(0).data.copy()

    queue.set_callback(done)

    def call() -> NDArray[np.float32]:
        for stream in range(streams):
            queue.start_async({0: x}, userdata=stream)
        queue.wait_all()
        return logits[0]

    return Contender(call, streams)


def openvino_latency(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """OpenVINO, int8, all threads on one batch."""
    return _openvino(network, images, threads, folder, "LATENCY")


def openvino_throughput(network: nn.Module, images: Tensor, threads: int, folder: Path) -> Contender:
    """OpenVINO, int8, several batches at once, as many as its throughput hint says."""
    return _openvino(network, images, threads, folder, "THROUGHPUT")


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int, Path], Contender]] = {
    "packed": packed,
    "torch float32": torch_float32,
    "torch bfloat16": torch_bfloat16,
    "torch.compile float32": torch_compiled,
    "ONNX Runtime float32": onnxruntime_float32,
    "ONNX Runtime int8": onnxruntime_int8,
    "OpenVINO int8 latency": openvino_latency,
    "OpenVINO int8 throughput": openvino_throughput,
}
