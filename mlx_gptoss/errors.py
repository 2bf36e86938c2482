"""The errors a user can meet. Each message names what is wrong and what to do next."""

from __future__ import annotations

from collections.abc import Callable


class GptOssError(Exception):
    """The base of all errors that mlx-gptoss raises on purpose. The commands print it as one line and exit with 1."""


class CheckpointError(GptOssError):
    """A checkpoint that cannot be read: damaged, incomplete, hostile, or of an unknown layout."""

    def __init__(self, message: str) -> None:
        """The middle of a long message is cut out, since a hostile file may contain names of megabytes."""
        super().__init__(message if len(message) <= 2000 else f"{message[:1200]} ... {message[-600:]}")


class DoesNotFit(GptOssError):
    """A model, context or request that needs more memory than there is; the message carries the numbers."""


class InvalidRequest(GptOssError):
    """A request that cannot be honoured: an empty prompt, a prompt longer than the context, a bad option."""


class PromptTooLong(InvalidRequest):
    """A prompt longer than the context."""


class Cancelled(GptOssError):
    """Work whose result nobody waits for any more, ended early (cancel.py)."""


class BackendUnavailable(GptOssError):
    """The backend asked for is not installed or has no device here; the message names the extra to install."""


class Busy(GptOssError):
    """The queue is full. retry_after_s: whole seconds after which a slot may be free."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Callable[..., Busy], tuple[str, int]]:
        """For pickle, which would call the class with the message alone."""
        return _busy, (str(self), self.retry_after_s)


class ModelUnavailable(GptOssError):
    """The process of a model could not load it, or ended. The server starts a new one for a later request."""


def _busy(message: str, retry_after_s: int) -> Busy:
    return Busy(message, retry_after_s=retry_after_s)
