"""A checkpoint opened for reading: its format is recognized from its headers, and its weights are read one by one.

`open` finds the files (files.py), reads config.json, and asks the formats where each parameter is stored (formats/).
Weights are views of memory-mapped files. What was read can be released again, so that a loader needs little more memory
than its own copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..tokenizer import Tokenizer
from ..untrusted.tokenizer_file import MAX_BYTES as MAX_TOKENIZER_BYTES
from . import codecs, gguf
from .config_json import read_config, remarks, token_ids
from .files import files_by_tensor, find_folder, find_gguf, gguf_parts, map_shards, read_bytes, read_json
from .formats import Binding, bind, gguf_metadata
from .formats.base import CheckpointHeaders, Source
from .formats.modelopt import fake_quantized_note
from .gguf_blocks import BY_NAME, FLOAT16
from .params import MATRIX_ROLES, Param, Role, parameters
from .safetensors import MappedFile, TensorInfo
from .tensor import Array, Spec, Weight, Weights, storage_name

PREFIXES = ("language_model.", "base_model.model.", "module.")  # of multimodal wrappers, PEFT, and data parallelism


@dataclass(frozen=True)
class Summary:
    """What the headers of a checkpoint say.

    format: its name, such as "mxfp4" or "mlx-4bit".
    parameters: number of weights.
    bits_per_weight: stored bits over the number of weights.
    roles: for the matrices of each role, {"format": name, "bits": bits per weight}.
    note: one line on what else a user should know; usually empty.
    """

    format: str
    parameters: int
    size_bytes: int
    bits_per_weight: float
    roles: Mapping[str, Mapping[str, Any]]
    note: str = ""


class CheckpointLike(Weights, Protocol):
    """What Checkpoint, Synthetic and RankWeights have in common: enough to plan, load and convert a model.

    The methods are documented in Checkpoint.
    """

    format: str
    params: tuple[Param, ...]
    size_bytes: int
    stop_ids: tuple[int, ...]

    def read(self, name: str, rows: range | None = None) -> Weight: ...
    def stored_as(self, name: str) -> tuple[Spec | None, str | None]: ...
    def scale_dtype(self, name: str) -> str | None: ...
    def matrix_bytes(self, role: Role) -> int: ...
    def unpacked_bytes(self, name: str) -> int: ...
    def release(self, weight: Weight | None = None) -> None: ...
    def fingerprint(self) -> list[list[Any]]: ...


def open(path: Path | str) -> Checkpoint:
    """Open the checkpoint in a folder, or a GGUF model by its file or folder.

    If the folder has no tensors itself, its `original/` folder is opened. Raises CheckpointError, before any weight is
    read, if the files are not a complete gpt-oss checkpoint.
    """
    path = Path(path)
    gguf_path = find_gguf(path)
    return _open_folder(find_folder(path)) if gguf_path is None else _open_gguf(gguf_path)


class Checkpoint:
    """One checkpoint on disk. Weights are views of memory-mapped files.

    folder: the folder of its files.
    config: the model's config.
    format: the name of the format.
    params: all parameters, in network order.
    tensors: name -> dtype and shape of every stored tensor.
    size_bytes: size of all stored tensors.
    stop_ids: tokens that end a generation.
    generation_config: the content of generation_config.json; {} if there is none.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        files: Iterable[MappedFile],
        raw_config: Mapping[str, Any],
        embedded_files: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """raw_config: config.json as parsed. embedded_files: extracts the files (name -> text) inside a GGUF file.

        Raises CheckpointError if tensors are missing, unknown or have another shape or dtype than the format says.
        """
        self.folder = folder
        self.config = config
        self._embedded_files = embedded_files
        self._files = tuple(files)
        stored = files_by_tensor(self._files)
        prefix = _common_prefix(stored)
        self._file_of = {name[len(prefix) :]: (file, name) for name, file in stored.items()}
        self.tensors: Mapping[str, TensorInfo] = {n: f.header.tensors[s] for n, (f, s) in self._file_of.items()}
        self.params: tuple[Param, ...] = parameters(config)
        metadata = {key.removeprefix(prefix): text for f in self._files for key, text in f.header.metadata.items()}
        headers = CheckpointHeaders(self.tensors, config, raw_config, metadata)
        self._binding: Binding = bind(headers, self.params)
        self._remarks = remarks(raw_config)
        self.format: str = self._binding.name
        self.size_bytes: int = sum(info.nbytes for info in self.tensors.values())
        self.generation_config: Mapping[str, Any] = (
            _read_generation_config(self.tokenizer_folder) if embedded_files is None else {}
        )
        self.stop_ids: tuple[int, ...] = (
            token_ids(self.generation_config.get("eos_token_id"), "eos_token_id") or config.eos_token_id
        )

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of tokenizer.json and generation_config.json. For OpenAI's `original/` it is the parent folder."""
        parent = self.folder.parent
        is_above = not (self.folder / "tokenizer.json").exists() and (parent / "tokenizer.json").exists()
        return parent if is_above and self.format == "mxfp4-original" else self.folder

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the weights; None if there is none.

        Raises CheckpointError if it cannot be read.
        """
        embedded = self.embedded_files()
        if embedded is None:
            folder, name = self.tokenizer_folder, "tokenizer.json"
            if not os.path.lexists(folder / name):
                return None
            return Tokenizer.from_bytes(read_bytes(folder, name, MAX_TOKENIZER_BYTES), str(folder / name))
        text = embedded.get("tokenizer.json")
        return (
            None
            if text is None
            else Tokenizer.from_bytes(text.encode("utf-8", "surrogatepass"), f"of {self._files[0].path}")
        )

    def embedded_files(self) -> Mapping[str, str] | None:
        """The files (name -> text) that a GGUF file contains, such as tokenizer.json; None for other formats."""
        return self._embedded_files() if self._embedded_files else None

    def read(self, name: str, rows: range | None = None) -> Weight:
        """The weight of a parameter by its canonical name, exactly as stored.

        Its scales are read and checked. Its values or codes are not read before they are used.

        rows: the part of the first axis to return (experts, for a parameter of experts). No other part is read.
        Raises CheckpointError if a scale is NaN or infinite, KeyError for an unknown name.
        """
        source = self._binding.sources[name]
        if rows is None:
            weight = source.load(self._get)
        elif source.load_experts is not None:
            weight = source.load_experts(self._get, rows)
        else:
            weight = source.load(self._get)[rows.start : rows.stop]
        codecs.check_scales(weight, name)
        self._release_copied(source, weight)
        return weight

    def weights(self) -> Iterator[tuple[Param, Weight]]:
        """Every parameter with its weight, in network order."""
        for param in self.params:
            yield param, self.read(param.name)

    def release(self, weight: Weight | None = None) -> None:
        """Drop the pages of a weight from memory, or all pages if `weight` is None. They are read again when needed.

        A loader that releases each weight after copying it peaks near the size of its own copy.
        """
        if weight is None:
            for file in self._files:
                file.release_all()
            return
        for array in weight.arrays:
            for file in self._files:
                file.release_array(array)

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """The Spec of a parameter (None if dense) and the safetensors dtype of its float scales (None without such).

        From headers only.
        """
        source = self._binding.sources[name]
        return source.spec, source.scale_dtype

    def scale_dtype(self, name: str) -> str | None:
        """The safetensors dtype of a parameter's float scales as they are read; None without such. From headers only.

        GGUF's have no tensor of their own, and are F16 unless the type's do not fit."""
        source = self._binding.sources[name]
        if source.spec is None or source.spec.scale != "float":
            return None
        kind = BY_NAME.get(self.tensors[source.expected[0].name].blocks)
        return self.stored_as(name)[1] if kind is None else "F16" if kind.scale_dtype == FLOAT16 else "F32"

    def unpacked_bytes(self, name: str) -> int:
        """Bytes that a parameter takes in memory beyond those stored, where it is read in another storage."""
        source = self._binding.sources[name]
        shared = 0
        if name == "lm_head.weight" and source.expected == self._binding.sources["embed.weight"].expected:
            shared = sum(self.tensors[expected.name].nbytes for expected in source.expected)  # tied, but loaded twice
        if source.memory_bits is None:
            return shared
        size = next(param.size for param in self.params if param.name == name)
        bits = source.stored_bits
        if bits is None:
            kind = BY_NAME[self.tensors[source.expected[0].name].blocks]
            bits = 8 * kind.size / kind.values
        return shared + int(size * (source.memory_bits - bits) / 8)

    def matrix_bytes(self, role: Role) -> int:
        """Size in bytes of all stored tensors that the matrices of a role are read from."""
        sources = [self._binding.sources[param.name] for param in self._matrices(role)]
        return sum(
            self.tensors[name].nbytes for name in {expected.name for source in sources for expected in source.expected}
        )

    def fingerprint(self) -> list[list[Any]]:
        """An identity of the files, as JSON: the name, size, modification time and header SHA-256 of each.

        Another download or an edit changes it.
        """
        found = []
        for file in self._files:
            state, header = file.path.stat(), file.header
            text = repr(sorted((name, repr(info), header.offsets[name]) for name, info in header.tensors.items()))
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append([file.path.name, state.st_size, state.st_mtime_ns, digest])
        return found

    def summary(self) -> Summary:
        """Format, sizes and bits per weight, in total and by role. From headers only."""
        count = sum(param.size for param in self.params)
        return Summary(
            format=self.format,
            parameters=count,
            size_bytes=self.size_bytes,
            bits_per_weight=8 * self.size_bytes / count,
            roles={role: self._role_summary(role) for role in MATRIX_ROLES},
            note="; ".join(filter(None, (fake_quantized_note(self.format, self.folder), *self.notes))),
        )

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the files were read, one line each."""
        return [*filter(None, [self._binding.note]), *self._remarks]

    def _role_summary(self, role: Role) -> dict[str, Any]:
        sources = [self._binding.sources[param.name] for param in self._matrices(role)]
        names = sorted({_stored_as(source, self.tensors) for source in sources})
        count = sum(param.size for param in self._matrices(role))
        return {"format": "+".join(names), "bits": 8 * self.matrix_bytes(role) / count}

    def _matrices(self, role: Role) -> list[Param]:
        return [param for param in self.params if param.role == role and param.is_matrix]

    def _release_copied(self, source: Source, weight: Weight) -> None:
        """Drop the pages of stored tensors that the weight is a copy of, such as tensors of single experts."""
        for expected in source.expected:
            stored = self._get(expected.name)
            if not any(np.may_share_memory(stored, array) for array in weight.arrays):
                self._file_of[expected.name][0].release_array(stored)

    def _get(self, name: str) -> Array:
        file, stored_name = self._file_of[name]
        return file.get(stored_name)


def _common_prefix(names: Iterable[str]) -> str:
    """The first of PREFIXES that begins every name, or "". Tools put one before models that they wrap."""
    names = list(names)
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), "")


def _open_folder(folder: Path) -> Checkpoint:
    raw = read_json(folder, "config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object; download the checkpoint again")
    files = map_shards(folder)
    _check_layer_count(raw, sum(len(file.header.tensors) for file in files))
    return Checkpoint(folder, read_config(raw), files, raw)


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF model by the path of its file, or of any part if it is split."""
    paths = gguf_parts(path)
    headers = [gguf.read_header(part) for part in paths]
    files = [MappedFile(part, header.tensors) for part, header in zip(paths, headers, strict=True)]
    tensors = {name: info for header in headers for name, info in header.tensors.tensors.items()}
    try:
        raw = gguf_metadata.config_json(headers[0].metadata, tensors)
        _check_layer_count(raw, len(tensors))
        config = read_config(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}, by its metadata: {error}") from error

    def embedded_files() -> Mapping[str, str]:
        return gguf_metadata.companion_files(gguf.read_header(paths[0]).metadata)

    return Checkpoint(path.parent.resolve(), config, files, raw, embedded_files)


def _check_layer_count(raw: Mapping[str, Any], tensors: int) -> None:
    """Raise CheckpointError if a config has more layers than its tensors can make.

    Every layout stores well over ten tensors per layer. So a malicious config.json cannot cause endless work.
    """
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers * 10 > tensors:
        raise CheckpointError(
            f"config.json says {layers} layers but there are only {tensors} tensors; "
            "a shard is missing or config.json belongs to another checkpoint"
        )


def _read_generation_config(folder: Path) -> Mapping[str, Any]:
    """generation_config.json: where generation ends and the default sampling parameters; {} if the file is missing."""
    data = read_json(folder, "generation_config.json") if os.path.lexists(folder / "generation_config.json") else {}
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / 'generation_config.json'} is not a JSON object; download it again")
    return data


def _stored_as(source: Source, tensors: Mapping[str, TensorInfo]) -> str:
    if source.stored_name:
        return source.stored_name
    return tensors[source.expected[0].name].dtype.lower() if source.spec is None else storage_name(source.spec)
