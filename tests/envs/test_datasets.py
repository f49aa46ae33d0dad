"""Finding, downloading and verifying data; a local server stands for the network."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pz_envs import ConfigError, DataError, InfraError, datasets
from pz_envs.datasets import DATASETS, DataFile

_STORY = b"\x03" + bytes(range(200))
_ROWS = [{"nums": [1, 2, 3], "target": 6, "row": 0}, {"nums": [4, 5, 6], "target": 15, "row": 1}]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no PZ_DATA, an empty cache."""
    monkeypatch.delenv("PZ_DATA", raising=False)
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    column = [
        {"ground_truth": {"numbers": row["nums"], "target": row["target"]}}
        for row in (*_ROWS, {"nums": [9], "target": 9})
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"reward_model": column}), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve three files as a data set `toy`; yields the paths that were asked for."""
    jsonl = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    content = {"/good": _STORY, "/bad": b"<html>no such page</html>", "/rows": _parquet()}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content[self.path])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{running.server_port}"
        sha = hashlib.sha256(_STORY).hexdigest()
        files = (
            DataFile("good.z3", sha, f"{base}/good"),
            DataFile("bad.z3", sha, f"{base}/bad"),
            DataFile("rows.jsonl.gz", hashlib.sha256(jsonl).hexdigest(), f"{base}/rows", rows=2),
        )
        toy = datasets.Dataset("toy", "Toys", "toy", "none", files)
        monkeypatch.setattr(datasets, "DATASETS", {"toy": toy})
        yield asked
        running.shutdown()


def test_a_download_is_checked_and_found_and_not_repeated(server: list[str]) -> None:
    progress: list[tuple[int, int, str]] = []
    folder = datasets.get("toy/good.z3", on_progress=lambda *event: progress.append(event))
    assert (folder / "good.z3").read_bytes() == _STORY
    assert datasets.find_file("toy", "good.z3") == folder / "good.z3"
    assert progress == [(0, 1, "good.z3"), (1, 1, "")]
    datasets.get("toy/good.z3")
    assert server == ["/good"]
    (folder / "good.z3").write_bytes(b"broken on disk")
    datasets.get("toy/good.z3")
    assert (folder / "good.z3").read_bytes() == _STORY


def test_what_pz_data_holds_is_not_fetched(
    server: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = home / "own" / "toy"
    own.mkdir(parents=True)
    (own / "good.z3").write_bytes(_STORY)
    monkeypatch.setenv("PZ_DATA", str(home / "own"))
    assert datasets.get("toy/good.z3") == own
    assert server == []


def test_wrong_bytes_are_refused_and_not_written(server: list[str]) -> None:
    with pytest.raises(DataError, match="sha256"):
        datasets.get("toy")
    folder = datasets.download_root() / "toy"
    assert [path.name for path in folder.iterdir()] == ["good.z3"]


def test_parquet_rows_become_countdown_lines(server: list[str]) -> None:
    folder = datasets.get("toy/rows.jsonl.gz")
    lines = gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == _ROWS
    datasets.get("toy/rows.jsonl.gz")
    assert server == ["/rows"]


def test_offline_the_error_names_both_ways_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    zork = DATASETS["zork_mit"]
    file = dataclasses.replace(zork.files[0], url=f"http://127.0.0.1:{port}/zork1.z3")
    offline = dataclasses.replace(zork, files=(file,))
    monkeypatch.setattr(datasets, "DATASETS", {"zork_mit": offline})
    with pytest.raises(DataError, match="pz-envs data get zork_mit") as caught:
        datasets.get("zork_mit")
    assert "PZ_DATA" in str(caught.value)
    assert "refused" in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `jericho`"):
        datasets.get("jerico")
    with pytest.raises(ConfigError, match=r"Did you mean `zork1\.z5`"):
        datasets.get("jericho/zork1.z55")


def test_pz_data_comes_before_the_cache_and_must_exist(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert datasets.data_root() is None
    assert datasets.find_file("jericho", "a.z3") is None
    cached = datasets.download_root() / "jericho" / "a.z3"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(_STORY)
    assert datasets.data_root() == datasets.download_root()
    own = home / "own" / "jericho"
    own.mkdir(parents=True)
    monkeypatch.setenv("PZ_DATA", str(home / "own"))
    assert datasets.data_root() == home / "own"
    assert datasets.find_file("jericho", "a.z3") == cached
    (own / "a.z3").write_bytes(_STORY)
    assert datasets.find_file("jericho", "a.z3") == own / "a.z3"
    monkeypatch.setenv("PZ_DATA", str(home / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        datasets.data_root()


def test_a_story_is_found_by_content_under_any_name(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_DATA", str(home))
    story = home / "jericho" / "shelf" / "renamed.z8"
    story.parent.mkdir(parents=True)
    story.write_bytes(b"something else")
    md5 = hashlib.md5(_STORY).hexdigest()
    assert datasets.find_story(md5) is None
    story.write_bytes(_STORY)
    assert datasets.find_story(md5) == story


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PZ_CACHE", raising=False)
    assert datasets.cache_dir() == tmp_path / "xdg" / "pz"
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "mine"))
    assert datasets.cache_dir() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()


def test_a_cache_that_cannot_be_made_is_named_and_not_needed_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    assert datasets.find_file("jericho", "a.z3") is None
    with pytest.raises(InfraError, match="export PZ_CACHE"):
        datasets.cache_dir()


@pytest.mark.data
@pytest.mark.parametrize("name", list(DATASETS))
def test_the_real_files_are_the_recorded_ones(name: str) -> None:
    dataset = DATASETS[name]
    if datasets.find_file(name, dataset.files[0].name) is None:
        pytest.skip(f"data set {name} is not here")
    assert [file.name for file in dataset.files if not datasets.is_present(dataset, file)] == []
