"""Spread kept blocks over sites: each site's sparsity from those it was calibrated for, at a given average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# States of the search that are kept per site; more only matter for sites of many different sizes.
MAX_STATES = 4096


@dataclass(frozen=True)
class Choice:
    """What a site costs at one sparsity.

    Args:
        units: the sparsity in millionths.
        num_pairs: pairs of query and key block that are kept.
        error: held-out error.
    """

    units: int
    num_pairs: int
    error: float


def spread_budget(sites: Sequence[Sequence[Choice]], max_pairs: int) -> list[Choice] | None:
    """One choice per site, of least summed error, keeping at most `max_pairs` in all; None if there is none.

    A shortest-path search over the sites; a state is the number of pairs kept so far, with the least error that reaches
    it. States that keep more and err more than another are dropped.
    """
    states: dict[int, tuple[float, tuple[Choice, ...]]] = {0: (0.0, ())}
    for choices in sites:
        reached: dict[int, tuple[float, tuple[Choice, ...]]] = {}
        for num_pairs, (error, path) in states.items():
            for choice in choices:
                total = num_pairs + choice.num_pairs
                if total <= max_pairs and (total not in reached or error + choice.error < reached[total][0]):
                    reached[total] = (error + choice.error, (*path, choice))
        states = _without_dominated(reached)
    return list(min(states.values(), key=lambda state: state[0])[1]) if states else None


def _without_dominated(
    states: Mapping[int, tuple[float, tuple[Choice, ...]]],
) -> dict[int, tuple[float, tuple[Choice, ...]]]:
    kept, best = {}, float("inf")
    for num_pairs in sorted(states):
        if states[num_pairs][0] < best:
            kept[num_pairs] = states[num_pairs]
            best = states[num_pairs][0]
    stride = -(-len(kept) // MAX_STATES)
    return dict(list(kept.items())[::stride]) if stride > 1 else kept
