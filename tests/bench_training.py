"""Measure gan_mnist.py's quality and speed against its goals, on this machine.

    python tests/bench_training.py                                   all: an hour and a half
    python tests/bench_training.py --parts minute,seeds --seeds 3    some of it
    python tests/bench_training.py --parts losses --loss-minutes 1   every loss, in a minute each
    python tests/bench_training.py --parts speed --torch-python F    F: a Python that has PyTorch

Needs MNIST in the Keras cache, and nothing else running. Pictures are judged by classifiers of
other builds than the ruler that gan_mnist.py ships, trained at first use (ten minutes) and kept in
the Keras home as judge*.keras and .npz: FID under each is another number than the ruler's. Class-
conditional generators draw MNIST's own share of each class. ONEDNN_MAX_CPU_ISA=AVX512_CORE or AVX2
takes AMX away from a processor that has it (then add --precision float32).
"""

import argparse
import contextlib
import csv
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

# TensorFlow and PyTorch are imported by workers alone, each a process of its own: a child's peak
# memory as the kernel reports it starts at its parent's, so the parent has to stay small.

PROGRAM = Path(__file__).resolve().parent.parent / "gan_mnist.py"
KERAS_HOME = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
MNIST = KERAS_HOME / "datasets" / "mnist.npz"
JUDGE_EPOCHS = 12
PRECISION = ["auto"]  # --precision of this bench
IMAGES_SEED = 12_345  # latent points that no run measures itself by
KINDS = {"conditional": "true", "unconditional": "false"}
# The goals were set under a judge that gives MNIST's own test images FID 0.042 (blurred by 0.7
# pixels: 4.7). Every CNN has a scale of its own, so distances here are scaled to that 0.042.
TEST_FID = 0.042
FID_GOALS = {  # at most, at full length
    ("minute", "conditional"): 1.0,
    ("minute", "unconditional"): 4.0,
    ("default", "conditional"): 0.12,
    ("default", "unconditional"): 1.0,
    ("conv", "ten minutes"): 0.2,
}
MNIST_SHARES = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]) / 60_000
LOSS_FID_GOAL = 30  # of every loss with each architecture
LOSSES = {  # name: flags; the penalties are the default ones but for the last
    name: ("--loss", name)
    for name in (
        "non_saturating",
        "minimax",
        "least_squares",
        "hinge",
        "wasserstein",
        "relativistic",
    )
} | {"wgan_gp": ("--loss", "wasserstein", "--r1", "0", "--r2", "0", "--gradient-penalty", "10")}
# 784 <- 1024 <- 512 <- 256 <- 128 <- 100 against 784 -> 1024 -> 512 -> 256 -> 1
POPULAR = """
    --latent-dim 100 --generator-widths 128,256,512,1024 --discriminator-widths 1024,512,256
    --batch-size 64 --loss non_saturating --r1 0 --r2 0 --shift 0 --minibatch-std false
    --conditional false --generator-learning-rate 2e-4 --discriminator-learning-rate 2e-4
    --decay-from 1 --weight-decay 0 --beta-1 0.5 --beta-2 0.999
    --evaluation-images 100 --evaluate-every 2 --sample-every 2
"""


class Run(NamedTuple):
    """What a training run left."""

    wall: float  # seconds from the command to its exit
    peak: float  # GB of memory
    first_row: float  # seconds from the command to the first epoch's row in the terminal
    rows: list  # of metrics.csv
    generator: Path


def train(work, *flags):
    """Run `python gan_mnist.py FLAGS` in a new folder within `work`; return its Run."""
    folder = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, PROGRAM, *flags, "--precision", PRECISION[0]]
    start = time.monotonic()
    with (
        open(folder / "errors", "w+") as errors,
        subprocess.Popen(command, cwd=folder, text=True, stdout=-1, stderr=errors) as process,
    ):
        lines = [(time.monotonic() - start, line.split()) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        errors.seek(0)
        refuse_failure("gan_mnist.py", process.returncode, errors.read())
    with open(folder / "samples" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows[-1]["dataset"] == "stand-in":
        sys.exit(f"bench_training.py: {MNIST} is not MNIST: the run took a stand-in")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
    first_row = next(
        (at for at, words in lines if words[:1] and words[0].startswith("1/")), math.nan
    )
    return Run(wall, peak, first_row, rows, folder / "checkpoints" / "generator_latest.h5")


def refuse_failure(name, status, errors):
    """Exit with the last line of `errors` where `status` is not 0."""
    if status:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        sys.exit(f"bench_training.py: {name} failed with exit status {status}: {last}")


def worker(name, *arguments, python=sys.executable):
    """Return what the function WORKERS[name] returns, called in a process of its own."""
    command = [python, __file__, "--worker", name, *map(str, arguments)]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    refuse_failure(f"worker {name}", done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# The judge ---------------------------------------------------------------------------------------


def load_mnist():
    """Return MNIST's arrays by name, images as float32 (N, 28, 28, 1) in [0, 1]."""
    with np.load(MNIST, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    for name in ("x_train", "x_test"):
        arrays[name] = arrays[name][..., np.newaxis].astype(np.float32) / 255
    return arrays


def small_filters(image):
    """Return 128 features by 3x3 convolutions."""
    from keras import layers

    hidden = layers.MaxPooling2D(2)(layers.Conv2D(32, 3, activation="relu")(image))
    hidden = layers.Conv2D(64, 3, activation="relu")(hidden)
    hidden = layers.MaxPooling2D(2)(layers.Conv2D(64, 3, activation="relu")(hidden))
    hidden = layers.Dropout(0.3)(layers.Flatten()(hidden))
    return layers.Dense(128, activation="relu")(hidden)


def large_filters(image):
    """Return 128 features by 5x5 convolutions with batch normalisation."""
    from keras import layers

    hidden = image
    for filters in (32, 64):
        hidden = layers.Conv2D(filters, 5, use_bias=False)(hidden)
        hidden = layers.MaxPooling2D(2)(layers.ReLU()(layers.BatchNormalization()(hidden)))
    return layers.Dense(128, activation="relu")(layers.Flatten()(hidden))


def no_filters(image):
    """Return 128 features without any convolution."""
    from keras import layers

    hidden = layers.Dropout(0.2)(layers.Flatten()(image))
    hidden = layers.Dropout(0.3)(layers.Dense(1024, activation="relu")(hidden))
    return layers.Dense(128, activation="relu")(hidden)


JUDGES = {"judge": small_filters, "judge_5x5": large_filters, "judge_dense": no_filters}


def train_judge(name, images, labels):
    """Train a classifier on images (N, 28, 28, 1) in [0, 1]; write it with [features, logits]."""
    import keras

    keras.utils.set_random_seed(7)
    image = keras.Input((28, 28, 1))
    features = JUDGES[name](image)
    logits = keras.layers.Dense(10)(keras.layers.Dropout(0.5)(features))
    rate = keras.optimizers.schedules.CosineDecay(2e-3, JUDGE_EPOCHS * math.ceil(len(images) / 128))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier = keras.Model(image, logits)
    classifier.compile(keras.optimizers.Adam(rate), loss)
    classifier.fit(images, labels, batch_size=128, epochs=JUDGE_EPOCHS, verbose=0)
    keras.Model(image, [features, logits]).save(KERAS_HOME / f"{name}.keras")


def judge_images(name, images):
    """Return feature mean and covariance, and digits (N,), seen in (N, 28, 28, 1) in [0, 1]."""
    import keras

    judge = keras.models.load_model(KERAS_HOME / f"{name}.keras", compile=False)
    features, logits = judge.predict(images, batch_size=500, verbose=0)
    features = features.astype(np.float64)
    return (features.mean(axis=0), np.cov(features, rowvar=False)), logits.argmax(axis=1)


def judge_scale(name):
    """Train the judge if need be; return its test accuracy and scaled FIDs of known images."""
    known = KERAS_HOME / f"{name}.npz"
    if not known.exists():
        from scipy.ndimage import gaussian_filter

        arrays = load_mnist()
        test = arrays["x_test"]
        train_judge(name, arrays["x_train"], arrays["y_train"])
        real, _ = judge_images(name, arrays["x_train"])
        seen, digits = judge_images(name, test)
        blurred, _ = judge_images(name, gaussian_filter(test, (0, 0.7, 0.7, 0)))
        noise, _ = judge_images(name, np.random.default_rng(0).random(test.shape, np.float32))
        fids = [distance(real, other) for other in (seen, blurred, noise)]
        accuracy = (digits == arrays["y_test"]).mean()
        unit = TEST_FID / fids[0]
        scale = [accuracy, *(unit * fid for fid in fids), fids[0]]
        np.savez(known, mean=real[0], covariance=real[1], scale=scale, unit=unit)
    with np.load(known) as arrays:
        return arrays["scale"].tolist()


def distance(one, other):
    """Return the Fréchet distance of two (mean, covariance), arXiv 1706.08500."""
    values, vectors = np.linalg.eigh(one[1])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other[1] @ root).clip(0)).sum()
    return float(((one[0] - other[0]) ** 2).sum() + np.trace(one[1] + other[1]) - 2 * cross)


def score(path):
    """Return a generator's FID by each judge, class shares (10,), share of asked digits read."""
    sys.path.insert(0, str(PROGRAM.parent))
    import gan_mnist

    generator = gan_mnist.load_generator(path)
    classes = np.sort(np.load(MNIST)["y_train"])[::6]  # each class's exact share
    asked = np.random.default_rng(0).permutation(classes)
    latent = gan_mnist.latent_points(generator, len(asked), IMAGES_SEED)
    images = gan_mnist.draw(generator, latent, asked).astype(np.float32) / 255
    fids, readings = [], []
    for name in JUDGES:
        seen, digits = judge_images(name, images)
        with np.load(KERAS_HOME / f"{name}.npz") as known:
            fids.append(known["unit"] * distance((known["mean"], known["covariance"]), seen))
        readings.append(digits)
    shares = np.bincount(readings[0], minlength=10) / len(images)
    right = float((readings[0] == asked).mean()) if len(generator.inputs) == 2 else None
    return list(map(float, fids)), shares.tolist(), right


def epoch_seconds(epochs):
    """Return the seconds that the parts of an epoch took, the first epoch left out, by name."""
    sys.path.insert(0, str(PROGRAM.parent))
    import gan_mnist

    seconds = {"train_epoch": [], "measure_epoch": [], "save_state": [], "write_epoch": []}
    for name, spent in seconds.items():
        setattr(gan_mnist, name, timed(getattr(gan_mnist, name), spent))
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(sys.stderr):
        folders = {"samples_dir": f"{work}/samples", "checkpoints_dir": f"{work}/checkpoints"}
        gan_mnist.train(settings=gan_mnist.Settings(epochs=epochs, **folders))
    return {name: spent[1:] for name, spent in seconds.items()}


def timed(function, spent):
    """Return the function as one that adds the seconds of each call to `spent`."""

    def call(*arguments):
        start = time.monotonic()
        result = function(*arguments)
        spent.append(time.monotonic() - start)
        return result

    return call


# The peer ----------------------------------------------------------------------------------------


def torch_networks():
    """Return POPULAR's generator and discriminator in PyTorch, layer by layer the same."""
    from torch import nn

    def stack(block, *widths):
        return [layer for pair in itertools.pairwise(widths) for layer in block(*pair)]

    def normalised(before, width):
        return nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)

    def leaky(before, width):
        return nn.Linear(before, width), nn.LeakyReLU(0.2, inplace=True)

    generator = stack(normalised, 100, 128, 256, 512, 1024)
    discriminator = stack(leaky, 784, 1024, 512, 256)
    return (
        nn.Sequential(*generator, nn.Linear(1024, 784), nn.Tanh()),
        nn.Sequential(*discriminator, nn.Linear(256, 1)),
    )


def torch_speed(path):
    """Return the popular loop's images per second, after an epoch to warm up, and its version.

    On the uint8 images in the .npz at `path`, eager, in float32. In its favour: no DataLoader and
    no reading of losses (the images are floats in memory), the fakes are drawn once for both
    updates, and the better counts of PyTorch's own choice of threads and one (on a busy machine
    one is up to four times as fast). (None, None) where PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        return None, None
    images = torch.from_numpy(np.load(path)["images"]).reshape(-1, 784).float() / 127.5 - 1
    networks = torch_networks()
    optimizers = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in networks]
    threads, speeds = torch.get_num_threads(), []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        start = time.monotonic()
        batches = torch.randperm(len(images)).split(64)[: len(images) // 64]
        for batch in batches:
            torch_step(images[batch], *networks, *optimizers)
        speeds.append(64 * len(batches) / (time.monotonic() - start))
    return max(speeds[1:]), torch.__version__


def torch_step(real, generator, discriminator, generator_optimizer, discriminator_optimizer):
    """Update the generator, then the discriminator, as the popular scripts do."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    generator_optimizer.zero_grad()
    fake = generator(torch.randn(len(real), 100))
    cross_entropy(discriminator(fake), ones).backward()
    generator_optimizer.step()
    discriminator_optimizer.zero_grad()
    real_loss = cross_entropy(discriminator(real), ones)
    fake_loss = cross_entropy(discriminator(fake.detach()), zeros)
    ((real_loss + fake_loss) / 2).backward()
    discriminator_optimizer.step()


# The parts ---------------------------------------------------------------------------------------


def verdict(**goals):
    """Return "met", or which of the goals (truth by name) were missed."""
    missed = [name for name, met in goals.items() if not met]
    return "missed: " + " ".join(missed) if missed else "met"


def scored(work, part, name, *flags):
    """Train with `flags`, print the run's row of the table, return its FID by the judge."""
    run = train(work, *flags)
    (fid, *others), shares, right = worker("score", run.generator)
    goals = {"FID": fid <= FID_GOALS.get((part, name), math.inf), "GB": run.peak <= 2}
    trained = sum(float(row["seconds"]) for row in run.rows) / run.wall
    if part in ("dense", "conv") and name in LOSSES:
        goals = {"FID": fid <= LOSS_FID_GOAL, "digits": sum(x >= 0.01 for x in shares) >= 8}
    if part == "default":
        goals["wall"] = run.wall <= 360
        goals["shares"] = np.abs(np.array(shares) - MNIST_SHARES).max() <= 0.02
        goals["read"] = right is None or right >= 0.99
    span = f"{100 * min(shares):.1f}-{100 * max(shares):.1f}"
    read = "-" if right is None else f"{100 * right:.2f}"
    print(
        f"{part:7} {name:13} {run.wall:6.1f} {run.peak:5.2f} {fid:8.3f}",
        *(f"{other:7.3f}" for other in others),
        f"{span:>10} {read:>6} {trained:5.0%}  {verdict(**goals)}",
        flush=True,
    )
    return fid


def minute(work, options):
    """One minute of training, with and without classes."""
    for name, value in KINDS.items():
        flags = ("--max-minutes", str(options.minutes), "--conditional", value)
        scored(work, "minute", name, *flags)


def default(work, options):
    """The default run to its end, with and without classes."""
    epochs = ("--epochs", str(options.epochs)) if options.epochs else ()
    for name, value in KINDS.items():
        scored(work, "default", name, "--conditional", value, *epochs)


def seeds(work, options):
    """The one-minute run from several seeds."""
    flags = ("--max-minutes", str(options.minutes), "--seed")
    fids = [scored(work, "seeds", f"seed {n}", *flags, str(n)) for n in range(options.seeds)]
    worst, median = max(fids), statistics.median(fids)
    print(
        f"seeds   FID worst {worst:.3f}, median {median:.3f}, ratio {worst / median:.2f};"
        f" goal 1.5: {verdict(ratio=worst <= 1.5 * median)}"
    )


def measuring(work, options):
    """The share of an epoch that measuring takes, and all that is not training."""
    spent = {name: sum(x) for name, x in worker("epoch", options.measured_epochs).items()}
    whole = sum(spent.values())
    shares = ", ".join(f"{name} {x / whole:.1%}" for name, x in spent.items())
    measured = spent["measure_epoch"] / whole
    print(f"measure of {whole:.1f} s, {shares}; goal 15%: {verdict(share=measured <= 0.15)}")


def conv(work, options):
    """Ten minutes of the convolutional networks, and the time of an epoch of theirs."""
    flags = ("--architecture", "conv", "--max-minutes", str(10 * options.minutes))
    scored(work, "conv", "ten minutes", *flags)
    seconds = float(train(work, *flags[:2], "--epochs", "2").rows[-1]["seconds"])
    print(f"conv    an epoch takes {seconds:.1f} s; goal 30: {verdict(s=seconds <= 30)}")


def losses(work, options):
    """Every loss with each architecture, unconditional: the harder game, that loses digits."""
    minutes = ("--max-minutes", str(options.loss_minutes), "--conditional", "false")
    for architecture, (name, flags) in itertools.product(("dense", "conv"), LOSSES.items()):
        scored(work, architecture, name, "--architecture", architecture, *flags, *minutes)


def speed(work, options):
    """Images per second at the popular nets, against eager PyTorch, in turn."""
    images = Path(work, "mnist.npz")
    np.savez(images, images=np.load(MNIST)["x_train"][: options.images])
    flags = ("--dataset", str(images), "--inception", "mnist", "--epochs", "2")
    ratios = []
    for _ in range(options.pairs):
        # The second epoch: the first one's time has the tracing in it.
        rows = train(work, *POPULAR.split(), *flags).rows
        ours = float(rows[-1]["images_per_second"])
        print(f"speed   images/s: gan_mnist.py {ours:,.0f}", end="", flush=True)
        peer, version = worker("torch", images, python=options.torch_python)
        if peer is None:
            print(", PyTorch not installed (see --torch-python)", flush=True)
            continue
        ratios.append(ours / peer)
        print(f", PyTorch {version} {peer:,.0f}, ratio {ratios[-1]:.2f}", flush=True)
    if ratios:
        median = statistics.median(ratios)
        print(f"speed   median ratio {median:.2f}; goal 3.5: {verdict(ratio=median >= 3.5)}")


def start(work, options):
    """Seconds from the command to the end of the first training step; peak memory.

    Neither measured nor pictured, epoch 1 reports as soon as it is trained. That moment, less the
    time of a steady epoch (the second) but for one of its steps, is when the first step ended:
    imports, data, networks and tracing are in it, wherever the program does them.
    """
    run = train(work, "--epochs", "2", "--evaluate-every", "2", "--sample-every", "2")
    steady, steps = float(run.rows[1]["seconds"]), int(run.rows[0]["step"])
    seconds = run.first_row - steady * (1 - 1 / steps)
    print(f"start   first step done after {seconds:.1f} s; goal 12: {verdict(s=seconds <= 12)}")
    print(f"start   peak in two epochs {run.peak:.2f} GB; goal 2: {verdict(GB=run.peak <= 2)}")


# Command line ------------------------------------------------------------------------------------

PARTS = {
    function.__name__: function
    for function in (minute, default, seeds, measuring, conv, losses, speed, start)
}
WORKERS = {"judge": judge_scale, "score": score, "torch": torch_speed, "epoch": epoch_seconds}


def parse_command_line():
    """Return the options. Exits with status 2 for one that is not allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join(PARTS)
    parser.add_argument("--parts", default=every, help="which of %(default)s to measure")
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="of minute and seeds; conv: ten [1]"
    )
    parser.add_argument("--loss-minutes", type=float, default=3.0, help="of each of losses [3]")
    parser.add_argument("--epochs", type=int, default=0, help="of default [the program's own]")
    parser.add_argument("--seeds", type=int, default=5, help="how many [5]")
    parser.add_argument("--measured-epochs", type=int, default=8, help="of measuring [8]")
    parser.add_argument("--pairs", type=int, default=3, help="of speed, in turn [3]")
    parser.add_argument("--images", type=int, default=60_000, help="of speed's epochs [60000]")
    parser.add_argument("--precision", default="auto", help="of all runs of gan_mnist.py [auto]")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, but knows {every}")
    if not shutil.which(options.torch_python):
        parser.error(f"--torch-python is {options.torch_python!r}, which cannot be run")
    if min(options.seeds, options.pairs) < 1 or min(options.minutes, options.loss_minutes) <= 0:
        parser.error("--seeds and --pairs must be 1 or more, minutes more than 0")
    return options


def print_head(parts):
    """Print the machine and, for parts with pictures, the judge's scale and the table's head."""
    processor = Path("/proc/cpuinfo")
    amx = processor.exists() and "amx_bf16" in processor.read_text()
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores {'with' if amx else 'without'} AMX, TensorFlow"
        f" {importlib.metadata.version('tensorflow')}, load at the start {load:.1f},"
        f" ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA', '')}, {PRECISION[0]}",
        flush=True,
    )
    if load > os.cpu_count() / 4:
        print("Something else is, or was just, running: what follows is worth little.", flush=True)
    if set(parts) - {"speed", "start", "measuring"}:
        print("judges, of which each is trained once, in a few minutes:", flush=True)
        for name in JUDGES:
            accuracy, *fids = worker("judge", name)
            print(f"{name:12} reads {accuracy:.2%} of the test images right; FID of these", end=" ")
            print("{:.3f}, blurred {:.2f}, noise {:.0f}".format(*fids), end=" ")
            print(f"(scaled: by its own units the test images have {fids[3]:.3f})", flush=True)
        names = "FID     5x5   dense   shares % read % trains goal"
        print(f"\npart    run           wall s    GB      {names}", flush=True)


def main():
    """Measure the parts that were asked for, printing as they go; return the exit status."""
    options = parse_command_line()
    if options.worker:
        name, *arguments = options.worker
        print(json.dumps(WORKERS[name](*arguments)))
        return 0
    if not MNIST.is_file():
        sys.exit(f"bench_training.py: {MNIST} is missing; python gan_mnist.py downloads it")
    PRECISION[0] = options.precision
    print_head(options.parts)
    with tempfile.TemporaryDirectory() as work:
        for part in options.parts:
            PARTS[part](work, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
