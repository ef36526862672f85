"""What the README shows works as it stands there."""

import contextlib
import io
import re
import textwrap
from pathlib import Path

import numpy as np
from conftest import synthetic_digits

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_notebook_example_runs(tmp_path, monkeypatch):
    code = textwrap.dedent(re.search(r"## In a notebook\n\n(( {4}.+\n)+)", README)[1])
    assert code.count("epochs=5") == code.count("my_images, 20") == 1
    # Fewer epochs: a minute less.
    code = code.replace("epochs=5", "epochs=1").replace("my_images, 20", "my_images, 2")
    code = code.replace("my_images, 30", "my_images, 3")
    names = {"my_images": synthetic_digits(600)[0], "images_to_measure": synthetic_digits(300)[0]}
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)  # noqa: S102 (the README is ours)
    assert names["images"].shape == (20, 28, 28, 1) and names["images"].dtype == np.uint8
    assert len(names["generator"].inputs) == 1  # trained without classes
    assert names["metrics"]["images"] == 300 and names["metrics"]["fid"] > 1
