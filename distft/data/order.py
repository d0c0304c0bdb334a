"""Which source each bin of a run comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TURN = 1 << 16  # bins, over all sources, in one turn of the order
Place = tuple[int, int]  # source, number of the bin among all that this source ever gives


class Order:
    """Which source every bin of a run comes from: a pure function of the bin's number.

    Source s has its k-th bin due at (k + 1/2) / share; bins come in the order in which they are due. So after any
    number of bins each source has given its share to within one bin, and where shares are numbers of bins every source
    ends its epoch exactly when the others do.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = [share / sum(shares) * TURN for share in shares]
        self.held: tuple[int, np.ndarray, np.ndarray] | None = None  # the turn that was asked for last

    def due(self, source: int, number: int) -> float:
        return (number + 0.5) / self.shares[source]

    def before(self, turn: int) -> list[int]:
        """By source, the number of bins that are due before this turn begins."""
        counts = []
        for source, share in enumerate(self.shares):
            count = max(0, math.ceil(turn * share - 0.5))
            while count and self.due(source, count - 1) >= turn:
                count -= 1
            while self.due(source, count) < turn:
                count += 1
            counts.append(count)
        return counts

    def places(self, first: int, count: int) -> list[Place]:
        """The bins number `first` to `first + count` of the run."""
        if len(self.shares) == 1:
            return [(0, first + index) for index in range(count)]
        found: list[Place] = []
        turn = self.turn_of(first)
        while len(found) < count:
            sources, numbers = self.turn(turn)
            skip = first + len(found) - sum(self.before(turn))
            wanted = slice(skip, skip + count - len(found))
            found += zip(sources[wanted].tolist(), numbers[wanted].tolist(), strict=True)
            turn += 1
        return found

    def taken(self, count: int) -> list[int]:
        """By source, how many of the run's first `count` bins are its own."""
        if len(self.shares) == 1:
            return [count]
        turn = self.turn_of(count)
        start = self.before(turn)
        here = np.bincount(self.turn(turn)[0][: count - sum(start)], minlength=len(start))
        return [before + int(more) for before, more in zip(start, here, strict=True)]

    def turn_of(self, number: int) -> int:
        """The turn that holds the run's bin of this number."""
        turn = max(0, number // TURN - 1)
        while sum(self.before(turn + 1)) <= number:
            turn += 1
        return turn

    def turn(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and numbers of all bins of one turn, in order; bins due at once come by source."""
        if self.held is None or self.held[0] != turn:
            bounds = zip(self.before(turn), self.before(turn + 1), strict=True)
            numbers = [np.arange(low, high) for low, high in bounds]
            sources = np.concatenate([np.full(len(part), source) for source, part in enumerate(numbers)])
            due = np.concatenate([(part + 0.5) / share for part, share in zip(numbers, self.shares, strict=True)])
            order = np.argsort(due, kind="stable")
            self.held = turn, sources[order], np.concatenate(numbers)[order]
        return self.held[1], self.held[2]
