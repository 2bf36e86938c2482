"""Run OpenAI's gpt-oss models on your own machine. See README.md; `mlx_gptoss.load()` opens the bundled model.

Names are imported when first used, so that `import mlx_gptoss` costs nothing and needs no backend.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read when numpy is loaded: its BLAS threads sleep at once when they have nothing to do. Otherwise they spin for some
# hundredths of a second after each product, while MLX wants the cores (decoding took 1.5 times as long).
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

if TYPE_CHECKING:
    from .api import convert as convert
    from .api import describe as describe
    from .api import load as load
    from .config import ModelConfig as ModelConfig
    from .errors import GptOssError as GptOssError
    from .evaluation import Divergence as Divergence
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .harmony.messages import Conversation as Conversation
    from .harmony.messages import Function as Function
    from .harmony.messages import Message as Message
    from .model import Completion as Completion
    from .model import Model as Model
    from .model import Reply as Reply
    from .reply import Event as Event
    from .reply import Finished as Finished
    from .reply import ReasoningDelta as ReasoningDelta
    from .reply import TextDelta as TextDelta
    from .reply import ToolCall as ToolCall
    from .reply import ToolCallDelta as ToolCallDelta
    from .sampling import Sampling as Sampling
    from .tools import Tool as Tool
    from .tools import ToolResult as ToolResult
    from .tools import answer as answer
    from .tools import load_tools as load_tools

_HOME = {
    "Completion": "model",
    "Model": "model",
    "Reply": "model",
    "convert": "api",
    "describe": "api",
    "load": "api",
    "Event": "reply",
    "Finished": "reply",
    "ReasoningDelta": "reply",
    "TextDelta": "reply",
    "ToolCall": "reply",
    "ToolCallDelta": "reply",
    "ModelConfig": "config",
    "GptOssError": "errors",
    "Divergence": "evaluation",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Conversation": "harmony.messages",
    "Function": "harmony.messages",
    "Message": "harmony.messages",
    "Sampling": "sampling",
    "Tool": "tools",
    "ToolResult": "tools",
    "answer": "tools",
    "load_tools": "tools",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_gptoss' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
