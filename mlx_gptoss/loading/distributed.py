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
from .plan import LoadOptions, LoadPlan, identity, mappable, open_source, plan_load

DISMISS_S = 10.0  # how long ranks may take to come only to be told to go

Start = Callable[[Callable[[], Runner]], Runner]


def coordinate(options: LoadOptions, launch: Launch) -> tuple[LoadPlan, Start]:
    """On rank 0: what all ranks load, with a plan that all can keep, and what makes the runner of all, given what loads
    this rank's.

    Raises GptOssError if a rank does not come, has another checkpoint or version, or has not the memory; then none has
    loaded anything, and the others end.
    """
    leader = Leader(launch)
    try:
        options = _with_launch_backend(options, launch)
        load_plan = _plan_and_require_fit(options, launch)
        mine = _summary(load_plan)
        answers = leader.ask(vars(options))
        for rank, theirs in enumerate(answers, 1):
            _compare(rank, mine, theirs)
        plans = [load_plan.plan, *(MemoryPlan(**answer["plan"]) for answer in answers)]
        plan = replace(
            load_plan.plan,
            context=min(plan.context for plan in plans),
            chunk=min(plan.chunk for plan in plans),
            prefix_bytes=min(plan.prefix_bytes for plan in plans),
            upcast_bytes=load_plan.plan.upcast_bytes if all(plan.upcast_bytes for plan in plans) else 0,
        )
        if any(plan.mapped_bytes for plan in plans):
            plan = replace(plan, mapped_bytes=load_plan.plan.mapped_bytes or mappable(load_plan.part), upcast_bytes=0)
        load_plan = replace(load_plan, plan=plan)
        limits = load_plan.limits()
    except BaseException:
        leader.close()
        raise
    largest = max([mine["kv_heads"], *(answer["kv_heads"] for answer in answers)]) / mine["kv_heads"]
    return load_plan, lambda load: leader.load(limits, load, largest)


def serve_rank(launch: Launch) -> None:
    """On every other rank: load what rank 0 says and do what it does, until it ends."""

    def answer(data: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Limits], Runner]]:
        synthetic = data["synthetic"]
        options = LoadOptions(**data | {"synthetic": synthetic and tuple(synthetic)})
        load_plan = _plan_and_require_fit(options, launch)
        return _summary(load_plan), load_plan.load

    Follower(launch).follow(answer)


def dismiss(launch: Launch) -> None:
    """Rank 0 ends; if it has not led, the others still wait to be told what to load, and end now."""
    if not Leader.led:
        with contextlib.suppress(GptOssError):  # they have ended already
            Leader(launch, DISMISS_S).close()


def _with_launch_backend(options: LoadOptions, launch: Launch) -> LoadOptions:
    """With the backend whose collectives the launcher has prepared."""
    if options.backend not in ("auto", launch.backend):
        program = "mlx.launch" if options.backend == "mlx" else "torchrun"
        raise InvalidRequest(f"start ranks of the {options.backend} backend by {program}, or leave --backend out")
    return replace(options, backend=launch.backend)


def _plan_and_require_fit(options: LoadOptions, launch: Launch) -> LoadPlan:
    load_plan = plan_load(options, open_source(options), launch.rank, launch.ranks, launch.ranks_on_host)
    require_fit(load_plan.plan, f"its share of {options.name}", {})
    return load_plan


def _summary(load_plan: LoadPlan) -> dict[str, Any]:
    """What ranks tell each other before they load."""
    options, shard = load_plan.options, load_plan.shard
    assert shard is not None
    return {
        "version": load_plan.programs(),
        "checkpoint": identity(load_plan.source),
        "dtype": load_plan.module.dtype_name(options.device, options.dtype),
        "kv_heads": len(shard.kv_heads),
        "plan": asdict(load_plan.plan),
    }


def _compare(rank: int, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise GptOssError where the ranks would not compute the same."""
    ours, other = (", ".join(" ".join(program) for program in said["version"]) for said in (mine, theirs))
    if ours != other:
        raise GptOssError(f"rank {rank} runs {other}, and rank 0 {ours}; install the same on all machines")
    if mine["checkpoint"] != theirs["checkpoint"]:
        raise GptOssError(f"rank {rank} has another checkpoint by that name than rank 0; copy the same to all machines")
    if mine["dtype"] != theirs["dtype"]:
        raise GptOssError(f"rank {rank} computes in {theirs['dtype']}, and rank 0 in {mine['dtype']}; give a --dtype")
