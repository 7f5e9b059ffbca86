"""MODEL.WEIGHTS that cannot be had, told before any worker starts."""

import http.server
import socket
import threading
import time
import pytest

from agvm_d2.d2 import sources
from agvm_d2.d2.sources import as_url, check_weights

KEYS = ("MODEL.WEIGHTS", "OUTPUT_DIR")
R50 = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"


def check(weights, eval_only=False, resumes=False):
    check_weights(KEYS, weights, "out", eval_only, resumes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    sources.why_not_fetched.cache_clear()
    yield tmp_path
    sources.why_not_fetched.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize(
    "weights, url",
    [
        (R50, "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl"),
        ("catalog://ImageNetPretrained/MSRA/R-50", "R-50.pkl"),
        ("https://example.org/a/m.pth?matching_heuristics=True", "https://example.org/a/m.pth"),
    ],
)
def test_without_a_network(weights, url, no_network, cache):
    message = f"MODEL.WEIGHTS: '{weights}' cannot be fetched from here .*Name or service not known"
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        check(weights)
    assert url in str(caught.value) and "\n" not in str(caught.value)
    check(weights, resumes=True)  # not read
    path = sources.cached(as_url(weights))
    assert path in str(caught.value) and path.startswith(str(cache))


def test_what_is_in_the_cache_needs_none(no_network, cache):
    path = cache / "detectron2/ImageNetPretrained/torchvision/R-50.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    check(R50)
    from detectron2.utils.file_io import PathManager

    assert PathManager.get_local_path(R50) == str(path)  # it is where Detectron2 looks


def test_what_a_server_says(server):
    check(f"{server}/200/m.pth")
    check(f"{server}/405/m.pth")  # does not like HEAD
    with pytest.raises(ValueError, match="HTTP 404"):
        check(f"{server}/404/m.pth")


def test_a_server_that_never_answers(monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(ValueError, match="cannot be fetched from here .*timed out"):
            check(f"http://127.0.0.1:{silent.getsockname()[1]}/m.pth")
        assert time.monotonic() - begin < 10


def test_other_sources(tmp_path):
    check("")
    check("s3://bucket/m.pth")  # its handler's business
    (tmp_path / "m.pth").write_bytes(b"x")
    check(str(tmp_path / "m.pth"), eval_only=True)
    check(f"{tmp_path}/m.pth?matching_heuristics=True")
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: 'no.pth' is not there"):
        check("no.pth")
    with pytest.raises(ValueError, match="Detectron2 has no 'catalog://no'"):
        check("catalog://no")
    with pytest.raises(ValueError, match="--eval-only: MODEL.WEIGHTS is empty"):
        check("", eval_only=True)
