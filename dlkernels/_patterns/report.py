"""What the backend found in the graphs that it was given, and what it did with each find."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

GRAPHS_KEPT = 200  # a program that recompiles all day must not fill its memory


@dataclass
class Find:
    """One place in a graph."""

    pattern: str  # the family: group_norm, squeeze_excite, ...
    what: str  # what was recognised there: group_norm + silu
    module: str  # path of the module that it stands in, or ""
    line: str  # file:line of the user's code, or ""
    replaced: bool
    reason: str  # why it was replaced, or left


@dataclass
class GraphFinds:
    """One graph that the backend was given."""

    number: int
    nodes: int  # calls in the graph as it came
    finds: list[Find] = field(default_factory=list)
    error: str = ""  # what went wrong; the graph was then compiled unchanged


class CompileReport:
    """What `backend="dlkernels"` recognised, replaced and left, graph by graph; printing it shows a table."""

    def __init__(self) -> None:
        self._graphs: deque[GraphFinds] = deque(maxlen=GRAPHS_KEPT)
        self._count = 0
        self._lock = threading.Lock()

    def begin(self, nodes: int) -> GraphFinds:
        """Open the record of the next graph."""
        with self._lock:
            self._count += 1
            graph = GraphFinds(self._count, nodes)
            self._graphs.append(graph)
        return graph

    @property
    def graphs(self) -> list[GraphFinds]:
        """The last graphs, oldest first."""
        return list(self._graphs)

    @property
    def replaced(self) -> list[Find]:
        """What was replaced, in all graphs that are kept."""
        return [find for graph in self.graphs for find in graph.finds if find.replaced]

    @property
    def left(self) -> list[Find]:
        """What was recognised and left, with the reason."""
        return [find for graph in self.graphs for find in graph.finds if not find.replaced]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries: the number of graphs seen and, for each one kept, its finds."""
        return {"graphs_seen": self._count, "graphs": [asdict(graph) for graph in self.graphs]}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._graphs.clear()
            self._count = 0

    def __str__(self) -> str:
        from ..cli import print_table

        rows: list[list[Any]] = []
        for graph in self.graphs:
            alike: dict[tuple[str, ...], list[str]] = {}  # the blocks of one network: a row for all of them
            for find in graph.finds:
                done = f"{'replaced' if find.replaced else 'left'}: {find.reason}"
                alike.setdefault((find.what, _short(find.line), done), []).append(find.module)
            for (what, line, done), modules in alike.items():
                paths = list(dict.fromkeys(module for module in modules if module))
                several = [*paths[:1], "...", *paths[-1:]] if len(paths) > 2 else paths
                rows.append([graph.number, len(modules), what, "\n".join(several), line, done])
            if graph.error:
                rows.append([graph.number, "", "(whole graph)", "", "", f"left: {graph.error}"])
        nothing = sum(not graph.finds and not graph.error for graph in self.graphs)
        caption = f"{self._count} graphs, {len(self.replaced)} replaced, {len(self.left)} left"
        if nothing:
            caption += f"; nothing recognised in {nothing}"
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            print_table(
                'torch.compile(backend="dlkernels")',
                [">graph", ">times", "found", "module", "line", "what was done"],
                rows,
                caption,
            )
        return text.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<CompileReport: {self._count} graphs, {len(self.replaced)} replaced, {len(self.left)} left>"


_REPORT = CompileReport()


def _short(line: str) -> str:
    """A path from its package on, or its last two parts."""
    _, found, inside = line.rpartition("site-packages/")
    return inside if found else "/".join(line.split("/")[-2:])


def compile_report() -> CompileReport:
    """What `torch.compile(model, backend="dlkernels")` found in this process.

    Returns:
        A `CompileReport`: printing it shows a table; `.replaced`, `.left`, `.graphs`, `.to_dict()`, `.clear()`. The
        last 200 graphs are kept.
    """
    return _REPORT
