"""What deterministic operations cost: processor seconds a training call with and without them.

    python tests/bench_determinism.py [FLAG ...]

Processes take turns; each trains on random images and reports its fastest call (26 steps).
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys, time, numpy as np, gan_mnist
tf = gan_mnist.tf
if sys.argv.pop(1) == "with":
    tf.config.experimental.enable_op_determinism()
_, settings, _ = gan_mnist.parse_command_line(sys.argv[1:])
images = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), np.uint8)
dataset = gan_mnist.as_dataset((images, np.arange(10_000) % 10), settings)
gan_mnist.use_threads_well()
state = gan_mnist.new_state(settings, dataset, tf.distribute.get_strategy())
steps = gan_mnist.compile_training(state, dataset, settings)
batches = np.arange(26 * settings.batch_size).reshape(26, -1) % 10_000
seconds = []
for _ in range(12):
    start = time.process_time()
    steps(batches).numpy()
    seconds.append(time.process_time() - start)
print(min(seconds))
"""


def main():
    """Print both times and their ratio."""
    best = {"with": 1e9, "without": 1e9}
    for _ in range(3):
        for kind in ("with", "without"):
            done = subprocess.run(
                [sys.executable, "-c", CODE, kind, *sys.argv[1:]],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            best[kind] = min(best[kind], float(done.stdout.split()[-1]))
    print(f"a call with {best['with']:.4f} s, without {best['without']:.4f} s", end=", ")
    print(f"ratio {best['with'] / best['without']:.3f}")


if __name__ == "__main__":
    main()
