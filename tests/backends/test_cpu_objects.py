"""Compiled kernels on disk: compiled once, and never run from a file that is damaged or another's."""

from __future__ import annotations

import os

import numpy as np
import pytest

from mlx_gptoss.backends.mlx.cpu import objects
from mlx_gptoss.backends.mlx.cpu.objects import MAX_FILES, ObjectFiles
from mlx_gptoss.backends.mlx.cpu.products import Products, Stored
from mlx_gptoss.weights.tensor import Dense

CODE = bytes(range(256)) * 4


@pytest.fixture
def files(tmp_path):
    return ObjectFiles(tmp_path / "kernels")


def only_file(tmp_path):
    (path,) = (tmp_path / "kernels").iterdir()
    return path


def test_what_is_put_is_found(files, tmp_path):
    assert files.find("a") is None
    files.put("a", CODE)
    assert files.find("a") == CODE and files.find("b") is None
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    assert only_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_not_used(files, tmp_path):
    files.put("a", CODE)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    for at in (0, len(objects.MAGIC), len(objects.MAGIC) + 31, len(whole) - len(CODE), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert files.find("a") is None
    for size in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert files.find("a") is None
    path.write_bytes(whole + b"\0")
    assert files.find("a") is None
    path.write_bytes(whole)
    assert files.find("a") == CODE


def test_a_file_of_another_key_user_or_group_is_not_used(files, tmp_path, monkeypatch):
    files.put("a", CODE)
    path = only_file(tmp_path)
    path.chmod(0o620)
    assert files.find("a") is None
    path.chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert files.find("a") is None
    monkeypatch.undo()
    path.rename(files._path("b"))
    assert files.find("a") is None and files.find("b") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "kernels").write_text("a file")
    files = ObjectFiles(tmp_path / "kernels")
    files.put("a", CODE)
    assert files.find("a") is None


def test_a_write_that_fails_leaves_nothing(files, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects.os, "replace", full)
    files.put("a", CODE)
    assert not list((tmp_path / "kernels").iterdir())


def test_old_files_are_removed(files, tmp_path):
    for n in range(MAX_FILES + 3):
        files.put(str(n), CODE)
        os.utime(files._path(str(n)), (n, n))
    left = [n for n in range(MAX_FILES + 3) if files.find(str(n)) is not None]
    assert left == list(range(3, MAX_FILES + 3))


def product(monkeypatch, tmp_path):
    """A product with a kernel as a new process has it."""
    compiled = pytest.importorskip("mlx_gptoss.backends.mlx.cpu.compiled")
    monkeypatch.setattr(compiled, "cache_folder", lambda: tmp_path)
    compiled.kernel.cache_clear()
    products = Products(compiled=True)
    try:
        matrix = np.arange(64 * 3, dtype=np.float32).reshape(3, 64)
        return products.multiply(Stored(Dense(matrix)), np.ones((1, 64), np.float32)) - matrix.sum(axis=1)
    finally:
        products.close()
        compiled.kernel.cache_clear()


def test_a_kernel_is_compiled_once(monkeypatch, tmp_path):
    """By the second process from the file; again if the file is damaged, which is then written anew."""
    compiled = pytest.importorskip("mlx_gptoss.backends.mlx.cpu.compiled")
    count, real = [], compiled.compiled
    monkeypatch.setattr(compiled, "compiled", lambda *arguments: count.append(1) or real(*arguments))
    for runs in (1, 1):
        assert not product(monkeypatch, tmp_path).any() and len(count) == runs
    (path,) = tmp_path.rglob("*.kernel")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 255]))
    for runs in (2, 2):
        assert not product(monkeypatch, tmp_path).any() and len(count) == runs
    assert path.read_bytes() == good


def test_the_key_names_all_that_the_code_depends_on(monkeypatch):
    compiled = pytest.importorskip("mlx_gptoss.backends.mlx.cpu.compiled")
    storage, target = compiled.Storage("float", 32, 0, "float32"), compiled.Target.here()
    keys = {compiled._key(storage, target), compiled._key(compiled.Storage("float", 16, 0, "bfloat16"), target)}
    keys.add(compiled._key(storage, compiled.Target.of("haswell", {"avx2": True, "fma": True})))
    monkeypatch.setattr(compiled.emit.llvmlite, "__version__", "0.0")
    keys.add(compiled._key(storage, target))
    monkeypatch.setattr(compiled, "E2M1", compiled.E2M1 * 2)
    keys.add(compiled._key(storage, target))
    assert len(keys) == 5
