"""What is wired on a Mac, with a stand-in for MLX's memory: once after the first model, never while one may compute."""

from __future__ import annotations

import pytest

from mlx_gptoss.backends.mlx.wiring import Wiring

GB = 10**9


class Memory:
    """mlx.core's functions that Wiring calls. set_wired_limit raises as MLX does beyond `most`."""

    def __init__(self, most: int = 100 * GB) -> None:
        self.active, self.most, self.limit = 0, most, 0
        self.log: list[str] = []

    def synchronize(self):
        self.log.append("synchronize")

    def clear_cache(self):
        self.log.append("clear_cache")

    def get_active_memory(self):
        return self.active

    def set_wired_limit(self, limit):
        if limit > self.most:
            raise ValueError("Setting a wired limit larger than the maximum working set size is not allowed.")
        self.log.append(f"wire {limit / GB:g}")
        before, self.limit = self.limit, limit
        return before


def test_the_weights_are_wired_once_the_model_is_loaded():
    memory = Memory()
    memory.active = 14 * GB
    assert Wiring(memory).add(96 * GB) == 14 * GB
    assert memory.log == ["synchronize", "clear_cache", "wire 14"]


def test_no_more_than_metal_recommends():
    memory = Memory(most=11 * GB)
    memory.active = 14 * GB
    assert Wiring(memory).add(11 * GB) == 11 * GB


def test_a_second_model_changes_nothing_while_the_first_may_compute():
    memory = Memory()
    wiring = Wiring(memory)
    memory.active = 14 * GB
    wiring.add(96 * GB)
    memory.active += 20 * GB
    assert wiring.add(96 * GB) is None
    wiring.remove()
    assert memory.limit == 14 * GB and [line for line in memory.log if "wire" in line] == ["wire 14"]
    wiring.remove()  # the last one is closed
    assert memory.log[-2:] == ["synchronize", "wire 0"]


def test_a_model_after_the_last_was_closed_is_wired_anew():
    memory = Memory()
    wiring = Wiring(memory)
    for active in (14, 3):
        memory.active = active * GB
        assert wiring.add(96 * GB) == active * GB
        wiring.remove()
    assert memory.limit == 0


def test_a_limit_of_the_users_own_is_put_back():
    memory = Memory()
    memory.limit, memory.active = 5 * GB, 14 * GB
    wiring = Wiring(memory)
    wiring.add(96 * GB)
    wiring.remove()
    assert memory.limit == 5 * GB


def test_an_error_leaves_no_model_behind():
    memory = Memory(most=1)
    memory.active = 14 * GB
    wiring = Wiring(memory)
    with pytest.raises(ValueError):
        wiring.add(96 * GB)
    memory.most = 100 * GB
    assert wiring.add(96 * GB) == 14 * GB
