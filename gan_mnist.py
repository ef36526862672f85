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
LATENT_DIM = 64  # numbers that an image is made from
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
import contextlib
import csv
import dataclasses
import difflib
import faulthandler
import functools
import hashlib
import io
import json
import linecache
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

with contextlib.suppress(ImportError):  # Windows has no such locks
    import fcntl

PROGRAM = Path(globals().get("__file__", "gan_mnist.py"))  # a notebook's cell has no file
ANY_PATH = "the path of an .npz, an .npy, a folder of pictures"  # no " or " in it


def whole_numbers(text):
    return tuple(map(int, text.split(",")))


def true_or_false(text):
    return {"true": True, "false": False}[text.lower()]


NUMBERS = {int: "a whole number", float: "a number", whole_numbers: "whole numbers like 256,512,"}
LIMITS = {  # reader, then the lowest and the highest value or the words to choose from: settings
    (int, 1, 1_000_000): "epochs evaluate_every sample_every checkpoint_every",
    (int, 1, 4096): "penalty_every conv_channels",
    (int, 2, 65_536): "batch_size latent_dim",
    (int, 100, 1_000_000): "evaluation_images",
    (int, 0, 2**31 - 1): "seed",
    (int, 0, 1024): "image_size",
    (int, 0, 8): "shift",
    (whole_numbers, 1, 65_536): "generator_widths discriminator_widths",
    (float, 0, 1_000_000): "max_minutes r1 r2 gradient_penalty",
    (float, 0, 1): "generator_learning_rate discriminator_learning_rate decay_from",
    (float, 0, 0.999999): "beta_1 beta_2 ema_decay",
    (true_or_false, "true or false"): "conditional minibatch_std",
    (Path, "a folder"): "samples_dir checkpoints_dir",
    (str, f"mnist or fashion_mnist or cifar10 or {ANY_PATH}"): "dataset",
    (str, "auto or grey or colour"): "image_colour",
    (str, "dense or conv"): "architecture",
    (str, "auto or float32 or bfloat16"): "precision",
    (str, "auto or mnist or imagenet"): "inception",
    (
        str,
        "non_saturating or minimax or least_squares or hinge or wasserstein or relativistic",
    ): "loss",
}
ALLOWED = {name: allowed for allowed, names in LIMITS.items() for name in names.split()}
COMMANDS = {  # what it does, the settings that it takes
    "train": (__doc__, " ".join(ALLOWED)),
    "generate": ("draw with a trained generator", "samples_dir checkpoints_dir"),
    "evaluate": (
        "measure a generator or other images",
        "dataset image_size image_colour inception seed evaluation_images samples_dir"
        + " checkpoints_dir",
    ),
    "inception": ("train the network that measures MNIST, into weights/", ""),
}


class UsageError(Exception):
    """The user asked for something that cannot be: one line, exit status 2."""


class RunError(Exception):
    """A run that cannot go on: one line, exit status 1."""


def refuse(error, status):
    """Print why in one line and return the exit status."""
    line = " ".join(str(error).split())
    print(f"{PROGRAM.name}: {line[:400]}", file=sys.stderr)
    return status


def as_text(value):
    """Return a setting's value as a person types it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_flag(name):
    return "--" + name.replace("_", "-")


def in_words(allowed):
    """Return what an entry of LIMITS means, in words."""
    kind, *limits = allowed
    if kind in NUMBERS:
        return f"{NUMBERS[kind]} from {limits[0]:,} to {limits[1]:,}"
    return limits[0]


def read_value(allowed, label, given):
    """Return a value or its text as `allowed` says. Raises UsageError that names `label`."""
    kind, *limits = allowed
    text, words = as_text(given), in_words(allowed)
    choices = words.split(" or ")
    with contextlib.suppress(ValueError, KeyError):
        value = kind(text)
        if kind in NUMBERS:
            parts = value if kind is whole_numbers else [value]
            fits = all(limits[0] <= part <= limits[1] for part in parts)
        elif kind is str:
            fits = text in choices or (ANY_PATH in choices and os.path.exists(text))
        else:
            fits = text != ""
        if fits:
            return value
    if ANY_PATH in choices:
        choices += os.listdir()
    raise UsageError(f"{label} is {given!r}, but must be {words}{did_you_mean(text, choices)}")


def did_you_mean(text, words):
    """Return the nearest word as a question, or nothing."""
    near = difflib.get_close_matches(text, words, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def line_above(name):
    """Return the number and the comment of a constant's line, (0, "") where there is none."""
    for number, line in enumerate(linecache.getlines(str(PROGRAM)), 1):
        if re.match(rf"{name.upper()}\b", line):
            return number, line.partition("# ")[2].strip()
    return 0, ""


def constant(name):
    """Return the constant behind a setting, None where its line was removed."""
    return globals().get(name.upper())


def check_settings(settings):
    """Fill in the constants and give each setting its type.

    Raises UsageError, which names a constant and its line.
    """
    for name, allowed in ALLOWED.items():
        label, value = name, getattr(settings, name)
        if value is None:
            label, value = f"{name.upper()} in line {line_above(name)[0]}", constant(name)
        if value is None:
            raise UsageError(f"{name.upper()} is missing in {PROGRAM.name}: {in_words(allowed)}")
        object.__setattr__(settings, name, read_value(allowed, label, value))


Settings = dataclasses.make_dataclass(
    "Settings",
    [(name, object, None) for name in ALLOWED],
    frozen=True,
    namespace={"__post_init__": check_settings},
)
Settings.__doc__ = "The constants above in lower case, immutable. Raises UsageError for bad values."


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse prints its usage and exits."""

    def error(self, message):
        raise UsageError(message)


def make_parser():
    """Return the parser of all commands; what a person did not type is absent from its result."""
    parser = Parser(PROGRAM.name)
    commands, parts = parser.add_subparsers(dest="command"), []
    for command, (does, settings) in COMMANDS.items():
        part = commands.add_parser(
            command,
            description=does,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        for name in sorted(settings.split(), key=line_above):
            does = f"{line_above(name)[1]} [{as_text(constant(name))}]"
            add_value(part, as_flag(name), ALLOWED[name], does)
        parts.append(part)
    train, generate, evaluate, _ = parts
    train.add_argument("--resume", action="store_true", help="go on with the last run")
    for part in (generate, evaluate):
        part.add_argument("--checkpoint", help="a generator's .h5; else the last run's best")
        add_value(part, "--count", (int, 1, 1_000_000), "images, or rows of --digits")
    digits = "classes to draw, by number or name: 2026 or cats,dogs; else each in turn"
    generate.add_argument("--digits", "--classes", help=digits)
    add_value(generate, "--seed", ALLOWED["seed"], "draws the same again", dest="draw_seed")
    generate.add_argument("--output", help=".png grid, .npz, .gif walk, or a folder of PNGs")
    evaluate.add_argument("--images", help="an .npz, .npy or folder to measure instead")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_value(parser, flag, allowed, does, **options):
    """Add a flag whose value is read as `allowed` says."""
    read = functools.partial(read_value, allowed, flag)
    words = f"{does}; {in_words(allowed)}".replace("%", "%%")
    parser.add_argument(flag, type=read, metavar="VALUE", help=words, **options)


def parse_command_line(words):
    """Return the command, its Settings and the options that were typed. Raises UsageError."""
    if not words or words[0].startswith("-"):
        words = ["train", *words]
    found, unknown = make_parser().parse_known_args(words)
    options = vars(found)
    if unknown:
        flags = map(as_flag, COMMANDS[found.command][1].split())
        advice = " (a list is one word: 256,512)" if unknown[0].isdigit() else ""
        raise UsageError(f"{unknown[0]!r} is no flag{advice}{did_you_mean(unknown[0], flags)}")
    typed = {name: options.pop(name) for name in ALLOWED if name in options}
    return options.pop("command"), Settings(**typed), options


def line_to_type(*words):
    return shlex.join(["python", PROGRAM.name, *words])


# ---- Stopping ------------------------------------------------------------------------------------

SIGNALS = [x for x in signal.Signals if x.name in "SIGINT SIGTERM SIGHUP".split()]
PARTIAL = set()  # half-written files and folders


def end_at_once(kind, _):
    """End the process, leaving nothing half-written.

    Not by an exception, which would unwind TensorFlow amid a product, and abort or hang.
    """
    for path in list(PARTIAL):
        remove(path)
    os.write(1, b"\nInterrupted.\n")
    os._exit(128 + kind)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    # A closed stream gets something else to write to, under the number that it had.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    WORDS = sys.argv[1:] if "__file__" in globals() else []  # pasted into a notebook: train
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
os.environ["KERAS_BACKEND"] = "tensorflow"
# TensorFlow's libraries greet before they read any log level: what C++ writes to stderr meanwhile
# goes elsewhere. Exceptions and crashes still show themselves.
STDERR = os.dup(2)
with tempfile.TemporaryFile() as aside:
    os.dup2(aside.fileno(), 2)
    try:
        import keras
        import tensorflow as tf
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


@contextlib.contextmanager
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
        PARTIAL.discard(partial)


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
        str(folder).encode()  # TensorFlow wants UTF-8
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write into {str(folder)!r}: {error}") from None


@contextlib.contextmanager
def alone_in(folder):
    """Hold a folder for this process. Raises UsageError where another one holds it.

    The folder itself is locked: there is no lock file that could be deleted.
    """
    with contextlib.ExitStack() as held:
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


def read_about(path):
    """Return the dict that save_keras wrote about a model, {} where there is none."""
    with h5py.File(path) as file, contextlib.suppress(KeyError, TypeError, ValueError):
        return dict(json.loads(file.attrs["about"]))
    return {}


def load_keras(path):
    """Return the Keras model in an .h5. Raises UsageError unless it is made of harmless layers."""
    found = set()

    def note(part):  # each object in the model's configuration, the innermost first
        found.update(str(part.get(key)) for key in ("class_name", "module", "registered_name"))
        return part

    try:
        with h5py.File(path) as file:
            json.loads(file.attrs["model_config"], object_hook=note)
        if found - HARMLESS:
            raise ValueError(f"it holds {', '.join(sorted(found - HARMLESS))}")
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # HDF5 and Keras raise a dozen kinds
        raise UsageError(f"cannot load {path}: {error}") from None


def keras_home():
    """Return the folder where Keras keeps what it downloads."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))


def save_arrays(path, *arrays, **named):
    """Write an .npz of the arrays."""
    with replacing(path) as partial:
        np.savez_compressed(partial, *arrays, **named)


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
MNIST_ARRAYS = "x_train y_train x_test y_test".split()
STALL_SECONDS = 9  # that a download may take without a byte
LARGEST_DATASET = 4 * 2**30  # bytes, unpacked
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
    """Return MNIST's four arrays from the Keras cache or its server, None where neither has it."""
    path = keras_home() / "datasets" / "mnist.npz"
    try:
        if path.exists():
            return read_mnist(path)
    except UsageError as error:
        print(f"{error}; downloading it again.")
    try:
        with replacing(path) as partial:
            with downloading():
                keras.utils.get_file(
                    partial.name, MNIST_URL, cache_dir=path.parent, cache_subdir=""
                )
            return read_mnist(partial)
    except (OSError, RunError, UsageError) as error:
        print(error)
    return None


def read_mnist(path):
    """Return MNIST's four arrays. Raises UsageError for any other bytes."""
    arrays = read_arrays(path)
    found = [arrays[name] for name in MNIST_ARRAYS if name in arrays]
    if hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest() != MNIST_DIGEST:
        raise UsageError(f"{path} is not MNIST")
    return found


@contextlib.contextmanager
def downloading():
    """Give Keras' downloads a time limit, no progress bar in a log file, and one kind of error."""
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else io.StringIO()):
            yield
    except Exception as error:  # Keras raises bare ones
        raise RunError(f"cannot download into {keras_home()}: {error}") from None
    finally:
        socket.setdefaulttimeout(limit)


def load_from_keras(name):
    """Return a Dataset that Keras downloads once. Raises RunError."""
    print(f"{name}: from Keras, which downloads it once.")
    with downloading():  # CIFAR-10 has pickles, in an archive whose SHA-256 Keras checks
        (images, labels), (unseen, _) = getattr(keras.datasets, name).load_data()
    return Dataset(images, labels.ravel(), name, unseen)


def load_path(path, settings):
    """Return the Dataset in an .npz, an .npy or a folder of pictures. Raises UsageError."""
    if path.is_dir():
        return load_pictures(path, settings)
    arrays = read_arrays(path)
    images, labels, unseen = [
        next((arrays[name] for name in names.split() if name in arrays), None)
        for names in ("images x_train arr_0", "labels y_train", "test_images x_test")
    ]
    if images is None:
        raise UsageError(f"{path} has no array named images or x_train: {sorted(arrays)}")
    return Dataset(images, labels, path.name, unseen)


def load_pictures(folder, settings):
    """Return the Dataset in a folder of pictures or of folders, one a class. Raises UsageError."""
    found = [*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")]
    paths = sorted(path for path in found if path.suffix.lower() in PICTURES)
    if not paths:
        raise UsageError(f"{folder} has no picture: {' '.join(PICTURES)}")
    places = [str(path.parent.relative_to(folder)) for path in paths]
    class_names, labels = np.unique(places, return_inverse=True)
    if len(class_names) > 1 and "." in class_names:
        raise UsageError(f"{folder} has pictures beside folders: of which class are they?")
    with ThreadPool() as pool:
        images = list(pool.imap(functools.partial(read_picture, settings=settings), paths))
    if len({image.shape for image in images}) > 1:
        edge = min(1024, *(min(image.shape[:2]) for image in images))
        remedy = f"--image-size {edge} and --image-colour grey or colour make them alike"
        raise UsageError(f"the pictures in {folder} differ in size or colour: {remedy}")
    return Dataset(
        images=np.stack(images),
        labels=labels if len(class_names) > 1 else None,
        name=f"{folder.resolve().name}/",
        class_names=tuple(class_names.tolist()),
    )


def read_picture(path, settings):
    """Return a picture file as uint8 (H, W, C). Raises UsageError."""
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            return fit_picture(ImageOps.exif_transpose(picture), settings)
    except Exception as error:  # Pillow's readers raise half a dozen kinds
        raise UsageError(f"cannot read {path}: {error}") from None


def fit_picture(picture, settings):
    """Return a Pillow picture as uint8 (H, W, C) in the settings' size and colour."""
    if picture.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel")
    grey = settings.image_colour == "grey" or (
        settings.image_colour == "auto" and picture.mode in ("1", "L", "LA")
    )
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    picture = picture.convert("L" if grey else "RGB")
    if settings.image_size:
        picture = ImageOps.fit(picture, (settings.image_size, settings.image_size))
    return np.atleast_3d(picture)


def as_picture(image):
    """Return the Pillow picture of an image uint8 (H, W, 1 or 3)."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def as_dataset(data, settings):
    """Return a Dataset in the settings' size and colour, whose parts fit each other.

    `data`: a Dataset, images, (images, labels), or a tf.data.Dataset of either. Raises UsageError.
    """
    try:
        if isinstance(data, tf.data.Dataset):
            data = collect(data)
        if not isinstance(data, Dataset):
            images, labels = data if isinstance(data, tuple) else (data, None)
            data = Dataset(np.asarray(images), labels if labels is None else np.ravel(labels))
    except (TypeError, ValueError) as error:
        form = "images of one size, (images, labels) or a tf.data.Dataset of either"
        raise UsageError(f"the data must be {form}: {error}") from None
    given, labels, name, unseen, class_names = data
    name = name.encode("utf-8", "replace").decode()  # a folder's may be any bytes
    images = as_images(given, name, settings)
    if images.size != np.size(given):
        name = f"{name} {size_in_words(images)}"
    if unseen is not None:
        unseen = as_images(unseen, "test images", settings)
        if unseen.shape[1:] != images.shape[1:]:
            raise UsageError(f"{name} is {images.shape}, but its test images {unseen.shape}")
    if labels is not None:
        labels = as_labels(labels, len(images), name)
        numbers = tuple(map(str, np.unique(labels)))
        class_names = class_names if len(class_names) == len(numbers) else numbers
    return Dataset(images, labels, name, unseen, class_names)


def collect(data):
    """Return what a tf.data.Dataset gives, batched or not: images or (images, labels)."""
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UsageError("this tf.data.Dataset never ends: leave out repeat()")
    elements = [tf.nest.flatten(element) for element in data.as_numpy_iterator()]
    if not elements:
        raise UsageError("this tf.data.Dataset is empty")
    shape = elements[0][0].shape  # of an image or a batch
    batched = len(shape) == 4 or (len(shape) == 3 and shape[2] not in (1, 3))
    join = np.concatenate if batched else np.stack
    columns = tuple(join(column) for column in zip(*elements, strict=True))
    return columns if len(columns) > 1 else columns[0]


def as_images(images, name, settings):
    """Return uint8 (N, H, H, 1 or 3) of images (N, H, W) or (N, H, W, C). Raises UsageError.

    Floats may go from 0 to 1, from -1 to 1 or from 0 to 255.
    """
    images = np.asarray(images)
    for low, high in ((0, 1), (-1, 1), (0, 255)):
        if images.dtype.kind == "f" and np.all((low <= images) & (images <= high)):
            images = np.round((images - low) / (high - low) * 255).astype(np.uint8)
    if images.ndim == 3:
        images = images[..., np.newaxis]
    match images.shape:
        case [_, _, _, 1 | 3] if images.dtype == np.uint8 and images.size:
            if fit_picture(as_picture(images[0]), settings).shape != images.shape[1:]:
                images = [fit_picture(as_picture(image), settings) for image in images]
                images = np.stack(images)
            if 4 <= images.shape[1] == images.shape[2]:
                return images
    form = "uint8 (N, H, H) or (N, H, H, 1 or 3), H at least 4 (--image-size makes them so)"
    raise UsageError(f"{name} must be {form}, not {images.dtype} {images.shape}")


def as_labels(labels, count, name):
    """Return labels uint8 (count,), numbered without a gap. Raises UsageError."""
    labels = np.asarray(labels)
    found = set(labels.ravel().tolist())
    if labels.shape != (count,) or found != set(range(min(256, len(found)))):
        form = f"{count:,} whole numbers from 0 to 255 without a gap"
        given = f"{labels.dtype} {labels.shape}: {str(found)[:60]}"
        raise UsageError(f"{name}'s labels must be {form}, not {given}")
    return labels.astype(np.uint8)


def fingerprint(dataset):
    """Return a line that tells a data set from any other, whatever it is called."""
    images, labels, *_ = dataset
    digest = hashlib.sha256(np.ascontiguousarray(images))
    if labels is not None:
        digest.update(labels)
    return f"{len(images):,} images of {size_in_words(images)}, SHA-256 {digest.hexdigest()[:16]}"


def size_in_words(images):
    return "x".join(map(str, images.shape[1:]))


# ---- Networks ------------------------------------------------------------------------------------


def build_generator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras generator: latent (N, LATENT_DIM) to images (N, H, W, C) in [-1, 1].

    With `settings.conditional` it takes [latent, class], classes being integers (N,).
    """
    inputs = hidden = latent = keras.Input((settings.latent_dim,), name="latent")
    if settings.conditional:
        label, one_hot = class_input(classes)
        inputs, hidden = [latent, label], keras.layers.Concatenate()([latent, one_hot])
    hidden = GENERATORS[settings.architecture](hidden, settings, image_shape, dtype)
    images = keras.layers.Activation("tanh", dtype="float32", name="image")(hidden)
    return keras.Model(inputs, images, name="generator")


def build_discriminator(settings, image_shape=(28, 28, 1), classes=10, dtype="float32"):
    """Return the Keras discriminator: images (N, H, W, C) in [-1, 1] to logits (N, 1).

    With `settings.conditional` it takes [image, class] and adds the features' projection on the
    class's own direction (arXiv 1802.05637): FID 2.5, where concatenating the class gave 4.2.
    """
    inputs = image = keras.Input(image_shape, name="image")
    features = DISCRIMINATORS[settings.architecture](image, settings, dtype)
    if settings.minibatch_std:
        features = with_minibatch_std(features)
    logits = keras.layers.Dense(1, dtype="float32")(features)
    if settings.conditional:
        label, one_hot = class_input(classes)
        inputs, width = [image, label], features.shape[1]
        direction = keras.layers.Dense(width, use_bias=False, kernel_initializer="random_normal")
        projection = keras.ops.sum(features * direction(one_hot), axis=1, keepdims=True)
        logits += projection / math.sqrt(width)
    return keras.Model(inputs, logits, name="discriminator")


def class_input(classes):
    label = keras.Input((), dtype="int32", name="label")
    return label, keras.layers.CategoryEncoding(classes, output_mode="one_hot")(label)


def with_minibatch_std(features):
    """Return features (N, F + 1): the last one says how much the batch differs, arXiv 1710.10196.

    Halves the FID without classes and lowers it by a third with them.
    """
    variance = keras.ops.var(features, axis=0)
    if replicas() > 1:
        variance = keras.ops.moments(features, 0, synchronized=True)[1]
    # 1e-8: the root of equal images' variance, 0, has no finite slope.
    spread = keras.ops.mean(keras.ops.sqrt(variance + 1e-8))
    column = spread + keras.ops.zeros_like(features[:, :1])
    return keras.ops.concatenate([features, column], axis=1)


def replicas():
    """Return how many devices share each batch, with a replica of both networks on each."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def dense_generator(hidden, settings, image_shape, dtype):
    for width in settings.generator_widths:
        hidden = keras.layers.Dense(width, use_bias=False, dtype=dtype)(hidden)
        hidden = normalised(hidden)
    hidden = keras.layers.Dense(math.prod(image_shape), dtype=dtype)(hidden)
    return keras.layers.Reshape(image_shape)(hidden)


def normalised(hidden):
    # A short memory: the statistics must be right after a hundred steps already.
    hidden = keras.layers.BatchNormalization(momentum=0.9, synchronized=replicas() > 1)(hidden)
    return keras.layers.LeakyReLU(0.2)(hidden)


def dense_discriminator(hidden, settings, dtype):
    hidden = keras.layers.Flatten()(hidden)
    for width in settings.discriminator_widths:
        hidden = keras.layers.Dense(width, dtype=dtype)(hidden)
        hidden = keras.layers.LeakyReLU(0.2)(hidden)
    return hidden


def conv_generator(hidden, settings, image_shape, dtype):
    edge, *coarser, coarsest = halvings(image_shape, settings)
    hidden = dense_generator(hidden, settings, (edge, edge, coarsest), dtype)
    for channels in [*reversed(coarser), image_shape[2]]:
        hidden = normalised(hidden)
        double = keras.layers.Conv2DTranspose(channels, 4, 2, padding="same", dtype=dtype)
        hidden = double(hidden)
    surplus = hidden.shape[1] - image_shape[0]
    return keras.layers.Cropping2D(((0, surplus), (0, surplus)))(hidden)


def conv_discriminator(hidden, settings, dtype):
    for channels in halvings(hidden.shape[1:], settings)[1:]:
        hidden = keras.layers.Conv2D(channels, 4, 2, padding="same", dtype=dtype)(hidden)
        hidden = keras.layers.LeakyReLU(0.2)(hidden)
    return dense_discriminator(hidden, settings, dtype)


def halvings(image_shape, settings):
    """Return the edge of the coarsest image, 4 to 7 pixels, and the channels at each halving."""
    count = max(1, math.ceil(math.log2(image_shape[0] / 7)))
    edge = math.ceil(image_shape[0] / 2**count)
    return [edge, *(settings.conv_channels * 2**halving for halving in range(count))]


# "conv" has the dense layers too, at the end that is far from the image.
GENERATORS = {"dense": dense_generator, "conv": conv_generator}
DISCRIMINATORS = {"dense": dense_discriminator, "conv": conv_discriminator}


def choose_precision(settings):
    """Return the Keras dtype policy that `settings.precision` means on this machine.

    "auto" is bfloat16 only where the hardware multiplies it: processors with AMX, GPUs of compute
    capability 8 or more. Elsewhere it is emulated, at a third of the speed of float32.
    """
    lower, cpu = settings.precision == "bfloat16", Path("/proc/cpuinfo")
    if settings.precision == "auto":
        if gpus := tf.config.list_physical_devices("GPU"):
            details = tf.config.experimental.get_device_details(gpus[0])
            lower = details.get("compute_capability", (0, 0)) >= (8, 0)
        elif cpu.exists():
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


def new_state(settings, dataset, strategy=None):
    """Return a tf.train.Checkpoint of all that training changes and --resume restores.

    What learns is on every device of the strategy; the rest is one, and each worker's own.
    """
    keras.utils.set_random_seed(settings.seed)
    shape, classes = dataset.images.shape[1:], len(dataset.class_names)
    precision = choose_precision(settings)
    state = tf.train.Checkpoint(
        random=tf.random.Generator.from_seed(settings.seed),
        step=tf.Variable(0, dtype=tf.int64),
        losses=tf.Variable([0.0, 0.0]),  # sums over the epoch: the discriminator's, the generator's
        facts=tf.Variable("{}"),  # about the run, as JSON
    )
    with (strategy or tf.distribute.get_strategy()).scope():
        state.generator = build_generator(settings, shape, classes, precision)
        state.discriminator = build_discriminator(settings, shape, classes, precision)
        state.generator_optimizer = new_adam(settings, state.generator)
        state.discriminator_optimizer = new_adam(settings, state.discriminator)
    state.average = build_generator(settings, shape, classes)
    state.average.set_weights(state.generator.get_weights())
    return state


def new_adam(settings, model):
    # Adam adds the replicas' gradients, each of a mean: the sum is divided by their number.
    adam = keras.optimizers.Adam(
        0.0, settings.beta_1, settings.beta_2, loss_scale_factor=replicas()
    )
    adam.build(model.trainable_variables)
    has_xla = tf.test.is_built_with_xla() and not tf.config.list_physical_devices("GPU")
    if has_xla and replicas() == 1:  # one pass over the weights: a tenth to a quarter less time
        adam.apply = tf.function(adam.apply, jit_compile=True, autograph=False)
    return adam


def compile_training(state, dataset, settings):
    """Return train(order, first, last, pace), which takes the steps first to last of an epoch.

    `order` (N,) is the epoch's permutation of the images; `pace` scales both learning rates.
    """
    strategy, size = state.generator.distribute_strategy, settings.batch_size
    images = tf.constant(dataset.images)  # all of them on the device, a byte a pixel
    labels = tf.constant(
        dataset.labels if settings.conditional else np.zeros(len(images)), tf.int32
    )

    def replica_step(images, labels, penalise):
        real = tf.cast(share_of(images), tf.float32) / 127.5 - 1
        return train_step(state, settings, real, share_of(labels), penalise)

    def step(position, order):
        chosen = tf.slice(order, [position * size], [size])
        batch = tf.gather(images, chosen), tf.gather(labels, chosen)
        losses = tf.cond(
            position % settings.penalty_every == 0,
            lambda: strategy.run(replica_step, [*batch, True]),
            lambda: strategy.run(replica_step, [*batch, False]),
        )
        state.losses.assign_add(strategy.reduce("MEAN", losses, axis=None))
        state.step.assign_add(1)
        return position + 1, order

    @tf.function(autograph=False)
    def train(order, first, last, pace):
        rate = pace * settings.generator_learning_rate
        state.generator_optimizer.learning_rate.assign(rate)
        rate = pace * settings.discriminator_learning_rate
        state.discriminator_optimizer.learning_rate.assign(rate)
        tf.while_loop(lambda position, _: position < last, step, [first, order])
        update_average(state, last - first, settings.ema_decay)

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
    squares = tf.reduce_sum(slope**2, axis=(1, 2, 3))
    return tf.reduce_mean((tf.sqrt(squares + 1e-12) - norm) ** 2 if norm else squares)


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
    """Return latent points float32 (frames, walks, LATENT_DIM) of smooth round trips.

    Spherical interpolation (arXiv 1609.04468) all along the circle through two random points:
    each point on it is as likely as any that is drawn at random.
    """
    first, second = np.split(latent_points(generator, 2 * walks, seed), 2)
    angles = np.linspace(0, 2 * np.pi, frames, endpoint=False, dtype=np.float32)
    return np.stack([np.cos(angle) * first + np.sin(angle) * second for angle in angles])


def draw(generator, latent, classes):
    """Return uint8 images (N, H, W, C) of latent points (N, LATENT_DIM) and classes (N,)."""
    inputs = with_classes(generator, latent, classes)
    images = generator.predict(inputs, batch_size=250, verbose=0)
    return np.round((images + 1) * 127.5).astype(np.uint8)


def count_classes(generator):
    """Return how many classes the generator is told of, 0 for an unconditional one."""
    for layer in generator.layers:
        if isinstance(layer, keras.layers.CategoryEncoding):
            return layer.num_tokens
    return 0


def classes_to_draw(generator, count, digits=None):
    """Return classes int32 (N,): `count`, each in turn, or `count` rows of `digits`.

    `digits`: numbers, or text like "2026" or, with commas, "10,11", "10," or "cats,dogs". Raises
    UsageError for what the generator does not know.
    """
    classes = count_classes(generator)
    if digits is None:
        return np.arange(count, dtype=np.int32) % max(1, classes)
    names = getattr(generator, "class_names", ())
    known = {str(number): number for number in range(classes)}
    known |= {name: number for number, name in enumerate(names[:classes])}
    text = digits if isinstance(digits, str) else ",".join(map(str, np.atleast_1d(digits)))
    one_by_one = "," not in text and text not in known  # "2026": each of its characters a class
    words = list(text) if one_by_one else text.strip(",").split(",")
    if not words or not known.keys() >= set(words):
        which = ", ".join(list(known)[:40]) or "no classes"
        raise UsageError(f"this generator cannot draw {text!r}: it knows {which}")
    return np.tile(np.array([known[word] for word in words], np.int32), count)


def generate(generator, count, digits=None, seed=None):
    """Return uint8 images (N, H, W, C): `count`, its classes in turn, or `count` rows of `digits`.

    Without a seed each call draws others. Raises UsageError for what cannot be drawn.
    """
    count = read_value((int, 1, 1_000_000), "count", count)
    classes = classes_to_draw(generator, count, digits)
    seed = random_seed() if seed is None else seed
    return draw(generator, latent_points(generator, len(classes), seed), classes)


def random_seed():
    return int.from_bytes(os.urandom(3), "big")


def draw_like(generator, dataset, count, seed):
    """Return images (count, H, W, C) with the data's own share of each class, and their classes.

    Perfect digits, as many of each, are some way from MNIST, where a class has 9.0 to 11.2 %.
    """
    labels = np.sort(dataset.labels if count_classes(generator) else [0])
    classes = labels[np.arange(count) * len(labels) // count]
    classes = np.random.default_rng(0).permutation(classes)
    return draw(generator, latent_points(generator, count, seed), classes), classes


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
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


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


def save_pictures(folder, images, labels=None):
    """Write a folder of one PNG for each of the images (N, H, W, C), named by number and class."""
    with replacing(folder) as partial:
        partial.mkdir()
        for number, image in enumerate(images):
            name = f"{number:06d}" + ("" if labels is None else f"_class_{labels[number]}")
            as_picture(image).save(partial / f"{name}.png")


def save_animation(path, pictures, frames_per_second):
    """Write a GIF of equally large Pillow pictures."""
    first, *others = pictures
    timing = {"duration": 1000 // frames_per_second, "loop": 0}  # milliseconds; without end
    with replacing(path) as partial:
        first.save(partial, save_all=True, append_images=others, **timing)


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
    for axes, heading in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name in panels[heading].split():
            rows = [row for row in history if row.get(name) is not None]
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker=".")
        axes.set(title=heading, xlabel="epoch")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    losses, _, distance, shares = figure.axes
    losses.legend(["discriminator", "generator"])
    distance.set_yscale("log", subs=[2, 5])
    distance.yaxis.set_major_formatter("{x:g}")
    distance.yaxis.set_minor_formatter("{x:g}")
    if len(shares.lines) == len(class_names) <= 20:  # more names would hide the curves
        shares.legend(list(map(printable, class_names)), ncols=2, fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial)


def save_neighbours(path, images, neighbours):
    """Write a PNG of images (N, H, W, C), each to the left of its nearest training image."""
    gap = np.full_like(images[:, :, :8], 255)
    pairs = np.concatenate([images, neighbours, gap], axis=2)
    save_grid(path, pairs, 5, "Left: measured. Right: the training image with the nearest features")


# ---- Generators and data sets by name ------------------------------------------------------------

SHIPPED_GENERATOR = WEIGHTS / "mnist_generator.h5"


def load_generator(path=None):
    """Return the Keras generator in `path`; by default the best of the last run, else the shipped.

    Raises UsageError for a file that is missing, damaged, not harmless or not a generator.
    """
    path = path or default_generator(Settings())
    model = load_keras(path)
    inputs, outputs = [x.shape for x in model.inputs], [x.shape for x in model.outputs]
    numeric = {x.dtype for x in model.inputs} <= {"float32", "int32", "int64"}
    match inputs, outputs:
        case [[_, _]] | [[_, _], [_]], [[_, height, width, 1 | 3]] if numeric and height == width:
            names = read_about(path).get("class_names")
            model.class_names = tuple(map(str, names)) if isinstance(names, list) else ()
            return model
    raise UsageError(f"{path} is not a generator: latent (and class) in, square images out")


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
    if settings.dataset == "mnist":
        arrays = load_mnist()
        data = load_stand_in() if arrays is None else Dataset(*arrays[:2], "mnist", arrays[2])
    elif settings.dataset in ("fashion_mnist", "cifar10"):
        data = load_from_keras(settings.dataset)
    else:
        data = load_path(Path(settings.dataset), settings)
    return as_dataset(data, settings)


def load_stand_in():
    """Return 60,000 digits drawn by the shipped generator. Raises RunError where it is missing."""
    if not SHIPPED_GENERATOR.exists():
        raise RunError(f"there is no MNIST: put {MNIST_URL} into {keras_home() / 'datasets'}")
    print("MNIST is neither in the Keras cache nor to be downloaded. Going on with a stand-in:")
    print("60,000 digits drawn by the shipped generator. THIS IS NOT MNIST.\n")
    generator, labels = load_generator(SHIPPED_GENERATOR), np.arange(60_000) % 10
    return Dataset(draw(generator, latent_points(generator, 60_000, 0), labels), labels, "stand-in")


# ---- Metrics: functions of arrays ----------------------------------------------------------------


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
    given = mean_1, covariance_1, mean_2, covariance_2
    mean_1, covariance_1, mean_2, covariance_2 = [np.asarray_chkfinite(x, float) for x in given]
    cross = np.linalg.norm(symmetric_root(covariance_1) @ symmetric_root(covariance_2), "nuc")
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(covariance_1 + covariance_2) - 2 * cross
    return max(0.0, float(distance))


def symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def inception_score(probabilities, splits=10):
    """Return mean and standard deviation of exp E KL(p(y|x) || p(y)) over `splits` parts.

    From class probabilities (N, K): 1 to K, higher is better (arXiv 1606.03498). Raises ValueError
    where one is not finite.
    """
    probabilities, scores = np.asarray_chkfinite(probabilities, float), []
    splits = min(splits, len(probabilities))
    cuts = np.arange(1, splits) * len(probabilities) // splits  # where the paper's code cuts
    for part in np.split(probabilities, cuts):
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
        one = random.choice(features_1, size, replace=False).astype(float)
        two = random.choice(features_2, size, replace=False).astype(float)
        within = cubic_kernel(one, one) + cubic_kernel(two, two)
        pairs = (within.sum() - within.trace()) / (size * (size - 1))
        distances.append(pairs - 2 * cubic_kernel(one, two).mean())
    return float(np.mean(distances)), float(np.std(distances))


def cubic_kernel(one, two):
    kernel = one @ two.T / one.shape[1] + 1
    return kernel * kernel * kernel  # ** 3 takes five times as long


def precision_recall(real_features, generated_features, neighbours=3):
    """Return improved precision and recall, each 0 to 1, higher is better (arXiv 1904.06991).

    The share of generated features (N, F) within any ball around a real one that reaches its k-th
    neighbour, and the reverse; k is lowered where there are too few.
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
    k = min(k, len(centres) - 1)
    radii = [np.partition(rows, k)[:, k] for rows in squared_distances(centres, centres)]
    radii = np.concatenate(radii)
    return np.concatenate([rows <= radii for rows in squared_distances(points, centres)])


def squared_distances(points, others):
    """Yield the squared distances of points (N, F) from others (M, F), 500 at a time."""
    middle = others.mean(axis=0)  # far from which float32 would lose digits
    points, others = points - middle, others - middle
    squares = (others**2).sum(axis=1)
    for part in np.array_split(points, math.ceil(len(points) / 500)):
        rows = (part**2).sum(axis=1, keepdims=True) + squares - 2 * part @ others.T
        yield np.maximum(rows, 0)


def nearest(points, others):
    """Return which of `others` (M, F) is nearest to each of the points (N, F), and how far off."""
    indices = np.concatenate([rows.argmin(axis=1) for rows in squared_distances(points, others)])
    return indices, np.linalg.norm(points - others[indices], axis=1)


def class_divergence(shares, real_classes):
    """Return the Kullback-Leibler divergence of class shares (K,) from real classes (N,), in nats.

    0 is best.
    """
    real = 1 + np.bincount(real_classes, minlength=len(shares))  # 1 keeps it finite
    return float(scipy.stats.entropy(shares, real))


def frechet_distance_per_class(features, classes, real_features, real_classes):
    """Return the Fréchet distance within each class, None where a side has fewer than 2 images."""
    distances = [None] * (1 + max(classes.max(), real_classes.max()))
    for number in range(len(distances)):
        drawn, real = features[classes == number], real_features[real_classes == number]
        if min(len(drawn), len(real)) > 1:
            statistics = *feature_statistics(drawn), *feature_statistics(real)
            distances[number] = frechet_distance(*statistics)
    return distances


# ---- The Inception models: the rulers ------------------------------------------------------------

SHIPPED_INCEPTION = WEIGHTS / "mnist_inception_1.h5"
# The first digits of its weights' SHA-256. Others get another name: FID is another number then.
INCEPTION_DIGEST = "b1666d9c"
NEIGHBOUR_IMAGES = 10_000  # at most, whose neighbours are looked at: time grows with the square
TRUSTED_ACCURACY = 0.9  # of a network on unseen images; below it the numbers are marked


def build_inception(image_shape=(28, 28, 1), classes=10):
    """Return an untrained Inception network (arXiv 1409.4842) for small images.

    Images (N, H, W, C) in [-1, 1] to [pooled features (N, 160), class probabilities (N, K)].
    """
    image = keras.Input(image_shape)
    # Large images are averaged down to 28 to 55 pixels a side, then strides take them to about 14.
    hidden = keras.layers.AveragePooling2D(max(1, image_shape[0] // 28))(image)
    stride = max(1, hidden.shape[1] // 14)
    hidden = convolution(hidden, 32, 2 * stride + 1, strides=stride)
    hidden = inception_block(hidden, 16, 16, 24, 8, 12, 12)
    hidden = keras.layers.MaxPooling2D(2, padding="same")(hidden)
    hidden = inception_block(hidden, 32, 32, 48, 16, 24, 24)
    hidden = inception_block(hidden, 32, 32, 64, 16, 32, 32)
    features = keras.layers.GlobalAveragePooling2D(name="features")(hidden)
    dense = keras.layers.Dense(classes, activation="softmax", name="probabilities")
    return keras.Model(image, [features, dense(features)], name="inception")


def convolution(hidden, filters, size, strides=1):
    hidden = keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(hidden)
    return keras.layers.ReLU()(keras.layers.BatchNormalization()(hidden))


def inception_block(hidden, one, before_3, three, before_5, five, pooled):
    branches = [
        convolution(hidden, one, 1),
        convolution(convolution(hidden, before_3, 1), three, 3),
        convolution(convolution(hidden, before_5, 1), five, 5),
        convolution(keras.layers.MaxPooling2D(3, 1, padding="same")(hidden), pooled, 1),
    ]
    return keras.layers.Concatenate()(branches)


def train_inception(training, test, epochs=14):
    """Return an Inception network trained on `training`, and its accuracy on `test`.

    Both are uint8 images (N, H, W, C) and labels (N,).
    """
    keras.utils.set_random_seed(0)
    classes = 1 + int(max(training[1].max(), test[1].max()))
    inception = build_inception(training[0].shape[1:], classes)
    edge = {"fill_mode": "constant", "fill_value": -1.0}
    layers = [
        keras.layers.Rescaling(1 / 127.5, offset=-1),
        keras.layers.RandomRotation(0.03, **edge),
        keras.layers.RandomTranslation(0.08, 0.08, **edge),
        keras.layers.RandomZoom((-0.12, 0.12), (-0.12, 0.12), **edge),
        keras.Model(inception.input, inception.output[1]),
    ]
    classifier = keras.Sequential([keras.Input(inception.input_shape[1:]), *layers])
    steps = epochs * math.ceil(len(training[0]) / 128)
    warmup = {"warmup_target": 4e-3, "warmup_steps": steps // 14}
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps - steps // 14, **warmup)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.02)
    classifier.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    verbose = 1 if sys.stdout.isatty() else 2  # a bar or a line
    classifier.fit(*training, batch_size=128, epochs=epochs, verbose=verbose)
    accuracy = classifier.evaluate(*test, verbose=0)[1]
    print(f"It reads {accuracy:.2%} right of {len(test[0]):,} images that it never saw.")
    return inception, accuracy


class Ruler(NamedTuple):
    """A network that measures images, and what it sees in the data."""

    name: str
    network: keras.Model  # images (N, H, W, C), 0 to 255, to features (N, F), probabilities (N, K)
    reads_classes: bool  # whether its classes are the data's
    accuracy: float  # on images that it did not learn from
    mean: np.ndarray = None  # float64 (F,), of the features of the data's images
    covariance: np.ndarray = None  # float64 (F, F)


def load_ruler(settings, dataset):
    """Return the Ruler that `settings.inception` means for `dataset`.

    "mnist" reads digits, "imagenet" is Keras' network; "auto" is the first for MNIST and for data
    without classes, else one that is trained on the data at first use and kept in the Keras home.
    """
    kind, accuracy = settings.inception, 1.0
    reads = kind != "imagenet" and dataset.name in ("mnist", "stand-in")
    if kind == "imagenet":
        with downloading():
            whole = keras.applications.InceptionV3()
        network = keras.Model(whole.input, [whole.get_layer("avg_pool").output, whole.output])
    elif kind == "auto" and not reads and len(dataset.class_names) > 1:
        (network, accuracy), reads = kept_inception(dataset), True
    elif SHIPPED_INCEPTION.exists():
        network = load_keras(SHIPPED_INCEPTION)
    else:
        print(f"{SHIPPED_INCEPTION} is missing: another network takes its place.")
        network, accuracy = kept_inception(load_dataset(Settings(dataset="mnist")))
    weights = b"".join(weight.tobytes() for weight in network.get_weights())
    digest = hashlib.sha256(weights).hexdigest()[:8]
    name = SHIPPED_INCEPTION.stem if digest == INCEPTION_DIGEST else f"inception_{digest}"
    name = "imagenet_keras_inception_v3" if kind == "imagenet" else name
    ruler = Ruler(name, taking(network, dataset.images.shape[1:]), reads, accuracy)
    if (name, dataset.name) == (SHIPPED_INCEPTION.stem, "mnist"):
        return ruler._replace(**read_arrays(SHIPPED_INCEPTION.with_suffix(".npz")))
    mean, covariance = feature_statistics(measure(ruler, dataset.images)[0])
    return ruler._replace(mean=mean, covariance=covariance)


def kept_inception(dataset):
    """Return a network that reads the data and its accuracy on a tenth; train it at first use."""
    images, labels = dataset.images, dataset.labels
    plan = [weight.shape for weight in build_inception(images.shape[1:]).weights]
    key = hashlib.sha256(f"{fingerprint(dataset)} {plan}".encode()).hexdigest()[:12]
    path = keras_home() / "gan_mnist" / f"inception_{key}.h5"
    if path.exists():
        print(f"Measured by {path}; delete it to train another.")
        return load_keras(path), read_about(path)["accuracy"]
    print(f"Training a network to measure {dataset.name} with, once: two to three minutes.")
    print(f"It is kept in {path}")
    training = np.random.default_rng(0).permutation(len(images)) % 10 > 0
    parts = [(images[part], labels[part]) for part in (training, ~training)]
    epochs = max(1, min(20, 240_000 // len(images)))
    network, accuracy = train_inception(*parts, epochs)
    try:
        save_keras(network, path, {"accuracy": accuracy})
    except OSError as error:
        print(f"{path} cannot be kept: {error}")
    return network, accuracy


def taking(network, image_shape):
    """Return the network as one that takes images (N, H, W, C) of another shape, 0 to 255."""
    height, width, channels = network.input_shape[1:]
    image = keras.Input(image_shape)
    hidden = image / 127.5 - 1
    if channels != image_shape[2]:
        hidden = keras.ops.repeat(keras.ops.mean(hidden, -1, keepdims=True), channels, -1)
    if (height, width) != image_shape[:2]:
        hidden = keras.ops.image.resize(hidden, (height, width), antialias=True)
    taker = keras.Model(image, network(hidden))
    # Eight batches in one call, two at a time: a quarter less time.
    taker.compile(steps_per_execution=8, jit_compile=False)
    return taker


def measure(ruler, images):
    """Return features float32 (N, F) and probabilities (N, K) of uint8 images (N, H, W, C)."""
    return ruler.network.predict(images, batch_size=250, verbose=0)


def quick_metrics(ruler, features, probabilities):
    """Return what every epoch reports, by name, of features (N, F) and probabilities (N, K)."""
    score, deviation = inception_score(probabilities)
    metrics = {
        "inception_score": score,
        "inception_score_std": deviation,
        "fid": frechet_distance(*feature_statistics(features), ruler.mean, ruler.covariance),
        "classes_covered": None,
        "class_shares": None,
    }
    if ruler.reads_classes:
        classes = probabilities.shape[1]
        shares = np.bincount(probabilities.argmax(axis=1), minlength=classes) / len(probabilities)
        # Covered: a tenth of an even share or more, so that a stray image doesn't count.
        metrics["classes_covered"] = int((shares >= 0.1 / classes).sum())
        metrics["class_shares"] = shares.tolist()
    return metrics


def evaluate_images(images, settings, classes=None, dataset=None):
    """Return every metric by name for uint8 images (N, H, W, C), against `settings.dataset`.

    `classes` (N,): those that were asked for, else those that are read. "nearest": the training
    images with the nearest features to the first 20. What cannot be had is left out. Raises
    UsageError for fewer than 2 images, or of another shape than the data's.
    """
    images, dataset = as_images(images, "images", settings), dataset or load_dataset(settings)
    training, random = dataset.images, np.random.default_rng(0)
    if min(len(images), len(training)) < 2 or images.shape[1:] != training.shape[1:]:
        wanted = f"2 or more of {training.shape[1:]}, as in {dataset.name}"
        raise UsageError(f"the images to measure must be {wanted}, not {images.shape}")
    ruler = load_ruler(settings, dataset)
    real, real_probabilities = measure(ruler, training)
    features, probabilities = measure(ruler, images)
    metrics = {"images": len(images), "dataset": dataset.name, "inception": ruler.name}
    # The score is of parts, and the images may come by class.
    metrics |= quick_metrics(ruler, features, random.permutation(probabilities))
    metrics["accuracy"] = ruler.accuracy
    if ruler.reads_classes:
        read, real_classes = probabilities.argmax(axis=1), real_probabilities.argmax(axis=1)
        metrics["class_divergence"] = class_divergence(metrics["class_shares"], real_classes)
        if classes is not None:
            read, real_classes = classes, dataset.labels
        distances = frechet_distance_per_class(features, read, real, real_classes)
        metrics["fid_per_class"] = distances
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
    some = [np.random.default_rng(0).permutation(x)[:5000] for x in (features, unseen)]
    distance, usual = [np.median(nearest(x, real)[1]) for x in some]
    return float(distance / usual) if usual else None


# ---- Checkpoints ---------------------------------------------------------------------------------

MAY_CHANGE = re.compile("epochs|max_minutes|inception|evaluation_images|.*_(dir|every)")


def save_state(run):
    """Save all that --resume needs, keep the newest three."""
    folder, step = run.settings.checkpoints_dir / "state", int(run.state.step.numpy())
    facts = {name: getattr(run, name) for name in ("identity", "history", "position", "seconds")}
    run.state.facts.assign(json.dumps(facts | {"elapsed": time.monotonic() - run.started}))
    run.state.write(str(folder / f"step-{step:09d}"))  # the .index comes last
    for old in sorted(folder.glob("step-*.index"))[:-3]:
        for part in sorted(folder.glob(f"{old.stem}.*")):  # the .index last: it says what is there
            remove(part)


def restore_state(run):
    """Restore the newest readable state.

    Raises UsageError where settings or data differ, RunError where no state can be read.
    """
    folder = run.settings.checkpoints_dir / "state"
    for index in sorted(folder.glob("step-*.index"), reverse=True):
        path = str(index.with_suffix(""))
        try:
            facts = json.loads(tf.train.load_variable(path, "facts/.ATTRIBUTES/VARIABLE_VALUE"))
            refuse_changes(facts["identity"], run.identity)
            run.state.read(path).assert_consumed()
            run.history, run.position = facts["history"], facts["position"]
            run.seconds, run.started = facts["seconds"], time.monotonic() - facts["elapsed"]
            return
        except UsageError:
            raise
        except Exception:  # TensorFlow and whatever is in the file raise half a dozen kinds
            print(f"{path} is damaged or of another version.")
    raise RunError(f"no state in {folder} can be read; nothing was changed")


def refuse_changes(before, now):
    """Raise UsageError that names what differs between two sessions of a run."""
    changed = [
        f"{name} was {was}, is {now[name]}"
        for name, was in before.items()
        if was != now[name] and not MAY_CHANGE.fullmatch(name)
    ]
    if changed:
        raise UsageError("this cannot change on --resume: " + "; ".join(changed))


def set_aside(settings):
    """Make room for a new run: move what an earlier one left to a new checkpoints/previous."""
    old = [*settings.checkpoints_dir.glob("state"), *settings.checkpoints_dir.glob("generator_*")]
    for pattern in ("image_at_epoch_*", "metrics.*", "training.gif", "tensorboard"):
        old += settings.samples_dir.glob(pattern)
    if old:
        previous = unused(settings.checkpoints_dir / "previous")
        previous.mkdir()
        for path in old:
            shutil.move(path, previous / path.name)
        print(f"The earlier run's files are in {previous} now; delete them as you like.")
        print(f"--resume goes on with it with {previous} as --checkpoints-dir and --samples-dir.\n")


# ---- The run -------------------------------------------------------------------------------------

# At most, in one call of the compiled training; between calls come the progress bar and Ctrl-C.
PIXELS_PER_CALL, STEPS_PER_CALL = 5_200_000, 104
COLLAPSE_FROM = 500  # steps, before which the averaged generator says little
COLUMNS = """
    epoch step seconds images_per_second discriminator_loss generator_loss
    inception_score inception_score_std fid classes_covered dataset inception
""".split()


class Stopped(KeyboardInterrupt):
    """A signal, whose number this holds, ended the run, after all was saved."""


@dataclasses.dataclass
class Run:
    """What a run is made of, and how far it is."""

    settings: Settings
    dataset: Dataset
    state: tf.train.Checkpoint
    identity: dict  # what must be the same in each session: settings, data, precision
    steps_per_epoch: int
    ruler: Ruler
    started: float  # monotonic seconds, as if the run had never paused
    signals: list  # that this process got
    train_steps: callable = None  # the compiled training
    summaries: tf.summary.SummaryWriter = None
    history: list = dataclasses.field(default_factory=list)  # a row (a dict) an epoch
    position: int = 0  # steps done in the epoch at hand
    seconds: float = 0.0  # that training took in the epoch at hand
    trained: float = 0.0  # monotonic seconds, when the last epoch's training ended
    measuring: float = 0.0  # seconds from then until all of the epoch was written
    done: float = 0.0  # share of the run, 0 to 1
    stopped: float = 0.0  # more than 0 where any worker got a signal


def train(dataset=None, epochs=None, settings=None, resume=False):
    """Train, measure, leave pictures and checkpoints; return the averaged generator.

    `dataset`: a Dataset, uint8 images (N, H, H) or (N, H, H, 1 or 3), (images, labels), a
    tf.data.Dataset of either, or None for `settings.dataset`. `resume` goes on with the run in the
    checkpoints folder. Raises UsageError for settings or data that don't fit, RunError where the
    run cannot go on, and KeyboardInterrupt after Ctrl-C, when all is saved.
    """
    use_threads_and_memory_well()
    settings = settings or Settings()
    strategy = choose_strategy(settings)
    if resume and not any(settings.checkpoints_dir.glob("state/step-*.index")):
        raise UsageError(f"there is nothing to resume in {settings.checkpoints_dir}")
    settings, data = fitting(settings, epochs, dataset)
    with own_folders(settings, strategy, resume) as settings, noted_signals() as signals:
        run = begin(settings, data, strategy, resume, signals)
        while run.done < 1 and not run.stopped:
            train_epoch(run)
            if run.position == run.steps_per_epoch or run.done == 1:
                measure_epoch(run)
            save_state(run)  # first: all else can be made again from it
            if run.position == 0:
                write_epoch(run)
                run.measuring = time.monotonic() - run.trained
                agree(run)
        draw_curves(run)
        print_last_words(run)
        if run.stopped:
            print("\nStopped; all is saved. In a notebook, train(..., resume=True) goes on.")
            raise Stopped(*signals or [signal.SIGTERM])
    run.state.average.class_names = data.class_names
    return run.state.average


def use_threads_and_memory_well():
    """Tell TensorFlow what suits small products, unless this process has used it before."""
    with contextlib.suppress(RuntimeError):
        # Two products side by side on half the cores each: a third less time a step than one
        # after the other on all of them.
        tf.config.threading.set_inter_op_parallelism_threads(2)
        tf.config.threading.set_intra_op_parallelism_threads(max(1, os.cpu_count() // 2))
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)


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
            elif len(tf.config.list_physical_devices("GPU")) > 1:
                strategy = tf.distribute.MirroredStrategy()
        except Exception as error:  # TensorFlow raises half a dozen kinds
            raise UsageError(f"TF_CONFIG is wrong: {error}") from None
    devices = strategy.num_replicas_in_sync
    if settings.batch_size % devices:
        raise UsageError(f"{devices} devices cannot share --batch-size {settings.batch_size}")
    return strategy


@contextlib.contextmanager
def own_folders(settings, strategy, resume):
    """Give the chief's settings; the other workers get folders that nobody looks into.

    So all workers do the same, and only the chief is seen and heard.
    """
    if strategy.extended.should_checkpoint:
        with folders_held(settings):
            yield settings
        return
    cluster = strategy.cluster_resolver.cluster_spec()
    print(f"{cluster.job_tasks(cluster.jobs[0])[0]} is the chief, which prints and saves it all.")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if resume:
            shutil.copytree(settings.checkpoints_dir / "state", f"{folder}/state")
        yield dataclasses.replace(settings, samples_dir=folder, checkpoints_dir=folder)


def fitting(settings, epochs, dataset):
    """Return the run's Settings and Dataset. Raises UsageError where they don't fit."""
    data = load_dataset(settings) if dataset is None else as_dataset(dataset, settings)
    count, batch = len(data.images), settings.batch_size
    if count < batch:
        raise UsageError(f"{data.name} has {count} images, but --batch-size is {batch}")
    conditional = settings.conditional and data.labels is not None
    if settings.conditional and not conditional:
        print(f"{data.name} has no labels: training without classes.\n")
    changes = {"epochs": settings.epochs if epochs is None else epochs, "conditional": conditional}
    return dataclasses.replace(settings, **changes), data


@contextlib.contextmanager
def folders_held(settings):
    """Hold the run's folders for this process. Raises UsageError where that cannot be."""
    with contextlib.ExitStack() as held:
        for folder in {settings.samples_dir.resolve(), settings.checkpoints_dir.resolve()}:
            make_writable(folder)
            held.enter_context(alone_in(folder))
        yield


@contextlib.contextmanager
def noted_signals():
    """Give a list that gets the first signal; a second one does what it did before."""
    noted, before = [], {}

    def note(kind, _):
        noted.append(kind)
        give_back()

    def give_back():
        for kind, handler in before.items():
            signal.signal(kind, handler)

    if threading.current_thread() is threading.main_thread():  # no other thread may have handlers
        before |= {kind: signal.signal(kind, note) for kind in SIGNALS}
    try:
        yield noted
    finally:
        give_back()


def begin(settings, dataset, strategy, resume, signals):
    """Return a Run at its start or at its newest state; what may fail comes before any writing."""
    identity = {name: as_text(value) for name, value in vars(settings).items()}
    identity |= {"dataset": fingerprint(dataset), "precision": choose_precision(settings)}
    run = Run(
        settings=settings,
        dataset=dataset,
        state=new_state(settings, dataset, strategy),
        identity=identity,
        steps_per_epoch=len(dataset.images) // settings.batch_size,
        ruler=load_ruler(settings, dataset),  # before the clock starts: it may be trained first
        started=time.monotonic(),
        signals=signals,
    )
    if resume:
        restore_state(run)
    run.train_steps = compile_training(run.state, dataset, settings)
    print_banner(run)
    for folder in (settings.samples_dir, settings.checkpoints_dir):
        for left in [*folder.glob(".*.partial*"), *folder.glob("state/*_temp")]:
            remove(left)  # by a run that was killed
    if not resume:
        set_aside(settings)
    run.summaries = tf.summary.create_file_writer(str(settings.samples_dir / "tensorboard"))
    agree(run)
    print("  epoch seconds  images/s   D loss   G loss     IS      FID classes     left")
    save_state(run)  # so that whatever happens now can be resumed
    if run.history and run.position == 0:
        write_epoch(run)  # it may have been killed before
    return run


def print_banner(run):
    """Print what is trained on what, where."""
    settings, gpus = run.settings, len(tf.config.list_physical_devices("GPU"))
    device = f"{gpus} GPU (equal runs may differ)" if gpus else f"{os.cpu_count()} cores"
    kind = "class-conditional" if settings.conditional else "unconditional"
    print(f"""\
data           {run.dataset.name}, {run.identity["dataset"]}
generator      {settings.architecture}, {kind}, {run.state.generator.count_params():,} parameters
discriminator  {settings.loss} loss, {run.state.discriminator.count_params():,} parameters
replicas       {run.state.generator.distribute_strategy.num_replicas_in_sync} of both networks
device         {device}, {run.identity["precision"]}, TensorFlow {tf.__version__}
""")


def progress(run, spare=0.0):
    """Return the share of the run that is done, 0 to 1, by its epochs or by its minutes.

    Counted as gone: the time to measure the epoch at hand, and `spare` seconds more.
    """
    epochs = len(run.history) + run.position / run.steps_per_epoch
    seconds = time.monotonic() - run.started + run.measuring + spare
    limit = 60 * run.settings.max_minutes or math.inf
    return min(1.0, max(epochs / run.settings.epochs, seconds / limit))


def agree(run):
    """Set how much is done, and whether to stop, to the mean over all workers.

    Their clocks differ and a signal may reach only one, but all must take the same steps.
    """
    strategy, done = run.state.generator.distribute_strategy, max(run.done, progress(run))
    own = strategy.run(tf.constant, [[done, len(run.signals)], tf.float64])
    run.done, run.stopped = strategy.reduce("MEAN", own, axis=None).numpy().tolist()


def train_epoch(run):
    """Train to the end of the epoch or of the run, or until a signal; then check the numbers."""
    settings, images, steps = run.settings, run.dataset.images, run.steps_per_epoch
    seed = (settings.seed, len(run.history))
    order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), seed)
    stride = math.ceil(PIXELS_PER_CALL / (settings.batch_size * images[0].size))
    bar = keras.utils.Progbar(steps, verbose=sys.stdout.isatty())
    while run.position < steps and run.done < 1 and not run.stopped:
        last, start = min(run.position + min(stride, STEPS_PER_CALL), steps), time.monotonic()
        pace = min(1.0, (1 - run.done) / max(1 - settings.decay_from, 1e-9))
        run.train_steps(order, tf.constant(run.position), tf.constant(last), tf.constant(pace))
        run.state.losses.numpy()  # waits for the steps
        run.seconds += time.monotonic() - start
        run.position = last
        agree(run)
        bar.update(last, finalize=False)
    run.trained = time.monotonic()
    if run.position == steps and progress(run, spare=run.measuring) == 1:
        run.done = 1.0  # there is no time to train more and to measure it
    agree(run)
    refuse_bad_numbers(run.state)


def refuse_bad_numbers(state):
    """Raise RunError where a weight or a loss is not finite."""
    variables = [state.losses]
    for part in (state.generator, state.discriminator, state.average):
        variables += part.variables
    for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
        variables += optimizer.variables
    if not all(np.isfinite(variable.numpy()).all() for variable in variables):
        advice = "try lower learning rates; the last good state and .h5 files are kept"
        step = int(state.step.numpy())
        raise RunError(f"losses or weights are not finite after step {step}: {advice}")


def measure_epoch(run):
    """End the epoch: add its row to the history, measured where that is due, and print it."""
    settings, state = run.settings, run.state
    discriminator_loss, generator_loss = (state.losses.numpy() / run.position).tolist()
    row = {
        "epoch": len(run.history) + 1,
        "step": int(state.step.numpy()),
        "seconds": round(run.seconds, 3),
        "images_per_second": round(run.position * settings.batch_size / run.seconds),
        "discriminator_loss": discriminator_loss,
        "generator_loss": generator_loss,
        "fid": None,
        "class_shares": None,
        "dataset": run.dataset.name,
        "inception": run.ruler.name,
        "images": settings.evaluation_images,
        "collapsed": False,
    }
    if row["epoch"] % settings.evaluate_every == 0 or run.done == 1:
        images, _ = draw_like(state.average, run.dataset, row["images"], settings.seed)
        row |= quick_metrics(run.ruler, *measure(run.ruler, images))
        row["collapsed"] = is_collapsed(row, run)
    run.history.append(row)
    run.position, run.seconds = 0, 0.0
    state.losses.assign([0.0, 0.0])
    print_row(row, run)


def is_collapsed(row, run):
    """Return whether half the classes are lost, or the FID is ten times the run's best."""
    few = run.ruler.reads_classes and 2 * row["classes_covered"] < len(row["class_shares"])
    far = row["fid"] > 10 * best_row([*run.history, row])["fid"]
    return row["step"] >= COLLAPSE_FROM and (few or far)


def best_row(history):
    """Return the row of the lowest FID among those measured as the last one was, or None."""
    measured = [row for row in history if row["fid"] is not None]
    alike = [x for x in measured if all(x[k] == measured[-1][k] for k in ("inception", "images"))]
    return min(alike, key=lambda row: row["fid"], default=None)


def print_row(row, run):
    """Print a row of the table, and how much longer the run takes."""
    epoch, metrics = f"{row['epoch']}/{run.settings.epochs}", ""
    losses = "{discriminator_loss:8.4f} {generator_loss:8.4f}".format(**row)
    if row["fid"] is not None:
        unsure = "?" if run.ruler.accuracy < TRUSTED_ACCURACY else " "
        covered = "-" if row["classes_covered"] is None else row["classes_covered"]
        metrics = "{inception_score:6.3f} {fid:8.3f}{0}{1:>7}".format(unsure, covered, **row)
    left = (time.monotonic() - run.started) * (1 / run.done - 1)
    note = "COLLAPSED" if row["collapsed"] else f"{left // 60:.0f}m {left % 60:02.0f}s"
    speed = "{seconds:7.1f} {images_per_second:9,d}".format(**row)
    print("\r\033[K" * sys.stdout.isatty() + f"{epoch:>7} {speed} {losses} {metrics:23} {note:>8}")


def write_epoch(run):
    """Write what the newest row leaves; doing it again changes nothing."""
    settings, dataset, row = run.settings, run.dataset, run.history[-1]
    with replacing(settings.samples_dir / "metrics.csv") as new, open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(run.history)
    if row["epoch"] % settings.sample_every == 0 or run.done == 1:
        names = dataset.class_names if settings.conditional else ()
        grid = draw_grid(run.state.average, settings.seed)
        save_grid(grid_path(run, row), grid, 10, title_of(run, row), names)
    names = ["latest"]
    if row is best_row(run.history):
        names.append("best")
    if row["epoch"] % settings.checkpoint_every == 0:
        names.append(f"model_epoch_{row['epoch']:03d}")
    about = {"class_names": dataset.class_names, "data": run.identity["dataset"]}
    about["learnt_from"] = settings.dataset
    for name in names:
        save_keras(run.state.average, settings.checkpoints_dir / f"generator_{name}.h5", about)
    write_summaries(run, row)


def write_summaries(run, row):
    """Write the row and the grid for TensorBoard; tf.summary.scalar would need it installed."""
    summaries = [
        (name, "scalars", row[name]) for name in COLUMNS[3:10] if row.get(name) is not None
    ]
    if grid_path(run, row).is_file():
        png = grid_path(run, row).read_bytes()
        width, height = Image.open(io.BytesIO(png)).size
        summaries.append(("samples", "images", [str(width), str(height), png]))
    with run.summaries.as_default(step=row["epoch"]):
        for tag, plugin, value in summaries:
            metadata = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": plugin})
            tf.summary.write(tag, value, metadata=metadata)
    run.summaries.flush()


def grid_path(run, row):
    return run.settings.samples_dir / f"image_at_epoch_{row['epoch']:04d}.png"


def title_of(run, row):
    """Return the title of a row's pictures, which names any data but MNIST."""
    names = {"mnist": "", "stand-in": "stand-in, not MNIST"}
    name = names.get(run.dataset.name, run.dataset.name)
    metrics = (
        "" if row["fid"] is None else "IS {inception_score:.2f}    FID {fid:.2f}".format(**row)
    )
    return f"epoch {row['epoch']}    {metrics}    {name}".strip()


def draw_curves(run):
    """Write metrics.png and the animation of the grids."""
    folder, grids = run.settings.samples_dir, []
    if run.history:
        title = title_of(run, run.history[-1])
        save_metrics_plot(folder / "metrics.png", run.history, title, run.dataset.class_names)
    for row in run.history:
        path = grid_path(run, row)
        try:
            if path.exists():
                grids.append(Image.open(path).copy())
        except OSError as error:
            print(f"training.gif lacks {path}: {error}")
    if grids:
        save_animation(folder / "training.gif", grids, 6)


def print_last_words(run):
    """Print what the run came to and where to look."""
    kept, best = run.settings.checkpoints_dir / "generator_best.h5", best_row(run.history)
    collapsed = [str(row["epoch"]) for row in run.history if row["collapsed"]]
    if collapsed:
        print(f"\nFew classes, or an FID far above the best, after epoch {', '.join(collapsed)}.")
        print("Larger R1 and R2 or lower learning rates help against collapse.")
    print(f"\nLook at {run.settings.samples_dir}/: the grids, metrics.png, training.gif")
    if best and kept.exists():
        print("Best: FID {fid:.3f} after epoch {epoch}. Draw more with it:".format(**best))
        print("  " + line_to_type("generate", "--checkpoint", str(kept)))


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
    train(settings=settings, resume="resume" in options)


def generate_command(settings, options):
    """Draw a grid, arrays, a walk or a folder of pictures."""
    output = Path(options.get("output", settings.samples_dir / "generated.png"))
    kind, output = output.suffix, unused(output)
    if kind not in ("", ".png", ".npz", ".gif"):
        raise UsageError(f"--output is {str(output)!r}, but must be a .png, .npz, .gif or a folder")
    make_writable(output.parent)
    given = options.get("checkpoint")
    path = Path(default_generator(settings) if given is None else given)
    seed, digits = options.get("draw_seed", random_seed()), options.get("digits")
    print(f"Drawing with {path}, --seed {seed}")
    generator, count = load_generator(path), options.get("count", 10 if digits else 100)
    classes = classes_to_draw(generator, count, digits)
    columns = len(classes) // count if digits else min(len(classes), 10)
    if kind == ".gif":
        latent = latent_walk(generator, columns, seed)
        images = draw(generator, np.concatenate(latent), np.tile(classes[:columns], len(latent)))
        frames = [as_picture(mosaic(frame, columns)) for frame in np.split(images, len(latent))]
        save_animation(output, frames, 20)
    else:
        images = draw(generator, latent_points(generator, len(classes), seed), classes)
        labels = {"labels": classes.astype(np.uint8)} if count_classes(generator) else {}
        if kind == ".png":
            save_grid(output, images, columns, f"{path.name}    seed {seed}")
        elif kind == ".npz":
            save_arrays(output, images=images, **labels)
        else:
            save_pictures(output, images, **labels)
    print(f"Written: {output}")


def evaluate_command(settings, options):
    """Print every metric of a generator, or of the images in a file or a folder."""
    if {"images", "checkpoint"} <= options.keys():
        raise UsageError("--images and --checkpoint exclude each other")
    make_writable(settings.samples_dir)
    with contextlib.redirect_stdout(sys.stderr):  # --json prints nothing else
        dataset = load_dataset(settings)
        given = options.get("images", options.get("checkpoint"))
        path = Path(default_generator(settings) if given is None else given)
        print(f"Measuring {path}")
        if "images" in options:
            images, classes = as_images(load_path(path, settings).images, path, settings), None
            images = np.random.default_rng(0).permutation(images)[: options.get("count")]
        else:
            count = options.get("count", settings.evaluation_images)
            images, classes = drawn_to_measure(path, dataset, count, settings)
        metrics = evaluate_images(images, settings, classes, dataset)
    page = unused(settings.samples_dir / "neighbours.png")
    save_neighbours(page, images[:20], dataset.images[metrics.pop("nearest")])
    metrics |= {"measured": str(path), "class_names": dataset.class_names, "page": str(page)}
    print(json.dumps(metrics) if "json" in options else report(metrics))


def drawn_to_measure(path, dataset, count, settings):
    """Return images by a generator, from other latent points than the epochs', and classes."""
    generator, about, data = load_generator(path), read_about(path), fingerprint(dataset)
    if about.get("data", data) != data:
        print(f"{path} learnt from other data: is it --dataset {about.get('learnt_from')}?")
    if count_classes(generator) not in (0, len(dataset.class_names)):
        raise UsageError(f"{path} knows other classes than {dataset.name}: see --dataset")
    images, classes = draw_like(generator, dataset, count, settings.seed + 1)
    return images, classes if count_classes(generator) else None


def report(metrics):
    """Return evaluate's table; what cannot be had is left out."""
    lines = [
        f"{metrics['images']:,} images of {metrics['measured']}",
        f"against {metrics['dataset']}, measured by {metrics['inception']}",
    ]
    if metrics["accuracy"] < TRUSTED_ACCURACY:
        reads = f"reads only {metrics['accuracy']:.0%} of unseen images"
        lines.append(f"which {reads}: the numbers mean little")
    lines.append("")
    for name, words in REPORT.items():
        if metrics.get(name) is not None:
            lines.append(f"{name:18} {metrics[name]:8.4g}  {words}")
    for number, distance in enumerate(metrics.get("fid_per_class", [])):
        name, share = metrics["class_names"][number], metrics["class_shares"][number]
        lines.append(f"class {name:<12} {distance or math.nan:8.4g}  FID, share {share:.3f}")
    return "\n".join([*lines, f"\nBeside the nearest training images: {metrics['page']}"])


def inception_command(settings, options):
    """Train the network that measures MNIST; write it and what it sees in MNIST to weights/."""
    arrays = load_mnist()
    if arrays is None:
        raise RunError("the Inception model learns from MNIST, and there is none to be had")
    images, labels, test_images, test_labels = arrays
    training = images[..., np.newaxis], labels
    inception, accuracy = train_inception(training, (test_images[..., np.newaxis], test_labels))
    save_keras(inception, SHIPPED_INCEPTION, {"accuracy": accuracy})
    ruler = load_ruler(Settings(inception="mnist"), Dataset(*training, "new"))
    statistics = SHIPPED_INCEPTION.with_suffix(".npz")
    save_arrays(statistics, mean=ruler.mean, covariance=ruler.covariance)
    print(f"Written: {SHIPPED_INCEPTION} and {statistics.name}. It measures as {ruler.name}.")


RUN = {
    "train": train_command,
    "generate": generate_command,
    "evaluate": evaluate_command,
    "inception": inception_command,
}


def main(words=None):
    """Run the command line; return the exit status."""
    words = list(map(str, sys.argv[1:] if words is None else words))
    try:
        command, settings, options = parse_command_line(words)
        if not tf.config.list_physical_devices("GPU"):  # where not all operations can be that
            tf.config.experimental.enable_op_determinism()
        RUN[command](settings, options)
        sys.stdout.flush()
    except UsageError as error:
        return refuse(error, 2)
    except Stopped as stop:
        typed = words[1:] if words[:1] == ["train"] else words
        flags = [word for word in typed if word != "--resume"]
        print("To go on:\n  " + line_to_type("train", "--resume", *flags))
        return 128 + stop.args[0]
    except BrokenPipeError:  # as by `evaluate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except tf.errors.UnavailableError as error:
        return refuse(f"another worker is gone; train --resume on all goes on: {error}", 1)
    except (RunError, OSError, MemoryError, tf.errors.OpError) as error:
        return refuse(error, 1)
    return 0


if __name__ == "__main__":
    status = main(WORDS)
    if status:  # sys.exit(0) is noise in a notebook
        sys.exit(status)
