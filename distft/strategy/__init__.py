"""How a trainee is laid over the ranks: one file an engine, all behind the protocol in `base.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distft.config.schema import Run
    from distft.strategy.base import Strategy
    from distft.world import World


def make_strategy(run: Run, world: World, precision: str) -> Strategy:
    """The engine named by `strategy.name`; only that one is imported.

    Args:
        precision: "fp32" or "bf16", what `precision=auto` came to.
    """
    name = run.strategy.name
    if name == "ddp":
        from distft.strategy.ddp import Ddp

        return Ddp(run, world, precision)
    if name in ("fsdp", "hsdp"):
        from distft.strategy.fsdp import Fsdp

        return Fsdp(run, world, precision)
    from distft.strategy.zero import Zero

    return Zero(run, world, precision)
