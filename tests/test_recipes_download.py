"""Downloads from a real server on this machine, which can break off and resume."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from calm_pl.data.recipes import DataMissingError, Esc50
from calm_pl.data.recipes.download import fetch_archive


class Server(ThreadingHTTPServer):
    content = b""
    ranges = True  # answer 206 to a Range
    break_after = 0  # break off the first reply after so many bytes
    requests: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(self.server.content) - first))
        self.end_headers()
        last = self.server.break_after or None
        self.server.break_after = 0
        self.wfile.write(self.server.content[first:last])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


SET = zipped({"SET-master/meta/list.csv": b"a,b", "SET-master/audio/1.wav": bytes(3_000_000)})
EXPECTED = ["meta/list.csv", "audio"]


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {".lock"}


def test_an_archive_is_fetched_checked_and_unpacked_once(server: Server, tmp_path: Path) -> None:
    server.content = SET
    checksum = f"sha256:{hashlib.sha256(SET).hexdigest()}"
    for _ in range(2):
        fetch_archive(tmp_path / "set", server.url, EXPECTED, checksum)
    assert files(tmp_path / "set") == {"meta/list.csv", "audio/1.wav"}
    assert server.requests == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.content, server.ranges, server.break_after = SET, ranges, 2_000_000
    fetch_archive(tmp_path, server.url, EXPECTED, f"md5:{hashlib.md5(SET).hexdigest()}")
    assert files(tmp_path) == {"meta/list.csv", "audio/1.wav"}
    assert len(server.requests) == 2
    assert server.requests[1] == "bytes=2000000-"


def test_a_part_left_by_a_killed_run_is_used(server: Server, tmp_path: Path) -> None:
    server.content = SET
    (tmp_path / "set.zip.part").write_bytes(SET[:1_000_000])
    fetch_archive(tmp_path, server.url, EXPECTED)
    assert server.requests == ["bytes=1000000-"]
    assert (tmp_path / "audio/1.wav").stat().st_size == 3_000_000


def test_an_archive_put_there_by_hand_is_unpacked_and_kept(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(SET)
    fetch_archive(tmp_path, "http://127.0.0.1:9/set.zip", EXPECTED)
    assert files(tmp_path) == {"set.zip", "meta/list.csv", "audio/1.wav"}


def test_a_wrong_checksum_is_told_and_nothing_kept(server: Server, tmp_path: Path) -> None:
    server.content = SET
    with pytest.raises(DataMissingError, match=r"its sha256 is .*, not 00"):
        fetch_archive(tmp_path, server.url, EXPECTED, "sha256:00")
    assert files(tmp_path) == set()


def test_a_file_put_there_by_hand_is_never_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(SET)
    with pytest.raises(DataMissingError) as raised:
        fetch_archive(tmp_path, server.url, EXPECTED, "md5:00")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/set.zip: its md5 is {hashlib.md5(SET).hexdigest()}, not 00")
    assert "move it away to download it" in message and f"so that {tmp_path}/meta/list.csv exists" in message
    assert (tmp_path / "set.zip").read_bytes() == SET
    assert files(tmp_path) == {"set.zip"}
    assert server.requests == []


def test_another_data_set_is_told(server: Server, tmp_path: Path) -> None:
    server.content = zipped({"readme.txt": b"", "other/1.wav": b""})
    with pytest.raises(DataMissingError, match=r"held no meta/list\.csv, audio"):
        fetch_archive(tmp_path, server.url, EXPECTED)


def test_a_filled_folder_of_something_else_receives_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataMissingError, match=r"meta/list\.csv, audio not found there, only thesis\.tex"):
        fetch_archive(tmp_path, server.url, EXPECTED)
    assert server.requests == []


def test_paths_that_escape_are_refused(server: Server, tmp_path: Path) -> None:
    server.content = zipped({"good.txt": b"", "../../evil.txt": b""})
    with pytest.raises(DataMissingError, match=r"'\.\./\.\./evil\.txt', which leaves the folder"):
        fetch_archive(tmp_path / "deep/set", server.url, EXPECTED)
    assert not list(tmp_path.rglob("evil.txt"))
    assert not list(tmp_path.rglob("good.txt"))


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("audio")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with pytest.raises(DataMissingError, match="'audio', which is no file"):
        fetch_archive(tmp_path, "http://127.0.0.1:9/set.tar.gz", EXPECTED)


def test_without_a_network_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/master.zip"  # nothing listens there
    monkeypatch.setattr("calm_pl.data.recipes.esc50.URL", url)
    monkeypatch.setenv("CALM_DATA", str(tmp_path))
    with pytest.raises(DataMissingError) as raised:
        Esc50().prepare()
    message = str(raised.value)
    assert url in message
    assert f"put it at {tmp_path}/esc50/master.zip" in message
    assert f"so that {tmp_path}/esc50/meta/esc50.csv exists" in message
