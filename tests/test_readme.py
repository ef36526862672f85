"""What the README shows works as it stands there."""

import contextlib
import io
import itertools
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import npz_bytes, synthetic_digits

import gan_mnist

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
# Each command in a code block or between backquotes, without the comment behind it.
COMMAND = re.compile(r"python gan_mnist\.py((?: [^`\n|#]*)?)")
SMALL = {
    "epochs": 1,
    "batch_size": 100,
    "latent_dim": 8,
    "generator_widths": (16,),
    "discriminator_widths": (16,),
    "evaluation_images": 100,
    "inception": "mnist",
}


def sections():
    """Return the text under each heading, by heading."""
    parts = re.split(r"^#+ (.+)\n", README, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.split()) <= 1300


def test_every_command_in_the_readme_is_one_that_the_program_takes(tmp_path, monkeypatch):
    lines = {line.strip() for line in COMMAND.findall(README)}
    assert "" in lines and len(lines) >= 6
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)
        for flag, value in itertools.pairwise(words):
            if flag == "--dataset" and not os.path.exists(value):
                Path(value).mkdir()  # as a reader's own pictures would be there
        gan_mnist.parse_command_line(words)  # raises UsageError otherwise


def test_the_readme_of_the_weights_says_how_each_file_was_made():
    said = (gan_mnist.WEIGHTS / "README.md").read_text("utf-8")
    files = {path.name for path in gan_mnist.WEIGHTS.iterdir()} - {"README.md"}
    assert files and {name for name in re.findall(r"`(mnist_\w+\.\w+)`", said)} == files


def notebook_code():
    """Return the Python code that stands under the heading about notebooks."""
    (text,) = [text for heading, text in sections().items() if "notebook" in heading.lower()]
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    blocks += ["\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE))]
    return "\n".join(block for block in blocks if "gan_mnist" in block)


@pytest.mark.slow
def test_the_notebook_example_runs(tmp_path, monkeypatch, mnist):
    lines = notebook_code().splitlines()
    assert any("train(" in line for line in lines)
    # Not what a notebook does with a shell: %pip, !wget, %matplotlib; and nothing to look at.
    code = "\n".join(line for line in lines if not re.match(r"\s*[%!]", line))
    for name, value in SMALL.items():  # tiny networks, and an epoch where the README has more
        monkeypatch.setattr(gan_mnist, name.upper(), value)
    images = synthetic_digits(300)[0]
    monkeypatch.setattr(gan_mnist, "load_mnist", lambda: [x[:300] for x in mnist])
    code = re.sub(r"epochs=\d+", "epochs=1", code)
    code = re.sub(r"(\btrain\(\w+, )\d+", r"\g<1>1", code)
    monkeypatch.chdir(tmp_path)
    Path("my_pictures.npz").write_bytes(npz_bytes({"images": images}))
    names = {"my_images": images, "my_labels": np.arange(300, dtype=np.uint8) % 10}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)  # noqa: S102 (the README is ours)
    assert Path("samples", "metrics.png").exists()
    drawn = [x for x in names.values() if isinstance(x, np.ndarray) and x.ndim == 4]
    assert any(x.dtype == np.uint8 and x.shape[3] in (1, 3) for x in drawn)
    if "evaluate_images(" in code:
        assert names["metrics"]["fid"] > 1
