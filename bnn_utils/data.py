"""Images as tensors: digits, a sample of CIFAR-10 that ships here, torchvision's sets, or a folder of pictures."""

import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

PARTS = ("train", "validation", "test")
SPLIT_SEED = 0  # the parts are the same for every run, whatever its own seed
_SAME = 1e-6  # a mean or std is the same up to here: far above rounding, far below a pixel's level
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".tif", ".tiff"}


class DataError(ValueError):
    """The data cannot be used; the message says which file or folder, and what to do."""


def _plain(name: str) -> str:
    """Return a class name without what copies of a data set change: case, spaces, dashes, Unicode's form."""
    return re.sub(r"[-_/\s]+", "", unicodedata.normalize("NFKC", str(name)).casefold())


@dataclass(frozen=True)
class Images:
    """Labelled images of one part of a data set, and how a network wants to see them.

    Attributes:
        pixels: uint8 (n, channels, height, width).
        labels: int64 (n,).
        mean, std: of the training part's pixels per channel, in 0..1.
        dataset: the name that tables and figures give.
        classes: class names, index by label.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return uint8 `pixels` (n, channels, height, width) as floats, (pixel / 255 - mean) / std per channel."""
        mean, std = (torch.tensor(x, device=pixels.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return (network input, labels) of the images that a slice or an index tensor names."""
        return self.normalized(self.pixels[index]), self.labels[index]

    @property
    def facts(self) -> dict[str, Any]:
        """What the file of a network that is trained on these images has to tell: mean, std and classes."""
        return {"mean": self.mean, "std": self.std, "classes": self.classes}

    def as_trained(self, facts: Mapping[str, Any]) -> "Images":
        """Return the same images, normalized as those that a network was trained on.

        Args:
            facts: of the network, as `bnn_utils.checkpoints.load` returns them. What they do not tell is taken as it
                is: a file of BinaryNet.pytorch tells how many classes there are, not their names.

        Raises:
            DataError: the network is one for other channels, another size or other classes, or for the same in another
                order.
        """
        channels, side = self.pixels.shape[1], self.pixels.shape[-1]
        config = facts.get("config", {})
        mean, std = (tuple(facts.get(name, getattr(self, name))) for name in ("mean", "std"))
        wanted = (config.get("in_channels", len(mean)), config.get("input_size", side))
        count = config.get("num_classes", len(self.classes))
        if (*wanted, count) != (channels, side, len(self.classes)):
            described = "{} channels, {} pixels a side, {} classes"
            raise DataError(
                f"the network wants {described.format(*wanted, count)}; "
                f"{self.dataset} has {described.format(channels, side, len(self.classes))}"
            )
        theirs = tuple(facts.get("classes", self.classes))
        if list(map(_plain, theirs)) != list(map(_plain, self.classes)):
            raise DataError(
                f"{self.dataset} has the classes {', '.join(self.classes)}; the network was trained on "
                f"{', '.join(map(str, theirs))}. They are numbered in this order, by which the folders of pictures are "
                "sorted: give them the names that the network knows"
            )
        return replace(self, mean=mean, std=std)

    def check_trained(self, facts: Mapping[str, Any]) -> None:
        """Raise DataError if these images are not as a network was trained on, see `as_trained`."""
        wanted = self.as_trained(facts)
        for name in ("mean", "std"):
            there, here = getattr(wanted, name), getattr(self, name)
            if any(abs(x - y) > _SAME for x, y in zip(there, here, strict=True)):
                raise DataError(
                    f"{self.dataset} is normalized by the {name} {here}, the network was trained on images normalized "
                    f"by the {name} {there}; images.as_trained(facts) prepares images by the facts of a checkpoint"
                )

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def limit(self, n: int | None) -> "Images":
        """Return the first `n` images (all for None); the order is shuffled once when a part is loaded.

        Raises:
            ValueError: n < 1.
        """
        if n is None:
            return self
        if n < 1:
            raise ValueError(f"limit must be at least 1, got {n}")
        return replace(self, pixels=self.pixels[:n].clone(), labels=self.labels[:n].clone())  # not to keep the others


@dataclass(frozen=True)
class Dataset:
    """The three parts of a data set, and the augmentation that suits it.

    Attributes:
        train, validation, test: Images; validation is a fixed stratified split of the training set.
        padding: pixels of zero padding for random crops, 0 for none.
        flip: whether a mirrored image is still of its class.
        passed_over: how many hidden and system files and folders lay among its folders of pictures.
    """

    train: Images
    validation: Images
    test: Images
    padding: int
    flip: bool
    passed_over: int = 0

    @property
    def name(self) -> str:
        return self.test.dataset

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data set on `device`."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def as_trained(self, facts: Mapping[str, Any]) -> "Dataset":
        """Return the same data set, all parts of it normalized by a network's facts, see `Images.as_trained`."""
        return replace(self, **{part: getattr(self, part).as_trained(facts) for part in PARTS})


def augment(pixels: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Return a random crop of the zero-padded images, half of them mirrored, as one batched operation.

    Args:
        pixels: uint8 (n, channels, height, width).
        padding: pixels added on each side before cropping back to the same size.
        flip: mirror each image left to right with probability 1/2.
        generator: a CPU generator, so that a seed gives the same images on every device.

    Returns:
        uint8 tensor of the same shape and device.
    """
    n, _, height, width = pixels.shape
    if padding:
        top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(pixels.device)
        rows = top[:, None] + torch.arange(height, device=pixels.device)
        columns = left[:, None] + torch.arange(width, device=pixels.device)
        padded = functional.pad(pixels, [padding] * 4)
        image = torch.arange(n, device=pixels.device)[:, None, None]
        pixels = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(pixels.device)
        pixels = torch.where(mirrored.view(n, 1, 1, 1), pixels.flip(3), pixels)
    return pixels.contiguous()


_Raw = tuple[np.ndarray, np.ndarray]  # pixels, uint8 (n, channels, height, width); labels, int64 (n,)


def _assemble(
    train: _Raw, test: _Raw, validation: int, dataset: str, classes: Sequence[str], padding: int, flip: bool
) -> Dataset:
    pixels, labels = train
    indices = np.arange(len(labels))
    try:
        kept, held_out = train_test_split(indices, test_size=validation, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise DataError(f"{dataset}: cannot hold out {validation} training images for validation ({error})") from None
    scaled = pixels[kept].reshape(len(kept), pixels.shape[1], -1) / np.float32(255)
    mean = tuple(float(m) for m in scaled.mean((0, 2), dtype=np.float64))
    std = tuple(max(float(s), 1e-3) for s in scaled.std((0, 2), dtype=np.float64))

    def images(raw: _Raw, order: np.ndarray) -> Images:
        pixels, labels = (torch.from_numpy(np.ascontiguousarray(part[order])) for part in raw)
        return Images(pixels, labels, mean, std, dataset, tuple(classes))

    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(test[1]))
    return Dataset(images(train, kept), images(train, held_out), images(test, shuffled), padding, flip)


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey pixels, ten classes: 1,077 / 360 / 360 images.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=SPLIT_SEED)
    classes = [str(name) for name in bunch.target_names]
    return _assemble((pixels[rest], labels[rest]), (pixels[test], labels[test]), 360, "digits", classes, 0, False)


SAMPLE = Path(__file__).with_name("cifar10-sample.zip")


def cifar10_sample() -> Dataset:
    """Return 1,000 test images of CIFAR-10, 100 a class, that come with this package as lossy JPEG files.

    They are for networks that are trained: the other parts are empty. They are normalized by the mean and std of the
    45,000 training images of the same copy of CIFAR-10, on which the networks in checkpoints/ were trained.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    from PIL import Image

    with zipfile.ZipFile(SAMPLE) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("test/"))
        pictures = [np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    pixels = torch.from_numpy(np.stack(pictures)[order]).permute(0, 3, 1, 2).contiguous()
    classes = _PUBLISHED["cifar10"].classes
    labels = torch.tensor([classes.index(names[i].split("/")[1]) for i in order])
    mean = (0.49145407576145783, 0.4823889152947957, 0.44688976587516016)
    std = (0.2450827000580322, 0.24273598689391118, 0.26067803599664)
    images = Images(pixels, labels, mean, std, "CIFAR-10 (JPEG)", classes)
    none = replace(images, pixels=pixels[:0].clone(), labels=labels[:0].clone())
    return Dataset(none, none, images, 4, True)


def _decode(path: Path) -> np.ndarray:
    """Return a picture as people see it, uint8 (height, width, 3); refuse one of which that is not certain.

    It is turned as its EXIF orientation says. Of 16 bits a channel the high byte is kept, which gives an 8-bit picture
    back that was stored with 16; palettes, grey, black and white, and CMYK become RGB.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            kind, frames = file.format, getattr(file, "n_frames", 1)
            if frames > 1 and kind != "MPO":  # a photograph with a small copy or a depth map behind it
                raise DataError(f"{path}: holds {frames} pictures, an animation or pages; keep one")
            picture = ImageOps.exif_transpose(file)
            deep = picture.mode.startswith("I;16") or (picture.mode == "I" and kind in ("PNG", "PPM"))
            if not deep and picture.mode in ("I", "F"):
                raise DataError(f"{path}: its pixels are numbers without a known range; store it with 8 or 16 bits")
            if picture.has_transparency_data:
                picture = picture if deep else picture.convert("RGBA")
                if deep or np.asarray(picture)[:, :, 3].min() < 255:
                    raise DataError(f"{path}: has transparent pixels; lay it on a background, and store it without")
            if deep:
                return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds for a broken picture, SyntaxError among them
        raise DataError(f"{path}: not a picture that can be read ({error})") from None


# What systems and programs leave in folders; what begins with a dot is theirs too.
_SYSTEM = {"__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "lost+found"}
_SYSTEM |= {"$recycle.bin", "system volume information"}


def _entries(folder: Path) -> tuple[list[Path], int]:
    """Return what is in a folder, sorted by name, and how many hidden and system files and folders beside."""
    every = sorted(folder.iterdir(), key=lambda entry: entry.name)
    kept = [entry for entry in every if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM]
    return kept, len(every) - len(kept)


def _list_part(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """Return the classes of train/ or test/, sorted by name, with the paths of their pictures; what is passed over."""
    entries, passed_over = _entries(folder)
    classes = {}
    for entry in entries:
        if entry.is_dir():
            files, hidden = _entries(entry)
            classes[entry.name] = [path for path in files if path.suffix.lower() in _SUFFIXES]
            passed_over += hidden
    if not classes:
        raise DataError(f"{folder}: holds no class folders, expected {folder}/<class>/<pictures>")
    return classes, passed_over


def _in_order_of(title: str, classes: Sequence[str], root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the class folders of a copy of a published set in the order of its classes, and the class of each.

    Folders may write a class in other ways (`_plain`), or have its number, or one half of MNIST's "0 - zero".
    """
    numbers = {
        alias: number
        for number, name in enumerate(classes)
        for alias in (str(number), _plain(name), *map(_plain, name.split(" - ")))
    }
    plain = {name: _plain(name) for name in names}
    found = {name: numbers.get(str(int(x)) if x.isdecimal() else x, -1) for name, x in plain.items()}
    if sorted(found.values()) != list(range(len(classes))):
        others = [name for name, number in found.items() if number < 0]
        absent = [name for number, name in enumerate(classes) if number not in found.values()]
        listed = [
            f"{what} {', '.join(part[:5])}{' ...' if len(part) > 5 else ''}"
            for what, part in (("unknown are", others), ("missing are", absent))
            if part
        ]
        raise DataError(
            f"{root}: has {len(names)} class folders, and they are not the {len(classes)} classes of {title}"
            f" ({'; '.join(listed) or 'some are there twice'}); pictures of other classes are --dataset images"
        )
    return {name: classes[number] for name, number in sorted(found.items(), key=lambda item: item[1])}


def _read_part(folder: Path, classes: Mapping[str, Sequence[Path]]) -> tuple[_Raw, set[str]]:
    for name, found in classes.items():
        if not found:
            raise DataError(f"{folder / name}: holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    paths = [path for found in classes.values() for path in found]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in classes.values()])
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(_decode, paths))
    shape = pictures[0].shape
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != shape:
            seen, wanted = (f"{s[1]}x{s[0]}" for s in (picture.shape, shape))
            raise DataError(f"{path}: is {seen} pixels, the others of its set {wanted}; make all of one size")
    pixels = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
    return (pixels, labels.astype(np.int64)), {path.suffix.lower() for path in paths}


def image_folder(
    path: str | os.PathLike[str], name: str | None = None, classes: Sequence[str] | None = None
) -> Dataset:
    """Return any folder of pictures with train/<class>/ and test/<class>/ below it; a tenth is held out.

    Hidden files and folders, and those that systems leave everywhere, are passed over.

    Args:
        path: the folder; all pictures of one size. They become RGB of 8 bits, turned as their EXIF orientation says.
        name: what tables call it (the folder's name by default); the kind of file is added, as in
            "CIFAR-10 (JPEG)".
        classes: those of the published set that this is a copy of, in its order; by default the folders' names,
            sorted.

    Raises:
        DataError: a folder is missing or empty, the classes of train and test differ, or are not `classes`; a file is
            not a picture, an animation, has transparent pixels, or pixels without a known range.
    """
    root = Path(os.path.expanduser(path))
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise DataError(f"{root}: no folder {part}/ in it, expected train/<class>/ and test/<class>/ pictures")
    listed, passed_over = zip(*(_list_part(root / part) for part in ("train", "test")))
    names, others = map(list, listed)
    if names != others:
        differing = ", ".join(sorted(set(names) ^ set(others)))
        raise DataError(f"{root}: train/ and test/ hold different classes ({differing})")
    title = name or root.resolve().name
    known = dict(zip(names, names)) if classes is None else _in_order_of(title, classes, root, names)
    (train, suffixes), (test, _) = (
        _read_part(root / part, {folder: found[folder] for folder in known})
        for part, found in zip(("train", "test"), listed)
    )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(f"{root}: the pictures of train/ and test/ differ in size")
    kinds = "/".join(sorted({suffix[1:].upper().replace("JPG", "JPEG") for suffix in suffixes}))
    held_out = max(len(known), len(train[1]) // 10)
    dataset = _assemble(train, test, held_out, f"{title} ({kinds})", list(known.values()), 4, True)
    return replace(dataset, passed_over=sum(passed_over))


@dataclass(frozen=True)
class _Published:
    title: str
    torchvision: str
    padding: int
    flip: bool
    classes: tuple[str, ...]  # as torchvision names them, index by label


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
_DIGITS = "zero one two three four five six seven eight nine"
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_PUBLISHED = {
    "cifar10": _Published("CIFAR-10", "CIFAR10", 4, True, tuple(_CIFAR10.split())),
    "cifar100": _Published("CIFAR-100", "CIFAR100", 4, True, tuple(_CIFAR100.split())),
    "mnist": _Published("MNIST", "MNIST", 2, False, tuple(f"{i} - {x}" for i, x in enumerate(_DIGITS.split()))),
    "fashion_mnist": _Published("Fashion-MNIST", "FashionMNIST", 2, True, _FASHION),
}


def _torchvision(published: _Published, path: Path, download: bool) -> Dataset:
    import torchvision

    make: Callable[..., Any] = getattr(torchvision.datasets, published.torchvision)
    inner = path / published.torchvision
    absent = [folder for folder in (inner / "raw", inner, path, *path.parents) if not folder.exists()]
    parts = [getattr(make, "base_folder", None), getattr(make, "filename", None), f"{published.torchvision}/raw"]
    there = [path / part for part in parts if part and (path / part).exists()]
    try:
        train, test = make(path, train=True, download=download), make(path, train=False, download=download)
    except Exception as error:  # torchvision raises many kinds for files that are cut short
        for folder in absent:  # torchvision makes them before it finds that there is no network
            with suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split()) or type(error).__name__
        if there:
            raise DataError(
                f"{published.title}: {' and '.join(map(str, there))} cannot be used, cut short or changed, and could "
                f"not be downloaded again ({reason}); delete it, and it will be downloaded anew"
            ) from None
        raise DataError(
            f"{published.title} is not in {path} and could not be downloaded ({reason}); "
            f"put torchvision's files there, or folders train/<class>/ and test/<class>/ of pictures"
        ) from None

    def raw(part: Any) -> _Raw:
        pixels = np.asarray(part.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        if pixels.shape[-1] == 28:  # the networks want a multiple of 8
            pixels = np.pad(pixels, [(0, 0), (0, 0), (2, 2), (2, 2)])
        return np.ascontiguousarray(pixels), np.asarray(part.targets, np.int64)

    validation, classes = len(train) // 10, list(train.classes)
    return _assemble(raw(train), raw(test), validation, published.title, classes, published.padding, published.flip)


DATASETS = ("digits", "cifar10-sample", *_PUBLISHED, "images")


def load(name: str, path: str | os.PathLike[str] | None = None, *, download: bool = True) -> Dataset:
    """Return a data set by name, as tensors in memory, split into train, validation and test.

    Args:
        name: one of DATASETS; "images" is any folder of pictures, see `image_folder`.
        path: where the data lies, ~ for the home folder: torchvision's layout (downloaded if absent), or
            train/<class>/ and test/<class>/ pictures of the set's own classes. Not needed for digits and
            cifar10-sample, see `digits` and `cifar10_sample`.
        download: fetch what is absent.

    Raises:
        DataError: an unknown name, no path, or data that cannot be read or fetched.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}, expected one of {', '.join(DATASETS)}")
    if name == "digits":
        return digits()
    if name == "cifar10-sample":
        return cifar10_sample()
    if path is None:
        raise DataError(f"{name}: say where the pictures lie, or shall be downloaded to, with --data-path")
    root = Path(os.path.expanduser(path))
    if name == "images":
        return image_folder(root)
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: is not a folder")
    if (root / "train").is_dir() or (root / "test").is_dir():
        return image_folder(root, _PUBLISHED[name].title, _PUBLISHED[name].classes)
    return _torchvision(_PUBLISHED[name], root, download)
