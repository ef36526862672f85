"""Training itself: what the networks are shown, how fast they learn, what is saved and measured."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    ROOT,
    measure_nothing,
    new_state,
    rows,
    run_code,
    small,
    synthetic_digits,
    train_quietly,
)

import gan_mnist

# 256 images that are told apart: all pixels of number i are i, and its class is i % 10.
NUMBERED = gan_mnist.as_dataset(
    (np.arange(256, dtype=np.uint8).repeat(16).reshape(-1, 4, 4), np.arange(256) % 10), small()
)
BATCH, DECAY_FROM = 32, 0.25
RATES = {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 3e-3}
MIRRORED = """
import numpy as np, tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
import conftest, gan_mnist, pathlib, pytest
conftest.measure_nothing(pytest.MonkeyPatch(), [])
shown, train_step = [], gan_mnist.train_step
def noting(state, settings, real, *others):
    tf.numpy_function(lambda pixels: shown.extend(pixels.tolist()), [real[:, 0, 0, 0]], [])
    return train_step(state, settings, real, *others)
gan_mnist.train_step = noting
images = np.arange(80, dtype=np.uint8).repeat(16).reshape(-1, 4, 4)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    conftest.train_quietly(pathlib.Path(), images, batch_size=20)
assert np.allclose(sorted(shown), np.arange(80) / 127.5 - 1), shown
"""


@pytest.fixture(autouse=True, scope="module")
def step_by_step():
    """Compiled functions run as Python: for a few steps of small networks that is faster."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def watched_run(folder, epochs, **changes):
    """Train on the numbered images, a step a call, three seconds a step, and learn nothing.

    Return what reached each step of the compiled training: images, labels, learning rates and
    whether penalties came.
    """
    clock, seen = [0.0], []

    def note(*arrays):
        clock[0] += 3
        seen.append([array.copy() for array in arrays])
        return np.zeros(2, np.float32)

    def step(state, settings, real, classes, penalise):
        optimizers = state.generator_optimizer, state.discriminator_optimizer
        rates = [tf.convert_to_tensor(optimizer.learning_rate) for optimizer in optimizers]
        losses = tf.numpy_function(note, [real, classes, rates, penalise], tf.float32)
        return tf.ensure_shape(losses, 2)

    with pytest.MonkeyPatch.context() as patch:
        measure_nothing(patch, [])
        patch.setattr(gan_mnist, "train_step", step)
        patch.setattr(gan_mnist, "STEPS_PER_CALL", 1)
        patch.setattr(gan_mnist, "monotonic", lambda: clock[0])
        flags = {"batch_size": BATCH, "decay_from": DECAY_FROM}
        train_quietly(folder, NUMBERED, epochs, penalty_every=3, **flags, **RATES, **changes)
    return map(np.stack, zip(*seen, strict=True))


def numbers(images):
    """Return which of the numbered images these (..., 4, 4, 1) in [-1, 1] are."""
    return np.rint((images[..., 0, 0, 0] + 1) * 127.5).astype(int)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What three epochs of seed 1 showed: images, labels, learning rates, penalties."""
    return tuple(watched_run(tmp_path_factory.mktemp("watched"), epochs=3, seed=1))


# ----- What the networks are shown


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own(watched):
    orders = numbers(watched[0]).reshape(3, 256)
    assert np.array_equal(np.sort(orders), [range(256)] * 3)
    for one, other in itertools.combinations([range(256), *orders], 2):
        assert np.mean(np.equal(one, other)) < 0.1


def test_each_image_is_shown_from_minus_one_to_one_beside_its_own_label(watched):
    images, labels, *_ = watched
    exact = NUMBERED.images[numbers(images)] / 127.5 - 1
    assert np.allclose(images, exact, rtol=0, atol=1e-6)
    assert images.min() == -1 and images.max() == 1
    assert np.array_equal(labels, numbers(images) % 10)


@pytest.mark.parametrize(("batch", "pixels"), [(16, 1), (16, 2), (19, 1)])
def test_each_eighth_of_a_batch_is_rolled_by_so_many_pixels_any_way_of_its_own(batch, pixels):
    images = np.random.default_rng(0).normal(size=(batch, 6, 6, 1)).astype("float32")
    ways = set(itertools.product(range(-pixels, pixels + 1), repeat=2))
    rolled = [{np.roll(x, way, (0, 1)).tobytes(): way for way in ways} for x in images]
    random, found = tf.random.Generator.from_seed(0), []
    for _ in range(40):
        shifted = gan_mnist.shift(tf.constant(images), pixels, random).numpy()
        found.append([x.get(y.tobytes()) for x, y in zip(rolled, shifted, strict=True)])
    assert set(itertools.chain(*found)) == ways
    together = [len(list(group)) for _, group in itertools.groupby(zip(*found, strict=True))]
    assert len(together) == 8 and max(together) - min(together) <= 1


def test_real_and_generated_images_are_shifted_before_the_discriminator_sees_them(monkeypatch):
    seen, look = [], gan_mnist.logits_and_slope

    def looking(discriminator, images, classes):
        seen.append(np.unique(images).tolist())
        return look(discriminator, images, classes)

    monkeypatch.setattr(gan_mnist, "logits_and_slope", looking)
    monkeypatch.setattr(gan_mnist, "shift", lambda images, pixels, random: 0 * images + pixels)
    settings = small(shift=2, conditional=False)
    state = new_state(settings, NUMBERED)
    gan_mnist.train_step(state, settings, tf.ones((8, 4, 4, 1)), None, False)
    assert seen == [[2], [2]]


def test_penalties_come_at_every_so_manieth_step_of_the_run(watched):
    assert np.flatnonzero(watched[3]).tolist() == [0, 3, 6, 9, 12, 15, 18, 21]


# ----- How fast they learn


def test_both_learning_rates_fall_to_zero_with_the_epochs_or_the_minutes(watched, tmp_path):
    *_, in_a_minute, _ = watched_run(tmp_path, epochs=5, max_minutes=1.0)  # 20 of 40 steps
    for rates, steps in ((watched[2], 24), (in_a_minute, 20)):
        left = 1 - np.arange(steps) / steps
        paces = np.minimum(1, left / (1 - DECAY_FROM))
        assert rates == pytest.approx(np.outer(paces, list(RATES.values())), rel=1e-5)


def trained_once(steps, still=None, **changes):
    """Return the weights before, and the state after, so many steps in one compiled call.

    `still` is the network whose learning rate is nought.
    """
    settings = small(batch_size=BATCH, **changes)
    state = new_state(settings, NUMBERED)
    before = {name: getattr(state, name).get_weights() for name in ("generator", "discriminator")}
    state.generator_optimizer.learning_rate = 1e-3 * (still != "generator")
    state.discriminator_optimizer.learning_rate = 1e-3 * (still != "discriminator")
    train = gan_mnist.compile_training(state, NUMBERED, settings)
    losses = train(np.arange(steps * BATCH).reshape(steps, BATCH)).numpy()
    assert losses.shape == (steps, 2) and np.isfinite(losses).all()
    return before, state


@pytest.mark.parametrize("still", ["generator", "discriminator"])
def test_a_network_whose_learning_rate_is_nought_keeps_its_weights_alone(still):
    before, state = trained_once(2, still)
    for name, old in before.items():
        for variable, was in zip(getattr(state, name).weights, old, strict=True):
            if variable.path.endswith("kernel"):  # relativistic logits' own bias never moves
                assert np.array_equal(variable, was) == (name == still), variable.path


def test_both_optimizers_have_the_memories_asked_for():
    state = new_state(small(beta_1=0.5, beta_2=0.9), NUMBERED)
    for adam in (state.generator_optimizer, state.discriminator_optimizer):
        assert (adam.beta_1, adam.beta_2) == (0.5, 0.9)


def test_another_seed_means_other_weights_other_latents_and_another_order(watched, tmp_path):
    states = [new_state(small(seed=seed), NUMBERED) for seed in (1, 2, 1)]
    latents = [state.random.normal((4, 8)).numpy() for state in states]
    for kind in ("generator", "discriminator"):
        kernels = [getattr(state, kind).get_weights()[0] for state in states]
        for first, other, again in (kernels, latents):
            assert np.array_equal(first, again) and np.isclose(first, other).mean() < 0.1
    images, *_ = watched_run(tmp_path, epochs=1, seed=2)
    assert np.mean(numbers(images) == numbers(watched[0][: len(images)])) < 0.1


# ----- What is saved and measured


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_nears_the_generator_by_a_decay_a_step_that_warms_up(decay):
    before, state = trained_once(5, ema_decay=decay)
    weight = 1 - min(decay, 6 / 15) ** 5
    start, end = before["generator"], state.generator.get_weights()
    for was, now, mean in zip(start, end, state.average.get_weights(), strict=True):
        assert not np.array_equal(was, mean)
        assert np.allclose(mean, was + weight * (now - was), rtol=1e-4, atol=1e-6)


def test_a_short_run_saves_the_average_and_the_last_row_of_the_table_has_its_fid(tmp_path):
    common = {"batch_size": 64, "seed": 5, "inception": "mnist"}
    common["generator_learning_rate"] = 0.01  # FID of the average is 4 % off the generator's own
    data = gan_mnist.as_dataset(synthetic_digits(320), small())
    average = train_quietly(tmp_path, data, epochs=2, **common)
    saved = gan_mnist.load_generator(tmp_path / "checkpoints" / "generator_latest.h5")
    first = new_state(small(**common), data).average
    for mean, kept, was in zip(average.weights, saved.weights, first.weights, strict=True):
        assert np.array_equal(mean, kept) and not np.array_equal(mean, was), mean.path
    ruler = gan_mnist.load_ruler(small(**common), data)
    images = gan_mnist.draw_like(saved, data, 100, seed=5)
    statistics = gan_mnist.real_statistics(ruler, data)
    metrics = gan_mnist.quick_metrics(ruler, statistics, *gan_mnist.measure(ruler, images))
    assert float(rows(tmp_path)[-1]["fid"]) == pytest.approx(metrics["fid"], rel=1e-3)


def test_two_equal_calls_in_one_session_give_equal_weights(tmp_path, monkeypatch):
    measure_nothing(monkeypatch, [])
    data, flags = synthetic_digits(320), {"batch_size": 64}
    one, two, other = (
        train_quietly(tmp_path / str(number), data, seed=seed, **flags)
        for number, seed in enumerate((3, 3, 4))
    )
    for first, second, third in zip(one.weights, two.weights, other.weights, strict=True):
        assert np.array_equal(first, second) and not np.array_equal(first, third), first.path


# ----- The machine


@pytest.mark.parametrize(
    "flags, asked, chosen",
    [
        ("fma avx2", "auto", "float32"),
        ("fma amx_bf16 amx_tile", "auto", "mixed_bfloat16"),
        ("fma amx_bf16 amx_tile", "float32", "float32"),
        ("fma avx2", "bfloat16", "mixed_bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(flags, asked, chosen, monkeypatch):
    settings = gan_mnist.Settings(precision=asked)
    cpuinfo = SimpleNamespace(exists=lambda: True, read_text=lambda: f"flags : {flags}\n")
    monkeypatch.setattr(gan_mnist, "Path", lambda _: cpuinfo)
    assert gan_mnist.choose_precision(settings) == chosen


@pytest.mark.slow
def test_two_mirrored_devices_train_an_epoch_on_every_image(tmp_path):
    done = run_code(MIRRORED, cwd=tmp_path, PYTHONPATH=ROOT / "tests")
    assert done.status == 0, done.err
    (row,) = rows(tmp_path)
    losses = [float(row[f"{name}_loss"]) for name in ("generator", "discriminator")]
    assert np.isfinite(losses).all() and row["step"] == "4"


def test_25_steps_pass_at_most_between_looks_at_ctrl_c(tmp_path, monkeypatch):
    calls = []

    def counting(*_):
        def train_steps(batches):
            calls.append(len(batches))
            return tf.zeros((len(batches), 2))

        return train_steps

    measure_nothing(monkeypatch, [])
    monkeypatch.setattr(gan_mnist, "compile_training", counting)
    images = np.zeros((16 * 110, 28, 28), np.uint8)
    train_quietly(tmp_path, images, batch_size=16, generator_widths=(2,))
    assert calls == [25, 25, 25, 25, 10]
