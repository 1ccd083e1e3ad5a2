"""Networks on disk: safetensors with facts and a checksum in the header; the published checkpoints are read too."""

import hashlib
import json
import os
import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bnn_utils
from bnn_utils.bits import pack_signs, unpack_signs
from bnn_utils.layers import binarized_weights
from bnn_utils.models import Network, build, config_of, name_of, trained_on
from bnn_utils.system import write_beside

FORMAT = "bnn_utils/2"
PRETRAINED = Path(__file__).resolve().parents[1] / "checkpoints"  # of the repository
SUMS, NETWORK_FILE = "SHA256SUMS", "network.safetensors"
# BinaryNet.pytorch normalizes CIFAR images with the ImageNet figures (its preprocess.py).
_PUBLISHED_NORMALIZATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

# What stands before the names of a state_dict that was saved from a wrapper of the network, or of a part of it.
_WRAPPERS = re.compile(r"^model\.|\b(?:module|_orig_mod|_fsdp_wrapped_module)\.")


class CheckpointError(ValueError):
    """A file does not hold a network that can be used; the message says which file and why."""


def save(path: str | os.PathLike[str], model: nn.Module, **facts: Any) -> None:
    """Write `model` and what is known of it to one safetensors file, whole or not at all.

    The header gets `facts` and, by itself: network, config (the arguments that build it again), versions; of a network
    that was loaded, mean, std and classes too; and a SHA-256 checksum of facts and tensors.

    Args:
        path: of the file; one that is there is replaced.
        model: a network of `bnn_utils.models`; its latent weights are kept.
        facts: anything JSON can hold: data set, classes, mean and std of its normalization, epochs, accuracy, seed.

    Raises:
        TypeError: the network is not one of `bnn_utils.models`, or a fact is nothing that JSON can hold.
        OSError: the file cannot be written.
    """
    _save(path, model, facts, packed=False)


def save_packed(path: str | os.PathLike[str], model: nn.Module, **facts: Any) -> None:
    """Write `model` as `save` does, but of its binarized weights only the signs, one bit each.

    In the place of such a weight stand int64 words: bit i of word k is 1 where element 64 k + i of the flattened
    weight is +1. Everything else is kept as trained. `load` returns the network with weights of +1 and -1, which
    computes the same, and from which `bnn_utils.packed.pack` makes the same packed network.

    Args, Raises: as for `save`.
    """
    if not binarized_weights(model):
        raise TypeError(f"only binarized networks can be saved with one bit a weight, got {type(model).__name__}")
    _save(path, model, facts, packed=True)


def _save(path: str | os.PathLike[str], model: nn.Module, facts: dict[str, Any], packed: bool) -> None:
    config, weights, state = config_of(model), binarized_weights(model), model.state_dict()
    if config is None or (config.get("binary", True) and not weights):
        raise TypeError(f"only networks of bnn_utils.models can be saved, got {type(model).__name__}")
    for name, weight in weights.items() if packed else ():
        state[name] = torch.from_numpy(pack_signs(weight.detach().cpu().flatten()).view(np.int64))
    versions = {"bnn_utils": bnn_utils.__version__, "torch": torch.__version__}
    known = trained_on(model)
    facts = {key: known[key] for key in ("mean", "std", "classes") if key in known} | facts | {"packed": packed}
    described = json.dumps({"network": name_of(model), "config": config, **facts, "versions": versions})
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    header = {"format": FORMAT, "facts": described, "sha256": checksum(described, tensors)}
    try:
        write_beside(path, partial(save_file, tensors, metadata=header))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def checksum(facts: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the facts and of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Read a network and its facts; loading runs no code from the file.

    Reads what `save` and `save_packed` wrote; last.pt of `bnn_utils.training.train`, of which it takes the network of
    the best epoch; and checkpoints of BinaryNet.pytorch (model_best.pth.tar) and bare state_dicts, whose size is told
    from the shapes of their tensors. What torch.compile, DataParallel and their like put before names is taken off.

    Returns:
        (model in evaluation mode on the CPU, facts): facts hold at least network and config. The network keeps them as
        `model.trained_on`, by which evaluation, campaigns and training refuse images that are not prepared by
        `images.as_trained(facts)`. To train it for others, set `model.trained_on = {}`.

    Raises:
        CheckpointError: the file is missing, cut short or changed, of another format or network, or would run code.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint file")
    with file.open("rb") as stream:
        start = stream.read(10)
    safetensors = start[8:9] == b"{"  # after the header's length, whose bytes may be anything
    if not safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):  # the two forms of torch.save
        state, facts = _read_published(file)
    else:
        state, facts = _read_safetensors(file)
    state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    try:
        model = build(facts["network"], **facts["config"])
        if facts.get("packed"):
            for name, weight in binarized_weights(model).items():
                words = state[name].numpy().view(np.uint64)
                state[name] = unpack_signs(words, weight.numel()).view(weight.shape)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: its tensors are not those of the network it names ({reason[:300]})") from None
    model.trained_on = facts
    return model.eval(), facts


def pretrained(name: str, folder: str | os.PathLike[str] | None = None) -> tuple[Network, dict[str, Any]]:
    """Load one of the networks that come with the course, after checking that its file is the one that was published.

    Args:
        name: "vgg_cifar10", "resnet_published" or another that checkpoints/README.md lists. It does not tell the width,
            since a wider network may take the place of a narrow one: facts["config"]["width"] does.
        folder: holds name/network.safetensors and SHA256SUMS, a file as `sha256sum` writes it; by default the
            repository's checkpoints/.

    Returns:
        (model in evaluation mode on the CPU, facts), as `load`.

    Raises:
        CheckpointError: no such network, or its file is missing, or not the one of which SHA256SUMS has the sum.
    """
    base = PRETRAINED if folder is None else Path(folder)
    try:
        lines = (base / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise CheckpointError(f"{base / SUMS}: cannot be read; pretrained networks are in the repository") from None
    sums = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    if (file := f"{name}/{NETWORK_FILE}") not in sums:
        known = ", ".join(sorted(Path(file).parent.name for file in sums))
        raise CheckpointError(f"no pretrained network {name!r}, expected one of {known}")
    try:
        digest = hashlib.sha256((base / file).read_bytes()).hexdigest()
    except OSError:
        raise CheckpointError(f"{base / file}: no such checkpoint file") from None
    if digest != sums[file]:
        raise CheckpointError(f"{base / file}: is not the published file, its SHA-256 is {digest}; fetch it again")
    return load(base / file)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{file}: was not written by bnn_utils (format {header.get('format')!r})")
        if header["sha256"] != checksum(header["facts"], state):
            raise CheckpointError(f"{file}: is damaged, its content does not have the checksum that its header names")
        return state, json.loads(header["facts"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: is broken or not a checkpoint ({error})") from None


def _read_published(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with file.open("rb") as stream, warnings.catch_warnings():  # given a name, torch would judge it by its ending
            warnings.simplefilter("ignore")
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: is broken, or holds more than tensors, so that loading it could run code; refused"
        ) from None
    except Exception as error:  # torch raises many kinds for a file that is cut short or damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: is broken or not a checkpoint ({reason})") from None
    content = content if isinstance(content, dict) else {}
    if "identity" in content:
        return _read_state(file, content)
    state = next((content[key] for key in ("state_dict", "model_state_dict", "model") if key in content), content)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds no state_dict of a network")
    wrapped = {str(key).removeprefix("module."): value for key, value in state.items()}
    state = {_WRAPPERS.sub("", key): value for key, value in wrapped.items() if key != "n_averaged"}
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: holds no state_dict of a network")
    facts = _recognize(file, state)
    if "state_dict" in content and state.keys() == wrapped.keys():  # others do not tell how images were normalized
        facts["source"] = "BinaryNet.pytorch"
        if facts["config"]["in_channels"] == len(_PUBLISHED_NORMALIZATION["mean"]):
            facts.update(_PUBLISHED_NORMALIZATION)
    if isinstance(content.get("epoch"), int):
        facts["epochs"] = content["epoch"]
    return state, facts


def _read_state(file: Path, content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the network of the best epoch from the state of a training run."""
    try:
        facts, best = content["facts"], content["best"]
        told = {"network": facts["network"], "epoch": best["epoch"], "epochs_trained": len(content["rows"])}
        return best["state"], {**facts, **told, "validation_accuracy": best["score"][0]}
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(
            f"{file}: is the state of a training run that does not tell its network; take best.safetensors beside it"
        ) from None


def _recognize(file: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Tell the network and its size from the shapes of its tensors."""
    try:
        if "features.0.weight" in state:
            first, last = state["features.0.weight"], state["classifier.6.weight"]
            side = (state["classifier.0.weight"].shape[1] / state["features.17.weight"].shape[0]) ** 0.5
            sizes = dict(in_channels=first.shape[1], input_size=round(8 * side))
            config = dict(num_classes=len(last), width=len(first) / 384, **sizes)
            return {"network": "vgg_cifar10_binary", "config": config}
        if "conv1.weight" in state:
            first = state["conv1.weight"]
            blocks = len({found[0] for key in state if (found := re.match(r"layer1\.\d+\.", key))})
            config = dict(
                num_classes=len(state["fc.weight"]),
                depth=18 if blocks == 2 else 6 * blocks + 2,  # the published 18 has the blocks of a 14
                width=len(first) / 80,
                in_channels=first.shape[1],
            )
            return {"network": "resnet_binary", "config": config}
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: misses tensors of the network it seems to be ({error})") from None
    raise CheckpointError(f"{file}: its tensors are neither the binarized VGG's nor the binarized ResNet's")
