"""Data: MNIST from the cache or a mirror, trusted by its arrays; else a stand-in that says so."""

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import keras
import numpy as np
import pytest
from conftest import files_in, npz_bytes, synthetic_digits

import gan_mnist

NAMES = ("x_train", "y_train", "x_test", "y_test")
FAKE = dict(zip(NAMES, (*synthetic_digits(40, seed=1), *synthetic_digits(20, seed=2)), strict=True))
GOOD = npz_bytes(FAKE)
WRONG = npz_bytes({**FAKE, "y_test": FAKE["y_test"][::-1].copy()})
WORDS = npz_bytes({**FAKE, "y_test": np.array(["seven"])})


class Mirror(BaseHTTPRequestHandler):
    """A server whose path says how it behaves."""

    def do_GET(self):
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/"))()

    def log_message(self, *_):
        pass

    def answer(self, length, body):
        self.server.asked.append(self.path)
        self.send_response(200)
        for name, value in length.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def good(self):
        self.answer({"Content-Length": len(GOOD)}, GOOD)

    def good_later(self):  # than the one under test, which is thus the first to be read
        self.server.over.wait(0.3)
        self.good()

    def good_without_length(self):
        self.answer({}, GOOD)

    def wrong(self):
        self.answer({"Content-Length": len(WRONG)}, WRONG)

    def page(self):
        self.answer({"Content-Type": "text/html"}, b"<html>Please log in to this network</html>")

    def missing(self):
        self.send_error(404)

    def broken_off(self):
        self.answer({"Content-Length": len(GOOD)}, GOOD[: len(GOOD) // 2])

    def broken_off_without_length(self):
        self.answer({}, GOOD[: len(GOOD) // 2])

    def broken_off_in_a_chunk(self):
        self.protocol_version = "HTTP/1.1"
        self.answer({"Transfer-Encoding": "chunked"}, b"fffff\r\n" + GOOD[: len(GOOD) // 2])
        self.close_connection = True

    def nonsense(self):
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def nonsense_length(self):
        self.answer({"Content-Length": "many"}, GOOD)

    def stalled(self):
        self.answer({"Content-Length": len(GOOD)}, GOOD[:100])
        self.server.over.wait(20)

    def silent(self):
        self.server.over.wait(20)


@pytest.fixture(scope="module")
def server():
    """A local HTTP server; `asked` lists what it was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.daemon_threads = True
    server.asked, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """The path of an empty Keras cache's mnist.npz, where FAKE is what MNIST has to be."""
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in FAKE.items()}
    monkeypatch.setattr(gan_mnist, "MNIST_DIGESTS", digests)
    monkeypatch.setattr(gan_mnist, "STALL_SECONDS", 1)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.asked.clear()
    return tmp_path / "datasets" / "mnist.npz"


@pytest.fixture
def mirrors(server, monkeypatch):
    """A function that makes the named behaviours the list of mirrors."""

    def use(*names):
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{name}" for name in names)
        monkeypatch.setattr(gan_mnist, "MNIST_MIRRORS", urls)

    return use


def is_fake_mnist(arrays):
    return arrays is not None and all(np.array_equal(arrays[name], FAKE[name]) for name in NAMES)


@pytest.mark.parametrize("behaviour", ["good", "good_without_length"])
def test_a_mirror_fills_the_cache(behaviour, cache, mirrors):
    mirrors(behaviour)
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert cache.read_bytes() == GOOD
    assert files_in(cache.parent) == ["mnist.npz"]


@pytest.mark.parametrize(
    "behaviour",
    [
        *("wrong", "page", "missing", "broken_off", "broken_off_without_length", "stalled"),
        *("silent", "broken_off_in_a_chunk", "nonsense", "nonsense_length"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bad_mirror_costs_seconds_and_the_next_one_serves(
    behaviour, cache, mirrors, server, capsys
):
    mirrors(behaviour, "good_later")
    start = time.monotonic()
    arrays = gan_mnist.load_mnist()
    assert time.monotonic() - start < 6
    assert is_fake_mnist(arrays)
    assert files_in(cache.parent) == ["mnist.npz"] and cache.read_bytes() == GOOD
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert f"/{behaviour}: " in line and printed.err == ""


@pytest.mark.parametrize("behaviour", ["wrong", "broken_off", "stalled"])
def test_a_mirror_that_fails_leaves_no_file(behaviour, cache, mirrors):
    mirrors(behaviour)
    assert gan_mnist.load_mnist() is None
    assert not cache.parent.exists() or files_in(cache.parent) == []


def test_a_refused_connection_is_passed_over(cache, mirrors, monkeypatch):
    mirrors("good")
    dead = ("http://127.0.0.1:9/mnist.npz", *gan_mnist.MNIST_MIRRORS)
    monkeypatch.setattr(gan_mnist, "MNIST_MIRRORS", dead)
    assert is_fake_mnist(gan_mnist.load_mnist())


def test_a_good_cache_is_used_without_asking_anyone(cache, mirrors, server):
    mirrors("good")
    cache.parent.mkdir()
    cache.write_bytes(GOOD)
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert server.asked == []


def test_a_recompressed_cache_is_as_good(cache, mirrors, server):
    mirrors("good")
    cache.parent.mkdir()
    cache.write_bytes(npz_bytes(FAKE, np.savez_compressed))
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert server.asked == []


@pytest.mark.parametrize("damaged", [WRONG, WORDS, GOOD[:-500], b"", b"PK\x03\x04 nonsense"])
def test_a_damaged_cache_is_downloaded_again(damaged, cache, mirrors):
    mirrors("good")
    cache.parent.mkdir()
    cache.write_bytes(damaged)
    assert is_fake_mnist(gan_mnist.load_mnist())
    assert cache.read_bytes() == GOOD


def test_without_cache_and_mirrors_a_stand_in_is_drawn_and_named_so(cache, mirrors, capsys):
    mirrors("silent", "stalled")
    start = time.monotonic()
    assert gan_mnist.load_mnist() is None
    assert time.monotonic() - start < 5
    mirrors("missing")
    dataset = gan_mnist.load_dataset(gan_mnist.Settings())
    assert dataset.name == "stand-in"
    assert dataset.images.shape == (60_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert dataset.labels.shape == (60_000,) and dataset.labels.dtype == np.uint8
    assert np.array_equal(np.bincount(dataset.labels), np.full(10, 6000))
    printed = "".join(capsys.readouterr())
    assert "stand-in" in printed and "NOT MNIST" in printed.upper()


def test_the_wait_before_the_stand_in_is_under_twenty_seconds_offline():
    assert len(gan_mnist.MNIST_MIRRORS) * gan_mnist.STALL_SECONDS < 20


def test_real_mnist_has_its_shapes_and_classes(mnist):
    dataset = gan_mnist.load_dataset(gan_mnist.Settings())
    assert dataset.name == "mnist"
    assert dataset.images.shape == (60_000, 28, 28, 1) and dataset.images.dtype == np.uint8
    assert np.bincount(dataset.labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]


def test_a_mirror_whose_every_address_is_silent_costs_one_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_mnist, "STALL_SECONDS", 0.3)
    over = threading.Event()
    monkeypatch.setattr(keras.utils, "get_file", lambda *_, **__: over.wait(20))
    start = time.monotonic()
    with pytest.raises(OSError, match=r"nothing came for 0\.3 seconds"):
        gan_mnist._download("http://mirror/x.npz", tmp_path / "x.npz")
    assert time.monotonic() - start < 5
    over.set()


def test_a_slow_mirror_is_waited_for_while_bytes_come(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_mnist, "STALL_SECONDS", 0.5)

    def slow(name, url, cache_dir, cache_subdir):
        with open(cache_dir / name, "wb", buffering=0) as file:
            for _ in range(8):
                file.write(b"x")
                time.sleep(0.2)

    monkeypatch.setattr(keras.utils, "get_file", slow)
    gan_mnist._download("http://mirror/x.npz", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == 8 * b"x"
