"""The .npz that a person gives: read whole or refused in one line, whatever is in it."""

import contextlib
import os

import numpy as np
import pytest
from conftest import files_in, npz_bytes, synthetic_digits

import gan_mnist

IMAGES, LABELS = synthetic_digits(30)
BAD_ARRAYS = {
    "no images": {"pictures": IMAGES},
    "no arrays at all": {},
    "no image in images": {"images": IMAGES[:0]},
    "flat images": {"images": IMAGES.reshape(30, 784)},
    "a single image": {"images": IMAGES[0]},
    "float images": {"images": IMAGES / 255},
    "signed images": {"images": IMAGES.astype(np.int8)},
    "labels of another length": {"images": IMAGES, "labels": LABELS[:-1]},
    "labels in one-hot": {"images": IMAGES, "labels": np.eye(10, dtype=np.uint8)[LABELS]},
    "labels that are words": {"images": IMAGES, "labels": np.array(["a"] * 30)},
    "negative labels": {"images": IMAGES, "labels": LABELS.astype(int) - 5},
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_npz_that_does_not_fit_is_refused_in_one_line(case, tmp_path):
    path = tmp_path / "given.npz"
    path.write_bytes(npz_bytes(BAD_ARRAYS[case]))
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.load_dataset(gan_mnist.Settings(dataset=str(path)))
    assert len(str(refusal.value).splitlines()) == 1 and "given" in str(refusal.value)


def test_a_pickle_in_an_npz_is_refused_and_never_run(tmp_path):
    class MakesFolder:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "given.npz"
    path.write_bytes(npz_bytes({"images": np.array([MakesFolder()], object)}))
    with pytest.raises(gan_mnist.UsageError, match="given"):
        gan_mnist.read_npz(path)
    assert files_in(tmp_path) == ["given.npz"]


def test_an_npz_damaged_anywhere_is_refused_or_read_whole(tmp_path):
    path = tmp_path / "given.npz"
    whole = npz_bytes({"images": IMAGES, "labels": LABELS}, np.savez_compressed)
    random = np.random.default_rng(0)
    for number in range(400):
        damaged = bytearray(whole)
        if number < 40:
            del damaged[random.integers(len(whole)) :]
        else:
            damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(gan_mnist.UsageError):
            arrays = gan_mnist.read_npz(path)
            if {"images", "labels"} <= set(arrays):
                assert np.array_equal(arrays["images"], IMAGES)
                assert np.array_equal(arrays["labels"], LABELS)


@pytest.mark.parametrize("keys", [("images", "labels"), ("x_train", "y_train"), ("images", None)])
def test_an_npz_gives_images_labels_and_a_name(keys, tmp_path):
    path = tmp_path / "given.npz"
    np.savez(path, **{key: array for key, array in zip(keys, (IMAGES, LABELS)) if key})
    dataset = gan_mnist.load_dataset(gan_mnist.Settings(dataset=str(path)))
    assert np.array_equal(dataset.images, IMAGES[..., np.newaxis])
    assert dataset.labels is None if keys[1] is None else np.array_equal(dataset.labels, LABELS)
    assert dataset.name in ("given", "given.npz")
