"""Training from outside: the files that a run leaves, the terminal, a machine offline."""

import itertools
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    COLUMNS,
    NO_NETWORK,
    WEIGHTS,
    assert_same_weights,
    contents,
    environment,
    files_in,
    rows,
    run,
)
from PIL import Image

import gan_mnist

# What a bare Keras process says of .h5 files: inputs, output shape, types, images of fixed input.
BARE = """
import sys, keras, numpy as np
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    types = {w.dtype for w in model.weights} | {x.compute_dtype for x in model.layers}
    latent = np.linspace(-2, 2, 10 * model.inputs[0].shape[1]).reshape(10, -1).astype("float32")
    classes = np.arange(10)
    images = model([latent, classes] if len(model.inputs) == 2 else latent, training=False)
    np.save(path + ".npy", images)
    print(len(model.inputs), model.output_shape, *(types - {"int32", "int64"}))
"""


# ----- What a run writes


def test_a_run_ends_well_in_silence_on_stderr(tiny_run, plain_runs):
    for _, result in (tiny_run, plain_runs["first"]):  # each the first of its process
        assert (result.status, result.err) == (0, ""), result.err


def test_a_run_leaves_the_files_of_the_design(tiny_run):
    samples, checkpoints = (files_in(tiny_run[0] / name) for name in ("samples", "checkpoints"))
    grids = [f"image_at_epoch_{epoch:04d}.png" for epoch in (1, 2, 3, 4)]
    events = [name for name in samples if name.startswith("tensorboard/")]
    assert len(events) == 1
    assert set(samples) - set(events) == {
        *("metrics.csv", "metrics.png", "training.gif", "tensorboard", *grids),
    }
    state = {name for name in checkpoints if name.startswith("state")}
    assert len(state) > 1
    assert set(checkpoints) - state == {
        *("generator_best.h5", "generator_latest.h5"),
        *(f"generator_model_epoch_{epoch:03d}.h5" for epoch in (1, 2, 3, 4)),
    }
    assert files_in(tiny_run[0]) == sorted(
        ["samples", "checkpoints"]
        + [f"samples/{name}" for name in samples]
        + [f"checkpoints/{name}" for name in checkpoints]
    )


def test_metrics_csv_has_a_sound_row_an_epoch(tiny_run):
    table = rows(tiny_run[0])
    assert [int(row["epoch"]) for row in table] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in table] == [300, 600, 900, 1200]
    for row in table:
        assert float(row["seconds"]) > 0
        speed = 3000 / float(row["seconds"])
        assert float(row["images_per_second"]) == pytest.approx(speed, rel=0.02)
        assert all(np.isfinite(float(row[name])) for name in COLUMNS[4:9])
        assert 1 <= float(row["inception_score"]) <= 10 and float(row["fid"]) > 0
        assert row["classes_covered"] == ""  # the network for digits doesn't read these classes
        assert row["dataset"] in ("segments", "segments.npz") and "inception" in row["inception"]


def test_the_grids_show_the_samples_unblurred_under_a_title_beside_their_classes(tiny_run):
    for epoch in (1, 4):
        path = tiny_run[0] / "samples" / f"image_at_epoch_{epoch:04d}.png"
        picture = np.asarray(Image.open(path).convert("L"))
        assert 560 < picture.shape[1] < 640 and 560 < picture.shape[0] < 640
        grid = picture[-560:, -560:]
        assert np.array_equal(grid, np.kron(grid[::2, ::2], np.ones((2, 2), int)))
        assert len(np.unique(picture[:-560])) > 10  # the title's anti-aliased letters
        for row in np.split(picture[-560:, :-560], 10):
            assert len(np.unique(row)) > 10  # the class's name


def test_the_animation_shows_the_grids_in_order(tiny_run):
    samples = tiny_run[0] / "samples"
    with Image.open(samples / "training.gif") as animation:
        assert animation.n_frames == 4
        for number in range(4):
            animation.seek(number)
            frame = np.asarray(animation.convert("L"), float)
            grid = Image.open(samples / f"image_at_epoch_{number + 1:04d}.png").convert("L")
            assert frame.shape == (grid.height, grid.width)
            assert np.abs(frame - np.asarray(grid)).mean() < 4


def test_tensorboard_gets_the_same_scalars_and_the_grids(tiny_run):
    (path,) = (tiny_run[0] / "samples" / "tensorboard").iterdir()
    scalars, grids = {}, {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "images":
                grids[event.step] = value.tensor.string_val[2]
            else:
                scalars[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    for row in rows(tiny_run[0]):
        epoch = int(row["epoch"])
        for name in ("discriminator_loss", "generator_loss", "inception_score", "fid"):
            assert scalars[name, epoch] == pytest.approx(float(row[name]), rel=1e-5)
        png = tiny_run[0] / "samples" / f"image_at_epoch_{epoch:04d}.png"
        assert grids[epoch] == png.read_bytes()


def test_the_terminal_shows_a_row_an_epoch_in_80_columns_and_no_control_codes(tiny_run):
    out = tiny_run[1].out
    assert "\r" not in out and "\033" not in out and "\b" not in out
    table = [line for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [line.split()[0] for line in table] == ["1/4", "2/4", "3/4", "4/4"]
    for line, row in zip(table, rows(tiny_run[0]), strict=True):
        assert len(line) < 80
        assert f"{float(row['fid']):.3f}"[:-1] in line
        assert re.search(r" \d+m \d\ds$", line)
    assert table[-1].endswith(" 0m 00s")
    assert "segments" in out and "training.gif" in out
    assert out.splitlines()[0] == "Loading TensorFlow ..."


def test_a_row_says_how_much_longer_the_run_takes_and_fits_80_columns(capsys):
    row = {
        "epoch": 50,
        "step": 400,
        "seconds": 1234.5,
        "images_per_second": 123456,
        "discriminator_loss": -1234.5678,
        "generator_loss": 1234.5678,
        "inception_score": 9.876,
        "fid": 1234.567,
        "classes_covered": 10,
        "class_shares": [0.1] * 10,
        "measure": "",
    }
    run = SimpleNamespace(  # a quarter is done, in 65 seconds
        settings=gan_mnist.Settings(epochs=200),
        ruler=SimpleNamespace(reads_classes=True),
        started=time.monotonic() - 65,
        history=[row],
        done=0.25,
    )
    gan_mnist.print_row(row, run)
    line = capsys.readouterr().out.rstrip("\n")
    assert line.startswith(" 50/200 ") and line.endswith(" 3m 15s") and len(line) < 80
    assert "123,456 " in line


def test_a_run_of_minutes_says_how_long_it_still_takes_by_the_clock(plain_runs):
    out = plain_runs["minutes"][1].out
    left = [line.split()[-2:] for line in out.splitlines() if "/100000 " in line]
    assert left[-1] == ["0m", "00s"]
    assert all(minutes == "0m" for minutes, _ in left)  # of 100,000 epochs' days


def test_the_best_generator_is_the_one_of_the_lowest_fid(tiny_run):
    checkpoints = tiny_run[0] / "checkpoints"
    best = min(rows(tiny_run[0]), key=lambda row: float(row["fid"]))
    assert_same_weights(
        checkpoints / "generator_best.h5",
        checkpoints / f"generator_model_epoch_{int(best['epoch']):03d}.h5",
    )


def test_the_checkpoints_open_in_a_bare_keras_process(tiny_run, plain_runs, tmp_path):
    sources = [tiny_run[0], plain_runs["first"][0]]
    paths = [folder / "checkpoints" / "generator_latest.h5" for folder in sources]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *map(str, paths)],
        cwd=tmp_path,
        env=environment(TF_CPP_MIN_LOG_LEVEL=3, PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr
    assert done.stdout.splitlines() == [
        "2 (None, 28, 28, 1) float32",
        "1 (None, 28, 28, 1) float32",
    ]
    for path, inputs in zip(paths, (2, 1), strict=True):
        images = np.load(f"{path}.npy")
        os.remove(f"{path}.npy")
        latent = np.linspace(-2, 2, 80).reshape(10, 8).astype("float32")
        ours = gan_mnist.load_generator(path)([latent, np.arange(10)] if inputs == 2 else latent)
        assert np.abs(images).max() <= 1 and np.std(images) > 0.1
        assert np.allclose(images, ours, atol=1e-5)


def test_folders_that_cannot_be_written_are_refused_before_training(
    digits_npz, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for flag, value in itertools.product(("samples_dir", "checkpoints_dir"), ("file", "file/in")):
        settings = gan_mnist.Settings(dataset=str(digits_npz), **{flag: value})
        with pytest.raises(gan_mnist.UsageError, match="file") as refusal:
            gan_mnist.train(settings=settings)
        assert len(str(refusal.value).splitlines()) == 1
        assert [*contents(tmp_path)] == ["file"], flag


QUICK = ("--epochs", 1, "--batch-size", 1000, "--generator-widths", "32")  # an epoch in seconds


@pytest.mark.slow
def test_real_mnist_is_measured_by_the_shipped_ruler(mnist, tmp_path):
    result = run(*QUICK, "--evaluation-images", 1000, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    (row,) = rows(tmp_path)
    assert row["dataset"] == "mnist"
    assert (WEIGHTS / f"{row['inception'].rpartition('_')[0]}.h5").exists()
    assert "60,000 images of (28, 28, 1)" in result.out
    assert 1 < float(row["fid"]) < 1000 and 1 <= int(row["classes_covered"]) <= 10


@pytest.mark.slow
def test_offline_with_an_empty_cache_a_run_goes_on_with_a_stand_in_named_so(tmp_path):
    (tmp_path / "run").mkdir()
    result = run(
        *(*QUICK, "--evaluation-images", 1000),
        cwd=tmp_path / "run",
        KERAS_HOME=tmp_path / "empty",
        **NO_NETWORK,
    )
    assert (result.status, result.err) == (0, "")
    assert "stand-in" in result.out and "NOT MNIST" in result.out.upper()
    (row,) = rows(tmp_path / "run")
    assert row["dataset"] == "stand-in"


def test_measuring_more_or_less_often_changes_no_weight(tiny_run, plain_runs):
    folders = (tiny_run[0], plain_runs["seldom"][0])
    assert plain_runs["seldom"][1].status == 0
    measured = [[row["fid"] != "" for row in rows(folder)] for folder in folders]
    assert measured == [[True] * 4, [False, False, True, True]]
    numbered = folders[1].glob("checkpoints/generator_model*")
    names = {path.name for path in numbered}
    assert names == {"generator_model_epoch_002.h5", "generator_model_epoch_004.h5"}
    for name in names:
        assert_same_weights(*(folder / "checkpoints" / name for folder in folders))
