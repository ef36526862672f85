"""Files from strangers: an .h5 is looked at whole before Keras builds anything from it."""

import json

import h5py
import keras
import numpy as np
import pytest
from conftest import run, small

import gan_mnist


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The path of a conditional generator as the program saves it."""
    path = tmp_path_factory.mktemp("good") / "generator.h5"
    generator = gan_mnist.build_generator(small(), (8, 8, 1), 3)
    gan_mnist.save_keras(generator, path, {"class_names": ("ants", "bees", "cats")})
    return path


@pytest.fixture
def described(good, tmp_path):
    """A function that writes the generator with a changed description; it returns the path."""

    def write(change):
        path = tmp_path / "changed.h5"
        path.write_bytes(good.read_bytes())
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            changed = change(config)
            file.attrs["model_config"] = json.dumps(config if changed is None else changed)
        return path

    return write


def test_what_the_program_saves_it_loads_and_so_does_plain_keras(good):
    loaded = gan_mnist.load_generator(good)
    plain = keras.models.load_model(good)
    assert loaded.class_names == ("ants", "bees", "cats")
    inputs = [np.ones((3, 8), np.float32), np.arange(3)]
    assert np.array_equal(loaded(inputs), plain(inputs))


def named(*keys):
    """Change the value at these keys of a description to what builds something else."""

    def change(name):
        def put(config):
            for key in keys[:-1]:
                config = config[key]
            config[keys[-1]] = name

        return put

    return change


DENSE = ("config", "layers", 4)  # latent, class, its encoding, both joined, dense
PLACES = {
    "the model": named("class_name"),
    "the model's module": named("module"),
    "a layer": named(*DENSE, "class_name"),
    "a layer's registered name": named(*DENSE, "registered_name"),
    "an initializer": named(*DENSE, "config", "kernel_initializer", "class_name"),
    "a policy of numbers": named(*DENSE, "config", "dtype", "class_name"),
    "an argument": named(*DENSE, "inbound_nodes", 0, "args", 0, "class_name"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["Lambda", "TimeDistributed", "StringLookup", "__lambda__"])
def test_a_class_that_is_not_on_the_list_is_named_and_never_reaches_keras(
    place, name, described, monkeypatch
):
    path = described(PLACES[place](name))
    monkeypatch.setattr(keras.models, "load_model", None)  # calling it would be a TypeError
    with pytest.raises(gan_mnist.UsageError, match=f"changed.h5: it holds .*{name}") as refusal:
        gan_mnist.load_keras(path)
    assert len(str(refusal.value).splitlines()) == 1


def wrapped(config):
    """A layer with code as its activation."""
    dense = config["config"]["layers"][4]["config"]
    dense["activation"] = {"class_name": "function", "config": "os.getcwd", "module": "os"}


@pytest.mark.parametrize(
    "change", [wrapped, lambda _: "Functional", lambda _: 7, lambda _: [], lambda _: {"config": 1}]
)
def test_a_description_of_another_kind_is_rejected_in_one_line(change, described):
    path = described(change)
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_keras(path)
    assert str(path) in str(refusal.value)


def rejected(model, path):
    """Save a model and return why load_generator does not take it."""
    model.save(path)
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_generator(path)
    return str(refusal.value)


@pytest.mark.parametrize("shape", [(784,), (28, 28), (1, 28, 28, 1), (14, 8, 7)])
def test_what_draws_no_images_is_no_generator(shape, tmp_path):
    latent = keras.Input((8,))
    hidden = keras.layers.Dense(784)(latent)
    model = keras.Model(latent, keras.layers.Reshape(shape)(hidden))
    why = rejected(model, tmp_path / "other.h5")
    assert "other.h5 is not a generator" in why and ", ".join(map(str, shape)) in why


def test_what_draws_from_no_latent_points_is_no_generator(tmp_path):
    image = keras.Input((28, 28, 1))
    model = keras.Model(image, keras.layers.Conv2D(1, 3, padding="same")(image))
    assert "of (None, 28, 28, 1)" in rejected(model, tmp_path / "filter.h5")


@pytest.mark.parametrize(
    "about", ["no JSON", "[]", "7", '{"class_names": 7}', '{"class_names": [7]}']
)
def test_what_a_strangers_file_says_about_itself_is_taken_or_rejected_in_one_line(
    about, good, tmp_path
):
    path = tmp_path / "strange.h5"
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "r+") as file:
        file.attrs["about"] = about
    try:
        generator = gan_mnist.load_generator(path)
    except gan_mnist.UsageError as error:
        assert "strange.h5" in str(error)
    else:
        assert gan_mnist.generate(generator, 2, "02").shape == (4, 8, 8, 1)


def test_a_crash_while_tensorflow_is_loaded_is_not_without_a_word(tmp_path):
    """As on a processor without AVX, where TensorFlow ends the process."""
    (tmp_path / "keras.py").write_text("import os\nos.abort()\n")
    result = run("--epochs", 1, cwd=tmp_path, PYTHONPATH=tmp_path)
    assert result.status < 0 and "keras.py" in result.err  # where it stood


def test_an_error_while_tensorflow_is_loaded_is_shown(tmp_path):
    (tmp_path / "keras.py").write_text("raise ImportError('no such library')\n")
    result = run("--epochs", 1, cwd=tmp_path, PYTHONPATH=tmp_path)
    assert result.status == 1 and "no such library" in result.err
