"""A run that survives anything: kills, damage, full disks, a second run, numbers that go bad."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    ROOT,
    contents,
    environment,
    files_in,
    new_state,
    run,
    run_code,
    small,
    synthetic_digits,
    untimed,
)

import gan_mnist

TINY = {"batch_size": 20, "latent_dim": 4, "evaluation_images": 100, "checkpoint_every": 1}
TINY |= {"generator_widths": (8,), "discriminator_widths": (8,)}
DATA = gan_mnist.as_dataset(synthetic_digits(100), small())
FINAL = ("checkpoints/generator_latest.h5", "checkpoints/generator_best.h5", "samples/training.gif")
FINAL += ("samples/metrics.png", *(f"samples/image_at_epoch_000{epoch}.png" for epoch in (1, 4)))


def settings_in(folder, **changes):
    """Return the settings of a tiny run in the folder."""
    folders = {"samples_dir": folder / "samples", "checkpoints_dir": folder / "made"}
    return gan_mnist.Settings(**(TINY | folders | changes))


def train(folder, epochs, resume=False, **changes):
    """Train a tiny run in the folder."""
    gan_mnist.train(DATA, epochs, settings_in(folder, **changes), resume)


def outcome(folder):
    """Return what a run is for: its pictures' bytes and its networks' weights, by path."""
    pictures = {x: y for x, y in contents(folder).items() if x.endswith((".png", ".gif"))}
    networks = {str(x.relative_to(folder)): x for x in Path(folder).rglob("*.h5")}
    weights = {x: gan_mnist.load_generator(path).get_weights() for x, path in networks.items()}
    return pictures | {x: [array.tobytes() for array in y] for x, y in weights.items()}


def half_written(folder):
    """Return what is still under a temporary name, ours or TensorFlow's."""
    return [name for name in files_in(folder) if re.search(r"\.partial|_temp|\.tmp", name)]


def steps_saved(checkpoints):
    """Return the steps of the states that are kept there."""
    return sorted(int(path.stem[5:]) for path in (checkpoints / "state").glob("step-*.index"))


# ----- Killed at any moment


def killed_often(folder, seed, kills, flags):
    """Run with so many kills; return what the killer says."""
    words = [ROOT / "tests" / "killer.py", seed, kills, *flags]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment(TF_CPP_MIN_LOG_LEVEL=3),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + (folder / "log").read_text()
    (folder / "log").unlink()
    return done.stdout


def assert_same_run(folder, whole):
    """Both folders hold the same bytes, but for times, and the same files in checkpoints/."""
    assert untimed(folder) == untimed(whole)
    for name in FINAL:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert half_written(folder) == []
    assert files_in(folder / "checkpoints") == files_in(whole / "checkpoints")


def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(tiny_run, tiny_flags, tmp_path):
    killed_often(tmp_path, 1, 1, tiny_flags)
    assert_same_run(tmp_path, tiny_run[0])


@pytest.fixture(scope="module")
def long_run(tiny_flags, tmp_path_factory):
    """(folder, flags) of a run of 30 epochs that nobody stopped."""
    folder, flags = tmp_path_factory.mktemp("long_run"), (*tiny_flags, "--epochs", 30)
    assert run(*flags, cwd=folder).status == 0
    return folder, flags


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLED_RUNS", "5"))))
def test_runs_killed_very_often_resume_to_the_same_bytes(seed, long_run, tmp_path):
    print(killed_often(tmp_path, seed, 1000, long_run[1]))
    assert_same_run(tmp_path, long_run[0])


def test_what_a_killed_run_left_half_written_is_removed(quick, tmp_path):
    train(tmp_path, 1)
    left = ["samples/.metrics.9.partial.csv", "made/.generator_latest.9.partial.h5"]
    left += ["made/state/step-9_temp/part-00000-of-00001.index.tempstate9"]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    train(tmp_path, 2, resume=True)
    assert half_written(tmp_path) == []


# ----- Damaged states


@pytest.fixture(scope="module")
def a_state():
    return new_state(gan_mnist.Settings(**TINY), DATA)


@pytest.fixture
def states(a_state, tmp_path):
    """A function that gives a run as a new session finds it; its states are 5, 10 and 15."""
    settings = gan_mnist.Settings(**TINY, checkpoints_dir=tmp_path)
    now = {"identity": {"seed": "0"}, "started": 0.0, "history": [], "losses": [], "seconds": 0.0}

    def begin():
        return SimpleNamespace(state=a_state, settings=settings, **now)

    run = begin()
    for step in (1, 2, 5, 10, 15):
        run.state.step.assign(step)
        run.history = [{"epoch": step // 5}]
        gan_mnist.save_state(run)
    return begin


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 64
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda data, index: os.truncate(data, 1000),
    "a flipped byte of a weight": lambda data, index: flip(data, -5000),
    "a flipped byte of the index": lambda data, index: flip(index, 40),
    "an empty file": lambda data, index: index.write_bytes(b""),
    "a missing file": lambda data, index: data.unlink(),
}


def newest_state(folder):
    """Return the paths of both files of the state at step 15."""
    return sorted((folder / "state").glob("step-*15.*"))


def test_the_newest_three_states_are_kept(states, tmp_path):
    assert steps_saved(tmp_path) == [5, 10, 15]
    parts = [path.name for path in (tmp_path / "state").glob("step-*")]
    assert len(parts) == 6 and len(newest_state(tmp_path)) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_reported_in_one_line_and_the_one_before_is_used(
    damage, states, tmp_path, capsys
):
    DAMAGES[damage](*newest_state(tmp_path))
    run = states()
    run.state.step.assign(99)
    gan_mnist.restore_state(run)
    assert run.state.step.numpy() == 10 and run.history == [{"epoch": 2}]
    (line,) = capsys.readouterr().out.splitlines()
    assert newest_state(tmp_path)[-1].stem in line and "damaged" in line
    run.state.step.assign(15)  # training on, the run comes there again
    gan_mnist.save_state(run)
    again = states()
    gan_mnist.restore_state(again)
    assert again.state.step.numpy() == 15


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"identity": 5}', '{"identity": {}}', "x"])
def test_a_state_that_says_something_else_about_the_run_is_passed_over(
    text, states, tmp_path, capsys
):
    run = states()
    run.state.facts.assign(text)
    newest = newest_state(tmp_path)[-1].with_suffix("")
    run.state.write(str(newest))
    gan_mnist.restore_state(run)
    assert run.state.step.numpy() == 10
    assert newest.name in capsys.readouterr().out


def test_plain_files_among_the_states_are_no_states(states, tmp_path):
    for name in ("step_99", "step-99", "step-99.index"):
        (tmp_path / "state" / name).write_text("")
    run = states()
    gan_mnist.restore_state(run)
    assert run.state.step.numpy() == 15
    run.state.step.assign(20)
    gan_mnist.save_state(run)
    again = states()
    gan_mnist.restore_state(again)
    assert again.state.step.numpy() == 20


@pytest.mark.parametrize("listed", [None, b"", b"x", b"\xff\xfe"])
def test_states_are_found_whatever_became_of_tensorflows_list_of_them(listed, states, tmp_path):
    path = tmp_path / "state" / "checkpoint"
    path.unlink(missing_ok=True) if listed is None else path.write_bytes(listed)
    run = states()
    run.state.step.assign(99)
    gan_mnist.restore_state(run)
    assert run.state.step.numpy() == 15


def test_when_all_states_are_damaged_the_run_fails_and_nothing_changes(states, tmp_path):
    for path in (tmp_path / "state").glob("*.data*"):
        os.truncate(path, 1000)
    before = contents(tmp_path)
    with pytest.raises(gan_mnist.RunError, match="state"):
        gan_mnist.restore_state(states())
    assert contents(tmp_path) == before


def test_a_state_of_other_networks_is_refused_in_one_line(states):
    run = states()
    other = gan_mnist.Settings(**TINY | {"conditional": False})
    run.state = new_state(other, DATA)
    with pytest.raises(gan_mnist.RunError, match="can be read"):
        gan_mnist.restore_state(run)


def test_what_cannot_change_on_resume_is_named_and_what_can_is_taken(quick, tmp_path):
    train(tmp_path, 1)
    changes = {"checkpoint_every": 9, "sample_every": 2, "evaluation_images": 200}
    train(tmp_path, 2, resume=True, **changes)
    before = contents(tmp_path)
    changes = {"seed": 5, "generator_widths": (9,), "loss": "hinge"}
    other = DATA._replace(labels=DATA.labels[::-1])
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.train(other, 9, settings_in(tmp_path, **changes), resume=True)
    for words in ("seed was 0, is 5", "generator_widths was 8, is 9", "loss was", "dataset was"):
        assert words in str(refusal.value)
    assert "epochs" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


def test_labels_count_as_data_and_the_name_does_not():
    other = DATA._replace(labels=DATA.labels[::-1].copy())
    assert gan_mnist.fingerprint(other) != gan_mnist.fingerprint(DATA)
    assert gan_mnist.fingerprint(DATA._replace(name="x")) == gan_mnist.fingerprint(DATA)


def test_resume_with_nothing_to_resume_writes_nothing(quick, tmp_path):
    with pytest.raises(gan_mnist.UsageError, match="nothing to resume"):
        train(tmp_path, 1, resume=True)
    assert files_in(tmp_path) == []


# ----- Starting afresh


def moved(before):
    """Return the contents of a run's folder as they are found in made/previous."""
    return {re.sub("^(samples|made)/", "", name): data for name, data in before.items()}


def test_starting_afresh_moves_an_earlier_run_which_can_still_be_resumed(quick, tmp_path, capsys):
    train(tmp_path, 2, seed=3)
    before = contents(tmp_path)
    train(tmp_path, 1)
    previous = tmp_path / "made" / "previous"
    assert contents(previous) == moved(before)
    assert f"in {previous} now" in capsys.readouterr().out
    second = contents(tmp_path / "samples")
    train(tmp_path, 1)
    assert contents(previous) == moved(before)
    assert second.items() <= contents(tmp_path / "made" / "previous_2").items()
    there = {"samples_dir": previous, "checkpoints_dir": previous, "seed": 3}
    train(tmp_path, 3, resume=True, **there)
    assert (previous / "image_at_epoch_0003.png").exists()


def test_a_start_killed_while_it_moved_files_loses_none(quick, tmp_path, monkeypatch):
    train(tmp_path, 2)
    before = contents(tmp_path)
    move, calls = shutil.move, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        move(*arguments)

    monkeypatch.setattr(shutil, "move", dying)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 1)
    train(tmp_path, 1)
    made = tmp_path / "made"
    assert contents(made / "previous") | contents(made / "previous_2") == moved(before)


# ----- Two runs in one folder

RACE = """
import os, pathlib, sys, time, gan_mnist
folder, end = pathlib.Path(sys.argv[1]), time.monotonic() + 2
children = []
for _ in range(4):
    if child := os.fork():
        children.append(child)
        continue
    held = 0
    while time.monotonic() < end:
        try:
            with gan_mnist.holding(folder):
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                held += 1
                os.remove(folder / "inside")
        except gan_mnist.UsageError:
            pass
        except FileExistsError:
            os._exit(1)
    os._exit(0 if held else 2)
print({os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children})
with gan_mnist.holding(folder):
    print("held", flush=True)
    time.sleep(100)
"""


def test_only_one_run_is_ever_in_a_folder_whatever_is_deleted_there(quick, tmp_path):
    train(tmp_path, 1)
    samples, made = tmp_path / "samples", tmp_path / "made"
    first = subprocess.Popen(
        [sys.executable, "-c", RACE, str(samples)],
        env=environment(PYTHONPATH=ROOT),
        stdout=subprocess.PIPE,
    )
    assert first.stdout.readline() == b"{0}\n", "two were in it at once, or one never"
    assert first.stdout.readline() == b"held\n"
    for path in samples.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(tmp_path)
    with pytest.raises(gan_mnist.UsageError, match="samples is in use by another run"):
        train(tmp_path, 1)
    first.kill()
    first.communicate()
    with gan_mnist.holding(made), pytest.raises(gan_mnist.UsageError, match="made is in use"):
        train(tmp_path, 1)
    assert contents(tmp_path) == before
    train(tmp_path, 1)


# ----- Full disks


class Disk:
    """Lets os.fsync fail as a full disk does, from some call on."""

    def __init__(self, monkeypatch, full_from):
        self.calls, self.full_from, self.fsync = 0, full_from, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.calls += 1
        if self.calls >= self.full_from:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fsync(descriptor)


@pytest.mark.parametrize(("call", "step"), [(1, 5), (8, 10)])
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_state(
    call, step, quick, tmp_path, monkeypatch
):
    train(tmp_path / "whole", 2)
    disk = Disk(monkeypatch, call)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path / "full", 2)
    assert half_written(tmp_path) == []
    assert steps_saved(tmp_path / "full" / "made")[-1] == step
    disk.full_from = 10**9
    train(tmp_path / "full", 2, resume=True)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


FILLER = """
import os, pathlib, sys, gan_mnist
layers = gan_mnist.keras.Input((8,)), gan_mnist.keras.layers.Dense(50_000)
model = gan_mnist.keras.Sequential(layers)
for free in (0, 1, 4, 8, 12, 16, 20, 30):
    disk = os.statvfs(".")
    pathlib.Path("filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 4096 * free))
    try:
        gan_mnist.save_keras(model, pathlib.Path("model.h5"), {})
    except OSError as error:
        print(error)
    os.remove("filler")
sys.exit(gan_mnist.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_really_full_disk_ends_a_run_in_one_line(tiny_flags, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        done = run_code(FILLER, *tiny_flags, "--epochs", "50", cwd=disk)
        assert done.status == 1, done
        assert done.out.splitlines()[:8] == 8 * ["the disk has no room for model.h5"]
        assert len(done.err.splitlines()) == 1, done.err
        newest = max((disk / "checkpoints" / "state").glob("*.index"), key=os.path.getmtime)
        assert tf.train.load_checkpoint(str(newest.with_suffix("")))
        for path in (disk / "checkpoints").glob("*.h5"):
            gan_mnist.load_generator(path)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ----- Pictures that were there before


def test_an_earlier_picture_that_cannot_be_read_is_left_out_of_the_animation(quick, tmp_path):
    train(tmp_path, 4)
    damaged = [tmp_path / "samples" / f"image_at_epoch_000{epoch}.png" for epoch in (1, 2, 3)]
    damaged[0].write_text("no picture")
    os.truncate(damaged[1], 500)
    damaged[2].unlink()
    damaged[2].mkdir()
    train(tmp_path, 5, resume=True)
    with gan_mnist.Image.open(tmp_path / "samples" / "training.gif") as animation:
        assert animation.n_frames == 2


# ----- Numbers that go bad


def spoiling(monkeypatch, spoil):
    """Let spoil(state, losses) give the losses of each compiled call."""
    compile_training = gan_mnist.compile_training

    def compiled(state, *others):
        steps = compile_training(state, *others)
        return lambda batches: spoil(state, steps(batches))

    monkeypatch.setattr(gan_mnist, "compile_training", compiled)


def spoil_loss(state, losses):
    return losses * [[1.0, float("nan")]]


def spoil_weight(state, losses):
    weight = state.discriminator.weights[0]
    weight.assign(weight * float("inf"))
    return losses


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_weight])
def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(
    spoil, quick, tmp_path, monkeypatch
):
    train(tmp_path, 1)
    before = outcome(tmp_path)
    spoiling(monkeypatch, spoil)
    with pytest.raises(gan_mnist.RunError, match="not finite at step 10.*lower") as failure:
        train(tmp_path, 3, resume=True)
    assert "\n" not in str(failure.value)
    assert outcome(tmp_path) == before and steps_saved(tmp_path / "made") == [0, 5]


def aged(monkeypatch):
    """Let runs begin as if they had taken 500 steps."""

    def aged_state(*arguments, new_state=gan_mnist.new_state):
        state = new_state(*arguments)
        state.step.assign(500)
        return state

    monkeypatch.setattr(gan_mnist, "new_state", aged_state)


def collapsed(capsys):
    """Return which rows of the table say so."""
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if re.match(r" *\d+/\d+ ", line)]
    assert all(len(line) < 80 for line in table)
    return ["COLLAPSED" in line for line in table]


def test_a_collapse_is_said_in_its_row_but_not_of_the_first_steps(
    quick, tmp_path, monkeypatch, capsys
):
    given = [(10, 5.0), (4, 6.0), (10, 49.0), (10, 51.0), (5, 4.0)]
    quick += given
    train(tmp_path, 5)
    assert collapsed(capsys) == [False] * 5
    aged(monkeypatch)
    quick += given
    train(tmp_path, 5)
    assert collapsed(capsys) == [False, True, False, True, False]


# ----- The best


def best_weights(folder):
    return gan_mnist.load_generator(folder / "made" / "generator_best.h5").get_weights()[0]


def epoch_weights(folder, epoch):
    name = f"generator_model_epoch_{epoch:03d}.h5"
    return gan_mnist.load_generator(folder / "made" / name).get_weights()[0]


def test_only_measurements_of_as_many_images_are_compared(quick, tmp_path, monkeypatch, capsys):
    aged(monkeypatch)
    quick += [(10, 0.1), (10, 0.2)]
    train(tmp_path, 2)
    quick += [(10, 3.0), (10, 2.0), (10, 4.0)]
    train(tmp_path, 5, resume=True, evaluation_images=200)
    out = capsys.readouterr().out
    assert "Best: FID 2.000 after epoch 4." in out and "COLLAPSED" not in out
    assert np.array_equal(best_weights(tmp_path), epoch_weights(tmp_path, 4))


def test_the_best_of_an_epoch_that_the_clock_ended_stays_a_row_of_the_table(
    quick, tmp_path, monkeypatch, capsys
):
    quick += [(10, 5.0), (10, 1.0)]
    monkeypatch.setattr(gan_mnist, "STEPS_PER_CALL", 1)

    def struck(run, agree=gan_mnist.agree):
        agree(run)
        if run.state.step >= 7:
            run.done = 1.0

    with monkeypatch.context() as patch:  # a clock that strikes amid the second epoch
        patch.setattr(gan_mnist, "agree", struck)
        train(tmp_path, 4)
    first = (tmp_path / "samples" / "metrics.csv").read_text()
    assert "Best: FID 1.000 after epoch 2." in capsys.readouterr().out
    quick += [(10, 3.0), (10, 2.0)]
    train(tmp_path, 4, resume=True)
    assert (tmp_path / "samples" / "metrics.csv").read_text().startswith(first)
    assert "Best: FID 1.000 after epoch 2." in capsys.readouterr().out
    assert np.array_equal(best_weights(tmp_path), epoch_weights(tmp_path, 2))


def test_a_best_that_was_deleted_is_not_named_at_the_end(quick, tmp_path, monkeypatch, capsys):
    quick += [(10, 1.0), (10, 5.0)]
    write_epoch, best = gan_mnist.write_epoch, tmp_path / "made" / "generator_best.h5"

    def deleting(run):
        write_epoch(run)
        if len(run.history) == 2:
            best.unlink()

    monkeypatch.setattr(gan_mnist, "write_epoch", deleting)
    train(tmp_path, 2)
    out = capsys.readouterr().out
    assert "generator_best" not in out and "mnist_generator" not in out


# ----- A long session


@pytest.mark.slow
def test_over_200_epochs_memory_files_and_threads_stay_flat(tmp_path):
    code = """
import json, os, resource, numpy as np, gan_mnist
seen = []
write = gan_mnist.write_epoch
def watched(run):
    write(run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = len(os.listdir("/proc/self/task"))
    seen.append((peak, len(os.listdir("/proc/self/fd")), threads))
gan_mnist.write_epoch = watched
images = np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8)
small = dict(batch_size=20, latent_dim=8, generator_widths=(16,), discriminator_widths=(16,))
settings = gan_mnist.Settings(epochs=210, evaluation_images=500, **small)
gan_mnist.train(images, settings=settings)
print(json.dumps(seen))
"""
    done = run_code(code, cwd=tmp_path, timeout=1800)
    assert done.status == 0, done.err
    seen = json.loads(done.out.splitlines()[-1])
    tenth, last = seen[9], seen[-1]
    print(f"MB, open files, threads after epoch 10: {tenth}, after epoch {len(seen)}: {last}")
    assert last[0] < 1.05 * tenth[0]
    assert last[1] <= tenth[1] and last[2] <= tenth[2]


def test_a_state_of_the_default_networks_is_saved_in_less_than_a_second(tmp_path):
    state = new_state(gan_mnist.Settings(), DATA)
    about = {"history": [], "losses": [], "seconds": 0.0, "started": 0.0, "identity": {}}
    settings = gan_mnist.Settings(checkpoints_dir=tmp_path)
    run, seconds = SimpleNamespace(state=state, settings=settings, **about), []
    for step in range(3):
        state.step.assign(step)
        start = time.perf_counter()
        gan_mnist.save_state(run)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
