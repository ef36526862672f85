"""Settings: one block of constants, each of them a flag and a field; bad values cost one line."""

import ast
import dataclasses
import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, files_in, result_of, run, run_code

import gan_mnist

NAMES = """
    EPOCHS MAX_MINUTES BATCH_SIZE SEED DATASET IMAGE_SIZE IMAGE_COLOUR ARCHITECTURE CONDITIONAL
    LATENT_DIM GENERATOR_WIDTHS DISCRIMINATOR_WIDTHS CONV_CHANNELS LOSS R1 R2 GRADIENT_PENALTY
    SHIFT MINIBATCH_STD GENERATOR_LEARNING_RATE DISCRIMINATOR_LEARNING_RATE DECAY_FROM BETA_1
    BETA_2 EMA_DECAY PRECISION INCEPTION EVALUATION_IMAGES EVALUATE_EVERY SAMPLE_EVERY
    CHECKPOINT_EVERY SAMPLES_DIR CHECKPOINTS_DIR
""".split()
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
    "unknown flag": (["--epoks", "3"], ["--epoks"]),
    "a beginning of two flags": (["--beta", "0.5"], ["--beta-1", "--beta-2"]),
    "unknown command": (["generat"], ["'generat'", "'generate'"]),
    "flag without a value": (["--epochs"], ["--epochs"]),
    "count with train": (["train", "--count", "5"], ["--count"]),
    "json with generate": (["generate", "--json"], ["--json"]),
    "resume with evaluate": (["evaluate", "--resume"], ["--resume"]),
    "digits with evaluate": (["evaluate", "--digits", "3"], ["--digits"]),
    "epochs with generate": (["generate", "--epochs", "3"], ["--epochs"]),
    "no images": (["generate", "--count", "0"], ["--count", "0"]),
    "negative count": (["evaluate", "--count", "-1"], ["--count", "-1"]),
    "count that is no number": (["generate", "--count", "ten"], ["--count", "ten"]),
    "mistyped loss": (["--loss", "hing"], ["--loss", "hing", "hinge"]),
    "mistyped data set": (["--dataset", "mnits"], ["--dataset", "mnits", "mnist"]),
    "no such path": (["--dataset", "nowhere/x.npz"], ["--dataset", "nowhere/x.npz", ".npz"]),
    "a list as two words": (["--generator-widths", "256", "512"], ["512"]),
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


def refusal(arguments):
    """Return the line that refuses a command line."""
    with pytest.raises(gan_mnist.UsageError) as error:
        gan_mnist.parse_command_line(arguments)
    (line,) = str(error.value).splitlines()
    return line


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


def test_every_constant_is_a_flag_with_its_comment_and_default_in_the_help(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.status == 0 and result.err == ""
    shown = words(result.out)
    for name, line in constants().items():
        flag = f"--{name.lower().replace('_', '-')} VALUE"
        assert re.search(rf"^ +{flag}$|^ +{flag} ", result.out, re.MULTILINE), name
        assert words(line.split("  # ", 1)[1]) in shown, line
    assert "[256,256]" in result.out and "[relativistic]" in result.out


def test_each_command_has_a_help_of_what_it_takes(capsys):
    flags = {"generate": ["--digits", "--output"], "evaluate": ["--images", "--json"]}
    for command, own in flags.items():
        with pytest.raises(SystemExit, match="0"):
            gan_mnist.parse_command_line([command, "--help"])
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in [*own, "--checkpoint", "--count", "--seed"])
        assert "--epochs" not in shown


def test_every_constant_is_a_field_of_settings_with_the_constant_as_default():
    fields = {name: str(x) for name, x in dataclasses.asdict(gan_mnist.Settings()).items()}
    assert fields == {name.lower(): str(getattr(gan_mnist, name)) for name in constants()}


def test_every_constant_can_be_given_to_settings():
    for name, value in dataclasses.asdict(gan_mnist.Settings()).items():
        assert getattr(gan_mnist.Settings(**{name: value}), name) == value


def test_settings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gan_mnist.Settings().epochs = 3


def test_settings_name_a_bad_value_by_constant_line_and_flag():
    for name, value in (("epochs", 0), ("loss", "x"), ("generator_widths", ()), ("r1", -1.0)):
        number = 1 + SOURCE.splitlines().index(constants()[name.upper()])
        named = rf"^{name.upper()} in line {number} or --{name.replace('_', '-')} is .*must be"
        with pytest.raises(gan_mnist.UsageError, match=named):
            gan_mnist.Settings(**{name: value})


def test_no_function_reads_a_settings_constant():
    names = set(constants())
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            assert not used & names, f"{node.name} reads {used & names}"


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_a_bad_value_gets_one_line_with_flag_value_and_what_is_allowed(flag):
    values, allowed = BAD_VALUES[flag]
    for value in values:
        line = refusal([f"--{flag}={value}"]).replace(", ", ",")
        assert f"--{flag}" in line and value in line and allowed in line, line


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_gets_one_line_that_names_it_and_what_was_meant(case):
    arguments, named = BAD_USAGE[case]
    line = refusal(arguments)
    assert all(word in line for word in named), line


def test_help_answers_in_under_half_a_second(tmp_path):
    assert best_seconds("--help", cwd=tmp_path, status=0) < 0.5


def test_a_rejected_setting_answers_in_under_half_a_second_and_prints_one_line(tmp_path):
    assert best_seconds("--batch-size", "0", cwd=tmp_path, status=2) < 0.5
    result = run("--batch-size", "0", cwd=tmp_path)
    assert result.refuses("--batch-size", "0", "number") and result.out == ""
    assert files_in(tmp_path) == []


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    code = "import gan_mnist; gan_mnist.Settings()"
    assert run_code(code, cwd=tmp_path) == (0, "", "")
    assert files_in(tmp_path) == []


# ----- Constants as a person may edit them


def edited(folder, **lines):
    """Write a copy of the program in which the named constants' lines are others; return its path.

    TOP stands above the block.
    """
    source = SOURCE
    for name, line in lines.items():
        before = "# The run\n" if name == "TOP" else constants()[name]
        source = source.replace(before, line + "\n" + before if name == "TOP" else line, 1)
    copy = folder / "edited.py"
    copy.write_text(source, encoding="utf-8")
    return copy


def imported(path):
    """Return the program imported from the path."""
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "line", "meant"),
    [
        ("EPOCHS", 'EPOCHS = "7"', 7),
        ("EPOCHS", "EPOCHS = 5", 5),
        ("EPOCHS", "EPOCHS = 5 # [1..9]", 5),
        ("EPOCHS", "EPOCHS: int = 5  # fewer: 100 %", 5),
        ("EPOCHS", "import os\nEPOCHS = 5 * len(os.sep)", 5),
        ("R1", "R1 = 0", 0.0),
        ("CONDITIONAL", 'CONDITIONAL = "False"', False),
        ("GENERATOR_WIDTHS", "GENERATOR_WIDTHS = [64, 128]", (64, 128)),
        ("GENERATOR_WIDTHS", "GENERATOR_WIDTHS = 64", (64,)),
        ("GENERATOR_WIDTHS", 'GENERATOR_WIDTHS = "64,128"', (64, 128)),
        ("GENERATOR_WIDTHS", "GENERATOR_WIDTHS = (\n    64,  # few\n    128,\n)", (64, 128)),
        ("SAMPLES_DIR", 'SAMPLES_DIR = "my#pictures"', Path("my#pictures")),
    ],
)
def test_an_edited_constant_means_what_its_flag_would(name, line, meant, tmp_path, capsys):
    program = imported(edited(tmp_path, **{name: line}))
    _, settings, _ = program.parse_command_line([])
    read = getattr(settings, name.lower())
    assert read == meant and type(read) is type(meant)
    with pytest.raises(SystemExit, match="0"):
        program.parse_command_line(["--help"])
    assert f"[{program.as_text(getattr(program, name))}]" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_edited_all_over_trains(tmp_path, digits_npz):
    copy = edited(
        tmp_path,
        TOP="import math  # by a formatter\n\nMY_RATE = 3e-4",
        EPOCHS="EPOCHS = 1",
        BATCH_SIZE="# BATCH_SIZE = 256\nBATCH_SIZE = 500",
        DATASET=f"DATASET = {str(digits_npz)!r}",
        GENERATOR_WIDTHS="GENERATOR_WIDTHS = (\n    16,\n    24,\n)",
        R1="R1 = R2 = 0",
        R2="",
        GENERATOR_LEARNING_RATE="GENERATOR_LEARNING_RATE = MY_RATE * math.e",
        INCEPTION='INCEPTION = "mnist"  # mine',
        EVALUATION_IMAGES="EVALUATION_IMAGES = 100",
    )
    # Where weights/ stands beside it:
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    result = result_of([sys.executable, str(copy)], tmp_path, {})
    assert (result.status, result.err) == (0, "")
    assert "1/1" in result.out and (tmp_path / "samples" / "metrics.png").exists()


BAD_EDITS = [  # name, its line, and words that the one line must have
    ("EPOCHS", "EPOCHS = 0", ["is '0'", "whole number"]),
    ("EPOCHS", "EPOCHS = 1.5  # more", ["is '1.5'", "whole number"]),
    ("SHIFT", "SHIFT = None", ["'None'", "whole number"]),
    ("LOSS", 'LOSS = "hing"', ["'hing'", "hinge"]),
    ("GENERATOR_WIDTHS", "GENERATOR_WIDTHS = ()", ["is ''", "256,512"]),
    ("GENERATOR_WIDTHS", "GENERATOR_WIDTHS = (\n    0,\n)", ["is '0'", "256,512"]),
    ("CONDITIONAL", "CONDITIONAL = 0", ["is '0'", "true or false"]),
    ("DATASET", 'DATASET = "nowhere"', ["'nowhere'", "mnist"]),
    ("DATASET", 'DATASET = ""', ["''", "mnist"]),
    ("EPOCHS", "# EPOCHS = 80", ["line 0", "whole number"]),
    ("BATCH_SIZE", "", ["line 0", "whole number"]),
]


@pytest.mark.parametrize(("name", "line", "named"), BAD_EDITS)
def test_a_bad_edit_is_told_by_constant_and_line(name, line, named, tmp_path):
    copy = edited(tmp_path, **{name: line})
    program = imported(copy)
    for arguments in ([], ["generate"]):
        with pytest.raises(program.UsageError, match=rf"\b{name}\b") as error:
            program.parse_command_line(arguments)
        told = str(error.value)
        assert all(word in told for word in named), told
        assert len(told.splitlines()) == 1
        if "line 0" not in named:
            number = 1 + copy.read_text().splitlines().index(line.splitlines()[0])
            assert f"line {number}" in told


def test_a_bad_edit_ends_the_command_with_status_2_before_anything_is_written(tmp_path):
    copy = edited(tmp_path, LOSS='LOSS = "hing"')
    result = result_of([sys.executable, str(copy)], tmp_path, {})
    assert result.refuses("LOSS", "hinge") and result.out == ""
    assert files_in(tmp_path) == ["edited.py"]
