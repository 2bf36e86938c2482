"""Run OpenAI's gpt-oss models on your own machine. See README.md; `mlx_gptoss.load()` opens the bundled model.

Names are imported when first used, so that `import mlx_gptoss` costs nothing and needs no backend.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read when numpy is loaded: makes its BLAS threads sleep as soon as they are idle. Otherwise they spin for some
# hundredths of a second after each product, while MLX needs the cores (decoding took 1.5 times as long).
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

if TYPE_CHECKING:
    __version__: str
    from .api import convert as convert
    from .api import describe as describe
    from .api import load as load
    from .chat.reply import Event as Event
    from .chat.reply import Finished as Finished
    from .chat.reply import ReasoningDelta as ReasoningDelta
    from .chat.reply import TextDelta as TextDelta
    from .chat.reply import ToolCall as ToolCall
    from .chat.reply import ToolCallDelta as ToolCallDelta
    from .chat.result import Completion as Completion
    from .chat.result import Reply as Reply
    from .chat.tool import Tool as Tool
    from .config import ModelConfig as ModelConfig
    from .errors import GptOssError as GptOssError
    from .harmony.messages import Conversation as Conversation
    from .harmony.messages import Function as Function
    from .harmony.messages import Message as Message
    from .measure.evaluation import Divergence as Divergence
    from .measure.evaluation import Evaluation as Evaluation
    from .measure.evaluation import evaluate as evaluate
    from .model import Model as Model
    from .sampling import Sampling as Sampling
    from .tools import ToolResult as ToolResult
    from .tools import aanswer as aanswer
    from .tools import answer as answer
    from .tools import load_tools as load_tools

_HOME = {
    "Completion": "chat.result",
    "Model": "model",
    "Reply": "chat.result",
    "convert": "api",
    "describe": "api",
    "load": "api",
    "Event": "chat.reply",
    "Finished": "chat.reply",
    "ReasoningDelta": "chat.reply",
    "TextDelta": "chat.reply",
    "ToolCall": "chat.reply",
    "ToolCallDelta": "chat.reply",
    "ModelConfig": "config",
    "GptOssError": "errors",
    "Divergence": "measure.evaluation",
    "Evaluation": "measure.evaluation",
    "evaluate": "measure.evaluation",
    "Conversation": "harmony.messages",
    "Function": "harmony.messages",
    "Message": "harmony.messages",
    "Sampling": "sampling",
    "Tool": "chat.tool",
    "ToolResult": "tools",
    "aanswer": "tools",
    "answer": "tools",
    "load_tools": "tools",
}
__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlx-gptoss")
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_gptoss' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
