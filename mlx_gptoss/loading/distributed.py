"""One model over several ranks: they settle on what all can do, and load it together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..backends.base import Limits, Runner
from ..errors import GptOssError, InvalidRequest
from ..ranks import Follower, Launch, Leader
from .memory import MemoryPlan, require_fit
from .plan import Order, Settled, identity, mappable, open_source, settle

DISMISS_S = 10.0  # how long ranks may take to come only to be told to go

Start = Callable[[Callable[[], Runner]], Runner]


def lead(order: Order, launch: Launch) -> tuple[Settled, Start]:
    """On rank 0: what all ranks load, with a plan that all can keep, and what makes the runner of all, given what loads
    this rank's.

    Raises GptOssError if a rank does not come, has another checkpoint or version, or has not the memory; then none has
    loaded anything, and the others end.
    """
    leader = Leader(launch)
    try:
        order = _of_launch(order, launch)
        settled = _settle(order, launch)
        mine = _said(settled)
        answers = leader.ask(vars(order))
        for rank, theirs in enumerate(answers, 1):
            _compare(rank, mine, theirs)
        plans = [settled.plan, *(MemoryPlan(**answer["plan"]) for answer in answers)]
        plan = replace(
            settled.plan,
            context=min(plan.context for plan in plans),
            chunk=min(plan.chunk for plan in plans),
            prefix_bytes=min(plan.prefix_bytes for plan in plans),
            widened_bytes=settled.plan.widened_bytes if all(plan.widened_bytes for plan in plans) else 0,
        )
        if any(plan.mapped_bytes for plan in plans):
            plan = replace(plan, mapped_bytes=settled.plan.mapped_bytes or mappable(settled.part), widened_bytes=0)
        settled = replace(settled, plan=plan)
        limits = settled.limits()
    except BaseException:
        leader.close()
        raise
    largest = max([mine["kv_heads"], *(answer["kv_heads"] for answer in answers)]) / mine["kv_heads"]
    return settled, lambda load: leader.load(limits, load, largest)


def follow(launch: Launch) -> None:
    """On every other rank: load what rank 0 says and do what it does, until it ends."""

    def answer(data: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Limits], Runner]]:
        synthetic = data["synthetic"]
        order = Order(**data | {"synthetic": synthetic and tuple(synthetic)})
        settled = _settle(order, launch)
        return _said(settled), settled.load

    Follower(launch).follow(answer)


def dismiss(launch: Launch) -> None:
    """Rank 0 ends; if it has not led, the others still wait to be told what to load, and end now."""
    if not Leader.led:
        with contextlib.suppress(GptOssError):  # they have ended already
            Leader(launch, DISMISS_S).close()


def _of_launch(order: Order, launch: Launch) -> Order:
    """With the backend whose collectives the launcher has prepared."""
    if order.backend not in ("auto", launch.backend):
        program = "mlx.launch" if order.backend == "mlx" else "torchrun"
        raise InvalidRequest(f"start ranks of the {order.backend} backend by {program}, or leave --backend out")
    return replace(order, backend=launch.backend)


def _settle(order: Order, launch: Launch) -> Settled:
    settled = settle(order, open_source(order), launch.rank, launch.ranks, launch.beside)
    require_fit(settled.plan, f"its share of {order.name}", {})
    return settled


def _said(settled: Settled) -> dict[str, Any]:
    """What ranks tell each other before they load."""
    order, share = settled.order, settled.share
    assert share is not None
    return {
        "version": settled.programs(),
        "checkpoint": identity(settled.source),
        "dtype": settled.module.dtype_name(order.device, order.dtype),
        "kv_heads": len(share.kv),
        "plan": asdict(settled.plan),
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
