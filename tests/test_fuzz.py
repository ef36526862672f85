"""Whatever is given: read, or refused in one line. No traceback, no code run, no file changed.

FUZZ=2000 python -m pytest tests/test_fuzz.py    tries so many inputs of each kind [40]
"""

import contextlib
import io
import json
import os
import shutil
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import contents, npz_bytes, small, synthetic_digits
from PIL import Image

import gan_mnist

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
MANY = int(os.environ.get("FUZZ", "40"))
tried = hypothesis.settings(
    max_examples=MANY,
    deadline=None,
    database=None,
    derandomize=MANY == 40,
    suppress_health_check=list(hypothesis.HealthCheck),
)
IMAGES, LABELS = synthetic_digits(40)
SMALL = {"batch_size": 20, "latent_dim": 4, "generator_widths": (8,), "discriminator_widths": (8,)}
EDIT = st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "end"]), st.binary())
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([10**9, 10**19, -1, 1e300, "", "os", "Lambda", "float16", "x\ny", [], {}]),
    st.text(max_size=5),
    st.builds(lambda name: {"class_name": name, "config": {}}, st.sampled_from(["ReLU", "Model"])),
)


def mangled(data, edits):
    """Return the bytes with (where, how, what) done to them."""
    data = bytearray(data)
    for where, how, what in edits:
        place = int(where * (len(data) - 1)) if data else 0
        if how == "flip" and data:
            data[place] ^= (what or b"\xff")[0]
        elif how == "cut":
            del data[place : place + len(what)]
        elif how == "insert":
            data[place:place] = what
        elif how == "end":
            del data[place:]
    return bytes(data)


def replaced(tree, path, value):
    """Put the value somewhere into nested lists and dicts, where the numbers in path lead."""
    parent, keys = tree, []
    for number in path:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return
        key = keys[number % len(keys)]
        if number == path[-1] or not isinstance(parent[key], dict | list):
            parent[key] = value
            return
        parent = parent[key]


@contextlib.contextmanager
def refusing(folder, *errors):
    """Let these errors pass, if one line says why; what is in the folder must not change."""
    before = contents(folder)
    try:
        yield
    except errors as error:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            gan_mnist.refuse(error, 2)
        line = printed.getvalue()
        assert len(line.splitlines()) == 1 and 0 < len(line) < 500, error
    assert contents(folder) == before


# ----- Bytes that are damaged at random


@tried
@hypothesis.given(st.sampled_from(list(gan_mnist.ALLOWED)), st.text())
def test_any_text_for_any_setting(name, text):
    arguments = ["--" + name.replace("_", "-"), text]
    with contextlib.suppress(gan_mnist.UsageError):
        gan_mnist.parse_command_line(arguments)


@tried
@hypothesis.given(
    st.lists(st.one_of(st.text(), st.sampled_from(["train", "--resume", "--count", "-1", "--"])))
)
def test_any_command_line(arguments):
    with contextlib.suppress(gan_mnist.UsageError, SystemExit):
        gan_mnist.parse_command_line(arguments)


def png_bytes():
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(file, "png")
    return file.getvalue()


def npy_bytes():
    file = io.BytesIO()
    np.save(file, IMAGES)
    return file.getvalue()


GIVEN = {  # what a data set can be: the file that is mangled
    "npz": ("data.npz", npz_bytes({"images": IMAGES, "labels": LABELS})),
    "compressed": ("data.npz", npz_bytes({"images": IMAGES}, np.savez_compressed)),
    "npy": ("data.npy", npy_bytes()),
    "png": ("0.png", png_bytes()),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_mangled_data_set(kind, tmp_path):
    name, whole = GIVEN[kind]
    (tmp_path / "1.png").write_bytes(png_bytes())
    path = tmp_path / name

    @tried
    @hypothesis.given(st.lists(EDIT, min_size=1, max_size=4))
    def try_one(edits):
        path.write_bytes(mangled(whole, edits))
        dataset = str(tmp_path if kind == "png" else path)
        with refusing(tmp_path, gan_mnist.UsageError):
            gan_mnist.load_dataset(gan_mnist.Settings(dataset=dataset, batch_size=2))

    try_one()


@pytest.fixture(scope="module")
def generator_h5(tmp_path_factory):
    path = tmp_path_factory.mktemp("h5") / "generator.h5"
    gan_mnist.save_keras(gan_mnist.build_generator(gan_mnist.Settings(**SMALL)), path, {})
    return path


def test_a_mangled_h5(generator_h5, tmp_path):
    whole, path = generator_h5.read_bytes(), tmp_path / "generator.h5"

    @tried
    @hypothesis.given(st.lists(EDIT, min_size=1, max_size=4))
    def try_one(edits):
        path.write_bytes(mangled(whole, edits))
        with refusing(tmp_path, gan_mnist.UsageError):
            gan_mnist.load_generator(path)

    try_one()


def with_config(source, path, change):
    """Copy an .h5, its model's description being changed."""
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)


def test_an_h5_whose_description_makes_no_sense(generator_h5, tmp_path):
    path = tmp_path / "generator.h5"

    @tried
    @hypothesis.given(st.lists(st.integers(0, 20), min_size=2, max_size=9), ODD)
    def try_one(where, value):
        with_config(generator_h5, path, lambda config: replaced(config, where, value))
        with refusing(tmp_path, gan_mnist.UsageError):
            gan_mnist.load_generator(path)

    try_one()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives a run whose state is in a folder, and the folder where it was saved."""
    data = gan_mnist.as_dataset((IMAGES, LABELS), small())
    strategy = tf.distribute.get_strategy()
    state = gan_mnist.new_state(gan_mnist.Settings(**SMALL), data, strategy)

    def run_in(folder):
        settings = gan_mnist.Settings(**SMALL, checkpoints_dir=folder)
        now = {"started": 0.0, "history": [], "losses": [], "seconds": 0.0}
        return SimpleNamespace(state=state, settings=settings, identity={"seed": "0"}, **now)

    folder = tmp_path_factory.mktemp("saved")
    gan_mnist.save_state(run_in(folder))
    return run_in, folder


@pytest.mark.parametrize("name", ["index", "data-00000-of-00001"])
def test_a_mangled_state(name, saved, tmp_path):
    run_in, whole = saved
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    @tried
    @hypothesis.given(st.lists(EDIT, min_size=1, max_size=4))
    def try_one(edits):
        sound = (whole / "state" / f"step-000000000.{name}").read_bytes()
        (tmp_path / "state" / f"step-000000000.{name}").write_bytes(mangled(sound, edits))
        with refusing(tmp_path, gan_mnist.UsageError, gan_mnist.RunError):
            gan_mnist.restore_state(run_in(tmp_path))

    try_one()


# ----- A notebook's arguments


@pytest.mark.parametrize("count", [0, -1, 1.5, float("nan"), 10**7, "many", None])
def test_a_count_that_cannot_be_drawn_is_refused_in_one_line(count, generator_h5):
    generator = gan_mnist.load_generator(generator_h5)
    with pytest.raises(gan_mnist.UsageError, match="count is .* whole number from 1") as refusal:
        gan_mnist.generate(generator, count)
    assert "\n" not in str(refusal.value)


def test_any_digits(generator_h5):
    generator = gan_mnist.load_generator(generator_h5)

    @tried
    @hypothesis.given(st.one_of(st.text(), st.lists(st.one_of(st.integers(), st.text())), ODD))
    def try_one(digits):
        with contextlib.suppress(gan_mnist.UsageError):
            assert set(gan_mnist.classes_to_draw(generator, 1, digits)) <= set(range(10))

    try_one()


# ----- Attacks


def hostile(class_name, **others):
    return [{"class_name": class_name, "config": {"name": "x"}, "inbound_nodes": [], **others}]


def put(**values):
    """Return a change of the first Dense layer's description."""

    def change(config):
        dense = [x for x in config["config"]["layers"] if x["class_name"] == "Dense"]
        dense[0]["config"].update(values)

    return change


RUNS = {"module": "os", "class_name": "mkdir", "config": "ran", "registered_name": "mkdir"}
LAMBDA = {"class_name": "__lambda__", "config": {"value": "4wEAAAAA"}}
CONFIGS = {  # what is done to a sound generator's description
    "nothing but a Lambda": lambda x: x.update(class_name="Lambda"),
    "nothing but a TimeDistributed": lambda x: x.update(class_name="TimeDistributed"),
    "nothing but a StringLookup": lambda x: x.update(class_name="StringLookup"),
    "a Lambda": lambda x: x["config"].update(layers=hostile("Lambda")),
    "a TFSMLayer": lambda x: x["config"].update(layers=hostile("TFSMLayer")),
    "a class of a module": lambda x: x["config"].update(layers=hostile("Dense", module="os")),
    "a registered class": lambda x: x["config"].update(
        layers=hostile("Dense", registered_name="Custom>Evil")
    ),
    "a Lambda in a model": lambda x: x["config"].update(
        layers=hostile("Sequential", config={"layers": hostile("Lambda")})
    ),
    "an activation": put(activation=RUNS),
    "a lambda activation": put(activation=LAMBDA),
    "an initializer": put(kernel_initializer=RUNS),
    "a regularizer": put(kernel_regularizer=RUNS),
    "a type": put(dtype=RUNS),
    "a function": put(activation={"class_name": "function", "config": "mkdir", "module": "os"}),
    "a disguised name": put(activation={"class_name": 'Dense", "x": "', "config": {}}),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_an_h5_that_would_run_code_is_refused(attack, generator_h5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.h5"
    with_config(generator_h5, path, CONFIGS[attack])
    with refusing(tmp_path), pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_keras(path)
    assert "\n" not in str(refusal.value)
    assert "it holds" in str(refusal.value), "Keras, not we, refused it"


def test_what_other_programs_write_with_plain_keras_is_let_in(tmp_path):
    layers = [keras.Input((4,)), keras.layers.Dense(784, "tanh", kernel_initializer="he_normal")]
    layers += [keras.layers.Reshape((28, 28, 1)), keras.layers.Conv2D(1, 3, padding="same")]
    model = keras.Sequential([*layers, keras.layers.BatchNormalization()])
    model.save(tmp_path / "plain.h5")
    loaded = gan_mnist.load_generator(tmp_path / "plain.h5")
    latent = tf.ones((2, 4))
    assert np.array_equal(loaded(latent), model(latent))
