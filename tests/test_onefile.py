"""One file means one file: alone, renamed, in a notebook's cell; its messages are one line."""

import importlib.util
import json
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    NO_NETWORK,
    ROOT,
    contents,
    result_of,
    synthetic_digits,
)

import gan_mnist

PROGRAM = ROOT / "gan_mnist.py"
TINY = """
    --epochs 1 --batch-size 50 --latent-dim 8 --generator-widths 16 --discriminator-widths 16
    --evaluation-images 100
""".split()


def alone(folder, name="gan_mnist.py"):
    """Copy the program, and nothing else, into a folder; return the start of a command line."""
    folder.mkdir(exist_ok=True)
    shutil.copy(PROGRAM, folder / name)
    return [sys.executable, name]


# ----- Alone in an empty folder


def test_alone_it_learns_own_pictures_measures_and_draws_them(pets, keras_home):
    folder, results = pets
    result = results["train"]
    assert result.status == 0, result.err
    assert "Training a network to measure pets" in result.out
    assert str(keras_home / "gan_mnist") in result.out  # where it is kept
    assert (folder / "samples" / "metrics.png").exists() and (folder / "cats.npz").exists()
    assert "generator_best.h5" in results["cats"].out


def test_alone_without_a_run_generate_says_what_is_missing(pets):
    result = pets[1]["early"]
    assert result.refuses("no generator", "python gan_mnist.py trains one")


def test_alone_another_network_measures_mnist_and_is_named_otherwise(tmp_path, monkeypatch, capsys):
    images, labels = synthetic_digits(400, seed=22)
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: (images, labels, images, labels))

    def untrained(path, training, test, epochs):  # seconds, where training takes minutes
        inception = gan_mnist.build_inception((28, 28, 1), 10)
        gan_mnist.save_keras(inception, path, {"accuracy": 0.97})

    monkeypatch.setattr(gan_mnist, "train_inception", untrained)
    monkeypatch.setattr(gan_mnist, "SHIPPED_INCEPTION", tmp_path / "weights" / "gone.h5")
    settings = gan_mnist.Settings()
    ruler = gan_mnist.load_ruler(settings, gan_mnist.load_dataset(settings))
    told = capsys.readouterr().out
    assert "to measure mnist" in told and "minutes" in told
    assert re.fullmatch("inception_[0-9a-f]{16}_[0-9a-f]{8}", ruler.name) and ruler.reads_classes
    assert f"Measured by {ruler.name}, which reads 97.00% of unseen images." in told


@pytest.mark.slow
def test_alone_it_trains_its_ruler_on_mnist_in_three_minutes_and_measures_with_it(mnist, tmp_path):
    program = alone(tmp_path)
    start = time.monotonic()
    flags = ["--epochs", "1", "--batch-size", "1000", "--evaluation-images", "1000"]
    result = result_of([*program, *flags], tmp_path, {}, timeout=600)
    assert (result.status, result.err) == (0, "")
    assert float(re.search(r"It reads ([\d.]+)% right", result.out)[1]) >= 99
    assert time.monotonic() - start < 240


def test_alone_without_mnist_one_line_says_what_to_get(tmp_path):
    program = alone(tmp_path)
    (tmp_path / "empty").mkdir()
    empty = {"KERAS_HOME": tmp_path / "empty", **NO_NETWORK}
    result = result_of([*program, *TINY], tmp_path, empty)
    assert result.status == 1, result
    (line,) = result.err.splitlines()
    assert gan_mnist.MNIST_URL in line and str(tmp_path / "empty") in line
    assert not [name for name in contents(tmp_path) if "samples" in name or "check" in name]


def test_the_header_for_uv_names_what_requirements_txt_does():
    header = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", PROGRAM.read_text("utf-8"))[1]
    listed = re.search(r"dependencies = \[(.*?)\]", header, re.DOTALL)[1]
    required = (ROOT / "requirements.txt").read_text().split()
    assert sorted(re.findall(r'"(.+?)"', listed)) == sorted(required)
    assert 'requires-python = ">=3.10"' in header


# ----- Renamed, as a module


def test_renamed_it_says_its_new_name(tmp_path):
    program = alone(tmp_path, "my gan.py")
    shown = result_of([*program, "--help"], tmp_path, {})
    assert shown.status == 0 and shown.out.startswith("usage: my gan.py")
    refused = result_of([*program, "--epochs", "0"], tmp_path, {})
    assert re.match(r"my gan\.py: EPOCHS in line \d\d or --epochs is '0', but ", refused.err)
    spec = importlib.util.spec_from_file_location("renamed", tmp_path / "my gan.py")
    renamed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(renamed)
    assert renamed.line_to_type("generate") == "python 'my gan.py' generate"


def test_it_runs_as_a_module(tmp_path):
    words = [sys.executable, "-m", "gan_mnist", "--help"]
    shown = result_of(words, tmp_path, {"PYTHONPATH": ROOT})
    assert shown.status == 0 and shown.out.startswith("usage: gan_mnist.py")


# ----- In a notebook

# A session as IPython's: a prompt, its own command line, a stdout that cannot be reconfigured.
SESSION = """
import io, json, runpy, signal, sys
source, data, result = sys.argv[1:]
kinds = [signal.SIGINT, signal.SIGTERM]
signal.signal(signal.SIGTERM, print)
before = [signal.getsignal(kind) for kind in kinds]
sys.ps1 = "In : "
terminal, sys.stdout = sys.stdout, io.StringIO()
assert not hasattr(sys.stdout, "reconfigure")
def same():
    return before == [signal.getsignal(kind) for kind in kinds]

sys.argv = ["launcher.py", "-f", "kernel.json"]
names = {"__name__": "__main__"}
exec(open(source).read(), names)  # as a cell does: there is no __file__
found = {"cell": sys.stdout.getvalue(), "cell_leaves_handlers": same()}
found["threads"] = names["tf"].config.threading.get_inter_op_parallelism_threads()
generator = names["load_generator"]()
found["shape"] = names["generate"](generator, 2).shape

sys.stdout = io.StringIO()
sys.argv = [source, "generate", "--count", "2", "--output", "run.png"]
runpy.run_path(source, run_name="__main__")  # as %run does
found |= {"run": sys.stdout.getvalue(), "run_leaves_handlers": same()}
json.dump(found, open(result, "w"))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(folder, what happened) in a session that runs the program as a cell, then by %run."""
    folder = tmp_path_factory.mktemp("session")
    images, labels = synthetic_digits(200, seed=23)
    np.savez(folder / "own.npz", images=images, labels=labels)
    (folder / "weights").symlink_to(ROOT / "weights")
    edits = {
        "EPOCHS": "1",
        "BATCH_SIZE": "50",
        "DATASET": "'own.npz'",
        "GENERATOR_WIDTHS": "(16,)",
        "DISCRIMINATOR_WIDTHS": "(16,)",
        "EVALUATION_IMAGES": "100",
        "INCEPTION": "'mnist'",
    }
    source = PROGRAM.read_text("utf-8")
    for name, value in edits.items():  # as a person edits a cell
        source = re.sub(rf"^{name} = .*?  #", f"{name} = {value}  #", source, flags=re.MULTILINE)
    (folder / "cell.py").write_text(source, encoding="utf-8")
    arguments = (folder / "cell.py", folder / "own.npz", folder / "result.json")
    done = result_of([sys.executable, "-c", SESSION, *map(str, arguments)], folder, {})
    assert (done.status, done.err) == (0, "")
    return folder, SimpleNamespace(**json.loads((folder / "result.json").read_text()))


def test_pasted_into_a_cell_it_trains_with_the_settings_above(session):
    folder, found = session
    assert "own.npz, 200 images" in found.cell and "1/1" in found.cell
    assert (folder / "checkpoints" / "generator_best.h5").exists()
    assert "\033" not in found.cell and "\b" not in found.cell


def test_a_notebook_trains_with_two_products_side_by_side(session):
    assert session[1].threads == 2


def test_what_a_cell_defined_goes_on_working(session):
    assert session[1].shape == [2, 28, 28, 1]


def test_a_program_run_from_a_notebook_takes_the_command_line_that_it_was_given(session):
    folder, found = session
    assert "Written: run.png" in found.run and (folder / "run.png").exists()


def test_a_notebooks_signal_handlers_stay_as_they_were(session):
    assert session[1].cell_leaves_handlers and session[1].run_leaves_handlers


def test_training_gives_signal_handlers_back_however_it_ends():
    before = [signal.getsignal(kind) for kind in gan_mnist.SIGNALS]
    with pytest.raises(gan_mnist.RunError), gan_mnist.noted_signals():
        assert not {*before} & {signal.getsignal(kind) for kind in gan_mnist.SIGNALS}
        raise gan_mnist.RunError
    assert before == [signal.getsignal(kind) for kind in gan_mnist.SIGNALS]


# ----- Messages


@pytest.mark.parametrize("text", ["two\nlines", "a\rb", "x" * 11_000, "a\u2028b\x0bc"])
def test_a_message_is_one_short_line_whatever_was_typed(text, capsys):
    for words in (["--dataset", text], ["--loss", text], [f"--{text}"], [text], ["--epochs", text]):
        with pytest.raises(gan_mnist.UsageError) as error:
            gan_mnist.parse_command_line(words)
        assert gan_mnist.refuse(error.value, 2) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("gan_mnist.py: ") and len(line) < 500


def test_a_message_about_a_file_is_one_short_line(tmp_path, capsys):
    for name in ("two\nlines.h5", "a" * 200 + ".h5"):
        with pytest.raises(gan_mnist.UsageError) as error:
            gan_mnist.load_generator(tmp_path / name)
        assert gan_mnist.refuse(error.value, 2) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name[:3] in line and len(line) < 500
