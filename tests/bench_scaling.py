"""Images per second of 1 and 2 replicas and workers, bytes that they exchange, and when it pays.

    pip install psutil
    python tests/bench_scaling.py [--calls N]

All on this machine: two replicas are logical devices of its processor, two workers are processes
that speak over the loopback. They share its cores, so this measures what the exchange costs, not
what a second machine brings. The last line of each network calculates above which bandwidth two
machines like this one would beat one: there the gradients arrive in the time that half a batch
saves, less 0.1 ms for each exchange that a step has to wait for, as on a good local network.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {"default": ((28, 28), ()), "conv 64x64": ((64, 64, 3), ("--architecture", "conv"))}
KINDS = {  # replicas, workers, share of the batch
    "1 replica": (1, 0, 1),
    "1 replica, half a batch": (1, 0, 2),
    "2 replicas": (2, 0, 1),
    "1 worker": (1, 1, 1),
    "2 workers": (1, 2, 1),
}
WAIT = 1e-4  # seconds that an exchange takes, however small, between two machines
CODE = """
import json, sys, time, numpy as np, psutil, gan_mnist
tf = gan_mnist.tf
shape, replicas, share, calls, *flags = json.loads(sys.argv[1])
_, settings, _ = gan_mnist.parse_command_line(flags)
settings = gan_mnist.replace(settings, batch_size=settings.batch_size // share)
gan_mnist.use_threads_well()
if replicas > 1:
    (cpu,) = tf.config.list_physical_devices("CPU")
    devices = replicas * [tf.config.LogicalDeviceConfiguration()]
    tf.config.set_logical_device_configuration(cpu, devices)
strategy = gan_mnist.choose_strategy(settings)
if replicas > 1:
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])
images = np.random.default_rng(0).integers(0, 256, (4096, *shape), np.uint8)
dataset = gan_mnist.as_dataset((images, np.arange(4096) % 10), settings)
state = gan_mnist.new_state(settings, dataset, strategy)
train = gan_mnist.compile_training(state, dataset, settings)

def steps(count):
    batches = np.arange(count * settings.batch_size) % 4096
    train(batches.reshape(count, -1)).numpy()

def sent():
    return psutil.net_io_counters().bytes_sent

steps(8)
times, before = [], sent()
for _ in range(calls):  # as many calls on each worker
    start = time.perf_counter()
    steps(32)
    times.append((time.perf_counter() - start) / 32)
exchanged = (sent() - before) / len(times) / 32
graph = train.get_concrete_function().graph
functions = [function.node_def for function in graph.as_graph_def().library.function]
waits = max(sum(node.op == "CollectiveReduceV2" for node in nodes) for nodes in functions)
networks = state.generator.trainable_variables + state.discriminator.trainable_variables
gradients = sum(4 * int(np.prod(variable.shape)) for variable in networks)
print(json.dumps([float(np.median(times)), settings.batch_size, gradients, exchanged, waits]))
"""


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def tf_config(ports, index):
    """Return the TF_CONFIG of one of as many workers on this machine as there are ports."""
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


def measure(shape, flags, replicas, workers, share, calls):
    """Return what CODE prints of a step: seconds, images, gradients' bytes, bytes sent, waits."""
    ports = free_ports(workers)
    argument = json.dumps([shape, replicas, share, calls, *flags])
    processes = []
    for index in range(max(1, workers)):
        config = {"TF_CONFIG": tf_config(ports, index)} if workers else {}
        words = [sys.executable, "-c", CODE, argument]
        environment = os.environ | config
        processes.append(
            subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0].splitlines()[-1])


def main():
    """Print a row for each kind, and what follows, for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=12, help="of 32 steps each, measured [12]")
    calls = parser.parse_args().calls
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {calls} calls")
    for name, (shape, flags) in NETWORKS.items():
        steps = {}
        for kind, setup in KINDS.items():
            steps[kind], size, gradients, sent, waits = measure(shape, flags, *setup, calls)
            line = f"{steps[kind] * 1000:7.1f} ms a step {size / steps[kind]:9,.0f} images/s"
            print(f"{name:11} {kind:24} {line} {sent / 1e6:8.3f} MB over the loopback", flush=True)
        saved = steps["1 replica"] - steps["1 replica, half a batch"]
        print(f"{name:11} gradients: {gradients / 1e6:.2f} MB, which each of two sends a step")
        left = saved - waits * WAIT
        print(f"{name:11} half a batch saves {saved * 1000:.1f} ms a step", end=", ")
        print(f"{waits} exchanges take {waits * WAIT * 1000:.1f} ms:", end=" ")
        rate = f"pay above {8 * gradients / left / 1e9:.2f} Gbit/s" if left > 0 else "never pay"
        print(f"two machines {rate}", flush=True)


if __name__ == "__main__":
    main()
