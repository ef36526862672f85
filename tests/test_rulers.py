"""The networks that measure: the shipped one, Keras' for ImageNet, one trained on the data."""

import contextlib
import io
import math
import socket
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import scipy.ndimage
from conftest import WEIGHTS, files_in, small, synthetic_digits

import gan_mnist

DIGITS = tuple("0123456789")
SHIPPED = gan_mnist.SHIPPED_INCEPTION.stem


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A Keras home of the test's own; returns the folder that the program keeps things in."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gan_mnist"


@pytest.fixture(scope="module")
def pictures():
    """300 images uint8 (300, 20, 20, 3) of three colours; a fourth class has one picture.

    That one is among the tenth that the network is tested on.
    """
    random = np.random.default_rng(0)
    labels = np.arange(300, dtype=np.uint8) % 3
    images = random.integers(0, 120, (300, 20, 20, 3), dtype=np.uint8)
    images[np.arange(300), :, :, labels] += 100
    unseen = np.random.default_rng(0).permutation(300) % 10 == 0
    labels[np.flatnonzero(unseen)[-1]] = 3
    return gan_mnist.Dataset(images, labels, "colours", None, ("red", "green", "blue", "one"))


def few(dataset, count):
    return dataset._replace(images=dataset.images[:count], labels=dataset.labels[:count])


# ----- The shipped network, on the real MNIST


@pytest.fixture(scope="module")
def ruler(mnist):
    """The shipped ruler with the shipped statistics."""
    images, labels = mnist[0][:500, ..., np.newaxis], mnist[1][:500]
    dataset = gan_mnist.Dataset(images, labels, "mnist", None, DIGITS)
    return gan_mnist.load_ruler(gan_mnist.Settings(), dataset)


@pytest.fixture(scope="module")
def test_images(mnist):
    return mnist[2][..., np.newaxis]


@pytest.fixture(scope="module")
def test_outputs(ruler, test_images):
    return gan_mnist.measure(ruler, test_images)


@pytest.fixture(scope="module")
def real_features(ruler, mnist):
    return gan_mnist.measure(ruler, mnist[0][..., np.newaxis])[0].astype(np.float64)


def test_the_shipped_ruler_reads_995_of_1000_test_images_and_has_its_name(
    ruler, test_outputs, mnist
):
    probabilities = test_outputs[1]
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == mnist[3]) >= 0.995
    assert ruler.name == "mnist_inception_1" and ruler.reads_classes


def test_the_shipped_files_are_small_and_the_network_has_its_branches():
    path = WEIGHTS / f"{SHIPPED}.h5"
    network = keras.models.load_model(path, compile=False)
    assert network.count_params() <= 300_000
    kernels = {x.kernel_size for x in network.layers if isinstance(x, keras.layers.Conv2D)}
    assert kernels >= {(1, 1), (3, 3), (5, 5)}
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 10_000_000


@pytest.mark.slow
def test_the_shipped_statistics_are_those_of_the_training_images(ruler, real_features):
    for shipped, ours in (
        (ruler.mean, real_features.mean(axis=0)),
        (ruler.covariance, np.cov(real_features, rowvar=False)),
    ):
        assert shipped.shape == ours.shape and shipped.dtype == np.float64
        assert np.linalg.norm(shipped - ours) < 1e-3 * np.linalg.norm(ours)


def test_measuring_does_not_depend_on_the_images_beside(ruler, test_images, test_outputs):
    for part in (slice(0, 7), slice(500, 503)):
        for some, all_of_them in zip(
            gan_mnist.measure(ruler, test_images[part]), test_outputs, strict=True
        ):
            assert np.allclose(some, all_of_them[part], atol=1e-4)


def test_fid_puts_test_images_before_blurred_before_noise(ruler, test_images, test_outputs):
    some = test_images[:1500]
    blurred = scipy.ndimage.gaussian_filter(some, (0, 1, 1, 0))
    noise = np.random.default_rng(0).integers(0, 256, some.shape, np.uint8)
    outputs = [test_outputs, gan_mnist.measure(ruler, blurred), gan_mnist.measure(ruler, noise)]
    real, soft, worst = (gan_mnist.quick_metrics(ruler, *output) for output in outputs)
    assert 0 < real["fid"] < soft["fid"] / 3 < worst["fid"] / 9
    assert real["inception_score"] > soft["inception_score"] > worst["inception_score"] >= 1
    assert real["inception_score"] > 9.5 and real["classes_covered"] == 10


def test_a_collapsed_generator_gets_a_large_finite_fid_and_covers_one_class(ruler, test_outputs):
    one = [np.repeat(output[:1], 1000, axis=0) for output in test_outputs]
    metrics = gan_mnist.quick_metrics(ruler, *one)
    assert math.isfinite(metrics["fid"]) and metrics["fid"] > np.trace(ruler.covariance)
    assert metrics["inception_score"] == pytest.approx(1, abs=1e-3)
    assert metrics["classes_covered"] == 1


def test_a_class_is_covered_by_a_tenth_of_an_even_share(ruler):
    features = np.random.default_rng(0).normal(size=(1000, len(ruler.mean)))
    for stray, covered in ((9, 9), (10, 10)):
        classes = np.append(np.arange(1000 - stray) % 9, np.full(stray, 9))
        assert (
            gan_mnist.quick_metrics(ruler, features, np.eye(10)[classes])["classes_covered"]
            == covered
        )


@pytest.fixture
def part_of_mnist(mnist, monkeypatch):
    """3,000 training and 1,000 test images: to measure against all takes half a minute."""
    monkeypatch.setattr(gan_mnist, "NEIGHBOUR_IMAGES", 1000)
    images, unseen = mnist[0][:3000, ..., np.newaxis], mnist[2][500:1500, ..., np.newaxis]
    return gan_mnist.Dataset(images, mnist[1][:3000], "mnist", unseen, DIGITS)


def evaluate(images, dataset, classes=None):
    return gan_mnist.evaluate_images(images, gan_mnist.Settings(), classes, dataset)


def test_evaluate_images_gives_every_metric_and_praises_real_ones(part_of_mnist, test_images):
    metrics = evaluate(test_images[:500], part_of_mnist)
    assert metrics["inception_score"] > 8.5 and metrics["classes_covered"] == 10
    assert metrics["fid"] < 20 and abs(metrics["kid"]) < 0.05
    assert metrics["precision"] > 0.75 and metrics["recall"] > 0.75
    assert metrics["density"] > 0.8 and metrics["coverage"] > 0.7
    assert metrics["class_divergence"] < 0.05 and 0.85 < metrics["memorisation"] < 1.15
    assert len(metrics["fid_per_class"]) == 10 and len(metrics["nearest"]) == 20
    assert metrics["inception"] == SHIPPED and metrics["dataset"] == "mnist"


def test_the_nearest_training_image_to_a_training_image_is_itself(part_of_mnist):
    chosen = np.arange(500, 3000, 40)
    metrics = evaluate(part_of_mnist.images[chosen], part_of_mnist)
    assert metrics["nearest"] == chosen[:20].tolist() and metrics["memorisation"] < 0.01


@pytest.mark.slow
def test_the_order_of_images_changes_no_metric(part_of_mnist, test_images, mnist):
    images, labels = test_images[:2000], mnist[3][:2000]
    by_class = np.argsort(labels, kind="stable")
    mixed = evaluate(images, part_of_mnist, labels)
    ordered = evaluate(images[by_class], part_of_mnist, labels[by_class])
    assert ordered["fid_per_class"] == pytest.approx(mixed["fid_per_class"], rel=1e-3)
    for name in ("inception_score", "fid", "precision", "recall", "coverage"):
        assert ordered[name] == pytest.approx(mixed[name], rel=0.05), name


# ----- What is measured: the data's own mix of classes


@pytest.fixture
def drawn(monkeypatch):
    """A list that gets the latent points and classes of each drawing."""
    calls, draw = [], gan_mnist.draw

    def note(generator, latent, classes):
        calls.append((latent, classes))
        return draw(generator, latent, classes)

    monkeypatch.setattr(gan_mnist, "draw", note)
    return calls


def test_classes_are_measured_by_the_datas_shares_to_one_image(drawn):
    generator = gan_mnist.build_generator(small(), (8, 8, 1), 3)
    labels = np.repeat(np.arange(3, dtype=np.uint8), [700, 25, 275])
    np.random.default_rng(0).shuffle(labels)
    data = gan_mnist.Dataset(None, labels)
    for count in (1000, 137):
        images, classes = gan_mnist.draw_like(generator, data, count, seed=0)
        assert len(images) == count and np.array_equal(drawn[-1][1], classes)
        shares = np.bincount(classes, minlength=3) - count * np.array([0.7, 0.025, 0.275])
        assert np.abs(shares).max() <= 1
    again, _ = gan_mnist.draw_like(generator, data, count, seed=0)
    assert np.array_equal(again, images)
    assert len(set(classes[:30])) > 1  # mixed, as the score's parts need


def test_a_run_and_evaluate_measure_the_datas_mix_and_other_images_but_generate_is_even(
    drawn, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    images, _ = synthetic_digits(100)
    np.savez("mine.npz", images=images, labels=np.arange(100) // 90)  # 90 : 10
    settings = small(dataset="mine.npz", inception="mnist", batch_size=50, evaluation_images=100)
    gan_mnist.train(epochs=1, settings=settings)
    measured = [call for call in drawn if len(call[1]) == 100]
    flags = ["evaluate", "--dataset", "mine.npz", "--inception", "mnist", "--count", "100"]
    drawn.clear()
    assert gan_mnist.main(flags) == 0
    measured += drawn
    assert [np.bincount(classes).tolist() for _, classes in measured] == [[90, 10]] * 2
    # Not on the very points that the best generator was chosen by:
    assert not set(measured[0][0][:, 0]) & set(measured[1][0][:, 0])
    drawn.clear()
    assert gan_mnist.main(["generate", "--count", "100", "--output", "x.npz"]) == 0
    assert np.bincount(drawn[0][1]).tolist() == [50, 50]


@pytest.mark.parametrize(
    ("reads", "covered", "step", "collapsed"),
    [
        (True, 4, 1000, True),
        (True, 5, 1000, False),
        (False, 1, 1000, False),  # a reader of digits finds few of them in photos
        (True, 1, 40, False),  # the averaged generator says little yet
    ],
)
def test_classes_are_lost_only_where_they_can_be_read_and_after_some_steps(
    reads, covered, step, collapsed
):
    row = {"step": step, "fid": 9.0, "inception": "x", "images": 100}
    row |= {"classes_covered": covered, "class_shares": [0.1] * 10}
    run = SimpleNamespace(ruler=SimpleNamespace(reads_classes=reads), history=[])
    assert gan_mnist.is_collapsed(row, run) is collapsed


# ----- Keras' Inception for ImageNet


def stand_in(**options):
    """Stand in for keras.applications.InceptionV3, whose weights are 96 MB to download."""
    assert socket.getdefaulttimeout() == gan_mnist.STALL_SECONDS and not options
    image = keras.Input((75, 75, 3))
    features = keras.layers.GlobalAveragePooling2D(name="avg_pool")(image)
    return keras.Model(image, keras.layers.Dense(1000, activation="softmax")(features))


@pytest.fixture
def imagenet(home, monkeypatch):
    monkeypatch.setattr(keras.applications, "InceptionV3", stand_in)
    return gan_mnist.Settings(inception="imagenet")


def test_imagenets_network_gets_images_as_keras_prepares_them(imagenet):
    images = np.zeros((3, 30, 30, 1), np.uint8)
    images[1], images[2, :, :15] = 255, 255
    ruler = gan_mnist.load_ruler(imagenet, gan_mnist.Dataset(images, None, "mine"))
    features, probabilities = gan_mnist.measure(ruler, images)
    prepared = keras.applications.inception_v3.preprocess_input(images.astype(np.float32))
    expected = prepared.mean(axis=(1, 2)).repeat(3, axis=1)
    assert np.allclose(features, expected, atol=0.02) and probabilities.shape == (3, 1000)
    assert ruler.name == "imagenet_keras_inception_v3" and ruler.covariance.shape == (3, 3)


@pytest.mark.slow
def test_imagenets_network_reads_no_classes_of_mnist(imagenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = synthetic_digits(100)
    data = gan_mnist.as_dataset(gan_mnist.Dataset(images, labels, "mnist"), imagenet)
    metrics = gan_mnist.evaluate_images(images, imagenet, labels, data)
    assert metrics["fid"] < 1e-6
    assert not {"class_divergence", "fid_per_class"} & metrics.keys()
    settings = small(inception="imagenet", batch_size=50, evaluation_images=100)
    with contextlib.redirect_stdout(io.StringIO()):
        gan_mnist.train(data, 1, settings)
    assert (tmp_path / "samples" / "metrics.png").exists()
    line = (tmp_path / "samples" / "metrics.csv").read_text().splitlines()[1]
    assert line.endswith(",,mnist,imagenet_keras_inception_v3")  # no classes covered


def test_imagenets_network_offline_costs_one_line(imagenet, monkeypatch):
    def offline():
        raise RuntimeError("URL fetch failure on https://server/inception_v3.h5")

    monkeypatch.setattr(keras.applications, "InceptionV3", offline)
    images = synthetic_digits(20)[0][..., np.newaxis]
    with pytest.raises(gan_mnist.RunError, match="cannot download .* https://server"):
        gan_mnist.load_ruler(imagenet, gan_mnist.Dataset(images))


@pytest.mark.slow
def test_keras_own_network_measures(home, monkeypatch):
    whole = keras.applications.InceptionV3(weights=None)
    monkeypatch.setattr(keras.applications, "InceptionV3", lambda: whole)
    images = synthetic_digits(20)[0][..., np.newaxis]
    settings = gan_mnist.Settings(inception="imagenet")
    ruler = gan_mnist.load_ruler(settings, gan_mnist.Dataset(images))
    features, probabilities = gan_mnist.measure(ruler, images)
    assert features.shape == (20, 2048) and probabilities.shape == (20, 1000)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4) and features.std() > 0


# ----- A network trained on the data


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """(its Keras home, the ruler trained on the pictures, what was printed)."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(folder))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ruler = gan_mnist.load_ruler(gan_mnist.Settings(), pictures)
    return folder, ruler, printed.getvalue()


@pytest.fixture
def untrained(monkeypatch):
    """Train no network: the plain one, of the given accuracy. A list gets a word for each."""
    asked = []

    def train(training, test, epochs=20):
        asked.append(len(training[0]))
        classes = 1 + int(training[1].max())
        return gan_mnist.build_inception(training[0].shape[1:], classes), 0.55

    monkeypatch.setattr(gan_mnist, "train_inception", train)
    return asked


def test_data_with_classes_get_a_network_of_their_own(trained, pictures):
    _, ruler, printed = trained
    features, probabilities = gan_mnist.measure(ruler, pictures.images)
    assert ruler.reads_classes
    assert np.mean(probabilities.argmax(axis=1) == pictures.labels) > 0.9
    assert "colours" in printed and "minutes" in printed and "30 images" in printed
    metrics = gan_mnist.quick_metrics(ruler, features, probabilities)
    assert metrics["fid"] < 1e-6 and metrics["classes_covered"] == 3
    assert metrics["inception_score"] > 2


def test_a_class_that_only_the_unseen_tenth_has_is_learnt_as_well(trained):
    assert trained[1].network.output_shape[1] == (None, 4)


def test_the_trained_network_is_kept_for_the_same_data_alone(
    trained, untrained, pictures, monkeypatch
):
    folder, ruler, _ = trained
    monkeypatch.setenv("KERAS_HOME", str(folder))
    renamed = pictures._replace(name="the same under another name")
    again = gan_mnist.load_ruler(gan_mnist.Settings(), renamed)
    assert untrained == [] and again.name == ruler.name and again.accuracy == ruler.accuracy
    gan_mnist.load_ruler(
        gan_mnist.Settings(), pictures._replace(labels=np.roll(pictures.labels, 1))
    )
    assert untrained == [270]


def test_an_edited_network_is_trained_anew_and_the_kept_one_is_named(
    home, untrained, pictures, monkeypatch, capsys
):
    data, block = few(pictures, 40), gan_mnist.inception_block
    for edited in (False, True, True):
        if edited:
            wider = lambda hidden, one, *others: block(hidden, one + 8, *others)
            monkeypatch.setattr(gan_mnist, "inception_block", wider)
        gan_mnist.load_ruler(gan_mnist.Settings(), data)
    assert untrained == [36, 36]
    kept = {str(home / name) for name in files_in(home) if name.endswith(".h5")}
    printed = capsys.readouterr().out
    assert len(kept) == 2 and all(path in printed for path in kept)
    assert "delete it to train another" in printed


def test_what_a_network_measures_that_reads_too_little_is_marked(
    home, untrained, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", images=pictures.images[:60], labels=pictures.labels[:60])
    settings = small(dataset="mine.npz", batch_size=20, evaluation_images=100)
    gan_mnist.train(epochs=1, settings=settings)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " 1/1 " in line]
    assert "?" in row
    flags = ["evaluate", "--dataset", "mine.npz", "--count", "50"]
    assert gan_mnist.main(flags) == 0
    assert "reads only 55% of unseen images" in capsys.readouterr().out
    assert gan_mnist.main([*flags, "--inception", "mnist"]) == 0
    assert "reads only" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (64, 64, 3), (100, 100, 3)])
def test_the_network_fits_images_of_any_shape(shape):
    network = gan_mnist.build_inception(shape, 7)
    features, probabilities = network(np.zeros((2, *shape), np.float32))
    assert features.shape[0] == 2 and probabilities.shape == (2, 7)
    # As coarse as MNIST's before the blocks, so that it takes as long.
    assert network.layers[2].output.shape[1] <= 28


# ----- Which network measures what


def test_images_without_classes_are_measured_by_the_shipped_network(home, pictures):
    for labels, names in ((None, ()), (np.zeros(20, np.uint8), ("0",))):
        data = gan_mnist.Dataset(pictures.images[:20], labels, "holiday", None, names)
        ruler = gan_mnist.load_ruler(gan_mnist.Settings(), data)
        assert ruler.name == SHIPPED and not ruler.reads_classes
        mean, _ = gan_mnist.feature_statistics(gan_mnist.measure(ruler, data.images)[0])
        assert np.allclose(ruler.mean, mean)


def test_other_weights_have_another_name(home, monkeypatch, pictures):
    network = gan_mnist.load_keras(gan_mnist.SHIPPED_INCEPTION)
    weights = network.get_weights()
    weights[0] = weights[0] + 1e-3
    network.set_weights(weights)
    monkeypatch.setattr(gan_mnist, "load_keras", lambda _: network)
    data = gan_mnist.Dataset(pictures.images[:20])
    assert gan_mnist.load_ruler(gan_mnist.Settings(), data).name.startswith("inception_")


def test_without_weights_the_network_is_trained_on_mnist_and_named_so(
    home, untrained, monkeypatch, capsys
):
    images, labels = synthetic_digits(100)
    monkeypatch.setattr(gan_mnist, "SHIPPED_INCEPTION", home / "missing.h5")
    monkeypatch.setattr(gan_mnist, "SHIPPED_GENERATOR", home / "missing.h5")
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: [images, labels, images, labels])
    data = gan_mnist.load_dataset(gan_mnist.Settings())
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), data)
    assert untrained == [90] and ruler.name.startswith("inception_") and ruler.reads_classes
    printed = capsys.readouterr().out
    assert "missing.h5 is missing" in printed and "minutes" in printed
    assert np.allclose(ruler.mean, gan_mnist.measure(ruler, data.images)[0].mean(axis=0), atol=1e-5)
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: None)
    with pytest.raises(gan_mnist.RunError, match="MNIST"):
        gan_mnist.load_ruler(gan_mnist.Settings(), data)


def test_a_class_may_have_any_name_in_the_table_of_evaluate():
    metrics = {"images": 9, "measured": "{a}", "dataset": "x", "inception": "y", "accuracy": 1.0}
    metrics |= {"class_names": ("{cats}", "%s"), "class_shares": [0.2, 0.8], "page": "z"}
    table = gan_mnist.report(metrics | {"fid_per_class": [1.5, None]})
    assert "9 images of {a}" in table and "{cats}" in table and " 1.5 " in table and "%s" in table


# ----- What is kept in the Keras home


def test_a_home_that_cannot_be_written_costs_a_line_not_the_run(home, untrained, pictures, capsys):
    home.parent.mkdir()
    home.write_text("in the way")
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), few(pictures, 40))
    assert ruler.mean.shape == (len(ruler.covariance),)
    assert "cannot be kept" in capsys.readouterr().out


def test_a_damaged_network_is_named_in_one_line_or_made_anew(home, untrained, pictures, capsys):
    data = few(pictures, 40)
    gan_mnist.load_ruler(gan_mnist.Settings(), data)
    (path,) = home.glob("*.h5")
    path.write_bytes(path.read_bytes()[:5000])
    try:
        gan_mnist.load_ruler(gan_mnist.Settings(), data)
    except gan_mnist.UsageError as error:
        assert str(path) in str(error)
    else:
        assert untrained == [36, 36] and str(path) in capsys.readouterr().out


def test_the_inception_command_writes_the_network_and_its_statistics(
    home, untrained, monkeypatch, tmp_path, capsys
):
    arrays = [*synthetic_digits(100), *synthetic_digits(20)]
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: arrays)
    monkeypatch.setattr(gan_mnist, "SHIPPED_INCEPTION", tmp_path / "new.h5")
    assert gan_mnist.main(["inception"]) == 0
    network = gan_mnist.load_keras(tmp_path / "new.h5")
    features = network.predict(arrays[0][..., None] / 127.5 - 1, verbose=0)[0]
    with np.load(tmp_path / "new.npz") as statistics:
        assert np.allclose(statistics["mean"], features.mean(axis=0), atol=1e-5)
        assert statistics["covariance"].shape == 2 * statistics["mean"].shape
    assert "inception_" in capsys.readouterr().out
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: None)
    assert gan_mnist.main(["inception"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
