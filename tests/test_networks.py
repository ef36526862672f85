"""Networks, losses and the training step: shapes, formulas, gradients, the average."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import small, synthetic_digits

import gan_mnist


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def activations(model):
    return {getattr(getattr(layer, "activation", None), "__name__", "") for layer in model.layers}


@pytest.fixture(params=[True, False], ids=["conditional", "unconditional"])
def conditional(request):
    return request.param


def with_classes(inputs, conditional):
    """Return what the network takes for the inputs (N, ...): beside them the classes in turn."""
    classes = np.arange(len(inputs), dtype=np.int32) % 10
    return [inputs, classes] if conditional else inputs


# ----- Networks


def test_the_generator_makes_images_within_minus_one_and_one(conditional):
    generator = gan_mnist.build_generator(small(conditional=conditional))
    assert len(generator.inputs) == 1 + conditional
    assert generator.inputs[0].shape == (None, 8)
    assert not conditional or "int" in generator.inputs[1].dtype
    latent = 1e4 * np.random.default_rng(0).normal(size=(50, 8)).astype("float32")
    images = generator(with_classes(latent, conditional), training=False).numpy()
    assert images.shape == (50, 28, 28, 1) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 and images.min() < -0.5 and images.max() > 0.5


@pytest.mark.parametrize("edge", [4, 7, 13, 28, 50, 64])
@pytest.mark.parametrize("architecture", ["dense", "conv"])
def test_both_networks_fit_any_size_and_colour(architecture, edge):
    settings, shape = small(architecture=architecture), (edge, edge, 3)
    assert gan_mnist.build_generator(settings, shape, 4).output_shape == (None, *shape)
    discriminator = gan_mnist.build_discriminator(settings, shape, 4)
    assert discriminator.input_shape[0] == (None, *shape)
    assert discriminator.output_shape == (None, 1)


def test_conv_halves_the_image_down_to_between_4_and_7_pixels_and_doubles_the_channels():
    discriminator = gan_mnist.build_discriminator(small(architecture="conv"), (64, 64, 1))
    convolutions = [x for x in discriminator.layers if type(x).__name__ == "Conv2D"]
    assert [x.output.shape[1:] for x in convolutions] == [
        *((32, 32, 4), (16, 16, 8), (8, 8, 16), (4, 4, 32)),
    ]


def test_the_discriminator_gives_one_logit_without_a_sigmoid(conditional):
    discriminator = gan_mnist.build_discriminator(small(conditional=conditional))
    assert len(discriminator.inputs) == 1 + conditional
    assert discriminator.inputs[0].shape == (None, 28, 28, 1)
    discriminator.set_weights([50 * weight for weight in discriminator.get_weights()])
    images = np.random.default_rng(0).uniform(-1, 1, (50, 28, 28, 1)).astype("float32")
    logits = discriminator(with_classes(images, conditional)).numpy()
    assert logits.shape == (50, 1) and logits.dtype == np.float32
    assert np.abs(logits).max() > 1
    assert "sigmoid" not in activations(discriminator)


def test_a_network_in_bfloat16_is_the_exact_one_but_for_two_percent():
    exact = gan_mnist.build_discriminator(small(conditional=False))
    rounding = gan_mnist.build_discriminator(small(conditional=False), dtype="mixed_bfloat16")
    rounding.set_weights(exact.get_weights())
    images = np.random.default_rng(0).uniform(-1, 1, (50, 28, 28, 1)).astype("float32")
    expected, logits = exact(images).numpy(), rounding(images).numpy()
    assert logits.dtype == np.float32 and not np.array_equal(logits, expected)
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_the_networks_are_made_of_the_layers_and_widths_asked_for():
    widths = {"generator_widths": (20, 30, 40), "discriminator_widths": (50, 60)}
    settings = small(conditional=False, **widths)
    generator = gan_mnist.build_generator(settings)
    discriminator = gan_mnist.build_discriminator(settings)
    dense = [x.units for x in generator.layers if isinstance(x, keras.layers.Dense)]
    assert dense == [20, 30, 40, 784]
    dense = [x.units for x in discriminator.layers if isinstance(x, keras.layers.Dense)]
    assert dense == [50, 60, 1]
    assert kinds(generator).count("BatchNormalization") == 3
    assert kinds(discriminator).count("LeakyReLU") == 2
    assert "Lambda" not in kinds(generator) + kinds(discriminator)
    assert "tanh" in activations(generator)


def test_the_class_changes_what_both_networks_say():
    generator = gan_mnist.build_generator(small())
    discriminator = gan_mnist.build_discriminator(small())
    image = generator(with_classes(np.ones((10, 8), "float32"), True))
    assert len(np.unique(image.numpy().reshape(10, -1), axis=0)) == 10
    same = np.repeat(image[:1], 10, axis=0)
    assert len(np.unique(discriminator(with_classes(same, True)).numpy())) == 10


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("architecture", ["dense", "conv"])
def test_the_discriminator_is_told_how_much_a_batch_differs(architecture, told):
    settings = small(conditional=False, architecture=architecture, minibatch_std=told)
    discriminator = gan_mnist.build_discriminator(settings)
    images = np.random.default_rng(0).uniform(-1, 1, (8, 28, 28, 1)).astype("float32")
    among_others, alone = discriminator(images)[0], discriminator(images[:1].repeat(8, axis=0))[0]
    assert np.allclose(among_others, alone, rtol=0, atol=1e-6) is not told


def test_equal_images_have_finite_gradients():
    """The deviation of equal numbers has no slope: a collapsed generator would end the run."""
    settings = small(conditional=False, shift=0)
    discriminator = gan_mnist.build_discriminator(settings)
    images = tf.fill((8, 28, 28, 1), 0.5)
    with tf.GradientTape() as tape:
        logits, slope = gan_mnist.logits_and_slope(discriminator, images, None)
        loss = tf.reduce_mean(logits) + gan_mnist.gradient_penalty(slope)
    gradients = tape.gradient(loss, discriminator.trainable_variables)
    assert all(np.isfinite(gradient).all() for gradient in [slope, *gradients])


# ----- Losses


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


BY_HAND = {  # name: the discriminator's and the generator's loss, from logits
    "non_saturating": (
        lambda real, fake: -log_sigmoid(real) - log_sigmoid(-fake),
        lambda real, fake: -log_sigmoid(fake),
    ),
    "minimax": (
        lambda real, fake: -log_sigmoid(real) - log_sigmoid(-fake),
        lambda real, fake: log_sigmoid(-fake),
    ),
    "least_squares": (
        lambda real, fake: (real - 1) ** 2 + fake**2,
        lambda real, fake: (fake - 1) ** 2,
    ),
    "hinge": (
        lambda real, fake: np.maximum(0, 1 - real) + np.maximum(0, 1 + fake),
        lambda real, fake: -fake,
    ),
    "wasserstein": (lambda real, fake: fake - real, lambda real, fake: -fake),
    "relativistic": (
        lambda real, fake: -log_sigmoid(real - fake),
        lambda real, fake: -log_sigmoid(fake - real),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_has_the_values_of_its_paper(name):
    real, fake = np.meshgrid(np.linspace(-6, 6, 13), np.linspace(-5, 5, 11))
    losses = gan_mnist.LOSSES[name](*(tf.constant(x.reshape(-1, 1)) for x in (real, fake)))
    for loss, by_hand in zip(losses, BY_HAND[name], strict=True):
        assert np.allclose(loss, by_hand(real, fake).reshape(-1, 1), rtol=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_of_huge_logits_is_finite(name):
    huge = tf.constant([[-1e4], [1e4]])
    assert np.isfinite(gan_mnist.LOSSES[name](huge, -huge)).all()


# ----- The training step


@pytest.mark.parametrize("penalise", [True, False], ids=["penalised", "plain"])
@pytest.mark.parametrize(
    "changes",
    [
        *({"loss": name} for name in BY_HAND),
        {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "gradient_penalty": 10.0},
        {"loss": "hinge", "r1": 0.0, "r2": 0.0, "minibatch_std": False},
        {"loss": "minimax", "architecture": "conv"},
        {"loss": "least_squares", "conditional": False},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_step_follows_the_plain_gradients_of_both_losses(changes, penalise):
    """One step of plain gradient descent moves both networks by what separate passes say."""
    settings = small(**{"shift": 0, "r1": 0.5, "r2": 0.25, "penalty_every": 4} | changes)
    keras.utils.set_random_seed(0)
    state = SimpleNamespace(
        generator=gan_mnist.build_generator(settings),
        discriminator=gan_mnist.build_discriminator(settings),
        generator_optimizer=keras.optimizers.SGD(1.0),
        discriminator_optimizer=keras.optimizers.SGD(1.0),
        random=tf.random.Generator.from_seed(0),
    )
    state.generator_optimizer.build(state.generator.trainable_variables)
    state.discriminator_optimizer.build(state.discriminator.trainable_variables)
    both = (state.generator, state.discriminator)
    before = [[x.numpy() for x in network.trainable_variables] for network in both]
    real = tf.constant(synthetic_digits(30)[0][..., np.newaxis] / 127.5 - 1, tf.float32)
    classes = tf.range(30) % 10 if settings.conditional else None
    expected = plain_gradients(state, settings, real, classes, penalise)
    gan_mnist.train_step(state, settings, real, classes, penalise)
    for network, old, gradients in zip(both, before, expected, strict=True):
        for variable, was, gradient in zip(
            network.trainable_variables, old, gradients, strict=True
        ):
            close = 1e-4 * np.abs(gradient).max() + 1e-6
            assert np.allclose(was - variable.numpy(), gradient, rtol=1e-3, atol=close)


def plain_gradients(state, settings, real, classes, penalise):
    """Return both networks' gradients from the definitions, a pass for each term."""
    random = tf.random.Generator.from_seed(0)  # as the step draws
    latent, share = random.normal((30, 8)), random.uniform((30, 1, 1, 1))
    moving = [x.numpy() for x in state.generator.non_trainable_variables]

    def judge(images):
        return state.discriminator([images, classes] if classes is not None else images)

    def losses(images):
        both = gan_mnist.LOSSES[settings.loss](judge(real), judge(images))
        return [tf.reduce_mean(loss) for loss in both]

    def norms(images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = judge(images)
        return tf.norm(tf.reshape(tape.gradient(logits, images), (30, -1)), axis=1)

    with tf.GradientTape() as tape:
        inputs = latent if classes is None else [latent, classes]
        fake = state.generator(inputs, training=True)
        generator_loss = losses(fake)[1]
    for_generator = tape.gradient(generator_loss, state.generator.trainable_variables)
    for variable, was in zip(state.generator.non_trainable_variables, moving, strict=True):
        variable.assign(was)  # batch normalisation's statistics
    fake = tf.constant(fake.numpy())
    with tf.GradientTape() as tape:
        objective = losses(fake)[0]
        if penalise:
            penalty = settings.r1 / 2 * tf.reduce_mean(norms(real) ** 2)
            penalty += settings.r2 / 2 * tf.reduce_mean(norms(fake) ** 2)
            between = norms(share * real + (1 - share) * fake)
            penalty += settings.gradient_penalty * tf.reduce_mean((between - 1) ** 2)
            objective += 4 * penalty
    return for_generator, tape.gradient(objective, state.discriminator.trainable_variables)
