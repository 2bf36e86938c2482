"""Which files make up a checkpoint on disk. The files may come from anywhere, so nothing in them is trusted.

A checkpoint consists of direct children of its folder. A child may be a link, but only into the folder itself or into
the `blobs` folder of a hub cache (`../../blobs` in huggingface-hub's layout). Names in an index must be plain file
names. The sizes of config.json and of the index, and the number of tensors, are limited. No pickle is ever opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..untrusted.json_file import parse_json, read_file
from .safetensors import INDEX, MAX_ITEMS, MappedFile

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of an adapter, not a checkpoint
MAX_JSON_BYTES = 16 * 2**20
MAX_PARTS = 1000  # of a split GGUF model
MAX_TENSORS = 100_000  # 120b with five tensors for each module of each expert has 70,000


def find_gguf(path: Path) -> Path | None:
    """The GGUF file at `path`, or the one in the folder `path` if that has no other checkpoint; None if there is none.

    Of a split file, the path of any part is returned as it is, and a folder gives the first part. Raises
    CheckpointError if a folder has several GGUF models.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / "original").is_dir():
        return None
    found = sorted(part for part in path.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", part.stem))
    if len(found) > 1:
        names = ", ".join(part.name for part in found[:4])
        raise CheckpointError(f"{path} holds {len(found)} GGUF models ({names}); give the path of one file")
    return child(path.resolve(), found[0].name) if found else None


def gguf_parts(path: Path) -> list[Path]:
    """All files of a split GGUF model by the path of any of them; else the path alone."""
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not split or not int(split[2]):
        return [path]
    if int(split[2]) > MAX_PARTS:
        raise CheckpointError(f"{path} is one of {int(split[2])} parts; no gpt-oss model has more than {MAX_PARTS}")
    return [child(path.parent.resolve(), f"{split[1]}-{n + 1:05d}-of-{split[2]}.gguf") for n in range(int(split[2]))]


def find_folder(path: Path) -> Path:
    """The folder of a safetensors checkpoint: `path`, or its `original/` folder if it has no tensors itself.

    Raises CheckpointError if there is no checkpoint.
    """
    if not path.is_dir():
        what = "is a file; give its folder, or a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}")
    path = path.resolve()
    if is_adapter_folder(path):
        raise CheckpointError(
            f"{path} is a LoRA adapter: load the model it was trained on, and the adapter with --adapter NAME={path} "
            "or load(model, adapters={...})"
        )
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    pickles = sorted(child.name for kind in ("*.bin", "*.pt", "*.pth") for child in path.glob(kind))
    if (path / "config.json").is_file() and pickles:
        raise CheckpointError(
            f"{path} has its weights in a pickle ({pickles[0]}), which can run any code and is never opened: save the "
            "model as safetensors (save_pretrained does, with torchao 0.15 or later), or use the original checkpoint"
        )
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path} has a config.json but no .safetensors file; download the weights too")
    raise CheckpointError(f"{path} is not a checkpoint: it has no config.json and .safetensors files")


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no model."""
    return not (path / "config.json").exists() and any((path / name).exists() for name in ADAPTER_FILES)


def map_shards(folder: Path) -> list[MappedFile]:
    """Map the safetensors files of a folder: those of its index, or without an index all of them.

    Raises CheckpointError for a malformed index, a file that is missing or not a direct child, an index that does not
    match the shards, and more than MAX_TENSORS tensors.
    """
    index = _read_index(folder)
    files, tensors = [], 0
    for name in _shard_names(folder, index):
        file = MappedFile(child(folder, name))
        tensors += len(file.header.tensors)
        if tensors > MAX_TENSORS:
            raise CheckpointError(f"{folder} has more than {MAX_TENSORS} tensors; no gpt-oss checkpoint does")
        files.append(file)
    if index is not None:
        _check_index(index, files)
    return files


def files_by_tensor(files: Iterable[MappedFile]) -> dict[str, MappedFile]:
    """The file of each tensor, by the tensor's name. Raises CheckpointError if a tensor is in two files."""
    found: dict[str, MappedFile] = {}
    for file in files:
        for name in file.header.tensors:
            if name in found:
                both = f"{found[name].path.name} and {file.path.name}"
                raise CheckpointError(f"{name} is in both {both}; remove the file that does not belong here")
            found[name] = file
    return found


def child(folder: Path, name: str) -> Path:
    """The path of a direct child of a folder. Raises CheckpointError for any other name, and for a missing file.

    If the child is a link, it must lead into the folder itself or into a hub cache's `blobs`.
    """
    is_plain = name.isprintable() and 0 < len(name) < 200 and not {"/", "\\"} & set(name) and name not in (".", "..")
    if not is_plain:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name; the checkpoint may be malicious")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder} lacks {name}; download the checkpoint again")
    target = path.resolve()
    allowed = [folder, *(parent / "blobs" for parent in list(folder.parents)[1:3])]
    if not target.is_file() or not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is not a file of its folder (it leads to {target}); copy the file there")
    return path


def read_json(folder: Path, name: str) -> Any:
    """Parse a JSON file of a folder. Raises CheckpointError if it is missing, too large or not JSON."""
    return parse_json(read_bytes(folder, name, MAX_JSON_BYTES), str(folder / name), MAX_ITEMS)


def read_bytes(folder: Path, name: str, max_bytes: int) -> bytes:
    """The content of a file of a folder. Raises CheckpointError if it is missing, too large or leads elsewhere."""
    return read_file(child(folder, name), max_bytes)


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's weight_map (tensor name -> file name); None if there is no index."""
    if not (folder / INDEX).exists():
        return None
    data = read_json(folder, INDEX)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    is_valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not weight_map or not is_valid:
        raise CheckpointError(f"{folder / INDEX} has no weight_map of names; download the file again")
    return dict(weight_map)


def _shard_names(folder: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        return sorted(set(index.values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _check_index(index: Mapping[str, str], files: Iterable[MappedFile]) -> None:
    found = {name: file.path.name for file in files for name in file.header.tensors}
    wrong = sorted(name for name in index.keys() | found.keys() if index.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"the index and the shards disagree about {len(wrong)} tensors ({', '.join(map(repr, wrong[:4]))}...); "
            "they come from different downloads: download the checkpoint again"
        )
