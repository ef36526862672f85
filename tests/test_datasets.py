"""Data that is not MNIST: every kind is read, resized where asked, or refused in a line."""

import gzip
import io
import resource
import struct
import tracemalloc
import zipfile
import zlib

import keras
import numpy as np
import pytest
from conftest import NO_NETWORK, npz_bytes, rows, run_batch, synthetic_digits
from PIL import Image

import gan_mnist

COLOURED = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
GREY = COLOURED[..., 0]
TIMES = np.arange(60) % 3


def load(path, **settings):
    return gan_mnist.load_dataset(gan_mnist.Settings(dataset=str(path), **settings))


def write_pictures(folder, images, ending=".png"):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}{ending}")
    return folder


def idx_bytes(array, shape=None):
    shape = shape or array.shape
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + array.tobytes()


def png_chunk(kind, body):
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def npy_bytes(shape, kind="|u1", body=b""):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def zip_bytes(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return file.getvalue()


# ----- What is read


@pytest.mark.parametrize(("images", "shape"), [(GREY, (8, 8, 1)), (COLOURED, (8, 8, 3))])
def test_subfolders_of_pictures_are_classes_in_order(images, shape, tmp_path):
    for label, name in enumerate(("2", "9", "10")):
        write_pictures(tmp_path / "mine" / name, images[TIMES == label])
    (tmp_path / "mine" / "9" / "notes.txt").write_text("not a picture")
    (tmp_path / "mine" / "9" / "._0.png").write_bytes(b"what macOS leaves")
    (tmp_path / "mine" / ".hidden").mkdir()
    dataset = load(tmp_path / "mine")
    assert np.array_equal(dataset.labels, np.sort(TIMES)) and dataset.labels.dtype == np.uint8
    order = np.argsort(TIMES, kind="stable")
    assert np.array_equal(dataset.images, images[order].reshape(60, *shape))
    assert dataset.name == "mine/" and dataset.test_images is None


def test_a_flat_folder_of_pictures_has_no_labels(tmp_path):
    dataset = load(write_pictures(tmp_path / "mnist", COLOURED))
    assert dataset.labels is None and np.array_equal(dataset.images, COLOURED)
    assert dataset.name != "mnist"


@pytest.mark.parametrize("ending", [".jpg", ".bmp", ".gif", ".webp", ".PPM"])
def test_other_kinds_of_pictures_are_read(ending, tmp_path):
    smooth = np.linspace(0, 255, 64).astype(np.uint8).reshape(1, 8, 8, 1).repeat(3, axis=3)
    dataset = load(write_pictures(tmp_path / "mine", smooth, ending))
    assert np.abs(dataset.images.astype(int) - smooth).max() <= 8


def test_a_grey_picture_with_transparency_stays_grey(tmp_path):
    folder = write_pictures(tmp_path / "mine", GREY[:1])
    Image.new("LA", (8, 8), (99, 255)).save(folder / "a.png")
    assert load(folder).images[1].tolist() == [[[99]] * 8] * 8


def test_a_photo_stands_upright_and_transparency_is_white(tmp_path):
    folder = write_pictures(tmp_path / "mine", ())
    upright = Image.new("RGB", (8, 8))
    upright.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # lies upside down
    upright.rotate(180).save(folder / "a.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "b.png")
    images = load(folder).images
    assert images[0, :3].min() > 250 and images[0, 5:].max() < 5
    assert images[1].min() == 255


@pytest.mark.parametrize(
    ("images", "labels", "unseen", "zipped"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", True),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte", "t10k-images.idx3-ubyte", False),
        (
            "emnist-letters-train-images-idx3-ubyte",
            "emnist-letters-train-labels-idx1-ubyte",
            "emnist-letters-test-images-idx3-ubyte",
            True,
        ),
    ],
)
def test_idx_files_come_under_all_their_names(images, labels, unseen, zipped, tmp_path):
    first = "letters" in images  # EMNIST's are numbered from 1
    files = {images: GREY, labels: (TIMES + first).astype(np.uint8), unseen: GREY[:5]}
    for name, array in files.items():
        body = idx_bytes(array)
        path = tmp_path / f"{name}{'.gz' * zipped}"
        path.write_bytes(gzip.compress(body) if zipped else body)
    for path in (tmp_path, tmp_path / f"{images}{'.gz' * zipped}"):
        dataset = load(path)
        assert np.array_equal(dataset.images, GREY[..., np.newaxis])
        assert np.array_equal(dataset.labels, TIMES)
        assert np.array_equal(dataset.test_images, GREY[:5, ..., np.newaxis])
    (tmp_path / f"{labels}{'.gz' * zipped}").unlink()
    assert load(tmp_path).labels is None


@pytest.mark.parametrize("names", [("images", "test_images"), ("x_train", "x_test")])
def test_an_npz_may_be_coloured_and_hold_unseen_images(names, tmp_path):
    np.savez(tmp_path / "mine.npz", **dict(zip(names, (COLOURED, COLOURED[:7]), strict=True)))
    dataset = load(tmp_path / "mine.npz")
    assert np.array_equal(dataset.images, COLOURED)
    assert np.array_equal(dataset.test_images, COLOURED[:7])


def test_mnist_comes_with_its_test_images(mnist):
    dataset = load("mnist")
    assert np.array_equal(dataset.test_images[..., 0], mnist["x_test"])
    resized = load("mnist", image_size=8, image_colour="colour")
    assert resized.images.shape == (60_000, 8, 8, 3) and resized.test_images.shape[1:] == (8, 8, 3)
    assert resized.name == "mnist 8x8x3"  # the ruler for mnist doesn't fit it


def test_pictures_of_mixed_sizes_and_colours_become_alike_and_are_antialiased(tmp_path):
    folder = write_pictures(tmp_path / "mine", ())
    board = np.kron(np.indices((32, 48)).sum(axis=0) % 2 * 255, np.ones((1, 1))).astype(np.uint8)
    Image.fromarray(board).save(folder / "a.png")
    Image.fromarray(np.stack([board.T] * 3, axis=-1)).save(folder / "b.png")
    for colour, channels in (("grey", 1), ("colour", 3)):
        images = load(folder, image_size=8, image_colour=colour).images
        assert images.shape == (2, 8, 8, channels)
        assert np.abs(images.astype(int) - 127).max() < 25


def test_arrays_are_cut_to_the_middle_square(tmp_path):
    wide = np.zeros((3, 10, 30), np.uint8)
    wide[:, :, 10:20] = 200
    np.savez(tmp_path / "wide.npz", images=wide)
    images, _, name, _ = load(tmp_path / "wide.npz", image_size=5)
    assert images.shape == (3, 5, 5, 1) and images.min() > 170
    assert name == "wide.npz 5x5x1"


# ----- From Keras


def test_fashion_mnist_is_what_keras_has_and_cifar10_offline_costs_one_line(tmp_path):
    cached = tmp_path / "keras" / "datasets" / "fashion-mnist"
    cached.mkdir(parents=True)
    images, labels = synthetic_digits(300)
    for kind, array in (("train", slice(300)), ("t10k", slice(50))):
        for name, part in (("images-idx3", images[array]), ("labels-idx1", labels[array])):
            part = idx_bytes(part) if name[0] == "i" else bytes(8) + part.tobytes()
            (cached / f"{kind}-{name}-ubyte.gz").write_bytes(gzip.compress(part))
    flags = ("--epochs", 1, "--batch-size", 50, "--evaluation-images", 100, "--inception", "mnist")
    jobs = [(["--dataset", name, *flags], tmp_path) for name in ("fashion_mnist", "cifar10")]
    environment = {**NO_NETWORK, "KERAS_HOME": tmp_path / "keras"}
    fashion, cifar10 = run_batch(jobs, tmp_path / "scratch", **environment)
    assert (fashion.status, fashion.err) == (0, "") and "300 images of 28x28x1" in fashion.out
    assert rows(tmp_path)[0]["dataset"] == "fashion_mnist"
    assert cifar10.status == 1 and len(cifar10.err.splitlines()) == 1
    assert "cifar-10" in cifar10.err and "http" in cifar10.err
    assert "\b" not in cifar10.out and len(cifar10.out.splitlines()) < 4


def test_cifar10_is_coloured_and_labelled(monkeypatch, capsys):
    train, test = (COLOURED, TIMES[:, np.newaxis]), (COLOURED[:9], TIMES[:9, np.newaxis])
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (train, test))
    dataset = load("cifar10")
    assert np.array_equal(dataset.images, COLOURED) and np.array_equal(dataset.labels, TIMES)
    assert np.array_equal(dataset.test_images, COLOURED[:9]) and dataset.name == "cifar10"


# ----- What is refused


def an_empty_folder(folder):
    return folder, ["holds no picture"]


def an_empty_class(folder):
    write_pictures(folder / "cats", COLOURED)
    (folder / "dogs").mkdir()
    return folder, ["dogs", "no picture"]


def mixed_sizes(folder):
    write_pictures(folder / "cats", [COLOURED[0], COLOURED[1], COLOURED[2, :6, :6]])
    return folder / "cats", ["02.png", "--image-size"]


def mixed_colours(folder):
    write_pictures(folder / "cats", [COLOURED[0], GREY[0]])
    return folder / "cats", ["01.png", "--image-colour"]


def not_square(folder):
    return write_pictures(folder / "cats", COLOURED[:, :6]), ["cats", "--image-size"]


def too_small(folder):
    return write_pictures(folder / "cats", COLOURED[:, :3, :3]), ["cats", "at least 4"]


def an_unreadable_picture(folder):
    write_pictures(folder / "cats", COLOURED)
    (folder / "cats" / "07.png").write_bytes(b"no picture")
    return folder / "cats", ["07.png"]


def a_truncated_picture(folder):
    write_pictures(folder / "cats", COLOURED)
    path = folder / "cats" / "07.png"
    path.write_bytes(path.read_bytes()[:-60])
    return folder / "cats", ["07.png"]


def an_enormous_picture(folder):
    write_pictures(folder / "cats", COLOURED[:2])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 9_500, 8, 2, 0, 0, 0))
    path = folder / "cats" / "00.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    return folder / "cats", ["00.png", "pixels"]


def a_16_bit_picture(folder):
    return write_pictures(folder / "cats", GREY.astype(np.uint16) * 256), ["00.png", "8 bits"]


def a_program_for_a_picture(folder):
    write_pictures(folder / "cats", ())
    (folder / "cats" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    return folder / "cats", ["a.png"]


def a_picture_of_a_kind_not_let_in(folder):
    write_pictures(folder / "cats", ())
    Image.fromarray(GREY[0]).save(folder / "cats" / "a.png", "TIFF")
    return folder / "cats", ["a.png"]


def an_idx_file(folder, body, name="train-images-idx3-ubyte"):
    (folder / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    return folder, [name]


def idx_shorter_than_its_header(folder):
    return an_idx_file(folder, idx_bytes(GREY, (61, 8, 8)))


def idx_longer_than_its_header(folder):
    return an_idx_file(folder, idx_bytes(GREY, (59, 8, 8)))


def idx_of_an_enormous_claim(folder):
    return an_idx_file(folder, idx_bytes(GREY, (2**32 - 1,) * 3))


def idx_of_a_large_claim(folder):
    return an_idx_file(folder, idx_bytes(GREY, (2**10,) * 3))


def idx_of_floats(folder):
    return an_idx_file(folder, b"\0\0\x0d\x03" + idx_bytes(GREY)[4:])


def idx_without_a_header(folder):
    return an_idx_file(folder, b"\0\0")


def idx_not_zipped(folder):
    path, words = an_idx_file(folder, b"", "train-images-idx3-ubyte.gz")
    (path / words[0]).write_bytes(idx_bytes(GREY))
    return path, words


def a_gzip_bomb(folder):
    body = idx_bytes(GREY) + bytes(200 * 2**20)
    return an_idx_file(folder, body, "train-images-idx3-ubyte.gz")


def several_idx_sets(folder):
    for kind in ("digits", "letters"):
        an_idx_file(folder, idx_bytes(GREY), f"emnist-{kind}-train-images-idx3-ubyte")
    return folder, ["several", "emnist-digits"]


def labels_of_another_length(folder):
    an_idx_file(folder, idx_bytes(TIMES[:-1].astype(np.uint8)), "train-labels-idx1-ubyte")
    an_idx_file(folder, idx_bytes(GREY))
    return folder, ["labels", "60"]


def an_npz(folder, body):
    (folder / "mine.npz").write_bytes(body)
    return folder / "mine.npz", ["mine.npz"]


def unseen_images_of_another_shape(folder):
    return an_npz(folder, npz_bytes({"x_train": COLOURED, "x_test": GREY}))


def an_array_of_an_enormous_claim(folder):
    return an_npz(folder, zip_bytes(**{"images.npy": npy_bytes((10**6, 10**3, 10**3), body=b"x")}))


def an_array_of_a_large_claim(folder):
    return an_npz(folder, zip_bytes(**{"images.npy": npy_bytes((10**6, 28, 28), body=b"x")}))


def an_array_of_an_enormous_header(folder):
    return an_npz(folder, zip_bytes(**{"images.npy": npy_bytes((4,) * 15_000)}))


def an_npz_with_a_path(folder):
    sound = npy_bytes((1, 4, 4), body=bytes(16))
    return an_npz(folder, zip_bytes(**{"images.npy": sound, "../images.npy": sound}))


def an_npz_with_a_text(folder):
    return an_npz(folder, zip_bytes(images="hello"))


def nothing(folder):
    return folder / "nothing.npz", ["nothing.npz"]


REFUSED = [
    *(an_empty_folder, an_empty_class, mixed_sizes, mixed_colours, not_square, too_small),
    *(an_unreadable_picture, a_truncated_picture, an_enormous_picture, a_16_bit_picture),
    *(a_program_for_a_picture, a_picture_of_a_kind_not_let_in, an_array_of_an_enormous_header),
    *(idx_shorter_than_its_header, idx_longer_than_its_header),
    *(idx_of_an_enormous_claim, idx_of_a_large_claim, idx_of_floats, idx_without_a_header),
    *(idx_not_zipped, a_gzip_bomb, several_idx_sets, labels_of_another_length),
    *(unseen_images_of_another_shape, an_array_of_an_enormous_claim, an_array_of_a_large_claim),
    *(an_npz_with_a_path, an_npz_with_a_text, nothing),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
@pytest.mark.filterwarnings("error")
def test_data_that_cannot_be_is_refused_in_one_line_before_memory_is_taken(case, tmp_path):
    path, words = case(tmp_path)
    tracemalloc.start()
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_path(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30 * 2**20
    line = str(refusal.value)
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line


def test_what_would_become_too_large_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_mnist, "LARGEST_DATASET", 60 * 8 * 8 * 3 + 1000)
    folder = write_pictures(tmp_path / "mine", COLOURED)
    np.savez(tmp_path / "mine.npz", images=COLOURED)
    for path in (folder, tmp_path / "mine.npz"):
        assert len(load(path).images) == 60
        with pytest.raises(gan_mnist.UsageError, match="mine.* bytes"):
            load(path, image_size=9)


def test_training_refuses_too_few_images_and_a_gap_in_the_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gan_mnist.UsageError, match="60 images, but --batch-size is 256"):
        gan_mnist.train(COLOURED)
    dataset = gan_mnist.Dataset(COLOURED, 2 * TIMES, "mine")
    with pytest.raises(gan_mnist.UsageError, match="class 1 of 0 to 4"):
        gan_mnist.train(dataset, settings=gan_mnist.Settings(batch_size=20))
    assert not any(tmp_path.iterdir())


# ----- What is done with data of other shapes


def flat_ruler(settings, dataset):
    """A ruler that sees 4 pixels: to train one for the data would take longer than the run."""

    def outputs(images):
        pixels = images.reshape(len(images), -1)[:, ::16][:, :4] / 255
        return pixels, gan_mnist.tf.nn.softmax(pixels)

    ruler = gan_mnist.Ruler("flat", outputs, batch=100)
    mean, covariance = gan_mnist.feature_statistics(gan_mnist.measure(ruler, dataset.images)[0])
    return ruler._replace(mean=mean, covariance=covariance)


@pytest.fixture(scope="module")
def coloured_run(tmp_path_factory):
    """The folder of a run on 60 coloured images of 3 classes, and the generator it returned."""
    folder = tmp_path_factory.mktemp("coloured")
    images = write_pictures(folder / "mine" / "0", COLOURED[TIMES == 0]).parent
    for label in (1, 2):
        write_pictures(images / str(label), COLOURED[TIMES == label])
    settings = gan_mnist.Settings(
        samples_dir=str(folder / "samples"),
        checkpoints_dir=str(folder / "checkpoints"),
        dataset=str(images),
        epochs=2,
        batch_size=20,
        evaluation_images=100,
        latent_dim=2,
        generator_widths=(8,),
        discriminator_widths=(8,),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_mnist, "load_ruler", flat_ruler)
        return folder, gan_mnist.train(settings=settings)


def test_a_run_on_coloured_pictures_leaves_its_files(coloured_run):
    folder, generator = coloured_run
    assert generator.output_shape == (None, 8, 8, 3)
    with Image.open(folder / "samples" / "image_at_epoch_0002.png") as grid:
        assert grid.mode == "RGB" and grid.size == (10 * 64, 3 * 64 + 36)  # a row a class
    with Image.open(folder / "samples" / "training.gif") as animation:
        assert animation.size == (640, 228) and animation.n_frames == 2
    for name in ("best", "latest"):
        loaded = gan_mnist.load_generator(folder / "checkpoints" / f"generator_{name}.h5")
        assert gan_mnist.generate(loaded, 4, "201", seed=0).shape == (12, 8, 8, 3)


def test_plain_arrays_are_trained_on_without_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan_mnist, "load_ruler", flat_ruler)
    settings = gan_mnist.Settings(batch_size=20, evaluation_images=100, image_size=12)
    generator = gan_mnist.train(GREY, 1, settings)
    assert generator.output_shape == (None, 12, 12, 1) and len(generator.inputs) == 1
    assert "without classes" in capsys.readouterr().out
    with Image.open("samples/image_at_epoch_0001.png") as grid:
        assert grid.mode == "L" and grid.size == (600, 636)


@pytest.mark.parametrize("digits", [None, "21"])
def test_coloured_images_are_drawn_in_all_four_forms(digits, coloured_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = str(coloured_run[0] / "checkpoints" / "generator_best.h5")
    flags = ["--checkpoint", best, "--count", "18", *(["--digits", digits] if digits else [])]
    for output in ("x.png", "x.npz", "x.gif", "x"):
        assert gan_mnist.main(["generate", *flags, "--output", output]) == 0
    with np.load("x.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert labels.tolist() == ([2, 1] * 18 if digits else [0, 1, 2] * 6)
    columns = 2 if digits else 10
    grid = np.asarray(Image.open("x.png"))[::8, ::8]
    tiles = grid.reshape(-1, 8, columns, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    assert np.array_equal(tiles[: len(images)], images) and not tiles[len(images) :].any()
    for number, path in enumerate(sorted((tmp_path / "x").iterdir())):
        assert np.array_equal(np.asarray(Image.open(path)), images[number])
        assert path.name.endswith(f"_class_{labels[number]}.png")
    with Image.open("x.gif") as walk:
        assert walk.n_frames > 100 and walk.size == (64 * columns, 64)
    assert np.array_equal(gan_mnist.load_path("x.npz").images, images)
    assert np.array_equal(gan_mnist.load_path("x").images, images)


def test_a_walk_comes_back_without_a_jump_and_its_points_are_as_likely_as_any(tiny_generator):
    walk = gan_mnist.latent_walk(tiny_generator, 500, seed=3)
    assert walk.shape == (120, 500, 8) and walk.dtype == np.float32
    lengths = np.linalg.norm(walk, axis=2)
    steps = np.linalg.norm(walk - np.roll(walk, 1, axis=0), axis=2)
    assert np.all(steps < 1.01 * 2 * np.pi / 120 * lengths.max(axis=0))
    assert np.abs(walk.mean(axis=(1, 2))).max() < 0.1 and np.abs(walk.std((1, 2)) - 1).max() < 0.1


@pytest.mark.parametrize("classes", [0, 1, 3, 26])
def test_a_grid_has_a_row_a_class(classes):
    settings = gan_mnist.Settings(conditional=classes > 0, latent_dim=2, generator_widths=(2,))
    generator = gan_mnist.build_generator(settings, (4, 4, 1), classes)
    as_grey = lambda _, latent, labels: np.tile(labels[:, None, None, None], (1, 4, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_mnist, "draw", as_grey)
        images = gan_mnist.draw_grid(generator, 0)
    rows = classes or 10
    assert images.shape == (10 * rows, 4, 4, 1)
    assert np.array_equal(images[:, 0, 0, 0].reshape(rows, 10).T, np.tile(range(rows), (10, 1)))


@pytest.mark.parametrize("shape", [(5, 28, 28, 1), (7, 32, 32, 3), (1, 100, 100, 3), (4, 4, 4, 1)])
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


def test_the_curves_leave_out_epochs_that_were_not_measured(tmp_path):
    trained = {"epoch": 1, "discriminator_loss": 0.6, "generator_loss": 0.8}
    unmeasured = trained | {"inception_score": None, "fid": None}
    measured = trained | {
        "epoch": 2,
        "inception_score": 9.0,
        "fid": 1.5,
        "class_shares": [0.1] * 10,
    }
    without_classes = measured | {"epoch": 3, "class_shares": None}
    history = [unmeasured, measured, without_classes]
    for number in range(4):
        path = tmp_path / f"{number}.png"
        gan_mnist.save_metrics_plot(path, history[:number], "title")
        with Image.open(path) as picture:
            assert picture.size == (1100, 750)


def test_pictures_beside_folders_of_classes_are_refused(tmp_path):
    write_pictures(tmp_path / "set" / "cats", GREY[:3])
    Image.fromarray(GREY[3]).save(tmp_path / "set" / "stray.png")
    with pytest.raises(gan_mnist.UsageError, match="beside folders"):
        load(tmp_path / "set")


def test_classes_above_nine_are_asked_for_with_commas(tmp_path):
    settings = gan_mnist.Settings(generator_widths=(8,), latent_dim=4)
    generator = gan_mnist.build_generator(settings, (8, 8, 1), 12)
    assert gan_mnist.classes_to_draw(generator, 2, "10,11,3").tolist() == [10, 11, 3] * 2
    assert gan_mnist.classes_to_draw(generator, 1, "113").tolist() == [1, 1, 3]
    with pytest.raises(gan_mnist.UsageError, match="0 to 11"):
        gan_mnist.classes_to_draw(generator, 1, "10,12")


@pytest.mark.parametrize("name", ["cost_$5_and_$6", "\u6570\u5b57", "bad\udcff"])
def test_a_data_set_may_have_any_name(name, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / f"{name}.npz", images=np.tile(GREY, (4, 1, 1)))
    small = {"generator_widths": (8,), "discriminator_widths": (8,), "epochs": 1, "batch_size": 60}
    settings = gan_mnist.Settings(dataset=f"{name}.npz", evaluation_images=100, **small)
    gan_mnist.train(settings=settings)
    assert (tmp_path / "samples" / "metrics.png").exists() and len(rows(tmp_path)) == 1
    assert not [str(x.message) for x in recwarn if "Glyph" in str(x.message)]


def test_data_without_classes_are_not_called_collapsed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ones = np.zeros((100, 28, 28), np.uint8)
    ones[:, 4:24, 12:15] = 255
    small = {"generator_widths": (8,), "discriminator_widths": (8,), "evaluation_images": 100}
    gan_mnist.train(ones, settings=gan_mnist.Settings(epochs=1, batch_size=50, **small))
    assert "COLLAPSED" not in capsys.readouterr().out


def test_an_animation_needs_no_open_file_a_frame(tmp_path):
    for number in range(300):
        Image.fromarray(np.full((8, 8), number % 256, np.uint8)).save(tmp_path / f"{number}.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        frames = map(gan_mnist._opened, (tmp_path / f"{number}.png" for number in range(300)))
        gan_mnist.save_animation(tmp_path / "all.gif", frames, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with Image.open(tmp_path / "all.gif") as gif:
        assert gif.n_frames == 300
