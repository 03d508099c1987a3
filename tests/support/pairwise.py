"""A small selection of cases in which every pair of values of any two factors occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Greedy and deterministic. The two longest factors are crossed, the others filled in where they cover most."""
    names = sorted(factors, key=lambda name: -len(factors[name]))
    first, second, *others = names
    rest = [dict(zip(others, values, strict=True)) for values in product(*(factors[name] for name in others))]
    covered: set[tuple[str, Any, str, Any]] = set()
    used = [0] * len(rest)  # once all pairs are covered, combinations that were used least
    cases = []
    for a, b in product(factors[first], factors[second]):
        candidates = [{first: a, second: b, **values} for values in rest]
        fresh = [len(_pairs(case) - covered) for case in candidates]
        chosen = max(range(len(rest)), key=lambda i: (fresh[i], -used[i]))
        used[chosen] += 1
        best = candidates[chosen]
        covered |= _pairs(best)
        cases.append(best)
    return cases


def missing_pairs(cases: Sequence[Case], factors: Mapping[str, Sequence[Any]]) -> set[tuple[str, Any, str, Any]]:
    wanted = {(a, x, b, y) for a, b in combinations(sorted(factors), 2) for x, y in product(factors[a], factors[b])}
    return wanted - {pair for case in cases for pair in _pairs(case)}


def _pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(sorted(case), 2)}
