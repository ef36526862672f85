"""Whatever is given: read, or refused in one line. No traceback, no code run, no file changed.

FUZZ=2000 python -m pytest tests/test_fuzz.py    tries so many inputs of each kind [40]
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import resource
import struct

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import contents, npz_bytes, synthetic_digits
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
    """Let these errors pass, if they are one line; what is in the folder must not change."""
    before = contents(folder)
    try:
        yield
    except errors as error:
        assert len(str(error).splitlines()) == 1, error
    assert contents(folder) == before


# ----- Bytes that are damaged at random


@tried
@hypothesis.given(st.sampled_from(list(gan_mnist.SETTINGS)), st.text())
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


GIVEN = {  # what a data set can be: the file that is mangled, and what stands beside it
    "npz": ("data.npz", npz_bytes({"images": IMAGES, "labels": LABELS}), {}),
    "compressed": ("data.npz", npz_bytes({"images": IMAGES}, np.savez_compressed), {}),
    "idx": (
        "train-images-idx3-ubyte",
        struct.pack(">4i", 0x803, 40, 28, 28) + IMAGES.tobytes(),
        {"train-labels-idx1-ubyte": struct.pack(">2i", 0x801, 40) + LABELS.tobytes()},
    ),
    "idx labels": (
        "train-labels-idx1-ubyte",
        struct.pack(">2i", 0x801, 40) + LABELS.tobytes(),
        {"train-images-idx3-ubyte": struct.pack(">4i", 0x803, 40, 28, 28) + IMAGES.tobytes()},
    ),
    "idx.gz": (
        "train-images-idx3-ubyte.gz",
        gzip.compress(struct.pack(">4i", 0x803, 40, 28, 28) + IMAGES.tobytes()),
        {},
    ),
    "png": ("0.png", png_bytes(), {"1.png": png_bytes()}),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_mangled_data_set(kind, tmp_path):
    name, whole, others = GIVEN[kind]
    for other, data in others.items():
        (tmp_path / other).write_bytes(data)
    path = tmp_path / name

    @tried
    @hypothesis.given(st.lists(EDIT, min_size=1, max_size=4))
    def try_one(edits):
        path.write_bytes(mangled(whole, edits))
        dataset = str(path if name.endswith("npz") else tmp_path)
        with refusing(tmp_path, gan_mnist.UsageError):
            gan_mnist.load_dataset(gan_mnist.Settings(dataset=dataset, batch_size=2))

    try_one()


@pytest.fixture(scope="module")
def generator_h5(tmp_path_factory):
    path = tmp_path_factory.mktemp("h5") / "generator.h5"
    gan_mnist.save_keras(gan_mnist.build_generator(gan_mnist.Settings(**SMALL)), path)
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
    """(state, facts, folder of the state)."""
    folder = tmp_path_factory.mktemp("saved")
    wanted = gan_mnist.Settings(**SMALL)
    dataset = gan_mnist.Dataset(IMAGES[..., np.newaxis], LABELS, "segments")
    state = gan_mnist.new_state(wanted, dataset)
    facts = {"settings": gan_mnist.dataclasses.asdict(wanted), "history": []}
    facts["data"] = gan_mnist.fingerprint(dataset)
    gan_mnist.save_state(state, folder, facts)
    return state, facts, next(folder.iterdir())


@pytest.mark.parametrize("name", ["run.json", "SHA256SUMS", "state.index"])
@pytest.mark.parametrize("sums_fit", [False, True])
def test_a_mangled_state(name, sums_fit, saved, tmp_path):
    state, facts, whole = saved
    folder = tmp_path / whole.name
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    @tried
    @hypothesis.given(st.lists(EDIT, min_size=1, max_size=4))
    def try_one(edits):
        (folder / name).write_bytes(mangled((whole / name).read_bytes(), edits))
        if sums_fit and name != "SHA256SUMS":
            (folder / "SHA256SUMS").write_text(gan_mnist._checksums(folder))
        with refusing(tmp_path, gan_mnist.UsageError, gan_mnist.RunError):
            gan_mnist.restore_state(state, tmp_path, facts)

    try_one()


# ----- Attacks


def write_h5(path, layers, source):
    """Copy the generator, its layers being described by these (or by a function of them)."""
    with_config(source, path, lambda config: config["config"].update(layers=layers))


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
    "too many units": put(units=2 * 10**7),
    "too many units to count": put(units=10**30),
    "too deep": put(activation=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_an_h5_that_would_run_code_or_take_all_memory_is_refused(
    attack, generator_h5, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.h5"
    with_config(generator_h5, path, CONFIGS[attack])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refusing(tmp_path), pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_keras(path)
    assert "\n" not in str(refusal.value)
    assert "it holds" in str(refusal.value) or attack.startswith("too"), "Keras, not we, refused it"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200 * 1024  # KB


def first_dataset(file):
    names = []
    file.visititems(lambda name, part: names.append(name) if hasattr(part, "shape") else None)
    return names[0]


def relinked(link):
    def change(file):
        name = first_dataset(file)
        del file[name]
        file[name] = link(name)

    return change


def claims(**details):
    def change(file):
        name = first_dataset(file)
        del file[name]
        file.create_dataset(name, **details)

    return change


FILES = {
    "a link to another file": relinked(lambda name: h5py.ExternalLink("other.h5", name)),
    "a link within": relinked(lambda _: h5py.SoftLink("/model_weights")),
    "data in another file": claims(shape=(74, 8), dtype="f4", external=[("secret", 0, 10**6)]),
    "a million million numbers": claims(shape=(10**6, 10**6), dtype="f4", chunks=(10, 10)),
    "a bomb": claims(data=np.zeros((4000, 4000), "f4"), compression="gzip"),
}


@pytest.mark.parametrize("attack", FILES)
def test_an_h5_that_reaches_out_or_claims_too_much_is_refused(
    attack, generator_h5, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.h5").write_bytes(generator_h5.read_bytes())
    (tmp_path / "secret").write_bytes(bytes(10**4))
    path = tmp_path / "evil.h5"
    path.write_bytes(generator_h5.read_bytes())
    with h5py.File(path, "r+") as file:
        FILES[attack](file)
    with refusing(tmp_path), pytest.raises(gan_mnist.UsageError, match="holds"):
        gan_mnist.load_keras(path)


def test_a_layer_that_would_draw_enormous_pictures_is_refused(tmp_path):
    latent = keras.Input((4,))
    image = keras.layers.Reshape((28, 28, 1))(keras.layers.Dense(784)(latent))
    image = keras.layers.UpSampling2D(1000)(image)
    gan_mnist.save_keras(keras.Model(latent, image), tmp_path / "large.h5")
    with pytest.raises(gan_mnist.UsageError, match="too many"):
        gan_mnist.load_keras(tmp_path / "large.h5")


def test_what_other_programs_write_with_plain_keras_is_let_in(tmp_path):
    layers = [keras.Input((4,)), keras.layers.Dense(784, "tanh", kernel_initializer="he_normal")]
    layers += [keras.layers.Reshape((28, 28, 1)), keras.layers.Conv2D(1, 3, padding="same")]
    model = keras.Sequential([*layers, keras.layers.BatchNormalization()])
    model.save(tmp_path / "plain.h5")
    loaded = gan_mnist.load_generator(tmp_path / "plain.h5")
    latent = tf.ones((2, 4))
    assert np.array_equal(loaded(latent), model(latent))


def test_the_checksums_are_those_of_sha256sum(saved):
    for line in (saved[2] / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((saved[2] / name).read_bytes()).hexdigest() == digest
