"""Damaged files of the prompt cache, and other things under their names: the prompt is computed again."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
from cached_prompts import KNOWN, REQUESTS, answer, corrupt, craft, files_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine import prefix_files


def make_folder(path: Path, outside: Path) -> None:
    path.mkdir()


def make_full_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def make_fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        where = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        bound.bind(path.name)
        os.chdir(where)


def make_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def make_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent / "nothing")


def make_link_to_itself(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_a_device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def make_device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # zeros without an end
    except PermissionError:
        pytest.skip("a device needs root")


OTHERS = [
    make_folder,
    make_full_folder,
    make_fifo,
    make_socket,
    make_link,
    make_dangling_link,
    make_link_to_itself,
    make_link_to_a_device,
    make_device,
]


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_something_else_under_the_name_of_a_file(filled, monkeypatch, caplog, tmp_path_factory, make, running):
    """Every cache file is replaced by it. A link is not followed: the true file it leads to is neither read nor
    removed."""
    monkeypatch.setattr(prefix_files, "RESCAN_S", 0.0)
    outside = tmp_path_factory.mktemp("outside")
    files = files_in(filled)

    def replace() -> None:
        for path in files:
            path.rename(outside / path.name)
            make(path, outside / path.name)

    if running:
        answer(filled, started=replace)
    else:
        replace()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1
    assert len(files_in(outside)) == len(files)
    prefix_files.PrefixFiles(filled, "mock").close()
    answer(filled, REQUESTS * 2)
    assert answer(filled, REQUESTS) > 0


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("size", [0, 1, 40, 45, 4096, 1 << 16])
def test_another_length_under_a_valid_digest(filled, caplog, size, running):
    def damage() -> None:
        for path in files_in(filled):
            craft(path, bytes(size))

    if running:
        answer(filled, started=damage)
    else:
        damage()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1 and "computed again" in caplog.text
    answer(filled)
    assert answer(filled) > 0


HEADERS = [
    {"end": 10**400},
    {"end": -1},
    {"end": 2**63},
    {"end": 1.5},
    {"end": True},
    {"end": None},
    {"bytes": 10**400},
    {"bytes": -1},
    {"bytes": "12"},
    {"bytes": None},
    {"span": []},
    {"span": [10**400]},
    {"span": [1.5, 2]},
    {"span": ["1"]},
    {"span": [[1]]},
    {"span": {"1": 2}},
    {"span": 7},
    {"span": list(range(1000))},
    {"parent": 7},
    {"parent": ["a"]},
    {"parent": {"a": 1}},
    {"parent": "\ud800"},
    {"parent": "../../escape"},
    {"sha256": None},
    {"sha256": 7},
    {"sha256": ""},
]
LINES = [
    b"",
    b"\n",
    b"{}\n",
    b"[]\n",
    b"7\n",
    b"null\n",
    b"\xff\xfe\n",
    b"[" * 8000 + b"\n",
    b"{" * 100_000 + b"\n",
    b'{"end": 1e999, "bytes": 1e999, "span": [1e999], "parent": null, "sha256": ""}\n',
    b'{"end": NaN, "bytes": NaN, "span": [NaN], "parent": null, "sha256": ""}\n',
    b'{"end": ' + b"9" * 7000 + b', "bytes": 1, "span": [1], "parent": null, "sha256": ""}\n',
    b'{"end": -Infinity, "bytes": 0, "span": [1], "parent": null}\n',
    b'{"span": [' + b"1," * 50_000 + b"1]}\n",
    b"\0" * 4096,
]


@pytest.mark.parametrize("running", [False, True], ids=["before the start", "while running"])
@pytest.mark.parametrize("header", [*HEADERS, *LINES], ids=lambda header: repr(header)[:40])
def test_malformed_headers(filled, caplog, header, running):
    """Of every file, under its name and its size where the header fits into it."""

    def damage() -> None:
        for path in files_in(filled):
            if isinstance(header, dict):
                craft(path, **header)
            else:
                path.write_bytes(header + path.read_bytes().partition(b"\n")[2])

    if running:
        answer(filled, started=damage)
    else:
        damage()
        assert answer(filled, KNOWN[:1]) == 0
    assert len(caplog.records) == 1
    answer(filled)
    assert answer(filled) > 0


KINDS = ["flip", "truncate", "extend", "insert", "swap", "swap snapshots", "remove"]
DAMAGE = st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.floats(0, 1), st.integers(0, 255))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DAMAGE, min_size=1, max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_random_damage_changes_no_token(tmp_path_factory, damage, running, order):
    folder = tmp_path_factory.mktemp("cache")
    answer(folder)

    def do_damage() -> None:
        for one in damage:
            if files_in(folder):
                corrupt(folder, *one)

    if not running:
        do_damage()
    requests = KNOWN + REQUESTS
    order.shuffle(requests)
    answer(folder, requests, started=do_damage if running else lambda: None)
    answer(folder)
    assert answer(folder) > 0
    shutil.rmtree(folder)
