"""Model names to local folders: paths in this process, downloads over real HTTP from a small hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_hub import COMMIT, Hub, small_hub

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.loading.hub import resolve

ROOT = Path(__file__).parents[2]
WANTED = {
    "config.json": b'{"model_type": "gpt_oss"}',
    "generation_config.json": b'{"eos_token_id": 1}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"eos_token": "a"}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED = {
    "README.md": b"# A model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "original/model.safetensors": b"the same weights",
    "original/config.json": b"{}",
    "metal/model.bin": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "model.gguf": b"GGUF",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with small_hub({"org/mini": {**WANTED, **UNWANTED}}) as running:
        yield running


def run_resolve(
    hub: Hub, home: Path, name: str = "org/mini", *, before: str = "", options: str = "", **env: str
) -> dict[str, str]:
    """resolve(name) in another process, because huggingface_hub reads its environment when it is imported."""
    code = f"""
import json, sys
{before}
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.loading.hub import resolve
try:
    print(json.dumps({{"path": str(resolve({name!r}{options}))}}))
except GptOssError as error:
    print(json.dumps({{"error": str(error), "kind": type(error).__name__}}))
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **settings, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)  # stdout must contain only the answer
    assert "\n" not in answer.get("error", "")
    return {**answer, "stderr": done.stderr}


def contents(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_downloads_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    assert contents(run_resolve(hub, tmp_path)["path"]) == WANTED
    assert hub.fetched() == sorted(WANTED)


def test_a_broken_connection_is_resumed(hub: Hub, tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    large = bytes(range(256)) * 2**16  # 16 MiB: the client saves pieces of 10 MiB
    hub.repos["org/mini"][name] = large
    hub.breaks[name] = 12 * 2**20
    assert contents(run_resolve(hub, tmp_path)["path"]) == {**WANTED, name: large}
    spans = [line for line in hub.fetched() if line.startswith(name)]
    assert spans[0] == name and len(spans) == 2
    assert 0 < int(spans[1].split("bytes=")[1].rstrip("-")) <= 12 * 2**20


def test_a_second_try_fetches_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.broken.add(name)
    failed = run_resolve(hub, tmp_path)
    assert "downloading org/mini failed" in failed["error"] and "run the same command again" in failed["error"]
    hub.broken.clear()
    hub.log.clear()
    done = run_resolve(hub, tmp_path)
    assert name in hub.fetched() and "model-00001-of-00002.safetensors" not in hub.fetched()
    assert contents(done["path"]) == WANTED


def test_the_cached_copy_is_used_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = run_resolve(hub, tmp_path)["path"]
    hub.log.clear()
    assert run_resolve(hub, tmp_path)["path"] == path
    assert hub.fetched() == []
    hub.down = True
    assert run_resolve(hub, tmp_path)["path"] == path
    hub.log.clear()
    assert run_resolve(hub, tmp_path, HF_HUB_OFFLINE="1")["path"] == path
    assert hub.log == []
    assert run_resolve(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")["path"] == path


def test_neither_hub_nor_cache(hub: Hub, tmp_path: Path) -> None:
    for env in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        answer = run_resolve(hub, tmp_path, **env)
        assert answer["error"].startswith("org/mini is not, or not completely, in the cache at " + str(tmp_path))
        assert "the hub cannot be reached" in answer["error"]
    hub.down = True
    assert "the hub cannot be reached" in run_resolve(hub, tmp_path)["error"]


def test_half_a_copy_in_the_cache_is_not_taken_for_a_whole_one(hub: Hub, tmp_path: Path) -> None:
    path = Path(run_resolve(hub, tmp_path)["path"])
    (path / "model-00002-of-00002.safetensors").unlink()
    assert "not completely" in run_resolve(hub, tmp_path, HF_HUB_OFFLINE="1")["error"]
    for file in path.glob("*.safetensors"):
        file.unlink()
    for listing in path.parents[1].glob("trees/*"):
        listing.unlink()  # as other programs and older releases leave it
    assert "not completely" in run_resolve(hub, tmp_path, HF_HUB_OFFLINE="1")["error"]


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    assert contents(run_resolve(hub, tmp_path, "org/mini@v2")["path"]) == WANTED
    assert contents(run_resolve(hub, tmp_path, f"org/mini@{COMMIT}")["path"]) == WANTED
    assert "org/mini has no revision 'v9'" in run_resolve(hub, tmp_path, "org/mini@v9")["error"]


def test_repositories_that_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    missing = run_resolve(hub, tmp_path, "models/gpt-oss")["error"]
    assert missing.startswith("there is no folder 'models/gpt-oss' here and no such model at " + hub.url)
    hub.gated.add("org/mini")
    gated = run_resolve(hub, tmp_path)["error"]
    assert gated.startswith("org/mini is gated") and "hf auth login" in gated
    assert "is not a hub id" in run_resolve(hub, tmp_path, "org/a--b")["error"]


def test_repositories_of_the_wrong_kind(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/gguf"] = {"a-q4.gguf": b"GGUF", "a-q8.gguf": b"GGUF", "config.json": b"{}"}
    answer = run_resolve(hub, tmp_path, "org/gguf")
    assert answer["kind"] == "CheckpointError"
    assert "only GGUF files (a-q4.gguf, a-q8.gguf)" in answer["error"] and "hf download org/gguf" in answer["error"]
    hub.repos["org/torch"] = {"pytorch_model.bin": b"", "config.json": b"{}"}
    assert "only pytorch_model.bin" in run_resolve(hub, tmp_path, "org/torch")["error"]
    hub.repos["org/text"] = {"README.md": b"hello"}
    assert "no other weights" in run_resolve(hub, tmp_path, "org/text")["error"]
    assert all(not name.endswith((".gguf", ".bin")) for name in hub.fetched())


def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    full = (
        "import errno, huggingface_hub.file_download as d\n"
        "def http_get(*args, **options): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "d.http_get = http_get"
    )
    error = run_resolve(hub, tmp_path, before=full)["error"]
    assert error.startswith(f"the disk is full: org/mini does not fit into {tmp_path}") and "HF_HOME" in error


def test_progress_goes_to_stderr_and_can_be_switched_off(hub: Hub, tmp_path: Path) -> None:
    shown = {"TQDM_POSITION": "-1"}  # makes huggingface_hub show bars although stderr is not a terminal
    assert "Fetching" in run_resolve(hub, tmp_path / "a", **shown)["stderr"]
    assert "Fetching" not in run_resolve(hub, tmp_path / "b", options=", progress=False", **shown)["stderr"]


def test_what_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(gguf)) == gguf
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize("name", ["./models/x", "/models/x", "../x", "~/nowhere/x", "a/b/c", Path("org/name"), "a\\b"])
def test_a_path_that_is_not_there_is_not_looked_up(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder or \.gguf file"):
        resolve(name)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "org/name@", "@v1", "org/na me", "org/näme", "http:"])
def test_a_name_that_is_neither_path_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="named org/name or org/name@revision"):
        resolve(name)


def test_an_empty_name_and_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="empty"):
        resolve("")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf file"):
        resolve(file)
