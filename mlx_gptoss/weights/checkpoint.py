"""A checkpoint opened for reading: its format told from its headers, its weights handed over lazily, one by one.

Files are trusted with nothing: a checkpoint consists of its folder's direct children, which may be links only into the
folder itself or into a hub cache's `blobs` (`../../blobs`, as huggingface-hub lays it out); names in an index must be
plain file names; config.json and the index are limited in size; a pickle is never opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import ModelConfig, read_config, token_ids
from ..errors import CheckpointError
from ..tokenizer import Tokenizer
from . import codecs, gguf
from .formats import Binding, bind, gguf_metadata
from .formats.base import CheckpointHeaders, Source
from .formats.modelopt import fake_quantized_note
from .params import Param, Role, parameters
from .safetensors import MappedFile, TensorInfo, parse_json
from .tensor import Array, Dense, Spec, Weight, Weights

INDEX = "model.safetensors.index.json"
MAX_JSON = 16 * 2**20
MAX_TENSORS = 100_000  # 120b with five tensors for each module of each expert has 70,000
ROLES: tuple[Role, ...] = ("attention", "experts", "router", "embed", "lm_head")


@dataclass(frozen=True)
class Summary:
    """What headers alone tell. roles: of each role's matrices, {"format": name, "bits": bits a weight}.

    note: what else a user should know, in one line; mostly nothing.
    """

    format: str
    parameters: int
    size_bytes: int
    bits_per_weight: float
    roles: Mapping[str, Mapping[str, Any]]
    note: str = ""


class Readable(Weights, Protocol):
    """What Checkpoint has in common with weights that lie in no file: enough to plan, load and write them."""

    format: str
    params: tuple[Param, ...]
    size_bytes: int
    stop_ids: tuple[int, ...]

    def read(self, name: str, rows: range | None = None) -> Weight: ...
    def stored_as(self, name: str) -> tuple[Spec | None, str | None]: ...
    def matrix_bytes(self, role: Role) -> int: ...
    def release(self, weight: Weight | None = None) -> None: ...
    def fingerprint(self) -> list[list[Any]]: ...


class Checkpoint:
    """One checkpoint on disk. Weights are views of mapped files until something computes with them.

    embedded: makes the files (tokenizer.json, ...; name -> text) that a GGUF file has inside; None if they are beside.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        files: Iterable[MappedFile],
        raw: Mapping[str, Any],
        embedded: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.embedded = embedded
        self._files = tuple(files)
        self._holder = _one_file_each(self._files)
        self.tensors: Mapping[str, TensorInfo] = {n: f.header.tensors[n] for n, f in self._holder.items()}
        self.params: tuple[Param, ...] = parameters(config)
        self._binding: Binding = bind(CheckpointHeaders(self.tensors, config, raw), self.params)
        self.format = self._binding.name
        self.size_bytes = sum(info.nbytes for info in self.tensors.values())
        self.generation: Mapping[str, Any] = {} if embedded else _generation_config(self.tokenizer_folder)
        self.stop_ids = token_ids(self.generation.get("eos_token_id"), "eos_token_id") or config.eos_token_id

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer.json and generation_config.json are: for OpenAI's `original/`, one folder up."""
        parent = self.folder.parent
        above = not (self.folder / "tokenizer.json").exists() and (parent / "tokenizer.json").exists()
        return parent if above and self.format == "mxfp4-original" else self.folder

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the weights; None if none did. Raises CheckpointError if it cannot be read."""
        if self.embedded is None:
            folder = self.tokenizer_folder
            return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        text = self.embedded().get("tokenizer.json")
        return None if text is None else Tokenizer.from_text(text, f"of {self._files[0].path}")

    def read(self, name: str, rows: range | None = None) -> Weight:
        """The weight of a parameter by its canonical name, exact; its scales are read and checked, its codes not.

        rows: of its first axis (experts, where it has such), those wanted; nothing of the others is read.
        Raises CheckpointError if a scale is NaN, KeyError for a name that no parameter has.
        """
        source = self._binding.sources[name]
        if rows is None:
            weight = source.load(self._get)
        elif source.load_experts is not None:
            weight = source.load_experts(self._get, rows)
        else:
            weight = codecs.rows(source.load(self._get), rows.start, rows.stop)
        codecs.check_scales(weight, name)
        self._release_copied(source, weight)
        return weight

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """The spec of a parameter's numbers and the dtype of its float scales, if it has such; from headers only."""
        source = self._binding.sources[name]
        return source.spec, self.tensors[source.scale_tensor].dtype if source.scale_tensor else None

    def matrix_bytes(self, role: Role) -> int:
        """Of all stored tensors that a role's matrices are read from."""
        sources = [self._binding.sources[param.name] for param in self.params if param.role == role and param.is_matrix]
        return sum(
            self.tensors[name].nbytes for name in {tensor.name for source in sources for tensor in source.expected}
        )

    def weights(self) -> Iterator[tuple[Param, Weight]]:
        """Every parameter with its weight, in network order."""
        for param in self.params:
            yield param, self.read(param.name)

    def release(self, weight: Weight | None = None) -> None:
        """Drop the pages of a weight that has been copied (or all that are resident), so that a loader's peak stays
        near the size of its own copy. What is touched later is read from the file again."""
        if weight is None:
            for file in self._files:
                file.release_all()
            return
        for array in _arrays(weight):
            for file in self._files:
                file.release_array(array)

    def fingerprint(self) -> list[list[Any]]:
        """Name, size, time of the last change and the header's SHA-256 of each file, as JSON: another download or an
        edit makes another one."""
        found = []
        for file in self._files:
            state, header = file.path.stat(), file.header
            text = repr(sorted((name, repr(info), header.offsets[name]) for name, info in header.tensors.items()))
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append([file.path.name, state.st_size, state.st_mtime_ns, digest])
        return found

    def summary(self) -> Summary:
        """Format, sizes and bits a weight, over all and by role; from headers only."""
        count = sum(param.size for param in self.params)
        return Summary(
            format=self.format,
            parameters=count,
            size_bytes=self.size_bytes,
            bits_per_weight=8 * self.size_bytes / count,
            roles={role: self._role(role) for role in ROLES},
            note=self._binding.note or fake_quantized_note(self.format, self.folder),
        )

    def _role(self, role: Role) -> dict[str, Any]:
        matrices = [param for param in self.params if param.role == role and param.is_matrix]
        sources = [self._binding.sources[param.name] for param in matrices]
        kinds = sorted({_kind(source.spec, self.tensors[source.expected[0].name]) for source in sources})
        return {"format": "+".join(kinds), "bits": 8 * self.matrix_bytes(role) / sum(param.size for param in matrices)}

    def _release_copied(self, source: Source, weight: Weight) -> None:
        """Drop the pages of the stored tensors that the weight is not a view of, such as those of single experts."""
        arrays = _arrays(weight)
        for expected in source.expected:
            stored = self._get(expected.name)
            if not any(np.may_share_memory(stored, array) for array in arrays):
                self._holder[expected.name].release_array(stored)

    def _get(self, name: str) -> Array:
        return self._holder[name].get(name)


def open(path: Path | str) -> Checkpoint:
    """Open the checkpoint in a folder: its own tensors, or those of its `original/` folder if it has none; or a GGUF
    file, by its path or that of its folder.

    Raises CheckpointError, before any weight is read, for what is not a whole gpt-oss checkpoint.
    """
    path = Path(path)
    single = path if path.suffix == ".gguf" and path.is_file() else _gguf_of(path)
    if single is not None:
        return _open_gguf(single)
    folder = _folder_of(path)
    raw = read_json(folder, "config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object; download the checkpoint again")
    listed = _index(folder)
    files = _map(folder, _shard_names(folder, listed))
    if listed is not None:
        _hold_against_index(listed, files)
    _check_plausible(raw, sum(len(file.header.tensors) for file in files))
    return Checkpoint(folder, read_config(raw), files, raw)


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of a checkpoint's folder, parsed. Raises CheckpointError if it is missing, huge or not JSON."""
    path = child(folder, name)
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; no checkpoint's {name} is that long")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _arrays(weight: Weight) -> list[Array]:
    parts = [weight.values] if isinstance(weight, Dense) else [weight.codes, weight.scale, weight.bias, weight.outer]
    return [array for array in parts if array is not None]


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or all files of a split one by the path of any of them."""
    paths, folder = [path], path.parent.resolve()
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if split and int(split[2]):
        paths = [child(folder, f"{split[1]}-{n + 1:05d}-of-{split[2]}.gguf") for n in range(int(split[2]))]
    headers = [gguf.read_header(part) for part in paths]
    files = [MappedFile(part, header.tensors) for part, header in zip(paths, headers, strict=True)]
    tensors = {name: info for header in headers for name, info in header.tensors.tensors.items()}
    metadata = headers[0].metadata
    try:
        raw = gguf_metadata.config_json(metadata, tensors)
        _check_plausible(raw, len(tensors))
        config = read_config(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}, by its metadata: {error}") from error
    return Checkpoint(
        folder, config, files, raw, lambda: gguf_metadata.companion_files(gguf.read_header(paths[0]).metadata)
    )


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file in a folder that holds no other checkpoint; of a split one, the first."""
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / "original").is_dir():
        return None
    found = sorted(part for part in path.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", part.stem))
    if len(found) > 1:
        names = ", ".join(part.name for part in found[:4])
        raise CheckpointError(f"{path} holds {len(found)} GGUF models ({names}); give the path of one file")
    return child(path.resolve(), found[0].name) if found else None


def _folder_of(path: Path) -> Path:
    if not path.is_dir():
        what = "is a file; give the folder that it is in, or a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}")
    path = path.resolve()
    for folder in (path, path / "original"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path} has a config.json but no .safetensors file; download the weights too")
    raise CheckpointError(f"{path} is not a checkpoint: it has no config.json with .safetensors files beside it")


def child(folder: Path, name: str) -> Path:
    """The path of a direct child; a link must end in the folder itself or in a hub cache's `blobs`."""
    plain = name.isprintable() and 0 < len(name) < 200 and not {"/", "\\"} & set(name) and name not in (".", "..")
    if not plain:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name; the checkpoint may be hostile")
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder} lacks {name}; download the checkpoint again")
    target = path.resolve()
    homes = [folder, *(parent / "blobs" for parent in list(folder.parents)[1:3])]
    if not target.is_file() or not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is not a file of its folder (it leads to {target}); copy the file there")
    return path


def _index(folder: Path) -> dict[str, str] | None:
    """The index's weight_map, or None without an index."""
    if not (folder / INDEX).exists():
        return None
    data = read_json(folder, INDEX)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()) or not listed:
        raise CheckpointError(f"{folder / INDEX} has no weight_map of names; download the file again")
    return listed


def _shard_names(folder: Path, listed: Mapping[str, str] | None) -> list[str]:
    if listed is not None:
        return sorted(set(listed.values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _map(folder: Path, names: Iterable[str]) -> list[MappedFile]:
    """The shards, mapped; refuses more tensors than MAX_TENSORS before it reads on."""
    files, tensors = [], 0
    for name in names:
        file = MappedFile(child(folder, name))
        tensors += len(file.header.tensors)
        if tensors > MAX_TENSORS:
            raise CheckpointError(f"{folder} has more than {MAX_TENSORS} tensors; no gpt-oss checkpoint does")
        files.append(file)
    return files


def _hold_against_index(listed: Mapping[str, str], files: Iterable[MappedFile]) -> None:
    found = {name: file.path.name for file in files for name in file.header.tensors}
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"the index and the shards disagree about {len(wrong)} tensors ({', '.join(map(repr, wrong[:4]))}...); "
            "they belong to different downloads: download the checkpoint again"
        )


def _one_file_each(files: Iterable[MappedFile]) -> dict[str, MappedFile]:
    found: dict[str, MappedFile] = {}
    for file in files:
        for name in file.header.tensors:
            if name in found:
                both = f"{found[name].path.name} and {file.path.name}"
                raise CheckpointError(f"{name} is in both {both}; remove the file that does not belong")
            found[name] = file
    return found


def _check_plausible(raw: Mapping[str, Any], tensors: int) -> None:
    """Every layout stores well over ten tensors a layer; so a hostile config.json cannot ask for endless work."""
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers * 10 > tensors:
        raise CheckpointError(
            f"config.json says {layers} layers but there are only {tensors} tensors; "
            "a shard is missing or config.json belongs to another checkpoint"
        )


def _generation_config(folder: Path) -> Mapping[str, Any]:
    """generation_config.json, which says where generation ends and how the model is sampled; {} without one."""
    data = read_json(folder, "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / 'generation_config.json'} is not a JSON object; download it again")
    return data


_KINDS = {("e2m1", "e8m0"): "mxfp4", ("e2m1", "e4m3"): "nvfp4", ("e4m3", "e8m0"): "mxfp8", ("e4m3", "none"): "fp8"}


def _kind(spec: Spec | None, first: TensorInfo) -> str:
    """A short name of how numbers are stored: bf16, mxfp4, affine4-g64."""
    if spec is None:
        return first.dtype.lower()
    return _KINDS.get((spec.element, spec.scale)) or f"affine{spec.bits}-g{spec.group}"
