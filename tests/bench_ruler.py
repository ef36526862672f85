"""Print the scale of the shipped ruler: IS and FID of MNIST's test images, blurred, and of noise;
then FID of real test images by their count, which is what luck and too few images alone make.

    python tests/bench_ruler.py

It needs MNIST in the Keras cache. The last column is how long measuring 10,000 images took.
"""

import sys
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan_mnist


def image_sets(arrays):
    """Yield a name and uint8 images (10000, 28, 28, 1), from the best to the worst."""
    test = arrays["x_test"][..., np.newaxis]
    random = np.random.default_rng(0)
    yield (
        "10,000 training images",
        arrays["x_train"][random.permutation(60_000)[:10_000], ..., None],
    )
    yield "MNIST's test images", test
    for pixels in (0.5, 0.7, 1.0):
        blurred = gaussian_filter(test.astype(np.float32), (0, pixels, pixels, 0))
        yield f"blurred by {pixels} pixels", np.round(blurred).astype(np.uint8)
    ones = test[arrays["y_test"] == 1]
    yield "nothing but ones", np.resize(ones, test.shape)
    yield "one image repeated", np.repeat(test[:1], len(test), axis=0)
    yield "noise", random.integers(0, 256, test.shape, dtype=np.uint8)


def main():
    """Print the table."""
    arrays = gan_mnist.load_mnist()
    if arrays is None:
        sys.exit("This needs MNIST.")
    dataset = gan_mnist.Dataset(arrays["x_train"][..., np.newaxis], arrays["y_train"], "mnist")
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    _, probabilities = gan_mnist.measure(ruler, arrays["x_test"][..., np.newaxis])
    accuracy = (probabilities.argmax(axis=1) == arrays["y_test"]).mean()
    print(f"{ruler.name}: {accuracy:.2%} of the test images read right\n")
    print("| images | IS | FID | classes | seconds |\n|---|---|---|---|---|")
    for name, images in image_sets(arrays):
        start = time.monotonic()
        metrics = gan_mnist.quick_metrics(ruler, images)
        values = "{inception_score:.3f} | {fid:.3f} | {classes_covered}".format(**metrics)
        print(f"| {name} | {values} | {time.monotonic() - start:.2f} |")
    features, _ = gan_mnist.measure(ruler, arrays["x_test"][..., np.newaxis])
    print("\n| test images | FID | its 95 % interval |\n|---|---|---|")
    order = np.random.default_rng(0).permutation(len(features))
    for count in (100, 200, 500, 1000, 2000, 5000, 10_000):
        some = features[order[:count]]
        statistics = (*gan_mnist.feature_statistics(some), ruler.mean, ruler.covariance)
        low, high = gan_mnist.frechet_interval(some, ruler.mean, ruler.covariance)
        distance = gan_mnist.frechet_distance(*statistics)
        print(f"| {count:,} | {distance:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
