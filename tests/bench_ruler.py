"""Print the scale of the shipped ruler: IS and FID of MNIST's test images, blurred, and of noise;
then FID of real images by their count and mix of classes, which is what luck, too few images and
an even mix alone make.

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
    training, classes, test, test_classes = arrays
    training, test = training[..., np.newaxis], test[..., np.newaxis]
    random = np.random.default_rng(0)
    order = random.permutation(60_000)
    yield "10,000 training images", training[order[:10_000]]
    even = [order[classes[order] == digit][:1000] for digit in range(10)]
    yield "as many of each class", training[random.permutation(np.concatenate(even))]
    yield "MNIST's test images", test
    for pixels in (0.5, 0.7, 1.0):
        blurred = gaussian_filter(test.astype(np.float32), (0, pixels, pixels, 0))
        yield f"blurred by {pixels} pixels", np.round(blurred).astype(np.uint8)
    ones = test[test_classes == 1]
    yield "nothing but ones", np.resize(ones, test.shape)
    yield "one image repeated", np.repeat(test[:1], len(test), axis=0)
    yield "noise", random.integers(0, 256, test.shape, dtype=np.uint8)


def main():
    """Print the table."""
    arrays = gan_mnist.load_mnist()
    if arrays is None:
        sys.exit("This needs MNIST.")
    dataset = gan_mnist.load_dataset(gan_mnist.Settings())
    ruler = gan_mnist.load_ruler(gan_mnist.Settings(), dataset)
    real = gan_mnist.real_statistics(ruler, dataset)
    features, probabilities = gan_mnist.measure(ruler, dataset.test_images)
    accuracy = (probabilities.argmax(axis=1) == arrays[3]).mean()
    print(f"{ruler.name}: {accuracy:.2%} of the test images read right\n")
    print("| images | IS | FID | classes | seconds |\n|---|---|---|---|---|")
    for name, images in image_sets(arrays):
        start = time.monotonic()
        metrics = gan_mnist.quick_metrics(ruler, real, *gan_mnist.measure(ruler, images))
        values = "{inception_score:.3f} | {fid:.3f} | {classes_covered}".format(**metrics)
        print(f"| {name} | {values} | {time.monotonic() - start:.2f} |")
    print("\n| test images | FID, mean of 10 draws | standard deviation |\n|---|---|---|")
    random = np.random.default_rng(0)
    for count in (100, 200, 500, 1000, 2000, 5000):
        distances = []
        for _ in range(10):
            some = features[random.permutation(len(features))[:count]]
            statistics = gan_mnist.feature_statistics(some)
            distances.append(gan_mnist.frechet_distance(*statistics, *real))
        print(f"| {count:,} | {np.mean(distances):.3f} | {np.std(distances):.3f} |")


if __name__ == "__main__":
    main()
