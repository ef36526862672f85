"""MNIST from the Keras cache or its server, trusted by its arrays; else a stand-in."""

import contextlib
import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import files_in, npz_bytes, synthetic_digits

import gan_mnist

ARRAYS = (*synthetic_digits(40, seed=1), *synthetic_digits(20, seed=2))
FAKE = dict(zip(("x_train", "y_train", "x_test", "y_test"), ARRAYS, strict=True))
GOOD = npz_bytes(FAKE)
WRONG = npz_bytes({**FAKE, "y_test": FAKE["y_test"][::-1].copy()})


class Behaviour(BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/"))()

    def log_message(self, *_):
        pass

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", len(GOOD))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def good(self):
        self.answer(GOOD)

    def wrong(self):
        self.answer(WRONG)

    def missing(self):
        self.send_error(404)

    def broken_off(self):
        self.answer(GOOD[: len(GOOD) // 2])

    def nonsense(self):
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def stalled(self):
        self.answer(GOOD[:100])
        self.server.over.wait(20)

    def silent(self):
        self.server.over.wait(20)


@pytest.fixture(scope="module")
def server():
    """A local HTTP server; `asked` lists what it was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Behaviour)
    server.daemon_threads = True
    server.asked, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    """A function that makes the server behave as named; it returns the path in an empty cache."""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in ARRAYS)).hexdigest()
    monkeypatch.setattr(gan_mnist, "MNIST_DIGEST", digest)
    monkeypatch.setattr(gan_mnist, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.asked.clear()

    def serve(behaviour):
        port = 9 if behaviour == "refused" else server.server_port
        monkeypatch.setattr(gan_mnist, "MNIST_URL", f"http://127.0.0.1:{port}/{behaviour}")
        (tmp_path / "datasets").mkdir()
        return tmp_path / "datasets" / "mnist.npz"

    return serve


def is_fake_mnist(arrays):
    return all(np.array_equal(one, other) for one, other in zip(arrays, ARRAYS, strict=True))


def test_the_download_fills_the_cache(served):
    cache = served("good")
    cache.parent.rmdir()
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert files_in(cache.parent) == ["mnist.npz"] and cache.read_bytes() == GOOD


@pytest.mark.parametrize(
    "behaviour", ["wrong", "missing", "broken_off", "nonsense", "stalled", "silent", "refused"]
)
def test_a_download_that_fails_costs_seconds_and_one_line_and_leaves_nothing(
    behaviour, served, capfd
):
    cache, start = served(behaviour), time.monotonic()
    with pytest.raises(gan_mnist.RunError, match="cannot download into") as failure:
        gan_mnist.load_mnist()
    assert time.monotonic() - start < 5
    assert files_in(cache.parent) == []
    assert len(str(failure.value).splitlines()) == 1 and capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None  # the time limit is for the download alone


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_good_cache_is_used_without_asking_anyone_however_it_is_compressed(save, served, server):
    served("good").write_bytes(npz_bytes(FAKE, save))
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert server.asked == []


@pytest.mark.parametrize("damaged", [WRONG, GOOD[:-500], b""], ids=["wrong", "cut", "empty"])
def test_a_damaged_cache_is_downloaded_again(damaged, served):
    cache = served("good")
    cache.write_bytes(damaged)
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert cache.read_bytes() == GOOD


def test_without_cache_and_server_a_stand_in_is_drawn_and_named_so(served, monkeypatch, capsys):
    served("refused")
    draw = gan_mnist.draw

    def draw_500(generator, latent, classes):  # and repeat them, to save ten seconds
        return np.resize(draw(generator, latent[:500], classes[:500]), (len(latent), 28, 28, 1))

    monkeypatch.setattr(gan_mnist, "draw", draw_500)
    dataset = gan_mnist.load_dataset(gan_mnist.Settings())
    printed = capsys.readouterr().out
    assert dataset.name == "stand-in" and "NOT MNIST" in printed
    assert printed.startswith("cannot download")  # and why
    assert dataset.images.shape == (60_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert np.array_equal(np.bincount(dataset.labels), np.full(10, 6000))
    ones, zeros = (dataset.images[dataset.labels == digit] for digit in (1, 0))
    assert ones.mean() < 0.6 * zeros.mean()  # a one has less ink: they are digits of these classes


def test_without_the_shipped_generator_too_one_line_says_what_to_get(served, monkeypatch, tmp_path):
    served("refused")
    monkeypatch.setattr(gan_mnist, "SHIPPED_GENERATOR", tmp_path / "missing.h5")
    with pytest.raises(gan_mnist.RunError, match=r"no MNIST: put http.* into .*datasets"):
        gan_mnist.load_dataset(gan_mnist.Settings())


def test_real_mnist_has_its_shapes_classes_and_unseen_images(mnist):
    dataset = gan_mnist.load_dataset(gan_mnist.Settings())
    assert dataset.name == "mnist"
    assert dataset.images.shape == (60_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert np.bincount(dataset.labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert dataset.test_images.shape == (10_000, 28, 28, 1)
