"""Data that is not MNIST: every kind is read or rejected in a line; what a run makes of it."""

import csv
import functools
import io
import json
import resource
import struct
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import npz_bytes, small, synthetic_digits
from PIL import Image

import gan_mnist

COLOURED = np.random.default_rng(0).integers(0, 201, (60, 8, 8, 3), np.uint8)
GREY = COLOURED[..., 0]
TIMES = np.arange(60) % 3
SETTINGS = gan_mnist.Settings()


def load(path, **settings):
    return gan_mnist.load_dataset(gan_mnist.Settings(dataset=str(path), **settings))


def write_pictures(folder, images, ending=".png"):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}{ending}")
    return folder


def write_classes(folder, images, names=("ants", "bees", "cats")):
    for label, name in enumerate(names):
        write_pictures(folder / name, images[TIMES == label])
    return folder


def png_chunk(kind, body):
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def zip_bytes(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name.replace("_npy", ".npy"), body)
    return file.getvalue()


# ----- Files and folders


@pytest.mark.parametrize(("images", "shape"), [(GREY, (8, 8, 1)), (COLOURED, (8, 8, 3))])
def test_subfolders_of_pictures_are_classes_by_name(images, shape, tmp_path):
    folder = write_classes(tmp_path / "mine", images)
    (folder / "bees" / "notes.txt").write_text("not a picture")
    (folder / "bees" / "._0.png").write_bytes(b"what macOS leaves")
    (folder / ".hidden").mkdir()
    dataset = load(folder)
    assert np.array_equal(dataset.labels, np.sort(TIMES)) and dataset.labels.dtype == np.uint8
    order = np.argsort(TIMES, kind="stable")
    assert np.array_equal(dataset.images, images[order].reshape(60, *shape))
    assert dataset.class_names == ("ants", "bees", "cats")
    assert dataset.name == "mine/" and dataset.test_images is None


def test_a_flat_folder_of_pictures_has_no_labels_and_is_never_taken_for_mnist(tmp_path):
    dataset = load(write_pictures(tmp_path / "mnist", COLOURED))
    assert dataset.labels is None and np.array_equal(dataset.images, COLOURED)
    assert dataset.name != "mnist"


def test_pictures_beside_folders_are_a_class_named_like_the_folder(tmp_path):
    folder = write_classes(tmp_path / "mine", GREY, names=("ants", "zebras"))
    Image.fromarray(GREY[0]).save(folder / "stray.png")
    dataset = load(folder)
    assert dataset.class_names == ("ants", "mine", "zebras")
    assert np.bincount(dataset.labels).tolist() == [20, 1, 20]
    assert np.array_equal(dataset.images[dataset.labels == 1][0, ..., 0], GREY[0])


@pytest.mark.parametrize("ending", [".jpg", ".bmp", ".gif", ".webp", ".PPM"])
def test_other_kinds_of_pictures_are_read(ending, tmp_path):
    smooth = np.linspace(0, 255, 64).astype(np.uint8).reshape(1, 8, 8, 1).repeat(3, axis=3)
    dataset = load(write_pictures(tmp_path / "mine", smooth, ending))
    assert np.abs(dataset.images.astype(int) - smooth).max() <= 8


def test_a_photo_stands_upright_transparency_is_white_and_grey_stays_grey(tmp_path):
    coloured, grey = write_pictures(tmp_path / "a", ()), write_pictures(tmp_path / "b", GREY[:1])
    upright = Image.new("RGB", (8, 8))
    upright.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # lies upside down
    upright.rotate(180).save(coloured / "a.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(coloured / "b.png")
    Image.new("LA", (8, 8), (99, 255)).save(grey / "a.png")
    images = load(coloured).images
    assert images[0, :3].min() > 250 and images[0, 5:].max() < 5
    assert images[1].min() == 255
    assert load(grey).images[1].tolist() == [[[99]] * 8] * 8


@pytest.mark.parametrize("names", [("images", "labels", "test_images"), ("images",)])
def test_an_npz_gives_images_labels_and_unseen_images(names, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **dict(zip(names, (COLOURED, TIMES, COLOURED[:7]), strict=False)))
    dataset = load(path)
    assert np.array_equal(dataset.images, COLOURED) and dataset.name == "mine.npz"
    if len(names) == 1:
        assert dataset.labels is None and dataset.test_images is None
    else:
        assert np.array_equal(dataset.labels, TIMES)
        assert np.array_equal(dataset.test_images, COLOURED[:7])


def test_an_npy_and_an_npz_of_one_unnamed_array_are_images(tmp_path):
    np.save(tmp_path / "mine.npy", GREY)
    np.savez(tmp_path / "mine.npz", GREY)
    for name in ("mine.npy", "mine.npz"):
        dataset = load(tmp_path / name)
        assert np.array_equal(dataset.images, GREY[..., np.newaxis]) and dataset.labels is None


# ----- Arrays, as from a notebook


def test_a_pair_of_images_and_labels_is_a_data_set():
    dataset = gan_mnist.as_dataset((GREY, TIMES), SETTINGS)
    assert np.array_equal(dataset.images[..., 0], GREY)
    assert np.array_equal(dataset.labels, TIMES) and dataset.labels.dtype == np.uint8
    assert dataset.class_names == ("0", "1", "2")


LABELS = {  # what they are called: their names, and labels
    "words": (("ant", "bee", "cat"), np.array(["ant", "bee", "cat"])[TIMES]),
    "numbers with gaps": (("-1", "1", "1000"), np.array([-1, 1, 1000])[TIMES]),
    "fractions": (("0.5", "1.5", "2.5"), TIMES + 0.5),
    "a column": (("0", "1", "2"), TIMES[:, np.newaxis]),
    "a list": (("0", "1", "2"), TIMES.tolist()),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_any_kind_are_numbered_in_order_and_keep_their_names(case):
    names, labels = LABELS[case]
    dataset = gan_mnist.as_dataset((GREY, labels), SETTINGS)
    assert np.array_equal(dataset.labels, TIMES) and dataset.labels.dtype == np.uint8
    assert dataset.class_names == names


def test_class_names_that_are_given_stay_with_their_classes():
    given = gan_mnist.Dataset(GREY, TIMES, "mine", None, ("ants", "bees", "cats"))
    assert gan_mnist.as_dataset(given, SETTINGS).class_names == ("ants", "bees", "cats")
    without_bees = given._replace(images=GREY[TIMES != 1], labels=TIMES[TIMES != 1])
    dataset = gan_mnist.as_dataset(without_bees, SETTINGS)
    named = [dataset.class_names[label] for label in dataset.labels]
    assert named == ["ants", "cats"] * 20


NOT_DATA = {
    "a name": "mnist",
    "fractions": COLOURED / 255,
    "whole numbers of another width": COLOURED.astype(np.int64),
    "a tf.data.Dataset": tf.data.Dataset.from_tensor_slices(GREY),
}


@pytest.mark.parametrize("case", NOT_DATA)
def test_data_of_another_kind_is_rejected_in_one_line(case):
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.as_dataset(NOT_DATA[case], SETTINGS)
    assert len(str(refusal.value).splitlines()) == 1


# ----- Sizes and colours


def test_pictures_that_differ_become_alike_by_what_their_refusal_suggests(tmp_path):
    folder = write_pictures(tmp_path / "mine", ())
    board = (np.indices((32, 48)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(folder / "a.png")
    Image.fromarray(np.stack([board.T] * 3, axis=-1)).save(folder / "b.png")
    with pytest.raises(gan_mnist.UsageError, match="differ") as refusal:
        load(folder)
    assert "--image-size 64 --image-colour grey" in str(refusal.value)
    for colour, channels in (("grey", 1), ("colour", 3)):
        images = load(folder, image_size=64, image_colour=colour).images
        assert images.shape == (2, 64, 64, channels)
    smaller = load(folder, image_size=8, image_colour="grey").images
    assert np.abs(smaller.astype(int) - 127).max() < 25  # averaged, not every fourth pixel


def test_arrays_are_cut_to_the_middle_square(tmp_path):
    wide = np.zeros((3, 10, 30), np.uint8)
    wide[:, :, 10:20] = 200
    np.savez(tmp_path / "wide.npz", images=wide)
    dataset = load(tmp_path / "wide.npz", image_size=5)
    assert dataset.images.shape == (3, 5, 5, 1) and dataset.images.min() > 170
    assert dataset.name == "wide.npz (5, 5, 1)"


def test_resized_mnist_is_not_called_mnist(monkeypatch):
    images, labels = synthetic_digits(50)
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: [images, labels, images[:9], labels[:9]])
    assert load("mnist").name == "mnist"
    dataset = load("mnist", image_size=8, image_colour="colour")
    assert dataset.images.shape == (50, 8, 8, 3) and dataset.test_images.shape == (9, 8, 8, 3)
    assert dataset.name == "mnist (8, 8, 3)"  # what the network knows of MNIST does not fit it


# ----- From Keras


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_data_sets_of_keras_come_labelled_and_with_unseen_images(name, monkeypatch):
    images = GREY if name == "fashion_mnist" else COLOURED
    train, test = (images, TIMES[:, np.newaxis]), (images[:9], TIMES[:9, np.newaxis])
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: (train, test))
    dataset = load(name)
    assert np.array_equal(dataset.images, images.reshape(dataset.images.shape))
    assert np.array_equal(dataset.labels, TIMES) and dataset.name == name
    assert len(dataset.test_images) == 9


def test_a_data_set_that_keras_cannot_download_costs_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))

    def offline():
        raise RuntimeError("URL fetch failure on https://server/cifar-10")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", offline)
    with pytest.raises(gan_mnist.RunError, match="cannot download .* https://server/cifar-10"):
        load("cifar10")


# ----- What is rejected


def an_empty_folder(folder):
    return folder, ["no picture"]


def not_square(folder):
    return write_pictures(folder / "cats", COLOURED[:, :6]), ["cats", "--image-size"]


def too_small(folder):
    return write_pictures(folder / "cats", COLOURED[:, :3, :3]), ["cats", "at least 4"]


def a_truncated_picture(folder):
    path = write_pictures(folder / "cats", COLOURED) / "07.png"
    path.write_bytes(path.read_bytes()[:-60])
    return folder / "cats", ["07.png"]


def an_enormous_picture(folder):
    write_pictures(folder / "cats", COLOURED[:2])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 9_500, 8, 2, 0, 0, 0))
    body = header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (folder / "cats" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return folder / "cats", ["00.png", "pixels"]


def a_16_bit_picture(folder):
    return write_pictures(folder / "cats", GREY.astype(np.uint16) * 256), ["00.png", "8 bits"]


def a_program_for_a_picture(folder):
    write_pictures(folder / "cats", ())
    (folder / "cats" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    return folder / "cats", ["a.png"]


def an_npz(folder, body):
    (folder / "mine.npz").write_bytes(body)
    return folder / "mine.npz", ["mine.npz"]


def an_npz_bomb(folder):
    return an_npz(folder, zip_bytes(images_npy=bytes(200 * 2**20)))


def an_npz_with_a_text(folder):
    return an_npz(folder, zip_bytes(images="hello"))


def a_text_file(folder):
    return an_npz(folder, b"This is not an .npz.")


def nothing(folder):
    return folder / "nothing.npz", ["nothing.npz"]


REJECTED = [
    *(an_empty_folder, not_square, too_small),
    *(a_truncated_picture, an_enormous_picture, a_16_bit_picture, a_program_for_a_picture),
    *(an_npz_bomb, an_npz_with_a_text, a_text_file, nothing),
]


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: case.__name__)
@pytest.mark.filterwarnings("error")
def test_files_that_do_not_fit_are_rejected_in_one_line_before_memory_is_taken(
    case, tmp_path, monkeypatch
):
    path, words = case(tmp_path)
    monkeypatch.setattr(gan_mnist, "LARGEST_DATASET", 100 * 2**20)
    tracemalloc.start()
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.as_dataset(gan_mnist.load_path(path, SETTINGS), SETTINGS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    line = str(refusal.value)
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line
    assert peak < 30 * 2**20


BAD_ARRAYS = {  # the arrays, and a word of the line that rejects them
    "no arrays at all": ({}, "no array"),
    "flat images": ({"images": GREY.reshape(60, 64)}, r"\(60, 64\)"),
    "a single image": ({"images": GREY[0]}, r"\(8, 8\)"),
    "signed images": ({"images": GREY.astype(np.int8)}, "int8"),
    "fractions": ({"images": GREY / 255}, "float64"),
    "other names": ({"pictures": GREY, "classes": TIMES}, "pictures, classes"),
    "labels of another length": ({"images": GREY, "labels": TIMES[:-1]}, "59"),
    "labels in one-hot": ({"images": GREY, "labels": np.eye(3)[TIMES]}, "180 labels"),
    "too many classes": ({"images": np.tile(GREY, (5, 1, 1)), "labels": np.arange(300)}, "256"),
    "fractions for unseen images": ({"images": GREY, "test_images": GREY / 255}, "test images"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_rejected_in_one_line(case, tmp_path):
    arrays, words = BAD_ARRAYS[case]
    (tmp_path / "mine.npz").write_bytes(npz_bytes(arrays))
    with pytest.raises(gan_mnist.UsageError, match=words) as refusal:
        load(tmp_path / "mine.npz")
    line = str(refusal.value)
    assert len(line.splitlines()) == 1 and ("mine.npz" in line or "test images" in line)


def test_a_pickle_is_rejected_and_never_run(tmp_path):
    class MakesFolder:
        def __reduce__(self):
            return (tmp_path / "made").mkdir, ()

    evil = np.array([MakesFolder()], object)
    np.savez(tmp_path / "evil.npz", images=evil)
    np.save(tmp_path / "evil.npy", evil)
    (tmp_path / "raw.npy").write_bytes(evil.dumps())
    for name in ("evil.npz", "evil.npy", "raw.npy"):
        with pytest.raises(gan_mnist.UsageError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("images", "told"),
    [(COLOURED, "fewer images than --batch-size 61"), (GREY[:0], "must be uint8")],
)
def test_training_on_fewer_images_than_a_batch_is_rejected_before_anything_is_written(
    images, told, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gan_mnist.UsageError, match=told):
        gan_mnist.train(images, settings=gan_mnist.Settings(batch_size=61))
    assert not any(tmp_path.iterdir())


# ----- What a run makes of data with names and colours


def run_settings(folder, **changes):
    return small(
        **{"samples_dir": str(folder / "samples"), "checkpoints_dir": str(folder / "checkpoints")}
        | {"batch_size": 20, "evaluation_images": 100, "inception": "mnist"}
        | changes
    )


@pytest.fixture(scope="module")
def named_run(tmp_path_factory):
    """The folder of a run on 60 coloured pictures of ants, bees and cats."""
    folder = tmp_path_factory.mktemp("named")
    write_classes(folder / "mine", COLOURED)
    gan_mnist.train(settings=run_settings(folder, dataset=str(folder / "mine"), epochs=2))
    return folder


def test_a_run_on_coloured_pictures_draws_a_row_a_class_with_names_beside(named_run):
    samples = named_run / "samples"
    with Image.open(samples / "image_at_epoch_0002.png") as grid:
        assert grid.mode == "RGB" and grid.width > 640 and grid.height == 3 * 64 + 36
        left = np.asarray(grid)[36:, : grid.width - 640]
    names = [left[64 * row : 64 * (row + 1)] for row in range(3)]
    assert all(name.min() < 100 for name in names)  # each has its word in black
    assert not np.array_equal(names[0], names[1])
    with Image.open(samples / "training.gif") as animation:
        assert animation.size == grid.size and animation.n_frames == 2
    assert (samples / "metrics.png").exists()


def test_class_names_are_kept_with_the_generator_and_can_be_asked_for(named_run, monkeypatch):
    monkeypatch.chdir(named_run)
    generator = gan_mnist.load_generator("checkpoints/generator_best.h5")
    assert tuple(generator.class_names) == ("ants", "bees", "cats")
    by_name = gan_mnist.generate(generator, 2, "cats,ants", seed=0)
    assert np.array_equal(by_name, gan_mnist.generate(generator, 2, "20", seed=0))
    for flag in ("--classes", "--digits"):
        assert gan_mnist.main(["generate", flag, "cats", "--count", "4", "--output", "x.npz"]) == 0
        with np.load("x.npz") as arrays:
            assert arrays["labels"].tolist() == [2] * 4 and arrays["images"].shape == (4, 8, 8, 3)
        (named_run / "x.npz").unlink()
    with pytest.raises(gan_mnist.UsageError, match="dogs.*cats"):
        gan_mnist.generate(generator, 2, "dogs")


def test_a_generator_is_measured_against_data_of_as_many_classes_alone(
    named_run, monkeypatch, capsys
):
    monkeypatch.chdir(named_run)
    flags = ["evaluate", "--inception", "mnist", "--count", "30", "--json", "--dataset"]
    assert gan_mnist.main([*flags, str(named_run / "mine")]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["class_names"] == ["ants", "bees", "cats"] and measured["images"] == 30
    assert measured["dataset"] == "mine/"
    np.savez("grey.npz", images=GREY, labels=TIMES % 2)
    assert gan_mnist.main([*flags, "grey.npz"]) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "generator_best.h5" in refusal and "--dataset" in refusal


@pytest.mark.parametrize("digits", [None, "21"])
def test_coloured_images_are_drawn_in_all_four_forms(digits, named_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = str(named_run / "checkpoints" / "generator_best.h5")
    flags = ["--checkpoint", best, "--count", "18", "--seed", "5"]
    flags += ["--digits", digits] if digits else []
    walk = functools.partial(gan_mnist.latent_walk, frames=12)  # takes a tenth of the time
    monkeypatch.setattr(gan_mnist, "latent_walk", walk)
    for output in ("x.png", "x.npz", "x.gif", "x"):
        assert gan_mnist.main(["generate", *flags, "--output", output]) == 0
    with np.load("x.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert labels.tolist() == ([2, 1] * 18 if digits else [0, 1, 2] * 6)
    columns = 2 if digits else 10
    grid = np.asarray(Image.open("x.png"))[36::8, ::8]  # below the title
    tiles = grid.reshape(-1, 8, columns, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    assert np.array_equal(tiles[: len(images)], images) and not tiles[len(images) :].any()
    for number, path in enumerate(sorted((tmp_path / "x").iterdir())):
        assert np.array_equal(np.asarray(Image.open(path)), images[number])
        assert path.name == f"{number:06d}.png"
    with Image.open("x.gif") as walk:
        assert walk.n_frames == 12 and walk.size == (64 * columns, 64)
    for output in ("x.npz", "x"):
        assert np.array_equal(gan_mnist.load_path(tmp_path / output, SETTINGS).images, images)


def test_a_notebooks_images_are_trained_on_without_classes_in_one_line(tmp_path, capsys):
    generator = gan_mnist.train(GREY, 1, run_settings(tmp_path, image_size=12))
    assert generator.output_shape == (None, 12, 12, 1) and len(generator.inputs) == 1
    printed = capsys.readouterr().out
    assert "training without classes" in printed and "COLLAPSED" not in printed
    assert (tmp_path / "samples" / "metrics.png").exists()


def test_a_notebooks_images_and_words_for_labels_are_trained_on_with_classes_in_one_line(tmp_path):
    words = np.array(["ant", "bee", "cat"])[TIMES]
    generator = gan_mnist.train((COLOURED, words), 1, run_settings(tmp_path))
    assert generator.output_shape == (None, 8, 8, 3) and len(generator.inputs) == 2
    assert gan_mnist.generate(generator, 4, "cat,bee,ant").shape == (12, 8, 8, 3)


def test_a_data_set_may_have_any_name(tmp_path, recwarn):
    path = tmp_path / "cost_$5_and_$6 \u6570\u5b57.npz"
    np.savez(path, images=GREY)
    gan_mnist.train(settings=run_settings(tmp_path, dataset=str(path), epochs=1))
    with open(tmp_path / "samples" / "metrics.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert "cost_$5" in row["dataset"] and (tmp_path / "samples" / "metrics.png").exists()
    assert not [str(x.message) for x in recwarn if "Glyph" in str(x.message)]


# ----- Pictures


def test_a_walk_comes_back_without_a_jump_and_its_points_are_as_likely_as_any():
    generator = gan_mnist.build_generator(small(), (4, 4, 1))
    walk = gan_mnist.latent_walk(generator, 500, seed=3)
    assert walk.shape == (120, 500, 8)
    lengths = np.linalg.norm(walk, axis=2)
    steps = np.linalg.norm(walk - np.roll(walk, 1, axis=0), axis=2)
    assert np.all(steps < 1.01 * 2 * np.pi / 120 * lengths.max(axis=0))
    assert np.abs(walk.mean(axis=(1, 2))).max() < 0.1 and np.abs(walk.std((1, 2)) - 1).max() < 0.1


@pytest.mark.parametrize("classes", [0, 1, 26])
def test_a_grid_has_a_row_a_class(classes, monkeypatch):
    settings = small(conditional=classes > 0)
    generator = gan_mnist.build_generator(settings, (4, 4, 1), classes)
    monkeypatch.setattr(gan_mnist, "draw", lambda generator, latent, classes: classes)
    rows = gan_mnist.draw_grid(generator, 0).reshape(-1, 10)
    assert np.array_equal(rows, np.tile(np.arange(classes or 10)[:, None], (1, 10)))


@pytest.mark.parametrize("shape", [(5, 28, 28, 1), (1, 100, 100, 3), (4, 4, 4, 1)])
def test_a_mosaic_holds_every_image_in_its_place(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    picture = gan_mnist.mosaic(images, 3)
    scale = picture.shape[1] // (3 * shape[2])
    assert 48 <= scale * shape[1] or scale == 1
    cells = picture[::scale, ::scale].reshape(-1, shape[1], 3, *shape[2:]).swapaxes(1, 2)
    cells = cells.reshape(-1, *shape[1:])
    assert np.array_equal(cells[: shape[0]], images) and not cells[shape[0] :].any()


def test_a_gif_shows_colours_as_they_are(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = [np.stack([np.tile(np.roll(ramp, n), (64, 1))] * 3, -1) for n in range(0, 40, 4)]
    for frame in frames:
        frame[..., 1] //= 2
    gan_mnist.save_animation(tmp_path / "x.gif", map(Image.fromarray, frames), 20)
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == len(frames) and animation.info["duration"] == 50
        for number, frame in enumerate(frames):
            animation.seek(number)
            shown = np.asarray(animation.convert("RGB"), int)
            assert np.abs(shown - frame).mean() < 4


def test_the_animation_of_a_long_run_needs_no_open_file_a_frame(tmp_path):
    run = SimpleNamespace(settings=gan_mnist.Settings(samples_dir=str(tmp_path)), history=[])
    for number in range(300):
        frame = Image.fromarray(np.full((8, 8), number % 256, np.uint8))
        frame.save(tmp_path / f"image_at_epoch_{number + 1:04d}.png")
    (tmp_path / "image_at_epoch_0007.png").write_bytes(b"damaged")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        gan_mnist.draw_curves(run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Image.open(tmp_path / "training.gif") as gif:
        assert gif.n_frames == 299


def test_the_curves_leave_out_epochs_that_were_not_measured(tmp_path):
    trained = {"epoch": 1, "discriminator_loss": 0.6, "generator_loss": 0.8}
    unmeasured = trained | {"inception_score": None, "fid": None, "class_shares": None}
    scores = {"epoch": 2, "inception_score": 9.0, "fid": 1.5, "class_shares": [0.1] * 10}
    history = [unmeasured, trained | scores]
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        gan_mnist.save_metrics_plot(path, history[:number], "title", tuple("0123456789"))
        with Image.open(path) as picture:
            assert picture.size == (1100, 750)


def test_the_axis_of_the_fid_has_plain_numbers_in_a_short_run(tmp_path, monkeypatch):
    figures = []

    class Kept(gan_mnist.Figure):
        def savefig(self, path):
            super().savefig(path)
            figures.append(self)

    monkeypatch.setattr(gan_mnist, "Figure", Kept)
    names = "epoch discriminator_loss generator_loss inception_score fid class_shares".split()
    values = ((1, 0.6, 0.8, 8.0, 3.4, [0.1] * 10), (2, 0.5, 0.9, 9.0, 1.6, [0.1] * 10))
    history = [dict(zip(names, row, strict=True)) for row in values]
    gan_mnist.save_metrics_plot(tmp_path / "plot.png", history, "title", tuple("0123456789"))
    labels = [text.get_text() for text in figures[0].axes[2].yaxis.get_ticklabels(which="both")]
    assert len(labels) > 2 and all(float(label) > 0 for label in labels)  # no $10^0$
