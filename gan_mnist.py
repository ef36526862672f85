"""Train a generative adversarial network on MNIST, measure it every epoch, leave pictures.

    python gan_mnist.py                           train; look into samples/
    python gan_mnist.py train --resume            go on with a run that stopped
    python gan_mnist.py generate --digits 2026    draw digits, no training needed
    python gan_mnist.py evaluate                  every metric of the best generator
    python gan_mnist.py inception                 train the network that measures

Every constant below is also a flag (EPOCHS is --epochs) and a field of Settings.
"""

# --- Settings: tweak these. [brackets] hold what is allowed ------------------------------------

# The run
EPOCHS = 80  # passes over the training images [1..1000000]
MAX_MINUTES = 0.0  # end training after this many minutes, all saved; 0: no limit [0.0..1e6]
BATCH_SIZE = 256  # images per training step [2..65536]
SEED = 0  # same seed, same machine: same bytes [0..2147483647]
DATASET = "mnist"  # mnist, fashion_mnist, cifar10, or a path: .npz, IDX, folder of pictures
IMAGE_SIZE = 0  # pixels a side: cut to the middle square and resized; 0: as they are [0|4..1024]
IMAGE_COLOUR = "auto"  # of what is learnt; auto: as it is [auto|grey|colour]
SAMPLES_DIR = "samples"  # where pictures and metrics land
CHECKPOINTS_DIR = "checkpoints"  # where .h5 files and the training state land

# The networks
ARCHITECTURE = "dense"  # kind of layers; conv: convolutions at the image's end [dense|conv]
CONDITIONAL = True  # both networks are told the digit's class; false: the plain GAN [true|false]
LATENT_DIM = 64  # numbers that the generator makes an image from [2..65536]
GENERATOR_WIDTHS = (256, 512)  # units of its hidden layers, latent side first [1..65536, ...]
DISCRIMINATOR_WIDTHS = (512, 256)  # units of its hidden layers, image side first [1..65536, ...]
CONV_CHANNELS = 8  # of the convolution nearest the image; doubled at each halving [1..4096]

# The game
LOSS = "relativistic"  # [non_saturating|minimax|least_squares|hinge|wasserstein|relativistic]
R1 = 0.1  # weight of the gradient penalty on real images [0.0..1e6]
R2 = 0.1  # weight of the gradient penalty on generated images [0.0..1e6]
GRADIENT_PENALTY = 0.0  # weight of Wasserstein's own, on slopes between both: 10 [0.0..1e6]
SHIFT = 1  # pixels by which the discriminator's images are moved at random [0..8]
MINIBATCH_STD = True  # the discriminator is told how much a batch's images differ [true|false]

# The optimizers
GENERATOR_LEARNING_RATE = 1e-3  # of Adam, at the start [0.0..1.0]
DISCRIMINATOR_LEARNING_RATE = 1e-3  # of Adam, at the start [0.0..1.0]
DECAY_FROM = 0.5  # share of the run after which both rates fall linearly to zero [0.0..1.0]
BETA_1 = 0.0  # Adam's memory of gradients; with any, the players circle each other [0.0..0.9999]
BETA_2 = 0.99  # Adam's memory of squared gradients [0.0..0.999999]
EMA_DECAY = 0.999  # of the averaged generator, which is sampled and saved [0.0..0.999999]
PRECISION = "auto"  # of products; auto: what the processor has [auto|float32|bfloat16]

# The measuring
INCEPTION = "auto"  # network that measures; auto: one that reads the data [auto|mnist|imagenet]
EVALUATION_IMAGES = 10_000  # drawn for each measurement [100..1000000]
EVALUATE_EVERY = 1  # epochs between measurements [1..1000000]
SAMPLE_EVERY = 1  # epochs between picture grids [1..1000000]
CHECKPOINT_EVERY = 10  # epochs between numbered .h5 files [1..1000000]

import argparse
import contextlib
import csv
import dataclasses
import faulthandler
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from PIL import Image, ImageDraw, ImageFont, ImageOps


class _ImportedOnFirstUse:  # TensorFlow takes four seconds, which --help doesn't wait for
    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        _start_tensorflow()
        return getattr(importlib.import_module(self._name), attribute)


@functools.cache
def _start_tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # hides what C++ writes there before any log level counts
    try:
        tensorflow = importlib.import_module("tensorflow")
        config, half = tensorflow.config, max(1, os.cpu_count() // 2)
        # The step's products are small: two side by side on half the cores each took 6.5 ms a
        # step where one after the other on all of two cores took 9.3 (a prototype of the step).
        with contextlib.suppress(RuntimeError):  # in a notebook that has used TensorFlow before
            config.threading.set_inter_op_parallelism_threads(2)
            config.threading.set_intra_op_parallelism_threads(half)
            for gpu in config.list_physical_devices("GPU"):
                config.experimental.set_memory_growth(gpu, True)
        tensorflow.get_logger().setLevel("ERROR")
        tensorflow.zeros(1)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


h5py, keras, tf = map(_ImportedOnFirstUse, ("h5py", "keras", "tensorflow"))


class UsageError(ValueError):
    """The user asked for something that cannot be: one line, exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: one line, exit status 1."""


def _reason(error):  # its first line, without what TensorFlow and Python put around it
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"^{{.*?}} |\[Errno \d+\] | \[Op:.*", "", line)


HERE = Path(__file__).resolve().parent
_LINE = re.compile(r"^([A-Z][A-Z0-9_]*)\b.*?=[^#\n]*(?:# *(.*?) ?(?:\[(.+)\])?)?$", re.MULTILINE)
_BLOCK = Path(__file__).read_text("utf-8").split("\nimport ")[0]
SETTINGS = {  # name: default, what it does, what is allowed, as the brackets have it
    name.lower(): (tuple(x) if isinstance(x := globals()[name], list) else x, words, allowed)
    for name, words, allowed in _LINE.findall(_BLOCK)
}
KINDS = {  # how a text is read, what it must be
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "one of"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "one of"),
    tuple: (lambda text: tuple(map(int, text.split(","))), "whole numbers"),
}


def _kind(allowed):  # by the brackets: the value may have been edited to any type
    if allowed.endswith(", ..."):
        return tuple
    if ".." in allowed:
        return float if "." in allowed.replace("..", "") else int
    return bool if allowed == "true|false" else str


def setting_as_text(value):
    """Return what to type for a setting's value, which may be a tuple or list."""
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text.lower() if isinstance(value, bool) else text


def _is_allowed(value, allowed):
    if isinstance(value, tuple):
        return all(_is_allowed(part, allowed.removesuffix(", ...")) for part in value)
    for part in allowed.split("|"):
        low, _, high = part.partition("..")
        if part in ("", setting_as_text(value)) or (high and float(low) <= value <= float(high)):
            return True
    return False


def _read_settings(settings):  # each may be given as its text, as on the command line
    for name, (default, _, allowed) in SETTINGS.items():
        given, (read, kind) = getattr(settings, name), KINDS[_kind(allowed)]
        if not allowed and not isinstance(default, str):
            raise UsageError(f"{name.upper()} has lost the [...] at its line's end in gan_mnist.py")
        with contextlib.suppress(ValueError, KeyError):
            value = read(setting_as_text(given))
            if _is_allowed(value, allowed):
                object.__setattr__(settings, name, value)
                continue
        must = f"but must be {kind} {allowed}".rstrip()
        raise UsageError(f"--{name.replace('_', '-')} is {given!r}, {must}")
    if settings.dataset not in DATASETS and not os.path.exists(settings.dataset):
        known = ", ".join(DATASETS)
        raise UsageError(f"--dataset is {settings.dataset!r}, but must be {known} or a path")


Settings = dataclasses.make_dataclass(
    "Settings",
    [(name, _kind(allowed), default) for name, (default, _, allowed) in SETTINGS.items()],
    frozen=True,
    namespace={"__post_init__": _read_settings},
)
Settings.__doc__ = "The constants above in lower case, immutable. Raises UsageError for bad values."


# --- Data --------------------------------------------------------------------------------------

MNIST_MIRRORS = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
    "https://s3.amazonaws.com/img-datasets/mnist.npz",
)
MNIST_DIGESTS = {  # SHA-256 of each array's bytes: a re-compressed copy is as good as any other
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
STALL_SECONDS = 9  # without an answer or a byte
LARGEST_DATASET = 4 * 2**30  # bytes, unpacked
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm"}
PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM")  # EPS would run a program
IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")  # as MNIST, EMNIST, Fashion-MNIST have it


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C), labels uint8 (N,) or None, what outputs call them, unseen ones."""

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    test_images: np.ndarray | None = None


def fingerprint(dataset):
    """Return a line that tells a data set from any other, whatever it is called."""
    parts = (b"" if array is None else np.ascontiguousarray(array) for array in dataset[:2])
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    size = "x".join(map(str, dataset.images.shape[1:]))
    return f"{len(dataset.images):,} images of {size}, SHA-256 {digest[:16]}"


TEMPORARY = set()  # what to remove, also when Ctrl-C ends the process


@contextlib.contextmanager
def removed_after(path):
    """Give the path of a file or folder that is removed afterwards, also by Ctrl-C."""
    TEMPORARY.add(path)
    try:
        yield path
    finally:
        _remove(path)
        TEMPORARY.discard(path)


def _remove(path):
    with contextlib.suppress(OSError):  # Windows keeps open files; the next run tries again
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path`, for a file or a folder; sync and rename it after."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with removed_after(path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")) as new:
        yield new
        for part in (*new.glob("*"), new):
            _sync(part)
        os.replace(new, path)
        _sync(path.parent)


def _sync(path):
    errors = [OSError] if path.is_dir() else []  # Windows and some network drives sync no folders
    with contextlib.suppress(*errors):
        descriptor = os.open(path, os.O_RDONLY if errors else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keras_home():
    """Return the folder where Keras keeps what it downloads."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))


@contextlib.contextmanager
def downloading():
    """Give Keras' downloader a time limit, no progress bar in a log file, and one kind of error."""
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else io.StringIO()):
            yield
    except Exception as error:  # noqa: BLE001 (Keras raises bare ones)
        raise OSError(f"no download into {keras_home()}: {_reason(error)}") from None
    finally:
        socket.setdefaulttimeout(limit)


def cached_download(path, urls, read):
    """Return read(path), fetched first where `read` raises UsageError; None if no URL serves."""
    with contextlib.suppress(UsageError):
        return read(path)
    if path.exists():
        print(f"{path} is not as published; downloading it again.")
    for url in urls:
        try:
            with replacing(path) as partial:
                _download(url, partial)
                return read(partial)
        except (OSError, UsageError) as error:
            print(f"{url}: {error}")
    return None


def _download(url, path):
    # In a thread: a name may have many addresses, and the socket's time limit is for each of them.
    place = {"cache_dir": path.parent, "cache_subdir": ""}
    with downloading(), multiprocessing.pool.ThreadPool(1) as pool:
        done = pool.apply_async(keras.utils.get_file, (path.name, url), place)
        before = None
        while not done.ready():
            size = path.exists() and path.stat().st_size
            if size == before:
                raise OSError(f"nothing came for {STALL_SECONDS} seconds")
            before = size
            done.wait(STALL_SECONDS)
        done.get()


def load_mnist():
    """Return MNIST's arrays by name from the Keras cache or a mirror, None when neither has it."""
    return cached_download(keras_home() / "datasets" / "mnist.npz", MNIST_MIRRORS, _read_mnist)


def _read_mnist(path):
    arrays = read_npz(path)
    for name, digest in MNIST_DIGESTS.items():
        if hashlib.sha256(arrays.get(name, np.zeros(0)).tobytes()).hexdigest() != digest:
            raise UsageError("these bytes are not MNIST")
    return arrays


def load_dataset(settings):
    """Return the Dataset that `settings.dataset` names or is the path of.

    Raises UsageError for data that do not fit, OSError for a set that cannot be downloaded.
    """
    load = DATASETS.get(settings.dataset)
    return load(settings) if load else load_path(settings.dataset, settings)


def _load_mnist_or_stand_in(settings):
    arrays = load_mnist()
    if arrays is not None:
        images, labels, test_images = (arrays[name] for name in ("x_train", "y_train", "x_test"))
        return as_dataset(images, labels, "mnist", test_images, settings)
    print(
        "MNIST is neither in the Keras cache nor to be had from a mirror. Going on with\n"
        "a stand-in: 60,000 digits drawn by the shipped generator. THIS IS NOT MNIST.\n"
    )
    images, labels = draw_random(load_generator(SHIPPED_GENERATOR), 60_000, seed=0)
    return as_dataset(images, labels, "stand-in", settings=settings)


def _load_from_keras(settings):
    name = settings.dataset
    print(f"{name}: from Keras, which downloads it once.")
    with downloading():  # CIFAR-10 has pickles, in an archive whose SHA-256 Keras always checks
        (images, labels), (test_images, _) = getattr(keras.datasets, name).load_data()
    return as_dataset(images, labels.ravel(), name, test_images, settings)


DATASETS = {
    "mnist": _load_mnist_or_stand_in,
    "fashion_mnist": _load_from_keras,
    "cifar10": _load_from_keras,
}


def load_path(path, settings=None):
    """Return the Dataset in an .npz, in IDX files, or in a folder of pictures or of class folders.

    Raises UsageError for what cannot be read, claims to be enormous or does not fit.
    """
    path, settings = Path(path), settings or Settings()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    sets = [file for file in files if IDX_IMAGES.search(file.name)]
    load = _load_idx if sets else _load_pictures if path.is_dir() else _load_npz
    images, labels, test_images = load(sets or path, settings)
    name = os.fsencode(path.resolve().name).decode("utf-8", "replace")
    name += "/" * path.is_dir()  # a folder called mnist is not MNIST
    return as_dataset(images, labels, name, test_images, settings)


@contextlib.contextmanager
def _reading(path, kind):
    try:
        yield
    except Exception as error:  # noqa: BLE001 (parsers of files raise half a dozen kinds)
        raise UsageError(f"{path} is no {kind} to be read: {_reason(error)}") from None


def _bound(size, what, largest=math.inf):
    if size > min(largest, LARGEST_DATASET):
        raise UsageError(f"{what} would take {size:,} bytes, which is too much")


def read_npz(path):
    """Return the arrays of an .npz by name. Raises UsageError for what is not one."""
    with _reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        _bound(sum(member.file_size for member in archive.infolist()), "it")
        return {name.removesuffix(".npy"): _read_npy(archive, name) for name in archive.namelist()}


def _read_npy(archive, name):
    if not re.fullmatch(r"[\w .-]+\.npy", name):
        raise UsageError(f"{name!r} in it is no array")
    with archive.open(name) as file:  # NumPy's own reader takes whatever memory the header claims
        version, _ = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version}_0")
        shape, by_columns, dtype = read_header(file)
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if by_columns else "C")


def _load_npz(path, settings):
    arrays = read_npz(path)
    if not {"images", "x_train"} & set(arrays):
        raise UsageError(f"{path} holds no array named images or x_train: {sorted(arrays)}")
    names = (("images", "x_train"), ("labels", "y_train"), ("test_images", "x_test"))
    return [arrays.get(ours, arrays.get(keras_name)) for ours, keras_name in names]


def _load_idx(sets, settings):
    images, *others = [path for path in sets if "train" in path.name] or sets
    if others:
        raise UsageError(f"{images.parent} holds several sets: name one, like {images}")
    test = "test" if images.name.startswith("emnist") else "t10k"
    unseen = images.with_name(images.name.replace("train", test))
    labels = images.with_name(re.sub("images(.)idx3", r"labels\1idx1", images.name))
    labels, unseen = (
        _read_idx(path) if path != images and path.exists() else None for path in (labels, unseen)
    )
    if labels is not None and "emnist-letters" in images.name:
        labels = labels - 1  # A is number 1 there
    return _read_idx(images), labels, unseen


def _read_idx(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with _reading(path, "IDX file"), opener(path, "rb") as file:
        kind, dimensions = file.read(3), file.read(1)[0]
        shape = np.frombuffer(file.read(4 * dimensions), ">u4").tolist()
        if kind != b"\0\0\x08":
            raise UsageError("it does not begin as unsigned bytes do")
        _bound(math.prod(shape), f"{shape}", 1032 * path.stat().st_size)  # gzip's best
        return np.frombuffer(file.read(math.prod(shape) + 1), np.uint8).reshape(shape)


def _load_pictures(folder, settings):
    classes = [path for path in folder.glob("[!.]*") if path.is_dir()]
    classes.sort(key=lambda path: (path.name.isdecimal() and int(path.name), path.name))
    if classes and any(path.suffix.lower() in PICTURES for path in folder.glob("[!.]*")):
        raise UsageError(f"{folder} holds pictures beside folders: of which class are they?")
    paths, labels = [], []
    for label, place in enumerate(classes or [folder]):
        found = [path for path in sorted(place.glob("[!.]*")) if path.suffix.lower() in PICTURES]
        if not found:
            raise UsageError(f"{place} holds no picture: {' '.join(sorted(PICTURES))}")
        paths += found
        labels += [label] * len(found)
    shape = _read_picture(paths[0], settings).shape
    _bound(math.prod(shape) * len(paths), f"{folder}'s pictures")
    with multiprocessing.pool.ThreadPool() as pool:
        images = pool.imap(lambda path: _read_picture(path, settings, shape), paths)
        images = np.fromiter(images, (np.uint8, shape), len(paths))
    return images, np.array(labels) if classes else None, None


def _read_picture(path, settings, shape=None):
    with _reading(path, "picture"), Image.open(path, formats=PICTURE_FORMATS) as picture:
        if picture.mode[0] in "IF":
            raise UsageError("it has more than 8 bits a channel")
        image = _fitted(ImageOps.exif_transpose(picture), settings)
        if shape not in (None, image.shape):
            remedy = "--image-size or --image-colour makes them alike"
            raise UsageError(f"it is {image.shape}, others are {shape}: {remedy}")
        return image


def _fitted(picture, settings):
    as_it_is = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    modes = {"auto": as_it_is, "grey": "L", "colour": "RGB"}
    picture = picture.convert(modes[settings.image_colour])
    size = 2 * [settings.image_size] if settings.image_size else picture.size
    return np.atleast_3d(ImageOps.fit(picture, size))


def as_picture(image):
    """Return the Pillow picture of an image uint8 (H, W, 1 or 3)."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def as_dataset(images, labels=None, name="images", test_images=None, settings=None):
    """Return a Dataset of uint8 images (N, H, H) or (N, H, H, 1 or 3), whole labels (N,) or None.

    Images get the settings' size and colour; a size makes any H x W square. Raises UsageError
    where arrays are of another shape or type, or don't fit each other.
    """
    size, settings = np.size(images), settings or Settings()
    images = _as_images(images, name, settings)
    if test_images is not None:
        test_images = _as_images(test_images, f"{name}'s test images", settings)
        if test_images.shape[1:] != images.shape[1:]:
            raise UsageError(f"test images of {name} are not {images.shape[1:]} like the others")
    if images.size != size:  # resized or recoloured
        name += " " + "x".join(map(str, images.shape[1:]))
    if labels is not None:
        labels = np.asarray(labels)
        fits = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if not fits or not 0 <= labels.min() <= labels.max() <= 255:
            must = f"must be {len(images):,} whole numbers from 0 to 255"
            raise UsageError(f"{name}'s labels {must}, but are {labels.dtype} {labels.shape}")
        labels = labels.astype(np.uint8)
    return Dataset(images, labels, name, test_images)


def _as_images(images, name, settings):
    images = np.asarray(images)
    images = images[..., np.newaxis] if images.ndim == 3 else images
    height, width, channels = images.shape[1:] if images.ndim == 4 else (0, 0, 0)
    height, width = 2 * [settings.image_size] if settings.image_size else (height, width)
    known = images.dtype == np.uint8 and channels in (1, 3) and images.size
    if not known or not 4 <= height == width:
        form = "uint8 (N, H, H) or (N, H, H, 1 or 3), H at least 4 (--image-size makes them so)"
        raise UsageError(f"{name} must be {form}, but is {images.dtype} {images.shape}")
    channels = {"auto": channels, "grey": 1, "colour": 3}[settings.image_colour]
    if images.shape[1:] == (height, width, channels):
        return images
    _bound(len(images) * height * width * channels, name)
    return np.stack([_fitted(as_picture(image), settings) for image in images])


def refuse_untrainable(dataset, settings):
    """Raise UsageError for fewer images than a batch, a class without any, an odd batch size."""
    count, name = len(dataset.images), dataset.name
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if settings.batch_size % replicas:
        must = f"but must be a multiple of {replicas}, the number of devices"
        raise UsageError(f"--batch-size is {settings.batch_size}, {must}")
    if count < settings.batch_size:
        raise UsageError(f"{name} has {count} images, but --batch-size is {settings.batch_size}")
    if dataset.labels is not None and 0 in (counts := np.bincount(dataset.labels)):
        missing = f"class {np.argmin(counts)} of 0 to {len(counts) - 1}"
        raise UsageError(f"{name} has no image of {missing}: number the classes without a gap")


# --- Networks ----------------------------------------------------------------------------------

ROUNDING = "TF_SET_ONEDNN_FPMATH_MODE"  # the environment variable that has oneDNN round products


def _dense_generator(hidden, settings, image_shape, dtype):
    for width in settings.generator_widths:
        hidden = _dense(width, dtype, use_bias=False)(hidden)
        hidden = _normalised(hidden)
    hidden = _dense(math.prod(image_shape), dtype)(hidden)
    return keras.layers.Reshape(image_shape)(hidden)


def _normalised(hidden):
    # A short memory: the statistics must be right after a hundred steps already.
    hidden = keras.layers.BatchNormalization(momentum=0.9)(hidden)
    return keras.layers.LeakyReLU(0.2)(hidden)


def _dense_discriminator(hidden, settings, dtype):
    hidden = keras.layers.Flatten()(hidden)
    for width in settings.discriminator_widths:
        hidden = _dense(width, dtype)(hidden)
        hidden = keras.layers.LeakyReLU(0.2)(hidden)
    return hidden


def _dense(width, dtype, **options):
    if dtype == "float32" or ROUNDING not in os.environ:
        return keras.layers.Dense(width, dtype=dtype, **options)

    class BatchedDense(keras.layers.Dense):
        """Dense as a batch of one product: oneDNN itself rounds such floats to bfloat16.

        Nothing is cast in memory: 5.6 ms a step of the popular nets, 7.0 in Keras' own mixed
        precision (in turn).
        """

        def call(self, inputs, training=None):
            product = tf.matmul(tf.expand_dims(inputs, 0), tf.expand_dims(self.kernel, 0))
            product = tf.squeeze(product, 0)
            return product if self.bias is None else tf.nn.bias_add(product, self.bias)

    return BatchedDense(width, **options)


def _conv_generator(hidden, settings, image_shape, dtype):
    edge, *coarser, coarsest = _ladder(image_shape, settings)
    hidden = _normalised(_dense_generator(hidden, settings, (edge, edge, coarsest), dtype))
    twice = {"kernel_size": 4, "strides": 2, "padding": "same", "dtype": dtype}
    for channels in reversed(coarser):
        hidden = keras.layers.Conv2DTranspose(channels, use_bias=False, **twice)(hidden)
        hidden = _normalised(hidden)
    hidden = keras.layers.Conv2DTranspose(image_shape[2], **twice)(hidden)
    surplus = hidden.shape[1] - image_shape[0]
    return keras.layers.Cropping2D(((0, surplus), (0, surplus)))(hidden) if surplus else hidden


def _conv_discriminator(hidden, settings, dtype):
    for channels in _ladder(hidden.shape[1:], settings)[1:]:
        hidden = keras.layers.Conv2D(channels, 4, 2, padding="same", dtype=dtype)(hidden)
        hidden = keras.layers.LeakyReLU(0.2)(hidden)
    return _dense_discriminator(hidden, settings, dtype)


def _ladder(image_shape, settings):
    # Halved until an edge of 4 to 7 pixels; the coarser, the more channels. Few do: two minutes
    # gave a judge's FID 0.250 with 16 channels next to the image, 0.165 with 8, 0.147 with 4
    # (one seed).
    halvings = max(1, math.ceil(math.log2(image_shape[0] / 7)))
    edge = math.ceil(image_shape[0] / 2**halvings)
    return [edge, *(settings.conv_channels * 2**halving for halving in range(halvings))]


ARCHITECTURES = {
    "dense": (_dense_generator, _dense_discriminator),
    "conv": (_conv_generator, _conv_discriminator),  # the dense layers at the latent's end
}


def build_generator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras generator: latent (N, LATENT_DIM) to images (N, H, W, C) in [-1, 1].

    With `settings.conditional` it takes [latent, class], classes being integers (N,).
    """
    inputs = hidden = latent = keras.Input((settings.latent_dim,), name="latent")
    if settings.conditional:
        label, one_hot = _class_input(classes)
        inputs, hidden = [latent, label], keras.layers.Concatenate()([latent, one_hot])
    hidden = ARCHITECTURES[settings.architecture][0](hidden, settings, image_shape, dtype)
    images = keras.layers.Activation("tanh", dtype="float32", name="image")(hidden)
    return keras.Model(inputs, images, name="generator")


def build_discriminator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras discriminator: images (N, H, W, C) in [-1, 1] to logits (N, 1).

    With `settings.conditional` it takes [image, class] and adds the features' projection on the
    class's own direction (arXiv 1802.05637): a judge's FID 2.5 where concatenating it gave 4.2
    (8,000 steps, one seed; that judge gives MNIST's test images 0.67).
    """
    inputs = image = keras.Input(image_shape, name="image")
    features = ARCHITECTURES[settings.architecture][1](image, settings, dtype)
    if settings.minibatch_std:
        features = _with_minibatch_std(features)
    logits = keras.layers.Dense(1)(features)
    if settings.conditional:
        label, one_hot = _class_input(classes)
        inputs, width = [image, label], features.shape[-1]
        direction = keras.layers.Dense(width, use_bias=False, kernel_initializer="random_normal")
        projection = keras.ops.sum(features * direction(one_hot), axis=1, keepdims=True)
        logits += projection / math.sqrt(width)
    return keras.Model(inputs, logits, name="discriminator")


def _with_minibatch_std(features):
    # A feature more, the same for the whole batch (arXiv 1710.10196): FID 0.34, not 0.69, without
    # classes and 0.075, not 0.111, with them (50 epochs, one seed each, by a judge). 1e-8: the root
    # of equal images' variance, 0, has no finite slope.
    variance = keras.ops.var(features, axis=0, keepdims=True)
    spread = keras.ops.mean(keras.ops.sqrt(variance + 1e-8), axis=1, keepdims=True)
    spread = spread + keras.ops.zeros_like(features[:, :1])
    return keras.ops.concatenate([features, spread], axis=1)


def _class_input(classes):
    label = keras.Input((), dtype="int32", name="class")
    return label, keras.layers.CategoryEncoding(classes, output_mode="one_hot")(label)


def choose_precision(settings):
    """Return the Keras dtype policy that `settings.precision` means on this machine.

    "auto" is bfloat16 only where the hardware multiplies it natively: processors with AMX, GPUs
    of compute capability 8 or more. Elsewhere it is emulated, and slower than float32.
    """
    gpus, cpu = tf.config.list_physical_devices("GPU"), Path("/proc/cpuinfo")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        native = details.get("compute_capability", (0, 0)) >= (8, 0)
    else:
        native = cpu.exists() and "amx_bf16" in cpu.read_text()
    fits = settings.precision == "bfloat16" or (settings.precision == "auto" and native)
    return "mixed_bfloat16" if fits else "float32"


# --- Losses ------------------------------------------------------------------------------------


def _softplus(logits):
    return tf.nn.softplus(logits)


# Both players' losses per image, discriminator's first, from logits (N, 1) of reals and of fakes.
LOSSES = {
    # arXiv 1406.2661: the generator climbs log D(G(z)) or, in the game's own form, descends
    # log(1 - D(G(z))).
    "non_saturating": (lambda r, f: _softplus(-r) + _softplus(f), lambda r, f: _softplus(-f)),
    "minimax": (lambda r, f: _softplus(-r) + _softplus(f), lambda r, f: -_softplus(f)),
    # arXiv 1611.04076 (there all halved), 1705.02894, and 1701.07875 with any of the penalties
    # (1704.00028's: 10).
    "least_squares": (lambda r, f: (r - 1) ** 2 + f**2, lambda r, f: (f - 1) ** 2),
    "hinge": (lambda r, f: tf.nn.relu(1 - r) + tf.nn.relu(1 + f), lambda r, f: -f),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    # arXiv 1807.00734: each real against a fake; with R1 and R2 it converges (2501.05441).
    "relativistic": (lambda r, f: _softplus(f - r), lambda r, f: _softplus(r - f)),
}


# --- Training ----------------------------------------------------------------------------------


def new_state(settings, dataset):
    """Return a tf.train.Checkpoint of all that training changes and --resume restores."""
    keras.utils.set_random_seed(settings.seed)
    dtype, shape = choose_precision(settings), dataset.images.shape[1:]
    classes = int(dataset.labels.max()) + 1 if settings.conditional else 0
    state = tf.train.Checkpoint(
        generator=build_generator(settings, shape, classes, dtype),
        discriminator=build_discriminator(settings, shape, classes, dtype),
        average=build_generator(settings, shape, classes),
        generator_optimizer=_adam(settings),
        discriminator_optimizer=_adam(settings),
        random=tf.random.Generator.from_seed(settings.seed),
        step=tf.Variable(0, dtype=tf.int64),
        losses=tf.Variable([0.0, 0.0]),  # sums over the epoch: discriminator's, generator's
        seconds=tf.Variable([0.0, 0.0], dtype=tf.float64),  # training in this epoch; all in all
    )
    state.average.set_weights(state.generator.get_weights())
    state.generator_optimizer.build(state.generator.trainable_variables)
    state.discriminator_optimizer.build(state.discriminator.trainable_variables)
    return state


def _adam(settings):
    class FusedAdam(keras.optimizers.Adam):
        """Keras' Adam through TensorFlow's own kernel: one pass over memory instead of a dozen.

        A sixth of the time for 3 million weights (4.0 ms against 23.2 in turn, on a busy machine).
        """

        def update_step(self, gradient, variable, learning_rate):
            index = self._get_variable_index(variable)
            step = tf.cast(self.iterations + 1, tf.float32)
            momentum, velocity = self._momentums[index].value, self._velocities[index].value
            slots = {"var": variable.handle, "m": momentum.handle, "v": velocity.handle}
            betas = {"beta1": self.beta_1, "beta2": self.beta_2, "epsilon": self.epsilon}
            powers = {"beta1_power": self.beta_1**step, "beta2_power": self.beta_2**step}
            tf.raw_ops.ResourceApplyAdam(
                **slots, **betas, **powers, lr=learning_rate, grad=gradient
            )

    return FusedAdam(0.0, beta_1=settings.beta_1, beta_2=settings.beta_2)


def compile_training(state, dataset, settings):
    """Return train(order, first, last, pace), which takes the steps first to last of an epoch.

    `order` (N,) is the epoch's permutation of the images; `pace` scales both learning rates.
    """
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    images = tf.constant(dataset.images)  # all of them on the device, a byte a pixel
    labels = tf.constant(dataset.labels, tf.int32) if settings.conditional else None

    @tf.autograph.experimental.do_not_convert
    def step(batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        batch = tf.reshape(batch, (replicas, settings.batch_size // replicas))[replica]
        real = tf.cast(tf.gather(images, batch), tf.float32) / 127.5 - 1
        condition = [tf.gather(labels, batch)] if settings.conditional else []
        return train_step(state, settings, real, condition)

    @tf.function
    def train(order, first, last, pace):
        state.generator_optimizer.learning_rate.assign(pace * settings.generator_learning_rate)
        rate = settings.discriminator_learning_rate
        state.discriminator_optimizer.learning_rate.assign(pace * rate)
        for position in tf.range(first, last):
            batch = order[position * settings.batch_size : (position + 1) * settings.batch_size]
            losses = strategy.run(step, args=(batch,))
            state.losses.assign_add(strategy.reduce("MEAN", losses, axis=None))
            state.step.assign_add(1)
        update_average(state, last - first, settings.ema_decay)

    return train


def train_step(state, settings, real, condition):
    """Update both networks once on real images (N, H, W, C) in [-1, 1]; return both losses (2,).

    The fakes are drawn once for both. The logits' slope at the fakes, which R2 needs anyway, is
    also the generator's gradient up to a factor an image (arXiv 2103.00430), so the generator
    costs no backward pass through the discriminator. MINIBATCH_STD makes that an approximation: an
    image moves the others' logits too, weighted here by its own factor. The exact gradient costs a
    pass more and was no better: FID 0.37 against 0.34 (50 epochs without classes, one seed).
    """
    generator, discriminator = state.generator, state.discriminator
    loss_of_discriminator, loss_of_generator = LOSSES[settings.loss]
    latent = state.random.normal((real.shape[0], settings.latent_dim))
    with tf.GradientTape() as generator_tape:
        fake = generator([latent, *condition] if condition else latent, training=True)
        fake = shift(fake, settings.shift, state.random)
    unlinked = tf.stop_gradient(fake)
    with tf.GradientTape() as discriminator_tape:
        look = functools.partial(logits_and_slope, discriminator, condition)
        real = shift(real, settings.shift, state.random)
        (real_logits, real_slope), (fake_logits, fake_slope) = look(real), look(unlinked)
        discriminator_loss = tf.reduce_mean(loss_of_discriminator(real_logits, fake_logits))
        penalised = discriminator_loss + gradient_penalty(settings.r1 / 2, real_slope)
        penalised += gradient_penalty(settings.r2 / 2, fake_slope)
        if settings.gradient_penalty:
            share = state.random.uniform((real.shape[0], 1, 1, 1))
            _, slope = look(share * real + (1 - share) * unlinked)
            penalised += gradient_penalty(settings.gradient_penalty, slope, norm=1)
    with tf.GradientTape() as logit_tape:
        logit_tape.watch(fake_logits)
        generator_loss = tf.reduce_mean(loss_of_generator(real_logits, fake_logits))
    factor = logit_tape.gradient(generator_loss, fake_logits)[..., tf.newaxis, tf.newaxis]
    variables = discriminator.trainable_variables
    gradients = discriminator_tape.gradient(penalised, variables)
    state.discriminator_optimizer.apply(gradients, variables)
    variables = generator.trainable_variables
    gradients = generator_tape.gradient(fake, variables, output_gradients=factor * fake_slope)
    state.generator_optimizer.apply(gradients, variables)
    return tf.stack([discriminator_loss, generator_loss])


def logits_and_slope(discriminator, condition, images):
    """Return logits (N, 1) and their gradients with respect to the images (N, H, W, C)."""
    inputs = [images, *condition] if condition else images
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = discriminator(inputs, training=True)
    return logits, tape.gradient(logits, images)


def gradient_penalty(weight, slope, norm=0):
    """Return weight times the mean squared distance of the slopes' norms from `norm`.

    0 is R1 on real and R2 on generated images (arXiv 1801.04406), 1 the penalty of Wasserstein
    GANs on images between them (arXiv 1704.00028).
    """
    if not weight:
        return 0.0
    squares = tf.reduce_sum(slope**2, axis=(1, 2, 3))
    return weight * tf.reduce_mean((tf.sqrt(squares + 1e-12) - norm) ** 2 if norm else squares)


def shift(images, pixels, random):
    """Move images by up to `pixels` each way at random, around the edges (arXiv 2006.10738).

    The discriminator cannot learn the training images by heart so soon: FID 4.2, not 12.2
    (8,000 steps). Each eighth of a batch moves its own way: moved as one it was 7.1, not 1.0
    (20,000 steps). One seed each, by a judge that gives MNIST's test images 0.67.
    """
    if not pixels:
        return images
    groups = tf.split(images, math.gcd(images.shape[0], 8))
    ways = random.uniform((len(groups), 2), -pixels, pixels + 1, dtype=tf.int32)
    moved = [tf.roll(group, ways[number], (1, 2)) for number, group in enumerate(groups)]
    return tf.concat(moved, axis=0)


def update_average(state, steps, decay):
    """Move the averaged generator towards the generator, batch normalisation's statistics too.

    Once for `steps` steps (after each, it would cost an eighth of the popular nets' time). A step's
    decay warms up as (1 + step) / (10 + step), so that a short run is averaged as well.
    """
    step = tf.cast(state.step, tf.float32)
    weight = 1 - tf.minimum(decay, (1 + step) / (10 + step)) ** tf.cast(steps, tf.float32)
    for mean, variable in zip(state.average.weights, state.generator.weights, strict=True):
        mean.assign_add(weight * (variable - mean))


# --- The Inception model and the metrics -------------------------------------------------------

INCEPTION_NAME = "mnist_inception_1"  # other weights, other name: FID is another number then
INCEPTION_DIGEST = "b1666d9c"  # of those weights: the first digits of their SHA-256
SHIPPED_INCEPTION = HERE / "weights" / f"{INCEPTION_NAME}.h5"
INCEPTION_IMAGES = 240_000  # that another data set's network learns from, repeats counted
NEIGHBOUR_IMAGES = 10_000  # at most, whose neighbours are looked at: time grows with the square
IMAGENET = "download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
IMAGENET_MIRRORS = (f"http://{IMAGENET}", f"https://storage.googleapis.com/{IMAGENET}")
LARGEST_GRAPH = 300 * 2**20  # bytes, unpacked
HARMLESS_OPS = re.compile(  # what a frozen graph may do: none of these touches a file
    "Const|Placeholder|Identity|NoOp|CheckNumerics|DecodeJpeg|Cast|ExpandDims|Squeeze|Reshape|"
    "ResizeBilinear|Add|Sub|Mul|Conv2D|BiasAdd|BatchNormWithGlobalNormalization|Relu|MaxPool|"
    "AvgPool|Concat|MatMul|Softmax"
)


def build_inception(image_shape=(28, 28, 1), classes=10):
    """Return an untrained Inception network (arXiv 1409.4842) for small images.

    Images (N, H, W, C) in [-1, 1] to [pooled features (N, 160), class probabilities (N, K)].
    """
    image = keras.Input(image_shape)
    stride = max(1, image_shape[0] // 14)  # to about 14x14, so that large images take little longer
    hidden = _convolution(image, 32, 2 * stride + 1, strides=stride)
    hidden = _inception_block(hidden, 16, (16, 24), (8, 12), 12)
    hidden = keras.layers.MaxPooling2D(2, padding="same")(hidden)
    hidden = _inception_block(hidden, 32, (32, 48), (16, 24), 24)
    hidden = _inception_block(hidden, 32, (32, 64), (16, 32), 32)
    features = keras.layers.GlobalAveragePooling2D(name="features")(hidden)
    dense = keras.layers.Dense(classes, activation="softmax", name="probabilities")
    return keras.Model(image, [features, dense(features)], name="inception")


def _convolution(hidden, filters, size, strides=1):
    hidden = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(hidden)
    return keras.layers.ReLU()(keras.layers.BatchNormalization()(hidden))


def _inception_block(hidden, one, three, five, pooled):
    branches = [
        _convolution(hidden, one, 1),
        _convolution(_convolution(hidden, three[0], 1), three[1], 3),
        _convolution(_convolution(hidden, five[0], 1), five[1], 5),
        _convolution(keras.layers.MaxPooling2D(3, 1, padding="same")(hidden), pooled, 1),
    ]
    return keras.layers.Concatenate()(branches)


def train_inception(training, test, epochs=14):
    """Return an Inception network trained on `training`; say how well it reads `test`.

    Both are uint8 images (N, H, W, C) and labels (N,).
    """
    keras.utils.set_random_seed(0)
    classes = 1 + int(max(training[1].max(), test[1].max()))
    inception = build_inception(training[0].shape[1:], classes)
    edge = {"fill_mode": "constant", "fill_value": -1.0}
    layers = [
        keras.Input(inception.input_shape[1:]),
        keras.layers.Rescaling(1 / 127.5, offset=-1),
        keras.layers.RandomRotation(0.03, **edge),
        keras.layers.RandomTranslation(0.08, 0.08, **edge),
        keras.layers.RandomZoom((-0.12, 0.12), (-0.12, 0.12), **edge),
        keras.Model(inception.input, inception.output[1]),
    ]
    classifier = keras.Sequential(layers)
    steps = epochs * math.ceil(len(training[0]) / 128)
    schedule = {"warmup_target": 4e-3, "warmup_steps": steps // 14}
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps - steps // 14, **schedule)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.02)
    classifier.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    verbose = 1 if sys.stdout.isatty() else 2  # a bar or a line
    classifier.fit(*training, batch_size=128, epochs=epochs, verbose=verbose)
    accuracy = classifier.evaluate(*test, verbose=0)[1]
    print(f"It reads {accuracy:.2%} right of {len(test[0]):,} images that it never saw.")
    return inception


class Ruler(NamedTuple):
    """A network that measures images, and the mean and covariance of what it sees in real ones."""

    name: str
    outputs: callable  # uint8 (batch, H, W, C) to features (batch, F), probabilities (batch, K)
    batch: int = 100  # images at once
    reads_classes: bool = True  # that are the data's: ImageNet's are not
    mean: np.ndarray = None  # float64 (F,)
    covariance: np.ndarray = None  # float64 (F, F)


def load_ruler(settings, dataset):
    """Return the Ruler that `settings.inception` means for `dataset`.

    "mnist" is the shipped one, "imagenet" the papers', "auto" the shipped one for MNIST and images
    without classes, else one trained at first use. The Keras home's folder gan_mnist keeps them.
    """
    kind = settings.inception
    if kind == "auto" and dataset.name in ("mnist", "stand-in"):
        kind = "mnist"
    elif kind == "auto" and (dataset.labels is None or not dataset.labels.any()):
        kind = "mnist"
        print(f"{dataset.name} has no classes: the network that reads MNIST measures.")
    ruler = RULERS[kind](dataset)
    digest = hashlib.sha256(np.ascontiguousarray(dataset.images)).hexdigest()
    if ruler.name == INCEPTION_NAME and digest == MNIST_DIGESTS["x_train"]:
        return ruler._replace(**read_npz(SHIPPED_INCEPTION.with_suffix(".npz")))
    mean, covariance = feature_statistics(reference_outputs(ruler, dataset.images)[0])
    return ruler._replace(mean=mean, covariance=covariance)


def _shipped_ruler(_):
    return _ruler_of(load_keras(SHIPPED_INCEPTION))


def _ruler_of(network):
    weights = b"".join(weight.tobytes() for weight in network.get_weights())
    digest = hashlib.sha256(weights).hexdigest()[:8]
    name = INCEPTION_NAME if digest == INCEPTION_DIGEST else f"inception_{digest}"
    return Ruler(name, _outputs_of(network))


def _trained_ruler(dataset):
    images, labels, name, _ = dataset

    def train():
        print(f"Training a network to read {name}, to measure with. This happens once.")
        order = np.random.default_rng(0).permutation(len(images))[:INCEPTION_IMAGES]
        test, training = np.split(order, [math.ceil(len(order) / 10)])
        parts = [(images[part], labels[part]) for part in (training, test)]
        epochs = min(20, INCEPTION_IMAGES // len(training))
        return train_inception(*parts, epochs).get_weights()

    weights = _cached(f"inception for {fingerprint(dataset)}", train)
    network = build_inception(images.shape[1:], int(labels.max()) + 1)
    network.set_weights(weights)
    return _ruler_of(network)


def _outputs_of(network):
    height, width, channels = network.input_shape[1:]

    # Where oneDNN rounds for the training XLA multiplies: in float32, at a quarter more time.
    @tf.function(jit_compile=ROUNDING in os.environ)
    def look(images):
        return network(images / 127.5 - 1, training=False)

    def outputs(images):
        images = tf.cast(images, tf.float32)
        if images.shape[1:] != (height, width, channels):  # the shipped network, others' images
            grey = tf.reduce_mean(images, axis=-1, keepdims=True)
            images = tf.image.resize(grey, (height, width), antialias=True)
        return look(images)

    return outputs


def _imagenet_ruler(_):
    path = keras_home() / "gan_mnist" / Path(IMAGENET).name
    outputs = cached_download(path, IMAGENET_MIRRORS, _imagenet_outputs)
    if outputs is None:
        raise RunError(f"the Inception graph is neither at {path} nor to be had from a mirror")
    return Ruler("imagenet_inception_2015", outputs, batch=25, reads_classes=False)


def _imagenet_outputs(path):
    with _reading(path, "Inception graph of 2015"):
        with gzip.open(path) as file:  # in memory: nothing is unpacked to disk, whatever its name
            content = io.BytesIO(file.read(LARGEST_GRAPH))
        with tarfile.open(fileobj=content) as archive:
            member = archive.extractfile("classify_image_graph_def.pb")
            graph = tf.compat.v1.GraphDef.FromString(member.read())
        refused = {node.op for node in graph.node if not HARMLESS_OPS.fullmatch(node.op)}
        if refused or graph.library.function:
            raise UsageError(f"it holds what is not let in: {', '.join(sorted(refused))}")
        for node in graph.node:
            node.attr.pop("_output_shapes", None)  # they say batches of one
        with tf.Graph().as_default() as whole:  # a tf.function would refuse operations of 2015
            images = tf.compat.v1.placeholder(tf.uint8, (None, None, None, None))
            colours = tf.repeat(tf.cast(images, tf.float32), 3 // tf.shape(images)[3], axis=3)
            # They go in where a decoded picture would; the graph itself resizes them to 299x299.
            pixels, wanted = {"ExpandDims:0": colours}, ["pool_3:0", "softmax/weights:0"]
            pool, weights = tf.graph_util.import_graph_def(graph, pixels, wanted)
            features = tf.reshape(pool, (-1, 2048))
            # Without the last layer's bias, over all 1,008 outputs: as arXiv 1606.03498's own code.
            probabilities = tf.nn.softmax(features @ tf.ensure_shape(weights, (2048, 1008)))
        session = tf.compat.v1.Session(graph=whole)
    return session.make_callable((features, probabilities), [images])


RULERS = {"auto": _trained_ruler, "mnist": _shipped_ruler, "imagenet": _imagenet_ruler}


def _cached(name, make):
    # The arrays of a kept .npz, in their order; what is missing or damaged is made anew.
    path = keras_home() / "gan_mnist" / f"{name}.npz"
    with contextlib.suppress(UsageError):
        return list(read_npz(path).values())
    if path.exists():
        print(f"{path} is damaged and made anew.")
    arrays = make()
    try:
        with replacing(path) as temporary:
            np.savez(temporary, *arrays)
    except OSError as error:
        print(f"{path} cannot be kept: {error.strerror}")
    return arrays


def reference_outputs(ruler, images):
    """Return what `measure` does, of real images: it is kept."""
    name = f"{ruler.name} on {fingerprint(Dataset(images, None, ''))}"
    return _cached(name, lambda: measure(ruler, images))


def measure(ruler, images):
    """Return features float32 (N, F) and probabilities (N, K) of uint8 images (N, H, W, C)."""
    batches = np.split(images, range(ruler.batch, len(images), ruler.batch))
    is_shown, measured = sys.stdout.isatty(), []
    bar = keras.utils.Progbar(len(batches), unit_name="batch measured", verbose=is_shown)
    with multiprocessing.pool.ThreadPool(2) as pool:
        for outputs in pool.imap(ruler.outputs, batches):
            measured.append([np.asarray(output) for output in outputs])
            bar.update(len(measured), finalize=False)
    print("\r\033[K" * is_shown, end="", flush=True)
    return tuple(map(np.concatenate, zip(*measured, strict=True)))


def feature_statistics(features):
    """Return mean (F,) and covariance (F, F) of features (N, F), in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """Return the squared Fréchet distance of two Gaussians, 0 or more; lower is nearer.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), arXiv 1706.08500. The trace of the root is the
    nuclear norm of C1^(1/2) C2^(1/2): real whatever the ranks. Raises ValueError where an
    argument is not finite.
    """
    given = (mean_1, covariance_1, mean_2, covariance_2)
    mean_1, covariance_1, mean_2, covariance_2 = (
        np.asarray_chkfinite(array, np.float64) for array in given
    )
    cross = np.linalg.norm(_symmetric_root(covariance_1) @ _symmetric_root(covariance_2), "nuc")
    distance = np.sum((mean_1 - mean_2) ** 2) - 2 * cross
    return max(0.0, float(distance + np.trace(covariance_1) + np.trace(covariance_2)))


def _symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def inception_score(probabilities, splits=10):
    """Return mean and standard deviation of exp E KL(p(y|x) || p(y)) over `splits` parts.

    From class probabilities (N, K): 1 to K, higher is better (arXiv 1606.03498). Raises ValueError
    where one is not finite.
    """
    count = len(probabilities)
    splits = min(splits, count)
    cuts = [part * count // splits for part in range(1, splits)]  # where the paper's code cuts
    parts = np.split(np.asarray_chkfinite(probabilities, np.float64), cuts)
    divergences = [scipy.special.rel_entr(x, x.mean(axis=0)).sum(axis=1).mean() for x in parts]
    scores = np.exp(divergences)
    return float(scores.mean()), float(scores.std())


def kernel_inception_distance(features_1, features_2, subsets=100, subset_size=1000):
    """Return mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel (x.y / F + 1)^3 on features (N, F), N at least 2, arXiv 1801.01401: 0 for equal
    distributions, may be slightly negative; lower is better.
    """
    sets = [np.asarray(x, np.float64) / math.sqrt(x.shape[1]) for x in (features_1, features_2)]
    size, random = min(subset_size, *map(len, sets)), np.random.default_rng(0)
    distances = []
    for _ in range(subsets):
        parts = [features[random.choice(len(features), size, replace=False)] for features in sets]
        points = np.concatenate(parts)
        kernel = points @ points.T + 1
        kernel *= kernel * kernel  # ** 3 would take five times as long
        np.fill_diagonal(kernel, 0)
        (first, between), (_, second) = kernel.reshape(2, size, 2, size).sum(axis=(1, 3))
        distances.append((first + second) / (size * (size - 1)) - 2 * between / size**2)
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real_features, generated_features, neighbours=3):
    """Return improved precision and recall, each 0 to 1, higher is better (arXiv 1904.06991).

    The share of generated features (N, F) within any ball around a real one that reaches its k-th
    neighbour, and the reverse. Raises ValueError where a side has no more than k points.
    """
    precise = _within_balls(generated_features, real_features, neighbours).any(axis=1)
    recalled = _within_balls(real_features, generated_features, neighbours).any(axis=1)
    return float(precise.mean()), float(recalled.mean())


def density_coverage(real_features, generated_features, neighbours=5):
    """Return density, 0 and up, and coverage, 0 to 1; higher is better (arXiv 2002.09797).

    How many of those balls hold a generated feature (N, F), over k, about 1 for real images; and
    the share of them that hold any. Raises ValueError for no more than k real points.
    """
    within = _within_balls(generated_features, real_features, neighbours)
    return float(within.sum(axis=1).mean() / neighbours), float(within.any(axis=0).mean())


def _within_balls(points, centres, k):
    # Copied, so that the rest can go.
    radii = _map_distances(lambda rows: np.partition(rows, k)[:, k].copy(), centres, centres)
    return _map_distances(lambda rows: rows <= radii, points, centres)


def _map_distances(function, points, others):
    # Of squared distances (500, M) at a time, in place, two at once: a third of the obvious time.
    middle = others.mean(axis=0)  # far from which float32 would lose digits
    points, others = points - middle, others - middle
    squares, turned = (others**2).sum(axis=1), -2 * others.T

    def apply(part):
        rows = part @ turned
        rows += squares
        rows += (part**2).sum(axis=1, keepdims=True)
        return function(np.maximum(rows, 0, out=rows))

    with multiprocessing.pool.ThreadPool(2) as pool:
        return np.concatenate(pool.map(apply, np.split(points, range(500, len(points), 500)), 1))


def nearest(points, others):
    """Return which of `others` (M, F) is nearest to each of the points (N, F), and how far off."""
    indices = _map_distances(lambda rows: rows.argmin(axis=1), points, others)
    return indices, np.linalg.norm(points - others[indices], axis=1)


def frechet_interval(features, mean, covariance, classes=None):
    """Return the ends of a 95 % interval about the Fréchet distance of features (N, F).

    It is for the mean distance of N such images: two bootstrap deviations each way, to first order
    (the infinitesimal jackknife: resampling itself would add a bias), up to sqrt(2) too wide near
    real images' distance. Where `classes` (N,) were asked for, their shares are fixed.
    """
    own_mean, own_covariance = feature_statistics(features)
    centred, root = features - own_mean, _symmetric_root(covariance)
    inner = _symmetric_root(root @ own_covariance @ root)
    optimal = root @ np.linalg.pinv(inner, 1e-6, hermitian=True) @ root  # the optimal transport
    pulls = centred * (centred - centred @ optimal + 2 * (own_mean - mean))
    pulls, groups = pulls.sum(axis=1), np.zeros(len(pulls)) if classes is None else classes
    for group in np.unique(groups):
        pulls[groups == group] -= pulls[groups == group].mean()
    distance = frechet_distance(own_mean, own_covariance, mean, covariance)
    margin = 1.96 * float(np.linalg.norm(pulls)) / len(pulls)
    return max(0.0, distance - margin), distance + margin


def class_divergence(classes, real_classes):
    """Return the Kullback-Leibler divergence of classes (N,) from real ones, in nats; 0 is best."""
    drawn = np.bincount(classes, minlength=1 + real_classes.max())
    real = np.bincount(real_classes, minlength=len(drawn)) + 1  # one more each keeps it finite
    return float(scipy.special.rel_entr(drawn / drawn.sum(), real / real.sum()).sum())


def frechet_distance_per_class(features, classes, real_features, real_classes):
    """Return the Fréchet distance within each class, None where a side has fewer than 2 images."""
    distances = []
    for number in range(1 + max(classes.max(), real_classes.max())):
        sides = features[classes == number], real_features[real_classes == number]
        statistics = [x for side in sides if len(side) > 1 for x in feature_statistics(side)]
        distances.append(frechet_distance(*statistics) if len(statistics) == 4 else None)
    return distances


def quick_metrics(ruler, images, outputs=None):
    """Return what every epoch reports, by name, of uint8 images (N, H, W, C).

    `outputs` is what `measure` returned of them, where that is known.
    """
    features, probabilities = outputs or measure(ruler, images)
    score, deviation = inception_score(probabilities)
    count, classes = probabilities.shape
    shares = np.bincount(probabilities.argmax(axis=1), minlength=classes) / count
    return {
        "inception_score": score,
        "inception_score_std": deviation,
        "fid": frechet_distance(*feature_statistics(features), ruler.mean, ruler.covariance),
        # Covered: at least a tenth of an even share, so that a stray image doesn't count.
        "classes_covered": int((shares >= 0.1 / classes).sum()) if ruler.reads_classes else None,
        "class_shares": shares.tolist() if ruler.reads_classes else None,
    }


def evaluate_images(images, settings, labels=None, page=None, count=None):
    """Return every metric by name for uint8 images (N, H, W, C), against `settings.dataset`.

    `labels` (N,): the classes that were asked for. None: what cannot be had. `page`: where to draw
    20 images beside the nearest training images. `count`: how many to measure, chosen at random.
    Raises UsageError for fewer than 2 images, or of another shape than the data's.
    """
    images, labels, *_ = as_dataset(images, labels)
    dataset = load_dataset(settings)
    order = np.random.default_rng(0).permutation(len(images))[:count]  # folders come by class
    images, labels = images[order], None if labels is None else labels[order]
    if min(len(images), len(dataset.images)) < 2 or images.shape[1:] != dataset.images.shape[1:]:
        wanted = f"2 or more of {dataset.images.shape[1:]}, as in {dataset.name}"
        raise UsageError(f"the images to measure are {images.shape}, but must be {wanted}")
    ruler = load_ruler(settings, dataset)
    if len(images) <= len(ruler.mean):
        few = f"{len(images)} images are few for {len(ruler.mean)} features"
        print(f"{few}: FID is far higher than it would be with more.", file=sys.stderr)
    real, real_probabilities = reference_outputs(ruler, dataset.images)
    features, probabilities = outputs = measure(ruler, images)
    if page:
        save_neighbours(page, images[:20], dataset.images[nearest(features[:20], real)[0]])
    read = [x.argmax(axis=1) for x in (probabilities, real_probabilities)]
    known = read = read if ruler.reads_classes else None
    if labels is not None and dataset.labels is not None and labels.max() == dataset.labels.max():
        known = labels, dataset.labels  # not those of a folder with fewer classes: it begins at 0
    return {
        "images": len(images),
        "dataset": dataset.name,
        "inception": ruler.name,
        **quick_metrics(ruler, images, outputs),
        "fid_interval": frechet_interval(features, ruler.mean, ruler.covariance, labels),
        "class_divergence": read and class_divergence(*read),
        "fid_per_class": known and frechet_distance_per_class(features, known[0], real, known[1]),
        **_neighbour_metrics(features[:NEIGHBOUR_IMAGES], real),
        "memorisation": memorisation(ruler, features, real, dataset.test_images),
    }


def _neighbour_metrics(features, real):
    real = real[np.random.default_rng(0).permutation(len(real))[: len(features)]]
    others, metrics = min(len(real), len(features)) - 1, {}
    size = min(1000, max(2, (others + 1) // 2))  # of a part, so that subsets are not all the same
    kid = kernel_inception_distance(real, features, subset_size=size)
    metrics["kid"], metrics["kid_std"] = kid
    metrics["precision"], metrics["recall"] = precision_recall(real, features, min(3, others))
    metrics["density"], metrics["coverage"] = density_coverage(real, features, min(5, others))
    return metrics


def memorisation(ruler, features, real, test_images):
    """Return how far features (N, F) are from real ones, over how far those of test images are.

    Medians of the distance to the nearest. 1: as new as unseen images are; towards 0: copies.
    None without test images (M, H, W, C), or where these are copies themselves.
    """
    if test_images is None:
        return None
    unseen, _ = reference_outputs(ruler, test_images)
    sides = (nearest(x[: NEIGHBOUR_IMAGES // 2], real)[1] for x in (features, unseen))
    distance, usual = map(np.median, sides)
    return float(distance / usual) if usual else None


# --- Pictures ----------------------------------------------------------------------------------


def latent_points(generator, count, seed):
    """Return the same latent points float32 (count, LATENT_DIM) each time for the same seed."""
    size = generator.inputs[0].shape[-1]
    return tf.random.stateless_normal((count, size), (seed, 1)).numpy()


def latent_walk(generator, walks, seed, frames=120):
    """Return latent points float32 (frames, walks, LATENT_DIM) of smooth round trips.

    Spherical interpolation (arXiv 1609.04468) all along the circle through two random points:
    each point on it is as likely as any that is drawn at random.
    """
    start, aside = latent_points(generator, 2 * walks, seed).reshape(2, walks, -1)
    angle = np.linspace(0, 2 * np.pi, frames, endpoint=False, dtype=np.float32).reshape(-1, 1, 1)
    return np.cos(angle) * start + np.sin(angle) * aside


def classes_of(generator):
    """Return how many classes the generator is told of, 0 for an unconditional one."""
    encoders = [x for x in generator.layers if isinstance(x, keras.layers.CategoryEncoding)]
    return encoders[0].num_tokens if encoders else 0


def classes_to_draw(generator, count, digits=None):
    """Return classes uint8 (N,): `count`, each in turn, or `count` rows of `digits`.

    These are a text like "2026", with commas for classes like "10,11", or numbers.
    """
    classes = classes_of(generator)
    if digits is None:
        return (np.arange(count) % max(1, classes)).astype(np.uint8)
    parts = digits.split(",") if isinstance(digits, str) and "," in digits else digits
    names = [str(digit) for digit in parts]
    if not names or not set(names) <= set(map(str, range(classes))):
        known = f"the classes 0 to {classes - 1}" if classes else "no classes"
        raise UsageError(f"this generator cannot draw {digits!r}: it knows {known}")
    return np.tile(np.array(names, np.uint8), count)


def draw(generator, latent, labels):
    """Return uint8 images (N, H, W, C) of latent points (N, LATENT_DIM), classes (N,) if told."""
    parts = []
    at_once = min(1000, 1 + 2**22 // math.prod(generator.output_shape[1:]))
    for start in range(0, len(latent), at_once):
        some = slice(start, start + at_once)
        inputs = [tf.constant(latent[some]), tf.constant(labels[some], tf.int32)]
        images = generator(inputs if len(generator.inputs) == 2 else inputs[0], training=False)
        parts.append(tf.cast(tf.round((images + 1) * 127.5), tf.uint8).numpy())
    return np.concatenate(parts)


def draw_random(generator, count, digits=None, seed=None):
    """Return images as `generate` does, and their classes uint8 (N,)."""
    labels = classes_to_draw(generator, count, digits)
    seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed
    return draw(generator, latent_points(generator, len(labels), seed), labels), labels


def generate(generator, count, digits=None, seed=None):
    """Return uint8 images (N, H, W, C): `count`, its classes in turn, or `count` rows of `digits`.

    Without a seed each call draws others. Raises UsageError for digits the generator can't draw.
    """
    return draw_random(generator, count, digits, seed)[0]


def draw_grid(generator, seed):
    """Return images (N, H, W, C) for a grid of ten columns: a row for each class."""
    labels = np.repeat(np.arange(classes_of(generator) or 10), 10)
    return draw(generator, latent_points(generator, len(labels), seed), labels)


def mosaic(images, columns):
    """Return one picture (H', W', C) of images (N, H, W, C), small ones enlarged."""
    scale = max(1, round(64 / images.shape[1]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    blank = np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)
    rows = np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:])
    return np.vstack([np.hstack(row) for row in rows])


def save_grid(path, images, columns, title=""):
    """Write a PNG of images (N, H, W, C) under a title."""
    picture = as_picture(mosaic(images, columns))
    if title:
        picture = ImageOps.expand(picture, (0, 36, 0, 0), "white")
        place, font = (picture.width / 2, 18), ImageFont.load_default(15)
        ImageDraw.Draw(picture).text(place, title, "black", font, anchor="mm")
    with replacing(path) as temporary:
        picture.save(temporary)


def save_neighbours(path, images, neighbours):
    """Write a PNG of images (N, H, W, C), each to the left of its nearest training image."""
    gap = np.full_like(images[:, :, : images.shape[2] // 4], 255)
    pairs = np.concatenate([images, neighbours, gap], axis=2)
    save_grid(path, pairs, 5, "Left: measured. Right: the training image with the nearest features")


def save_pictures(folder, images, labels=None):
    """Write one PNG for each of the images (N, H, W, C), its number and class in its name."""
    for number, image in enumerate(images):
        name = f"{number:06d}" + ("" if labels is None else f"_class_{labels[number]}")
        with replacing(folder / f"{name}.png") as temporary:
            as_picture(image).save(temporary)


def save_animation(path, pictures, frames_per_second):
    """Write a GIF of equally large Pillow pictures."""
    pictures = iter(pictures)
    first = next(pictures)
    duration = 1000 // frames_per_second  # milliseconds
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=pictures, duration=duration, loop=0)


def save_metrics_plot(path, history, title):
    """Write metrics.png: losses, Inception score, FID and class shares against epochs."""
    from matplotlib.figure import Figure

    panels = {
        "Losses, mean over the epoch": ["discriminator_loss", "generator_loss"],
        "Inception score: higher is better": ["inception_score"],
        "Fréchet Inception distance: lower is better": ["fid"],
        "Share of each class in the samples": ["class_shares"],
    }
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, (heading, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in names:
            rows = [row for row in history if row.get(name) is not None]
            values = np.array([row[name] for row in rows])
            labels = range(values.shape[-1]) if values.ndim > 1 else name.replace("_", " ")
            axes.plot([row["epoch"] for row in rows], values, marker=".", label=labels)
        axes.set(title=heading, xlabel="epoch", yscale="log" if "fid" in names else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(axes.lines) <= 20:  # the names of more classes would hide the curves
            axes.legend(ncols=math.ceil(len(axes.lines) / 2), fontsize="small")
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary)


# --- Checkpoints -------------------------------------------------------------------------------

SHIPPED_GENERATOR = HERE / "weights" / "mnist_generator.h5"
HARMLESS = re.compile(  # what a file may be made of: none of these runs code from the file
    "InputLayer|Dense|BatchNormalization|(Leaky)?ReLU|Activation|Reshape|Flatten|Concatenate|"
    "CategoryEncoding|Embedding|Dropout|Conv2D(Transpose)?|UpSampling2D|Cropping2D|DTypePolicy|"
    "(Max|Average|GlobalAverage)Pooling2D|Zeros|Ones|Constant|VarianceScaling|Orthogonal|"
    r"(Random|Glorot|He|Lecun|Truncated)(Normal|Uniform)|null|keras(\.layers|\.initializers)?|"
    "__keras_tensor__"
)
SPARE = re.compile("initializer|regularizer|constraint|quantization|renorm")
MAY_CHANGE = re.compile(  # from one session of a run to the next
    "epochs|max_minutes|samples_dir|checkpoints_dir|evaluation_images|.*_every"
)


def save_keras(model, path):
    """Write a Keras model to an .h5 that plain keras.models.load_model opens."""
    from keras.src.legacy.saving import legacy_h5_format  # model.save takes no open file

    memory = io.BytesIO()  # on a full disk HDF5 itself ends the process: a segmentation fault
    with h5py.File(memory, "w") as file:
        legacy_h5_format.save_model_to_hdf5(model, file, include_optimizer=False)
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:  # older versions of Keras choke on what is spare
            layer["config"] = {x: y for x, y in layer["config"].items() if not SPARE.search(x)}
        file.attrs["model_config"] = json.dumps(config)
    with replacing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def load_keras(path):
    """Return the Keras model in an .h5. Raises UsageError if there is none or it isn't harmless."""
    try:  # in a thread of its own: in that of an error Keras leaves its name scopes open
        with multiprocessing.pool.ThreadPool(1) as pool:
            return pool.apply(_load_harmless, [path])
    except Exception as error:  # noqa: BLE001 (HDF5 and Keras raise a dozen kinds)
        raise UsageError(f"cannot load {path}: {_reason(error)}") from None


def _load_harmless(path):
    _refuse_strange_parts(path)
    load = functools.partial(keras.models.load_model, path, compile=False, safe_mode=True)
    with tf.Graph().as_default():  # symbols: a layer that claims to be huge takes no memory
        largest = max(math.prod(layer.output.shape[1:]) for layer in load().layers)
    if largest > 2**24:
        raise ValueError("a layer gives too many numbers for one image")
    return load()


def _refuse_strange_parts(path):
    size, strange = Path(path).stat().st_size, []

    def look(name, link):  # for what reaches out of the file or claims more than it holds
        part = file[name] if isinstance(link, h5py.HardLink) else link
        reaches_out = part is link or getattr(part, "external", 0) or getattr(part, "is_virtual", 0)
        if reaches_out or getattr(part, "nbytes", 0) > size:
            strange.append(name)

    with h5py.File(path) as file:
        file.visititems_links(look)
        layers = json.dumps(json.loads(file.attrs["model_config"])["config"]["layers"])
    named = re.findall('"(?:class_name|module|registered_name)": "?([^",}]*)', layers)
    if strange := strange + [name for name in named if not HARMLESS.fullmatch(name)]:
        raise ValueError(f"it holds {sorted(set(strange))}")


def load_generator(path=None):
    """Return the Keras generator in `path`; by default the best of the last run, else the shipped.

    Raises UsageError for a file that is missing, damaged, not harmless or not a generator.
    """
    path = path or default_generator(Settings())
    model = load_keras(path)
    inputs, outputs = ([x.shape for x in ends] for ends in (model.inputs, model.outputs))
    match inputs, outputs:
        case [[_, _]] | [[_, _], [_]], [[None, int(), int(), 1 | 3]]:
            return model
    raise UsageError(f"{path} is not a generator: latent (and class) in, images out")


def default_generator(settings):
    """Return the path of the last run's best generator, or of the shipped one."""
    best = Path(settings.checkpoints_dir, "generator_best.h5")
    return best if best.exists() else SHIPPED_GENERATOR


@contextlib.contextmanager
def alone_in(folder):
    """Hold folder/lock, free again however the process ends. Raises UsageError if it isn't free."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            if os.name == "posix":  # Windows has no such locks in Python
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(f"{folder} is in use by the run of process {file.read()}") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        with removed_after(folder / "lock"):
            yield


def start_afresh(settings):
    """Make room for a new run: what an earlier one left moves to checkpoints/previous/."""
    checkpoints, samples = Path(settings.checkpoints_dir), Path(settings.samples_dir)
    previous = checkpoints / "previous"
    moving = checkpoints / ".previous"  # killed halfway, the next start moves the rest
    left = [(checkpoints, name) for name in ("state", "generator_*.h5")]
    pictures = ("image_at_epoch_*.png", "metrics.*", "training.gif", "tensorboard/*")
    left += [(samples, name) for name in pictures]
    old = {x: moving / x.relative_to(folder) for folder, name in left for x in folder.glob(name)}
    if not old and not moving.exists():
        return
    had_an_epoch = moving.exists() or {".h5", ".csv"} & {path.suffix for path in old}
    if previous.exists() and not had_an_epoch:
        for path in old:  # not worth the place of what is kept there
            _remove(path)
        return
    with alone_in(previous):
        for path, new in old.items():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, new)
    shutil.rmtree(previous)
    os.replace(moving, previous)
    print(f"The earlier run's files are in {previous} now.")
    if path := newest_state(previous / "state"):
        settings = json.loads((path / "run.json").read_text("utf-8"))["settings"]
        folders = {"checkpoints_dir": previous, "samples_dir": previous}
        print("To go on with it:\n ", line_to_type("train --resume", settings | folders), "\n")


def line_to_type(command, settings):
    """Return what to type for a command like "train --resume" with these settings (a dict)."""
    words = ["python", "gan_mnist.py", *command.split()]
    for name, (default, *_) in SETTINGS.items():
        text = setting_as_text(settings.get(name, default))
        if text != setting_as_text(default):
            words += ["--" + name.replace("_", "-"), text]
    return shlex.join(words)


def save_state(state, folder, facts):
    """Write the training state and `facts` (for JSON) to folder/step_..., keep the newest three."""
    # A folder gets its name at once; tf.train.CheckpointManager can't, nor tell a damaged file.
    path = folder / f"step_{int(state.step.numpy()):09d}"
    with replacing(path) as temporary:
        state.write(str(temporary / "state"))
        (temporary / "run.json").write_text(json.dumps(facts, indent=1), "utf-8")
        (temporary / "SHA256SUMS").write_text(_checksums(temporary), "utf-8")
        shutil.rmtree(path, ignore_errors=True)  # a damaged one, or this one already
    states = sorted(folder.glob("step_*"))
    kept = [x for x in states if x <= path][-3:]  # what is newer was damaged
    for old in set(states).difference(kept):
        shutil.rmtree(old)


def _checksums(folder):  # as sha256sum writes and checks them
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(x.read_bytes()).hexdigest()}  {x.name}\n" for x in files)


def newest_state(folder):
    """Return the newest sound state's folder or None; print a line for each that is damaged."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        with contextlib.suppress(OSError, ValueError):  # a file is missing or no text
            if (path / "SHA256SUMS").read_text("utf-8") == _checksums(path):
                return path
        print(f"{path} is damaged: its checksums do not fit.")
    return None


def restore_state(state, folder, facts):
    """Restore the newest sound state; return the history that was saved with it.

    Raises UsageError where the settings or the data don't fit it, RunError where none is sound.
    """
    path = newest_state(folder)
    if path is None:
        raise RunError(f"no state in {folder} is sound; nothing was changed")
    try:
        saved = json.loads((path / "run.json").read_text("utf-8"))
        before = saved["settings"] | {"dataset": saved["data"]}
        now = json.loads(json.dumps(facts["settings"])) | {"dataset": facts["data"]}
        changed = [
            f"{name} was {before.get(name)}, is {now.get(name)}"
            for name in now | before
            if before.get(name) != now.get(name) and not MAY_CHANGE.fullmatch(name)
        ]
        if not changed:
            state.read(str(path / "state")).assert_consumed()
            return saved["history"]
    except (LookupError, TypeError, ValueError, AssertionError, tf.errors.OpError):
        raise RunError(f"{path} was saved by another version of this program") from None
    raise UsageError("these settings cannot change on --resume: " + "; ".join(changed))


# --- The run -----------------------------------------------------------------------------------

# At most, in one call of the compiled training; between calls come the progress bar and Ctrl-C.
PIXELS_PER_CALL, STEPS_PER_CALL = 5_200_000, 104  # a call itself costs the popular nets 2.3 ms
PATIENCE = 30  # seconds at least, or as long as an epoch, that a full disk gets
COLUMNS = (
    *("epoch", "step", "seconds", "images_per_second", "discriminator_loss", "generator_loss"),
    *("inception_score", "inception_score_std", "fid", "classes_covered", "dataset", "inception"),
)


class Run(NamedTuple):
    """What the epochs of a run share."""

    settings: Settings
    dataset: Dataset
    facts: dict  # the settings and the data, as the state keeps them
    state: "tf.train.Checkpoint"
    history: list  # a dict an epoch
    ruler: Ruler
    train_steps: callable
    summary: "tf.summary.SummaryWriter"
    stop: threading.Event  # set by Ctrl-C
    started: float  # monotonic seconds, as if the run had never paused
    steps_per_epoch: int

    def step(self):
        return int(self.state.step.numpy())

    def progress(self):
        """Return the share of the run that is done, 0 to 1: of its epochs or of its minutes."""
        minutes = (time.monotonic() - self.started) / 60
        by_clock = minutes / (self.settings.max_minutes or math.inf)
        return min(1.0, max(by_clock, self.step() / self.settings.epochs / self.steps_per_epoch))


def train(dataset=None, epochs=None, settings=None, resume=False):
    """Train, measure, leave pictures and checkpoints; return the averaged generator.

    `dataset` is a Dataset, uint8 images (N, H, H) or (N, H, H, 1 or 3), or None for
    `settings.dataset`; `resume` goes on with the run in the checkpoints folder. Raises UsageError
    for settings or images that don't fit, RunError where the run cannot go on, and
    KeyboardInterrupt after Ctrl-C, when all is saved.
    """
    settings = settings or Settings()
    settings = dataclasses.replace(settings, epochs=settings.epochs if epochs is None else epochs)
    if dataset is None:
        dataset = load_dataset(settings)
    parts = dataset if isinstance(dataset, Dataset) else (dataset,)
    dataset = as_dataset(*parts, settings=settings)
    refuse_untrainable(dataset, settings)
    if dataset.labels is None and settings.conditional:
        print(f"{dataset.name} has no labels: training without classes.\n")
        settings = dataclasses.replace(settings, conditional=False)
    folders = sorted({Path(x).resolve() for x in (settings.samples_dir, settings.checkpoints_dir)})
    _refuse_unwritable(*folders)
    states = Path(settings.checkpoints_dir, "state")
    if resume and not any(states.glob("step_*")):
        raise UsageError(f"there is nothing to resume in {states}")
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(alone_in(folder))
        run = _prepare(settings, dataset, resume)
        held.callback(run.summary.close)
        held.enter_context(_first_signal_sets(run.stop))
        _run_epochs(run)
        _finish(run)
    return run.state.average


def _refuse_unwritable(*folders):
    for folder in map(Path, folders):
        exists = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not exists.is_dir() or not os.access(exists, os.W_OK):
            raise UsageError(f"cannot write into {folder}")


def _prepare(settings, dataset, resume):  # all that may fail before the first file changes
    state = new_state(settings, dataset)
    samples, checkpoints = Path(settings.samples_dir), Path(settings.checkpoints_dir)
    facts = {"settings": dataclasses.asdict(settings), "data": fingerprint(dataset)}
    history = restore_state(state, checkpoints / "state", facts) if resume else []
    _print_banner(settings, dataset.name, facts["data"], state)
    ruler, train_steps = load_ruler(settings, dataset), compile_training(state, dataset, settings)
    for folder in (samples, checkpoints, checkpoints / "state"):
        for left in folder.glob(".*.partial*"):  # by a run that was killed
            _remove(left)
    if not resume:
        start_afresh(settings)
    return Run(
        *(settings, dataset, facts, state, history, ruler, train_steps),
        summary=tf.summary.create_file_writer(str(samples / "tensorboard")),
        stop=threading.Event(),
        started=time.monotonic() - float(state.seconds.numpy()[1]),
        steps_per_epoch=len(dataset.images) // settings.batch_size,
    )


def _print_banner(settings, name, data, state):
    gpus = len(tf.config.list_physical_devices("GPU"))
    device = f"{gpus} GPU" if gpus else f"CPU, {os.cpu_count()} cores"
    kind = "class-conditional" if settings.conditional else "unconditional"
    generator, discriminator = state.generator.count_params(), state.discriminator.count_params()
    print(f"data           {name}, {data}")
    print(f"generator      {settings.architecture}, {kind}, {generator:,} parameters")
    print(f"discriminator  {settings.loss} loss, {discriminator:,} parameters")
    print(f"device         {device}, {choose_precision(settings)}, TensorFlow {tf.__version__}\n")


@contextlib.contextmanager
def _first_signal_sets(stop):  # Ctrl-C or SIGTERM; a second one does what it did before
    is_main = threading.current_thread() is threading.main_thread()  # no other may have handlers
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM) if is_main}

    def restore():
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def ask_to_stop(*_):
        stop.set()
        restore()

    for kind in before:
        signal.signal(kind, ask_to_stop)
    try:
        yield
    finally:
        restore()


def _run_epochs(run):
    print("epoch  seconds  images/s   D loss   G loss      IS      FID  classes", flush=True)
    is_over = False
    if run.history and run.history[-1]["step"] == run.step():
        _insist(run, _write_epoch)  # not all was there when it stopped, or the same again
        is_over = run.progress() == 1
    else:
        _insist(run, _save_state)  # so that whatever happens now can be resumed
    while not is_over and not run.stop.is_set():
        _train_epoch(run)
        is_over = run.progress() == 1
        if is_over or run.step() % run.steps_per_epoch == 0:  # also after Ctrl-C: no row gets lost
            _finish_epoch(run, is_over)
        else:
            _insist(run, _save_state)


def _train_epoch(run):
    settings, state, steps = run.settings, run.state, run.steps_per_epoch
    epoch, done = divmod(run.step(), steps)
    images = run.dataset.images
    order = tf.range(len(images))
    order = tf.random.experimental.stateless_shuffle(order, seed=(settings.seed, epoch))
    columns = ["images/s", "loss D", "G"]
    pixels_per_step = settings.batch_size * images[0].size
    stride = min(math.ceil(PIXELS_PER_CALL / pixels_per_step), STEPS_PER_CALL)
    bar = keras.utils.Progbar(steps, 5, sys.stdout.isatty(), stateful_metrics=columns)
    for first in range(done, steps, stride):
        last, start = min(first + stride, steps), time.monotonic()
        pace = min(1.0, (1 - run.progress()) / max(1 - settings.decay_from, 1e-9))
        run.train_steps(order, tf.constant(first), tf.constant(last), tf.constant(pace))
        losses = state.losses.numpy() / last
        seconds = time.monotonic() - start
        state.seconds.assign([state.seconds.numpy()[0] + seconds, time.monotonic() - run.started])
        speed = (last - first) * settings.batch_size / seconds
        bar.update(last, list(zip(columns, [speed, *losses], strict=True)), finalize=False)
        if run.progress() == 1 or run.stop.is_set():
            break
    _refuse_bad_numbers(run)


def _refuse_bad_numbers(run):
    state = run.state
    parts = (state.generator, state.discriminator, state.average)
    parts += (state.generator_optimizer, state.discriminator_optimizer)
    variables = [state.losses, *(x for part in parts for x in part.variables)]
    if not all(np.isfinite(variable.numpy()).all() for variable in variables):
        advice = "try lower learning rates; the last good state and .h5 files are kept"
        raise RunError(f"losses or weights are not finite after step {run.step()}: {advice}")


def _finish_epoch(run, is_over):
    settings, state = run.settings, run.state
    epoch, steps = (x + 1 for x in divmod(run.step() - 1, run.steps_per_epoch))
    seconds, losses = float(state.seconds.numpy()[0]), (state.losses.numpy() / steps).tolist()
    speed = round(steps * settings.batch_size / seconds)
    row = dict.fromkeys(COLUMNS) | {"collapsed": False}
    row |= zip(COLUMNS, [epoch, run.step(), round(seconds, 3), speed, *losses], strict=False)
    row |= {"dataset": run.dataset.name, "inception": run.ruler.name}
    if epoch % settings.evaluate_every == 0 or is_over:
        images = generate(state.average, settings.evaluation_images, seed=settings.seed)
        row |= quick_metrics(run.ruler, images)
        best, shares = _best(run.history), row["class_shares"] or ()
        shares = () if run.dataset.labels is None else shares  # of classes that the data have
        too_few = 2 * (row["classes_covered"] or 0) < len(shares)
        row["collapsed"] = too_few or bool(best and row["fid"] > 10 * best["fid"])
    run.history[:] = [old for old in run.history if old["epoch"] < epoch] + [row]
    if steps == run.steps_per_epoch:  # else --resume goes on within it
        state.losses.assign([0.0, 0.0])
        state.seconds.assign([0.0, time.monotonic() - run.started])
    _insist(run, _save_state)  # first: all else can be made again from it
    _print_row(row)
    _insist(run, _write_epoch)


def _best(history):
    measured = [row for row in history if row["fid"] is not None]
    return min(measured, key=lambda row: row["fid"], default=None)


def _print_row(row):
    line = "{epoch:5d} {seconds:8.1f} {images_per_second:9,d} "
    line += "{discriminator_loss:8.4f} {generator_loss:8.4f} "
    if row["fid"] is not None:
        line += "{inception_score:7.3f} {fid:8.3f} "
        line += "       -" if row["classes_covered"] is None else "{classes_covered:8d}"
    line += " COLLAPSED" if row["collapsed"] else ""
    print(("\r\033[K" if sys.stdout.isatty() else "") + line.format(**row), flush=True)


def _insist(run, write):
    # A full disk may get room: worth waiting for as long as the epoch took that would be lost.
    deadline = time.monotonic() + max([PATIENCE, *(row["seconds"] for row in run.history)])
    for attempt in itertools.count():
        try:
            return write(run)
        except (OSError, tf.errors.OpError) as error:
            if run.stop.wait(0.5) or time.monotonic() > deadline:
                kept = "the last good state is kept, for --resume"
                raise RunError(f"cannot write: {_reason(error)}; {kept}") from None
            if attempt == 0:
                print(f"Cannot write: {_reason(error)}. Trying again for a while.")


def _save_state(run):
    facts = run.facts | {"history": run.history}
    save_state(run.state, Path(run.settings.checkpoints_dir, "state"), facts)


def _write_epoch(run):  # what the newest row's leaves; doing it again changes nothing
    settings, average, row = run.settings, run.state.average, run.history[-1]
    checkpoints, metrics = Path(settings.checkpoints_dir), Path(settings.samples_dir, "metrics.csv")
    with replacing(metrics) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(run.history)
    if row["epoch"] % settings.sample_every == 0 or run.progress() == 1:
        save_grid(_grid_path(run, row), draw_grid(average, settings.seed), 10, _title(run, row))
    save_keras(average, checkpoints / "generator_latest.h5")
    if row is _best(run.history):
        save_keras(average, checkpoints / "generator_best.h5")
    if row["epoch"] % settings.checkpoint_every == 0:
        save_keras(average, checkpoints / f"generator_model_epoch_{row['epoch']:03d}.h5")
    _write_summaries(run, row)


def _write_summaries(run, row):  # tf.summary.scalar and image need TensorBoard installed
    numbers = COLUMNS[3:-2]  # from images_per_second on, but for the names
    values = {name: ("scalars", row[name]) for name in numbers if row[name] is not None}
    if (path := _grid_path(run, row)).exists():
        png = path.read_bytes()
        size = Image.open(io.BytesIO(png)).size
        values["samples"] = ("images", [*map(str, size), png])
    with run.summary.as_default(step=row["epoch"]):
        for tag, (plugin, value) in values.items():
            metadata = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": plugin})
            tf.summary.write(tag, value, metadata=metadata)
    run.summary.flush()


def _grid_path(run, row):
    return Path(run.settings.samples_dir, f"image_at_epoch_{row['epoch']:04d}.png")


def _title(run, row):
    title = f"epoch {row['epoch']}"
    if row["fid"] is not None:
        title += f"    IS {row['inception_score']:.2f}    FID {row['fid']:.2f}"
    known = {"mnist": "", "stand-in": "    stand-in, not MNIST"}
    title += known.get(run.dataset.name, f"    {run.dataset.name}")
    return title.encode("ascii", "replace").decode()  # fonts have few other characters


def _finish(run):
    _insist(run, _draw_curves)
    if collapsed := [str(row["epoch"]) for row in run.history if row["collapsed"]]:
        print(f"\nFew classes, or an FID far above the best, after epoch {', '.join(collapsed)}.")
        print("Larger R1 and R2 or lower learning rates help against collapse.")
    if run.stop.is_set():
        again = line_to_type("train --resume", dataclasses.asdict(run.settings))
        raise KeyboardInterrupt(f"\nStopped; all is saved. To go on:\n  {again}")
    if best := _best(run.history):
        kept = Path(run.settings.checkpoints_dir, "generator_best.h5")
        print(f"\nBest: FID {best['fid']:.3f} after epoch {best['epoch']}, kept in {kept}")
    print(f"Look at {run.settings.samples_dir}/: the grids, metrics.png, training.gif")
    folders = {x: getattr(run.settings, x) for x in ("samples_dir", "checkpoints_dir")}
    print("Draw more:", line_to_type("generate", folders))


def _draw_curves(run):
    samples = Path(run.settings.samples_dir)
    if run.history:
        save_metrics_plot(samples / "metrics.png", run.history, _title(run, run.history[-1]))
    grids = [path for row in run.history if (path := _grid_path(run, row)).exists()]
    if grids:
        save_animation(samples / "training.gif", map(_opened, grids), 6)


def _opened(path):  # and closed: not every system lets a process have a thousand open files
    with Image.open(path) as picture:
        return picture.copy()


# --- Command line ------------------------------------------------------------------------------


def _train_command(settings, options):
    # For BatchedDense. TensorFlow looks here but once, and rounds all that the process multiplies
    # from then on, so train() in a notebook doesn't ask for it; ImageNet's network can't have it.
    on_cpu = not tf.config.list_physical_devices("GPU")
    if on_cpu and settings.inception != "imagenet" and choose_precision(settings) != "float32":
        os.environ[ROUNDING] = "BF16"
    train(settings=settings, resume="resume" in options)


def _save_npz(path, images, labels):
    arrays = {"images": images, "labels": labels}
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **{k: v for k, v in arrays.items() if v is not None})


def _save_walk(path, images, columns):
    frames = images.reshape(-1, columns, *images.shape[1:])
    save_animation(path, [as_picture(mosaic(frame, columns)) for frame in frames], 20)


WRITERS = {  # by the ending of --output
    ".png": lambda path, images, _, columns: save_grid(path, images, columns),
    ".npz": lambda path, images, labels, _: _save_npz(path, images, labels),
    ".gif": lambda path, images, _, columns: _save_walk(path, images, columns),
    "": lambda path, images, labels, _: save_pictures(path, images, labels),
}


def _generate_command(settings, options):
    output = Path(options.get("output", Path(settings.samples_dir, "generated.png")))
    if output.suffix not in WRITERS:
        raise UsageError(f"--output is {str(output)!r}, but must be a .png, .npz, .gif or a folder")
    _refuse_unwritable(output.parent if output.suffix else output)
    path, digits = options.get("checkpoint", default_generator(settings)), options.get("digits")
    generator = load_generator(path)
    count = options.get("count", 10 if digits else 100)
    labels = classes_to_draw(generator, count, digits)
    columns = len(labels) // count if digits else min(len(labels), 10)
    latent = latent_points(generator, len(labels), settings.seed)
    if output.suffix == ".gif":
        frames = latent_walk(generator, columns, settings.seed)
        latent, labels = np.concatenate(frames), np.tile(labels[:columns], len(frames))
    images = draw(generator, latent, labels)
    WRITERS[output.suffix](output, images, labels if classes_of(generator) else None, columns)
    print(f"Drawn by {path}: {output}")


REPORT = (  # what `evaluate` prints: a name, its value, how to read it
    ("Inception score", "{inception_score:.3f} ± {inception_score_std:.3f}", "higher is better"),
    ("FID", "{fid:.3f}", "0 and up, lower is better"),
    ("  95 % interval", "{fid_interval[0]:.3f} to {fid_interval[1]:.3f}", "at this many images"),
    ("KID", "{kid:.5f} ± {kid_std:.5f}", "about 0 for real ones, lower is better"),
    ("precision", "{precision:.3f}", "0 to 1, look real, higher is better"),
    ("recall", "{recall:.3f}", "0 to 1, data drawn, higher is better"),
    ("density", "{density:.3f}", "about 1 for real ones, higher is better"),
    ("coverage", "{coverage:.3f}", "0 to 1, data met, higher is better"),
    ("classes covered", "{classes_covered:d}", "by a tenth of an even share or more"),
    ("divergence", "{class_divergence:.4f} nats", "of class shares, 0 is best"),
    ("memorisation", "{memorisation:.3f}", "1: new as test images, to 0: copies"),
)


def _evaluate_command(settings, options):
    if {"images", "checkpoint"} <= options.keys():
        raise UsageError("--images and --checkpoint exclude each other")
    path = options.get("images") or options.get("checkpoint", default_generator(settings))
    count = options.get("count")
    if "images" in options:
        images, labels, *_ = load_path(path, settings)
    else:
        generator = load_generator(path)
        drawn = count or settings.evaluation_images
        images, labels = draw_random(generator, drawn, seed=settings.seed)
        labels = labels if classes_of(generator) else None
    _refuse_unwritable(settings.samples_dir)
    page = Path(settings.samples_dir, "neighbours.png")
    with contextlib.redirect_stdout(sys.stderr):  # --json prints nothing else
        metrics = evaluate_images(images, settings, labels, page, count)
    metrics |= {"measured": str(path), "page": str(page)}
    print(json.dumps(metrics) if "json" in options else _in_words(metrics))


def _in_words(metrics):
    head = "{images:,} images of {measured}\nagainst {dataset}, measured by {inception}\n"
    lines = [head.format(**metrics)]
    for name, value, words in REPORT:
        with contextlib.suppress(TypeError):  # None, which cannot be had, has no digits
            lines.append(f"{name:16} {value.format(**metrics):18} {words}")
    pairs = itertools.zip_longest(metrics["class_shares"] or (), metrics["fid_per_class"] or ())
    for number, pair in enumerate(pairs):
        share, distance = ("-" if x is None else f"{x:.3f}" for x in pair)
        lines.append(f"class {number:<10} share {share}, FID {distance}")
    return "\n".join([*lines, f"\nBeside the nearest training images: {metrics['page']}"])


def _inception_command(settings, options):
    arrays = load_mnist()
    if arrays is None:
        raise RunError("the Inception model needs MNIST, and there is none to be had")
    training, test = (
        (arrays[f"x_{part}"][..., np.newaxis], arrays[f"y_{part}"]) for part in ("train", "test")
    )
    save_keras(train_inception(training, test), SHIPPED_INCEPTION)
    ruler = _shipped_ruler(None)
    mean, covariance = feature_statistics(measure(ruler, training[0])[0])
    statistics = SHIPPED_INCEPTION.with_suffix(".npz")
    with replacing(statistics) as temporary:
        np.savez(temporary, mean=mean, covariance=covariance)
    print(f"Written: {SHIPPED_INCEPTION} and {statistics.name}. It measures as {ruler.name}.")


COMMANDS = {
    "train": _train_command,
    "generate": _generate_command,
    "evaluate": _evaluate_command,
    "inception": _inception_command,
}
OPTIONS = {  # beside the settings: the commands that take it, and what argparse needs to know
    "resume": ("train", {"action": "store_true", "help": "go on from the newest good state"}),
    "checkpoint": ("generate evaluate", {"help": "a generator's .h5 [the last run's best]"}),
    "count": ("generate evaluate", {"type": int, "help": "images, or rows of --digits"}),
    "digits": ("generate", {"help": "classes to draw, like 2026 or 10,11 [each in turn]"}),
    "output": ("generate", {"help": ".png grid, .npz, .gif walk or a folder for PNGs"}),
    "images": ("evaluate", {"help": "an .npz or a folder to measure instead"}),
    "json": ("evaluate", {"action": "store_true", "help": "print JSON"}),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists everything)")


def parse_command_line(arguments):
    """Return the command, Settings and options by name. Raises UsageError."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["train", *arguments]
    command, *words = arguments
    if command not in COMMANDS:
        raise UsageError(f"{command!r} is no command; there are {', '.join(COMMANDS)}")
    parser = _Parser("gan_mnist.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    parser._negative_number_matcher = re.compile("-[0-9.]")  # its own takes -1e-3 for a flag
    group = parser.add_argument_group("options of some commands")
    for name, (commands, details) in OPTIONS.items():
        group.add_argument(f"--{name}", **details | {"help": f"{commands}: {details['help']}"})
    group = parser.add_argument_group("settings")
    for name, (default, does, allowed) in SETTINGS.items():
        does = f"{does} {allowed} [{setting_as_text(default)}]".replace("%", "%%")
        group.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=does)
    given = vars(parser.parse_args(words))
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    for name, value in options.items():
        if value == "":
            raise UsageError(f"--{name} is empty")
        if command not in OPTIONS[name][0]:
            raise UsageError(f"--{name} goes with {OPTIONS[name][0].replace(' ', ' and ')}")
    if not 1 <= options.get("count", 1) <= 1_000_000:
        raise UsageError(f"--count is {options['count']}, but must be a whole number 1..1000000")
    return command, Settings(**given), options


def main(arguments=None):
    """Run the command line; return the exit status."""
    try:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        command, settings, options = parse_command_line(arguments)
        tf.config.experimental.enable_op_determinism()
        COMMANDS[command](settings, options)
    except UsageError as error:
        print(f"gan_mnist.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "\nInterrupted.")
        return 130
    except SystemExit:  # after --help, which shall not import TensorFlow for the next line
        raise
    except (RunError, OSError, MemoryError, tf.errors.OpError) as error:
        print(f"gan_mnist.py: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def end_at_once(*_):
    """End the process with status 130, for Ctrl-C and SIGTERM; leave nothing half-written."""
    # Not by an exception, which would unwind whatever TensorFlow is amid of; and Python's own end
    # aborts where a thread is still inside.
    for path in list(TEMPORARY):
        _remove(path)
    os.write(1, b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    # Gives signals a stack of their own. On the usual one they broke the heap when they came amid
    # one of oneDNN's products (TensorFlow 2.21 on AVX-512: within 20 s at 2,000 signals a second).
    faulthandler.enable(2)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, end_at_once)
    # Not every terminal has every character; into a file, lines go at once.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.exit(main())
