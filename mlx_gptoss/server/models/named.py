"""A model of a server, and its names in the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...loading.library import NANO_ALIAS, NANO_NAME
from ...model import Model
from .remote import RemoteModel, State

ServedModel = Model | RemoteModel


@dataclass(frozen=True)
class NamedModel:
    """A model and its names.

    id: the model's name in responses. aliases: other names of it, which /v1/models lists, too. other_names: more names
    that requests may use. adapter: the name of the model's adapter that answers; None is the model as it is. base: of
    an adapter, the id of its model.
    """

    model: ServedModel
    id: str
    other_names: Sequence[str] = ()
    aliases: Sequence[str] = ()
    adapter: str | None = None
    base: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that /v1/models lists: the model's own, then the aliases."""
        return (self.id, *self.aliases)

    @property
    def state(self) -> State:
        """Whether the model is loaded. One without a process of its own is, unless its engine has failed."""
        if isinstance(self.model, RemoteModel):
            return self.model.state
        return "loaded" if self.model.failure is None else "failed"

    @property
    def pid(self) -> int | None:
        """The id of the model's own process; None if it has none now."""
        process = self.model.process if isinstance(self.model, RemoteModel) else None
        return None if process is None else process.pid

    def has_name(self, name: str) -> bool:
        """Whether a request's `name` means this model. Ollama's clients put ":latest" behind a name without a tag."""
        known = {*self.names, *self.other_names}
        return not known.isdisjoint((name, name.removesuffix(":latest")))


def with_adapters(named: NamedModel, adapters: Sequence[str]) -> list[NamedModel]:
    """The model, and after it each of its adapters: by its own name and as MODEL:NAME."""
    bases = (*named.names, *named.other_names)

    def of(name: str) -> NamedModel:
        return NamedModel(named.model, name, [f"{base}:{name}" for base in bases], adapter=name, base=named.id)

    return [named, *map(of, adapters)]


def model_names(model: str | None) -> tuple[str, tuple[str, ...]]:
    """The API's name for a --model option, and other names for it. A local checkpoint's name does not show its path."""
    if model in (None, NANO_ALIAS, NANO_NAME):
        return NANO_NAME, (NANO_ALIAS,)
    assert model is not None
    folder = Path(model)
    if folder.exists():
        return folder.resolve().name, (model,)
    return model, (model.rpartition("/")[2],)
