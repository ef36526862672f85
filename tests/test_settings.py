"""Settings: one block of constants, each of them a flag and a field; bad values cost one line."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
import time

import pytest
from conftest import ROOT, files_in, run, run_batch, run_code

import gan_mnist

NAMES = (
    *("EPOCHS", "MAX_MINUTES", "BATCH_SIZE", "SEED", "DATASET", "IMAGE_SIZE"),
    *("IMAGE_COLOUR", "ARCHITECTURE", "CONDITIONAL"),
    *("LATENT_DIM", "GENERATOR_WIDTHS", "DISCRIMINATOR_WIDTHS", "LOSS", "R1", "R2"),
    *("GENERATOR_LEARNING_RATE", "DISCRIMINATOR_LEARNING_RATE", "BETA_1", "BETA_2"),
    *("EMA_DECAY", "PRECISION", "INCEPTION", "EVALUATION_IMAGES", "EVALUATE_EVERY"),
    *("SAMPLE_EVERY", "CHECKPOINT_EVERY", "SAMPLES_DIR", "CHECKPOINTS_DIR"),
)
SOURCE = (ROOT / "gan_mnist.py").read_text(encoding="utf-8")
BAD_VALUES = {  # flag: values, and a word that says what is allowed
    "epochs": (["0", "-3", "1.5", "many", "", "nan"], "number"),
    "max-minutes": (["-1", "inf", "nan", "soon"], "number"),
    "batch-size": (["0", "-1", "1e9"], "number"),
    "seed": (["-1", "x"], "number"),
    "image-size": (["-1", "x", "9999"], "number"),
    "image-colour": (["sepia"], "grey"),
    "architecture": (["transformer"], "dense"),
    "conditional": (["maybe", "2"], "true"),
    "latent-dim": (["0"], "number"),
    "generator-widths": (["", "0", "128,,256", "a,b", "-128,256"], "whole"),
    "discriminator-widths": (["128,-1"], "whole"),
    "loss": (["cross_entropy", ""], "wasserstein"),
    "r1": (["-0.1", "-1e-3"], "number"),
    "r2": (["x"], "number"),
    "generator-learning-rate": (["fast", "-1e-3", "nan"], "number"),
    "discriminator-learning-rate": (["inf"], "number"),
    "beta-1": (["1", "-0.5"], "number"),
    "beta-2": (["1.5"], "number"),
    "ema-decay": (["1", "2"], "number"),
    "precision": (["float8"], "float32"),
    "inception": (["vgg"], "mnist"),
    "evaluation-images": (["0", "-5"], "number"),
    "evaluate-every": (["0"], "number"),
    "sample-every": (["0"], "number"),
    "checkpoint-every": (["-1"], "number"),
}
BAD_USAGE = {  # arguments, and words that the one line must have
    "unknown flag": (["--epoch", "3"], ["--epoch"]),
    "unknown command": (["fly"], ["fly", "generate"]),
    "flag without a value": (["--epochs"], ["--epochs"]),
    "count with train": (["train", "--count", "5"], ["--count", "generate"]),
    "json with generate": (["generate", "--json"], ["--json", "evaluate"]),
    "resume with evaluate": (["evaluate", "--resume"], ["--resume", "train"]),
    "digits with evaluate": (["evaluate", "--digits", "3"], ["--digits", "generate"]),
    "no images": (["generate", "--count", "0"], ["--count", "0"]),
    "negative count": (["evaluate", "--count", "-1"], ["--count", "-1"]),
    "count that is no number": (["generate", "--count", "ten"], ["--count", "ten"]),
    "unknown data set": (["--dataset", "mnits"], ["--dataset", "mnits", "mnist"]),
    "no such path": (["--dataset", "nowhere/x.npz"], ["--dataset", "nowhere/x.npz"]),
}


def constants():
    """Return the settings block as {NAME: line}: what is assigned above the first import."""
    lines = SOURCE.splitlines()
    block = {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return block
        if isinstance(node, ast.Assign):
            block[node.targets[0].id] = lines[node.end_lineno - 1]
    raise AssertionError("no import in gan_mnist.py")


def words(text):
    """Return the text without its punctuation and line breaks."""
    return " ".join(re.findall(r"\w+", text))


def main_without_tensorflow(arguments, folder, monkeypatch, capsys):
    """Run the command line in this process, where importing TensorFlow or Keras fails the test."""
    monkeypatch.chdir(folder)
    for name in ("tensorflow", "keras"):
        monkeypatch.setitem(sys.modules, name, None)
    status = gan_mnist.main(arguments)
    return status, capsys.readouterr().err.splitlines()


def best_seconds(*arguments, cwd, status):
    """Return the shortest of some runs: the machine may be busy with other things."""
    shortest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        result = run(*arguments, cwd=cwd)
        shortest = min(shortest, time.perf_counter() - start)
        assert result.status == status, result
        if shortest < 0.5:
            break
    return shortest


def test_every_setting_has_its_name_and_a_trailing_comment():
    block = constants()
    assert not set(NAMES) - set(block)
    for name, line in block.items():
        assert name.isupper() and re.search(r"  # \S.{2,}", line), line


def test_every_constant_is_a_flag_with_its_comment_as_help(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.status == 0 and result.err == ""
    shown = words(result.out)
    for name, line in constants().items():
        assert f"--{name.lower().replace('_', '-')} " in result.out
        assert words(line.split("  # ", 1)[1]) in shown, line


def test_every_constant_is_a_field_of_settings_with_the_constant_as_default():
    fields = dataclasses.asdict(gan_mnist.Settings())
    assert fields == {name.lower(): getattr(gan_mnist, name) for name in constants()}


def test_every_constant_can_be_given_to_settings():
    for name, value in dataclasses.asdict(gan_mnist.Settings()).items():
        assert getattr(gan_mnist.Settings(**{name: value}), name) == value


def test_settings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gan_mnist.Settings().epochs = 3


def test_settings_refuse_bad_values_from_a_notebook_too():
    for name, value in (("epochs", 0), ("loss", "x"), ("generator_widths", ()), ("r1", -1.0)):
        with pytest.raises(gan_mnist.UsageError, match=name.replace("_", "-")):
            gan_mnist.Settings(**{name: value})


def test_no_function_reads_a_settings_constant():
    names = set(constants())
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            assert not used & names, f"{node.name} reads {used & names}"


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_bad_value_gets_one_line_with_flag_value_and_what_is_allowed(
    flag, tmp_path, monkeypatch, capsys
):
    values, allowed = BAD_VALUES[flag]
    for value in values:
        status, lines = main_without_tensorflow([f"--{flag}", value], tmp_path, monkeypatch, capsys)
        assert status == 2 and len(lines) == 1, lines
        line = lines[0].replace(", ", ",")
        assert f"--{flag}" in line and value in line and allowed in line, line
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_refused_before_tensorflow_is_imported(case, tmp_path, monkeypatch, capsys):
    arguments, named = BAD_USAGE[case]
    status, lines = main_without_tensorflow(arguments, tmp_path, monkeypatch, capsys)
    assert status == 2 and len(lines) == 1, lines
    assert all(word in lines[0] for word in named), lines
    assert files_in(tmp_path) == []


def test_what_only_a_look_at_the_files_shows_is_refused_with_nothing_written(tmp_path, digits_npz):
    cases = {
        "more than there are": ["--dataset", digits_npz, "--batch-size", "5000"],
        "nothing to resume": ["train", "--resume", "--dataset", digits_npz],
        "not an .npz": ["--dataset", ROOT / "requirements.txt"],
        "a folder": ["--dataset", ROOT],
    }
    folders = [tmp_path / name for name in cases]
    for folder in folders:
        folder.mkdir()
    results = run_batch(zip(cases.values(), folders, strict=True), tmp_path / "scratch")
    for folder, result in zip(folders, results, strict=True):
        assert result.refuses(), (folder.name, result)
        assert files_in(folder) == [], folder.name


def test_help_answers_in_under_half_a_second(tmp_path):
    assert best_seconds("--help", cwd=tmp_path, status=0) < 0.5


def test_a_rejected_setting_answers_in_under_half_a_second(tmp_path):
    assert best_seconds("--batch-size", "0", cwd=tmp_path, status=2) < 0.5
    assert files_in(tmp_path) == []


def test_a_rejected_setting_prints_one_line_and_nothing_else(tmp_path):
    result = run("--batch-size", "0", cwd=tmp_path)
    assert result.refuses("--batch-size", "0", "number") and result.out == ""


def test_importing_prints_nothing_and_does_not_import_tensorflow(tmp_path):
    code = "import sys, gan_mnist; sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    assert run_code(code, cwd=tmp_path) == (0, "", "")
    assert files_in(tmp_path) == []


# ----- Constants as a person may edit them


def edited(folder, line, name="EPOCHS"):
    """Return the program imported from a copy in which the constant's line is another."""
    copy = folder / "edited_gan_mnist.py"
    copy.write_text(SOURCE.replace(constants()[name], line, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_gan_mnist", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_value(name, value):
    """Return the constant's line with another value and its own comment."""
    return f"{name} = {value}  # {constants()[name].split('  # ', 1)[1]}"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("EPOCHS", '"7"', 7),
        ("R1", "0", 0.0),
        ("CONDITIONAL", '"False"', False),
        ("GENERATOR_WIDTHS", "[64, 128]", (64, 128)),
        ("GENERATOR_WIDTHS", "64", (64,)),
        ("GENERATOR_WIDTHS", '"64,128"', (64, 128)),
        ("SAMPLES_DIR", '"my#pictures"', "my#pictures"),
    ],
)
def test_an_edited_constant_means_what_its_flag_would(name, value, meant, tmp_path):
    read = getattr(edited(tmp_path, with_value(name, value), name).Settings(), name.lower())
    assert read == meant and type(read) is type(meant)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EPOCHS", "0"),
        ("EPOCHS", "1.5"),
        ("LOSS", '"wgan"'),
        ("GENERATOR_WIDTHS", "()"),
        ("SEED", "None"),
        ("CONDITIONAL", "0"),
        ("DATASET", '"nowhere"'),
        ("DATASET", '""'),
    ],
)
def test_a_constant_edited_to_what_cannot_be_costs_one_line_and_no_traceback(
    name, value, tmp_path, capsys
):
    program = edited(tmp_path, with_value(name, value), name)
    assert program.main(["generate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{name.lower().replace('_', '-')}" in line and value.strip('"') in line


@pytest.mark.parametrize("line", ["EPOCHS = 5 # [1..9]", "EPOCHS: int = 5  # fewer [1..9]"])
def test_a_constants_comment_may_be_edited(line, tmp_path):
    program = edited(tmp_path, line)
    assert program.Settings().epochs == 5
    with pytest.raises(program.UsageError, match=r"1\.\.9"):
        program.Settings(epochs=10)


def test_a_constant_that_lost_its_comment_is_named(tmp_path, capsys):
    assert edited(tmp_path, "EPOCHS = 5").main(["generate"]) == 2
    assert "EPOCHS" in capsys.readouterr().err


def test_the_line_to_type_has_what_differs_as_a_person_types_it():
    flags = ["--conditional", "false", "--generator-widths", "8,16", "--samples-dir", "my pictures"]
    settings = dataclasses.asdict(gan_mnist.parse_command_line(flags)[1])
    line = gan_mnist.line_to_type("train --resume", settings)
    assert sorted(shlex.split(line)) == sorted(
        ["python", "gan_mnist.py", "train", "--resume", *flags]
    )
