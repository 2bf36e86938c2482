"""LoRA adapters: `open_adapter(folder, config)` reads PEFT's files and mlx-lm's into one form, two thin factors for
each weight that the adapter changes (factors.py). Training is left to the tools that do it; ADAPTERS.md shows the round
trip.

files.py: the folder and its tensors. peft.py, mlx_lm.py: what their config and tensor names mean. summary.py: what an
adapter is, for `show`. merged.py: a checkpoint with an adapter added to its weights.
"""

from .factors import Adapter as Adapter
from .factors import Factors as Factors
from .reading import check_adapter as check_adapter
from .reading import open_adapter as open_adapter
