"""The errors a user can meet. Each message names what is wrong and what to do next."""

from __future__ import annotations


class GptOssError(Exception):
    """Anything mlx-gptoss refuses or cannot do. The command line prints it as one line and exits with 1."""


class CheckpointError(GptOssError):
    """A checkpoint that cannot be read: damaged, incomplete, hostile, or of an unknown layout."""

    def __init__(self, message: str) -> None:
        """A hostile file may have names of megabytes: the middle of such a message is left out."""
        super().__init__(message if len(message) <= 2000 else f"{message[:1200]} ... {message[-600:]}")


class DoesNotFit(GptOssError):
    """A model, context or request that needs more memory than there is; the message carries the numbers."""


class InvalidRequest(GptOssError):
    """A request that cannot be honoured: an empty prompt, a prompt longer than the context, a bad option."""


class BackendUnavailable(GptOssError):
    """The backend asked for is not installed or has no device here; the message names the extra to install."""


class Busy(GptOssError):
    """More requests than may wait. retry_after_s: whole seconds after which there may be room."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
