"""The networks that measure: the papers' graph, one trained on the data, and what is kept."""

import contextlib
import csv
import functools
import http.server
import io
import tarfile
import threading

import inception_2015
import numpy as np
import pytest
import tensorflow as tf
from conftest import WEIGHTS, files_in, run, run_code, synthetic_digits

import gan_mnist

ARCHIVE = "inception-2015-12-05.tgz"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A Keras home of the test's own; returns the folder that the program keeps things in."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "gan_mnist"


@pytest.fixture(scope="module")
def graph():
    """The graph of 2015 in narrow, with its names, shapes and operations."""
    return inception_2015.build_graph(width=0.03)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that makes bytes what the only mirror answers with."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    monkeypatch.setattr(gan_mnist, "IMAGENET_MIRRORS", (url,))
    yield (folder / ARCHIVE).write_bytes
    server.shutdown()


@pytest.fixture(scope="module")
def pictures():
    """300 images uint8 (300, 20, 24, 3) of three colours, and their classes."""
    random = np.random.default_rng(0)
    labels = np.arange(300, dtype=np.uint8) % 3
    images = random.integers(0, 120, (300, 20, 24, 3), dtype=np.uint8)
    images[np.arange(300), :, :, labels] += 100
    return images, labels


# ----- The papers' graph


def test_imagenet_is_downloaded_once_and_measures_as_the_papers_code_does(home, serve, graph):
    serve(inception_2015.archive_of(graph))
    images = synthetic_digits(30)[0][..., np.newaxis]
    dataset = gan_mnist.Dataset(images, None, "digits")
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(inception="imagenet"), dataset)
    features, probabilities = gan_mnist.measure(ruler, images)
    assert features.shape == (30, 2048) and probabilities.shape == (30, 1008)
    assert ruler.name == "imagenet_inception_2015" and ruler.covariance.shape == (2048, 2048)

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:  # one picture at a time
        tf.graph_util.import_graph_def(graph, name="")
        for image, ours in zip(images[:3], features, strict=False):
            bytes_of = {"ExpandDims:0": image.repeat(3, axis=-1)[np.newaxis].astype(float)}
            theirs = session.run("pool_3:0", bytes_of).ravel()
            assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            assert theirs.std() > 1e-3
    weights = {node.name: node for node in graph.node}["softmax/weights"]
    logits = features @ tf.make_ndarray(
        weights.attr["value"].tensor
    )  # no bias, as in the score's code
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.allclose(probabilities, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)

    serve(b"nothing any more")
    again = gan_mnist.load_ruler(gan_mnist.Settings(inception="imagenet"), dataset)
    assert np.array_equal(again.mean, ruler.mean)
    assert len(files_in(home)) == 2  # the archive and the features of the images


def test_imagenet_gives_an_image_the_same_features_in_any_batch_and_company(home, serve, graph):
    serve(inception_2015.archive_of(graph))
    ruler = gan_mnist.RULERS["imagenet"](None)
    images = np.random.default_rng(0).integers(0, 256, (31, 40, 30, 3), np.uint8)
    features, probabilities = gan_mnist.measure(ruler, images)
    for batch in (1, 7):
        few = gan_mnist.measure(ruler._replace(batch=batch), images[20:27])
        assert np.allclose(few[0], features[20:27], rtol=1e-4, atol=1e-5)
        assert np.allclose(few[1], probabilities[20:27], atol=1e-6)


def with_changes(graph, **changes):
    changed = tf.compat.v1.GraphDef()
    changed.CopyFrom(graph)
    nodes = {node.name: node for node in changed.node}
    for name, change in changes.items():
        change(nodes[name], changed)
    return inception_2015.archive_of(changed)


def a_link():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        header = tarfile.TarInfo(inception_2015.MEMBER)
        header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(header)
    return file.getvalue()


def write_a_file(_, graph):
    graph.node.add(name="attack", op="WriteFile", input=["DecodeJpeg/contents"] * 2)


def a_function(_, graph):
    graph.library.function.add().signature.name = "attack"


def fewer_outputs(node, _):
    node.attr["value"].tensor.tensor_shape.dim[1].size = 1000


BAD_ARCHIVES = {
    "a page": lambda graph: b"<html>Please log in</html>",
    "cut off": lambda graph: inception_2015.archive_of(graph)[:-3000],
    "no graph": lambda graph: inception_2015.archive_of(graph, name="../" + inception_2015.MEMBER),
    "nonsense": lambda graph: inception_2015.archive_of(b"\xff" * 1000),
    "a link": lambda graph: a_link(),
    "another net": lambda graph: with_changes(graph, **{"softmax/weights": fewer_outputs}),
    "an attack": lambda graph: with_changes(graph, Cast=write_a_file),
    "a function": lambda graph: with_changes(graph, Cast=a_function),
    "a bomb": lambda graph: inception_2015.archive_of(bytes(30_000_000)),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_an_archive_that_is_not_the_graph_is_refused_and_not_kept(
    name, home, serve, graph, monkeypatch
):
    monkeypatch.setattr(gan_mnist, "LARGEST_GRAPH", 20_000_000)
    serve(BAD_ARCHIVES[name](graph))
    with pytest.raises(gan_mnist.RunError, match="nor to be had"):
        gan_mnist.RULERS["imagenet"](None)
    assert files_in(home) == []


def test_a_damaged_archive_is_said_in_one_line_and_downloaded_again(home, serve, graph, capsys):
    good = inception_2015.archive_of(graph)
    serve(good)
    home.mkdir(parents=True)
    (home / ARCHIVE).write_bytes(good[: len(good) // 2])
    gan_mnist.RULERS["imagenet"](None)
    assert (home / ARCHIVE).read_bytes() == good
    assert "not as published" in capsys.readouterr().out.splitlines()[0]


def test_a_run_under_imagenet_leaves_out_the_classes(graph, tmp_path):
    kept = tmp_path / "home" / "gan_mnist" / ARCHIVE
    kept.parent.mkdir(parents=True)
    kept.write_bytes(inception_2015.archive_of(graph))
    np.savez(tmp_path / "few.npz", images=synthetic_digits(120)[0])
    flags = ("--dataset", "few.npz", "--inception", "imagenet", "--batch-size", 20)
    sizes = ("--evaluation-images", 100, "--epochs", 1, "--generator-widths", 16)
    environment = {"KERAS_HOME": tmp_path / "home", "OPENBLAS_NUM_THREADS": 1}
    result = run(*flags, *sizes, cwd=tmp_path, **environment)
    assert result.status == 0 and "Traceback" not in result.err, result
    assert result.out.split("classes\n")[1].split("\n")[0].endswith(" -")
    with open(tmp_path / "samples" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["classes_covered"] == "" and float(row["fid"]) > 0
    assert row["inception"] == "imagenet_inception_2015"


def test_a_network_of_other_classes_leaves_them_out_of_evaluate(home, digits_npz, monkeypatch):
    strange = gan_mnist.RULERS["mnist"](None)._replace(name="strange", reads_classes=False)
    monkeypatch.setitem(gan_mnist.RULERS, "imagenet", lambda _: strange)
    settings = gan_mnist.Settings(dataset=str(digits_npz), inception="imagenet")
    images, labels = synthetic_digits(200, seed=3)
    metrics = gan_mnist.evaluate_images(images, settings)
    assert [name for name, value in metrics.items() if value is None] == [
        *("classes_covered", "class_shares", "class_divergence", "fid_per_class", "memorisation")
    ]
    asked = gan_mnist.evaluate_images(images, settings, labels)
    assert len(asked["fid_per_class"]) == 10 and asked["fid"] == metrics["fid"]


@pytest.mark.slow
def test_the_full_size_network_measures_in_batches(home):
    home.mkdir(parents=True)
    (home / ARCHIVE).write_bytes(inception_2015.archive_of(inception_2015.build_graph()))
    ruler = gan_mnist.RULERS["imagenet"](None)
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)
    features, probabilities = gan_mnist.measure(ruler, images)
    alone, _ = gan_mnist.measure(ruler._replace(batch=1), images[:2])
    assert np.allclose(features[:2], alone, rtol=1e-3, atol=1e-4)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)


# ----- A network trained on the data


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """(its Keras home, the ruler trained on the pictures, what was printed)."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(folder))
        patch.setattr(gan_mnist, "INCEPTION_IMAGES", 3000)
        dataset = gan_mnist.Dataset(*pictures, "colours")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ruler = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    return folder, ruler, printed.getvalue()


def test_data_with_classes_get_a_network_of_their_own(trained, pictures):
    _, ruler, printed = trained
    features, probabilities = gan_mnist.measure(ruler, pictures[0])
    assert probabilities.shape == (300, 3)
    assert np.mean(probabilities.argmax(axis=1) == pictures[1]) > 0.9
    assert "colours" in printed and "right of 30 images" in printed
    mean, covariance = gan_mnist.feature_statistics(features)
    assert np.allclose(ruler.mean, mean) and np.allclose(ruler.covariance, covariance)
    metrics = gan_mnist.quick_metrics(ruler, pictures[0])
    assert metrics["fid"] < 1e-6 and metrics["classes_covered"] == 3
    assert len(metrics["class_shares"]) == 3 and metrics["inception_score"] > 2


def test_the_trained_network_is_kept_for_the_same_data_alone(trained, pictures, monkeypatch):
    folder, ruler, _ = trained
    monkeypatch.setenv("KERAS_HOME", str(folder))
    monkeypatch.setattr(gan_mnist, "train_inception", None)  # would fail if it were called
    dataset = gan_mnist.Dataset(*pictures, "the same under another name")
    again = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    assert again.name == ruler.name and np.array_equal(again.mean, ruler.mean)
    other = dataset._replace(labels=(pictures[1] + 1) % 3)
    with pytest.raises(TypeError):
        gan_mnist.load_ruler(gan_mnist.Settings(), other)


def test_damaged_files_are_said_in_a_line_each_and_made_anew(
    trained, pictures, monkeypatch, tmp_path, capsys
):
    folder, ruler, _ = trained
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "gan_mnist").mkdir()
    for path in (folder / "gan_mnist").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16  # a bit
        (tmp_path / "gan_mnist" / path.name).write_bytes(content)
    network = gan_mnist.build_inception(pictures[0].shape[1:], 3)
    monkeypatch.setattr(gan_mnist, "train_inception", lambda *_: network)
    dataset = gan_mnist.Dataset(*pictures, "colours")
    fresh = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    assert fresh.name != ruler.name  # other weights, other name
    assert capsys.readouterr().out.count("is damaged") == 1
    monkeypatch.setattr(gan_mnist, "train_inception", None)
    again = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    assert again.name == fresh.name and capsys.readouterr().out == ""
    features = (
        tmp_path
        / "gan_mnist"
        / next(n for n in files_in(tmp_path / "gan_mnist") if fresh.name in n)
    )
    features.write_bytes(features.read_bytes()[:-100])
    once_more = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    assert np.array_equal(once_more.covariance, fresh.covariance)
    assert capsys.readouterr().out.count("is damaged") == 1


def test_a_home_that_cannot_be_written_costs_a_line_not_the_run(
    pictures, monkeypatch, tmp_path, capsys
):
    (tmp_path / "gan_mnist").write_text("in the way")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    ruler = gan_mnist.RULERS["mnist"](None)
    features, probabilities = gan_mnist.reference_outputs(ruler, pictures[0][:5])
    assert features.shape == (5, 160) and probabilities.shape == (5, 10)
    assert "cannot be kept" in capsys.readouterr().out


def test_images_without_classes_are_measured_by_the_shipped_network_and_told_so(
    pictures, home, capsys
):
    for labels in (None, np.zeros(300, np.uint8)):
        dataset = gan_mnist.Dataset(pictures[0], labels, "holiday")
        ruler = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
        assert ruler.name == "mnist_inception_1" and ruler.mean.shape == (160,)
        (line,) = capsys.readouterr().out.splitlines()
        assert "holiday" in line and "MNIST" in line


def test_any_data_can_be_measured_by_the_network_that_reads_mnist(pictures, home, capsys):
    dataset = gan_mnist.Dataset(*pictures, "colours")
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(inception="mnist"), dataset)
    assert ruler.name == "mnist_inception_1" and capsys.readouterr().out == ""


def test_data_called_mnist_that_is_not_does_not_get_its_statistics(home):
    images = synthetic_digits(50)[0][..., np.newaxis]
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), gan_mnist.Dataset(images, None, "mnist"))
    with np.load(WEIGHTS / "mnist_inception_1.npz") as shipped:
        assert not np.allclose(ruler.mean, shipped["mean"], atol=0.1)


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 16, 3), (28, 28, 1), (64, 64, 3), (33, 50, 3)])
def test_the_network_fits_images_of_any_shape(shape):
    network = gan_mnist.build_inception(shape, 7)
    features, probabilities = network(np.zeros((2, *shape), np.float32))
    assert features.shape == (2, 160) and probabilities.shape == (2, 7)


def test_the_rulers_numbers_are_not_rounded_where_training_is(tmp_path):
    np.save(tmp_path / "images.npy", synthetic_digits(200)[0][..., np.newaxis])
    code = """
import sys, numpy as np, gan_mnist
ruler = gan_mnist._shipped_ruler(None)
np.save(sys.argv[1], gan_mnist.measure(ruler, np.load("images.npy"))[0])
"""
    for name, changes in {"exact": {}, "rounding": {gan_mnist.ROUNDING: "BF16"}}.items():
        assert run_code(code, name, cwd=tmp_path, **changes).status == 0
    exact, rounding = (np.load(tmp_path / f"{name}.npy") for name in ("exact", "rounding"))
    assert abs(rounding - exact).max() < 1e-5 * abs(exact).max()


def test_other_weights_have_another_name(home):
    network = gan_mnist.load_keras(gan_mnist.SHIPPED_INCEPTION)
    assert gan_mnist._ruler_of(network).name == "mnist_inception_1"
    weights = network.get_weights()
    weights[0] = weights[0] + 1e-3
    network.set_weights(weights)
    assert gan_mnist._ruler_of(network).name.startswith("inception_")


def test_a_class_that_only_the_unseen_tenth_has_is_learnt_as_well(capsys):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 8, 8, 1), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 2
    network = gan_mnist.train_inception((images, labels), (images[:1], labels[:1] + 2), epochs=1)
    assert network.output_shape[1] == (None, 3)
