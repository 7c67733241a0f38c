"""Shortest routes in a small road network, with a choice between distance and travel time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Road:
    to: str
    kilometres: float
    limit: float

    @property
    def hours(self) -> float:
        return self.kilometres / self.limit


class RoadMap:
    def __init__(self) -> None:
        self._roads: dict[str, list[Road]] = defaultdict(list)

    def connect(self, a: str, b: str, kilometres: float, limit: float = 80.0) -> None:
        if kilometres <= 0:
            raise ValueError(f"a road from {a} to {b} needs a positive length, got {kilometres}")
        self._roads[a].append(Road(b, kilometres, limit))
        self._roads[b].append(Road(a, kilometres, limit))

    def route(self, start: str, goal: str, by: str = "kilometres") -> tuple[float, list[str]]:
        """Return the total cost and the towns passed through, both ends included."""
        best = {start: 0.0}
        came_from: dict[str, str] = {}
        queue = [(0.0, start)]
        while queue:
            cost, town = heapq.heappop(queue)
            if town == goal:
                return cost, self._walk_back(came_from, goal)
            if cost > best[town]:
                continue
            for road in self._roads[town]:
                candidate = cost + getattr(road, by)
                if candidate < best.get(road.to, float("inf")):
                    best[road.to] = candidate
                    came_from[road.to] = town
                    heapq.heappush(queue, (candidate, road.to))
        raise LookupError(f"there is no way from {start} to {goal}")

    @staticmethod
    def _walk_back(came_from: dict[str, str], town: str) -> list[str]:
        path = [town]
        while town in came_from:
            town = came_from[town]
            path.append(town)
        return path[::-1]


if __name__ == "__main__":
    roads = RoadMap()
    roads.connect("Aldersund", "Brack", 42)
    roads.connect("Brack", "Corrie", 17, limit=50)
    roads.connect("Aldersund", "Dunmore", 60, limit=110)
    roads.connect("Dunmore", "Corrie", 12, limit=110)
    for criterion in ("kilometres", "hours"):
        cost, towns = roads.route("Aldersund", "Corrie", by=criterion)
        print(f"{' - '.join(towns)}: {cost:.2f} {criterion}")
