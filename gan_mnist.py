# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.18", "keras>=3.11.3", "numpy", "matplotlib", "scipy", "pillow>=10.1", "h5py",
# ]
# ///
"""Train a generative adversarial network (GAN) on MNIST, measure it every epoch, leave pictures.

    python gan_mnist.py                           train; then look into samples/
    python gan_mnist.py train --resume            go on with a run that stopped
    python gan_mnist.py generate --digits 2026    draw digits, no training needed
    python gan_mnist.py evaluate                  every metric of the best generator
    python gan_mnist.py inception                 train the network that measures

The file reads from top to bottom: settings, command line, stopping, files, data, networks, losses,
training step, pictures, generators and data sets by name, metrics, Inception models, checkpoints,
the run, commands.
"""

# ---- Settings: change these. Each is also a flag: EPOCHS is --epochs -----------------------------

# The run
EPOCHS = 40  # passes over the training images
MAX_MINUTES = 0.0  # end training after this many minutes, all saved; 0: no limit
BATCH_SIZE = 64  # images per training step, on all devices together
SEED = 0  # the same seed on the same machine gives the same bytes
DATASET = "mnist"  # what to learn
IMAGE_SIZE = 0  # pixels a side, cut to the middle square and resized; 0: as they are
IMAGE_COLOUR = "auto"  # auto: as the pictures are
SAMPLES_DIR = "samples"  # where pictures and metrics land
CHECKPOINTS_DIR = "checkpoints"  # where .h5 files and the training state land

# The networks
ARCHITECTURE = "dense"  # conv: convolutions next to the image; slower, better
CONDITIONAL = True  # both networks are told the digit; false: the plain GAN, a harder task
LATENT_DIM = 16  # numbers that an image is made from
GENERATOR_WIDTHS = (256, 256)  # units of its hidden layers, latent side first
DISCRIMINATOR_WIDTHS = (512, 256)  # units of its hidden layers, image side first
CONV_CHANNELS = 8  # of the convolution nearest the image; doubled at each halving

# The game
LOSS = "relativistic"  # what both networks minimise: see the section Losses
R1 = 0.1  # weight of the gradient penalty on real images
R2 = 0.1  # weight of the gradient penalty on generated images
GRADIENT_PENALTY = 0.0  # weight of the penalty on images between both; WGAN-GP has 10
PENALTY_EVERY = 8  # steps between the penalties, which weigh as many times more
SHIFT = 1  # pixels by which the discriminator's images are moved at random
MINIBATCH_STD = True  # tell the discriminator how much the images of a batch differ

# The optimizers
GENERATOR_LEARNING_RATE = 1e-3  # of Adam, at the start
DISCRIMINATOR_LEARNING_RATE = 1e-3  # of Adam, at the start
DECAY_FROM = 0.5  # share of the run after which both rates fall linearly to zero
BETA_1 = 0.0  # Adam's memory of gradients; with any, the players circle each other
BETA_2 = 0.99  # Adam's memory of squared gradients
EMA_DECAY = 0.999  # of the averaged generator, which is sampled and saved
WEIGHT_DECAY = 0.03  # of the generator, arXiv 1711.05101: an FID a fifth lower
PRECISION = "auto"  # of products; auto: bfloat16 where the hardware multiplies it

# The measuring
INCEPTION = "auto"  # network that measures; auto: one that reads the data's classes
EVALUATION_IMAGES = 10_000  # drawn for each measurement
EVALUATE_EVERY = 1  # epochs between measurements
SAMPLE_EVERY = 1  # epochs between picture grids
CHECKPOINT_EVERY = 10  # epochs between numbered .h5 files

# ---- Command line --------------------------------------------------------------------------------
# It stands before TensorFlow is imported, so that --help and a mistyped flag need not wait for it.

import argparse
import csv
import faulthandler
import functools
import io
import json
import linecache
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import make_dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import NamedTuple

with suppress(ImportError):  # Windows has no such locks
    import fcntl

PROGRAM = Path(globals().get("__file__", "gan_mnist.py"))  # a notebook's cell has no file
ANY_PATH = "the path of an .npz, an .npy, a folder of pictures"  # no " or " in it


def whole_numbers(text):
    return tuple(map(int, text.split(",")))


NUMBERS = {int: "a whole number", float: "a number", whole_numbers: "whole numbers like 256,512,"}
LIMITS = {  # kind, lowest and highest value, or the words to choose from: settings
    (int, 1, 1_000_000): "epochs evaluate_every sample_every checkpoint_every",
    (int, 1, 4096): "penalty_every conv_channels",
    (int, 2, 65_536): "batch_size latent_dim",
    (int, 100, 1_000_000): "evaluation_images",
    (int, 0, 2**31 - 1): "seed",
    (int, 0, 1024): "image_size",
    (int, 0, 8): "shift",
    (whole_numbers, 1, 65_536): "generator_widths discriminator_widths",
    (float, 0, 1_000_000): "max_minutes r1 r2 gradient_penalty",
    (float, 0, 1): "generator_learning_rate discriminator_learning_rate decay_from weight_decay",
    (float, 0, 0.999999): "beta_1 beta_2 ema_decay",
    "true or false": "conditional minibatch_std",
    "a folder": "samples_dir checkpoints_dir",
    f"mnist or fashion_mnist or cifar10 or {ANY_PATH}": "dataset",
    "auto or grey or colour": "image_colour",
    "dense or conv": "architecture",
    "auto or float32 or bfloat16": "precision",
    "auto or mnist or imagenet": "inception",
    "non_saturating or minimax or least_squares or hinge or wasserstein or relativistic": "loss",
}
ALLOWED = {name: allowed for allowed, names in LIMITS.items() for name in names.split()}


class UsageError(Exception):
    """The user asked for something that cannot be: one line, exit status 2."""


class RunError(Exception):
    """A run that cannot go on: one line, exit status 1."""


def refuse(error, status):
    """Print why in one line and return the exit status."""
    print(f"{PROGRAM.name}: {textwrap.shorten(str(error), 400)}", file=sys.stderr)
    return status


def as_text(value):
    """Return a setting's value as a person types it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def in_words(allowed):
    """Return what an entry of LIMITS means, in words."""
    if isinstance(allowed, str):
        return allowed
    kind, low, high = allowed
    return f"{NUMBERS[kind]} from {low:,} to {high:,}"


def read_value(allowed, label, given):
    """Return a value or its text as `allowed` says. Raises UsageError that names `label`."""
    text = as_text(given)
    with suppress(ValueError, KeyError):
        match allowed:
            case "true or false":
                return {"true": True, "false": False}[text.lower()]
            case "a folder":
                return Path(text)
            case str():
                path_exists = ANY_PATH in allowed and os.path.exists(text)
                if path_exists or text in allowed.split(" or "):
                    return text
            case kind, low, high:
                value = kind(text)
                numbers = value if kind is whole_numbers else [value]
                if all(low <= number <= high for number in numbers):
                    return value
    raise UsageError(f"{label} is {given!r}, but must be {in_words(allowed)}")


def line_above(name):
    """Return the number and the comment of a constant's line, (0, "") where there is none."""
    for number, line in enumerate(linecache.getlines(str(PROGRAM)), 1):
        if re.match(rf"{name.upper()}\b", line):
            return number, line.partition("# ")[2]
    return 0, ""


def check_settings(settings):
    """Give each setting its type. Raises UsageError that names the constant, its line, the flag."""
    for name, allowed in ALLOWED.items():
        label = f"{name.upper()} in line {line_above(name)[0]} or --{name.replace('_', '-')}"
        object.__setattr__(settings, name, read_value(allowed, label, getattr(settings, name)))


Settings = make_dataclass(
    "Settings",
    [(name, object, as_text(globals().get(name.upper(), ""))) for name in ALLOWED],
    frozen=True,
    namespace={"__post_init__": check_settings, "__doc__": "The constants above in lower case."},
)


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints its usage and exits."""

    def error(self, message):
        raise UsageError(message)


def make_parser():
    """Return the parser of all commands."""
    parser = Parser(PROGRAM.name)
    commands = parser.add_subparsers(dest="command")
    train = add_command(commands, "train", __doc__, " ".join(ALLOWED))
    train.add_argument("--resume", action="store_true", help="go on with the last run")
    generate = add_command(
        commands, "generate", "draw with a trained generator", "samples_dir checkpoints_dir"
    )
    digits = "classes to draw, by number or name: 2026 or cats,dogs; else each in turn"
    generate.add_argument("--digits", "--classes", help=digits)
    seed = secrets.randbelow(1_000_000)
    generate.add_argument("--seed", default=seed, help="draws the same again; else at random")
    generate.add_argument("--output", type=Path, help=".png grid, .npz, .gif walk, or a folder")
    evaluate = add_command(
        commands,
        "evaluate",
        "measure a generator or other images",
        "dataset image_size image_colour inception seed samples_dir checkpoints_dir",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, help="an .npz, .npy or folder to measure instead")
    for part in (generate, source):
        part.add_argument("--checkpoint", type=Path, help="an .h5; else the last run's best")
    for part in (generate, evaluate):
        read = functools.partial(read_value, (int, 1, 1_000_000), "--count")
        part.add_argument("--count", type=read, help="images, or rows of --digits")
    add_command(commands, "inception", "train the network that measures MNIST, into weights/", "")
    return parser


def add_command(commands, name, does, settings):
    """Add a command with a flag for each of its settings; return its parser."""
    parser = commands.add_parser(
        name, description=does, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for setting in sorted(settings.split(), key=line_above):
        flag, comment = f"--{setting.replace('_', '-')}", line_above(setting)[1]
        about = f"{comment} [{getattr(Settings, setting)}]; {in_words(ALLOWED[setting])}"
        about = about.replace("%", "%%")
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE", help=about)
    return parser


def parse_command_line(words):
    """Return the command, its Settings and its other options. Raises UsageError."""
    if not words or words[0].startswith("-"):
        words = ["train", *words]
    options = make_parser().parse_args(words)
    typed = {name: getattr(options, name) for name in ALLOWED if name in options}
    return options.command, Settings(**typed), options


def line_to_type(*words):
    return shlex.join(["python", PROGRAM.name, *words])


# ---- Stopping ------------------------------------------------------------------------------------

SIGNALS = signal.SIGINT, signal.SIGTERM
PARTIAL = set()  # half-written files and folders


def end_at_once(kind, _):
    """End the process, leaving nothing half-written.

    Not by an exception, which would unwind TensorFlow amid a product, and abort or hang.
    """
    for path in list(PARTIAL):
        remove(path)
    os._exit(128 + kind)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    WORDS = sys.argv[1:] if "__file__" in globals() else []  # pasted into a notebook: train
    with suppress(AttributeError):  # a notebook's stream has no such method
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if not hasattr(sys, "ps1"):  # a notebook's session keeps its own handlers
        # This also gives signals a stack of their own: on the usual one they broke the heap when
        # they came amid one of oneDNN's products (tests/signal_stack.py).
        faulthandler.enable(os.dup(2))
        # Waiting for other workers, TensorFlow lets no Python run: there the system ends it.
        for kind in SIGNALS:
            signal.signal(kind, signal.SIG_DFL if "TF_CONFIG" in os.environ else end_at_once)
    try:
        parse_command_line(WORDS)
    except UsageError as error:
        sys.exit(refuse(error, 2))
    if "--json" not in WORDS:
        print("Loading TensorFlow ...")

# ---- Imports that take seconds -------------------------------------------------------------------

import h5py
import numpy as np
import scipy
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors come as exceptions
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # take what memory is needed, not all
os.environ["KERAS_BACKEND"] = "tensorflow"
# TensorFlow's libraries greet before they read any log level: what C++ writes to stderr meanwhile
# goes elsewhere. Exceptions and crashes still show themselves.
STDERR = os.dup(2)
with tempfile.TemporaryFile() as aside:
    os.dup2(aside.fileno(), 2)
    try:
        import keras
        import tensorflow as tf
        from keras import Input, Model, layers, ops, optimizers
    finally:
        os.dup2(STDERR, 2)
        os.close(STDERR)
tf.get_logger().setLevel("ERROR")

# ---- Files: whole or not there -------------------------------------------------------------------

WEIGHTS = PROGRAM.resolve().parent / "weights"
# What an .h5 may be made of: none of these runs code from the file.
HARMLESS = set(
    """
    Functional Sequential InputLayer Dense Reshape Flatten Concatenate Activation Dropout Embedding
    BatchNormalization LeakyReLU ReLU CategoryEncoding Conv2D Conv2DTranspose UpSampling2D
    Cropping2D MaxPooling2D AveragePooling2D GlobalAveragePooling2D DTypePolicy Zeros Ones Constant
    RandomNormal GlorotUniform GlorotNormal HeNormal __keras_tensor__ None keras keras.layers
    keras.initializers keras.src.models.functional keras.src.models.sequential
    """.split()
)


@contextmanager
def replacing(path):
    """Give a temporary path for a file or folder; sync it and rename it to `path` when written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    PARTIAL.add(partial)
    try:
        yield partial
        if partial.is_file():
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        remove(partial)


def unused(path):
    """Return the path or, where it is taken, one with the next free number: digits_2.png."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.parent / f"{path.stem}_{number}{path.suffix}"
    return free


def make_writable(folder):
    """Make a folder. Raises UsageError where files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write into {str(folder)!r}: {error}") from None


@contextmanager
def holding(*folders):
    """Make folders and hold them for this process.

    The folder itself is locked: there is no lock file that could be deleted. Raises UsageError
    where a folder cannot be written into or another process holds it.
    """
    with ExitStack() as held:
        for folder in set(folders):
            make_writable(folder)
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder} is in use by another run") from None
            except OSError as error:  # Windows opens no folders, some network drives lock none
                print(f"{folder} cannot be locked ({error.strerror}): start no second run in it.")
        yield


def save_keras(model, path, about):
    """Write a Keras model, and a dict about it, to an .h5 that keras.models.load_model opens."""
    logging.getLogger("absl").setLevel("ERROR")  # Keras warns that .h5 is not its newest
    with replacing(path) as partial:
        if shutil.disk_usage(path.parent).free < 8 * model.count_params() + 2**20:
            raise OSError(f"the disk has no room for {path}")  # HDF5 would end the process
        model.save(partial)
        with h5py.File(partial, "a") as file:
            file.attrs["about"] = json.dumps(about)


def load_keras(path):
    """Return the Keras model in an .h5, with what save_keras wrote about it as `model.about`.

    Raises UsageError unless it is made of harmless layers.
    """
    parts = []  # every object in the model's configuration
    try:
        with h5py.File(path) as file:
            json.loads(file.attrs["model_config"], object_hook=parts.append)
            about = json.loads(file.attrs.get("about", "{}"))
        kinds = ("class_name", "module", "registered_name")
        strange = {str(part.get(kind)) for part in parts for kind in kinds} - HARMLESS
        if strange:
            raise ValueError(f"it holds {', '.join(sorted(strange))}")
        model = keras.models.load_model(path, compile=False, safe_mode=True)
        model.class_names = tuple(map(str, about.get("class_names", ())))
    except Exception as error:  # HDF5 and Keras raise a dozen kinds
        raise UsageError(f"cannot load {path}: {error}") from None
    model.about = about
    return model


def keras_home():
    """Return the folder where Keras keeps what it downloads."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))


def save_arrays(path, **arrays):
    """Write an .npz of the arrays."""
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)


def read_arrays(path):
    """Return the arrays of an .npz by name, that of an .npy as "images". Raises UsageError."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            size = sum(member.file_size for member in loaded.zip.infolist())
            if size > LARGEST_DATASET:
                raise ValueError(f"unpacked it would take {size:,} bytes")
            return dict(loaded)
    except Exception as error:  # NumPy and zipfile raise half a dozen kinds
        raise UsageError(f"cannot read {path} as .npz or .npy: {error}") from None


# ---- Data ----------------------------------------------------------------------------------------

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
# SHA-256 of the arrays' bytes, one after the other: a re-compressed file is as good.
MNIST_DIGEST = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
STALL_SECONDS = 9  # that a download may take without a byte
LARGEST_DATASET = 2**32  # bytes, unpacked
PICTURES = ".png .jpg .jpeg .bmp .gif .webp .pgm .ppm".split()
PICTURE_FORMATS = "PNG JPEG BMP GIF WEBP PPM".split()  # EPS would run a program


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C), labels uint8 (N,) or None, name, unseen images, class names."""

    images: np.ndarray
    labels: np.ndarray | None = None
    name: str = "images"
    test_images: np.ndarray | None = None
    class_names: tuple = ()


def load_mnist():
    """Return MNIST's four arrays from the Keras cache or its server.

    Raises RunError or OSError where neither has it.
    """
    path = keras_home() / "datasets" / "mnist.npz"
    with suppress(UsageError):  # missing or damaged
        return read_mnist(path)
    with replacing(path) as partial, downloading():
        keras.utils.get_file(partial.name, MNIST_URL, cache_dir=keras_home())
        return read_mnist(partial)


def read_mnist(path):
    """Return MNIST's four arrays. Raises UsageError for any other bytes."""
    arrays = read_arrays(path)
    found = [arrays.get(name, b"") for name in ("x_train", "y_train", "x_test", "y_test")]
    if sha256(b"".join(found)).hexdigest() != MNIST_DIGEST:
        raise UsageError(f"{path} is not MNIST")
    return found


@contextmanager
def downloading():
    """Give Keras' downloads a time limit, no progress bar in a log file, and one kind of error."""
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        with redirect_stdout(sys.stdout if sys.stdout.isatty() else io.StringIO()):
            yield
    except Exception as error:  # Keras raises bare ones
        raise RunError(f"cannot download into {keras_home()}: {error}") from None
    finally:
        socket.setdefaulttimeout(None)


def load_path(path, settings):
    """Return the Dataset in an .npz, an .npy or a folder of pictures. Raises UsageError."""
    if path.is_dir():
        return load_pictures(path, settings)
    arrays = read_arrays(path)
    images = arrays.get("images", arrays.get("arr_0"))
    if images is None:
        raise UsageError(f"{path} has no array named images, but {', '.join(arrays)}")
    return Dataset(images, arrays.get("labels"), path.name, arrays.get("test_images"))


def load_pictures(folder, settings):
    """Return the Dataset in a folder of pictures, whose folders are classes. Raises UsageError."""
    found = [*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")]
    paths = sorted(path for path in found if path.suffix.lower() in PICTURES)
    if not paths:
        raise UsageError(f"{folder} has no picture: {' '.join(PICTURES)}")
    images = []
    for path in paths:
        try:
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                images.append(fit_picture(ImageOps.exif_transpose(picture), settings))
        except Exception as error:  # Pillow's readers raise half a dozen kinds
            raise UsageError(f"cannot read {path}: {error}") from None
    if len({image.shape for image in images}) > 1:
        advice = "--image-size 64 --image-colour grey, for example, makes them alike"
        raise UsageError(f"the pictures in {folder} differ in size or colour: {advice}")
    classes = [path.parent.name for path in paths]
    labels = classes if len(set(classes)) > 1 else None
    return Dataset(np.stack(images), labels, f"{folder.resolve().name}/")


def fit_picture(picture, settings):
    """Return a Pillow picture as uint8 (H, W, C) in the settings' size and colour."""
    if picture.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel")
    grey = settings.image_colour == "grey" or (
        settings.image_colour == "auto" and picture.mode in ("1", "L", "LA")
    )
    page = Image.new("RGBA", picture.size, "white")  # shows where a picture is transparent
    picture = Image.alpha_composite(page, picture.convert("RGBA"))
    picture = picture.convert("L" if grey else "RGB")
    if settings.image_size:
        picture = ImageOps.fit(picture, (settings.image_size, settings.image_size))
    return np.atleast_3d(picture)


def as_picture(image):
    """Return the Pillow picture of an image uint8 (H, W, 1 or 3)."""
    return Image.fromarray(image.squeeze())


def as_dataset(data, settings):
    """Return a Dataset in the settings' size and colour, its classes numbered from 0.

    `data`: a Dataset, images, or (images, labels); labels may be any numbers or words. Raises
    UsageError.
    """
    data = Dataset(*data) if isinstance(data, tuple) else Dataset(data)
    given, labels, name, unseen, class_names = data
    images = as_images(given, name, settings)
    if images.size != np.size(given):
        name = f"{name} {images.shape[1:]}"
    if unseen is not None:
        unseen = as_images(unseen, "test images", settings)
    if labels is not None:
        found, labels = np.unique(np.ravel(labels), return_inverse=True)
        if len(labels) != len(images) or len(found) > 256:
            has = f"{len(labels):,} labels of {len(found)} classes, 256 at most"
            raise UsageError(f"{name} has {len(images):,} images, but {has}")
        class_names = tuple(str(class_names[x] if class_names else x) for x in found)
        labels = labels.astype(np.uint8)
    return Dataset(images, labels, name, unseen, class_names)


def as_images(images, name, settings):
    """Return uint8 (N, H, H, 1 or 3) of images (N, H, W) or (N, H, W, C). Raises UsageError."""
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.size and images.dtype == np.uint8 and images.shape[3:] in [(1,), (3,)]:
        if settings.image_size or settings.image_colour != "auto":
            images = np.stack([fit_picture(as_picture(image), settings) for image in images])
        if 4 <= images.shape[1] == images.shape[2]:
            return images
    form = "uint8 (N, H, H) or (N, H, H, 1 or 3), H at least 4 (--image-size makes them so)"
    raise UsageError(f"{name} must be {form}, not {images.dtype} {images.shape}")


def fingerprint(dataset):
    """Return a line that tells a data set from any other, whatever it is called."""
    images, labels, *_ = dataset
    digest = sha256(np.ascontiguousarray(images))
    if labels is not None:
        digest.update(labels)
    return f"{len(images):,} images of {images.shape[1:]}, SHA-256 {digest.hexdigest()[:16]}"


# ---- Networks ------------------------------------------------------------------------------------


def build_generator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras generator: latent (N, LATENT_DIM) to images (N, H, W, C) in [-1, 1].

    With `settings.conditional` it takes [latent, class], classes being integers (N,). `dtype` is
    the policy of the layers that multiply; all others are float32.
    """
    inputs = hidden = latent = Input((settings.latent_dim,), name="latent")
    if settings.conditional:
        label, one_hot = class_input(classes)
        inputs, hidden = [latent, label], layers.Concatenate()([latent, one_hot])
    for width in settings.generator_widths:
        hidden = layers.Dense(width, use_bias=False, dtype=dtype)(hidden)
        hidden = normalised(hidden)
    *finer, coarsest = channels_by_scale(settings, image_shape)
    edge = math.ceil(image_shape[0] / 2 ** len(finer))
    hidden = layers.Dense(edge * edge * coarsest, dtype=dtype)(hidden)
    hidden = layers.Reshape((edge, edge, coarsest))(hidden)
    for channels in reversed(finer):
        hidden = normalised(hidden)
        hidden = layers.Conv2DTranspose(channels, 4, 2, padding="same", dtype=dtype)(hidden)
    surplus = hidden.shape[1] - image_shape[0]
    if surplus:
        hidden = layers.Cropping2D(((0, surplus), (0, surplus)))(hidden)
    images = layers.Activation("tanh", name="image")(hidden)
    return Model(inputs, images, name="generator")


def build_discriminator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras discriminator: images (N, H, W, C) in [-1, 1] to logits (N, 1).

    With `settings.conditional` it takes [image, class] and adds the features' projection on the
    class's own direction (arXiv 1802.05637): FID 2.5, where concatenating the class gave 4.2.
    """
    inputs = features = image = Input(image_shape, name="image")
    for channels in channels_by_scale(settings, image_shape)[1:]:
        features = layers.Conv2D(channels, 4, 2, padding="same", dtype=dtype)(features)
        features = layers.LeakyReLU(0.2)(features)
    features = layers.Flatten()(features)
    for width in settings.discriminator_widths:
        features = layers.Dense(width, dtype=dtype)(features)
        features = layers.LeakyReLU(0.2)(features)
    if settings.minibatch_std:
        features = with_minibatch_std(features)
    logits = layers.Dense(1)(features)
    if settings.conditional:
        label, one_hot = class_input(classes)
        inputs, width = [image, label], features.shape[1]
        direction = layers.Dense(width, use_bias=False, kernel_initializer="random_normal")
        projection = ops.sum(features * direction(one_hot), axis=1, keepdims=True)
        logits += projection / math.sqrt(width)
    return Model(inputs, logits, name="discriminator")


def channels_by_scale(settings, image_shape):
    """Return the channels of the image and of each of its halvings, down to 4 to 7 pixels.

    Only "conv" halves it: a dense network has the image's own scale alone.
    """
    halvings = 0
    if settings.architecture == "conv":
        halvings = math.ceil(math.log2(image_shape[0] / 7))
    return [image_shape[2], *(settings.conv_channels * 2**number for number in range(halvings))]


def class_input(classes):
    label = Input((), dtype="int32", name="label")
    return label, layers.CategoryEncoding(classes, output_mode="one_hot")(label)


def normalised(hidden):
    # A short memory: the statistics must be right after a hundred steps already.
    hidden = layers.BatchNormalization(momentum=0.9, synchronized=replicas() > 1)(hidden)
    return layers.LeakyReLU(0.2)(hidden)


def with_minibatch_std(features):
    """Return features (N, F + 1): the last one says how much the batch differs, arXiv 1710.10196.

    Halves the FID without classes and lowers it by a third with them.
    """
    _, variance = ops.moments(features, axes=0, synchronized=replicas() > 1)
    # 1e-8: the root of equal images' variance, 0, has no finite slope.
    spread = ops.mean(ops.sqrt(variance + 1e-8))
    column = spread + ops.zeros_like(features[:, :1])
    return ops.concatenate([features, column], axis=1)


def replicas():
    """Return how many devices share each batch, with a replica of both networks on each."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def gpus():
    return tf.config.list_physical_devices("GPU")


def choose_precision(settings):
    """Return the Keras dtype policy that `settings.precision` means on this machine.

    "auto" is bfloat16 only where the processor multiplies it, by AMX. Others emulate it, at a
    third of the speed of float32.
    """
    lower, cpu = settings.precision == "bfloat16", Path("/proc/cpuinfo")
    if settings.precision == "auto" and cpu.exists():
        lower = "amx_bf16" in cpu.read_text()
    return "mixed_bfloat16" if lower else "float32"


# ---- Losses --------------------------------------------------------------------------------------
# Of logits (N, 1) on real and on generated images: the discriminator's and the generator's (N, 1).


def non_saturating(real, fake):
    """The generator climbs log D(G(z)), arXiv 1406.2661."""
    return tf.nn.softplus(-real) + tf.nn.softplus(fake), tf.nn.softplus(-fake)


def minimax(real, fake):
    """The game's own form: the generator descends log(1 - D(G(z))), arXiv 1406.2661."""
    return tf.nn.softplus(-real) + tf.nn.softplus(fake), -tf.nn.softplus(fake)


def least_squares(real, fake):
    """arXiv 1611.04076, where all is halved."""
    return (real - 1) ** 2 + fake**2, (fake - 1) ** 2


def hinge(real, fake):
    """arXiv 1705.02894."""
    return tf.nn.relu(1 - real) + tf.nn.relu(1 + fake), -fake


def wasserstein(real, fake):
    """arXiv 1701.07875; 1704.00028 adds GRADIENT_PENALTY = 10."""
    return fake - real, -fake


def relativistic(real, fake):
    """Each real image against a generated one, arXiv 1807.00734; 2501.05441 adds R1 and R2."""
    return tf.nn.softplus(fake - real), tf.nn.softplus(real - fake)


LOSSES = {
    loss.__name__: loss
    for loss in (non_saturating, minimax, least_squares, hinge, wasserstein, relativistic)
}

# ---- Training step -------------------------------------------------------------------------------


def new_state(settings, dataset, strategy):
    """Return a tf.train.Checkpoint of all that training changes and --resume restores.

    What learns is on every device of the strategy; the rest is one, and each worker's own.
    """
    keras.utils.set_random_seed(settings.seed)
    shape, classes = dataset.images.shape[1:], len(dataset.class_names)
    precision = choose_precision(settings)
    state = tf.train.Checkpoint(
        random=tf.random.Generator.from_seed(settings.seed),
        step=tf.Variable(0, dtype=tf.int64),
        facts=tf.Variable("{}"),  # about the run, as JSON
    )
    with strategy.scope():
        state.generator = build_generator(settings, shape, classes, precision)
        state.discriminator = build_discriminator(settings, shape, classes, precision)
        state.generator_optimizer = new_adam(settings, state.generator, settings.weight_decay)
        state.discriminator_optimizer = new_adam(settings, state.discriminator)
    state.average = build_generator(settings, shape, classes)
    state.average.set_weights(state.generator.get_weights())
    return state


def new_adam(settings, model, weight_decay=None):
    adam = optimizers.Adam(
        0.0,
        settings.beta_1,
        settings.beta_2,
        weight_decay=weight_decay,
        loss_scale_factor=replicas(),  # Adam adds the replicas' gradients, each of a mean
    )
    adam.build(model.trainable_variables)
    if tf.test.is_built_with_xla() and not gpus() and not tf.distribute.has_strategy():
        # One pass over the weights: a tenth to a quarter less time.
        adam.apply = tf.function(adam.apply, jit_compile=True, autograph=False)
    return adam


def compile_training(state, dataset, settings):
    """Return train(batches), which takes a step for each row of `batches` (steps, BATCH_SIZE).

    A row has the numbers of a batch's images. It returns the steps' losses (steps, 2): the
    discriminator's, the generator's.
    """
    strategy = state.generator.distribute_strategy
    images = tf.constant(dataset.images)  # all of them on the device, a byte a pixel
    labels = tf.constant(
        dataset.labels if settings.conditional else np.zeros(len(images)), tf.int32
    )

    def replica_step(images, labels, penalise):
        real = tf.cast(share_of(images), tf.float32) / 127.5 - 1
        return train_step(state, settings, real, share_of(labels), penalise)

    def step(chosen):
        batch = tf.gather(images, chosen), tf.gather(labels, chosen)
        losses = tf.cond(
            state.step % settings.penalty_every == 0,
            lambda: strategy.run(replica_step, [*batch, True]),
            lambda: strategy.run(replica_step, [*batch, False]),
        )
        state.step.assign_add(1)
        return strategy.reduce("MEAN", losses, axis=None)

    shape = (None, settings.batch_size)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(shape, tf.int64)])
    def train(batches):
        losses = tf.map_fn(step, batches, fn_output_signature=tf.float32)
        update_average(state, tf.shape(batches)[0], settings.ema_decay)
        return losses

    return train


def share_of(batch):
    """Return a replica's share of a batch (N, ...): with three replicas, every third row.

    Not a third in one piece: each has its part of all of SHIFT's eighths.
    """
    return batch[tf.distribute.get_replica_context().replica_id_in_sync_group :: replicas()]


def draw_once(draw, *arguments):
    """Return what `draw` draws once for all replicas, as it would for one device."""
    return tf.distribute.get_replica_context().merge_call(lambda _: draw(*arguments))


def train_step(state, settings, real, classes, penalise):
    """Update both networks once on real images (N, H, W, C) in [-1, 1] and their classes (N,).

    Return the mean losses (2,): the discriminator's, the generator's. Classes are passed to
    networks that take them. The same generated images serve both updates.
    """
    generator, discriminator, random = state.generator, state.discriminator, state.random
    size = real.shape[0] * replicas()
    latent = share_of(draw_once(random.normal, (size, settings.latent_dim)))
    real = shift(real, settings.shift, random)
    with tf.GradientTape(persistent=True) as tape:
        fake = generator(with_classes(generator, latent, classes), training=True)
        fake = shift(fake, settings.shift, random)
        real_logits, real_slope = logits_and_slope(discriminator, real, classes)
        fake_logits, fake_slope = logits_and_slope(discriminator, fake, classes)
        losses = LOSSES[settings.loss](real_logits, fake_logits)
        discriminator_loss, generator_loss = map(tf.reduce_mean, losses)
        penalty = 0.0
        if settings.r1:
            penalty += settings.r1 / 2 * gradient_penalty(real_slope)
        if settings.r2:
            penalty += settings.r2 / 2 * gradient_penalty(fake_slope)
        if settings.gradient_penalty:
            share = share_of(draw_once(random.uniform, (size, 1, 1, 1)))
            between = share * real + (1 - share) * fake
            _, slope = logits_and_slope(discriminator, between, classes)
            penalty += settings.gradient_penalty * gradient_penalty(slope, norm=1)
        # Now and then, with more weight: a third less time, arXiv 1912.04958.
        objective = discriminator_loss + (settings.penalty_every * penalty if penalise else 0)
    gradients = tape.gradient(objective, discriminator.trainable_variables)
    state.discriminator_optimizer.apply(gradients)
    gradients = tape.gradient(generator_loss, generator.trainable_variables)
    state.generator_optimizer.apply(gradients)
    return tf.stack([discriminator_loss, generator_loss])


def with_classes(model, inputs, classes):
    """Return what the model takes: inputs and classes (N,), or inputs where it knows no classes."""
    return [inputs, classes] if len(model.inputs) == 2 else inputs


def logits_and_slope(discriminator, images, classes):
    """Return logits (N, 1) and their gradients with respect to the images (N, H, W, C)."""
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = discriminator(with_classes(discriminator, images, classes), training=True)
    return logits, tape.gradient(logits, images)


def gradient_penalty(slope, norm=0):
    """Return the mean squared distance of the slopes' norms from `norm`.

    0: R1 on real and R2 on generated images (arXiv 1801.04406). 1: the penalty of WGAN-GP on
    images between them (arXiv 1704.00028).
    """
    # 1e-12: the root of 0 has no finite slope.
    norms = tf.sqrt(tf.reduce_sum(slope**2, axis=(1, 2, 3)) + 1e-12)
    return tf.reduce_mean((norms - norm) ** 2)


def shift(images, pixels, random):
    """Move images by up to `pixels` each way at random, around the edges (arXiv 2006.10738).

    The discriminator learns the training images by heart later: a third of the FID. Each eighth of
    a batch moves its own way: moved as one, it would be seven times as high.
    """
    if not pixels:
        return images
    ends = np.linspace(0, images.shape[0], 9, dtype=int)
    ways = draw_once(random.uniform, (8, 2), -pixels, pixels + 1, tf.int32)
    parts = [tf.roll(images[ends[k] : ends[k + 1]], ways[k], (1, 2)) for k in range(8)]
    return tf.concat(parts, axis=0)


def update_average(state, steps, decay):
    """Move the averaged generator towards the generator, batch normalisation's statistics too.

    Once for `steps` steps: after each it would cost an eighth of the time. A step's decay warms up
    as 1 - 9 / (10 + step), so that a short run is averaged as well.
    """
    warm = 1 - 9 / tf.cast(10 + state.step, tf.float32)
    weight = 1 - tf.minimum(decay, warm) ** tf.cast(steps, tf.float32)
    for mean, variable in zip(state.average.weights, state.generator.weights, strict=True):
        mean.assign_add(weight * (variable - mean))


# ---- Drawing and pictures ------------------------------------------------------------------------


def latent_points(generator, count, seed):
    """Return the same latent points float32 (count, LATENT_DIM) each time for the same seed."""
    size = generator.inputs[0].shape[-1]
    return tf.random.stateless_normal((count, size), (seed, 1)).numpy()


def latent_walk(generator, walks, seed, frames=120):
    """Return latent points (frames, walks, LATENT_DIM) of smooth round trips.

    Spherical interpolation (arXiv 1609.04468) all along the circle through two random points:
    each point on it is as likely as any that is drawn at random.
    """
    first, second = np.split(latent_points(generator, 2 * walks, seed), 2)
    angles = np.arange(frames).reshape(-1, 1, 1) * 2 * np.pi / frames
    return np.cos(angles) * first + np.sin(angles) * second


def draw(generator, latent, classes):
    """Return uint8 images (N, H, W, C) of latent points (N, LATENT_DIM) and classes (N,)."""
    drawn = []
    for start in range(0, len(latent), 1000):
        part = slice(start, start + 1000)
        inputs = with_classes(generator, latent[part], classes[part])
        images = generator.predict_on_batch(inputs)  # predict takes twice as long
        drawn.append(np.round((images + 1) * 127.5).astype(np.uint8))
    return np.concatenate(drawn)


def count_classes(generator):
    """Return how many classes the generator is told of, 0 for an unconditional one."""
    for layer in generator.layers:
        if isinstance(layer, layers.CategoryEncoding):
            return layer.num_tokens
    return 0


def classes_to_draw(generator, count, digits=None):
    """Return classes (N,), integers: `count`, each in turn, or `count` rows of `digits`.

    `digits`: numbers, or text like "2026" or, with commas, "10,11", "10," or "cats,dogs". Raises
    UsageError for what the generator does not know.
    """
    classes = count_classes(generator)
    if digits is None:
        return np.arange(count) % max(1, classes)
    known = {str(number): number for number in range(classes)}
    for number, name in enumerate(getattr(generator, "class_names", ())):
        known[name] = number
    text = as_text(digits)
    if "," in text or text in known:
        words = text.strip(",").split(",")
    else:
        words = list(text)  # "2026": each of its characters a class
    if not words or set(words) - known.keys():
        which = ", ".join(known) or "no classes"
        raise UsageError(f"this generator cannot draw {text!r}: it knows {which}")
    return np.tile([known[word] for word in words], count)


def generate(generator, count, digits=None, seed=None):
    """Return uint8 images (N, H, W, C): `count`, its classes in turn, or `count` rows of `digits`.

    Without a seed each call draws others. Raises UsageError for what cannot be drawn.
    """
    count = read_value((int, 1, 1_000_000), "count", count)
    classes = classes_to_draw(generator, count, digits)
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    return draw(generator, latent_points(generator, len(classes), seed), classes)


def draw_like(generator, dataset, count, seed):
    """Return images (count, H, W, C) of the classes of as many real images, drawn at random.

    Perfect digits, as many of each, are some way from MNIST, where a class has 9.0 to 11.2 %.
    """
    labels = dataset.labels if count_classes(generator) else [0]
    classes = np.resize(np.random.default_rng(0).permutation(labels), count)
    return draw(generator, latent_points(generator, count, seed), classes)


def draw_grid(generator, seed):
    """Return images (N, H, W, C) for a grid of ten columns, a row for each class."""
    classes = np.repeat(np.arange(count_classes(generator) or 10), 10)
    return draw(generator, latent_points(generator, len(classes), seed), classes)


def mosaic(images, columns):
    """Return one picture (H', W', C) of images (N, H, W, C), small ones enlarged."""
    images = np.pad(images, [(0, -len(images) % columns)] + 3 * [(0, 0)])
    rows = images.reshape(-1, columns, *images.shape[1:])
    picture = np.vstack([np.hstack(row) for row in rows])
    scale = max(1, round(64 / images.shape[1]))
    return picture.repeat(scale, 0).repeat(scale, 1)


def save_grid(path, images, columns, title, row_names=()):
    """Write a PNG of images (N, H, W, C) under a title, with names beside the rows."""
    grid, font = as_picture(mosaic(images, columns)), ImageFont.load_default(15)
    left, top = 14 * max(map(len, row_names), default=0), 36  # pixels
    page = ImageOps.expand(grid, (left, top, 0, 0), "white")

    def write(x, y, text):
        ImageDraw.Draw(page).text((x, y), printable(text), "black", font, anchor="mm")

    write(page.width / 2, top / 2, title)
    for number, name in enumerate(row_names):
        write(left / 2, top + (number + 0.5) * grid.height / len(row_names), name)
    with replacing(path) as partial:
        page.save(partial)


def printable(text):
    """Return the text with ? for what the pictures' fonts may lack."""
    return text.encode("ascii", "replace").decode()


def save_pictures(folder, images):
    """Write a folder of one PNG for each of the images (N, H, W, C)."""
    with replacing(folder) as partial:
        partial.mkdir()
        for number, image in enumerate(images):
            as_picture(image).save(partial / f"{number:06d}.png")


def save_animation(path, pictures, frames_per_second):
    """Write a GIF of equally large Pillow pictures, which repeats for ever."""
    first, *others = pictures
    pause = 1000 // frames_per_second  # milliseconds
    with replacing(path) as partial:
        first.save(partial, save_all=True, append_images=others, duration=pause, loop=0)


def save_metrics_plot(path, history, title, class_names):
    """Write metrics.png: losses, Inception score, FID and class shares against epochs."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(printable(title), parse_math=False)
    panels = {
        "Losses, mean over the epoch": "discriminator_loss generator_loss",
        "Inception score: higher is better": "inception_score",
        "Fréchet Inception distance: lower is better": "fid",
        "Share of each class in the samples": "class_shares",
    }
    for axes, heading in zip(figure.subplots(2, 2).flat, panels):
        for name in panels[heading].split():
            rows = [row for row in history if row.get(name) is not None]
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker=".")
        axes.set(title=heading, xlabel="epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    losses, _, distance, shares = figure.axes
    losses.legend(["discriminator", "generator"])
    distance.set_yscale("log", subs=[2, 5])
    distance.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    if shares.lines:
        names = [printable(name) for name in class_names[:20]]  # more would hide the curves
        shares.legend(names, ncols=2, fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial)


# ---- Generators and data sets by name ------------------------------------------------------------

SHIPPED_GENERATOR = WEIGHTS / "mnist_generator.h5"


def load_generator(path=None):
    """Return the Keras generator in `path`; by default the best of the last run, else the shipped.

    Raises UsageError for a file that is missing, damaged, not harmless or not a generator.
    """
    path = path or default_generator(Settings())
    model = load_keras(path)
    try:
        as_picture(mosaic(generate(model, 1), 1))
    except Exception:  # Keras raises half a dozen kinds
        raise UsageError(
            f"{path} is not a generator of images:"
            f" it makes {model.output_shape} of {model.input_shape}"
        ) from None
    return model


def default_generator(settings):
    """Return the path of the last run's best generator, else of the shipped one."""
    for path in (settings.checkpoints_dir / "generator_best.h5", SHIPPED_GENERATOR):
        if path.exists():
            return path
    raise UsageError(f"there is no generator yet: python {PROGRAM.name} trains one")


def load_dataset(settings):
    """Return the Dataset that `settings.dataset` names or is the path of.

    Raises UsageError for data that do not fit, RunError for a set that cannot be downloaded.
    """
    name = settings.dataset
    if name == "mnist":
        try:
            images, labels, unseen, _ = load_mnist()
            data = Dataset(images, labels, name, unseen)
        except (RunError, OSError) as error:
            print(error)
            data = load_stand_in()
    elif name in ("fashion_mnist", "cifar10"):
        print(f"{name}: from Keras, which downloads it once.")
        with downloading():  # CIFAR-10 has pickles, in an archive whose SHA-256 Keras checks
            (images, labels), (unseen, _) = getattr(keras.datasets, name).load_data()
        data = Dataset(images, labels, name, unseen)
    else:
        data = load_path(Path(name), settings)
    return as_dataset(data, settings)


def load_stand_in():
    """Return 60,000 digits drawn by the shipped generator. Raises RunError where it is missing."""
    if not SHIPPED_GENERATOR.exists():
        raise RunError(f"there is no MNIST: put {MNIST_URL} into {keras_home() / 'datasets'}")
    print(
        "MNIST is neither in the Keras cache nor to be downloaded. Going on with a stand-in:\n"
        "60,000 digits drawn by the shipped generator. THIS IS NOT MNIST.\n"
    )
    images = generate(load_generator(SHIPPED_GENERATOR), 60_000, seed=0)
    return Dataset(images, np.arange(60_000) % 10, "stand-in")


# ---- Metrics: functions of arrays ----------------------------------------------------------------


def feature_statistics(features):
    """Return mean (F,) and covariance (F, F) of features (N, F), in float64."""
    return features.mean(axis=0, dtype=float), np.cov(features, rowvar=False)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """Return the squared Fréchet distance of two Gaussians, 0 or more; lower is nearer.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), arXiv 1706.08500. The trace of the root is the
    nuclear norm of A1' A2, where C = A A': real whatever the ranks. Raises ValueError where a
    covariance is not finite.
    """
    cross = np.linalg.norm(square_root(covariance_1).T @ square_root(covariance_2), "nuc")
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(covariance_1 + covariance_2) - 2 * cross
    return max(float(distance), 0.0)


def square_root(covariance):
    """Return a matrix A such that A A' is the covariance."""
    # NumPy's: SciPy brings BLAS threads of its own, and both sets in turn take ten times as long.
    values, vectors = np.linalg.eigh(np.asarray_chkfinite(covariance))
    return vectors * np.sqrt(np.maximum(values, 0))


def inception_score(probabilities, splits=10):
    """Return mean and standard deviation of exp E KL(p(y|x) || p(y)) over `splits` parts.

    From class probabilities (N, K), N at least `splits`: 1 to K, higher is better (arXiv
    1606.03498). Raises ValueError where one is not finite.
    """
    scores = []
    for part in np.array_split(np.asarray_chkfinite(probabilities, float), splits):
        divergence = scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_inception_distance(features_1, features_2, subsets=100, subset_size=1000):
    """Return mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel (x.y / F + 1)^3 on features (N, F), N at least 2, arXiv 1801.01401: 0 for equal
    distributions, may be slightly negative; lower is better.
    """
    random, distances = np.random.default_rng(0), []
    size = min(subset_size, len(features_1), len(features_2))
    for _ in range(subsets):
        one = random.choice(features_1, size, replace=False)
        two = random.choice(features_2, size, replace=False)
        within = cubic_kernel(one, one) + cubic_kernel(two, two)
        pairs = (within.sum() - within.trace()) / (size * (size - 1))
        distances.append(pairs - 2 * cubic_kernel(one, two).mean())
    return float(np.mean(distances)), float(np.std(distances))


def cubic_kernel(one, two):
    kernel = one.astype(float) @ two.T / one.shape[1] + 1
    return kernel * kernel * kernel  # ** 3 takes five times as long


def precision_recall(real_features, generated_features, neighbours=3):
    """Return improved precision and recall, each 0 to 1, higher is better (arXiv 1904.06991).

    The share of generated features (N, F), N above k, within any ball around a real one that
    reaches its k-th neighbour, and the reverse.
    """
    precise = within_balls(generated_features, real_features, neighbours).any(axis=1)
    recalled = within_balls(real_features, generated_features, neighbours).any(axis=1)
    return float(precise.mean()), float(recalled.mean())


def density_coverage(real_features, generated_features, neighbours=5):
    """Return density, 0 and up, and coverage, 0 to 1; higher is better (arXiv 2002.09797).

    How many of those balls hold a generated feature (N, F), over k, about 1 for real images; and
    the share of them that hold any.
    """
    within = within_balls(generated_features, real_features, neighbours)
    return float(within.sum(axis=1).mean() / neighbours), float(within.any(axis=0).mean())


def within_balls(points, centres, k):
    """Return which points (N, F) are in the balls around centres (M, F): bool (N, M)."""
    radii = np.partition(squared_distances(centres, centres), k)[:, k]
    return squared_distances(points, centres) <= radii


def squared_distances(points, others):
    """Return the squared distances (N, M) of points (N, F) from others (M, F)."""
    squares = (points**2).sum(axis=1, keepdims=True)
    return np.maximum(squares + (others**2).sum(axis=1) - 2 * points @ others.T, 0)


def nearest(points, others):
    """Return which of `others` (M, F) is nearest to each of the points (N, F), and how far off."""
    indices = squared_distances(points, others).argmin(axis=1)
    return indices, np.linalg.norm(points - others[indices], axis=1)


def class_divergence(shares, real_classes):
    """Return the Kullback-Leibler divergence of class shares (K,) from real classes (N,), in nats.

    0 is best.
    """
    real = 1 + np.bincount(real_classes, minlength=len(shares))  # 1 keeps it finite
    return float(scipy.stats.entropy(shares, real))


def frechet_distance_per_class(features, classes, real_features, real_classes):
    """Return the Fréchet distance within each class, None where a side has fewer than 2 images."""
    fids = [None] * (1 + real_classes.max())
    for number in range(len(fids)):
        drawn, real = features[classes == number], real_features[real_classes == number]
        if min(len(drawn), len(real)) > 1:
            fids[number] = frechet_distance(*feature_statistics(drawn), *feature_statistics(real))
    return fids


# ---- The Inception models: the rulers ------------------------------------------------------------

SHIPPED_INCEPTION = WEIGHTS / "mnist_inception_2.h5"
NEIGHBOUR_IMAGES = 5_000  # at most, whose neighbours are looked at: memory grows with the square


def build_inception(image_shape, classes):
    """Return an untrained Inception network (arXiv 1409.4842) for small images.

    Images (N, H, W, C) in [-1, 1] to [pooled features (N, 128), class probabilities (N, K)].
    """
    image = Input(image_shape)
    # Large images are averaged down to 28 to 55 pixels a side; two halvings come first, because
    # blocks on 14x14 pixels take twice as long.
    hidden = layers.AveragePooling2D(max(1, image_shape[0] // 28))(image)
    hidden = convolution(hidden, 32, 5, strides=2)
    hidden = layers.MaxPooling2D(2, padding="same")(hidden)
    hidden = inception_block(inception_block(hidden, 32), 32)
    features = layers.GlobalAveragePooling2D()(hidden)
    probabilities = layers.Dense(classes, activation="softmax")(features)
    return Model(image, [features, probabilities])


def convolution(hidden, filters, size, strides=1):
    hidden = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(hidden)
    return layers.ReLU()(layers.BatchNormalization()(hidden))


def inception_block(hidden, width):
    branches = [
        convolution(hidden, width, 1),
        convolution(convolution(hidden, width, 1), width, 3),
        convolution(convolution(hidden, width // 2, 1), width, 5),
        convolution(layers.MaxPooling2D(3, 1, padding="same")(hidden), width, 1),
    ]
    return layers.Concatenate()(branches)


def train_inception(path, training, test, epochs):
    """Train an Inception network on `training`, say what it reads of `test`, save it in `path`.

    Both are uint8 images (N, H, W, C) and labels (N,).
    """
    keras.utils.set_random_seed(0)
    images, labels = training
    inception = build_inception(images.shape[1:], len(np.union1d(labels, test[1])))
    classifier = keras.Sequential(
        [
            layers.RandomRotation(0.03, "constant"),  # black comes in at the edges
            layers.RandomTranslation(0.08, 0.08, "constant"),
            layers.RandomZoom(0.12, 0.12, "constant"),
            layers.Rescaling(1 / 127.5, offset=-1),
            Model(inception.input, inception.output[1]),
        ]
    )
    steps = epochs * math.ceil(len(images) / 128)
    warmup = steps // 14
    rate = optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=4e-3, warmup_steps=warmup
    )
    optimizer = optimizers.AdamW(rate, weight_decay=0.02)
    classifier.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    classifier.fit(images, labels, batch_size=128, epochs=epochs, verbose=2)
    _, accuracy = classifier.evaluate(*test, verbose=0)
    print(f"It reads {accuracy:.2%} right of {len(test[0]):,} images that it never saw.")
    save_keras(inception, path, {"accuracy": accuracy})


class Ruler(NamedTuple):
    """A network that measures images."""

    name: str
    network: Model  # images (N, H, W, C), 0 to 255, to features (N, F), probabilities (N, K)
    reads_classes: bool  # whether its classes are the data's


def load_ruler(settings, dataset):
    """Return the Ruler that `settings.inception` means for `dataset`.

    "mnist" reads digits, "imagenet" is Keras' network; "auto" is the first for MNIST and for data
    without classes, else one that is trained on the data at first use and kept in the Keras home.
    """
    path, reads = SHIPPED_INCEPTION, dataset.name in ("mnist", "stand-in")
    if settings.inception == "imagenet":
        with downloading():
            whole = keras.applications.InceptionV3()
        network = Model(whole.input, [whole.get_layer("avg_pool").output, whole.output])
        name, reads = "imagenet_keras_inception_v3", False
    else:
        if settings.inception == "auto" and not reads and len(dataset.class_names) > 1:
            path, reads = kept_inception(dataset), True
        elif not path.exists():  # the program without its weights/
            path = kept_inception(load_dataset(Settings(dataset="mnist")))
        network = load_keras(path)
        # Another network has another name: under it, FID is another number.
        name = f"{path.stem}_{sha256(path.read_bytes()).hexdigest()[:8]}"
        print(f"Measured by {name}, which reads {network.about['accuracy']:.2%} of unseen images.")
    return Ruler(name, taking(network, dataset.images.shape[1:]), reads)


def kept_inception(dataset):
    """Return the path of a network that reads the data; train it at first use on nine tenths."""
    path = keras_home() / "gan_mnist" / f"inception_{fingerprint(dataset)[-16:]}.h5"
    if not path.exists():
        make_writable(path.parent)
        print(f"Training a network to measure {dataset.name}, once, two to three minutes:\n{path}")
        images, labels = dataset.images, dataset.labels
        training = np.random.default_rng(0).permutation(len(images)) % 10 > 0
        parts = [(images[part], labels[part]) for part in (training, ~training)]
        train_inception(path, *parts, epochs=min(20, 1 + 180_000 // len(images)))
    return path


def taking(network, image_shape):
    """Return the network as one that takes images (N, H, W, C) of another shape, 0 to 255."""
    height, width, channels = network.input_shape[1:]
    image = Input(image_shape)
    hidden = image / 127.5 - 1
    if channels != image_shape[2]:
        hidden = ops.repeat(ops.mean(hidden, -1, keepdims=True), channels, -1)
    if (height, width) != image_shape[:2]:
        hidden = ops.image.resize(hidden, (height, width), antialias=True)
    taker = Model(image, network(hidden))
    # Four batches in one call, two at a time: a quarter less time.
    taker.compile(steps_per_execution=4, jit_compile=False)
    return taker


def measure(ruler, images):
    """Return features float32 (N, F) and probabilities (N, K) of uint8 images (N, H, W, C)."""
    return ruler.network.predict(images, batch_size=250, verbose=0)


def real_statistics(ruler, dataset):
    """Return mean and covariance of the data's features; for MNIST they are shipped."""
    known = WEIGHTS / f"{ruler.name}.npz"
    if dataset.name == "mnist" and known.exists():
        return tuple(read_arrays(known).values())
    return feature_statistics(measure(ruler, dataset.images)[0])


def quick_metrics(ruler, statistics, features, probabilities):
    """Return what every epoch reports, by name, of features (N, F) and probabilities (N, K).

    `statistics`: mean and covariance of the data's features.
    """
    score, deviation = inception_score(probabilities)
    metrics = {
        "inception_score": score,
        "inception_score_std": deviation,
        "fid": frechet_distance(*feature_statistics(features), *statistics),
    }
    if ruler.reads_classes:
        classes = probabilities.shape[1]
        shares = np.bincount(probabilities.argmax(axis=1), minlength=classes) / len(probabilities)
        # Covered: a tenth of an even share or more, so that a stray image doesn't count.
        metrics["classes_covered"] = int((shares >= 0.1 / classes).sum())
        metrics["class_shares"] = shares.tolist()
    return metrics


def evaluate_images(images, settings, dataset=None):
    """Return every metric by name for uint8 images (N, H, W, C), against `settings.dataset`.

    "nearest": the training images with the nearest features to the first 20. What cannot be had
    is left out. Raises UsageError for fewer than 10 images, or of another shape than the data's.
    """
    images, dataset = as_images(images, "images", settings), dataset or load_dataset(settings)
    training, random = dataset.images, np.random.default_rng(0)
    if min(len(images), len(training)) < 10 or images.shape[1:] != training.shape[1:]:
        wanted = f"10 or more of {training.shape[1:]}, as in {dataset.name}"
        raise UsageError(f"the images to measure must be {wanted}, not {images.shape}")
    ruler = load_ruler(settings, dataset)
    real, real_probabilities = measure(ruler, training)
    features, probabilities = measure(ruler, images)
    metrics = {"images": len(images), "dataset": dataset.name, "inception": ruler.name}
    shuffled = random.permutation(probabilities)  # the score is of parts; they may come by class
    metrics |= quick_metrics(ruler, feature_statistics(real), features, shuffled)
    if ruler.reads_classes:
        read, real_read = probabilities.argmax(axis=1), real_probabilities.argmax(axis=1)
        metrics["class_divergence"] = class_divergence(metrics["class_shares"], real_read)
        metrics["fid_per_class"] = frechet_distance_per_class(features, read, real, real_read)
    if dataset.test_images is not None:
        unseen, _ = measure(ruler, dataset.test_images)
        metrics["memorisation"] = memorisation(features, unseen, real)
    metrics["nearest"] = nearest(features[:20], real)[0].tolist()
    count = min(NEIGHBOUR_IMAGES, len(features), len(real))
    drawn, real = random.permutation(features)[:count], random.permutation(real)[:count]
    metrics["kid"], metrics["kid_std"] = kernel_inception_distance(real, drawn)
    metrics["precision"], metrics["recall"] = precision_recall(real, drawn)
    metrics["density"], metrics["coverage"] = density_coverage(real, drawn)
    return metrics


def memorisation(features, unseen, real):
    """Return how far features (N, F) are from real ones, over how far unseen real images' are.

    Medians of the distance to the nearest. 1: as new as unseen images are; towards 0: copies.
    """
    some = [np.random.default_rng(0).permutation(x)[:1000] for x in (features, unseen)]
    distance, usual = [np.median(nearest(x, real)[1]) for x in some]
    return float(distance / usual)


# ---- Checkpoints ---------------------------------------------------------------------------------

MAY_CHANGE = """
    epochs max_minutes inception evaluation_images evaluate_every sample_every checkpoint_every
    samples_dir checkpoints_dir
""".split()


def saved_states(settings):
    """Return the paths of the states that are kept, oldest first."""
    return sorted(settings.checkpoints_dir.glob("state/step-*.index"))


def save_state(run):
    """Save all that --resume needs, keep the newest three."""
    facts = {name: getattr(run, name) for name in ("identity", "history", "losses", "seconds")}
    facts["elapsed"] = monotonic() - run.started
    run.state.facts.assign(json.dumps(facts))
    # TensorFlow writes the .index last.
    run.state.write(run.settings.checkpoints_dir / f"state/step-{run.state.step.numpy():09d}")
    for old in saved_states(run.settings)[:-3]:
        for part in sorted(old.parent.glob(f"{old.stem}.*")):  # the .index last, too
            remove(part)


def restore_state(run):
    """Restore the newest readable state.

    Raises UsageError where settings or data differ, RunError where no state can be read.
    """
    for index in reversed(saved_states(run.settings)):
        path = str(index.with_suffix(""))
        try:
            facts = json.loads(tf.train.load_variable(path, "facts/.ATTRIBUTES/VARIABLE_VALUE"))
            changed = [
                f"{name} was {was}, is {run.identity[name]}"
                for name, was in facts["identity"].items()
                if was != run.identity[name] and name not in MAY_CHANGE
            ]
            if changed:
                raise UsageError("this cannot change on --resume: " + "; ".join(changed))
            run.state.read(path).assert_consumed()
            run.history, run.losses = facts["history"], facts["losses"]
            run.seconds, run.started = facts["seconds"], monotonic() - facts["elapsed"]
            return
        except UsageError:
            raise
        except Exception:  # TensorFlow and whatever is in the file raise half a dozen kinds
            print(f"{path} is damaged or of another version.")
    raise RunError(f"no state in {run.settings.checkpoints_dir} can be read; nothing was changed")


def set_aside(settings):
    """Make room for a new run: move what an earlier one left to a new checkpoints/previous."""
    made = "state generator_* image_at_epoch_* metrics.* training.gif tensorboard".split()
    folders = {settings.samples_dir, settings.checkpoints_dir}
    old = [path for folder in folders for name in made for path in folder.glob(name)]
    if old:
        previous = unused(settings.checkpoints_dir / "previous")
        previous.mkdir()
        for path in old:
            shutil.move(path, previous / path.name)
        print(
            f"The earlier run's files are in {previous} now; delete them as you like.\n"
            f"--resume goes on with it with {previous} as --checkpoints-dir and --samples-dir.\n"
        )


# ---- The run -------------------------------------------------------------------------------------

STEPS_PER_CALL = 25  # of the compiled training; between calls come the progress bar and Ctrl-C
COLUMNS = """
    epoch step seconds images_per_second discriminator_loss generator_loss
    inception_score inception_score_std fid classes_covered dataset inception
""".split()


class Run:
    """What a run is made of, and how far it is; agree() adds `done` and `stopped`."""

    def __init__(self, settings, dataset, strategy, signals):
        self.settings = settings
        self.dataset = dataset
        self.signals = signals  # that this process got
        self.identity = {name: as_text(value) for name, value in vars(settings).items()}
        self.identity |= {"dataset": fingerprint(dataset), "precision": choose_precision(settings)}
        self.ruler = load_ruler(settings, dataset)  # it may be trained first
        self.real_statistics = real_statistics(self.ruler, dataset)  # mean, covariance of features
        self.state = new_state(settings, dataset, strategy)
        self.train_steps = compile_training(self.state, dataset, settings)
        self.steps_per_epoch = len(dataset.images) // settings.batch_size
        self.started = monotonic()  # as if the run had never paused
        self.history = []  # a row (a dict) an epoch
        self.losses = []  # of the steps in the epoch at hand: the discriminator's, the generator's
        self.seconds = 0.0  # that these steps took


def train(dataset=None, epochs=None, settings=None, resume=False):
    """Train, measure, leave pictures and checkpoints; return the averaged generator.

    `dataset`: a Dataset, uint8 images (N, H, H) or (N, H, H, 1 or 3), (images, labels), or None
    for `settings.dataset`. `resume` goes on with the run in the checkpoints folder. Raises
    UsageError for settings or data that don't fit, RunError where the run cannot go on, and
    KeyboardInterrupt after Ctrl-C, when all is saved.
    """
    use_threads_well()
    settings = settings or Settings()
    strategy = choose_strategy(settings)
    if resume and not saved_states(settings):
        raise UsageError(f"there is nothing to resume in {settings.checkpoints_dir}")
    settings, data = fitting(settings, epochs, dataset)
    with own_folders(settings, strategy, resume) as settings, noted_signals() as signals:
        run = Run(settings, data, strategy, signals)
        begin(run, resume)
        while run.done < 1 and not run.stopped:
            train_epoch(run)
            if len(run.losses) == run.steps_per_epoch or run.done == 1:
                measure_epoch(run)
            save_state(run)  # first: all else can be made again from it
            if not run.losses:
                write_epoch(run)
            agree(run)
        draw_curves(run)
        print_last_words(run)
        if run.stopped:
            print("\nStopped; all is saved. In a notebook, train(..., resume=True) goes on.")
            raise KeyboardInterrupt
    run.state.average.class_names = data.class_names
    return run.state.average


def use_threads_well():
    """Tell TensorFlow what suits small products, unless this process has used it before."""
    with suppress(RuntimeError):
        # Two products side by side on half the cores each: a third less time a step than one
        # after the other on all of them.
        tf.config.threading.set_inter_op_parallelism_threads(2)
        tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count() // 2 or 1)


def choose_strategy(settings):
    """Return the tf.distribute.Strategy to train by: one in scope, that of TF_CONFIG, or all GPUs.

    Raises UsageError where TF_CONFIG is wrong or the batch cannot be shared out evenly.
    """
    strategy = tf.distribute.get_strategy()
    if not tf.distribute.has_strategy():
        try:
            if "TF_CONFIG" in os.environ:
                print("Waiting for all workers in TF_CONFIG ...")
                strategy = tf.distribute.MultiWorkerMirroredStrategy()
            elif len(gpus()) > 1:
                strategy = tf.distribute.MirroredStrategy()
        except Exception as error:  # TensorFlow raises half a dozen kinds
            raise UsageError(f"TF_CONFIG is wrong: {error}") from None
    devices = strategy.num_replicas_in_sync
    if settings.batch_size % devices:
        raise UsageError(f"{devices} devices cannot share --batch-size {settings.batch_size}")
    return strategy


@contextmanager
def own_folders(settings, strategy, resume):
    """Give the chief's settings; the other workers get folders that nobody looks into.

    So all workers do the same, and only the chief is seen and heard.
    """
    if strategy.extended.should_checkpoint:
        with holding(settings.samples_dir, settings.checkpoints_dir):
            yield settings
        return
    print("Another worker is the chief, which prints and saves it all.")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        if resume:
            shutil.copytree(settings.checkpoints_dir / "state", f"{folder}/state")
        yield replace(settings, samples_dir=folder, checkpoints_dir=folder)


def fitting(settings, epochs, dataset):
    """Return the run's Settings and Dataset. Raises UsageError where they don't fit."""
    data = load_dataset(settings) if dataset is None else as_dataset(dataset, settings)
    if len(data.images) < settings.batch_size:
        raise UsageError(f"{data.name} has fewer images than --batch-size {settings.batch_size}")
    if settings.conditional and data.labels is None:
        print(f"{data.name} has no labels: training without classes.\n")
        settings = replace(settings, conditional=False)
    if epochs is not None:
        settings = replace(settings, epochs=epochs)
    return settings, data


@contextmanager
def noted_signals():
    """Give a list that gets the first signal; the next one does what it did before."""
    noted, undo = [], ExitStack()

    def note(kind, _):
        noted.append(kind)
        undo.close()

    with undo:
        with suppress(ValueError):  # only the main thread may have handlers
            for kind in SIGNALS:
                undo.callback(signal.signal, kind, signal.signal(kind, note))
        yield noted


def begin(run, resume):
    """Take a run to its newest state, or make room for a new one; print what it is."""
    settings = run.settings
    if resume:
        restore_state(run)
    else:
        set_aside(settings)
    for folder in (settings.samples_dir, settings.checkpoints_dir):
        for left in [*folder.glob(".*.partial*"), *folder.glob("state/*_temp")]:
            remove(left)  # by a run that was killed
    run.summaries = tf.summary.create_file_writer(str(settings.samples_dir / "tensorboard"))
    print_banner(run)
    agree(run)
    save_state(run)  # so that whatever happens now can be resumed
    if run.history and not run.losses:
        write_epoch(run)  # it may have been killed before


def print_banner(run):
    """Print what is trained on what, where, and the head of the table."""
    kind = "class-conditional" if run.settings.conditional else "unconditional"
    print(f"""\
data           {run.dataset.name}, {run.identity["dataset"]}
generator      {kind} {run.settings.architecture}, {run.state.generator.count_params():,} parameters
discriminator  {run.settings.loss} loss, {run.state.discriminator.count_params():,} parameters
replicas       {run.state.generator.distribute_strategy.num_replicas_in_sync} of both networks
device         {os.cpu_count()} cores, {len(gpus())} GPUs (on them equal runs may differ)
numbers        {run.identity["precision"]}, TensorFlow {tf.__version__}

  epoch seconds  images/s   D loss   G loss     IS      FID classes     left""")


def agree(run):
    """Set the share of the run that is done, by its epochs or minutes, and whether to stop.

    Both to the mean over all workers: their clocks differ and a signal may reach only one, but all
    must take the same steps.
    """
    epochs = len(run.history) + len(run.losses) / run.steps_per_epoch
    minutes = (monotonic() - run.started) / 60
    limit = run.settings.max_minutes or math.inf
    done = min(1.0, max(epochs / run.settings.epochs, minutes / limit))
    strategy = run.state.generator.distribute_strategy
    own = strategy.run(tf.constant, [[done, len(run.signals)], tf.float64])
    run.done, run.stopped = strategy.reduce("MEAN", own, axis=None).numpy().tolist()


def train_epoch(run):
    """Train to the end of the epoch or of the run, or until a signal; then check the numbers."""
    settings, state, steps = run.settings, run.state, run.steps_per_epoch
    random = np.random.default_rng([settings.seed, len(run.history)])
    order = random.permutation(len(run.dataset.images))
    batches = order[: steps * settings.batch_size].reshape(steps, -1)
    bar = keras.utils.Progbar(steps, verbose=sys.stdout.isatty())
    while len(run.losses) < steps and run.done < 1 and not run.stopped:
        pace = min(1.0, (1 - run.done) / max(1 - settings.decay_from, 1e-9))
        state.generator_optimizer.learning_rate = pace * settings.generator_learning_rate
        state.discriminator_optimizer.learning_rate = pace * settings.discriminator_learning_rate
        start, first = monotonic(), len(run.losses)
        losses = run.train_steps(batches[first : first + STEPS_PER_CALL])
        run.losses += losses.numpy().tolist()  # waits for the steps
        run.seconds += monotonic() - start
        agree(run)
        bar.update(len(run.losses), finalize=False)
    refuse_bad_numbers(run)


def refuse_bad_numbers(run):
    """Raise RunError where a weight or a loss is not finite."""
    state = run.state
    numbers = [run.losses, *state.generator.get_weights(), *state.discriminator.get_weights()]
    if not all(np.isfinite(part).all() for part in numbers):
        advice = "try lower learning rates; the last good state and .h5 files are kept"
        raise RunError(f"losses or weights are not finite at step {state.step.numpy()}: {advice}")


def measure_epoch(run):
    """End the epoch: add its row to the history, measured where that is due, and print it."""
    settings = run.settings
    discriminator_loss, generator_loss = np.mean(run.losses, axis=0).tolist()
    row = {
        "epoch": len(run.history) + 1,
        "step": int(run.state.step.numpy()),
        "seconds": round(run.seconds, 3),
        "images_per_second": round(len(run.losses) * settings.batch_size / run.seconds),
        "discriminator_loss": discriminator_loss,
        "generator_loss": generator_loss,
        "fid": None,
        "dataset": run.dataset.name,
        "inception": run.ruler.name,
        "measure": f"{run.ruler.name}, {settings.evaluation_images} images",
    }
    run.history.append(row)
    if row["epoch"] % settings.evaluate_every == 0 or run.done == 1:
        images = draw_like(
            run.state.average, run.dataset, settings.evaluation_images, settings.seed
        )
        row |= quick_metrics(run.ruler, run.real_statistics, *measure(run.ruler, images))
    run.losses, run.seconds = [], 0.0
    print_row(row, run)


def is_collapsed(row, run):
    """Return whether half the classes are lost, or the FID is ten times the run's best."""
    few = run.ruler.reads_classes and 2 * row["classes_covered"] < len(row["class_shares"])
    far = row["fid"] > 10 * best_row(run.history)["fid"]
    return row["step"] >= 500 and (few or far)  # before, the averaged generator says little


def best_row(history):
    """Return the row of the lowest FID among those measured as the last one was, or None."""
    measured = [row for row in history if row["fid"] is not None]
    alike = [row for row in measured if row["measure"] == measured[-1]["measure"]]
    return min(alike, key=lambda row: row["fid"], default=None)


def print_row(row, run):
    """Print a row of the table, and how much longer the run takes."""
    epoch, metrics = f"{row['epoch']}/{run.settings.epochs}", ""
    speed = f"{row['seconds']:7.1f} {row['images_per_second']:9,d}"
    losses = f"{row['discriminator_loss']:8.4f} {row['generator_loss']:8.4f}"
    left = (monotonic() - run.started) * (1 / run.done - 1)
    note = f"{left // 60:.0f}m {left % 60:02.0f}s"
    if row["fid"] is not None:
        covered = row.get("classes_covered", "-")
        metrics = f"{row['inception_score']:6.3f} {row['fid']:8.3f} {covered:>7}"
        if is_collapsed(row, run):
            note = "COLLAPSED"
    print("\r\033[K" * sys.stdout.isatty() + f"{epoch:>7} {speed} {losses} {metrics:23} {note:>8}")


def write_epoch(run):
    """Write what the newest row leaves; doing it again changes nothing."""
    settings, average, row = run.settings, run.state.average, run.history[-1]
    epoch = row["epoch"]
    with replacing(settings.samples_dir / "metrics.csv") as new, open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(run.history)
    grid = settings.samples_dir / f"image_at_epoch_{epoch:04d}.png"
    if epoch % settings.sample_every == 0 or run.done == 1:
        names = run.dataset.class_names if settings.conditional else ()
        save_grid(grid, draw_grid(average, settings.seed), 10, title_of(run, row), names)
    names = ["latest"]
    if row is best_row(run.history):
        names.append("best")
    if epoch % settings.checkpoint_every == 0:
        names.append(f"model_epoch_{epoch:03d}")
    about = {"class_names": run.dataset.class_names}
    for name in names:
        save_keras(average, settings.checkpoints_dir / f"generator_{name}.h5", about)
    write_summaries(run, row, grid)


def write_summaries(run, row, grid):
    """Write the row and the grid for TensorBoard; tf.summary.scalar would need it installed."""
    summaries = [
        (name, "scalars", row[name]) for name in COLUMNS[3:10] if row.get(name) is not None
    ]
    if grid.is_file():
        width, height = Image.open(grid).size
        summaries.append(("samples", "images", [str(width), str(height), grid.read_bytes()]))
    with run.summaries.as_default(step=row["epoch"]):
        for tag, plugin, value in summaries:
            metadata = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": plugin})
            tf.summary.write(tag, value, metadata=metadata)


def title_of(run, row):
    """Return the title of a row's pictures."""
    title = f"{run.dataset.name}    epoch {row['epoch']}"
    if row["fid"] is not None:
        title += f"    IS {row['inception_score']:.2f}    FID {row['fid']:.2f}"
    return title


def draw_curves(run):
    """Write metrics.png and the animation of the grids."""
    folder, history = run.settings.samples_dir, run.history
    if history:
        title = title_of(run, history[-1])
        save_metrics_plot(folder / "metrics.png", history, title, run.dataset.class_names)
    grids = []
    for path in sorted(folder.glob("image_at_epoch_*")):
        with suppress(OSError):  # damaged
            grids.append(Image.open(path).copy())
    if grids:
        save_animation(folder / "training.gif", grids, 6)


def print_last_words(run):
    """Print what the run came to and where to look."""
    print(f"\nLook at {run.settings.samples_dir}/: the grids, metrics.png, training.gif")
    best, kept = best_row(run.history), run.settings.checkpoints_dir / "generator_best.h5"
    if best and kept.exists():
        print(
            f"Best: FID {best['fid']:.3f} after epoch {best['epoch']}. Draw more with it:\n  "
            + line_to_type("generate", "--checkpoint", str(kept))
        )


# ---- Commands ------------------------------------------------------------------------------------

REPORT = {
    "inception_score": "higher is better",
    "fid": "0 and up, lower is better",
    "kid": "about 0 for real images, lower is better",
    "precision": "0 to 1, look real, higher is better",
    "recall": "0 to 1, data drawn, higher is better",
    "density": "about 1 for real images, higher is better",
    "coverage": "0 to 1, data met, higher is better",
    "classes_covered": "by a tenth of an even share or more",
    "class_divergence": "nats from the data's shares, 0 is best",
    "memorisation": "1: new as test images, to 0: copies",
}


def train_command(settings, options):
    """Train, from scratch or from the newest state."""
    train(settings=settings, resume=options.resume)


def generate_command(settings, options):
    """Draw a grid, arrays, a walk or a folder of pictures."""
    output = unused(options.output or settings.samples_dir / "generated.png")
    kind = output.suffix
    if kind not in ("", ".png", ".npz", ".gif"):
        raise UsageError(f"--output must be a .png, .npz, .gif or a folder, not {kind}")
    make_writable(output.parent)
    path = options.checkpoint or default_generator(settings)
    seed, digits = settings.seed, options.digits
    print(f"Drawing with {path}, --seed {seed}")
    generator, count = load_generator(path), options.count or (10 if digits else 100)
    classes = classes_to_draw(generator, count, digits)
    columns = len(classes) // count if digits else min(count, 10)
    latent = latent_points(generator, len(classes), seed)
    if kind == ".gif":  # a row of walks, frame after frame
        walk = latent_walk(generator, columns, seed)
        latent, classes = np.concatenate(walk), np.tile(classes[:columns], len(walk))
    images = draw(generator, latent, classes)
    labels = {"labels": classes} if count_classes(generator) else {}
    match kind:
        case ".png":
            save_grid(output, images, columns, f"{path.name}    seed {seed}")
        case ".npz":
            save_arrays(output, images=images, **labels)
        case ".gif":
            frames = np.split(images, len(walk))
            save_animation(output, [as_picture(mosaic(frame, columns)) for frame in frames], 20)
        case _:
            save_pictures(output, images)
    print(f"Written: {output}")


def evaluate_command(settings, options):
    """Print every metric of a generator, or of the images in a file or a folder."""
    make_writable(settings.samples_dir)
    with redirect_stdout(sys.stderr):  # --json prints nothing else
        dataset = load_dataset(settings)
        path = options.images or options.checkpoint or default_generator(settings)
        if options.images:
            images = as_images(load_path(path, settings).images, path, settings)
            images = np.random.default_rng(0).permutation(images)[: options.count]
        else:
            generator, count = load_generator(path), options.count or settings.evaluation_images
            if count_classes(generator) not in (0, len(dataset.class_names)):
                raise UsageError(f"{path} knows other classes than {dataset.name}: see --dataset")
            images = draw_like(generator, dataset, count, settings.seed + 1)
        print(f"Measuring {path}")
        metrics = evaluate_images(images, settings, dataset)
    images, neighbours = images[:20], dataset.images[metrics.pop("nearest")]
    pairs = np.concatenate([images, neighbours, np.full_like(images[:, :, :8], 255)], axis=2)
    page = unused(settings.samples_dir / "neighbours.png")
    save_grid(page, pairs, 5, "Left: measured. Right: the training image with the nearest features")
    metrics |= {"measured": str(path), "class_names": dataset.class_names, "page": str(page)}
    if options.json:
        print(json.dumps(metrics))
    else:
        print_report(metrics)


def print_report(metrics):
    """Print evaluate's table; what cannot be had is left out."""
    print(
        f"{metrics['images']:,} images of {metrics['measured']}\n"
        f"against {metrics['dataset']}, measured by {metrics['inception']}\n"
    )
    for name, words in REPORT.items():
        if name in metrics:
            print(f"{name:18} {metrics[name]:8.4g}  {words}")
    for number, distance in enumerate(metrics.get("fid_per_class", [])):
        name, share = metrics["class_names"][number], metrics["class_shares"][number]
        distance = math.nan if distance is None else distance
        print(f"class {name:<12} {distance:8.4g}  FID, share {share:.3f}")
    print(f"\nBeside the nearest training images: {metrics['page']}")


def inception_command(settings, options):
    """Train the network that measures MNIST; write it and what it sees in MNIST to weights/."""
    images, labels, test_images, test_labels = load_mnist()
    images, test_images = images[..., np.newaxis], test_images[..., np.newaxis]
    train_inception(SHIPPED_INCEPTION, (images, labels), (test_images, test_labels), epochs=14)
    ruler = load_ruler(Settings(inception="mnist"), Dataset(images))
    mean, covariance = real_statistics(ruler, Dataset(images))
    save_arrays(WEIGHTS / f"{ruler.name}.npz", mean=mean, covariance=covariance)
    print(f"Written: {SHIPPED_INCEPTION} and {ruler.name}.npz")


RUN = {
    "train": train_command,
    "generate": generate_command,
    "evaluate": evaluate_command,
    "inception": inception_command,
}


def main(words):
    """Run the command line; return the exit status."""
    try:
        command, settings, options = parse_command_line(words)
        if not gpus():  # where not all operations can be that
            tf.config.experimental.enable_op_determinism()
        RUN[command](settings, options)
    except UsageError as error:
        return refuse(error, 2)
    except KeyboardInterrupt:
        flags = [word for word in words if word != "--resume"]
        print("To go on:\n  " + line_to_type(*flags, "--resume"))
        return 130
    except BrokenPipeError:  # as by `evaluate | head`
        os._exit(128 + signal.SIGPIPE)
    except (RunError, OSError, MemoryError, tf.errors.OpError) as error:
        return refuse(error, 1)
    return 0


if __name__ == "__main__":
    status = main(WORDS)
    if status:  # sys.exit(0) is noise in a notebook
        sys.exit(status)
