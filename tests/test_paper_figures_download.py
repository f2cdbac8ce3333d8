"""Downloads, against a server on this machine: whole, broken, wrong and missing files."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from paper_figures import __main__ as command
from paper_figures import data, download

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
check = partial(data.check_digest, algorithm="sha256", expected=SHA256[:8])


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; the first ``to_break`` answers stop in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.to_break = 0
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.to_break > 0:
            self.server.to_break -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, asked without the proxy that the environment may name."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_file_is_fetched_whole_and_only_once(server: Server, tmp_path: Path):
    server.files["file"] = CONTENT
    path = tmp_path / "new" / "file"
    download.fetch(path, [server.url], check)
    assert path.read_bytes() == CONTENT
    assert [found.name for found in path.parent.iterdir()] == ["file"]
    download.fetch(path, [server.url], check)
    assert server.asked == ["/file"]


def test_a_broken_transfer_is_started_anew(server: Server, tmp_path: Path):
    server.files["file"] = CONTENT
    server.to_break = 1
    download.fetch(tmp_path / "file", [server.url], check)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_transfer_that_stays_broken_leaves_nothing_and_says_what_to_do(
    server: Server, tmp_path: Path
):
    server.files["file"] = CONTENT
    server.to_break = 9
    with pytest.raises(data.DataError) as caught:
        download.fetch(tmp_path / "file", [server.url], check)
    assert "file could not be fetched" in str(caught.value)
    assert f"{server.url}file: " in str(caught.value)
    assert f"put it at {tmp_path / 'file'}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checksum_is_refused_and_the_next_mirror_asked(server: Server, tmp_path: Path):
    server.files |= {"bad/file": CONTENT[::-1], "good/file": CONTENT}
    download.fetch(tmp_path / "file", [f"{server.url}bad/", f"{server.url}good/"], check)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["/bad/file", "/good/file"]


def test_a_checksum_that_stays_wrong_leaves_nothing(server: Server, tmp_path: Path):
    server.files["file"] = CONTENT[::-1]
    with pytest.raises(data.DataError, match=f"SHA256 sum .* but {SHA256[:8]} is expected"):
        download.fetch(tmp_path / "file", [server.url], check)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_silent_address_are_reported(server: Server, tmp_path: Path):
    with pytest.raises(data.DataError, match="HTTP Error 404"):
        download.fetch(tmp_path / "file", [server.url], check)
    server.shutdown()
    server.server_close()
    with pytest.raises(data.DataError, match="refused"):
        download.fetch(tmp_path / "file", [server.url], check)


@pytest.mark.parametrize(
    ("fetch", "sums", "mirrors", "place"),
    [
        (download.fetch_mnist, "IDX_FILES", "MNIST_MIRRORS", "mnist"),
        (download.fetch_fashion, "FASHION_FILES", "FASHION_MIRRORS", "fashion-mnist"),
    ],
)
def test_mnist_and_fashion_are_checked_by_their_uncompressed_content(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch, sums, mirrors, place
):
    contents = {name: name.encode() for name in download.IDX_FILES}
    expected = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(download, sums, expected)
    monkeypatch.setattr(download, mirrors, (server.url,))
    for name, content in contents.items():
        server.files[f"{name}.gz"] = gzip.compress(content, compresslevel=1)
    fetch(tmp_path)
    assert {path.name for path in (tmp_path / place).iterdir()} == {f"{n}.gz" for n in contents}

    (tmp_path / place / "t10k-labels-idx1-ubyte.gz").unlink()
    server.files["t10k-labels-idx1-ubyte.gz"] = gzip.compress(b"something else")
    with pytest.raises(data.DataError, match="MD5 sum"):
        fetch(tmp_path)


def test_cifar10_is_unpacked_and_the_archive_removed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in (*data.CIFAR10_FILES, "readme.html"):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    server.files[download.CIFAR10_ARCHIVE] = packed.getvalue()
    monkeypatch.setattr(download, "CIFAR10_MIRRORS", (server.url,))
    monkeypatch.setattr(download, "CIFAR10_MD5", hashlib.md5(packed.getvalue()).hexdigest())
    download.fetch_cifar10(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-bin"]
    for name in data.CIFAR10_FILES:
        assert (tmp_path / "cifar-10-batches-bin" / name).read_bytes() == name.encode()
    assert not (tmp_path / "cifar-10-batches-bin" / "readme.html").exists()
    download.fetch_cifar10(tmp_path)
    assert len(server.asked) == 1


def test_the_command_reports_a_download_that_fails(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(download, "CIFAR10_MIRRORS", (server.url,))
    new = tmp_path / "new"
    arguments = ["--figure", "3_cifar", "--download", "--data", str(new), "--out", str(tmp_path)]
    assert command.main(arguments) == 2
    shown = capsys.readouterr().err
    assert f"fetching {server.url}{download.CIFAR10_ARCHIVE}" in shown
    assert f"put it at {new / download.CIFAR10_ARCHIVE}" in shown
