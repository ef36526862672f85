"""A run that survives anything: kills, damage, full disks, a second run, numbers that go bad."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    command,
    contents,
    environment,
    files_in,
    run,
    run_code,
    synthetic_digits,
    untimed,
)

import gan_mnist

IMAGES, LABELS = synthetic_digits(100)
DATA = gan_mnist.Dataset(IMAGES[..., np.newaxis], LABELS, "segments")
SMALL = {"batch_size": 20, "latent_dim": 4, "evaluation_images": 100, "checkpoint_every": 1}
SMALL |= {"generator_widths": (8,), "discriminator_widths": (8,)}
FINAL = ("checkpoints/generator_latest.h5", "checkpoints/generator_best.h5", "samples/training.gif")
FINAL += (
    "samples/metrics.png",
    "samples/image_at_epoch_0001.png",
    "samples/image_at_epoch_0004.png",
)


def settings_in(folder, **changes):
    """Return the settings of a tiny run in the folder."""
    folders = {"samples_dir": str(folder / "samples"), "checkpoints_dir": str(folder / "made")}
    return gan_mnist.Settings(**(SMALL | folders | changes))


def outcome(folder):
    """Return what a run is for: its pictures' bytes and its networks' weights, by path."""
    pictures = {x: y for x, y in contents(folder).items() if x.endswith((".png", ".gif"))}
    networks = {str(x.relative_to(folder)): x for x in Path(folder).rglob("*.h5")}
    weights = {x: gan_mnist.load_generator(path).get_weights() for x, path in networks.items()}
    return pictures | {x: [array.tobytes() for array in y] for x, y in weights.items()}


def half_written(folder):
    """Return what is still under a temporary name."""
    return [name for name in files_in(folder) if ".partial" in name or name.endswith("lock")]


@pytest.fixture
def quick(monkeypatch):
    """Runs without the network that measures: each epoch gets the next of these metrics."""
    given = []

    def quick_metrics(ruler, images):
        classes, fid = given.pop(0) if given else (10, 5.0)
        scores = {"inception_score": 2.0, "inception_score_std": 0.1}
        scores["class_shares"] = None if classes is None else [0.1] * 10
        return scores | {"fid": fid, "classes_covered": classes}

    nothing = gan_mnist.Ruler("none", None, np.zeros(1), np.eye(1))
    monkeypatch.setattr(gan_mnist, "load_ruler", lambda *_: nothing)
    monkeypatch.setattr(gan_mnist, "quick_metrics", quick_metrics)
    monkeypatch.setattr(gan_mnist, "PATIENCE", 1)
    return given


# ----- Killed at any moment


def killed_often(folder, seed, kills, flags):
    """Run with so many kills; return what the killer says."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "killer.py"),
            str(seed),
            str(kills),
            *map(str, flags),
        ],
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
    """Both folders hold the same bytes, but for times."""
    assert untimed(folder) == untimed(whole)
    for name in FINAL:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert half_written(folder) == []


def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(tiny_run, tiny_flags, tmp_path):
    killed_often(tmp_path, 1, 3, tiny_flags)
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


def start(flags, folder):
    """Start the program in the folder; it has begun to train when its first row is printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    folder.mkdir()
    return subprocess.Popen(command(*flags), cwd=folder, env=environment(), **pipes)


def test_signals_end_a_run_at_any_stage_with_status_130_and_no_traceback(tiny_flags, tmp_path):
    endless = (*tiny_flags, "--epochs", 100000)
    once, twice, early = (start(endless, tmp_path / name) for name in ("once", "twice", "early"))
    maps = Path(f"/proc/{early.pid}/maps")
    if maps.exists():  # on Linux
        while "tensorflow" not in maps.read_text():
            time.sleep(0.02)
    else:
        time.sleep(2)
    early.send_signal(signal.SIGTERM)  # while TensorFlow is imported, or soon after
    for process in (once, twice):
        while not process.stdout.readline().startswith("    1"):
            pass
    once.send_signal(signal.SIGTERM)
    twice.send_signal(signal.SIGINT)
    time.sleep(0.2)
    twice.send_signal(signal.SIGINT)
    for process, name in ((early, "early"), (once, "once"), (twice, "twice")):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, ""), name
        assert ("--resume" in out) == (name == "once"), out
        assert half_written(tmp_path / name) == []
    assert files_in(tmp_path / "early") == []
    assert "samples/training.gif" in files_in(tmp_path / "once")


# ----- Damaged states


@pytest.fixture(scope="module")
def a_state():
    """The state of a tiny network, and what is saved beside it."""
    settings = gan_mnist.Settings(**SMALL)
    facts = {"settings": gan_mnist.dataclasses.asdict(settings), "history": [{"epoch": 1}]}
    return gan_mnist.new_state(settings, DATA), facts | {"data": gan_mnist.fingerprint(DATA)}


@pytest.fixture
def states(a_state, tmp_path):
    """A folder with the states after steps 5, 10 and 15."""
    for step in (1, 2, 5, 10, 15):
        a_state[0].step.assign(step)
        gan_mnist.save_state(a_state[0], tmp_path / "state", a_state[1])
    return tmp_path / "state"


def flip(path):
    path.write_bytes(bytes([*path.read_bytes()[:-9], 7, *path.read_bytes()[-8:]]))


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "state.data-00000-of-00001", 1000),
    "a flipped byte": lambda folder: flip(folder / "state.data-00000-of-00001"),
    "a flipped setting": lambda folder: flip(folder / "run.json"),
    "an empty file": lambda folder: (folder / "state.index").write_bytes(b""),
    "a missing file": lambda folder: (folder / "state.index").unlink(),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty checksums": lambda folder: (folder / "SHA256SUMS").write_bytes(b""),
    "binary checksums": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\xfe"),
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def test_the_newest_three_states_are_kept(states):
    names = ["step_000000005", "step_000000010", "step_000000015"]
    assert sorted(os.listdir(states)) == names


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_said_in_one_line_and_the_one_before_is_used(
    damage, states, a_state, capsys
):
    state, facts = a_state
    DAMAGES[damage](states / "step_000000015")
    state.step.assign(99)
    assert gan_mnist.restore_state(state, states, facts) == facts["history"]
    assert int(state.step.numpy()) == 10
    (line,) = capsys.readouterr().out.splitlines()
    assert "step_000000015" in line and "damaged" in line
    state.step.assign(12)
    gan_mnist.save_state(state, states, facts)
    names = ["step_000000005", "step_000000010", "step_000000012"]
    assert sorted(os.listdir(states)) == names, "the damaged one would be in the way"


def test_when_all_states_are_damaged_the_run_fails_and_nothing_changes(states, a_state):
    for folder, damage in zip(states.iterdir(), DAMAGES.values()):
        damage(folder)
    before = contents(states)
    with pytest.raises(gan_mnist.RunError, match="state"):
        gan_mnist.restore_state(*a_state[:1], states, a_state[1])
    assert contents(states) == before


def test_a_state_of_another_version_is_refused_in_one_line(states, a_state):
    other = gan_mnist.new_state(gan_mnist.Settings(**SMALL | {"conditional": False}), DATA)
    with pytest.raises(gan_mnist.RunError, match="another version"):
        gan_mnist.restore_state(other, states, a_state[1])


def test_what_cannot_change_on_resume_is_named_and_what_can_is_taken(states, a_state):
    state, facts = a_state
    changes = {"epochs": 7, "max_minutes": 3.0, "checkpoint_every": 9, "dataset": "moved.npz"}
    may = facts | {"settings": facts["settings"] | changes}
    assert gan_mnist.restore_state(state, states, may)
    changes = {"seed": 5, "generator_widths": (9,), "loss": "hinge"}
    other = DATA._replace(images=DATA.images // 2)
    other = {"settings": facts["settings"] | changes, "data": gan_mnist.fingerprint(other)}
    with pytest.raises(gan_mnist.UsageError) as refusal:
        gan_mnist.restore_state(state, states, other)
    for words in (
        "seed was 0, is 5",
        "generator_widths was [8], is [9]",
        "loss was",
        "dataset was",
    ):
        assert words in str(refusal.value)
    assert "epochs" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_labels_count_as_data():
    other = DATA._replace(labels=LABELS[::-1])
    assert gan_mnist.fingerprint(other) != gan_mnist.fingerprint(DATA)
    assert gan_mnist.fingerprint(DATA._replace(name="x")) == gan_mnist.fingerprint(DATA)


# ----- Starting afresh


def test_starting_afresh_moves_an_earlier_run_and_says_how_to_go_on_with_it(
    quick, tmp_path, capsys
):
    settings = settings_in(tmp_path, epochs=2, seed=3)
    gan_mnist.train(DATA, settings=settings)
    before = contents(tmp_path)
    capsys.readouterr()
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    previous = tmp_path / "made" / "previous"
    moved = {re.sub("^(samples|made)/", "", name): data for name, data in before.items()}
    assert contents(previous) == moved
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "--resume" in line]
    _, again, options = gan_mnist.parse_command_line(line.split()[2:])
    assert "resume" in options and str(previous) in line and "--seed 3" in line
    gan_mnist.train(DATA, settings=gan_mnist.dataclasses.replace(again, epochs=3), resume=True)
    assert (previous / "image_at_epoch_0003.png").exists()


def test_a_start_killed_while_it_moved_files_loses_none(quick, tmp_path, monkeypatch):
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=2))
    before = contents(tmp_path)
    move, calls = shutil.move, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        move(*arguments)

    monkeypatch.setattr(shutil, "move", dying)
    with pytest.raises(KeyboardInterrupt):
        gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    moved = {re.sub("^(samples|made)/", "", name): data for name, data in before.items()}
    assert contents(tmp_path / "made" / "previous") == moved


# ----- Two runs in one folder

HOLDER = """
import pathlib, sys, time, gan_mnist
with gan_mnist.alone_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(quick, tmp_path):
    for name in ("samples", "made"):
        first = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / name)],
            env=environment(PYTHONPATH=ROOT),
            stdout=subprocess.PIPE,
        )
        assert first.stdout.readline() == b"held\n"
        before = contents(tmp_path)
        with pytest.raises(gan_mnist.UsageError, match=rf"\b{first.pid}\b"):
            gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
        assert contents(tmp_path) == before
        first.kill()
        first.communicate()
        assert (tmp_path / name / "lock").read_text() == str(first.pid)  # stale now
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    assert half_written(tmp_path) == []


# ----- Full disks


class Disk:
    """Lets os.fsync fail as a full disk does, between two moments counted in calls."""

    def __init__(self, monkeypatch):
        self.calls, self.full = 0, range(0)
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.calls += 1
        if self.calls in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fsync(descriptor)


def test_a_disk_that_is_full_for_a_while_costs_a_line_and_nothing_else(
    quick, tmp_path, monkeypatch, capsys
):
    gan_mnist.train(DATA, settings=settings_in(tmp_path / "whole", epochs=2))
    monkeypatch.setattr(gan_mnist, "PATIENCE", 60)  # the machine may be busy
    disk = Disk(monkeypatch)
    disk.full = range(10, 12)
    capsys.readouterr()
    gan_mnist.train(DATA, settings=settings_in(tmp_path / "full", epochs=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "annot write" in line]
    assert len(lines) == 1 and "No space left" in lines[0]
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")
    assert half_written(tmp_path) == []


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_last_good_state(
    epoch, quick, tmp_path, monkeypatch
):
    gan_mnist.train(DATA, settings=settings_in(tmp_path / "whole", epochs=3))
    disk = Disk(monkeypatch)
    disk.full = range(1 + 12 * epoch, 10**9)
    with pytest.raises(gan_mnist.RunError, match="No space left on device") as failure:
        gan_mnist.train(DATA, settings=settings_in(tmp_path / "full", epochs=3))
    assert "\n" not in str(failure.value) and half_written(tmp_path) == []
    disk.full = range(0)
    resume = any((tmp_path / "full" / "made" / "state").glob("step_*"))
    assert resume == (epoch > 0)
    gan_mnist.train(DATA, settings=settings_in(tmp_path / "full", epochs=3), resume=resume)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


def test_pictures_that_cannot_be_written_cost_no_training(quick, tmp_path, monkeypatch):
    save_grid = gan_mnist.save_grid

    def failing(path, *others):
        if "0002" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        save_grid(path, *others)

    gan_mnist.train(DATA, settings=settings_in(tmp_path / "whole", epochs=3))
    monkeypatch.setattr(gan_mnist, "save_grid", failing)
    with pytest.raises(gan_mnist.RunError, match="Permission denied.*0002.png"):
        gan_mnist.train(DATA, settings=settings_in(tmp_path / "full", epochs=3))
    states = tmp_path / "full" / "made" / "state"
    assert gan_mnist.newest_state(states).name == "step_000000010"
    monkeypatch.setattr(gan_mnist, "save_grid", save_grid)
    gan_mnist.train(DATA, settings=settings_in(tmp_path / "full", epochs=3), resume=True)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


FILLER = """
import os, pathlib, keras, gan_mnist
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(50_000)])
for free in (0, 1, 4, 8, 12, 16, 20, 30):
    disk = os.statvfs(".")
    pathlib.Path("filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 4096 * free))
    try:
        gan_mnist.save_keras(model, "model.h5")
    except OSError as error:
        print(error.strerror)
    os.remove("filler")
"""


def test_a_really_full_disk_ends_a_run_in_one_line(tiny_flags, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        filled = run_code(FILLER, cwd=disk)
        assert filled.out.splitlines() == 8 * ["No space left on device"], filled
        assert files_in(disk) == []
        code = "import sys, gan_mnist; gan_mnist.PATIENCE = 1; sys.exit(gan_mnist.main())"
        done = run_code(code, *tiny_flags, "--epochs", "50", cwd=disk)
        assert done.status == 1, done
        (line,) = done.err.splitlines()
        assert "No space left on device" in line
        assert gan_mnist.newest_state(disk / "checkpoints" / "state")
        for path in (disk / "checkpoints").glob("*.h5"):
            gan_mnist.load_generator(path)
        assert half_written(disk) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_folders_that_vanish_during_a_run_come_back(quick, tmp_path, monkeypatch):
    save_state, calls = gan_mnist.save_state, []

    def vanishing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            shutil.rmtree(tmp_path)
        save_state(*arguments)

    monkeypatch.setattr(gan_mnist, "save_state", vanishing)
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=3))
    names = files_in(tmp_path)
    assert {"made/generator_latest.h5", "samples/metrics.csv", "samples/training.gif"} <= set(names)
    assert len((tmp_path / "samples" / "metrics.csv").read_text().splitlines()) == 4


# ----- Numbers that go bad


def spoiling(monkeypatch, spoil, call):
    """Let spoil(state) run after so many compiled calls."""
    compile_training, calls = gan_mnist.compile_training, []

    def compiled(state, *others):
        steps = compile_training(state, *others)

        def train(*arguments):
            steps(*arguments)
            calls.append(arguments)
            if len(calls) == call:
                spoil(state)

        return train

    monkeypatch.setattr(gan_mnist, "compile_training", compiled)


SPOILS = {
    "a loss": lambda state: state.losses.assign([float("nan"), 0]),
    "a weight": lambda state: state.discriminator.weights[0].assign(
        state.discriminator.weights[0] * float("inf")
    ),
    "a moment": lambda state: state.generator_optimizer.variables[-1].assign(
        state.generator_optimizer.variables[-1] * float("nan")
    ),
}


@pytest.mark.parametrize("spoilt", SPOILS)
def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(
    spoilt, quick, tmp_path, monkeypatch
):
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    before = outcome(tmp_path)
    spoiling(monkeypatch, SPOILS[spoilt], 1)
    with pytest.raises(gan_mnist.RunError, match="not finite after step 10.*lower") as failure:
        gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=3), resume=True)
    assert "\n" not in str(failure.value)
    assert outcome(tmp_path) == before
    assert gan_mnist.newest_state(tmp_path / "made" / "state").name == "step_000000005"


def test_a_collapse_is_said_in_its_row_and_at_the_end_and_training_goes_on(quick, tmp_path, capsys):
    quick += [(10, 5.0), (4, 6.0), (None, 49.0), (10, 51.0), (5, 4.0)]
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=5))
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.strip()[:1].isdigit()]
    assert ["COLLAPSED" in line for line in table] == [False, True, False, True, False]
    assert all(len(line) < 80 for line in table)
    assert any("epoch 2, 4" in line for line in lines)


# ----- A long session


@pytest.mark.slow
def test_over_200_epochs_memory_files_and_threads_stay_flat(tmp_path):
    code = """
import json, os, resource, threading, numpy as np, gan_mnist
seen = []
write = gan_mnist._write_epoch
def watched(run):
    write(run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = len(os.listdir("/proc/self/task"))
    seen.append((peak, len(os.listdir("/proc/self/fd")), threads))
gan_mnist._write_epoch = watched
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


def test_a_state_is_saved_in_less_than_a_second(tmp_path):
    settings = gan_mnist.Settings()
    state = gan_mnist.new_state(settings, DATA)
    seconds = []
    for step in range(3):
        state.step.assign(step)
        start = time.perf_counter()
        gan_mnist.save_state(state, tmp_path / "state", {})
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_resume_with_nothing_to_resume_writes_nothing(tmp_path):
    result = run("--resume", "--dataset", ROOT / "tests", cwd=tmp_path)
    assert result.status == 2 and files_in(tmp_path) == []


def test_a_start_that_had_no_epoch_does_not_push_out_the_run_before_it(
    quick, tmp_path, monkeypatch
):
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=2))
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))  # the first is previous/ now
    kept = contents(tmp_path / "made" / "previous")
    shutil.rmtree(tmp_path / "samples")
    for path in (tmp_path / "made").glob("*.h5"):  # as if stopped before its first epoch's end
        path.unlink()
    gan_mnist.train(DATA, settings=settings_in(tmp_path, epochs=1))
    assert contents(tmp_path / "made" / "previous") == kept
