"""The models on this machine, found in folders and in the hub's cache."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest

from mlx_gptoss.loading import library
from mlx_gptoss.loading.library import installed_models
from mlx_gptoss.loading.plan import NANO


def copy_nano(folder):
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two folders of models, with some entries that are none, and a hub cache of two repositories."""
    copy_nano(tmp_path / "one/mine")
    (tmp_path / "one/notes.txt").write_text("no model")
    (tmp_path / "one/empty").mkdir()
    (tmp_path / "one/llama").mkdir()
    (tmp_path / "one/llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "one/broken.gguf").write_bytes(b"GGUF")
    copy_nano(tmp_path / "two/mine")  # the same name again
    copy_nano(tmp_path / "two/yours")
    for repo, files in (("models--org--gpt-oss-mini", True), ("models--org--other", False)):
        folder = tmp_path / "hub" / repo
        snapshot = folder / "snapshots/0123456789abcdef0123456789abcdef01234567"
        if files:
            copy_nano(snapshot)
        else:
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(snapshot.name)
        (folder / "blobs").mkdir()
    monkeypatch.setenv(library.HOME_VARIABLE, os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_finds_models_in_folders_and_in_the_hubs_cache(home):
    found = {model.name: model.path for model in installed_models()}
    assert list(found) == ["mlx-gptoss-nano", "mine", "yours", "org/gpt-oss-mini"]
    assert found["mine"] == home / "one/mine" and found["mlx-gptoss-nano"] == NANO
    assert found["org/gpt-oss-mini"].parent.name == "snapshots"


def test_only_the_bundled_model_without_others(tmp_path, monkeypatch):
    monkeypatch.delenv(library.HOME_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "missing"))
    assert [model.name for model in installed_models()] == ["mlx-gptoss-nano"]


def test_a_folder_that_cannot_be_read_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(library.HOME_VARIABLE, str(tmp_path / "missing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "missing"))
    with caplog.at_level(logging.WARNING):
        assert [model.name for model in installed_models()] == ["mlx-gptoss-nano"]
    assert "missing" in caplog.text and library.HOME_VARIABLE in caplog.text
