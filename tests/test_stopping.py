"""Stopping and going on: Ctrl-C, --resume, --max-minutes; and that a seed decides everything."""

import contextlib
import csv
import itertools
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    assert_same_weights,
    command,
    environment,
    files_in,
    rows,
    run,
    synthetic_digits,
    untimed,
)
from PIL import Image

import gan_mnist


def interrupt_in_second_epoch(flags, folder):
    """Run in a terminal, press Ctrl-C amid the second epoch; return status, screen, errors."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(*flags), cwd=folder, env=environment(), stdout=follower, stderr=subprocess.PIPE
    )
    os.close(follower)
    screen, interrupted = b"", False
    with contextlib.suppress(OSError):  # so Linux ends a terminal whose process is gone
        while chunk := os.read(leader, 4096):
            screen += chunk
            steps = [int(number) for number in re.findall(rb"(\d+)/300", screen)]
            if not interrupted and any(b < a for a, b in itertools.pairwise(steps)):
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(leader)
    return process.wait(60), screen.decode(), process.stderr.read().decode()


def test_an_interrupted_run_resumes_to_the_bytes_of_one_never_stopped(
    tiny_run, tiny_flags, tmp_path
):
    status, screen, err = interrupt_in_second_epoch(tiny_flags, tmp_path)
    assert (status, err) == (130, ""), screen
    bar = screen[screen.index("/300") :]
    assert "images/s" in bar and "loss" in bar
    done = rows(tmp_path)
    assert [row["epoch"] for row in done] == ["1"]
    line = shlex.split(screen.splitlines()[-1])
    assert line[:2] == ["python", "gan_mnist.py"] and "--resume" in line

    resumed = run(*line[2:], cwd=tmp_path)
    assert (resumed.status, resumed.err) == (0, "")
    assert rows(tmp_path)[: len(done)] == done
    assert untimed(tmp_path) == untimed(tiny_run[0])
    for name in ("latest", "best", "model_epoch_004"):
        path = f"checkpoints/generator_{name}.h5"
        assert_same_weights(tmp_path / path, tiny_run[0] / path)
    grid = "samples/image_at_epoch_0004.png"
    assert (tmp_path / grid).read_bytes() == (tiny_run[0] / grid).read_bytes()
    assert Image.open(tmp_path / "samples" / "training.gif").n_frames == 4


def test_two_runs_of_one_seed_are_equal(plain_runs):
    first, second = plain_runs["first"][0], plain_runs["second"][0]
    assert untimed(first) == untimed(second) and len(untimed(first)) == 2
    names = "checkpoints/generator_latest.h5", "samples/image_at_epoch_0002.png"
    assert_same_weights(first / names[0], second / names[0])
    assert (first / names[1]).read_bytes() == (second / names[1]).read_bytes()


def test_a_run_of_so_many_minutes_ends_with_everything_saved(plain_runs):
    folder, result = plain_runs["minutes"]
    table = rows(folder)
    assert 1 <= len(table) < 100 and result.status == 0
    last = f"image_at_epoch_{int(table[-1]['epoch']):04d}.png"
    assert {last, "metrics.png", "training.gif"} <= set(files_in(folder / "samples"))
    made = files_in(folder / "checkpoints")
    assert {"generator_latest.h5", "generator_best.h5", "state"} <= set(made)


@pytest.mark.parametrize("stopped_epoch", [1, 2])
def test_ctrl_c_in_the_last_call_of_an_epoch_loses_no_row(tmp_path, monkeypatch, stopped_epoch):
    images = synthetic_digits(200)[0]

    def train(name, **changes):
        folders = {"samples_dir": str(tmp_path / name), "checkpoints_dir": str(tmp_path / name)}
        small = {"generator_widths": (8,), "discriminator_widths": (8,), "evaluation_images": 100}
        settings = gan_mnist.Settings(epochs=2, batch_size=20, **small, **folders)
        gan_mnist.train(images, settings=settings, **changes)

    def losses(name):
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            return [(row["step"], row["discriminator_loss"]) for row in csv.DictReader(file)]

    train("whole")
    compile_training, calls = gan_mnist.compile_training, []

    def stopping(*arguments):  # ten steps an epoch: one call
        steps = compile_training(*arguments)

        def call(*epoch):
            steps(*epoch)
            calls.append(epoch)
            if len(calls) == stopped_epoch:
                os.kill(os.getpid(), signal.SIGINT)

        return call

    monkeypatch.setattr(gan_mnist, "compile_training", stopping)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train("stopped")
    train("stopped", resume=True)
    assert len(losses("whole")) == 2
    assert losses("stopped") == losses("whole")


def test_a_run_that_the_clock_ended_within_an_epoch_goes_on_to_that_epochs_own_numbers(
    tmp_path, monkeypatch
):
    images = synthetic_digits(2200)[0]  # 110 steps: two calls

    def train(name, **changes):
        folders = {"samples_dir": str(tmp_path / name), "checkpoints_dir": str(tmp_path / name)}
        small = {"generator_widths": (8,), "discriminator_widths": (8,), "evaluation_images": 100}
        settings = gan_mnist.Settings(epochs=1, batch_size=20, decay_from=1.0, **small, **folders)
        gan_mnist.train(images, settings=settings, **changes)
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        return row

    whole = train("whole")
    with monkeypatch.context() as patch:  # a clock that strikes in the first call
        patch.setattr(gan_mnist.Run, "progress", lambda run: float(run.step() > 0))
        cut = train("cut")
    assert int(cut["step"]) < int(whole["step"]) == 110
    resumed = train("cut", resume=True)
    for name in ("step", "discriminator_loss", "generator_loss", "fid"):
        assert resumed[name] == whole[name], name
    assert float(resumed["seconds"]) > float(cut["seconds"])


@pytest.mark.parametrize("seconds", [1.5, 3.0, 4.5])
def test_ctrl_c_ends_a_command_at_once_wherever_it_is(seconds, digits_npz, tmp_path):
    flags = ("evaluate", "--inception", "mnist", "--dataset", digits_npz, "--count", 200_000)
    process = subprocess.Popen(
        command(*flags),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "\nInterrupted.\n", "")


def test_ctrl_c_amid_writing_leaves_nothing_half_written(tmp_path):
    code = """
import signal, gan_mnist
signal.signal(signal.SIGINT, gan_mnist.end_at_once)
with gan_mnist.replacing("file.png") as file, gan_mnist.replacing("folder") as folder:
    folder.mkdir()
    for path in (file, folder / "part"):
        path.write_text("half")
    signal.raise_signal(signal.SIGINT)
"""
    environ = environment() | {"PYTHONPATH": str(Path(gan_mnist.__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "\nInterrupted.\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_storm_of_signals_breaks_nothing(tmp_path):
    # Without a stack of their own they break the heap within seconds; see the end of gan_mnist.py.
    code = f"""
import runpy, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
sys.argv[1:] = ["generate", "--count", "60000", "--output", "drawn.npz"]
try:
    runpy.run_path({gan_mnist.__file__!r}, run_name="__main__")
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    assert len(np.load(tmp_path / "drawn.npz")["images"]) == 60_000
