"""Images as tensors: parts, normalization, augmentation, folders of pictures, torchvision's sets, bad input."""

import pickle
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom
from sklearn.datasets import load_digits

from bnn_utils.data import DataError, augment, image_folder, load

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def pictures(images):
    """How often each picture (with its label) occurs in a part."""
    pairs = zip(images.pixels.numpy(), images.labels.tolist(), strict=True)
    return Counter((pixels.tobytes(), label) for pixels, label in pairs)


# ---------------------------------------------------------------- digits


def test_digits_parts(digits):
    assert [len(getattr(digits, part)) for part in PARTS] == [1077, 360, 360]
    for part in PARTS:
        images = getattr(digits, part)
        assert images.pixels.shape == (len(images), 1, 8, 8) and images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert (images.dataset, images.classes) == ("digits", tuple("0123456789"))
    assert (digits.name, digits.classes) == ("digits", tuple("0123456789"))
    assert (digits.padding, digits.flip) == (0, False)


def test_digits_are_split_without_loss_or_overlap(digits):
    bunch = load_digits()
    pixels = (bunch.images * 255 / 16 + 0.5).astype(np.uint8)  # 16 grey levels to 0..255, rounded
    original = Counter((image.tobytes(), int(label)) for image, label in zip(pixels, bunch.target, strict=True))
    parts = [pictures(getattr(digits, part)) for part in PARTS]
    assert parts[0] + parts[1] + parts[2] == original


def test_digits_are_stratified(digits):
    totals = np.bincount(load_digits().target)
    for part in PARTS:
        labels = getattr(digits, part).labels
        counts = np.bincount(labels.numpy(), minlength=10)
        assert np.abs(counts - totals * len(labels) / totals.sum()).max() <= 1.5
        assert not torch.equal(labels, labels.sort().values), "a limit would see the first classes only"


def test_digits_are_the_same_every_time(digits):
    np.random.seed(123)  # noqa: NPY002 (the parts must not depend on it)
    torch.manual_seed(123)
    again = load("digits")
    for part in PARTS:
        assert torch.equal(getattr(again, part).pixels, getattr(digits, part).pixels)
        assert torch.equal(getattr(again, part).labels, getattr(digits, part).labels)


def test_normalization_is_of_the_training_part(digits):
    values = digits.train.pixels.numpy().astype(np.float64) / 255
    for part in PARTS:
        images = getattr(digits, part)
        assert images.mean == pytest.approx((values.mean(),), rel=1e-5)
        assert images.std == pytest.approx((values.std(),), rel=1e-5)
    x, labels = digits.train[:]
    assert x.dtype == torch.float32
    assert abs(x.mean().item()) < 1e-4 and abs(x.std().item() - 1) < 1e-3
    assert torch.equal(labels, digits.train.labels)
    chosen = torch.tensor([5, 3])
    x, labels = digits.test[chosen]
    expected = (digits.test.pixels.numpy()[[5, 3]] / 255 - values.mean()) / values.std()
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == digits.test.labels[[5, 3]].tolist()


def test_limit(digits):
    limited = digits.test.limit(7)
    assert len(limited) == 7
    assert torch.equal(limited.pixels, digits.test.pixels[:7]) and torch.equal(limited.labels, digits.test.labels[:7])
    assert (limited.mean, limited.std, limited.classes) == (digits.test.mean, digits.test.std, digits.test.classes)
    assert len(digits.test.limit(None)) == len(digits.test.limit(10_000)) == 360
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, got {wrong}"):
            digits.test.limit(wrong)


def test_parts_move_together(digits):
    moved = digits.to("meta")
    assert {getattr(moved, part).pixels.device.type for part in PARTS} == {"meta"}
    assert {getattr(moved, part).labels.device.type for part in PARTS} == {"meta"}
    assert digits.test.pixels.device.type == "cpu"
    assert (moved.padding, moved.flip, moved.name) == (digits.padding, digits.flip, digits.name)


# ---------------------------------------------------------------- augmentation


def every_crop(image, padding, flip):
    """All crops of one zero-padded picture (channels, height, width), as {bytes: (top, left, mirrored)}."""
    channels, height, width = image.shape
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = np.zeros_like(image)
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        row, column = y + top - padding, x + left - padding
                        if 0 <= row < height and 0 <= column < width:
                            crop[c, y, x] = image[c, row, column]
            found[crop.tobytes()] = (top, left, False)
            if flip:
                found[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    return found


def numbered(channels, height, width):
    """One picture whose pixels all differ, none of them 0."""
    return np.arange(1, channels * height * width + 1, dtype=np.uint8).reshape(channels, height, width)


@settings(deadline=None, max_examples=25)
@given(
    channels=st.integers(1, 3),
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_augment_makes_crops_of_its_own_picture(channels, height, width, padding, flip, seed):
    first = numbered(channels, height, width)
    batch = torch.from_numpy(np.stack([first, first + 100, first]))
    result = augment(batch, padding, flip, torch.Generator().manual_seed(seed))
    again = augment(batch, padding, flip, torch.Generator().manual_seed(seed))
    assert result.shape == batch.shape and result.dtype == torch.uint8 and result.is_contiguous()
    assert torch.equal(result, again)
    for source, made in zip(batch.numpy(), result.numpy(), strict=True):
        assert made.tobytes() in every_crop(source, padding, flip)


def test_augment_draws_uniformly_and_independently():
    n, padding = 6_000, 1
    picture = numbered(1, 4, 4)
    crops = every_crop(picture, padding, flip=True)
    assert len(crops) == 18
    batch = torch.from_numpy(picture).expand(n, 1, 4, 4)
    result = augment(batch, padding, True, torch.Generator().manual_seed(0)).numpy()
    counts = Counter(crops[made.tobytes()] for made in result)
    low, high = binom.interval(1 - 1e-7, n, 1 / 18)
    assert set(counts) == set(crops.values())
    assert low <= min(counts.values()) and max(counts.values()) <= high


def test_augment_without_padding_and_flip_changes_nothing():
    batch = torch.from_numpy(numbered(2, 3, 5))[None].repeat(4, 1, 1, 1)
    before = batch.clone()
    assert torch.equal(augment(batch, 0, False, torch.Generator()), before)
    augment(batch, 2, True, torch.Generator())
    assert torch.equal(batch, before)


def test_other_seeds_give_other_crops():
    batch = torch.from_numpy(numbered(1, 8, 8)).repeat(32, 1, 1, 1)
    first, second = (augment(batch, 2, True, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- a folder of pictures

COLOURS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cow": (10, 10, 200)}


def write_picture(path, colour, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def make_folder(root, train=10, test=4, suffix=".png"):
    """Pictures of one colour a class, whose first channel also tells them apart within a class."""
    for part, count in (("train", train), ("test", test)):
        for name, (red, green, blue) in COLOURS.items():
            for index in range(count):
                write_picture(root / part / name / f"{index:02d}{suffix}", (red + index, green, blue))
    return root


@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".bmp", "BMP")])
def test_image_folder(tmp_path, suffix, kind):
    dataset = image_folder(make_folder(tmp_path / "zoo", suffix=suffix))
    assert dataset.name == f"zoo ({kind})"
    assert dataset.classes == ("ant", "bee", "cow")
    assert [len(getattr(dataset, part)) for part in PARTS] == [27, 3, 12]
    assert (dataset.padding, dataset.flip) == (4, True)
    for part in PARTS:
        images = getattr(dataset, part)
        assert images.pixels.shape[1:] == (3, 8, 8) and images.pixels.dtype == torch.uint8
        assert torch.equal(images.pixels[:, :, 4, 4].argmax(1), images.labels)  # red ants, green bees, blue cows
        assert set(images.labels.tolist()) == {0, 1, 2}
    scaled = dataset.train.pixels.double() / 255
    assert dataset.test.mean == pytest.approx(tuple(scaled.mean((0, 2, 3)).tolist()), rel=1e-5)
    assert dataset.test.std == pytest.approx(tuple(scaled.std((0, 2, 3), correction=0).tolist()), rel=1e-4)


def test_image_folder_uses_every_picture_once(tmp_path):
    dataset = image_folder(make_folder(tmp_path, train=20))
    assert [len(getattr(dataset, part)) for part in PARTS] == [54, 6, 12]
    seen = Counter()
    for part in ("train", "validation"):
        seen.update(tuple(pixel) for pixel in getattr(dataset, part).pixels[:, :, 0, 0].tolist())
    assert seen == Counter((red + i, green, blue) for red, green, blue in COLOURS.values() for i in range(20))
    labels = dataset.test.labels
    assert not torch.equal(labels, labels.sort().values), "a limit would see the first classes only"
    again = image_folder(tmp_path)
    assert all(torch.equal(getattr(again, part).pixels, getattr(dataset, part).pixels) for part in PARTS)


def test_names_of_a_folder(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "zoo")
    write_picture(root / "train" / "ant" / "photo.jpg", (200, 10, 10))
    assert image_folder(root).name == "zoo (JPEG/PNG)"
    assert image_folder(root, "Zoo").name == "Zoo (JPEG/PNG)"
    assert load("cifar10", root).name == "CIFAR-10 (JPEG/PNG)"
    monkeypatch.chdir(root)
    assert load("images", ".").name == "zoo (JPEG/PNG)"


def test_grey_and_indexed_pictures_become_rgb(tmp_path):
    root = make_folder(tmp_path)
    for mode, colour in (("L", 77), ("P", 0), ("RGBA", (5, 6, 7, 255))):
        write_picture(root / "test" / "ant" / f"{mode}.png", colour, mode=mode)
    pixels = image_folder(root).test.pixels[:, :, 0, 0].tolist()
    assert [77, 77, 77] in pixels and [5, 6, 7] in pixels


def test_other_files_are_not_pictures(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("six legs")
    (root / "train" / "README").write_text("a file, not a class")
    assert len(image_folder(root).train) == 27


def break_train(root):
    (root / "train").rename(root / "training")
    return "no folder train/"


def break_test(root):
    (root / "test").rename(root / "tests")
    return "no folder test/"


def break_classes(root):
    (root / "test" / "cow").rename(root / "test" / "cat")
    return r"different classes \(cat, cow\)"


def break_no_classes(root):
    for name in COLOURS:
        (root / "train" / name).rename(root / name)
    return "train: holds no class folders"


def break_empty_class(root):
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    return "bee: holds no pictures"


def break_text(root):
    (root / "train" / "bee" / "03.png").write_text("not a picture")
    return r"bee.03\.png: not a picture"


def break_empty_file(root):
    (root / "test" / "cow" / "03.png").write_bytes(b"")
    return r"cow.03\.png: not a picture"


def break_truncated(root):
    path = root / "test" / "ant" / "01.png"
    path.write_bytes(path.read_bytes()[:-30])
    return r"ant.01\.png: not a picture"


def break_size(root):
    write_picture(root / "train" / "cow" / "05.png", (1, 2, 3), size=(8, 9))
    return r"cow.05\.png: is 8x9 pixels, the others of its set 8x8"


def break_test_size(root):
    for path in (root / "test").glob("*/*.png"):
        write_picture(path, (1, 2, 3), size=(16, 16))
    return "differ in size"


@pytest.mark.parametrize(
    "breaks",
    [
        break_train,
        break_test,
        break_classes,
        break_no_classes,
        break_empty_class,
        break_text,
        break_empty_file,
        break_truncated,
        break_size,
        break_test_size,
    ],
)
@pytest.mark.parametrize("name", ["images", "cifar10"])
def test_broken_folder(tmp_path, breaks, name):
    root = make_folder(tmp_path)
    message = breaks(root)
    with pytest.raises(DataError, match=message) as caught:
        load(name, root)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_too_few_pictures_for_a_validation_part(tmp_path):
    with pytest.raises(DataError, match="cannot hold out 3 training images"):
        image_folder(make_folder(tmp_path, train=1))


# ---------------------------------------------------------------- torchvision's sets


def test_wrong_names_and_paths(tmp_path):
    with pytest.raises(DataError, match=r"unknown dataset 'cifar', expected one of digits, cifar10, .*images"):
        load("cifar")
    for name in ("cifar10", "mnist", "images"):
        with pytest.raises(DataError, match=f"{name}: .*--data-path"):
            load(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        load("cifar10", tmp_path / "file")
    with pytest.raises(DataError, match="absent: no folder train/"):
        load("images", tmp_path / "absent")


def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    stored = {}
    for file in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = rng.integers(0, 256, (40, 3 * 32 * 32), dtype=np.uint8)
        labels = [i % 10 for i in range(40)]
        (folder / file).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
        stored[file] = Counter((row.tobytes(), label) for row, label in zip(rows, labels, strict=True))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # these are not the real files

    dataset = load("cifar10", tmp_path, download=False)
    assert dataset.name == "CIFAR-10" and dataset.classes == tuple(names)
    assert [len(getattr(dataset, part)) for part in PARTS] == [180, 20, 40]
    assert np.bincount(dataset.validation.labels).tolist() == [2] * 10
    assert (dataset.padding, dataset.flip) == (4, True)
    assert pictures(dataset.test) == stored.pop("test_batch")
    assert pictures(dataset.train) + pictures(dataset.validation) == sum(stored.values(), Counter())


class StandIn:
    """What data.py uses of a torchvision data set, with made-up pictures."""

    classes = ("left", "right")
    size, channels = 28, None

    def __init__(self, root, train, download):
        shape = (60 if train else 10, self.size, self.size) + ((self.channels,) if self.channels else ())
        self.data = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape).to(torch.uint8) + 1
        self.targets = torch.arange(shape[0]) % 2

    def __len__(self):
        return len(self.targets)


@pytest.mark.parametrize(
    "name, cls, title, flip",
    [("mnist", "MNIST", "MNIST", False), ("fashion_mnist", "FashionMNIST", "Fashion-MNIST", True)],
)
def test_small_grey_pictures_get_a_border(tmp_path, monkeypatch, name, cls, title, flip):
    monkeypatch.setattr(torchvision.datasets, cls, StandIn)
    dataset = load(name, tmp_path)
    assert (dataset.name, dataset.flip, dataset.classes) == (title, flip, ("left", "right"))
    assert [len(getattr(dataset, part)) for part in PARTS] == [54, 6, 10]
    pixels = dataset.test.pixels
    assert pixels.shape == (10, 1, 32, 32)
    assert (pixels[:, :, 2:-2, 2:-2] > 0).all()
    assert pixels.sum() == pixels[:, :, 2:-2, 2:-2].sum()
    assert torch.equal((pixels[:, 0, 16, 16] - 1) % 2, dataset.test.labels)


def no_network(error):
    def make(*_, **__):
        raise error

    return make


@pytest.mark.parametrize(
    "error",
    [
        URLError("Name or service not known"),
        RuntimeError("Error downloading file:\nTried https://example.org/a,\ngot nothing"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_network(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network(error))
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path / "data")
    text = str(caught.value)
    assert text.startswith(f"CIFAR-10 is not in {tmp_path / 'data'} and could not be downloaded")
    assert "train/<class>/" in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_absent_and_no_download(tmp_path, name):
    with pytest.raises(DataError, match=r"is not in .* could not be downloaded"):
        load(name, tmp_path / "data", download=False)
    assert list(tmp_path.iterdir()) == []
