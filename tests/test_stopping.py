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

import numpy as np
import pytest
from conftest import (
    assert_same_weights,
    command,
    environment,
    files_in,
    rows,
    run,
    run_code,
    small,
    synthetic_digits,
    untimed,
)
from PIL import Image

import gan_mnist

SIGNALS = [signal.SIGINT, signal.SIGTERM]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


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
    done = rows(tmp_path)
    assert [row["epoch"] for row in done] == ["1"]
    line = shlex.split(screen.splitlines()[-1])
    assert line[:2] == ["python", "gan_mnist.py"] and "--resume" in line

    resumed = run(*line[2:], cwd=tmp_path)
    assert (resumed.status, resumed.err) == (0, "")
    assert rows(tmp_path)[: len(done)] == done
    assert untimed(tmp_path) == untimed(tiny_run[0])
    names = [f"checkpoints/generator_{name}.h5" for name in ("latest", "best", "model_epoch_004")]
    for name in (*names, "samples/image_at_epoch_0004.png"):
        assert (tmp_path / name).read_bytes() == (tiny_run[0] / name).read_bytes(), name
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


def start(flags, folder):
    """Start the program in the folder."""
    folder.mkdir()
    return subprocess.Popen(command(*flags), cwd=folder, env=environment(), **PIPES)


def test_signals_end_a_run_at_any_stage_and_no_traceback_is_seen(tiny_flags, tmp_path):
    endless = (*tiny_flags, "--epochs", 100000)
    once, twice, early = (start(endless, tmp_path / name) for name in ("once", "twice", "early"))
    early.stdout.readline()  # Loading TensorFlow ...
    time.sleep(0.5)
    early.send_signal(signal.SIGTERM)
    for process in (once, twice):
        while not re.match(r" *1/100000 ", process.stdout.readline()):
            assert process.poll() is None
    once.send_signal(signal.SIGTERM)
    twice.send_signal(signal.SIGINT)
    time.sleep(0.2)
    twice.send_signal(signal.SIGINT)
    results = [process.communicate(timeout=60) for process in (early, once, twice)]
    assert [err for _, err in results] == ["", "", ""]
    assert [process.returncode for process in (early, once, twice)] == [143, 130, 130]
    assert "--resume" in results[1][0] and "--resume" not in results[0][0]
    assert files_in(tmp_path / "early") == []
    assert "samples/training.gif" in files_in(tmp_path / "once")
    assert not [name for name in files_in(tmp_path) if ".partial" in name]


# ----- Without a network that measures


def train(folder, **changes):
    """Train two epochs of ten steps on synthetic digits."""
    folders = {"samples_dir": folder / "samples", "checkpoints_dir": folder / "made"}
    options = {"resume": changes.pop("resume", False)}
    common = {"epochs": 2, "batch_size": 20, "evaluation_images": 100, "seed": 1}
    gan_mnist.train(synthetic_digits(200), settings=small(**common | folders | changes), **options)


def table(folder):
    """Return metrics.csv but for times."""
    with open(folder / "samples" / "metrics.csv", newline="") as file:
        timed = ("seconds", "images_per_second")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def with_steps(monkeypatch, wrap):
    """Let wrap(steps) stand for the compiled training."""
    compile_training = gan_mnist.compile_training
    monkeypatch.setattr(gan_mnist, "compile_training", lambda *args: wrap(compile_training(*args)))


@pytest.mark.parametrize(("kind", "stopped_epoch"), [*zip(SIGNALS, (1, 2), strict=True)])
def test_a_signal_in_the_last_call_of_an_epoch_loses_no_row_and_is_the_sessions_own_again(
    kind, stopped_epoch, quick, tmp_path, monkeypatch, capsys
):
    calls, before = [], [signal.getsignal(each) for each in SIGNALS]
    train(tmp_path / "whole")
    assert [signal.getsignal(each) for each in SIGNALS] == before

    def stopping(steps):  # ten steps an epoch: one call
        def call(batches):
            losses = steps(batches)
            calls.append(len(batches))
            if len(calls) == stopped_epoch:
                os.kill(os.getpid(), kind)
            return losses

        return call

    with_steps(monkeypatch, stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped")
    *_, last_line = capsys.readouterr().out.splitlines()
    assert "train(..., resume=True)" in last_line and "gan_mnist.py" not in last_line
    assert [signal.getsignal(each) for each in SIGNALS] == before
    train(tmp_path / "stopped", resume=True)
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")


@pytest.fixture
def slowed(monkeypatch):
    """A function that lets one of gan_mnist's take so many seconds more, by a clock of its own."""
    clock = [0.0]
    monkeypatch.setattr(gan_mnist, "monotonic", lambda: clock[0])

    def slow(function, seconds):
        def wrapped(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        return wrapped

    def slow_by_name(name, seconds):
        monkeypatch.setattr(gan_mnist, name, slow(getattr(gan_mnist, name), seconds))

    with_steps(monkeypatch, lambda steps: slow(steps, 15))
    return slow_by_name


@pytest.mark.parametrize("where", ["measure", "write_epoch"])
def test_no_epoch_is_begun_when_the_minutes_are_over(where, quick, slowed, tmp_path):
    slowed(where, 50)
    train(tmp_path, max_minutes=1.0, epochs=5)
    assert [(row["step"], row["fid"]) for row in table(tmp_path)] == [("10", "5.0")]


def test_the_row_that_the_minutes_ended_is_measured(quick, slowed, tmp_path, monkeypatch):
    monkeypatch.setattr(gan_mnist, "STEPS_PER_CALL", 4)  # 15 seconds
    train(tmp_path, max_minutes=1.0, epochs=50, evaluate_every=20, sample_every=20)
    assert [row["step"] for row in table(tmp_path)] == ["10", "14"]
    assert [row["fid"] for row in table(tmp_path)] == ["", "5.0"]
    assert (tmp_path / "samples" / "image_at_epoch_0002.png").exists()


def test_the_minutes_begin_when_the_network_that_measures_is_there(quick, slowed, tmp_path):
    slowed("load_ruler", 200)  # trained at first use
    train(tmp_path, max_minutes=1.0, epochs=2)
    assert [row["step"] for row in table(tmp_path)] == ["10", "20"]


# ----- Commands


def test_ctrl_c_ends_a_command_at_once_wherever_it_is(digits_npz, tmp_path):
    flags = ("evaluate", "--inception", "mnist", "--dataset", digits_npz, "--count", 200_000)
    loading, measuring = (start(flags, tmp_path / name) for name in ("loading", "measuring"))
    loading.stdout.readline()
    time.sleep(0.5)
    loading.send_signal(signal.SIGINT)
    assert loading.communicate(timeout=10) == ("", "")
    while not measuring.stderr.readline().startswith("Measured by"):
        assert measuring.poll() is None
    time.sleep(0.5)
    measuring.send_signal(signal.SIGINT)
    assert measuring.communicate(timeout=10) == ("Loading TensorFlow ...\n", "")
    assert loading.returncode == measuring.returncode == 130


def test_ctrl_c_amid_writing_leaves_nothing_half_written(tmp_path):
    code = """
import pathlib, signal, gan_mnist
signal.signal(signal.SIGINT, gan_mnist.end_at_once)
paths = pathlib.Path("file.png"), pathlib.Path("folder")
with gan_mnist.replacing(paths[0]) as file, gan_mnist.replacing(paths[1]) as folder:
    folder.mkdir()
    for path in (file, folder / "part"):
        path.write_text("half")
    signal.raise_signal(signal.SIGINT)
"""
    assert run_code(code, cwd=tmp_path) == (130, "", "")
    assert files_in(tmp_path) == []


@pytest.mark.slow
def test_a_storm_of_signals_breaks_nothing(tmp_path):
    # Without a stack of their own they may break the heap: see signal_stack.py.
    code = f"""
import runpy, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
sys.argv[1:] = ["generate", "--count", "30000", "--output", "drawn.npz"]
try:
    runpy.run_path({gan_mnist.__file__!r}, run_name="__main__")
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    assert len(np.load(tmp_path / "drawn.npz")["images"]) == 30_000


def test_the_line_to_go_on_keeps_a_folder_that_is_named_like_the_command(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(gan_mnist.RUN, "train", stop)
    flags = ["--samples-dir", "train"]
    for start_of_line in ([], ["train"]):
        for words in ([*start_of_line, *flags], [*start_of_line, "--resume", *flags]):
            assert gan_mnist.main(words) == 130
            last_line = capsys.readouterr().out.splitlines()[-1]
            expected = ["python", "gan_mnist.py", *start_of_line, *flags, "--resume"]
            assert shlex.split(last_line) == expected
