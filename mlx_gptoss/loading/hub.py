"""Resolve the name of a model, a path or a hub id, to a local path. Downloads only the files that loading needs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, GptOssError

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config*.json",
    "generation_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.tiktoken",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
IGNORED_FILES = ("*/*",)  # folders: original/ and metal/ contain the same weights again

NANO = Path(__file__).parents[1] / "nano"  # the bundled model
NANO_ALIAS = "nano"  # its name; a folder of this name is ./nano
NANO_NAME = "mlx-gptoss-nano"  # its name in the server's API
HOME_VARIABLE = "MLX_GPTOSS_HOME"  # folders of models, which os.pathsep divides

RETRY_ADVICE = "run the same command again; finished files are kept"
REPO_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)


def resolve(path_or_repo_id: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """The local folder (or .gguf file) of a model, downloaded first if necessary.

    "nano" is the bundled model. Returns an existing folder or .gguf file unchanged, and takes a plain name from the
    folders of MLX_GPTOSS_HOME. Looks up `org/name` or `org/name@revision` on the Hugging Face
    hub: files in its cache are not downloaded again, an interrupted download is resumed, and without a network the
    cached copy is used. Progress bars go to stderr if it is a terminal.

    Raises CheckpointError for a path that does not exist or is not a model, and GptOssError for a failed download.
    """
    if not path_or_repo_id:
        raise CheckpointError("the model's name is empty; give a folder or a hub id such as openai/gpt-oss-20b")
    if path_or_repo_id in (NANO_ALIAS, NANO_NAME):
        return NANO
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file; give the folder that contains config.json")
    name = path_or_repo_id
    if not isinstance(name, str) or _looks_like_a_path(name):
        raise CheckpointError(f"there is no folder or .gguf file {str(name)!r}; check the path")
    if "/" not in name and (at_home := _at_home(name)) is not None:
        return at_home
    match = REPO_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"there is no folder {name!r} here, and a model on the hub is named org/name or org/name@revision, "
            "for example openai/gpt-oss-20b"
        )
    return _download(match["repo"], match["revision"], progress)


def resolve_adapter(path_or_repo_id: str | os.PathLike[str]) -> Path:
    """The local folder of a LoRA adapter, a folder or a hub id, downloaded first if necessary. Raises as resolve()."""
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder with adapter_config.json")
    match = REPO_ID.fullmatch(str(path_or_repo_id))
    if match is None or _looks_like_a_path(str(path_or_repo_id)):
        raise CheckpointError(f"there is no folder {str(path_or_repo_id)!r}; give an adapter's folder or its hub id")
    return _download(match["repo"], match["revision"], True, ADAPTER_FILES)


@dataclass(frozen=True)
class CachedRepository:
    """A repository in the hub's cache. path: of its main revision, or else of the latest. size_bytes: of all of them
    on the disk."""

    name: str
    path: Path
    size_bytes: int


def cached_repositories() -> list[CachedRepository]:
    """The repositories in the cache that may be models."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache_folder()).repos
    except (CacheNotFound, OSError):
        return []
    found = []
    for repo in sorted(repos, key=lambda each: each.repo_id):
        if repo.repo_type == "model" and repo.revisions:
            chosen = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            if (chosen.snapshot_path / "config.json").exists():
                found.append(CachedRepository(repo.repo_id, chosen.snapshot_path, repo.size_on_disk))
    return found


def is_needed(name: str) -> bool:
    """Whether loading needs this file of a repository."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES) and not any(
        fnmatch(name, pattern) for pattern in IGNORED_FILES
    )


def home_folders() -> list[Path]:
    """The folders that MLX_GPTOSS_HOME names."""
    return [Path(name).expanduser() for name in filter(None, os.environ.get(HOME_VARIABLE, "").split(os.pathsep))]


def _at_home(name: str) -> Path | None:
    """The model of this name in the folders of MLX_GPTOSS_HOME; the first one counts."""
    paths = (folder / name for folder in home_folders())
    return next((path for path in paths if (path / "config.json").is_file() or path.suffix == ".gguf"), None)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.split("@")[0].count("/") > 1


def _download(repo: str, revision: str | None, progress: bool, patterns: Sequence[str] = MODEL_FILES) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED_FILES),
            tqdm_class=None if progress else _silent_bars(),
        )
    except Exception as error:  # from the hub, the network or the disk: each is the user's to mend
        raise GptOssError(explain(repo, revision, error)) from error
    path = Path(folder)
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        raise without_weights(repo, revision)
    return path


def _silent_bars() -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]

    return Silent


def explain(repo: str, revision: str | None, error: Exception) -> str:
    """One line: why the download failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if _disk_is_full(error):
        folder = cache_folder()
        return (
            f"the disk is full: {repo} does not fit into {folder}; free some space there or set HF_HOME, and "
            f"{RETRY_ADVICE}"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {_page(repo)}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; {_page(repo)} lists its branches, tags and commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {repo!r} here and no such model at {_page(repo)}; check the spelling, "
            "and if it is private, log in with `hf auth login`"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a hub id: {_first_line(error)}"
    if status in (401, 403):
        return f"the hub refused access to {repo} ({status}); log in again with `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(repo, error.__cause__ or error)
    return f"downloading {repo} failed ({type(error).__name__}: {_first_line(error)}); {RETRY_ADVICE}"


def _unreachable(repo: str, error: BaseException) -> str:
    return (
        f"{repo} is not, or not completely, in the cache at {cache_folder()}, and the hub cannot be reached "
        f"({_first_line(error)}); check the connection and HF_HUB_OFFLINE, and {RETRY_ADVICE}"
    )


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk caused the error. The native downloader names that cause only in its message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def without_weights(repo: str, revision: str | None) -> GptOssError:
    """The error for a repository without *.safetensors files at its top level."""
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(repo, revision=revision)
    except Exception as error:  # offline, with only a part of the repository in the cache
        return GptOssError(_unreachable(repo, error))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return CheckpointError(
            f"{repo} has only GGUF files ({_some(ggufs)}); download one with `hf download {repo} {ggufs[0]}` "
            "and give the path of that file"
        )
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".npz"))]
    has = f"only {_some(weights)}" if weights else "and no other weights"
    return CheckpointError(f"{repo} has no *.safetensors file at its top level, {has}; choose another repository")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def cache_folder() -> Path:
    """The folder with the downloaded files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
