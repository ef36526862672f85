"""What the tests share: synthetic digits, ways to run the program, and a few trained runs."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights"
sys.path.insert(0, str(ROOT))

import gan_mnist

QUIET_ONES = ("TF_CPP_MIN_LOG_LEVEL", "KERAS_BACKEND", "PYTHONWARNINGS")  # would hide log noise
NO_NETWORK = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
SEGMENTS = {  # of a seven-segment display: rows and columns of each bar
    "a": np.s_[4:7, 9:19],
    "b": np.s_[4:14, 16:19],
    "c": np.s_[14:24, 16:19],
    "d": np.s_[21:24, 9:19],
    "e": np.s_[14:24, 9:12],
    "f": np.s_[4:14, 9:12],
    "g": np.s_[12:15, 9:19],
}
LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
COLUMNS = [
    *("epoch", "step", "seconds", "images_per_second", "discriminator_loss", "generator_loss"),
    *("inception_score", "inception_score_std", "fid", "classes_covered", "dataset", "inception"),
]
# One process for many command lines: TensorFlow takes seconds to import.
DRIVER = """
import json, os, sys, traceback
import gan_mnist
for number, (arguments, folder) in enumerate(json.load(sys.stdin)):
    os.chdir(folder)
    for descriptor, kind in ((1, "out"), (2, "err")):
        sys.stdout.flush()
        file = os.open(f"{sys.argv[1]}/{number}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    try:
        status = gan_mnist.main(arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    print(f"\\n{status}", flush=True)
"""


class Result(NamedTuple):
    """What a command line gave back."""

    status: int
    out: str
    err: str

    def refuses(self, *words):
        """Whether it ended as bad usage does: status 2, one line with all of the words."""
        lines = self.err.splitlines()
        return self.status == 2 and len(lines) == 1 and all(word in lines[0] for word in words)


def environment(**changes):
    """Return the environment without what would silence TensorFlow, with the changes."""
    return {
        **{name: value for name, value in os.environ.items() if name not in QUIET_ONES},
        **{name: str(value) for name, value in changes.items()},
    }


def command(*arguments):
    """Return the command line that a person would type, as a list."""
    return [sys.executable, str(ROOT / "gan_mnist.py"), *map(str, arguments)]


def run(*arguments, cwd, **changes):
    """Run the program in a process of its own; changes are environment variables."""
    return result_of(command(*arguments), cwd, changes)


def run_code(code, *arguments, cwd, timeout=240, **changes):
    """Run Python code that can import gan_mnist in a process of its own."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return result_of(words, cwd, {"PYTHONPATH": ROOT, **changes}, timeout)


def result_of(words, cwd, changes, timeout=240):
    """Run a command line; return the Result."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_batch(command_lines, scratch, program=ROOT, **changes):
    """Run [(arguments, working directory), ...] in one process; return a Result for each.

    `program`: the folder of the gan_mnist.py to run.
    """
    scratch.mkdir()
    jobs = [([str(word) for word in words], str(folder)) for words, folder in command_lines]
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(scratch)],
        cwd=program,
        env=environment(PYTHONPATH=program, **changes),
        input=json.dumps(jobs),
        text=True,
        timeout=240,
        check=True,
    )
    results = []
    for number in range(len(jobs)):
        out, status = (scratch / f"{number}.out").read_text().rstrip("\n").rsplit("\n", 1)
        results.append(Result(int(status), out, (scratch / f"{number}.err").read_text()))
    return results


def files_in(folder):
    """Return the relative paths of all that is in the folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def contents(folder):
    """Return the bytes of each file in the folder, by relative path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def synthetic_digits(count, seed=0):
    """Return seven-segment digits uint8 (count, 28, 28), moved at random, and labels (count,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    images = np.zeros((count, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        for bar in LIT[label]:
            image[SEGMENTS[bar]] = random.integers(160, 256)
        image[:] = np.roll(image, random.integers(-3, 4, 2), (0, 1))
    return images, labels


def npz_bytes(arrays, save=np.savez):
    """Return what `save` writes of the arrays (by name)."""
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def rows(folder):
    """Return metrics.csv as a list of dicts."""
    with open(folder / "samples" / "metrics.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def untimed(folder):
    """Return metrics.csv without the two columns that no two runs share."""
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows(folder)]


def small(**changes):
    """Return Settings of small networks."""
    return gan_mnist.Settings(
        **{"latent_dim": 8, "generator_widths": (24, 32), "discriminator_widths": (32, 16)}
        | {"conv_channels": 4}
        | changes
    )


def new_state(settings, data):
    """Return the state of a new run on the devices in scope, by default one."""
    return gan_mnist.new_state(settings, data, gan_mnist.tf.distribute.get_strategy())


def train_quietly(folder, data, epochs=1, **changes):
    """Train small networks in this process; return the averaged generator."""
    settings = small(
        samples_dir=str(folder / "samples"),
        checkpoints_dir=str(folder / "checkpoints"),
        evaluation_images=100,
        **changes,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return gan_mnist.train(data, epochs, settings)


def assert_same_weights(*paths):
    first, second = (gan_mnist.load_generator(path).get_weights() for path in paths)
    assert len(first) == len(second) > 0
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="session", autouse=True)
def keras_home(tmp_path_factory):
    """A Keras home that has the user's data sets, but keeps what the tests measure to itself."""
    home = tmp_path_factory.mktemp("keras_home")
    before = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    if (before / "datasets").exists():
        (home / "datasets").symlink_to((before / "datasets").resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def digits_npz(tmp_path_factory):
    """The path of an .npz with 3,000 labelled synthetic digits."""
    path = tmp_path_factory.mktemp("data") / "segments.npz"
    images, labels = synthetic_digits(3000)
    np.savez_compressed(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="session")
def tiny_flags(digits_npz):
    """Flags of a run of four epochs that takes seconds."""
    return (
        *("--dataset", digits_npz, "--epochs", 4, "--batch-size", 10, "--latent-dim", 8),
        *("--generator-widths", "24,32", "--discriminator-widths", "32"),
        *("--evaluation-images", 200, "--checkpoint-every", 1, "--seed", 7),
        *("--inception", "mnist"),  # its own would be trained first
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_flags, tmp_path_factory):
    """(folder, Result) of a conditional run that nobody stopped."""
    folder = tmp_path_factory.mktemp("tiny_run")
    return folder, run(*tiny_flags, cwd=folder)


@pytest.fixture(scope="session")
def plain_runs(tiny_flags, tmp_path_factory):
    """Folders and Results of runs in one process, by name.

    Two equal unconditional ones, one of three seconds, and tiny_run measured less often.
    """
    names = ("first", "second", "minutes", "seldom")
    folders = [tmp_path_factory.mktemp(name) for name in names]
    plain = (*tiny_flags, "--conditional", "false", "--loss", "hinge", "--epochs", 2)
    endless = (*tiny_flags, "--epochs", 100_000, "--max-minutes", 0.05, "--sample-every", 5)
    bfloat16 = (*plain, "--precision", "bfloat16")
    seldom = (*tiny_flags, "--evaluate-every", 3, "--checkpoint-every", 2)
    jobs = zip((bfloat16, bfloat16, endless, seldom), folders, strict=True)
    results = run_batch(jobs, tmp_path_factory.mktemp("scratch") / "batch")
    return dict(zip(names, zip(folders, results, strict=True), strict=True))


@pytest.fixture(scope="session")
def tiny_generator(tiny_run):
    """The averaged conditional generator of the run, as the program loads it."""
    return gan_mnist.load_generator(tiny_run[0] / "checkpoints" / "generator_latest.h5")


@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    """(folder, Results by name): the program alone in a folder with folders of pictures.

    What is asked of it first, a run on the pictures, and what is asked of that.
    """
    folder = tmp_path_factory.mktemp("pets")
    shutil.copy(ROOT / "gan_mnist.py", folder)
    images, labels = synthetic_digits(400, seed=9)
    np.savez(folder / "digits.npz", images=images, labels=labels)
    for label, name in ((1, "cats"), (8, "dogs")):
        (folder / "pets" / name).mkdir(parents=True)
        for number in np.flatnonzero(labels == label):
            Image.fromarray(images[number]).save(folder / "pets" / name / f"{number}.png")
    tiny = ("--latent-dim", 8, "--generator-widths", 16, "--discriminator-widths", 16)
    tiny += ("--evaluation-images", 100)
    jobs = {
        "early": ["generate"],
        "train": ["--dataset", "pets", *tiny, "--epochs", 2, "--batch-size", 20],
        "cats": ["generate", "--digits", "cats", "--count", 3, "--output", "cats.npz"],
        "both": ["generate", "--classes", "dogs,cats", "--count", 2, "--output", "both.npz"],
        "birds": ["generate", "--classes", "birds"],
        "evaluate": ["evaluate", "--dataset", "pets", "--count", 100],
        "mismatch": ["evaluate", "--dataset", "digits.npz", "--count", 100],
    }
    batch = [(words, folder) for words in jobs.values()]
    results = run_batch(batch, tmp_path_factory.mktemp("scratch") / "batch", program=folder)
    return folder, dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="session")
def mnist():
    """The four arrays of the real MNIST; tests that need it are skipped where it is absent."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    if not (home / "datasets" / "mnist.npz").exists():
        pytest.skip("needs the real MNIST at $KERAS_HOME/datasets/mnist.npz")
    return gan_mnist.load_mnist()


def measure_nothing(patch, given):
    """Let runs neither measure nor plot: each epoch gets the next of these (classes, FID)."""

    def quick_metrics(ruler, *outputs):
        classes, fid = given.pop(0) if given else (10, 5.0)
        scores = {"inception_score": 2.0, "inception_score_std": 0.1, "class_shares": [0.1] * 10}
        return scores | {"fid": fid, "classes_covered": classes}

    def save_metrics_plot(path, history, *others):
        with gan_mnist.replacing(path) as partial:
            partial.write_text(str([row["fid"] for row in history]))

    nothing = gan_mnist.Ruler("none", None, reads_classes=True)
    patch.setattr(gan_mnist, "load_ruler", lambda *_: nothing)
    patch.setattr(gan_mnist, "real_statistics", lambda *_: None)
    patch.setattr(gan_mnist, "draw_like", lambda *_: None)
    patch.setattr(gan_mnist, "measure", lambda *_: (None, None))
    patch.setattr(gan_mnist, "quick_metrics", quick_metrics)
    patch.setattr(gan_mnist, "save_metrics_plot", save_metrics_plot)


def quick_step(state, settings, real, *others):
    """Stand for a training step: move both networks by what was shown and a random number."""
    change = gan_mnist.tf.reduce_mean(real) + state.random.normal(())
    for network in (state.generator, state.discriminator):
        network.trainable_variables[0].assign_add(change / 100 * network.trainable_variables[0])
    return gan_mnist.tf.stack([change, 2 * change])


@pytest.fixture
def quick(monkeypatch):
    """Runs that learn and measure nothing; give the list what they shall find: (classes, FID)."""
    given = []
    measure_nothing(monkeypatch, given)
    monkeypatch.setattr(gan_mnist, "train_step", quick_step)
    gan_mnist.tf.config.run_functions_eagerly(True)  # for a few steps that is faster
    yield given
    gan_mnist.tf.config.run_functions_eagerly(False)
