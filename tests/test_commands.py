"""generate and evaluate from outside, what they refuse, and generate from a notebook."""

import json
import os
import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import WEIGHTS, files_in, run, run_batch, run_code, synthetic_digits
from PIL import Image

import gan_mnist

SHIPPED = "mnist_generator.h5"
METRICS = {
    *("inception_score", "inception_score_std", "fid", "classes_covered", "kid", "kid_std"),
    *("precision", "recall", "density", "coverage", "class_divergence"),
}
DRAWN = {  # name: what is typed after `generate`, into a folder without checkpoints
    "nothing": [],
    "digits.npz": ["--digits", "2026", "--count", 25, "--seed", 5, "--output", "digits.npz"],
    "digits.png": ["--digits", "2026", "--count", 25, "--seed", 5, "--output", "digits.png"],
    "again.npz": ["--digits", "2026", "--count", 25, "--seed", 5, "--output", "again.npz"],
    "other.npz": ["--digits", "2026", "--count", 25, "--seed", 6, "--output", "other.npz"],
    "turns.npz": ["--count", 23, "--output", "new/turns.npz"],
    "walk.gif": ["--digits", "31", "--output", "walk.gif"],
    "folder": ["--count", 12, "--output", "pictures/"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder, {name: Result}) after every command of DRAWN, with the shipped generator."""
    folder = tmp_path_factory.mktemp("drawn")
    jobs = [(["generate", *words], folder) for words in DRAWN.values()]
    results = run_batch(jobs, tmp_path_factory.mktemp("scratch") / "batch")
    return folder, dict(zip(DRAWN, results, strict=True))


def test_drawing_needs_no_training_and_says_which_generator_drew(drawn):
    for name, result in drawn[1].items():
        assert (result.status, result.err) == (0, ""), name
        assert SHIPPED in result.out, name
    assert [name for name in files_in(drawn[0]) if "checkpoints" in name] == []


def test_without_an_output_a_grid_lands_in_samples(drawn):
    (name,) = files_in(drawn[0] / "samples")
    assert name.endswith(".png")
    assert Image.open(drawn[0] / "samples" / name).width == 560


def test_an_npz_holds_rows_of_the_digits_asked_for(drawn):
    with np.load(drawn[0] / "digits.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
        assert set(arrays.files) == {"images", "labels"}
    assert images.dtype == np.uint8 and images.shape == (100, 28, 28, 1)
    assert labels.tolist() == [2, 0, 2, 6] * 25
    _, probabilities = gan_mnist.measure(gan_mnist.RULERS["mnist"](None), images)
    assert np.mean(probabilities.argmax(axis=1) == labels) >= 0.9
    assert len(np.unique(images.reshape(100, -1), axis=0)) == 100


def test_without_digits_the_classes_are_drawn_in_turn(drawn):
    with np.load(drawn[0] / "new" / "turns.npz") as arrays:
        assert arrays["labels"].tolist() == [number % 10 for number in range(23)]
        assert arrays["images"].shape == (23, 28, 28, 1)


def test_the_seed_decides_what_is_drawn(drawn):
    first, again, other = (
        np.load(drawn[0] / f"{name}.npz")["images"] for name in ("digits", "again", "other")
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_png_shows_the_same_images_in_rows(drawn):
    picture = np.asarray(Image.open(drawn[0] / "digits.png").convert("L"))
    assert picture.shape == (25 * 56, 4 * 56)
    tiles = picture[::2, ::2].reshape(25, 28, 4, 28).swapaxes(1, 2).reshape(100, 28, 28, 1)
    images = np.load(drawn[0] / "digits.npz")["images"]
    assert np.abs(tiles.astype(int) - images).max() <= 1


def test_a_gif_walks_smoothly_and_comes_back(drawn):
    with Image.open(drawn[0] / "walk.gif") as walk:
        assert walk.n_frames >= 24
        frames = []
        for number in range(walk.n_frames):
            walk.seek(number)
            frames.append(np.asarray(walk.convert("L"), float))
    assert frames[0].shape[1] == 2 * frames[0].shape[0]  # two digits side by side
    steps = [np.abs(a - b).mean() for a, b in zip(frames, [*frames[1:], frames[0]], strict=True)]
    far = np.abs(frames[0] - frames[len(frames) // 2]).mean()
    assert max(steps) < far / 2


def test_a_folder_gets_one_png_each(drawn):
    names = files_in(drawn[0] / "pictures")
    assert len(names) == 12
    for name in names:
        picture = Image.open(drawn[0] / "pictures" / name)
        assert name.endswith(".png") and picture.size == (28, 28)


# ----- From a notebook


def test_generate_gives_uint8_images_that_the_seed_decides(tiny_generator):
    draws = [gan_mnist.generate(tiny_generator, 7, seed=seed) for seed in (1, 1, 2, None, None)]
    assert all(x.dtype == np.uint8 and x.shape == (7, 28, 28, 1) for x in draws)
    assert np.array_equal(draws[0], draws[1])
    assert not any(np.array_equal(draws[i], draws[j]) for i, j in ((1, 2), (2, 3), (3, 4)))


def test_generate_takes_digits_as_text_or_numbers(tiny_generator):
    as_text = gan_mnist.generate(tiny_generator, 2, digits="407", seed=1)
    assert as_text.shape == (6, 28, 28, 1)
    assert np.array_equal(as_text, gan_mnist.generate(tiny_generator, 2, [4, 0, 7], seed=1))


def test_a_notebook_is_quiet_trains_on_two_threads_and_is_not_made_to_round(tmp_path):
    np.save(tmp_path / "images.npy", synthetic_digits(200)[0])
    code = """
import io, contextlib, os, numpy as np, gan_mnist
gan_mnist.generate(gan_mnist.load_generator(), 1)
settings = gan_mnist.Settings(batch_size=50, evaluation_images=100, precision="bfloat16")
with contextlib.redirect_stdout(io.StringIO()):
    gan_mnist.train(np.load("images.npy"), 1, settings)
import tensorflow as tf
threads = tf.config.threading
print(threads.get_inter_op_parallelism_threads(), threads.get_intra_op_parallelism_threads())
print(gan_mnist.ROUNDING in os.environ)  # it would hold for all that the notebook multiplies
"""
    result = run_code(code, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert result.out.split() == ["2", str(max(1, os.cpu_count() // 2)), "False"]


def test_load_generator_without_a_path_finds_the_best_of_the_last_run(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run[0])
    found = gan_mnist.load_generator()
    best = gan_mnist.load_generator(tiny_run[0] / "checkpoints" / "generator_best.h5")
    for ours, expected in zip(found.get_weights(), best.get_weights(), strict=True):
        assert np.array_equal(ours, expected)


# ----- evaluate


@pytest.fixture(scope="module")
def measured(tiny_run, digits_npz, tmp_path_factory):
    """(folder, Results of evaluate): of a run's best generator, of its own data set, in words."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(tiny_run[0] / "checkpoints", folder / "checkpoints")
    (folder / "mine").mkdir()
    for number, image in enumerate(synthetic_digits(30, seed=5)[0]):
        Image.fromarray(image).save(folder / "mine" / f"{number}.png")
    against = ("--dataset", digits_npz, "--inception", "mnist")
    jobs = [
        (["evaluate", *against, "--json", "--count", 300], folder),
        (["evaluate", *against, "--json", "--count", 300, "--images", digits_npz], folder),
        (["evaluate", *against, "--images", "mine"], folder),
    ]
    return folder, run_batch(jobs, tmp_path_factory.mktemp("scratch") / "batch")


def test_evaluate_prints_every_metric_as_json(measured):
    for result, source in zip(measured[1], ("generator_best.h5", "segments.npz"), strict=False):
        assert (result.status, result.err) == (0, "")
        metrics = json.loads(result.out)
        assert METRICS | {"images", "dataset", "inception"} <= set(metrics)
        assert metrics["dataset"].startswith("segments") and source in result.out
        assert all(np.isfinite(metrics[name]) for name in METRICS)
        assert metrics["fid_interval"][0] < metrics["fid"] < metrics["fid_interval"][1]
        assert len(metrics["fid_per_class"]) == 10 and min(metrics["fid_per_class"]) > 0
        assert metrics["memorisation"] is None  # this data set has no test images


def test_evaluate_says_each_number_in_words_within_80_columns(measured):
    result = measured[1][2]
    assert result.status == 0 and "30 images are few for 160 features" in result.err
    assert result.out.startswith("30 images of mine\nagainst segments")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("FID", "KID", "precision", "recall", "density", "coverage", "divergence"):
        (line,) = [line for line in lines if line.startswith(name)]
        assert "better" in line or "best" in line, line
    assert len([line for line in lines if line.startswith("class ")]) == 10


def test_evaluate_saves_a_page_of_nearest_training_images(measured, digits_npz):
    folder, results = measured
    with Image.open(folder / "samples" / "neighbours.png") as page:
        assert page.width > page.height > 100
    assert "neighbours.png" in results[2].out


def test_evaluate_prefers_the_data_set_itself_to_a_generator(measured):
    generated, real = (json.loads(result.out) for result in measured[1][:2])
    assert real["fid"] < generated["fid"] / 10 and real["kid"] < generated["kid"] / 10
    assert real["precision"] == 1 or real["precision"] > generated["precision"]


# ----- What is refused


@pytest.fixture(scope="module")
def bad_files(tiny_run, tmp_path_factory):
    """A folder of files that are no generators, by name."""
    folder = tmp_path_factory.mktemp("bad")
    good = tiny_run[0] / "checkpoints" / "generator_best.h5"
    (folder / "truncated.h5").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "text.h5").write_text("This is not a checkpoint.")
    (folder / "empty.h5").write_bytes(b"")
    (folder / "folder.h5").mkdir()
    shutil.copy(next(WEIGHTS.glob("*inception*.h5")), folder / "classifier.h5")
    settings = gan_mnist.Settings(latent_dim=8)
    gan_mnist.build_discriminator(settings).save(folder / "discriminator.h5")
    gan_mnist.build_generator(settings).save_weights(folder / "of.weights.h5")

    before = os.getcwd()
    os.chdir(folder)  # building the models runs the lambdas once, here
    latent = keras.Input((8,))
    image = keras.layers.Reshape((28, 28, 1))(keras.layers.Dense(784)(latent))
    with_lambda = keras.layers.Lambda(lambda x: open("ran", "w") and x)(image)  # noqa: SIM115
    keras.Model(latent, with_lambda).save(folder / "lambda.h5")
    keras.Model(latent, keras.Sequential([keras.layers.Lambda(lambda x: x)])(image)).save(
        folder / "nested_lambda.h5"
    )
    activated = keras.layers.Activation(lambda x: open("ran", "w") and x)(image)  # noqa: SIM115
    keras.Model(latent, activated).save(folder / "lambda_activation.h5")
    Path("ran").unlink()
    os.chdir(before)

    keras.Model(latent, keras.layers.Reshape((14, 28, 2))(keras.layers.Dense(784)(latent))).save(
        folder / "two_channels.h5"
    )
    label = keras.Input((), dtype="int32")
    both = keras.layers.Concatenate()([latent, keras.layers.Embedding(10, 4)(label)])
    image = keras.layers.Reshape((28, 28, 1))(keras.layers.Dense(784)(both))
    keras.Model([latent, label], image).save(folder / "strangers.h5")
    return folder


def test_an_h5_says_nothing_that_an_older_keras_would_not_know(tiny_run):
    for path in (tiny_run[0] / "checkpoints" / "generator_best.h5", *WEIGHTS.glob("*.h5")):
        with h5py.File(path) as file:
            layers = json.loads(file.attrs["model_config"])["config"]["layers"]
        names = {name for layer in layers for name in layer["config"]}
        assert "units" in names
        assert not [name for name in names if "initializer" in name or "quantization" in name]


def test_a_checkpoint_that_is_no_generator_is_refused_in_one_line(bad_files, tmp_path):
    names = [*sorted(path.name for path in bad_files.iterdir()), "missing.h5"]
    folder = tmp_path / "cwd"
    folder.mkdir()
    jobs = [(["generate", "--checkpoint", bad_files / name], folder) for name in names]
    for name, result in zip(names, run_batch(jobs, tmp_path / "scratch"), strict=True):
        if name == "strangers.h5":  # conditional, with layers of its own: may be drawn from
            assert result.status == 0 or result.refuses(name), result
        else:
            assert result.refuses(name), result
    assert not (folder / "ran").exists()


def test_a_folder_in_a_files_place_is_not_replaced(tmp_path):
    (tmp_path / "digits.png").mkdir()
    (tmp_path / "digits.png" / "mine").write_text("mine")
    result = run("generate", "--output", "digits.png", cwd=tmp_path)
    assert (result.status, len(result.err.splitlines())) == (1, 1), result
    assert files_in(tmp_path) == ["digits.png", "digits.png/mine"]


def test_what_cannot_be_drawn_or_measured_is_refused_in_one_line(tiny_run, digits_npz, tmp_path):
    folder = tmp_path / "cwd"
    folder.mkdir()
    (folder / "file").write_text("in the way")
    few = tmp_path / "few.npz"
    np.savez(few, images=synthetic_digits(1)[0])
    best = tiny_run[0] / "checkpoints" / "generator_best.h5"
    cases = {
        "unknown ending": ["generate", "--output", "digits.jpg"],
        "not digits": ["generate", "--digits", "two"],
        "no digits": ["generate", "--digits", ""],
        "output in the way": ["generate", "--output", "file/digits.png"],
        "folder in the way": ["generate", "--output", "file"],
        "no such images": ["evaluate", "--images", "nowhere.npz", "--dataset", digits_npz],
        "too few images": ["evaluate", "--images", few, "--dataset", digits_npz],
        "too small a count": ["evaluate", "--count", 1, "--dataset", digits_npz],
        "both": ["evaluate", "--images", digits_npz, "--checkpoint", best],
    }
    jobs = [(arguments, folder) for arguments in cases.values()]
    for name, result in zip(cases, run_batch(jobs, tmp_path / "scratch"), strict=True):
        assert result.refuses(), (name, result)
    assert files_in(folder) == ["file"]


def test_a_plain_generator_is_not_asked_for_digits(tmp_path):
    plain = gan_mnist.build_generator(gan_mnist.Settings(latent_dim=8, conditional=False))
    plain.save(tmp_path / "plain.h5")
    flags = ("generate", "--checkpoint", "plain.h5", "--output", "x.npz")
    asked, drawn = run_batch(
        [([*flags, "--digits", "3"], tmp_path), ([*flags, "--count", 3], tmp_path)],
        tmp_path / "scratch",
    )
    assert asked.refuses() and drawn.status == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays.files == ["images"] and arrays["images"].shape == (3, 28, 28, 1)


def test_generate_says_so_when_the_best_of_the_last_run_draws(tiny_run, tmp_path):
    output = tmp_path / "x.png"
    result = run("generate", "--count", 4, "--output", output, cwd=tiny_run[0])
    assert (result.status, result.err) == (0, "") and output.exists()
    assert "generator_best.h5" in result.out and SHIPPED not in result.out
