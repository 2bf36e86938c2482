"""One model over several ranks: all agree on one load plan, then each loads its share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..backends.base import Limits, Runner
from ..errors import GptOssError, InvalidRequest
from ..ranks import Follower, Launch, Leader
from .memory import MemoryPlan, require_fit
from .plan import LoadPlan, LoadRequest, identity, mappable, open_source, plan_load

DISMISS_S = 10.0  # seconds that ranks have to connect when rank 0 only tells them to end

StartRanks = Callable[[Callable[[], Runner]], Runner]  # takes the loader of rank 0's share, returns the whole model's


def coordinate(request: LoadRequest, launch: Launch) -> tuple[LoadPlan, StartRanks]:
    """On rank 0: the load plan common to all ranks, and a function that loads the model on all of them.

    Raises GptOssError if a rank does not connect, has another checkpoint or version, or lacks the memory. Nothing has
    been loaded then, and the other ranks end.
    """
    leader = Leader(launch)
    try:
        request = _with_launch_backend(request, launch)
        plan = _plan_and_require_fit(request, launch)
        own = _summary(plan)
        answers = leader.exchange_options(vars(request))
        for rank, answer in enumerate(answers, 1):
            _require_same(rank, own, answer)
        memory = _common_memory(plan, [MemoryPlan(**answer["memory"]) for answer in answers])
        plan = replace(plan, memory=memory)
        limits = plan.limits()
    except BaseException:
        leader.close()
        raise
    largest = max([own["kv_heads"], *(answer["kv_heads"] for answer in answers)]) / own["kv_heads"]
    return plan, lambda load: leader.load(limits, load, largest)


def serve_rank(launch: Launch) -> None:
    """On every other rank: load this rank's share of the model that rank 0 requests, and follow rank 0 until it
    ends."""

    def answer(data: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Limits], Runner]]:
        synthetic = data["synthetic"]
        request = LoadRequest(**data | {"synthetic": synthetic and tuple(synthetic)})
        plan = _plan_and_require_fit(request, launch)
        return _summary(plan), plan.load

    Follower(launch).run(answer)


def dismiss(launch: Launch) -> None:
    """On rank 0, before it ends: if it has loaded nothing, tell the waiting ranks to end too."""
    if not Leader.created:
        with contextlib.suppress(GptOssError):  # the ranks have ended already
            Leader(launch, DISMISS_S).close()


def _with_launch_backend(request: LoadRequest, launch: Launch) -> LoadRequest:
    """The request with the backend that belongs to the launcher: mlx for mlx.launch, cuda for torchrun."""
    if request.backend not in ("auto", launch.backend):
        program = "mlx.launch" if request.backend == "mlx" else "torchrun"
        raise InvalidRequest(
            f"the {request.backend} backend needs ranks started with {program}: use that, or leave out --backend"
        )
    return replace(request, backend=launch.backend)


def _plan_and_require_fit(request: LoadRequest, launch: Launch) -> LoadPlan:
    plan = plan_load(request, open_source(request), launch.rank, launch.ranks, launch.ranks_on_host)
    require_fit(plan.memory, f"its share of {request.name}", {})
    return plan


def _common_memory(plan: LoadPlan, others: list[MemoryPlan]) -> MemoryPlan:
    """Rank 0's memory plan with the context, the chunk and the prefix cache that fit on every rank."""
    every = [plan.memory, *others]
    common = replace(
        plan.memory,
        context=min(memory.context for memory in every),
        chunk=min(memory.chunk for memory in every),
        prefix_bytes=min(memory.prefix_bytes for memory in every),
        upcast_bytes=plan.memory.upcast_bytes if all(memory.upcast_bytes for memory in every) else 0,
    )
    if any(memory.mapped_bytes for memory in every):
        return replace(common, mapped_bytes=plan.memory.mapped_bytes or mappable(plan.part), upcast_bytes=0)
    return common


def _summary(plan: LoadPlan) -> dict[str, Any]:
    """The properties that ranks compare before they load."""
    request, shard = plan.request, plan.shard
    assert shard is not None
    return {
        "versions": plan.versions(),
        "checkpoint": identity(plan.source),
        "adapters": [adapter.digest for adapter in plan.adapters.values()],
        "dtype": plan.module.dtype_name(request.device, request.dtype),
        "kv_heads": len(shard.kv_heads),
        "memory": asdict(plan.memory),
    }


def _require_same(rank: int, own: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise GptOssError if rank `rank`, with the properties `other`, would not compute the same as rank 0."""
    own_versions, versions = (", ".join(" ".join(program) for program in one["versions"]) for one in (own, other))
    if own_versions != versions:
        raise GptOssError(
            f"rank {rank} runs {versions}, rank 0 runs {own_versions}; install the same versions on all machines"
        )
    if own["checkpoint"] != other["checkpoint"]:
        raise GptOssError(
            f"rank {rank} has another checkpoint than rank 0 under that name; copy the same files to all machines"
        )
    if own["adapters"] != other["adapters"]:
        raise GptOssError(f"rank {rank} has other adapters than rank 0; copy the same files to all machines")
    if own["dtype"] != other["dtype"]:
        raise GptOssError(f"rank {rank} computes in {other['dtype']}, rank 0 in {own['dtype']}; give a --dtype")
