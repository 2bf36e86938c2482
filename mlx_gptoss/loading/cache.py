"""The hub's cache: what a download would take, a download that survives the end of its process, its check, removal.

huggingface_hub starts a file again from its beginning if its process was killed. A file here continues instead: it is
written to `blobs/DIGEST.incomplete` and gets the name under which huggingface_hub looks for it once it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import CheckpointError, GptOssError
from . import hub
from .memory import gigabytes

PIECE = 1 << 22  # bytes hashed at a time

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the file


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub. digest: SHA-256 of a large file (LFS), git's SHA-1 of a small one; its name in `blobs/`."""

    name: str
    size: int
    digest: str
    large: bool


@dataclass(frozen=True)
class Download:
    """What downloading a repository takes, before anything is downloaded.

    name: as it was given, with the revision. commit: what that revision is now. folder: of the repository in the cache.
    files: those that loading needs.
    """

    name: str
    repo: str
    commit: str
    folder: Path
    files: tuple[RemoteFile, ...]

    @property
    def missing(self) -> tuple[RemoteFile, ...]:
        """The files that are not in the cache."""
        return tuple(file for file in self.files if not (self.blob(file).exists() or self.path(file).exists()))

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes still to download; those of files that were begun are not among them."""
        return sum(file.size - min(file.size, self.begun_bytes(file)) for file in self.missing)

    @property
    def free_bytes(self) -> int:
        """Free bytes on the disk of the cache."""
        folder = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(folder).free

    def path(self, file: RemoteFile) -> Path:
        return self.folder / "snapshots" / self.commit / file.name

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def begun_bytes(self, file: RemoteFile) -> int:
        """Bytes of the file that an interrupted download has left."""
        try:
            return self.partial(file).stat().st_size if file.large else 0
        except OSError:
            return 0


def plan_download(name: str) -> Download:
    """Ask the hub what `org/name` or `org/name@revision` consists of.

    Raises CheckpointError for a name that is no repository's and for a repository without weights that are read, and
    GptOssError if the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    match = hub.REPO_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r} is not a hub id; give one such as openai/gpt-oss-20b or org/name@revision")
    repo, revision = match["repo"], match["revision"]
    try:
        commit = HfApi().repo_info(repo, revision=revision).sha
        entries = list(HfApi().list_repo_tree(repo, revision=commit))
    except Exception as error:  # from the hub or the network
        raise GptOssError(hub.explain(repo, revision, error)) from error
    files = tuple(
        RemoteFile(each.path, each.size, each.lfs.sha256 if each.lfs else each.blob_id, each.lfs is not None)
        for each in entries
        if isinstance(each, RepoFile) and hub.is_needed(each.path)
    )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise hub.without_weights(repo, revision)
    return Download(name, repo, str(commit), _folder(repo), files)


def require_space(download: Download) -> None:
    """Raise GptOssError if what is missing does not fit on the disk."""
    if download.missing_bytes > download.free_bytes:
        raise GptOssError(
            f"{download.repo} needs {gigabytes(download.missing_bytes)} more on the disk of {download.folder.parent}, "
            f"and {gigabytes(download.free_bytes)} are free; free some space there or set HF_HOME"
        )


def fetch(download: Download, progress: Progress) -> Path:
    """Download what is missing, and return the local folder. Raises GptOssError for a failed download."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    missing, total = download.missing, download.total_bytes
    done = total - sum(file.size for file in missing)
    disable_progress_bars("huggingface_hub.http_get")
    try:
        for file in missing:
            if file.large:
                _continue_file(download, file, partial(_shifted, progress, done, total, file.name))
                done += file.size
                progress(done, total, file.name)
    except Exception as error:  # from the hub, the network or the disk
        raise GptOssError(hub.explain(download.repo, None, error)) from error
    finally:
        enable_progress_bars("huggingface_hub.http_get")
    return hub.resolve(download.name, progress=False)


def _shifted(progress: Progress, before: int, total: int, name: str, size: int) -> None:
    """Report the size of one file as that of all, after `before` bytes of others."""
    progress(before + size, total, name)


def _continue_file(download: Download, file: RemoteFile, progress: Callable[[int], None]) -> None:
    """Download the rest of a large file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]

    url = hf_hub_url(download.repo, file.name, revision=download.commit)
    headers = build_hf_headers()
    begun, blob = download.partial(file), download.blob(file)
    begun.parent.mkdir(parents=True, exist_ok=True)
    with _lock(download.folder, file.digest):
        if blob.exists():  # another process has downloaded it
            return
        location = get_hf_file_metadata(url).location
        if urlsplit(location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # is for the hub, not for its storage
        with begun.open("r+b" if begun.exists() else "w+b", buffering=0) as stream:
            if stream.seek(0, os.SEEK_END) > file.size:
                stream.truncate(0)
                stream.seek(0)
            counted: Any = _Counted(stream, progress)
            http_get(location, counted, resume_size=stream.tell(), headers=headers, expected_size=file.size)
        begun.replace(blob)


class _Counted:
    """A file that reports its size after each write."""

    def __init__(self, stream: Any, progress: Callable[[int], None]) -> None:
        self._stream, self._progress = stream, progress

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._progress(self._stream.tell())
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _lock(folder: Path, digest: str) -> Iterator[None]:
    """huggingface_hub's own lock on a blob, so that two programs do not write to it at once."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined, unused-ignore]

    path = folder.parent / ".locks" / folder.name / f"{digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield


def verify(download: Download, progress: Progress) -> None:
    """Compare size and digest of every file with the hub's.

    A file that differs is removed, so that the next download fetches it again. Raises GptOssError that names it.
    """
    done, total, wrong = 0, download.total_bytes, []
    for file in download.files:
        path = download.path(file)
        progress(done, total, file.name)
        if not _is_intact(path, file, partial(_shifted, progress, done, total, file.name)):
            wrong.append(file.name)
            for each in (download.blob(file), path):
                each.unlink(missing_ok=True)
        done += file.size
    progress(total, total, "")
    if wrong:
        raise GptOssError(
            f"{download.repo}: {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} did not arrive as the "
            "hub has it, and was removed; run the same command again to download it again"
        )


def _is_intact(path: Path, file: RemoteFile, progress: Callable[[int], None]) -> bool:
    try:
        if path.stat().st_size != file.size:
            return False
        digest = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % file.size)
        with path.open("rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
                progress(stream.tell())
        return digest.hexdigest() == file.digest
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Removal:
    """What removing a repository from the cache takes away. revisions: commits. size_bytes: what it frees."""

    repo: str
    folder: Path
    revisions: tuple[str, ...]
    size_bytes: int
    strategy: Any  # huggingface_hub's DeleteCacheStrategy; None for a download that has no complete file

    def execute(self) -> None:
        """Remove it. Raises GptOssError if it is still there afterwards."""
        if self.strategy is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.strategy.execute()
        if self.folder.exists():
            raise GptOssError(f"{self.folder} could not be removed completely; check its permissions")


def plan_removal(repo: str) -> Removal:
    """What is in the cache of a repository, in all revisions.

    Raises CheckpointError if there is nothing, and GptOssError for a folder that does not lie in the cache itself.
    """
    from huggingface_hub import scan_cache_dir

    if not hub.REPO_ID.fullmatch(repo) or "@" in repo:
        raise CheckpointError(f"{repo!r} is not a hub id such as openai/gpt-oss-20b; only the hub's cache is cleared")
    cache, folder = hub.cache_folder(), _folder(repo)
    if not folder.is_dir():
        raise CheckpointError(f"{repo} is not in the cache at {cache}; `mlx-gptoss list` names what is")
    if folder.is_symlink() or folder.resolve().parent != cache.resolve():
        raise GptOssError(f"{folder} leads out of the cache at {cache}; remove it yourself")
    found = next((each for each in scan_cache_dir(cache).repos if each.repo_path.resolve() == folder.resolve()), None)
    if found is None:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return Removal(repo, folder, (), size, None)
    revisions = tuple(sorted(revision.commit_hash for revision in found.revisions))
    strategy = scan_cache_dir(cache).delete_revisions(*revisions)
    outside = [path for path in (*strategy.repos, *strategy.blobs) if cache.resolve() not in path.resolve().parents]
    if outside:
        raise GptOssError(f"{outside[0]} lies outside the cache at {cache}; remove it yourself")
    return Removal(repo, folder, revisions, strategy.expected_freed_size, strategy)


def _folder(repo: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return hub.cache_folder() / str(repo_folder_name(repo_id=repo, repo_type="model"))
