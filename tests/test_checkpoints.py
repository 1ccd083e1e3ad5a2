"""Checkpoints come back bit for bit, broken ones are told in one line, and none of them runs code."""

import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import bnn_utils
from bnn_utils import campaign, checkpoints, data, training
from bnn_utils.checkpoints import CheckpointError, load, pretrained, save, save_packed
from bnn_utils.data import DataError, Images
from bnn_utils.layers import binarized_weights
from bnn_utils.models import resnet_binary, vgg_cifar10_binary
from bnn_utils.packed import pack

PATTERNS = (0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF)
SMALLEST = dict(width=5e-5, in_channels=1, input_size=8)  # one channel everywhere


def vgg(width=8 / 384, seed=0, **config):
    torch.manual_seed(seed)
    return vgg_cifar10_binary(**(dict(width=width, in_channels=1, input_size=8) | config)).eval()


def resnet(width=0.1, seed=0, **config):
    torch.manual_seed(seed)
    return resnet_binary(**(dict(width=width, in_channels=1, input_size=8) | config)).eval()


def bits_of(model):
    return {name: (tuple(x.shape), x.numpy().tobytes()) for name, x in model.state_dict().items()}


def shuffle_statistics(model):
    """Give BatchNorm something to say, so that equal logits mean something."""
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor))
    return model


def logits(model, size=8, channels=1):
    x = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


def refused(path):
    """Return what loading says, which must be one line that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as caught:
            load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Save and load


@pytest.mark.parametrize(
    "build_model",
    [
        vgg,
        resnet,
        lambda: resnet(depth=8, shortcut=False),
        lambda: vgg(width=0.03),
        lambda: vgg(binary=False),
        lambda: resnet(binary=False),
    ],
)
def test_comes_back_bit_for_bit(tmp_path, build_model):
    model = build_model()
    for index, parameter in enumerate(model.parameters()):
        bits = parameter.detach().view(-1).view(torch.int32)
        bits[0] = int(np.uint32(PATTERNS[index % len(PATTERNS)]).view(np.int32))
    save(tmp_path / "a", model)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    loaded, facts = load(tmp_path / "a")
    assert bits_of(loaded) == bits_of(model)
    assert type(loaded) is type(model)
    assert loaded.config == model.config == facts["config"]
    assert facts["network"] == model.name
    assert not any(module.training for module in loaded.modules())


def test_saving_does_not_change_the_network(tmp_path):
    model = vgg().train().to(memory_format=torch.channels_last)
    before = bits_of(model)
    save(tmp_path / "a", model)
    assert model.training
    assert not model.features[3].weight.is_contiguous()
    assert bits_of(model) == bits_of(load(tmp_path / "a")[0]) == before


def test_facts_come_back(tmp_path):
    facts = dict(dataset="CIFAR-10 (JPEG)", classes=["ü", "b"], mean=[0.1, 1 / 3], accuracy=0.1 + 0.2, epochs=3)
    facts |= dict(recipe={"lr": 5e-3, "nested": [1, None, True]})
    save(tmp_path / "a", vgg(), **facts)
    loaded = load(tmp_path / "a")[1]
    assert {key: loaded[key] for key in facts} == facts
    assert loaded["versions"] == {"bnn_utils": bnn_utils.__version__, "torch": torch.__version__}


def test_others_can_read_it(tmp_path):
    model = vgg()
    save(tmp_path / "a.safetensors", model, seed=3)
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert json.loads(header["__metadata__"]["facts"])["seed"] == 3


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a"])
def test_loads_whatever_the_length_of_its_header(tmp_path, name):
    # The file starts with that length: its first byte may be 0x80, as pickles start, its first two "PK", as zips do.
    model = vgg(**SMALLEST)
    starts = set()
    for padding in [*range(0, 256, 8), *range(14000, 15000, 8)]:
        save(tmp_path / name, model, padding="x" * padding)
        start = (tmp_path / name).read_bytes()[:2]
        starts |= {start[:1], start}
        if start[:1] == b"\x80" or start == b"PK":
            assert bits_of(load(tmp_path / name)[0]) == bits_of(model)
    assert b"\x80" in starts
    assert b"PK" in starts or name != "a"


def test_replaces_what_was_there(tmp_path):
    save(tmp_path / "a", vgg(seed=0))
    save(tmp_path / "a", vgg(seed=1))
    assert bits_of(load(tmp_path / "a")[0]) == bits_of(vgg(seed=1))


@pytest.mark.parametrize("raised", [OSError, KeyboardInterrupt])
def test_failing_half_way_leaves_the_old_file_whole(tmp_path, monkeypatch, raised):
    save(tmp_path / "a", vgg(seed=0))
    before = (tmp_path / "a").read_bytes()

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        raise raised

    monkeypatch.setattr(checkpoints, "save_file", half)
    for name in ("a", "b"):
        with pytest.raises(raised):
            save(tmp_path / name, vgg(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="Sequential"):
        save(tmp_path / "a", nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError):
        save(tmp_path / "a", vgg(), tensor=torch.zeros(2))
    with pytest.raises(OSError, match="nowhere"):
        save(tmp_path / "nowhere" / "a", vgg())
    with pytest.raises(TypeError, match="only binarized networks can be saved with one bit a weight, got BinarizedVGG"):
        save_packed(tmp_path / "a", vgg(binary=False))
    assert list(tmp_path.iterdir()) == []


# Broken files


def test_every_truncation_is_told(tmp_path):
    path = tmp_path / "a"
    save(path, vgg(**SMALLEST))
    raw = path.read_bytes()
    for length in range(len(raw)):
        os.truncate(path, len(raw) - 1 - length)
        with pytest.raises(CheckpointError):
            load(path)
    assert len(raw) > 4000


def test_a_flipped_bit_in_the_header_is_told_or_does_no_harm(tmp_path):
    path = tmp_path / "a"
    model = vgg(**SMALLEST)
    expected = bits_of(model)
    save(path, model)
    raw = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = np.random.default_rng(0)
    flips = [(at, bit) for at in range(10) for bit in range(8)]
    flips += zip(rng.integers(0, header, 500).tolist(), rng.integers(0, 8, 500).tolist())
    told = 0
    for at, bit in flips:
        raw[at] ^= 1 << bit
        path.write_bytes(raw)
        raw[at] ^= 1 << bit
        try:
            loaded, _ = load(path)
        except CheckpointError:
            told += 1
        else:
            assert bits_of(loaded) == expected, (at, bit)
    assert told > len(flips) // 2


@pytest.mark.parametrize("saved", [save, save_packed])
def test_a_flipped_bit_among_the_tensors_is_told(tmp_path, saved):
    path = tmp_path / "a"
    saved(path, vgg(**SMALLEST))
    raw = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for at in np.random.default_rng(1).integers(header, len(raw), 50):
        raw[at] ^= 0x10
        path.write_bytes(raw)
        assert "checksum" in refused(path)
        raw[at] ^= 0x10


# Packed


@pytest.mark.parametrize(
    "build_model", [vgg, lambda: vgg(width=0.03), resnet, lambda: resnet(depth=8, shortcut=False, num_classes=3)]
)
def test_packed_file_gives_both_forms_back(tmp_path, build_model):
    model = shuffle_statistics(build_model())
    save_packed(tmp_path / "a", model, dataset="some", epochs=3)
    loaded, facts = load(tmp_path / "a")
    assert facts["packed"] and (facts["dataset"], facts["epochs"]) == ("some", 3)
    weights = binarized_weights(model)
    for name, tensor in loaded.state_dict().items():
        before = model.state_dict()[name]
        assert torch.equal(tensor, torch.where(before >= 0, 1.0, -1.0) if name in weights else before), name
    assert torch.equal(logits(loaded), logits(model))
    mine, theirs = pack(model), pack(loaded)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()))


def test_packed_file_holds_one_bit_a_weight(tmp_path):
    model = vgg(width=0.125, in_channels=3, input_size=32)
    save_packed(tmp_path / "a", model)
    weights = sum(weight.numel() for weight in binarized_weights(model).values())
    others = sum(x.numel() * x.element_size() for x in model.state_dict().values()) - 4 * weights
    content = load_file(tmp_path / "a")
    assert sum(x.numel() * x.element_size() for x in content.values()) <= weights / 8 + others + 8 * len(content)
    assert (tmp_path / "a").stat().st_size < weights / 8 + others + 8 * len(content) + 10_000  # names and facts


def test_packed_words_are_laid_out_as_documented(tmp_path):
    model = vgg()
    save_packed(tmp_path / "a", model)
    for name, words in load_file(tmp_path / "a").items():
        if name in binarized_weights(model):
            signs = model.state_dict()[name].flatten() >= 0
            expected = [sum(int(bit) << i for i, bit in enumerate(signs[k : k + 64])) for k in range(0, len(signs), 64)]
            assert [int(word) % 2**64 for word in words] == expected


def test_nan_and_negative_zero_keep_their_sign_in_a_packed_file(tmp_path):
    model = vgg()
    with torch.no_grad():
        model.features[0].weight.view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("-inf"), float("inf")])
    save_packed(tmp_path / "a", model)
    assert load(tmp_path / "a")[0].features[0].weight.view(-1)[:4].tolist() == [-1, 1, -1, 1]


def test_a_packed_network_itself_is_not_a_checkpoint(tmp_path):
    with pytest.raises(TypeError, match="PackedVGG"):
        save(tmp_path / "a", pack(vgg()))
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([b"", b"PK", b"PK\x03\x04", b"\x80\x02", b"\x80", b"\x10\0\0\0\0\0\0\0{"]), st.binary(max_size=300)
)
def test_random_bytes(tmp_path_factory, start, rest):
    path = tmp_path_factory.mktemp("random") / "a"
    path.write_bytes(start + rest)
    refused(path)


def test_nothing_to_read(tmp_path):
    assert "no such" in refused(tmp_path / "missing")
    assert "no such" in refused(tmp_path)
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")


def write(path, tensors, facts):
    """Write a file of the library's format, with a right checksum, that holds anything."""
    header = {"format": checkpoints.FORMAT, "facts": facts, "sha256": checkpoints.checksum(facts, tensors)}
    save_file(tensors, path, metadata=header)


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "a.safetensors"
    state = vgg().state_dict()
    facts = {"network": "vgg_cifar10_binary", "config": vgg().config}
    save_file(state, path)
    assert "format" in refused(path)
    save_file(state, path, metadata={"format": "pt"})
    assert "format" in refused(path)
    for text in ("{", "[]", "3", "null", '"network"', "{}", json.dumps(facts | {"config": 3})):
        write(path, state, text)
        refused(path)
    for header in ({}, {"facts": json.dumps(facts)}):
        save_file(state, path, metadata={"format": checkpoints.FORMAT, **header})
        refused(path)
    write(path, state, json.dumps(facts))
    assert bits_of(load(path)[0]) == bits_of(vgg())


@pytest.mark.parametrize(
    "change",
    [
        dict(network="resnet_binary"),
        dict(network="alexnet"),
        dict(config=vgg(width=0.05).config),
        dict(config=vgg(num_classes=3).config),
        dict(config=vgg(input_size=16).config),
        dict(config=vgg(in_channels=3).config),
        dict(config={**vgg().config, "width": math.nan}),
        dict(config={**vgg().config, "depth": 18}),
    ],
)
def test_another_network_or_size(tmp_path, change):
    path = tmp_path / "a"
    facts = {"network": "vgg_cifar10_binary", "config": vgg().config} | change
    write(path, vgg().state_dict(), json.dumps(facts))
    message = refused(path)
    assert len(message) < 500 + len(str(path))


def test_a_missing_and_a_foreign_tensor(tmp_path):
    facts = json.dumps({"network": "vgg_cifar10_binary", "config": vgg().config})
    state = vgg().state_dict()
    missing = {name: value for name, value in state.items() if name != "features.3.bias"}
    for tensors, word in [(missing, "features.3.bias"), ({**state, "extra": torch.zeros(1)}, "extra")]:
        write(tmp_path / "a", tensors, facts)
        assert word in refused(tmp_path / "a")


# The published lineage


def published(model, prefix="", **more):
    """Return what BinaryNet.pytorch's main script saves."""
    state = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    if model.name == "resnet_binary":  # it declares a BatchNorm in its last block and never calls it
        blocks = 1 + max(int(name.split(".")[1]) for name in model.state_dict() if name.startswith("layer3."))
        width = model.state_dict()["bn2.weight"].shape
        for key in ("weight", "bias", "running_mean", "running_var"):
            state[f"{prefix}layer3.{blocks - 1}.bn2.{key}"] = torch.full(width, 7.0)
        state[f"{prefix}layer3.{blocks - 1}.bn2.num_batches_tracked"] = torch.tensor(5)
    return {
        "epoch": 81,
        "model": model.name,
        "config": "",
        "state_dict": state,
        "best_prec1": torch.tensor(91.7),
        "regime": {0: {"optimizer": "Adam", "lr": 5e-3}, 101: {"lr": 1e-3}, 142: {"lr": 5e-4}},
    } | more


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "source",
    [
        lambda: vgg(),
        lambda: vgg(width=24 / 384, in_channels=3, input_size=32, num_classes=7),
        lambda: resnet(),
        lambda: resnet(depth=20, in_channels=3, num_classes=100),
        lambda: resnet(depth=8, width=0.2),
    ],
)
def test_published_checkpoints_give_their_logits(tmp_path, source, prefix, zipped):
    model = shuffle_statistics(source())
    path = tmp_path / "model_best.pth.tar"
    torch.save(published(model, prefix), path, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, facts = load(path)
    size, channels = model.config.get("input_size", 8), model.config["in_channels"]
    assert torch.equal(logits(loaded, size, channels), logits(model, size, channels))
    assert facts["network"] == model.name
    assert facts["epochs"] == 81
    for key in facts["config"]:
        assert facts["config"][key] == pytest.approx(model.config[key]), key
    assert {"num_classes", "width", "in_channels"} < set(facts["config"])
    assert ("depth" if model.name == "resnet_binary" else "input_size") in facts["config"]
    assert len(facts.get("mean", [0] * channels)) == channels  # fits its images
    assert not loaded.training


def test_a_bare_state_dict_and_old_files_without_batch_counters(tmp_path):
    model = shuffle_statistics(vgg())
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "a")[0]), logits(model))


WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "an average": torch.optim.swa_utils.AveragedModel,
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "parallel and compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "a module of another": lambda model: nn.ModuleDict({"model": model}),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_files_of_wrapped_networks_load(tmp_path, name, key):
    model = shuffle_statistics(vgg(in_channels=3))
    state = WRAPPERS[name](copy.deepcopy(model)).state_dict()
    assert not state.keys() & model.state_dict().keys()
    torch.save(state if key is None else {key: state, "epoch": 4}, tmp_path / "a")
    loaded, facts = load(tmp_path / "a")
    assert bits_of(loaded) == bits_of(model)
    # Of these, only one is a form in which BinaryNet.pytorch writes, whose normalization is known.
    assert ("mean" in facts) == (key == "state_dict" and name == "DataParallel")


def test_a_network_with_a_compiled_part_loads(tmp_path):
    model = shuffle_statistics(vgg())
    wrapped = copy.deepcopy(model)
    wrapped.features = torch.compile(wrapped.features)
    torch.save(wrapped.state_dict(), tmp_path / "a")
    assert bits_of(load(tmp_path / "a")[0]) == bits_of(model)
    save(tmp_path / "b", torch.compile(copy.deepcopy(model)))
    assert bits_of(load(tmp_path / "b")[0]) == bits_of(model)


def test_published_and_own_form_of_one_network(tmp_path):
    model = shuffle_statistics(resnet())
    torch.save(published(model), tmp_path / "a")
    loaded, facts = load(tmp_path / "a")
    save(tmp_path / "b", loaded, **{key: facts[key] for key in ("source", "epochs")})
    assert torch.equal(logits(load(tmp_path / "b")[0]), logits(model))


class Writes:
    """A pickle that writes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "run")


@pytest.mark.parametrize("where", ["best_prec1", "state_dict", "all"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle protocol 5"])
def test_code_is_refused_and_not_run(tmp_path, where, form):
    marker, path = tmp_path / "marker", tmp_path / "a"
    content = published(vgg())
    if where == "all":
        content = Writes(marker)
    elif where == "state_dict":
        content["state_dict"]["features.0.bias"] = Writes(marker)
    else:
        content[where] = Writes(marker)
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=5 if "5" in form else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refused(path)
    assert not marker.exists()
    if form == "pickle":  # it is no empty threat
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        3,
        [1, 2],
        {},
        {"state_dict": None},
        {"state_dict": {}},
        {"state_dict": {"features.0.weight": 3}},
        {"state_dict": {"features.0.weight": torch.zeros(())}},
        {"state_dict": {"conv1.weight": torch.zeros(()), "fc.weight": torch.zeros(())}},
        {"state_dict": {"features.0.weight": torch.zeros(8, 1, 3, 3)}},
        {"state_dict": nn.Linear(2, 2).state_dict()},
        {"state_dict": {1: torch.zeros(2)}},
        {"state_dict": vgg(width=0.03).state_dict()},  # 12, 12, 23, ... channels: no multiple of the published ones
        {"state_dict": {k: v for k, v in resnet().state_dict().items() if not k.startswith("layer1")}},
        {"state_dict": {k: v[:1] if v.dim() else v for k, v in vgg().state_dict().items()}},
    ],
)
def test_torch_files_of_other_things(tmp_path, content):
    torch.save(content, tmp_path / "a")
    refused(tmp_path / "a")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth.tar", "a.safetensors"])
def test_broken_torch_files(tmp_path, zipped, name):
    path = tmp_path / name
    torch.save(published(vgg(**SMALLEST)), path, _use_new_zipfile_serialization=zipped)
    raw = path.read_bytes()
    rng = np.random.default_rng(2)
    for length in [*range(0, 40), *rng.integers(40, len(raw) - 1, 80).tolist()]:
        path.write_bytes(raw[:length])
        refused(path)
    for at, bit in zip(rng.integers(0, 3000, 120), rng.integers(0, 8, 120)):
        broken = bytearray(raw)
        broken[at] ^= 1 << int(bit)
        path.write_bytes(broken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                load(path)
            except CheckpointError as error:
                assert "\n" not in str(error)


# ---------------------------------------------------------------- those that come with the course


@pytest.fixture
def shop(tmp_path):
    """A folder of one pretrained network, with sums as coreutils writes them."""
    model = shuffle_statistics(vgg())
    (tmp_path / "small").mkdir()
    save_packed(tmp_path / "small" / "network.safetensors", model, dataset="digits")
    digest = hashlib.sha256((tmp_path / "small" / "network.safetensors").read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  small/network.safetensors\n")
    return model, tmp_path


def test_pretrained_gives_the_network_and_its_facts(shop):
    model, folder = shop
    loaded, facts = pretrained("small", folder)
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert facts["dataset"] == "digits"


def test_pretrained_refuses_another_file_even_a_sound_one(shop):
    _, folder = shop
    save_packed(folder / "small" / "network.safetensors", vgg(seed=1), dataset="digits")
    with pytest.raises(CheckpointError, match=r"small/network\.safetensors: is not the published file"):
        pretrained("small", folder)


def test_pretrained_names_what_is_missing(shop, tmp_path_factory):
    _, folder = shop
    with pytest.raises(CheckpointError, match="no pretrained network 'large', expected one of small"):
        pretrained("large", folder)
    with pytest.raises(CheckpointError, match=r"no pretrained network '\.\./small'"):
        pretrained("../small", folder)
    (folder / "small" / "network.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        pretrained("small", folder)
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        pretrained("small", tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("name", sorted(path.parent.name for path in checkpoints.PRETRAINED.glob("*/*.safetensors")))
def test_every_pretrained_network_loads_by_name(name):
    model, facts = pretrained(name)
    assert model.name == facts["network"] and 0.5 < facts["test_accuracy"] < 1


# The images that a network was trained on


def by_hand(model, images, mean, std):
    """Accuracy and loss of a network on grey images, normalized here."""
    x = (images.pixels.double() / 255 - mean) / std
    with torch.no_grad():
        logits = model(x.float()).double()
    loss = nn.functional.cross_entropy(logits, images.labels).item()
    return pytest.approx((loss, (logits.argmax(1) == images.labels).double().mean().item()), rel=1e-5)


@pytest.fixture
def scaled(tmp_path):
    """A network that was trained on digits of another normalization than their own, with its facts."""
    facts = dict(mean=[0.75], std=[2.0], classes=list("0123456789"))
    save(tmp_path / "scaled.safetensors", shuffle_statistics(vgg()), **facts)
    return load(tmp_path / "scaled.safetensors")


def test_every_evaluation_refuses_images_of_another_normalization(scaled, tmp_path):
    (model, facts), digits = scaled, data.digits()
    test, out = digits.test, tmp_path / "trials.csv"
    told = (
        r"digits is normalized by the mean \(0\.3\d*,\), the network .* by the mean \(0\.75,\); .*as_trained\(facts\)"
    )
    for network in (model, pack(model), copy.deepcopy(model)):
        with pytest.raises(DataError, match=told):
            training.evaluate(network, test)
    for storage in ("float32", "packed"):
        with pytest.raises(DataError, match=told):
            campaign.run(model, test, [1e-2], 1, storage=storage, out=out)
    assert not out.exists()
    with pytest.raises(DataError, match=told):
        training.train(model, digits, training.Recipe(epochs=1))
    with pytest.raises(DataError, match=told):
        training.train(vgg(seed=1), digits, training.Recipe(epochs=1, teacher_share=0.5), teacher=model)

    prepared = test.as_trained(facts)
    right = by_hand(model, test, 0.75, 2.0)
    assert by_hand(model, test, test.mean[0], test.std[0]) != right  # it matters
    assert tuple(training.evaluate(model, prepared)) == right
    assert tuple(training.evaluate(pack(model), prepared)) == right
    table = campaign.run(model, prepared, [0.0], 1)
    assert tuple(table[["loss", "accuracy"]].iloc[0]) == right
    assert digits.as_trained(facts).validation.mean == (0.75,)

    model.trained_on = {}  # to train it for others, on purpose
    assert tuple(training.evaluate(model, test)) == by_hand(model, test, test.mean[0], test.std[0])


def test_what_a_network_was_trained_on_is_saved_with_it_again(scaled, tmp_path):
    model, facts = scaled
    save(tmp_path / "again.safetensors", model, dataset="digits")
    again = load(tmp_path / "again.safetensors")[1]
    assert {key: again[key] for key in ("mean", "std", "classes")} == {
        key: facts[key] for key in ("mean", "std", "classes")
    }
    save(tmp_path / "other.safetensors", model, mean=[0.1])
    assert load(tmp_path / "other.safetensors")[1]["mean"] == [0.1]


def renamed(images, names):
    return replace(images, classes=tuple(names))


def test_classes_are_those_of_the_network_in_its_order(scaled):
    (model, facts), test = scaled, data.digits().test
    words = ["Zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine_or g"]
    facts = facts | {"classes": words}
    model.trained_on = facts
    same = renamed(test, ["zero", "One", "two", "THREE", "four", "five", "six", "seven", "eight", "Nine or G"])
    training.evaluate(model, same.as_trained(facts))
    for other in (["zero", *words[1:3], "tree", *words[4:]], [words[1], words[0], *words[2:]]):
        with pytest.raises(DataError) as caught:
            renamed(test, other).as_trained(facts)
        assert all(", ".join(names) in str(caught.value) for names in (other, words))
        prepared = replace(renamed(test, other), mean=(0.75,), std=(2.0,))
        with pytest.raises(DataError, match="has the classes"):
            training.evaluate(model, prepared)
    with pytest.raises(DataError, match=r"wants 1 channels, 8 pixels a side, 10 classes; digits has .* 3 classes"):
        renamed(test, "abc").as_trained(facts)


def test_a_published_file_tells_the_number_of_classes_alone(tmp_path):
    torch.save({"state_dict": vgg(in_channels=3).state_dict()}, tmp_path / "model_best.pth.tar")
    _, facts = load(tmp_path / "model_best.pth.tar")
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(2, dtype=torch.int64), (0.0,) * 3, (1.0,) * 3, "zoo", tuple("abcdefghij"))
    prepared = images.as_trained(facts)
    assert prepared.mean == (0.485, 0.456, 0.406) and prepared.std == (0.229, 0.224, 0.225)
    assert prepared.classes == images.classes
    with pytest.raises(DataError, match="10 classes; zoo has 3 channels, 8 pixels a side, 2 classes"):
        renamed(images, "ab").as_trained(facts)


def test_facts_that_do_not_tell_leave_images_as_they_are():
    test = data.digits().test
    assert test.as_trained({}).facts == test.facts
    training.evaluate(vgg(), replace(test, mean=(0.9,)))  # trained nowhere, it knows nothing
