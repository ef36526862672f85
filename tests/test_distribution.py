"""Many devices and machines: they train as one and stop as one, and only the chief is seen."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bench_scaling import free_ports, tf_config
from conftest import ROOT, Result, command, environment, files_in, rows, run, run_code

import gan_mnist

TEN_STEPS = """
import hashlib, json, os, sys, time
import numpy as np
import tensorflow as tf
from types import SimpleNamespace
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
import conftest, gan_mnist

settings = gan_mnist.Settings(r2=0, gradient_penalty=1.0, penalty_every=2)
data = gan_mnist.as_dataset(conftest.synthetic_digits(640), settings)

def ten_steps(strategy):
    state = gan_mnist.new_state(settings, data, strategy)
    # Low rates: where a loss nears 0, the exponential of a large difference, rounding grows.
    state.generator_optimizer.learning_rate = settings.generator_learning_rate / 30
    state.discriminator_optimizer.learning_rate = settings.discriminator_learning_rate / 30
    train = gan_mnist.compile_training(state, data, settings)
    losses = train(np.arange(640).reshape(10, 64)).numpy().tolist()
    digests = [hashlib.sha256(), hashlib.sha256()]
    for variable in state.generator.variables + state.discriminator.variables:
        copies = strategy.experimental_local_results(variable.value)
        for digest, copy in zip(digests, copies):
            digest.update(copy.numpy())
    weights = [digest.hexdigest() for digest in digests[:len(copies)]]
    return state, {"losses": losses, "weights": weights}

def agreed(state, worker):
    run = SimpleNamespace(state=state, settings=gan_mnist.Settings(epochs=1), history=[])
    run.losses, run.steps_per_epoch, run.started = worker * [None], 4, time.monotonic()
    run.signals = worker * [15]
    gan_mnist.agree(run)
    return run.done, run.stopped

def refusal(strategy):
    try:
        with strategy.scope():
            gan_mnist.train(data, settings=gan_mnist.Settings(batch_size=63))
    except gan_mnist.UsageError as error:
        return str(error)

if "TF_CONFIG" in os.environ:
    state, found = ten_steps(gan_mnist.choose_strategy(settings))
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    print(json.dumps(found | {"agreed": agreed(state, worker)}))
else:
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    alone, together = ten_steps(tf.distribute.get_strategy())[1], ten_steps(mirrored)[1]
    print(json.dumps({"alone": alone, "together": together, "refusal": refusal(mirrored)}))
"""


# Flags of a run whose first row comes soon.
QUICK = (
    *("--batch-size", 100, "--minibatch-std", "false", "--shift", 0, "--r1", 0, "--r2", 0),
    *("--evaluate-every", 1000),
)


def start_workers(words, folders, **changes):
    """Start a worker in each folder; return the processes, the chief's first."""
    ports = free_ports(len(folders))
    return [
        subprocess.Popen(
            list(map(str, words)),
            cwd=folder,
            env=environment(TF_CONFIG=tf_config(ports, index), **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders)
    ]


def wait_for_row(process):
    """Read what a process prints up to its first row of the table; return that row's epoch."""
    for line in process.stdout:
        if found := re.match(r" *(\d+)/\d+ ", line):
            return int(found[1])
    raise AssertionError(process.stderr.read())


def result_of(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


# ----- N devices train as one


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """What ten steps came to on one device, on two devices and in two workers, by name."""
    words = [sys.executable, "-c", TEN_STEPS]
    folder, path = tmp_path_factory.mktemp("steps"), f"{ROOT}:{ROOT / 'tests'}"
    alone = run_code(TEN_STEPS, cwd=folder, PYTHONPATH=path)
    assert alone.status == 0, alone.err
    workers = [result_of(x, 120) for x in start_workers(words, 2 * [folder], PYTHONPATH=path)]
    assert [worker.status for worker in workers] == [0, 0], workers
    found = [json.loads(worker.out.splitlines()[-1]) for worker in workers]
    return json.loads(alone.out.splitlines()[-1]) | {"workers": found}


def test_ten_steps_on_two_devices_or_workers_have_the_losses_of_one(ten_steps):
    one, two = ten_steps["alone"]["losses"], ten_steps["together"]["losses"]
    first, second = (worker["losses"] for worker in ten_steps["workers"])
    assert np.shape(one) == (10, 2) and np.all(np.isfinite(one))
    assert np.allclose(two, one, rtol=1e-3)
    assert np.allclose(first, one, rtol=1e-3)
    assert first == second


def test_after_ten_steps_all_replicas_hold_the_same_bytes(ten_steps):
    first, second = ten_steps["together"]["weights"]
    assert first == second
    first, second = (worker["weights"] for worker in ten_steps["workers"])
    assert first == second


def test_workers_agree_how_much_is_done_and_that_one_got_a_signal(ten_steps):
    assert [worker["agreed"] for worker in ten_steps["workers"]] == 2 * [[1 / 8, 1 / 2]]


def test_a_batch_that_the_devices_cannot_share_is_refused(ten_steps):
    assert "2 devices" in ten_steps["refusal"] and "--batch-size 63" in ten_steps["refusal"]


def test_a_cluster_of_one_worker_trains_as_one_machine(tiny_flags, tmp_path):
    # Some clouds set TF_CONFIG for a single machine, too.
    folders = [tmp_path / name for name in ("cluster", "machine")]
    for folder in folders:
        folder.mkdir()
    words = command(*tiny_flags, "--epochs", 1)
    worker = result_of(start_workers(words, folders[:1])[0], 120)
    assert (worker.status, worker.err) == (0, "")
    assert run(*tiny_flags, "--epochs", 1, cwd=folders[1]).status == 0
    clustered, alone = [float(rows(folder)[0]["generator_loss"]) for folder in folders]
    assert clustered == pytest.approx(alone, rel=1e-3)


# ----- Workers stop as one, and only the chief is seen


@pytest.fixture(scope="module")
def stopped(tiny_flags, tmp_path_factory):
    """(folders, Results) of a chief and a worker, each in a folder of its own.

    The worker got SIGTERM.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("chief", "worker")]
    flags = (*tiny_flags, *QUICK, "--epochs", 100_000)
    processes = start_workers(command(*flags), folders)
    wait_for_row(processes[0])
    processes[1].send_signal(signal.SIGTERM)
    return folders, [result_of(process) for process in processes]


def test_sigterm_to_one_worker_saves_and_stops_all(stopped):
    _, (chief, worker) = stopped
    assert [chief.status, worker.status] == [130, 130]
    assert chief.err == worker.err == ""
    assert "Stopped; all is saved." in chief.out


def test_only_the_chief_prints_and_writes(stopped):
    (chief_folder, worker_folder), (_, worker) = stopped
    *waiting, line = worker.out.partition("To go on")[0].splitlines()
    assert [words.endswith(" ...") for words in waiting] == [True, True]
    assert line.startswith("Another worker is the chief")
    assert files_in(worker_folder) == []
    names = files_in(chief_folder)
    assert {"samples/training.gif", "checkpoints/generator_latest.h5"} <= set(names)


@pytest.fixture(scope="module")
def killed(stopped, tiny_flags):
    """(folder, epoch, the chief's Result, seconds) of both resumed, whose worker was killed."""
    folder = stopped[0][0]
    flags = ("train", "--resume", *tiny_flags, *QUICK, "--epochs", 100_000)
    chief, worker = start_workers(command(*flags), 2 * [folder])
    epoch = wait_for_row(chief)
    worker.kill()
    start = time.monotonic()
    result = result_of(chief, 90)
    worker.communicate()
    return folder, epoch, result, time.monotonic() - start


def test_a_killed_worker_ends_the_others_within_a_minute_with_one_line(killed):
    _, _, chief, seconds = killed
    assert chief.status == 1 and seconds < 60
    assert len(chief.err.splitlines()) == 1, chief.err


def test_one_machine_goes_on_with_the_run_of_two(killed, tiny_flags):
    folder, epoch, *_ = killed
    before = rows(folder)
    assert len(before) >= epoch - 1 > 0  # it died while the last row was being saved
    flags = (*tiny_flags, *QUICK, "--epochs", len(before) + 2)
    done = run("train", "--resume", *flags, cwd=folder)
    assert (done.status, done.err) == (0, "")
    after = rows(folder)
    assert after[: len(before)] == before and len(after) == len(before) + 2
    assert [int(row["step"]) for row in after] == [30 * (1 + n) for n in range(len(after))]
    assert np.isfinite(float(after[-1]["fid"]))


# ----- A wrong TF_CONFIG


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        '{"cluster": {"worker": ["localhost:1", "localhost:2"]}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "boss", "index": 0}}',
        '{"cluster": "worker", "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_wrong_tf_config_is_refused_before_anything_is_written(
    wrong, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CONFIG", wrong)
    assert gan_mnist.main([]) == 2
    assert Result(2, "", capsys.readouterr().err).refuses("TF_CONFIG")
    assert files_in(tmp_path) == []
