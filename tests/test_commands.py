"""generate and evaluate from outside, what they refuse, and generate from a notebook."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import (
    ROOT,
    WEIGHTS,
    command,
    contents,
    environment,
    files_in,
    run_batch,
    small,
    synthetic_digits,
)
from PIL import Image

import gan_mnist

SHIPPED = "mnist_generator.h5"
METRICS = {
    *("inception_score", "inception_score_std", "fid", "kid", "kid_std"),
    *("precision", "recall", "density", "coverage"),
}
FIVE = ["--digits", "2026", "--count", 25, "--seed", 5]
DRAWN = {  # name: what is typed after `generate`, into a folder without checkpoints
    "nothing": [],
    "nothing again": [],
    "digits.npz": [*FIVE, "--output", "digits.npz"],
    "digits.png": [*FIVE, "--output", "digits.png"],
    "again.npz": [*FIVE, "--output", "again.npz"],
    "other.npz": ["--digits", "2026", "--count", 25, "--seed", 6, "--output", "other.npz"],
    "turns.npz": ["--count", 23, "--output", "new/turns.npz"],
    "walk.gif": ["--digits", "31", "--output", "walk.gif"],
    "folder": ["--count", 12, "--output", "pictures/"],
    "folder again": ["--count", 3, "--output", "pictures/"],
    "taken": ["--count", 3, "--output", "taken.png"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder, {name: Result}) after every command of DRAWN, with the shipped generator."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "taken.png").mkdir()
    (folder / "taken.png" / "mine").write_text("mine")
    jobs = [(["generate", *words], folder) for words in DRAWN.values()]
    results = run_batch(jobs, tmp_path_factory.mktemp("scratch") / "batch")
    return folder, dict(zip(DRAWN, results, strict=True))


def test_drawing_needs_no_training_and_says_which_generator_drew(drawn):
    for name, result in drawn[1].items():
        assert (result.status, result.err) == (0, ""), name
        assert SHIPPED in result.out, name
    assert [name for name in files_in(drawn[0]) if "checkpoints" in name] == []


def test_without_an_output_titled_grids_land_in_samples(drawn):
    assert files_in(drawn[0] / "samples") == ["generated.png", "generated_2.png"]
    picture = np.asarray(Image.open(drawn[0] / "samples" / "generated.png").convert("L"))
    assert picture.shape[1] == 560 and 560 < picture.shape[0] < 640
    assert len(np.unique(picture[:-560])) > 10  # the title's letters


def test_without_a_seed_each_time_draws_others_and_says_how_to_have_them_again(drawn):
    folder, results = drawn
    seeds = [
        int(re.search(r"--seed (\d+)", results[name].out)[1])
        for name in ("nothing", "nothing again")
    ]
    assert seeds[0] != seeds[1]
    generator = gan_mnist.load_generator(WEIGHTS / SHIPPED)
    for name, seed in zip(("generated.png", "generated_2.png"), seeds, strict=True):
        picture = np.asarray(Image.open(folder / "samples" / name).convert("L"))
        mosaic = gan_mnist.mosaic(gan_mnist.generate(generator, 100, seed=seed), 10)[..., 0]
        assert np.abs(picture[-560:].astype(int) - mosaic).max() <= 1


def test_nothing_is_overwritten(drawn):
    folder, results = drawn
    assert (folder / "taken.png" / "mine").read_text() == "mine"
    assert (folder / "taken_2.png").is_file() and "taken_2.png" in results["taken"].out
    assert len(files_in(folder / "pictures")) == 12  # not a mixture
    assert len(files_in(folder / "pictures_2")) == 3


def test_an_npz_holds_rows_of_the_digits_asked_for(drawn):
    with np.load(drawn[0] / "digits.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
        assert set(arrays.files) == {"images", "labels"}
    assert images.dtype == np.uint8 and images.shape == (100, 28, 28, 1)
    assert labels.tolist() == [2, 0, 2, 6] * 25
    inception = gan_mnist.load_keras(gan_mnist.SHIPPED_INCEPTION)
    _, probabilities = inception.predict(images / 127.5 - 1, verbose=0)
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
    picture = np.asarray(Image.open(drawn[0] / "digits.png").convert("L"))[-25 * 56 :]
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


def test_a_folder_gets_one_png_each_named_by_number(drawn):
    names = files_in(drawn[0] / "pictures")
    assert names == [f"{number:06d}.png" for number in range(12)]
    for name in names:
        assert Image.open(drawn[0] / "pictures" / name).size == (28, 28)


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


@pytest.mark.parametrize("count", [0, -1, 1.5, "many"])
def test_generate_refuses_a_count_that_cannot_be(tiny_generator, count):
    with pytest.raises(gan_mnist.UsageError, match=f"^count is {count!r}, but must be a whole"):
        gan_mnist.generate(tiny_generator, count)


@pytest.mark.parametrize(
    ("asked", "classes"),
    [("10,", [10]), ("10", [10]), ("1,0", [1, 0]), ("10,11", [10, 11]), ([11], [11])],
)
def test_one_class_of_ten_or_more_can_be_asked_for(asked, classes):
    twelve = gan_mnist.build_generator(small(), classes=12)
    assert gan_mnist.classes_to_draw(twelve, 2, asked).tolist() == classes * 2


def test_load_generator_without_a_path_finds_the_best_of_the_last_run(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run[0])
    found = gan_mnist.load_generator()
    best = gan_mnist.load_generator(tiny_run[0] / "checkpoints" / "generator_best.h5")
    for ours, expected in zip(found.get_weights(), best.get_weights(), strict=True):
        assert np.array_equal(ours, expected)


# ----- evaluate


@pytest.fixture(scope="module")
def measured(tiny_run, digits_npz, tmp_path_factory):
    """(folder, Results by name of evaluate), the run's own generator and data before others."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(tiny_run[0] / "checkpoints", folder / "checkpoints")
    (folder / "mine").mkdir()
    for number, image in enumerate(synthetic_digits(30, seed=5)[0]):
        Image.fromarray(image).save(folder / "mine" / f"{number}.png")
    against = ("--dataset", digits_npz, "--inception", "mnist")
    jobs = {
        "generator": ["evaluate", *against, "--json", "--count", 300],
        "data": ["evaluate", *against, "--json", "--count", 300, "--images", digits_npz],
        "mine": ["evaluate", *against, "--images", "mine"],
        "best": ["generate", "--count", 4, "--output", "x.png"],
    }
    batch = [(words, folder) for words in jobs.values()]
    results = run_batch(batch, tmp_path_factory.mktemp("scratch") / "batch")
    return folder, dict(zip(jobs, results, strict=True))


def test_evaluate_prints_every_metric_as_json_and_nothing_else(measured):
    for name, source in (("generator", "generator_best.h5"), ("data", "segments.npz")):
        result = measured[1][name]
        assert result.status == 0, result.err
        metrics = json.loads(result.out)
        assert METRICS | {"images", "dataset", "inception"} <= set(metrics)
        assert (metrics["images"], metrics["dataset"]) == (300, "segments.npz")
        assert metrics["measured"].endswith(source)
        assert all(np.isfinite(metrics[name]) for name in METRICS)
        assert "memorisation" not in metrics  # this data set has no test images


def test_evaluate_says_each_number_in_words_within_80_columns(measured):
    result = measured[1]["mine"]
    assert result.status == 0, result.err
    assert result.out.startswith("30 images of mine\nagainst segments.npz, measured by ")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("inception_score", "fid", "kid", "precision", "recall", "density", "coverage"):
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert "better" in line, line


def test_evaluate_saves_pages_of_nearest_training_images(measured):
    folder, results = measured
    for name, page in (("generator", "neighbours.png"), ("mine", "neighbours_3.png")):
        assert page in results[name].out
        with Image.open(folder / "samples" / page) as picture:
            assert picture.width > picture.height > 100


def test_evaluate_prefers_the_data_set_itself_to_a_generator(measured):
    generated, real = (json.loads(measured[1][name].out) for name in ("generator", "data"))
    assert real["fid"] < generated["fid"] / 10 and real["kid"] < generated["kid"] / 10
    assert real["precision"] == 1 or real["precision"] > generated["precision"]


def test_generate_says_so_when_the_best_of_the_last_run_draws(measured):
    result = measured[1]["best"]
    assert (result.status, result.err) == (0, "") and (measured[0] / "x.png").exists()
    assert "generator_best.h5" in result.out and SHIPPED not in result.out


def test_evaluate_into_a_pipe_that_closes_ends_quietly(tmp_path):
    images = synthetic_digits(150)[0]
    np.savez(tmp_path / "few.npz", images=images)
    words = command("evaluate", "--dataset", "few.npz", "--images", "few.npz")
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -n 1', "bash", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout == "Loading TensorFlow ...\n"
    assert done.returncode == 141  # it met the closed pipe, as other programs do
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr, done.stderr


# ----- Classes with names


def test_folders_names_are_the_classes_that_can_be_asked_for(pets):
    folder, results = pets
    assert results["train"].status == results["cats"].status == results["both"].status == 0
    assert np.load(folder / "cats.npz")["labels"].tolist() == [0, 0, 0]
    assert np.load(folder / "both.npz")["labels"].tolist() == [1, 0, 1, 0]
    assert results["birds"].refuses("'birds'", "cats", "dogs")


def test_the_grids_have_their_classes_names_beside_the_rows(pets):
    grid = np.asarray(Image.open(pets[0] / "samples" / "image_at_epoch_0001.png").convert("L"))
    rows = grid[-2 * 56 :, :-560]
    names = [row for row in np.split(rows, 2) if row.min() < 100]
    assert len(names) == 2 and not np.array_equal(*names)


def test_evaluate_names_the_classes(pets):
    result = pets[1]["evaluate"]
    assert result.status == 0, result.err
    classes = [line.split()[1] for line in result.out.splitlines() if line.startswith("class ")]
    assert classes == ["cats", "dogs"]


def test_each_run_says_what_measured_it_and_how_much_of_unseen_images_that_reads(pets):
    said = r"Measured by inception_\w+, which reads ([\d.]+)% of unseen images\."
    (trained,) = re.findall(r"It reads ([\d.]+)% right", pets[1]["train"].out)
    (training,) = re.findall(said, pets[1]["train"].out)
    (evaluation,) = re.findall(said, pets[1]["evaluate"].err)
    assert training == evaluation and float(training) == pytest.approx(float(trained), abs=0.06)


def test_a_generator_of_other_classes_than_the_data_names_dataset(pets):
    assert pets[1]["mismatch"].status == 2
    assert "--dataset" in pets[1]["mismatch"].err.splitlines()[-1]


def test_few_steps_are_not_called_collapse(pets):
    assert "COLLAPSED" not in pets[1]["train"].out


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
    flat = keras.layers.Dense(784)(latent)
    image = keras.layers.Reshape((28, 28, 1))(flat)
    with_lambda = keras.layers.Lambda(lambda x: open("ran", "w") and x)(image)
    keras.Model(latent, with_lambda).save("lambda.h5")
    nested = keras.Sequential([keras.layers.Lambda(lambda x: x)])(image)
    keras.Model(latent, nested).save("nested_lambda.h5")
    activated = keras.layers.Activation(lambda x: open("ran", "w") and x)(image)
    keras.Model(latent, activated).save("lambda_activation.h5")
    Path("ran").unlink()
    os.chdir(before)

    keras.Model(latent, flat).save(folder / "flat.h5")
    return folder


def test_what_cannot_be_drawn_measured_or_learnt_is_refused_in_one_line(
    bad_files, tiny_run, digits_npz, tmp_path
):
    folder = tmp_path / "cwd"
    folder.mkdir()
    (folder / "file").write_text("in the way")
    few = tmp_path / "few.npz"
    np.savez(few, images=synthetic_digits(1)[0])
    best = tiny_run[0] / "checkpoints" / "generator_best.h5"
    plain = gan_mnist.build_generator(gan_mnist.Settings(latent_dim=8, conditional=False))
    plain.save(tmp_path / "plain.h5")
    unconditional = ["generate", "--checkpoint", tmp_path / "plain.h5"]
    cases = {
        "unknown ending": ["generate", "--output", "digits.jpg"],
        "not digits": ["generate", "--digits", "two"],
        "no digits": ["generate", "--digits", ""],
        "output in the way": ["generate", "--output", "file/digits.png"],
        "digits of a plain one": [*unconditional, "--digits", "3"],
        "no such images": ["evaluate", "--images", "nowhere.npz", "--dataset", digits_npz],
        "too few images": ["evaluate", "--images", few, "--dataset", digits_npz],
        "too small a count": ["evaluate", "--count", 1, "--dataset", digits_npz],
        "both": ["evaluate", "--images", digits_npz, "--checkpoint", best],
        "less than a batch": ["--dataset", digits_npz, "--batch-size", "5000"],
        "nothing to resume": ["train", "--resume", "--dataset", digits_npz],
        "not an .npz": ["--dataset", ROOT / "requirements.txt"],
        "a folder without pictures": ["--dataset", ROOT / "tests"],
    }
    for name in [*sorted(path.name for path in bad_files.iterdir()), "missing.h5"]:
        cases[name] = ["generate", "--checkpoint", bad_files / name]
    drawn = [*unconditional, "--count", 3, "--output", tmp_path / "x.npz"]
    jobs = [(arguments, folder) for arguments in [*cases.values(), drawn]]
    *results, last = run_batch(jobs, tmp_path / "scratch")
    for name, result in zip(cases, results, strict=True):
        assert result.status == 2 and "Traceback" not in result.err, (name, result)
        line = result.err.splitlines()[-1]
        assert line.startswith("gan_mnist.py: ") and (".h5" not in name or name in line), line
    assert [*contents(folder)] == ["file"]
    # Asked for no digit, a plain generator draws.
    assert last.status == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays.files == ["images"] and arrays["images"].shape == (3, 28, 28, 1)


def test_a_named_generator_is_enough_where_the_shipped_one_is_missing(
    tmp_path, monkeypatch, capsys
):
    shutil.copy(WEIGHTS / SHIPPED, tmp_path / "mine.h5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan_mnist, "SHIPPED_GENERATOR", tmp_path / "missing.h5")
    assert gan_mnist.main(["generate", "--count", "2"]) == 2
    assert "no generator yet" in capsys.readouterr().err
    words = ["generate", "--checkpoint", "mine.h5", "--count", "2", "--output", "two.png"]
    assert gan_mnist.main(words) == 0 and (tmp_path / "two.png").exists()
