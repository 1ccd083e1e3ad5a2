"""Images as tensors: parts, normalization, augmentation, folders of pictures, torchvision's sets, bad input."""

import pickle
import shutil
import struct
import urllib.request
import zipfile
import zlib
from collections import Counter
from itertools import product
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

from bnn_utils import checkpoints, models, training
from bnn_utils.data import SAMPLE, DataError, augment, image_folder, load

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
    monkeypatch.chdir(root)
    assert load("images", ".").name == "zoo (JPEG/PNG)"


GREY16 = np.array([[0, 255, 256, 257], [32767, 32768, 65534, 65535]], np.uint16)
STEPS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10  # all pixels differ


def png(path, depth, colour, pixels, *chunks):
    """Write a PNG file from its samples (height, width, ...), byte by byte as its specification says."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def pgm(path):
    path.write_bytes(b"P5 4 2 65535 " + GREY16.astype(">u2").tobytes())


def oriented(path, number):
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(STEPS).save(path, exif=exif)


def indexed(path, **options):
    picture = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4), "P")
    picture.putpalette(STEPS.tobytes() + bytes(3 * 248))
    picture.save(path, **options)


def with_alpha(path, mode, alpha):
    picture = Image.fromarray(STEPS).convert(mode)
    picture.putalpha(Image.fromarray(np.full((2, 4), 255, np.uint8) - np.array([[0, 0, 0, 255 - alpha]] * 2, np.uint8)))
    picture.save(path)


def animation(path):
    first, second = (Image.fromarray(pixels) for pixels in (STEPS, 255 - STEPS))
    first.save(path, save_all=True, append_images=[second])


def grey(values):
    return np.repeat(np.asarray(values)[:, :, None], 3, axis=2)


LUMA = (STEPS @ np.array([19595, 38470, 7471]) + 0x8000) >> 16  # ITU-R 601, as Pillow makes grey of colours
INK = np.stack([STEPS[:, :, 0], STEPS[:, :, 1], STEPS[:, :, 2], np.full((2, 4), 51, np.uint8)], 2)
READ = {
    "16-bit grey": ("x.png", lambda path: png(path, 16, 0, GREY16), grey(GREY16 // 256)),
    "16-bit grey TIFF": ("x.tif", lambda path: Image.fromarray(GREY16).save(path), grey(GREY16 // 256)),
    "8 bits as 16": ("x.png", lambda path: png(path, 16, 0, LUMA * 257), grey(LUMA)),
    "16-bit colour": ("x.png", lambda path: png(path, 16, 2, STEPS.astype(np.uint16) * 257), STEPS),
    "16-bit PGM": ("x.ppm", pgm, grey(GREY16 // 256)),
    "8-bit grey": ("x.png", lambda path: png(path, 8, 0, LUMA), grey(LUMA)),
    "1 bit": ("x.png", lambda path: Image.fromarray(LUMA > 100).save(path), grey((LUMA > 100) * 255)),
    "palette": ("x.png", indexed, STEPS),
    "palette, opaque": ("x.png", lambda path: indexed(path, transparency=b"\xff" * 8), STEPS),
    "opaque": ("x.png", lambda path: with_alpha(path, "RGB", 255), STEPS),
    "opaque grey": ("x.png", lambda path: with_alpha(path, "L", 255), grey(LUMA)),
    "CMYK": (
        "x.tif",
        lambda path: Image.fromarray(INK, "CMYK").save(path),
        np.rint((255.0 - STEPS) * (255 - 51) / 255),
    ),
    "turned left": ("x.png", lambda path: oriented(path, 6), np.rot90(STEPS, -1)),
    "turned right": ("x.png", lambda path: oriented(path, 8), np.rot90(STEPS)),
    "upside down": ("x.png", lambda path: oriented(path, 3), STEPS[::-1, ::-1]),
    "mirrored": ("x.png", lambda path: oriented(path, 2), STEPS[:, ::-1]),
    "transposed": ("x.png", lambda path: oriented(path, 5), STEPS.transpose(1, 0, 2)),
    "as it is": ("x.png", lambda path: oriented(path, 1), STEPS),
}


def of_one_picture(root, name, write):
    """Make a folder of which all pictures are the same."""
    for part, count in (("train", 10), ("test", 1)):
        for number, label in product(range(count), "ab"):
            (root / part / label).mkdir(parents=True, exist_ok=True)
            write(root / part / label / f"{number}{name}")
    return root


@pytest.mark.parametrize("kind", READ)
def test_pictures_are_read_as_people_see_them(tmp_path, kind):
    name, write, expected = READ[kind]
    pixels = image_folder(of_one_picture(tmp_path, name, write)).test.pixels[0].permute(1, 2, 0).numpy()
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= (1 if kind == "CMYK" else 0)  # by how it rounds


REFUSED = {
    "transparent": ("x.png", lambda path: with_alpha(path, "RGB", 254), "has transparent pixels; lay it on a"),
    "transparent grey": ("x.png", lambda path: with_alpha(path, "L", 0), "has transparent pixels"),
    "a transparent colour": ("x.png", lambda path: indexed(path, transparency=3), "has transparent pixels"),
    "16-bit grey, transparent": (
        "x.png",
        lambda path: png(path, 16, 0, GREY16, (b"tRNS", b"\1\0")),
        "has transparent pixels",
    ),
    "animation": ("x.png", animation, "holds 2 pictures"),
    "animated WebP": ("x.webp", animation, "holds 2 pictures"),
    "pages": ("x.tif", animation, "holds 2 pictures"),
    "floats": ("x.tif", lambda path: Image.fromarray(LUMA.astype(np.float32)).save(path), "without a known range"),
    "32 bits": ("x.tif", lambda path: Image.fromarray(LUMA.astype(np.int32)).save(path), "without a known range"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pictures_that_could_be_read_in_two_ways_are_refused(tmp_path, kind):
    name, write, told = REFUSED[kind]
    of_one_picture(tmp_path, name, lambda path: Image.fromarray(STEPS).save(path))
    write(tmp_path / "train" / "b" / f"7{name}")
    with pytest.raises(DataError, match=rf"b.7{name}: .*{told}"):
        image_folder(tmp_path)


def test_other_files_are_not_pictures(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("six legs")
    (root / "train" / "README").write_text("a file, not a class")
    assert len(image_folder(root).train) == 27


LEFT = [".ipynb_checkpoints/0-checkpoint.png", ".DS_Store", "Thumbs.db", "__MACOSX/ant/._00.png", "@eaDir/00.png"]


def test_hidden_and_system_files_and_folders_are_passed_over(tmp_path):
    clean = image_folder(make_folder(tmp_path))
    assert clean.passed_over == 0
    for folder in ("train", "test", "train/ant", "test/cow"):
        for path in [*LEFT, "desktop.ini", "lost+found/00.png"]:
            write_picture(tmp_path / "other.png", (1, 2, 3))
            (tmp_path / folder / path).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "other.png").rename(tmp_path / folder / path)
    write_picture(tmp_path / "train" / "bee" / "._03.png", (1, 2, 3))
    dataset = image_folder(tmp_path)
    assert dataset.passed_over == 4 * 7 + 1
    assert (dataset.classes, dataset.name) == (clean.classes, clean.name)
    assert all(pictures(getattr(dataset, part)) == pictures(getattr(clean, part)) for part in PARTS)


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION = torchvision.datasets.FashionMNIST.classes
MNIST = torchvision.datasets.MNIST.classes


def copied(root, names):
    """Make a folder of pictures that are as red as the number of their class."""
    for part, count in (("train", 10), ("test", 1)):
        for (number, name), index in product(enumerate(names), range(count)):
            write_picture(root / part / name / f"{index}.png", (number, 0, 0), size=(2, 2))
    return root


@pytest.mark.parametrize(
    ("name", "classes", "folders"),
    [
        ("cifar10", CIFAR10, CIFAR10),
        ("cifar10", CIFAR10, [name.title() for name in CIFAR10]),
        ("cifar10", CIFAR10, [str(number) for number in range(10)]),
        ("mnist", MNIST, [str(number) for number in range(10)]),
        ("mnist", MNIST, MNIST),
        ("mnist", MNIST, ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]),
        ("fashion_mnist", FASHION, [name.replace("/", "_") for name in FASHION]),
        ("fashion_mnist", FASHION, [name.replace("/", "").replace(" ", "_").lower() for name in FASHION]),
        ("fashion_mnist", FASHION, [f"{number:02d}" for number in range(10)]),
    ],
)
def test_a_copy_of_a_published_set_has_its_classes_in_its_order(tmp_path, name, classes, folders):
    dataset = load(name, copied(tmp_path, folders))
    assert dataset.classes == tuple(classes)
    for part in PARTS:
        images = getattr(dataset, part)
        assert torch.equal(images.pixels[:, 0, 0, 0].long(), images.labels)
    assert dataset.name.removesuffix(" (PNG)").lower().replace("-", "_") in (name, name.replace("cifar10", "cifar_10"))


def test_a_copy_of_cifar100(tmp_path):
    numbers = load("cifar100", copied(tmp_path / "numbers", [str(number) for number in range(100)]))
    assert torch.equal(numbers.test.pixels[:, 0, 0, 0].long(), numbers.test.labels)
    assert (numbers.classes[0], numbers.classes[1], numbers.classes[58]) == ("apple", "aquarium_fish", "pickup_truck")
    names = [name.replace("_", " ") for name in numbers.classes]
    assert load("cifar100", copied(tmp_path / "names", names)).classes == numbers.classes


@pytest.mark.parametrize(
    ("name", "folders", "told"),
    [
        ("cifar10", ["cat", "dog"], "has 2 class folders, .* not the 10 classes of CIFAR-10"),
        ("cifar10", ["plane", "car", *CIFAR10[2:]], "unknown are car, plane; missing are airplane, automobile"),
        ("cifar10", [*CIFAR10, "yak"], "has 11 class folders.*unknown are yak"),
        ("cifar10", [*CIFAR10, "cat_"], "has 11 class folders.*some are there twice"),
        ("cifar100", CIFAR10, "the 100 classes of CIFAR-100 .*missing are .* ..."),
        ("mnist", [str(number) for number in range(1, 11)], "unknown are 10; missing are 0 - zero"),
    ],
)
def test_other_classes_are_not_called_by_the_name_of_a_published_set(tmp_path, name, folders, told):
    root = copied(tmp_path, folders)
    with pytest.raises(DataError, match=f"{told}.*; pictures of other classes are --dataset images"):
        load(name, root)
    assert load("images", root).classes == tuple(sorted(folders))


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
def test_broken_folder(tmp_path, breaks):
    root = make_folder(tmp_path)
    message = breaks(root)
    with pytest.raises(DataError, match=message) as caught:
        load("images", root)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_too_few_pictures_for_a_validation_part(tmp_path):
    with pytest.raises(DataError, match="cannot hold out 3 training images"):
        image_folder(make_folder(tmp_path, train=1))


# ---------------------------------------------------------------- torchvision's sets


def test_wrong_names_and_paths(tmp_path):
    with pytest.raises(DataError, match=r"unknown dataset 'cifar', expected one of digits, cifar10-sample, .*images"):
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


@pytest.mark.parametrize("name, there", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python.tar.gz")])
@pytest.mark.parametrize("download", [True, False])
def test_a_corrupt_download_is_told_as_such(tmp_path, monkeypatch, name, there, download):
    monkeypatch.setattr(urllib.request, "urlopen", no_network(URLError("no network here")))
    if there.endswith(".gz"):
        (tmp_path / there).write_bytes(b"cut short")
    else:
        (tmp_path / there).mkdir()
        (tmp_path / there / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(DataError, match=rf"{there} cannot be used, cut short or changed, .*; delete it"):
        load(name, tmp_path, download=download)
    assert (tmp_path / there).exists()


def test_a_file_of_mnist_that_is_cut_short_is_told_as_such(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, kind in product(("train", "t10k"), ("images-idx3", "labels-idx1")):
        (raw / f"{part}-{kind}-ubyte").write_bytes(struct.pack(">4I", 2051, 60_000, 28, 28) + b"too few")
    with pytest.raises(DataError, match=r"raw cannot be used, cut short or changed") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the sample of CIFAR-10


def test_sample_is_100_test_images_a_class_as_the_shipped_networks_want_them():
    sample = load("cifar10-sample")
    assert sample.test.pixels.shape == (1000, 3, 32, 32) and sample.test.pixels.dtype == torch.uint8
    assert sample.test.labels.bincount().tolist() == [100] * 10
    assert len(sample.train) == len(sample.validation) == 0
    facts = checkpoints.pretrained("vgg_cifar10")[1]
    sample.test.check_trained(facts)
    assert sample.name == facts["dataset"]


def test_sample_labels_are_those_of_the_folders(tmp_path):
    """Read as a folder of pictures, the files give the same images and labels, in another order."""
    with zipfile.ZipFile(SAMPLE) as archive:
        archive.extractall(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "train")
    folder = load("cifar10", tmp_path).test
    sample = load("cifar10-sample").test

    def content(images):
        return sorted((int(label), image.numpy().tobytes()) for image, label in zip(images.pixels, images.labels))

    assert content(sample) == content(folder)


def test_sample_cannot_be_trained_on():
    sample = load("cifar10-sample")
    with pytest.raises(ValueError, match="no training images"):
        training.train(models.resnet_binary(width=0.05), sample)
