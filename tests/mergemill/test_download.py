"""Downloads that break, lie, expire and are gone on with; every digest is computed here, by hand."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import httpx
import pytest

from mergemill import Client, download
from tests.mergemill.faults import JOB, FileServer, answers, breaks_after
from workers.errors import (
    AlreadyExistsError,
    ObjectNotFoundError,
    OutputReplacedError,
    StoreError,
    StoreUnavailableError,
)

pytestmark = pytest.mark.fast

INDEX = "model.safetensors.index.json"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAIT_S", 0.001)


def client(server: FileServer) -> Client:
    return Client("http://api.test", transport=server.transport)


def shard(tensors: dict[str, bytes]) -> tuple[bytes, str]:
    """A safetensors file of bytes, and its tree digest by the words of the documentation."""
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    for name, data in tensors.items():
        entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        header[name] = entry  # type: ignore[assignment]
        offset += len(data)
    text = json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text)) + text
    tree = hashlib.sha256(prefix).digest()
    for data in tensors.values():
        blocks = [data[start : start + MIB] for start in range(0, len(data), MIB)]
        tree += hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).digest()
    return prefix + b"".join(tensors.values()), f"sha256-tree-1mib:{hashlib.sha256(tree).hexdigest()}"


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.suffix == ".part"]


def test_every_file_comes_whole_and_the_index_last(tmp_path: Path) -> None:
    files = {INDEX: b"{}", "a.json": b"a" * 10, "empty.txt": b"", "b.bin": bytes(3 * MIB)}
    server = FileServer(files)
    seen: list[tuple[int, int]] = []
    found = client(server).download(JOB, tmp_path / "new" / "place", lambda *now: seen.append(now))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == files
    assert server.asked[-1][0] == INDEX
    total = sum(map(len, files.values()))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_weights_of_another_model_are_not_mixed_with(tmp_path: Path) -> None:
    """A loader would take `model.safetensors` for the merged model."""
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    server = FileServer({INDEX: b"{}", "model-00001-of-00001.safetensors": b"x"})
    with pytest.raises(AlreadyExistsError, match=r"another model \(model\.safetensors\)"):
        client(server).download(JOB, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_tree_digests_are_checked(tmp_path: Path) -> None:
    tensors = {"x": bytes(range(256)) * 8192 + b"tail", "empty": b"", "y": b"z" * MIB}
    data, digest = shard(tensors)
    server = FileServer({"m.safetensors": data}, {"m.safetensors": digest})
    client(server).download(JOB, tmp_path)
    assert (tmp_path / "m.safetensors").read_bytes() == data


@pytest.mark.parametrize("position", [0, 9, -1, -MIB - 1, 400])
def test_one_flipped_bit_of_a_shard_is_refused(tmp_path: Path, position: int) -> None:
    data, digest = shard({"x": b"x" * (2 * MIB + 1), "y": b"y" * 5})
    flipped = bytearray(data)
    flipped[position] ^= 1
    server = FileServer({"m.safetensors": bytes(flipped)}, {"m.safetensors": digest})
    with pytest.raises(StoreError, match=r"m\.safetensors"):
        client(server).download(JOB, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_whole_is_kept_and_what_is_not_is_replaced(tmp_path: Path) -> None:
    server = FileServer({"a": b"right", "b": b"right", "c": b"right"})
    (tmp_path / "a").write_bytes(b"right")
    (tmp_path / "b").write_bytes(b"wrong")
    (tmp_path / "c").write_bytes(b"rig")
    repaired: list[str] = []
    client(server).download(JOB, tmp_path, on_repair=repaired.append)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"right"}
    assert sorted(server.asked) == [("b", None), ("c", None)]
    assert sorted(repaired) == ["b", "c"]


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("left", [b"", b"0123"])
def test_what_is_longer_than_the_merge_wrote_is_not_kept(
    tmp_path: Path, with_length: bool, left: bytes
) -> None:
    """Another job's file, by a URL from before it."""
    there = b"0123456789 and much more"

    def longer(request: httpx.Request) -> httpx.Response:
        start = len(left) if "Range" in request.headers else 0
        content = there[start:] if with_length else iter([there[start:]])
        return httpx.Response(206 if start else 200, content=content, request=request)

    server = FileServer({"m.bin": there[:10]}, faults={"m.bin": [longer, longer]})
    if left:
        digest = hashlib.sha256(there[:10]).hexdigest()
        (tmp_path / f"m.bin.{digest[:12]}.part").write_bytes(left)
    seen: list[tuple[int, int]] = []
    with pytest.raises(OutputReplacedError, match=r"m\.bin: the store has 24 bytes, the merge wrote 10"):
        client(server).download(JOB, tmp_path, lambda *now: seen.append(now))
    assert all(done <= total for done, total in seen)
    assert not (tmp_path / "m.bin").exists()
    assert all((tmp_path / name).read_bytes() == left for name in leftovers(tmp_path))


def test_a_replaced_output_is_said_to_be(tmp_path: Path) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        return httpx.Response(410, json={"detail": "replaced since by merge-2"}, request=request)

    server = FileServer({"m.bin": b"0"}, faults={"m.bin": [gone]})
    with pytest.raises(OutputReplacedError, match=r"m\.bin: replaced since by merge-2"):
        client(server).download(JOB, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_wrong_twice_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "m.bin.000000000000.part").write_bytes(b"0123")
    server = FileServer({"m.bin": b"0123456789"}, {"m.bin": f"sha256:{'0' * 64}"})
    with pytest.raises(StoreError, match="digest"):
        client(server).download(JOB, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "dir/m.bin/x"])
def test_a_directory_that_cannot_be_is_one_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/m.bin").write_bytes(b"x")
    with pytest.raises(
        StoreError, match=f"cannot write to {tmp_path / place}: .*(File exists|Not a directory)"
    ):
        client(FileServer({"m.bin": b"0"})).download(JOB, tmp_path / place)


def test_a_broken_connection_is_gone_on_with_where_it_broke(tmp_path: Path) -> None:
    files = {"m.bin": bytes(range(250)) * 4}
    server = FileServer(
        files, faults={"m.bin": [breaks_after(300, files), breaks_after(0, files), answers(503)]}
    )
    client(server).download(JOB, tmp_path)
    assert (tmp_path / "m.bin").read_bytes() == files["m.bin"]
    assert [asked for _, asked in server.asked] == [None, "bytes=300-", "bytes=300-", "bytes=300-"]


def test_only_attempts_in_vain_are_counted(tmp_path: Path) -> None:
    files = {"m.bin": b"0123456789" * 3}
    many = [breaks_after(1, files) for _ in range(20)]
    server = FileServer(files, faults={"m.bin": many})
    client(server).download(JOB, tmp_path)
    assert (tmp_path / "m.bin").read_bytes() == files["m.bin"]
    assert len(server.asked) == 21


def test_a_store_that_stays_away_is_given_up_and_the_beginning_is_kept(tmp_path: Path) -> None:
    files = {"m.bin": b"0123456789"}
    faults = [breaks_after(4, files), *[answers(500)] * download.ATTEMPTS]
    server = FileServer(files, faults={"m.bin": faults})
    with pytest.raises(StoreUnavailableError, match=r"m\.bin cannot be downloaded.*500"):
        client(server).download(JOB, tmp_path)
    assert len(server.asked) == 1 + download.ATTEMPTS
    (left,) = leftovers(tmp_path)
    assert (tmp_path / left).read_bytes() == b"0123"
    client(server).download(JOB, tmp_path)
    assert server.asked[-1] == ("m.bin", "bytes=4-")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path) -> None:
    files = {"m.bin": b"0123456789"}
    server = FileServer(files, faults={"m.bin": [breaks_after(4, files)]}, ranges=False)
    client(server).download(JOB, tmp_path)
    assert (tmp_path / "m.bin").read_bytes() == files["m.bin"]


@pytest.mark.parametrize("left", [b"XXXX", b"XXXXXXXXXX", b"0123456789 and more", b"0123456789"])
def test_a_part_that_is_not_what_it_seems_is_begun_anew(tmp_path: Path, left: bytes) -> None:
    files = {"m.bin": b"0123456789"}
    digest = hashlib.sha256(files["m.bin"]).hexdigest()
    (tmp_path / f"m.bin.{digest[:12]}.part").write_bytes(left)
    client(FileServer(files)).download(JOB, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_part_of_another_merge_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "m.bin.000000000000.part").write_bytes(b"other")
    server = FileServer({"m.bin": b"0123456789"})
    client(server).download(JOB, tmp_path)
    assert server.asked == [("m.bin", None)]


def test_an_expired_url_is_asked_for_again(tmp_path: Path) -> None:
    def expired(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(403) if request.url.params["signed"] == "1" else None

    server = FileServer({"m.bin": b"0123456789"}, faults={"m.bin": [expired, expired]})
    client(server).download(JOB, tmp_path)
    assert server.listings == 2
    assert len(server.asked) == 2


def test_a_file_that_is_gone_is_said_to_be_and_ends_everything(tmp_path: Path) -> None:
    server = FileServer({"m.bin": b"0", INDEX: b"{}"}, faults={"m.bin": [answers(404)]})
    with pytest.raises(ObjectNotFoundError, match=r"m\.bin"):
        client(server).download(JOB, tmp_path)
    assert INDEX not in [name for name, _ in server.asked]


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "a\\b", "nul\0"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="plain name"):
        client(FileServer({name: b"x", "ok": b"x"})).download(JOB, tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


def test_a_digest_of_an_unknown_kind_is_no_digest(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="blake3"):
        client(FileServer({"m": b"x"}, {"m": "blake3:00"})).download(JOB, tmp_path)


def test_files_that_the_api_serves_are_asked_for_where_the_api_was_found(tmp_path: Path) -> None:
    served = FileServer(
        {"m.bin": b"x"}, urls=lambda name, _: f"http://inside:8080/v1/merges/{JOB}/files/{name}"
    )
    hosts: list[str] = []

    def outside(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return served.transport.handle_request(request)

    Client(
        "https://outside.test/mill/",
        transport=httpx.MockTransport(
            lambda request: outside(
                httpx.Request(request.method, str(request.url).replace("/mill", ""), headers=request.headers)
            )
        ),
    ).download(JOB, tmp_path)
    assert set(hosts) == {"outside.test"}
