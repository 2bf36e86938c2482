"""One model over several ranks: agree on one plan, then load it together."""

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

DISMISS_S = 10.0  # how long ranks may take to connect, only to be told to end

Start = Callable[[Callable[[], Runner]], Runner]  # given what loads rank 0's share, a runner for the whole model


def coordinate(request: LoadRequest, launch: Launch) -> tuple[LoadPlan, Start]:
    """On rank 0: the plan that all ranks keep, and what loads the model on all of them.

    Raises GptOssError if a rank does not connect, has another checkpoint or version, or lacks the memory; nothing has
    been loaded then, and the other ranks end.
    """
    leader = Leader(launch)
    try:
        request = _with_launch_backend(request, launch)
        plan = _plan_and_require_fit(request, launch)
        mine = _summary(plan)
        answers = leader.exchange_options(vars(request))
        for rank, theirs in enumerate(answers, 1):
            _compare(rank, mine, theirs)
        memory = _common_memory(plan, [MemoryPlan(**answer["memory"]) for answer in answers])
        plan = replace(plan, memory=memory)
        limits = plan.limits()
    except BaseException:
        leader.close()
        raise
    largest = max([mine["kv_heads"], *(answer["kv_heads"] for answer in answers)]) / mine["kv_heads"]
    return plan, lambda load: leader.load(limits, load, largest)


def serve_rank(launch: Launch) -> None:
    """On every other rank: load its share of what rank 0 asks for and follow rank 0 until it ends."""

    def answer(data: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Limits], Runner]]:
        synthetic = data["synthetic"]
        request = LoadRequest(**data | {"synthetic": synthetic and tuple(synthetic)})
        plan = _plan_and_require_fit(request, launch)
        return _summary(plan), plan.load

    Follower(launch).run(answer)


def dismiss(launch: Launch) -> None:
    """On rank 0, which ends: if it never loaded anything, tell the waiting ranks to end, too."""
    if not Leader.created:
        with contextlib.suppress(GptOssError):  # they have ended already
            Leader(launch, DISMISS_S).close()


def _with_launch_backend(request: LoadRequest, launch: Launch) -> LoadRequest:
    """The request with the backend whose collectives the launcher prepared."""
    if request.backend not in ("auto", launch.backend):
        program = "mlx.launch" if request.backend == "mlx" else "torchrun"
        raise InvalidRequest(f"start ranks of the {request.backend} backend by {program}, or leave --backend out")
    return replace(request, backend=launch.backend)


def _plan_and_require_fit(request: LoadRequest, launch: Launch) -> LoadPlan:
    plan = plan_load(request, open_source(request), launch.rank, launch.ranks, launch.ranks_on_host)
    require_fit(plan.memory, f"its share of {request.name}", {})
    return plan


def _common_memory(plan: LoadPlan, others: list[MemoryPlan]) -> MemoryPlan:
    """Rank 0's memory plan with the context, the chunk and the prefix cache that every rank has room for."""
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
    """What ranks compare before they load."""
    request, shard = plan.request, plan.shard
    assert shard is not None
    return {
        "versions": plan.versions(),
        "checkpoint": identity(plan.source),
        "dtype": plan.module.dtype_name(request.device, request.dtype),
        "kv_heads": len(shard.kv_heads),
        "memory": asdict(plan.memory),
    }


def _compare(rank: int, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise GptOssError if the two ranks would not compute the same."""
    ours, other = (", ".join(" ".join(program) for program in one["versions"]) for one in (mine, theirs))
    if ours != other:
        raise GptOssError(f"rank {rank} runs {other}, and rank 0 {ours}; install the same on all machines")
    if mine["checkpoint"] != theirs["checkpoint"]:
        raise GptOssError(f"rank {rank} has another checkpoint of that name than rank 0; copy the same to all machines")
    if mine["dtype"] != theirs["dtype"]:
        raise GptOssError(f"rank {rank} computes in {theirs['dtype']}, and rank 0 in {mine['dtype']}; give a --dtype")
