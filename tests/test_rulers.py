"""The networks that measure: the shipped one, Keras' for ImageNet, one trained on the data."""

import contextlib
import hashlib
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
SHIPPED = gan_mnist.SHIPPED_INCEPTION


def name_of(path):
    """Return what the network in this file measures as."""
    return f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


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


def part_of(mnist, count):
    return gan_mnist.Dataset(mnist[0][:count, ..., np.newaxis], mnist[1][:count], "mnist")


def few(dataset, count):
    return dataset._replace(images=dataset.images[:count], labels=dataset.labels[:count])


# ----- The shipped network, on the real MNIST


@pytest.fixture(scope="module")
def ruler(mnist):
    """The shipped ruler."""
    return gan_mnist.load_ruler(gan_mnist.Settings(), part_of(mnist, 500))


@pytest.fixture(scope="module")
def statistics(ruler, mnist):
    """The shipped mean and covariance of MNIST's features."""
    return gan_mnist.real_statistics(ruler, part_of(mnist, 500))


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
    assert ruler.name == name_of(SHIPPED) and ruler.reads_classes


@pytest.mark.parametrize("inception", ["auto", "mnist"])
def test_each_run_says_what_it_is_measured_by_and_how_well_that_reads(inception, mnist, capsys):
    gan_mnist.load_ruler(gan_mnist.Settings(inception=inception), part_of(mnist, 20))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Measured by {name_of(SHIPPED)}, which reads 99.")
    assert line.endswith("% of unseen images.")


def test_the_shipped_files_are_small_and_the_network_has_its_branches():
    network = keras.models.load_model(SHIPPED, compile=False)
    assert network.count_params() <= 300_000
    kernels = {x.kernel_size for x in network.layers if isinstance(x, keras.layers.Conv2D)}
    assert kernels >= {(1, 1), (3, 3), (5, 5)}
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 10_000_000


@pytest.mark.slow
def test_the_shipped_statistics_are_those_of_the_training_images(statistics, real_features):
    ours = real_features.mean(axis=0), np.cov(real_features, rowvar=False)
    for shipped, own in zip(statistics, ours, strict=True):
        assert shipped.shape == own.shape and shipped.dtype == np.float64
        assert np.linalg.norm(shipped - own) < 1e-3 * np.linalg.norm(own)


def test_measuring_does_not_depend_on_the_images_beside(ruler, test_images, test_outputs):
    for part in (slice(0, 7), slice(500, 503)):
        for some, all_of_them in zip(
            gan_mnist.measure(ruler, test_images[part]), test_outputs, strict=True
        ):
            assert np.allclose(some, all_of_them[part], atol=1e-4)


def test_fid_puts_test_images_before_blurred_before_noise(
    ruler, statistics, test_images, test_outputs
):
    some = test_images[:1500]
    blurred = scipy.ndimage.gaussian_filter(some, (0, 1, 1, 0))
    noise = np.random.default_rng(0).integers(0, 256, some.shape, np.uint8)
    outputs = [test_outputs, gan_mnist.measure(ruler, blurred), gan_mnist.measure(ruler, noise)]
    real, soft, worst = (gan_mnist.quick_metrics(ruler, statistics, *output) for output in outputs)
    assert 0 < real["fid"] < soft["fid"] / 3 < worst["fid"] / 9
    assert real["inception_score"] > soft["inception_score"] > worst["inception_score"] >= 1
    assert real["inception_score"] > 9.5 and real["classes_covered"] == 10


def test_a_collapsed_generator_gets_a_large_finite_fid_and_covers_one_class(
    ruler, statistics, test_outputs
):
    one = [np.repeat(output[:1], 1000, axis=0) for output in test_outputs]
    metrics = gan_mnist.quick_metrics(ruler, statistics, *one)
    assert math.isfinite(metrics["fid"]) and metrics["fid"] > np.trace(statistics[1])
    assert metrics["inception_score"] == pytest.approx(1, abs=1e-3)
    assert metrics["classes_covered"] == 1


def test_a_class_is_covered_by_a_tenth_of_an_even_share():
    features = np.random.default_rng(0).normal(size=(1000, 3))
    ruler = gan_mnist.Ruler("any", None, reads_classes=True)
    for stray, covered in ((9, 9), (10, 10)):
        classes = np.append(np.arange(1000 - stray) % 9, np.full(stray, 9))
        outputs = features, np.eye(10)[classes]
        metrics = gan_mnist.quick_metrics(ruler, (np.zeros(3), np.eye(3)), *outputs)
        assert metrics["classes_covered"] == covered
        assert metrics["class_shares"] == pytest.approx(np.bincount(classes) / 1000)


@pytest.fixture
def part_of_mnist(mnist, monkeypatch):
    """3,000 training and 1,000 test images: to measure against all takes half a minute."""
    monkeypatch.setattr(gan_mnist, "NEIGHBOUR_IMAGES", 1000)
    images, unseen = mnist[0][:3000, ..., np.newaxis], mnist[2][500:1500, ..., np.newaxis]
    return gan_mnist.Dataset(images, mnist[1][:3000], "mnist", unseen, DIGITS)


def evaluate(images, dataset):
    return gan_mnist.evaluate_images(images, gan_mnist.Settings(), dataset)


def test_evaluate_images_gives_every_metric_and_praises_real_ones(
    part_of_mnist, ruler, statistics, test_images, test_outputs
):
    metrics = evaluate(test_images[:500], part_of_mnist)
    blurred = scipy.ndimage.gaussian_filter(test_images[:500], (0, 1, 1, 0))
    features, _ = gan_mnist.measure(ruler, blurred)
    blurred_fid = gan_mnist.frechet_distance(*gan_mnist.feature_statistics(features), *statistics)
    blurred_kid, _ = gan_mnist.kernel_inception_distance(test_outputs[0], features)
    assert metrics["inception_score"] > 8.5 and metrics["classes_covered"] == 10
    assert 0 < metrics["fid"] < blurred_fid / 3 and abs(metrics["kid"]) < blurred_kid / 3
    assert min(metrics["precision"], metrics["recall"]) > 0.7
    assert metrics["density"] > 0.8 and metrics["coverage"] > 0.7
    assert metrics["class_divergence"] < 0.05 and 0.85 < metrics["memorisation"] < 1.15
    assert len(metrics["fid_per_class"]) == 10 and len(metrics["nearest"]) == 20
    assert all(fid > 0 for fid in metrics["fid_per_class"])
    assert metrics["inception"] == name_of(SHIPPED) and metrics["dataset"] == "mnist"
    assert metrics["images"] == 500


@pytest.mark.slow
def test_the_nearest_training_image_to_a_training_image_is_itself(part_of_mnist):
    chosen = np.arange(500, 3000, 40)
    metrics = evaluate(part_of_mnist.images[chosen], part_of_mnist)
    assert metrics["nearest"] == chosen[:20].tolist() and metrics["memorisation"] < 0.01


@pytest.mark.parametrize("shape", [(9, 28, 28, 1), (20, 14, 14, 1), (20, 28, 28, 3)])
def test_too_few_images_or_of_another_shape_are_not_measured(shape):
    data = gan_mnist.as_dataset(synthetic_digits(20), gan_mnist.Settings())
    with pytest.raises(gan_mnist.UsageError, match="10 or more of .28, 28, 1") as refusal:
        evaluate(np.zeros(shape, np.uint8), data)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow
def test_the_order_of_images_changes_no_metric(part_of_mnist, test_images, mnist):
    images, by_class = test_images[:2000], np.argsort(mnist[3][:2000], kind="stable")
    mixed = evaluate(images, part_of_mnist)
    ordered = evaluate(images[by_class], part_of_mnist)
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


def test_measured_are_the_classes_of_as_many_real_images_the_same_each_time(drawn):
    generator = gan_mnist.build_generator(small(), (8, 8, 1), 3)
    labels = np.repeat(np.arange(3, dtype=np.uint8), [700, 25, 275])
    data = gan_mnist.Dataset(None, labels)
    for count in (1000, 2000, 137):
        images = gan_mnist.draw_like(generator, data, count, seed=0)
        latent, classes = drawn[-1]
        assert images.shape == (count, 8, 8, 1) and len(latent) == len(classes) == count
        off = np.bincount(classes, minlength=3) - count * np.array([0.7, 0.025, 0.275])
        assert np.abs(off).max() <= (0 if count % 1000 == 0 else 3 * math.sqrt(count / 4))
    assert np.array_equal(gan_mnist.draw_like(generator, data, count, seed=0), images)
    assert not np.array_equal(gan_mnist.draw_like(generator, data, count, seed=1), images)
    assert np.array_equal(drawn[-1][1], classes)
    assert len(set(classes[:30])) > 1  # mixed, as the score's parts need


def test_a_plain_generator_is_measured_on_any_data(drawn):
    generator = gan_mnist.build_generator(small(conditional=False), (8, 8, 1))
    for labels in (None, np.arange(3)):
        images = gan_mnist.draw_like(generator, gan_mnist.Dataset(None, labels), 50, seed=0)
        assert images.shape == (50, 8, 8, 1)
        assert np.array_equal(drawn[0][0], drawn[-1][0])


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
    measured += [call for call in drawn if len(call[1]) == 100]
    assert [np.bincount(classes).tolist() for _, classes in measured] == [[90, 10]] * 2
    # Not on the very points that the best generator was chosen by:
    assert not set(measured[0][0][:, 0]) & set(measured[1][0][:, 0])
    drawn.clear()
    assert gan_mnist.main(["generate", "--count", "100", "--output", "x.npz"]) == 0
    assert np.bincount(drawn[-1][1]).tolist() == [50, 50]


@pytest.mark.parametrize(
    ("reads", "covered", "step", "collapsed"),
    [
        (True, 4, 1000, True),
        (True, 5, 1000, False),
        (False, 0, 1000, False),
        (True, 1, 40, False),  # the averaged generator says little yet
    ],
)
def test_classes_are_lost_only_where_they_can_be_read_and_after_some_steps(
    reads, covered, step, collapsed
):
    row = {"step": step, "fid": 9.0, "measure": "x, 100 images"}
    row |= {"classes_covered": covered, "class_shares": [0.1] * 10} if reads else {}
    run = SimpleNamespace(ruler=SimpleNamespace(reads_classes=reads), history=[row])
    assert bool(gan_mnist.is_collapsed(row, run)) is collapsed


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(
    ("best", "measure", "collapsed"),
    [(0.8, "x, 100 images", True), (1.0, "x, 100 images", False), (0.8, "y, 100 images", False)],
)
def test_ten_times_the_best_fid_is_a_collapse_where_both_were_measured_alike(
    best, measure, collapsed, reads
):
    shares = {"classes_covered": 10, "class_shares": [0.1] * 10} if reads else {}
    first = {"step": 500, "fid": best, "measure": measure} | shares
    row = {"step": 1000, "fid": 9.0, "measure": "x, 100 images"} | shares
    run = SimpleNamespace(ruler=SimpleNamespace(reads_classes=reads), history=[first, row])
    assert bool(gan_mnist.is_collapsed(row, run)) is collapsed


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
    assert ruler.name == "imagenet_keras_inception_v3" and not ruler.reads_classes


@pytest.mark.slow
def test_imagenets_network_reads_no_classes_of_mnist(imagenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = synthetic_digits(100)
    data = gan_mnist.as_dataset(gan_mnist.Dataset(images, labels, "mnist"), imagenet)
    metrics = gan_mnist.evaluate_images(images, imagenet, data)
    assert metrics["fid"] < 1e-6
    by_class = {"class_divergence", "fid_per_class", "classes_covered", "class_shares"}
    assert not by_class & metrics.keys()
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
    """Train no network: the plain one, of some accuracy. A list gets the images of each."""
    asked = []

    def train(path, training, test, epochs):
        asked.append(len(training[0]))
        network = gan_mnist.build_inception(training[0].shape[1:], 1 + int(training[1].max()))
        gan_mnist.save_keras(network, path, {"accuracy": 0.55})

    monkeypatch.setattr(gan_mnist, "train_inception", train)
    return asked


def test_data_with_classes_get_a_network_of_their_own(trained, pictures):
    _, ruler, printed = trained
    features, probabilities = gan_mnist.measure(ruler, pictures.images)
    assert ruler.reads_classes
    assert np.mean(probabilities.argmax(axis=1) == pictures.labels) > 0.9
    assert "colours" in printed and "minutes" in printed and "30 images" in printed
    statistics = gan_mnist.real_statistics(ruler, pictures)
    metrics = gan_mnist.quick_metrics(ruler, statistics, features, probabilities)
    assert metrics["fid"] < 1e-6 and metrics["classes_covered"] == 3
    assert metrics["inception_score"] > 2


def test_a_class_that_only_the_unseen_tenth_has_is_learnt_as_well(trained):
    assert trained[1].network.output_shape[1] == (None, 4)


def test_the_trained_network_is_kept_for_the_same_data_alone(
    trained, untrained, pictures, monkeypatch, capsys
):
    folder, ruler, printed = trained
    monkeypatch.setenv("KERAS_HOME", str(folder))
    renamed = pictures._replace(name="the same under another name")
    again = gan_mnist.load_ruler(gan_mnist.Settings(), renamed)
    assert untrained == [] and again.name == ruler.name
    (path,) = (folder / "gan_mnist").iterdir()
    assert str(path) in printed.splitlines() and ruler.name == name_of(path)
    assert printed.splitlines()[-1] + "\n" == capsys.readouterr().out
    others = pictures._replace(labels=np.roll(pictures.labels, 1))
    assert gan_mnist.load_ruler(gan_mnist.Settings(), others).name != ruler.name
    assert untrained == [270]


def test_a_network_that_reads_little_says_so(home, untrained, pictures, capsys):
    gan_mnist.load_ruler(gan_mnist.Settings(), few(pictures, 60))
    assert "which reads 55.00% of unseen images" in capsys.readouterr().out


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
        assert ruler.name == name_of(SHIPPED) and not ruler.reads_classes
        mean, covariance = gan_mnist.real_statistics(ruler, data)
        features = gan_mnist.measure(ruler, data.images)[0].astype(np.float64)
        assert np.allclose(mean, features.mean(axis=0))
        assert np.allclose(covariance, np.cov(features, rowvar=False))
    assert not home.exists()


def test_other_weights_have_another_name_and_other_statistics(tmp_path, monkeypatch, pictures):
    network = gan_mnist.load_keras(SHIPPED)
    weights = network.get_weights()
    weights[0] = weights[0] + 1e-3
    network.set_weights(weights)
    gan_mnist.save_keras(network, tmp_path / SHIPPED.name, network.about)
    monkeypatch.setattr(gan_mnist, "SHIPPED_INCEPTION", tmp_path / SHIPPED.name)
    data = gan_mnist.Dataset(pictures.images[:20])
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), data)
    assert ruler.name == name_of(tmp_path / SHIPPED.name) != name_of(SHIPPED)
    # and the shipped statistics are not of its features
    mean, _ = gan_mnist.real_statistics(ruler, data._replace(name="mnist"))
    assert np.allclose(mean, gan_mnist.measure(ruler, data.images)[0].mean(axis=0), atol=1e-5)


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
    assert "minutes" in capsys.readouterr().out
    mean, _ = gan_mnist.real_statistics(ruler, data)
    assert np.allclose(mean, gan_mnist.measure(ruler, data.images)[0].mean(axis=0), atol=1e-5)
    monkeypatch.setattr(gan_mnist, "load_mnist", no_mnist)
    with pytest.raises(gan_mnist.RunError, match="MNIST"):
        gan_mnist.load_ruler(gan_mnist.Settings(), data)


def no_mnist():
    raise gan_mnist.RunError("cannot download MNIST")


def test_a_class_may_have_any_name_in_the_table_of_evaluate(capsys):
    metrics = {"images": 9, "measured": "{a}", "dataset": "x", "inception": "y"}
    metrics |= {"class_names": ("{cats}", "%s"), "class_shares": [0.2, 0.8], "page": "z"}
    gan_mnist.print_report(metrics | {"kid": 0.25, "fid_per_class": [1.5, None]})
    table = capsys.readouterr().out
    assert "9 images of {a}" in table and "{cats}" in table and " 1.5 " in table and "%s" in table
    lines = [line.split()[:2] for line in table.splitlines()]
    assert ["kid", "0.25"] in lines and not any(line[:1] == ["fid"] for line in lines)


def test_a_class_drawn_perfectly_has_an_fid_of_0_in_the_table_and_a_missing_one_has_none(capsys):
    metrics = {"images": 9, "measured": "a", "dataset": "x", "inception": "y", "page": "z"}
    metrics |= {"class_names": ("cats", "dogs"), "class_shares": [1, 0]}
    gan_mnist.print_report(metrics | {"fid_per_class": [0.0, None]})
    table = capsys.readouterr().out
    cats, dogs = [line.split() for line in table.splitlines() if line.startswith("class ")]
    assert cats[:3] == ["class", "cats", "0"] and dogs[:3] == ["class", "dogs", "nan"]


# ----- What is kept in the Keras home


def test_a_home_that_cannot_be_written_costs_one_line(
    home, untrained, pictures, monkeypatch, capsys
):
    home.parent.mkdir()
    home.write_text("in the way")
    monkeypatch.setattr(gan_mnist, "load_dataset", lambda _: few(pictures, 40))
    monkeypatch.chdir(home.parent)
    assert gan_mnist.main(["--batch-size", "20", "--dataset", "mnist"]) in (1, 2)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert str(home) in line and "Training a network" not in printed.out


def test_a_damaged_network_is_named_in_one_line(home, untrained, pictures):
    data = few(pictures, 40)
    gan_mnist.load_ruler(gan_mnist.Settings(), data)
    (path,) = home.glob("*.h5")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_ruler(gan_mnist.Settings(), data)
    assert str(path) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_the_inception_command_writes_the_network_and_its_statistics(
    home, untrained, monkeypatch, tmp_path, capsys
):
    arrays = [*synthetic_digits(100), *synthetic_digits(20)]
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: arrays)
    monkeypatch.setattr(gan_mnist, "WEIGHTS", tmp_path)
    monkeypatch.setattr(gan_mnist, "SHIPPED_INCEPTION", tmp_path / "new.h5")
    assert gan_mnist.main(["inception"]) == 0
    name = name_of(tmp_path / "new.h5")
    network = gan_mnist.load_keras(tmp_path / "new.h5")
    features = network.predict(arrays[0][..., None] / 127.5 - 1, verbose=0)[0]
    with np.load(tmp_path / f"{name}.npz") as statistics:
        assert np.allclose(statistics["mean"], features.mean(axis=0), atol=1e-5)
        assert statistics["covariance"].shape == 2 * statistics["mean"].shape
    assert f"{name}.npz" in capsys.readouterr().out
    assert files_in(tmp_path) == ["new.h5", f"{name}.npz"]
    monkeypatch.setattr(gan_mnist, "load_mnist", no_mnist)
    assert gan_mnist.main(["inception"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
