"""Train a generative adversarial network on MNIST, measure it every epoch, leave pictures.

    python gan_mnist.py                                    train; look into samples/
    python gan_mnist.py train --resume                     go on with a run that stopped
    python gan_mnist.py generate --digits 2026             draw digits, no training needed
    python gan_mnist.py evaluate                           every metric of the best generator
    python gan_mnist.py inception                          train the network that measures

Every constant below is also a flag (EPOCHS is --epochs) and a field of Settings.
"""

# ---------------------------------------------------------------------------------------------
# Settings: tweak these
# ---------------------------------------------------------------------------------------------

# The run
EPOCHS = 100  # passes over the training images
MAX_MINUTES = 0.0  # end training after this many minutes, everything saved (0: no limit)
BATCH_SIZE = 256  # images per training step
SEED = 0  # same seed, same machine: same bytes
DATASET = "mnist"  # mnist, or the path of an .npz with uint8 images (and labels)
SAMPLES_DIR = "samples"  # where pictures and metrics land
CHECKPOINTS_DIR = "checkpoints"  # where .h5 files and the training state land

# The networks
ARCHITECTURE = "dense"  # dense
CONDITIONAL = True  # give both networks the digit's class; false: the plain GAN of 2014
LATENT_DIM = 64  # numbers that the generator makes an image from
GENERATOR_WIDTHS = (256, 512)  # units of each hidden layer, latent side first
DISCRIMINATOR_WIDTHS = (512, 256)  # units of each hidden layer, image side first

# The game
LOSS = "relativistic"  # non_saturating minimax least_squares hinge wasserstein relativistic
R1 = 0.1  # weight of the gradient penalty on real images
R2 = 0.1  # weight of the gradient penalty on generated images
SHIFT = 1  # pixels by which the discriminator's images are moved at random (0: not moved)

# The optimizers
GENERATOR_LEARNING_RATE = 1e-3  # of Adam
DISCRIMINATOR_LEARNING_RATE = 1e-3  # of Adam
DECAY_FROM = 0.5  # share of the run after which the rates fall linearly to zero (1: never)
BETA_1 = 0.0  # Adam's decay of the gradient's mean; momentum lets the two networks circle
BETA_2 = 0.99  # Adam's decay of the squared gradient's mean
EMA_DECAY = 0.999  # per step, of the averaged generator: the one sampled, measured and saved
PRECISION = "auto"  # of matrix products: float32, bfloat16, or auto: what the processor is made for

# The measuring
INCEPTION = "mnist"  # network behind the Inception score and FID: mnist
EVALUATION_IMAGES = 10_000  # generated for each measurement
EVALUATE_EVERY = 1  # epochs between measurements
SAMPLE_EVERY = 1  # epochs between picture grids
CHECKPOINT_EVERY = 10  # epochs between numbered .h5 files

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class _ImportedOnFirstUse:
    """TensorFlow takes four seconds to import; --help and a rejected setting don't wait for it."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


h5py, keras, tf = map(_ImportedOnFirstUse, ("h5py", "keras", "tensorflow"))
matplotlib_image = _ImportedOnFirstUse("matplotlib.image")

HERE = Path(__file__).resolve().parent
LINE = re.compile(r"^([A-Z][A-Z0-9_]*) = .*?  # (.+)$", re.MULTILINE)
HELP = dict(LINE.findall(Path(__file__).read_text(encoding="utf-8").split("\nimport ")[0]))


class UsageError(ValueError):
    """The user asked for something that cannot be: one line, exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: one line, exit status 1."""


def _whole(low, high=2**31 - 1):
    words = f"a whole number from {low:,} to {high:,}"
    return lambda value: type(value) is int and low <= value <= high, words


def _number(low, high=math.inf):
    words = f"a number of {low} or more" if high == math.inf else f"a number from {low} to {high}"
    return (
        lambda value: type(value) in (int, float) and low <= value <= high and math.isfinite(value),
        words,
    )


def _choice(*names):
    return lambda value: value in names, "one of " + ", ".join(names)


def _widths():
    return (
        lambda value: len(value) > 0 and all(_whole(1, 65_536)[0](width) for width in value),
        "whole numbers from 1 to 65,536 like 128,256,512",
    )


ALLOWED = {
    "epochs": _whole(1),
    "max_minutes": _number(0),
    "batch_size": _whole(2, 65_536),
    "seed": _whole(0),
    "architecture": _choice("dense"),
    "conditional": (lambda value: type(value) is bool, "true or false"),
    "latent_dim": _whole(1, 65_536),
    "generator_widths": _widths(),
    "discriminator_widths": _widths(),
    "loss": _choice(*re.findall(r"\w+", HELP["LOSS"])),
    "r1": _number(0),
    "r2": _number(0),
    "shift": _whole(0, 8),
    "generator_learning_rate": _number(0, 1),
    "discriminator_learning_rate": _number(0, 1),
    "decay_from": _number(0, 1),
    "beta_1": _number(0, 0.9999),
    "beta_2": _number(0, 0.999999),
    "ema_decay": _number(0, 0.999999),
    "precision": _choice("auto", "float32", "bfloat16"),
    "inception": _choice("mnist"),
    "evaluation_images": _whole(100, 1_000_000),
    "evaluate_every": _whole(1),
    "sample_every": _whole(1),
    "checkpoint_every": _whole(1),
}


def _refuse_bad_settings(settings):
    for name, (is_allowed, words) in ALLOWED.items():
        value = getattr(settings, name)
        if not is_allowed(value):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is {value!r}, but must be {words}")


Settings = dataclasses.make_dataclass(
    "Settings",
    [(name.lower(), type(globals()[name]), globals()[name]) for name in HELP],
    frozen=True,
    namespace={
        "__post_init__": _refuse_bad_settings,
        "__doc__": "What a run is asked to do: the constants above, in lower case, immutable.\n\n"
        "Raises UsageError where a value is not allowed.",
    },
)


def parse_setting(name, text):
    """Return the value that `text` from the command line means for the setting `name`.

    Raises UsageError with the flag, the text and what is allowed.
    """
    kind = type(getattr(Settings(), name))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(int(width) for width in text.split(","))
        return kind(text)
    except (ValueError, KeyError):
        flag, words = name.replace("_", "-"), ALLOWED[name][1]
        raise UsageError(f"--{flag} is {text!r}, but must be {words}") from None


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------

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
CONNECT_SECONDS = 15  # to the first mirror that answers, all being asked at once
STALL_SECONDS = 15  # without a byte
LARGEST_DOWNLOAD = 100 * 2**20  # bytes
LARGEST_NPZ = 4 * 2**30  # bytes, unpacked


class Dataset(NamedTuple):
    """Pictures to learn from."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray | None  # uint8 (N,)
    name: str  # what outputs call it

    @property
    def classes(self):
        """Number of classes, 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path`; rename it to `path` when all is written and synced."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_npz(path):
    """Return the arrays of an .npz by name. Raises UsageError for what is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST_NPZ:
                raise UsageError(f"{path} unpacks to more than {LARGEST_NPZ:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile, EOFError, MemoryError, NotImplementedError) as error:
        raise UsageError(f"{path} is not a sound .npz: {error}") from None


def load_mnist():
    """Return MNIST's arrays by name, from the Keras cache or a mirror; None when there is neither.

    Only arrays with MNIST's digests are trusted.
    """
    cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"), "datasets", "mnist.npz")
    if cache.exists():
        with contextlib.suppress(UsageError):
            arrays = read_npz(cache)
            if is_mnist(arrays):
                return arrays
        print(f"{cache} is not MNIST as published; downloading it again.")
    cache.parent.mkdir(parents=True, exist_ok=True)
    for url, response in _mirrors_that_answer(MNIST_MIRRORS):
        try:
            with replacing(cache) as partial:
                _save_response(response, partial)
                arrays = read_npz(partial)
                if not is_mnist(arrays):
                    raise UsageError("these bytes are not MNIST")
            return arrays
        except (OSError, UsageError) as error:
            print(f"{url}: {error}")
    return None


def is_mnist(arrays):
    """Return whether the arrays (by name, as in mnist.npz) have MNIST's digests."""
    return all(
        name in arrays
        and hashlib.sha256(np.ascontiguousarray(arrays[name]).data).hexdigest() == digest
        for name, digest in MNIST_DIGESTS.items()
    )


def _mirrors_that_answer(urls):
    """Ask all at once, yield (url, open response) as they answer: one dead host costs no wait."""
    answered, lock = [], threading.Condition()

    def ask(url):
        try:
            result = urllib.request.urlopen(url, timeout=STALL_SECONDS)
        except (OSError, ValueError) as error:
            result = error
        with lock:
            answered.append((url, result))
            lock.notify()

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.monotonic() + CONNECT_SECONDS
    for position in range(len(urls)):
        with lock:
            lock.wait_for(lambda: len(answered) > position, max(0, deadline - time.monotonic()))
            if len(answered) <= position:
                print(f"No mirror answered within {CONNECT_SECONDS} s.")
                return
            url, result = answered[position]
        if isinstance(result, Exception):
            print(f"{url}: {result}")
        else:
            yield url, result


def _save_response(response, path):
    size = int(response.headers.get("Content-Length", 0)) or None
    bar = keras.utils.Progbar(size, unit_name="byte", verbose=sys.stdout.isatty())
    with response, open(path, "wb") as file:
        while chunk := response.read(2**16):
            file.write(chunk)
            if file.tell() > LARGEST_DOWNLOAD:
                raise UsageError(f"more than {LARGEST_DOWNLOAD:,} bytes")
            bar.update(file.tell())
        if size and file.tell() != size:
            raise UsageError(f"broke off after {file.tell():,} of {size:,} bytes")


def load_dataset(settings):
    """Return the Dataset that `settings.dataset` names.

    Without MNIST and without a network: a stand-in, drawn by the shipped generator and named so.
    Raises UsageError for an unknown name, a missing path or an .npz that does not fit.
    """
    if settings.dataset != "mnist":
        return _load_npz_dataset(Path(settings.dataset))
    arrays = load_mnist()
    if arrays is not None:
        return Dataset(arrays["x_train"][..., np.newaxis], arrays["y_train"], "mnist")
    print(
        "MNIST is neither in the Keras cache nor to be had from a mirror.\n"
        "Going on with a stand-in: 60,000 digits drawn by the shipped generator, NOT MNIST."
    )
    labels = np.arange(60_000) % 10
    generator = load_generator(SHIPPED_GENERATOR)
    images = draw(generator, latent_points(generator, len(labels), seed=0), labels)
    return Dataset(images, labels.astype(np.uint8), "stand-in")


def _load_npz_dataset(path):
    if not path.exists():
        raise UsageError(f"--dataset is {str(path)!r}, but must be mnist or the path of an .npz")
    arrays = read_npz(path)
    images = arrays.get("images", arrays.get("x_train"))
    labels = arrays.get("labels", arrays.get("y_train"))
    if images is None:
        raise UsageError(f"{path} holds no array named images or x_train: {sorted(arrays)}")
    return as_dataset(images, labels, path.stem)


def as_dataset(images, labels=None, name="images"):
    """Return a Dataset of uint8 images (N, 28, 28) or (N, 28, 28, 1) and labels (N,) or None.

    Raises UsageError where the arrays are of another shape or type, or don't fit each other.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28, 1) or not len(images):
        raise UsageError(
            f"images must be uint8 (N, 28, 28) or (N, 28, 28, 1); "
            f"{name} has {images.dtype} {images.shape}"
        )
    if labels is not None:
        labels = np.asarray(labels)
        whole = np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.shape != images.shape[:1] or not 0 <= labels.min() <= 255:
            raise UsageError(
                f"labels must be whole numbers (N,) from 0 to 255, one for each of "
                f"{len(images):,} images; {name} has {labels.dtype} {labels.shape}"
            )
        labels = labels.astype(np.uint8)
    return Dataset(images, labels, name)


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def _dense_generator(hidden, settings, image_shape):
    for width in settings.generator_widths:
        hidden = keras.layers.Dense(width, use_bias=False)(hidden)
        # A short memory: the statistics must be right after a hundred steps already.
        hidden = keras.layers.BatchNormalization(momentum=0.9)(hidden)
        hidden = keras.layers.ReLU()(hidden)
    hidden = keras.layers.Dense(math.prod(image_shape))(hidden)
    return keras.layers.Reshape(image_shape)(hidden)


def _dense_discriminator(image, classes, settings):
    hidden = keras.layers.Concatenate()([keras.layers.Flatten()(image), *classes])
    for width in settings.discriminator_widths:
        hidden = keras.layers.Dense(width)(hidden)
        hidden = keras.layers.LeakyReLU(0.2)(hidden)
    return hidden


ARCHITECTURES = {"dense": (_dense_generator, _dense_discriminator)}


def build_generator(settings, image_shape=(28, 28, 1), classes=10, precision="float32"):
    """Return the Keras generator: latent (N, LATENT_DIM) to images (N, H, W, C) in [-1, 1].

    With `settings.conditional` its inputs are [latent, class], classes being integers (N,).
    """
    with _layers_in(precision):
        latent = keras.Input((settings.latent_dim,), name="latent")
        inputs, condition = _class_input(settings, classes)
        hidden = keras.layers.Concatenate()([latent, *condition]) if condition else latent
        hidden = ARCHITECTURES[settings.architecture][0](hidden, settings, image_shape)
        images = keras.layers.Activation("tanh", dtype="float32", name="image")(hidden)
    return keras.Model([latent, *inputs] if inputs else latent, images, name="generator")


def build_discriminator(settings, image_shape=(28, 28, 1), classes=10, precision="float32"):
    """Return the Keras discriminator: images (N, H, W, C) in [-1, 1] to logits (N, 1).

    With `settings.conditional` its inputs are [image, class]. There is no sigmoid: losses take
    logits.
    """
    with _layers_in(precision):
        image = keras.Input(image_shape, name="image")
        inputs, condition = _class_input(settings, classes)
        hidden = ARCHITECTURES[settings.architecture][1](image, condition, settings)
        logits = keras.layers.Dense(1, dtype="float32", name="logit")(hidden)
    return keras.Model([image, *inputs] if inputs else image, logits, name="discriminator")


def _class_input(settings, classes):
    if not settings.conditional:
        return [], []
    label = keras.Input((), dtype="int32", name="class")
    return [label], [keras.layers.CategoryEncoding(classes, output_mode="one_hot")(label)]


@contextlib.contextmanager
def _layers_in(precision):
    """Build layers that multiply in `precision` and keep their variables in float32."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def choose_precision(settings):
    """Return "float32" or "bfloat16", whichever `settings.precision` means on this machine.

    "auto" is bfloat16 only where the hardware multiplies it natively: processors with AMX and
    GPUs of compute capability 8 or more. Elsewhere it is emulated, and slower than float32.
    """
    if settings.precision != "auto":
        return settings.precision
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        native = details.get("compute_capability", (0, 0)) >= (8, 0)
    else:
        flags = Path("/proc/cpuinfo")
        native = flags.exists() and "amx_bf16" in flags.read_text()
    return "bfloat16" if native else "float32"


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """Both players' losses per image, from the logits of real and of generated images (N, 1)."""

    discriminator: callable
    generator: callable


def _softplus(logits):
    return tf.nn.softplus(logits)


LOSSES = {
    # Goodfellow et al., arXiv 1406.2661: the generator climbs log D(G(z)) ...
    "non_saturating": Loss(
        lambda real, fake: _softplus(-real) + _softplus(fake),
        lambda real, fake: _softplus(-fake),
    ),
    # ... or, as its minimax game says, descends log(1 - D(G(z))).
    "minimax": Loss(
        lambda real, fake: _softplus(-real) + _softplus(fake),
        lambda real, fake: -_softplus(fake),
    ),
    # Mao et al., arXiv 1611.04076.
    "least_squares": Loss(
        lambda real, fake: (real - 1) ** 2 + fake**2,
        lambda real, fake: (fake - 1) ** 2,
    ),
    # Lim and Ye, arXiv 1705.02894.
    "hinge": Loss(
        lambda real, fake: tf.nn.relu(1 - real) + tf.nn.relu(1 + fake),
        lambda real, fake: -fake,
    ),
    # Arjovsky et al., arXiv 1701.07875; R1 and R2 keep the critic smooth (arXiv 1801.04406).
    "wasserstein": Loss(
        lambda real, fake: fake - real,
        lambda real, fake: -fake,
    ),
    # Jolicoeur-Martineau, arXiv 1807.00734; with R1 and R2 it converges: arXiv 2501.05441.
    "relativistic": Loss(
        lambda real, fake: _softplus(fake - real),
        lambda real, fake: _softplus(real - fake),
    ),
}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def new_state(settings, dataset, precision):
    """Return a tf.train.Checkpoint of everything that training changes, freshly initialised.

    What is in it is what --resume restores: both networks, the averaged generator, both
    optimizers, the random generator, the step, times, losses so far and the history as JSON.
    """
    keras.utils.set_random_seed(settings.seed)
    shape, classes = dataset.images.shape[1:], dataset.classes
    state = tf.train.Checkpoint(
        generator=build_generator(settings, shape, classes, precision),
        discriminator=build_discriminator(settings, shape, classes, precision),
        average=build_generator(settings, shape, classes),
        generator_optimizer=_adam(settings),
        discriminator_optimizer=_adam(settings),
        random=tf.random.Generator.from_seed(settings.seed),
        step=tf.Variable(0, dtype=tf.int64),
        loss_sums=tf.Variable([0.0, 0.0]),  # of this epoch: discriminator, generator
        seconds=tf.Variable([0.0, 0.0], dtype=tf.float64),  # training alone this epoch; in all
        history=tf.Variable("[]"),  # a row an epoch, as metrics.csv has them and more
    )
    state.average.set_weights(state.generator.get_weights())
    state.generator_optimizer.build(state.generator.trainable_variables)
    state.discriminator_optimizer.build(state.discriminator.trainable_variables)
    return state


def _adam(settings):
    return keras.optimizers.Adam(0.0, beta_1=settings.beta_1, beta_2=settings.beta_2)


def compile_training(state, dataset, settings):
    """Return train(order, first, last, pace), which takes the steps first to last of an epoch.

    `order` (N,) is the epoch's permutation of the images, `pace` scales both learning rates. Both
    losses are added to `state.loss_sums`.
    """
    strategy = tf.distribute.get_strategy()
    images = tf.constant(dataset.images)
    labels = tf.constant(dataset.labels if settings.conditional else np.zeros(len(images), "u1"))
    loss = LOSSES[settings.loss]

    def step(batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        batch = tf.reshape(batch, (strategy.num_replicas_in_sync, -1))[replica]
        real = tf.cast(tf.gather(images, batch), tf.float32) / 127.5 - 1
        condition = [tf.cast(tf.gather(labels, batch), tf.int32)] if settings.conditional else []
        return train_step(state, loss, settings, real, condition)

    @tf.function
    def train(order, first, last, pace):
        state.generator_optimizer.learning_rate.assign(pace * settings.generator_learning_rate)
        state.discriminator_optimizer.learning_rate.assign(
            pace * settings.discriminator_learning_rate
        )
        for position in tf.range(first, last):
            batch = order[position * settings.batch_size : (position + 1) * settings.batch_size]
            losses = strategy.run(step, args=(batch,))
            state.loss_sums.assign_add(strategy.reduce("MEAN", losses, axis=None))
            update_average(state, settings.ema_decay)

    return train


def train_step(state, loss, settings, real, condition):
    """Update both networks once on real images (N, H, W, C) in [-1, 1]; return both losses (2,).

    The fakes are drawn once for both. The logits' slope at the fakes, which R2 needs anyway, is
    also the generator's gradient up to one factor an image (arXiv 2103.00430), so no backward
    pass through the discriminator is spent on the generator.
    """
    generator, discriminator = state.generator, state.discriminator
    latent = state.random.normal((len(real), settings.latent_dim))
    with tf.GradientTape() as generator_tape:
        fake = generator([latent, *condition] if condition else latent, training=True)
        fake = shift(fake, settings.shift, state.random)
    with tf.GradientTape() as discriminator_tape:
        real = shift(real, settings.shift, state.random)
        real_logits, real_slope = logits_and_slope(discriminator, real, condition)
        fake_logits, fake_slope = logits_and_slope(discriminator, tf.stop_gradient(fake), condition)
        discriminator_loss = tf.reduce_mean(loss.discriminator(real_logits, fake_logits))
        penalised = discriminator_loss + gradient_penalties(settings, real_slope, fake_slope)
    with tf.GradientTape() as logit_tape:
        logit_tape.watch(fake_logits)
        generator_loss = tf.reduce_mean(loss.generator(real_logits, fake_logits))
    factor = logit_tape.gradient(generator_loss, fake_logits)
    factor = tf.reshape(factor, [-1] + [1] * (len(fake.shape) - 1))
    variables = discriminator.trainable_variables
    gradients = discriminator_tape.gradient(penalised, variables)
    state.discriminator_optimizer.apply(gradients, variables)
    variables = generator.trainable_variables
    gradients = generator_tape.gradient(fake, variables, output_gradients=factor * fake_slope)
    state.generator_optimizer.apply(gradients, variables)
    return tf.stack([discriminator_loss, generator_loss])


def logits_and_slope(discriminator, images, condition):
    """Return logits (N, 1) and their gradients with respect to the images (N, H, W, C)."""
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = discriminator([images, *condition] if condition else images, training=True)
    return logits, tape.gradient(logits, images)


def gradient_penalties(settings, real_slope, fake_slope):
    """Return R1 / 2 E|slope at real|^2 + R2 / 2 E|slope at fake|^2 (arXiv 1801.04406)."""

    def half_mean_square(slope):
        return tf.reduce_mean(tf.reduce_sum(slope**2, axis=(1, 2, 3))) / 2

    penalty = 0.0
    if settings.r1:
        penalty += settings.r1 * half_mean_square(real_slope)
    if settings.r2:
        penalty += settings.r2 * half_mean_square(fake_slope)
    return penalty


def shift(images, pixels, random):
    """Move all images by up to `pixels` each way at random, around the edge (arXiv 2006.10738).

    Keeps the discriminator from memorising the training images.
    """
    if not pixels:
        return images
    return tf.roll(images, random.uniform((2,), -pixels, pixels + 1, dtype=tf.int32), (1, 2))


def update_average(state, decay):
    """Move the averaged generator towards the generator, batch normalisation included.

    The decay warms up as (1 + step) / (10 + step): an average over the last tenth of a short run.
    """
    step = tf.cast(state.step.assign_add(1), tf.float32)
    weight = 1 - tf.minimum(decay, (1 + step) / (10 + step))
    for mean, variable in zip(state.average.weights, state.generator.weights, strict=True):
        mean.assign_add(weight * (variable - mean))


# ---------------------------------------------------------------------------------------------
# The Inception model and the metrics
# ---------------------------------------------------------------------------------------------

# FID under another network is another number: new weights get a new name.
INCEPTION_NAME = "mnist_inception_1"
INCEPTION_EPOCHS = 14
INCEPTION_BATCH = 500  # images measured at once


def build_inception():
    """Return the MNIST Inception network (arXiv 1409.4842 in small), not yet trained.

    Images (N, 28, 28, 1) in [-1, 1] to [pooled features (N, 160), class probabilities (N, 10)].
    """
    image = keras.Input((28, 28, 1))
    hidden = _convolution(image, 32, 5, strides=2)
    hidden = _inception_block(hidden, 16, (16, 24), (8, 12), 12)
    hidden = keras.layers.MaxPooling2D(2)(hidden)
    hidden = _inception_block(hidden, 32, (32, 48), (16, 24), 24)
    hidden = _inception_block(hidden, 32, (32, 64), (16, 32), 32)
    features = keras.layers.GlobalAveragePooling2D(name="features")(hidden)
    probabilities = keras.layers.Dense(10, activation="softmax", name="probabilities")(features)
    return keras.Model(image, [features, probabilities], name=INCEPTION_NAME)


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


def train_inception(arrays, epochs=INCEPTION_EPOCHS):
    """Return a trained MNIST Inception network and its accuracy on the test images.

    `arrays` are MNIST's by name. Training images are turned, moved and zoomed at random.
    """
    keras.utils.set_random_seed(0)
    inception = build_inception()
    edge = {"fill_mode": "constant", "fill_value": -1.0}
    classifier = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Rescaling(1 / 127.5, offset=-1),
            keras.layers.RandomRotation(0.03, **edge),
            keras.layers.RandomTranslation(0.08, 0.08, **edge),
            keras.layers.RandomZoom((-0.12, 0.12), (-0.12, 0.12), **edge),
            keras.Model(inception.input, inception.output[1]),
        ]
    )
    steps = math.ceil(len(arrays["x_train"]) / 128)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, (epochs - 1) * steps, warmup_target=4e-3, warmup_steps=steps
    )
    classifier.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.02),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    classifier.fit(_pixels(arrays["x_train"]), arrays["y_train"], batch_size=128, epochs=epochs)
    _, accuracy = classifier.evaluate(_pixels(arrays["x_test"]), arrays["y_test"], verbose=0)
    return inception, accuracy


def _pixels(images):
    return images[..., np.newaxis].astype(np.float32)


class Ruler(NamedTuple):
    """A network that measures images, and what it sees in the real ones."""

    name: str
    outputs: callable  # uint8 (M, 500, H, W, C) to features and probabilities
    mean: np.ndarray  # float64 (F,)
    covariance: np.ndarray  # float64 (F, F)


def load_ruler(settings, dataset):
    """Return the Ruler for `dataset`: shipped statistics for MNIST, else those of its images."""
    network = load_keras(HERE / "weights" / f"{INCEPTION_NAME}.h5")

    @tf.function
    def outputs(batches):
        return tf.map_fn(
            lambda images: tuple(network(tf.cast(images, tf.float32) / 127.5 - 1)),
            batches,
            fn_output_signature=(tf.float32, tf.float32),
            parallel_iterations=2,  # a core each: twice as fast as one batch on two cores
        )

    if dataset.name == "mnist":
        shipped = read_npz(HERE / "weights" / f"{INCEPTION_NAME}.npz")
        return Ruler(INCEPTION_NAME, outputs, shipped["mean"], shipped["covariance"])
    features, _ = measure(outputs, dataset.images)
    return Ruler(INCEPTION_NAME, outputs, *feature_statistics(features))


def measure(outputs, images):
    """Return features float32 (N, F) and probabilities float32 (N, K) of uint8 (N, H, W, C)."""
    padding = np.repeat(images[:1], -len(images) % INCEPTION_BATCH, axis=0)
    batches = np.concatenate([images, padding]).reshape(-1, INCEPTION_BATCH, *images.shape[1:])
    return tuple(
        output.numpy().reshape(batches.shape[0] * INCEPTION_BATCH, -1)[: len(images)]
        for output in outputs(batches)
    )


def feature_statistics(features):
    """Return mean (F,) and covariance (F, F) of features (N, F), in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """Return the squared Fréchet distance of two Gaussians, 0 or more; lower is nearer.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), arXiv 1706.08500. The trace of the root is the
    nuclear norm of C1^(1/2) C2^(1/2): real whatever the ranks, so a collapsed generator gets a
    number, not an imaginary part. Raises ValueError where an argument is not finite.
    """
    mean_1, mean_2 = np.asarray(mean_1, np.float64), np.asarray(mean_2, np.float64)
    covariance_1 = np.atleast_2d(np.asarray(covariance_1, np.float64))
    covariance_2 = np.atleast_2d(np.asarray(covariance_2, np.float64))
    if not all(np.isfinite(x).all() for x in (mean_1, covariance_1, mean_2, covariance_2)):
        raise ValueError("the Fréchet distance needs finite means and covariances")
    cross = np.linalg.norm(_symmetric_root(covariance_1) @ _symmetric_root(covariance_2), "nuc")
    distance = np.sum((mean_1 - mean_2) ** 2)
    distance += np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
    return max(0.0, float(distance))


def _symmetric_root(matrix):
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def inception_score(probabilities, splits=10):
    """Return mean and standard deviation of exp E KL(p(y|x) || p(y)) over `splits` parts.

    From class probabilities (N, K): 1 to K, higher is better (arXiv 1606.03498). Raises
    ValueError for fewer images than splits.
    """
    from scipy.special import rel_entr

    probabilities = np.asarray(probabilities, np.float64)
    if len(probabilities) < splits:
        raise ValueError(f"{len(probabilities)} images cannot be split into {splits}")
    scores = [
        np.exp(rel_entr(part, part.mean(axis=0)).sum(axis=1).mean())
        for part in np.array_split(probabilities, splits)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def kernel_inception_distance(features_1, features_2, subsets=100, subset_size=1000):
    """Return mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel (x.y / F + 1)^3 on features (N, F), arXiv 1801.01401: 0 for equal distributions, may be
    slightly negative; lower is better. Subsets are no larger than the smaller set. Raises
    ValueError for fewer than 2 images.
    """
    sets = [np.asarray(features, np.float64) for features in (features_1, features_2)]
    size = min(subset_size, *map(len, sets))
    if size < 2:
        raise ValueError("the kernel distance needs at least 2 images on each side")
    random = np.random.default_rng(0)
    distances = []
    for _ in range(subsets):
        x, y = (features[random.choice(len(features), size, replace=False)] for features in sets)
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        distances.append(within - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real_features, generated_features, neighbours=3):
    """Return improved precision and recall, each 0 to 1, higher is better (arXiv 1904.06991).

    The share of generated features (N, F) within the real ones' manifold, and of real ones within
    the generated ones': the balls around each point that reach its k-th neighbour. Raises
    ValueError where a side has no more than `neighbours` points.
    """
    sets = [np.asarray(features, np.float64) for features in (real_features, generated_features)]
    if min(map(len, sets)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need at least {neighbours + 1} images a side")
    real, generated = (features - sets[0].mean(axis=0) for features in sets)
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(points, manifold, neighbours):
    radii = np.concatenate(
        [np.partition(rows, neighbours)[:, neighbours] for rows in _distances(manifold, manifold)]
    )
    return float(
        np.mean([(row <= radii).any() for rows in _distances(points, manifold) for row in rows])
    )


def _distances(rows, columns):
    """Yield squared distances (1000, M), rows by thousands: all at once would take gigabytes."""
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        squares = (part**2).sum(axis=1)[:, np.newaxis] + (columns**2).sum(axis=1)
        yield np.maximum(squares - 2 * part @ columns.T, 0)


def quick_metrics(ruler, images):
    """Return what every epoch reports, by name, from uint8 images (N, H, W, C)."""
    features, probabilities = measure(ruler.outputs, images)
    score, deviation = inception_score(probabilities)
    histogram = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
    return {
        "inception_score": score,
        "inception_score_std": deviation,
        "fid": frechet_distance(*feature_statistics(features), ruler.mean, ruler.covariance),
        # Covered: at least a tenth of an even share, so that a stray image doesn't count.
        "classes_covered": int((histogram >= len(images) / len(histogram) / 10).sum()),
        "class_histogram": (histogram / len(images)).tolist(),
    }


def evaluate_images(images, settings):
    """Return every metric by name for uint8 images (N, H, W, C), against `settings.dataset`.

    Raises UsageError for fewer than 100 images or another shape or type.
    """
    images = as_dataset(images).images
    if len(images) < 100:
        raise UsageError(f"{len(images)} images are too few to measure; 100 are the least")
    dataset = load_dataset(settings)
    ruler = load_ruler(settings, dataset)
    random = np.random.default_rng(0)
    sample = random.choice(len(dataset.images), min(len(images), len(dataset.images)), False)
    real, _ = measure(ruler.outputs, dataset.images[np.sort(sample)])
    features, _ = measure(ruler.outputs, images)
    kid, kid_deviation = kernel_inception_distance(real, features)
    precision, recall = precision_recall(real, features)
    return {
        "images": len(images),
        "dataset": dataset.name,
        "inception": ruler.name,
        **quick_metrics(ruler, images),
        "kid": kid,
        "kid_std": kid_deviation,
        "precision": precision,
        "recall": recall,
    }


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def latent_points(generator, count, seed):
    """Return the same `count` latent points float32 (count, LATENT_DIM) for the same seed."""
    size = generator.inputs[0].shape[-1]
    return tf.random.stateless_normal((count, size), (seed, 1)).numpy()


def class_count(generator):
    """Return how many classes the generator takes, 0 where it takes none."""
    if len(generator.inputs) == 1:
        return 0
    encoders = [x for x in generator.layers if isinstance(x, keras.layers.CategoryEncoding)]
    return encoders[0].num_tokens


def draw(generator, latent, labels=None):
    """Return uint8 images (N, H, W, C) of latent points (N, LATENT_DIM), and classes if it takes any."""
    conditional = len(generator.inputs) == 2
    parts = []
    for start in range(0, len(latent), 1000):
        inputs = [tf.constant(latent[start : start + 1000])]
        if conditional:
            inputs.append(tf.constant(labels[start : start + 1000], tf.int32))
        images = generator(inputs if conditional else inputs[0], training=False)
        parts.append(tf.cast(tf.round((images + 1) * 127.5), tf.uint8).numpy())
    return np.concatenate(parts)


def generate(generator, count, digits=None, seed=None):
    """Return uint8 images (N, H, W, C), N being `count`, or `count` rows of `digits` if given.

    Without digits a conditional generator draws its classes in turn. Without a seed each call
    draws others. Raises UsageError for digits that the generator doesn't know.
    """
    return _generate_labelled(generator, count, digits, seed)[0]


def _generate_labelled(generator, count, digits=None, seed=None):
    classes = class_count(generator)
    if digits is not None:
        digits = [int(digit) for digit in digits]
        if not classes:
            raise UsageError("this generator is unconditional: it cannot be asked for digits")
        if not digits or max(digits) >= classes or min(digits) < 0:
            raise UsageError(f"digits must be classes from 0 to {classes - 1}, not {digits}")
    labels = np.tile(digits, count) if digits else np.arange(count) % max(classes, 1)
    if seed is None:
        seed = int.from_bytes(os.urandom(3), "big")
    latent = latent_points(generator, len(labels), seed)
    return draw(generator, latent, labels), (labels.astype(np.uint8) if classes else None)


def mosaic(images, columns):
    """Return one picture (rows * H, columns * W, C) of images (N, H, W, C), black where they end."""
    height, width, channels = images.shape[1:]
    rows = math.ceil(len(images) / columns)
    canvas = np.zeros((rows * columns, height, width, channels), np.uint8)
    canvas[: len(images)] = images
    canvas = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return canvas.reshape(rows * height, columns * width, channels)


def save_grid(path, images, columns, title=""):
    """Write a PNG of images (N, H, W, C), two pixels for each of theirs, under a title."""
    from matplotlib.figure import Figure

    picture = mosaic(images, columns)
    height, width = 2 * picture.shape[0], 2 * picture.shape[1]
    strip = 36 if title else 0  # pixels for the title
    figure = Figure(figsize=(width / 100, (height + strip) / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, height / (height + strip)))
    axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    if title:
        figure.text(0.5, 1 - strip / 2 / (height + strip), title, ha="center", va="center")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def save_metrics_plot(path, history, title):
    """Write metrics.png: losses, Inception score, FID and class shares against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    figure.suptitle(title)
    losses, score, distance, shares = figure.subplots(2, 2).ravel()
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["discriminator_loss"] for row in history], label="discriminator")
    losses.plot(epochs, [row["generator_loss"] for row in history], label="generator")
    losses.set(title="Losses", ylabel="mean over the epoch")
    losses.legend()
    measured = [row for row in history if row["fid"] is not None]
    epochs = [row["epoch"] for row in measured]
    mean, deviation = (
        np.array([row[name] for row in measured])
        for name in ("inception_score", "inception_score_std")
    )
    score.plot(epochs, mean)
    score.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.3)
    score.set(title="Inception score: higher is better", ylabel="score (shade: deviation)")
    distance.semilogy(epochs, [row["fid"] for row in measured])
    distance.set(title="Fréchet Inception distance: lower is better", ylabel="FID (log scale)")
    histograms = np.array([row["class_histogram"] for row in measured]).T.reshape(-1, len(measured))
    for digit, share in enumerate(histograms):
        shares.plot(epochs, 100 * share, label=str(digit))
    shares.set(title="Share of each class among the samples", ylabel="%", ylim=(0, None))
    shares.legend(ncols=5, fontsize="small")
    for axes in (losses, score, distance, shares):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def save_animation(path, frames, frames_per_second):
    """Write a GIF of equally large pictures (H, W), (H, W, 3) or (H, W, 4), one pixel for each."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    height, width = frames[0].shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    shown = figure.add_axes((0, 0, 1, 1)).imshow(
        frames[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    shown.axes.set_axis_off()
    writer = PillowWriter(fps=frames_per_second)
    with replacing(path) as temporary, writer.saving(figure, temporary, dpi=100):
        for frame in frames:
            shown.set_data(frame)
            writer.grab_frame()


def latent_walk(generator, digits, seed, frames=120, stops=6):
    """Return pictures (H, columns * W) of a smooth round trip through latent space.

    One column for each digit (ten without classes), all through the same `stops` latent points,
    along great circles between them (spherical interpolation, arXiv 1609.04468).
    """
    classes = class_count(generator)
    columns = list(digits) if digits else list(range(classes or 10))
    points = latent_points(generator, stops * (1 if classes else len(columns)), seed)
    points = points.reshape(stops, -1, points.shape[-1])
    pictures = []
    for position in np.arange(frames) * stops / frames:
        here, share = int(position), position % 1
        latent = _slerp(points[here], points[(here + 1) % stops], share)
        latent = np.broadcast_to(latent, (len(columns), latent.shape[-1]))
        pictures.append(mosaic(draw(generator, latent, np.array(columns)), len(columns)).squeeze())
    return [np.kron(picture, np.ones((2, 2), np.uint8)) for picture in pictures]


def _slerp(start, end, share):
    lengths = np.linalg.norm(start, axis=-1) * np.linalg.norm(end, axis=-1)
    angle = np.arccos(np.clip((start * end).sum(axis=-1) / lengths, -1, 1))[:, np.newaxis]
    path = np.sin((1 - share) * angle) * start + np.sin(share * angle) * end
    return (path / np.sin(angle)).astype(np.float32)


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------

SHIPPED_GENERATOR = HERE / "weights" / "mnist_generator.h5"
PLAIN_LAYERS = {  # what a file may be made of: nothing in it runs code
    *("InputLayer", "Dense", "BatchNormalization", "ReLU", "LeakyReLU", "Activation", "Reshape"),
    *("Flatten", "Concatenate", "CategoryEncoding", "Conv2D", "Conv2DTranspose", "MaxPooling2D"),
    *("AveragePooling2D", "GlobalAveragePooling2D", "Dropout", "UpSampling2D", "Embedding"),
}
MAY_CHANGE = {  # on --resume
    *("epochs", "max_minutes", "samples_dir", "checkpoints_dir", "evaluation_images"),
    *("evaluate_every", "sample_every", "checkpoint_every"),
}


def save_keras(model, path):
    """Write a Keras model to an .h5 that plain keras.models.load_model opens."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "this file format is considered legacy": people ask for .h5
    try:
        with replacing(path) as temporary:
            model.save(temporary)
    finally:
        logger.setLevel(level)


def load_keras(path):
    """Return the Keras model in an .h5. Raises UsageError for a file that isn't one or isn't safe."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    try:
        with h5py.File(path) as file:
            config = json.loads(file.attrs["model_config"])["config"]
            kinds = {layer["class_name"] for layer in config["layers"]}
        if not kinds <= PLAIN_LAYERS:
            raise UsageError(f"{path} has layers that are refused: {sorted(kinds - PLAIN_LAYERS)}")
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} is not a Keras model that can be read: {reason}") from None


def load_generator(path=None, settings=Settings()):
    """Return the Keras generator in `path`.

    Without a path: checkpoints/generator_best.h5 where a run left one, else the shipped one.
    Raises UsageError for a file that is missing, damaged, unsafe or not a generator.
    """
    path = path or _default_generator(settings)
    model = load_keras(path)
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    takes = [len(shape) for shape in shapes] in ([2], [2, 1]) and shapes[0][1] is not None
    if not takes or len(model.output_shape) != 4 or class_count(model) is None:
        raise UsageError(f"{path} is not a generator: it takes {shapes}, not latent (and class)")
    return model


def _default_generator(settings):
    best = Path(settings.checkpoints_dir, "generator_best.h5")
    return best if best.exists() else SHIPPED_GENERATOR


def save_state(manager, state, history):
    """Save all that --resume needs, and the three newest of its kind are kept."""
    state.history.assign(json.dumps(history))
    manager.save(checkpoint_number=state.step)


def restore_state(manager, state, settings):
    """Restore the newest state and return its history.

    Raises UsageError where there is none or `settings` cannot continue it.
    """
    folder = Path(manager.directory)
    if not manager.latest_checkpoint:
        raise UsageError(f"there is nothing to resume in {folder}; start with: python gan_mnist.py")
    before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    now = json.loads(_settings_json(settings))
    different = [
        f"--{name.replace('_', '-')} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in MAY_CHANGE and before.get(name) != value
    ]
    if different:
        raise UsageError("cannot resume with other settings: " + "; ".join(different))
    state.restore(manager.latest_checkpoint).assert_consumed()
    return json.loads(state.history.numpy())


def _settings_json(settings):
    return json.dumps(dataclasses.asdict(settings), indent=1)


def start_state_folder(folder, settings):
    """Make room for a fresh run's state; what an earlier run left moves to previous/."""
    if folder.exists():
        previous = folder.parent / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for old in [folder, *folder.parent.glob("generator_*.h5")]:
            old.rename(previous / old.name)
        print(
            f"An earlier run's files are now in {previous}; to go on with it:\n"
            f"  python gan_mnist.py train --resume --checkpoints-dir {previous}"
        )
    folder.mkdir(parents=True)
    with replacing(folder / "settings.json") as temporary:
        temporary.write_text(_settings_json(settings), encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------

STEPS_PER_CALL = 26  # in one compiled call; between calls come the progress bar and Ctrl-C
COLUMNS = (
    *("epoch", "step", "seconds", "images_per_second", "discriminator_loss", "generator_loss"),
    *("inception_score", "inception_score_std", "fid", "classes_covered", "dataset", "inception"),
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after all was saved."""


class Run(NamedTuple):
    """What the epochs of one run share."""

    settings: Settings
    dataset: Dataset
    state: "tf.train.Checkpoint"
    manager: "tf.train.CheckpointManager"
    train_steps: callable
    ruler: Ruler
    latent: np.ndarray  # the points that every measurement and grid are drawn from
    labels: np.ndarray
    history: list  # a dict an epoch
    summary: "tf.summary.SummaryWriter"
    stop: threading.Event  # set by Ctrl-C
    started: float  # on the monotonic clock, less what earlier sessions took

    @property
    def steps_per_epoch(self):
        return len(self.dataset.images) // self.settings.batch_size

    @property
    def samples(self):
        return Path(self.settings.samples_dir)

    @property
    def checkpoints(self):
        return Path(self.settings.checkpoints_dir)

    def progress(self):
        """Return the share of the run that is done, 0 to 1: of its epochs or of its minutes."""
        share = int(self.state.step) / (self.settings.epochs * self.steps_per_epoch)
        if self.settings.max_minutes:
            minutes = (time.monotonic() - self.started) / 60
            share = max(share, minutes / self.settings.max_minutes)
        return min(1.0, share)

    def is_over(self):
        return self.stop.is_set() or self.progress() >= 1


def train(dataset=None, epochs=None, settings=Settings(), resume=False):
    """Train, measure, leave pictures and checkpoints; return the averaged generator.

    `dataset` is a Dataset, uint8 images (N, 28, 28) or (N, 28, 28, 1), or None for
    `settings.dataset`. Raises UsageError for settings or images that don't fit, RunError when
    the losses stop being finite, and Interrupted after Ctrl-C, when all is saved.
    """
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    _refuse_unwritable_folders(settings)
    if dataset is None:
        dataset = load_dataset(settings)
    elif not isinstance(dataset, Dataset):
        dataset = as_dataset(dataset)
    if len(dataset.images) < settings.batch_size:
        raise UsageError(
            f"{dataset.name} has {len(dataset.images)} images, less than a batch: "
            f"--batch-size is {settings.batch_size}"
        )
    if dataset.labels is None and settings.conditional:
        print(f"{dataset.name} has no labels: training without classes.")
        settings = dataclasses.replace(settings, conditional=False)
    with _stopping_on_signals() as stop:
        run = _prepare(settings, dataset, resume, stop)
        while not run.is_over():
            _train_epoch(run)
            if not stop.is_set():
                _finish_epoch(run)
        return _finish(run)


def _refuse_unwritable_folders(settings):
    for folder in (settings.samples_dir, settings.checkpoints_dir):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(f"cannot write into {folder}: {error.strerror}") from None


@contextlib.contextmanager
def _stopping_on_signals():
    """Give an event that Ctrl-C and SIGTERM set; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_to_stop(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {name: signal.signal(name, ask_to_stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _prepare(settings, dataset, resume, stop):
    precision = choose_precision(settings)
    with tf.distribute.get_strategy().scope():
        state = new_state(settings, dataset, precision)
    folder = Path(settings.checkpoints_dir, "state")
    manager = tf.train.CheckpointManager(state, str(folder), max_to_keep=3)
    history = restore_state(manager, state, settings) if resume else []
    _print_banner(settings, dataset, state, precision)
    if not resume:
        start_state_folder(folder, settings)
    _start_metrics_file(settings, history)
    classes = dataset.classes if settings.conditional else 0
    return Run(
        settings=settings,
        dataset=dataset,
        state=state,
        manager=manager,
        train_steps=compile_training(state, dataset, settings),
        ruler=load_ruler(settings, dataset),
        latent=latent_points(state.average, max(100, settings.evaluation_images), settings.seed),
        labels=np.arange(max(100, settings.evaluation_images)) % max(1, classes),
        history=history,
        summary=tf.summary.create_file_writer(str(Path(settings.samples_dir, "tensorboard"))),
        stop=stop,
        started=time.monotonic() - float(state.seconds[1]),
    )


def _print_banner(settings, dataset, state, precision):
    gpus = tf.config.list_physical_devices("GPU")
    device = f"{len(gpus)} GPU" if gpus else f"CPU, {os.cpu_count()} cores"
    size = "x".join(map(str, dataset.images.shape[1:]))
    kind = "class-conditional" if settings.conditional else "unconditional"
    print(
        f"data           {dataset.name}: {len(dataset.images):,} images of {size}\n"
        f"generator      {state.generator.count_params():,} parameters, {settings.architecture},"
        f" {kind}\n"
        f"discriminator  {state.discriminator.count_params():,} parameters, {settings.loss} loss\n"
        f"device         {device}, {precision} products, TensorFlow {tf.__version__}\n"
    )
    print("epoch  seconds  images/s   D loss   G loss      IS      FID  classes", flush=True)


def _train_epoch(run):
    """Take the epoch's steps that are left, until its end, the run's end or Ctrl-C."""
    settings, state = run.settings, run.state
    epoch, first = divmod(int(state.step), run.steps_per_epoch)
    order = tf.random.experimental.stateless_shuffle(
        tf.range(len(run.dataset.images)), seed=(settings.seed, epoch)
    )
    bar = keras.utils.Progbar(
        run.steps_per_epoch,
        width=12,
        stateful_metrics=["images/s", "D loss", "G loss"],
        verbose=sys.stdout.isatty(),
    )
    while first < run.steps_per_epoch and not run.is_over():
        last = min(first + STEPS_PER_CALL, run.steps_per_epoch)
        rate = min(1.0, (1 - run.progress()) / max(1 - settings.decay_from, 1e-9))
        start = time.monotonic()
        run.train_steps(order, tf.constant(first), tf.constant(last), tf.constant(rate))
        losses = state.loss_sums.numpy() / last
        seconds = time.monotonic() - start
        state.seconds.assign([state.seconds[0] + seconds, time.monotonic() - run.started])
        speed = (last - first) * settings.batch_size / seconds
        first = last
        shown = [("images/s", speed), ("D loss", losses[0]), ("G loss", losses[1])]
        bar.update(first, shown, finalize=False)


def _finish_epoch(run):
    """Measure, report and save the epoch that was just trained."""
    settings, state = run.settings, run.state
    row = _training_row(run)
    is_last = run.progress() >= 1
    if row["epoch"] % settings.evaluate_every == 0 or is_last:
        row |= quick_metrics(run.ruler, _samples(run, settings.evaluation_images))
    run.history[:] = [old for old in run.history if old["epoch"] < row["epoch"]] + [row]
    _report(run, row)
    if row["epoch"] % settings.sample_every == 0 or is_last:
        _save_epoch_grid(run, row)
    save_keras(state.average, run.checkpoints / "generator_latest.h5")
    if row["epoch"] % settings.checkpoint_every == 0:
        save_keras(state.average, run.checkpoints / f"generator_model_epoch_{row['epoch']:03d}.h5")
    if row["fid"] is not None and row is _best(run.history):
        save_keras(state.average, run.checkpoints / "generator_best.h5")
    state.loss_sums.assign([0.0, 0.0])
    state.seconds.assign([0.0, time.monotonic() - run.started])
    save_state(run.manager, state, run.history)


def _training_row(run):
    state, step = run.state, int(run.state.step)
    steps = (step - 1) % run.steps_per_epoch + 1
    losses, seconds = state.loss_sums.numpy() / steps, float(state.seconds[0])
    if not np.isfinite(losses).all():
        raise RunError(
            f"the losses are no longer finite after step {step:,}; the last good state and "
            f".h5 files are kept. Try lower learning rates."
        )
    return {
        "epoch": (step - 1) // run.steps_per_epoch + 1,
        "step": step,
        "seconds": round(seconds, 3),
        "images_per_second": round(steps * run.settings.batch_size / seconds),
        "discriminator_loss": float(losses[0]),
        "generator_loss": float(losses[1]),
        **dict.fromkeys(COLUMNS[6:10]),
        "dataset": run.dataset.name,
        "inception": run.ruler.name,
    }


def _best(history):
    measured = [row for row in history if row["fid"] is not None]
    return min(measured, key=lambda row: row["fid"], default=None)


def _samples(run, count):
    return draw(run.state.average, run.latent[:count], run.labels[:count])


def _start_metrics_file(settings, history):
    with replacing(Path(settings.samples_dir, "metrics.csv")) as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(history)


def _report(run, row):
    with open(run.samples / "metrics.csv", "a", newline="") as file:
        csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(row)
    measured = " " * 25
    if row["fid"] is not None:
        measured = f"{row['inception_score']:8.3f} {row['fid']:8.3f} {row['classes_covered']:8d}"
    print(
        ("\r\033[K" if sys.stdout.isatty() else "")
        + f"{row['epoch']:5d} {row['seconds']:8.1f} {row['images_per_second']:9,d}"
        f" {row['discriminator_loss']:8.4f} {row['generator_loss']:8.4f} {measured}",
        flush=True,
    )
    with run.summary.as_default(step=row["epoch"]):
        for name in COLUMNS[3:10]:
            if row[name] is not None:
                _write_summary(name, "scalars", float(row[name]))
    run.summary.flush()


def _write_summary(tag, plugin, value):
    """Write for TensorBoard without its package, which tf.summary.scalar would import."""
    metadata = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": plugin})
    tf.summary.write(tag, value, metadata=metadata)


def _title(run, row):
    title = f"epoch {row['epoch']}"
    if row["fid"] is not None:
        title += f"    IS {row['inception_score']:.2f}    FID {row['fid']:.2f}"
    return title if run.dataset.name == "mnist" else f"{title}    {run.dataset.name}, not MNIST"


def _grid_path(run, epoch):
    return run.samples / f"image_at_epoch_{epoch:04d}.png"


def _save_epoch_grid(run, row):
    order = np.arange(100)
    if run.settings.conditional:  # a row a class
        order = np.argsort(run.labels[:100], kind="stable")
    path = _grid_path(run, row["epoch"])
    save_grid(path, _samples(run, 100)[order], columns=10, title=_title(run, row))
    with run.summary.as_default(step=row["epoch"]):
        png = path.read_bytes()
        _write_summary("samples", "images", tf.constant(["560", "596", png]))


def _finish(run):
    """Draw what a whole run leaves, say where it is; return the averaged generator."""
    done = run.history
    if done:
        save_metrics_plot(run.samples / "metrics.png", done, _title(run, done[-1]))
        frames = [_grid_path(run, row["epoch"]) for row in done]
        frames = [matplotlib_image.imread(path) for path in frames if path.exists()]
        save_animation(run.samples / "training.gif", frames, frames_per_second=6)
    if run.stop.is_set():
        save_state(run.manager, run.state, done)
        raise Interrupted
    best = _best(done)
    print(
        f"\nBest FID {best['fid']:.3f} after epoch {best['epoch']}: "
        f"{run.checkpoints / 'generator_best.h5'}\n"
        f"Look at {run.samples / 'training.gif'} and {run.samples / 'metrics.png'}; "
        "draw more with: python gan_mnist.py generate"
    )
    return run.state.average


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

OPTIONS = {  # beside the settings: the commands that take it, and what argparse needs to know
    "resume": ({"train"}, {"action": "store_true", "help": "go on from the newest good state"}),
    "checkpoint": ({"generate", "evaluate"}, {"help": "the generator's .h5 (default: the best)"}),
    "count": ({"generate", "evaluate"}, {"type": int, "help": "images, or rows of --digits"}),
    "digits": ({"generate"}, {"help": "which ones, like 2026 (default: each class in turn)"}),
    "output": ({"generate"}, {"help": ".png grid, .npz, .gif walk, or a folder of PNGs"}),
    "images": ({"evaluate"}, {"help": "an .npz of images to measure instead of a generator"}),
    "json": ({"evaluate"}, {"action": "store_true", "help": "print JSON"}),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists what there is)")


def parse_command_line(arguments):
    """Return (command, Settings, options by name). Raises UsageError."""
    parser = _Parser(
        prog="gan_mnist.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", default="train", choices=sorted(COMMANDS))
    options = parser.add_argument_group("options of the commands")
    for name, (commands, details) in OPTIONS.items():
        details = {**details, "help": f"{'/'.join(sorted(commands))}: {details['help']}"}
        options.add_argument(f"--{name}", **details)
    settings = parser.add_argument_group("settings")
    for name, words in HELP.items():
        default = _as_typed(globals()[name])
        settings.add_argument(
            f"--{name.lower().replace('_', '-')}",
            metavar="VALUE",
            help=f"{words} [{default}]".replace("%", "%%"),
        )
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    for name in options:
        if command not in OPTIONS[name][0]:
            raise UsageError(f"--{name} goes with {' and '.join(sorted(OPTIONS[name][0]))}")
    if not 1 <= options.get("count", 1) <= 1_000_000:
        raise UsageError(f"--count is {options['count']}, but must be from 1 to 1,000,000")
    values = {name: parse_setting(name, text) for name, text in given.items()}
    return command, Settings(**values), options


def _as_typed(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _start_tensorflow():
    """Import TensorFlow in silence and set it up for many small steps."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with _silent_stderr():
        gpus = tf.config.list_physical_devices("GPU")
        tf.config.experimental.enable_op_determinism()
        # The step's products are small: two of them at once on a core each take two thirds of
        # the time of one after the other on two cores (6.5 ms a step against 9.3 ms).
        tf.config.threading.set_inter_op_parallelism_threads(2)
        tf.config.threading.set_intra_op_parallelism_threads(max(1, (os.cpu_count() or 2) // 2))
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.zeros(1)


@contextlib.contextmanager
def _silent_stderr():
    """Hold back what C++ prints to stderr, which no log level silences; show it on an error."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(before, held.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)


def _train_command(settings, options):
    train(settings=settings, resume="resume" in options)


def _generate_command(settings, options):
    output = Path(options.get("output", Path(settings.samples_dir, "generated.png")))
    if output.suffix and output.suffix not in (".png", ".npz", ".gif"):
        raise UsageError(f"--output is {str(output)!r}, but must end in .png, .npz, .gif or /")
    digits = options.get("digits")
    if digits is not None and not re.fullmatch(r"[0-9]+", digits):
        raise UsageError(f"--digits is {digits!r}, but must be digits like 2026")
    path = Path(options.get("checkpoint", _default_generator(settings)))
    generator = load_generator(path, settings)
    if output.suffix == ".gif":
        pictures = latent_walk(generator, digits and [int(d) for d in digits], settings.seed)
        _write_output(output, lambda: save_animation(output, pictures, frames_per_second=20))
    else:
        count = options.get("count", 10 if digits else 100)
        images, labels = _generate_labelled(generator, count, digits, settings.seed)
        _write_output(output, lambda: _save_images(output, images, labels, len(digits or "x" * 10)))
    print(f"Drawn by {path}: {output}")


def _write_output(output, write):
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None


def _save_images(output, images, labels, columns):
    if output.suffix == ".png":
        save_grid(output, images, columns)
    elif output.suffix == ".npz":
        arrays = {"images": images} | ({} if labels is None else {"labels": labels})
        with replacing(output) as temporary:
            np.savez_compressed(temporary, **arrays)
    else:
        output.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            label = "" if labels is None else f"_class_{labels[number]}"
            with replacing(output / f"{number:06d}{label}.png") as temporary:
                matplotlib_image.imsave(temporary, image.squeeze(), cmap="gray", vmin=0, vmax=255)


def _evaluate_command(settings, options):
    if "images" in options and "checkpoint" in options:
        raise UsageError("--images and --checkpoint exclude each other")
    count = options.get("count")
    if "images" in options:
        path = Path(options["images"])
        images = _load_npz_dataset(path).images[:count]
    else:
        path = Path(options.get("checkpoint", _default_generator(settings)))
        generator = load_generator(path, settings)
        images = generate(generator, count or settings.evaluation_images, seed=settings.seed)
    metrics = {"measured": str(path), **evaluate_images(images, settings)}
    if "json" in options:
        print(json.dumps(metrics))
        return
    for name, value in metrics.items():
        if name == "class_histogram":
            value = "  ".join(f"{100 * share:.1f}" for share in value) + "  %"
        print(f"{name:20}  {value:.4f}" if isinstance(value, float) else f"{name:20}  {value}")


def _inception_command(settings, options):
    arrays = load_mnist()
    if arrays is None:
        raise RunError("the Inception model needs MNIST, and there is none")
    network, accuracy = train_inception(arrays)
    print(f"{network.count_params():,} parameters, {accuracy:.2%} of the test images read right")
    path = HERE / "weights" / f"{INCEPTION_NAME}.h5"
    path.parent.mkdir(exist_ok=True)
    save_keras(network, path)
    dataset = Dataset(arrays["x_train"][..., np.newaxis], None, "images to take statistics of")
    ruler = load_ruler(settings, dataset)
    with replacing(path.with_suffix(".npz")) as temporary:
        np.savez(temporary, mean=ruler.mean, covariance=ruler.covariance)
    print(f"Written: {path} and {path.with_suffix('.npz').name}")


COMMANDS = {
    "train": _train_command,
    "generate": _generate_command,
    "evaluate": _evaluate_command,
    "inception": _inception_command,
}


def main(arguments=None):
    """Run the command line; return the exit status."""
    try:
        command, settings, options = parse_command_line(arguments)
        _start_tensorflow()
        COMMANDS[command](settings, options)
    except UsageError as error:
        print(f"gan_mnist.py: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"gan_mnist.py: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        print("\nStopped, all is saved. Go on with:\n  " + _resume_command(arguments))
        return 130
    except KeyboardInterrupt:
        return 130
    return 0


def _resume_command(arguments):
    rest = sys.argv[1:] if arguments is None else list(arguments)
    flags = [flag for flag in rest if flag not in ("train", "--resume")]
    return shlex.join(["python", "gan_mnist.py", "train", "--resume", *flags])


if __name__ == "__main__":
    sys.exit(main())
