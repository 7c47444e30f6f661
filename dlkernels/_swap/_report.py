"""What a swap did and did not, to be read, kept and taken back."""

from __future__ import annotations

from collections import Counter
from typing import Any


class SwapReport:
    """What `dlkernels.swap` did to a model.

    Attributes:
        swapped: [(path, old class, new class)] of the modules that were changed, "" for the model itself.
        skipped: [(path, class, reason)] of the modules of these families that were not.
    """

    def __init__(
        self, swapped: list[tuple[str, str, str, str]], skipped: list[tuple[str, str, str]], undo: list[Any]
    ) -> None:
        self._changes = swapped
        self.swapped = [(path, old, new) for path, old, new, _ in swapped]
        self.skipped = skipped
        self._undo = undo

    def undo(self) -> int:
        """Give the modules their own classes back; the number of them. May be called more than once.

        A module whose class was changed again since then (by FSDP2, by a parametrization) is left.
        """
        count = 0
        for reference, old, new in self._undo:
            x = reference()
            if x is not None and type(x) is new:
                x.__class__ = old
                count += 1
        return count

    def counts(self) -> dict[str, int]:
        """Number of swapped modules by family; "blocks" are those that call several as one."""
        return dict(Counter(self._family(what) for *_, what in self._changes))

    @staticmethod
    def _family(what: str) -> str:
        from ._families import FAMILIES

        return what if what in FAMILIES else "blocks"

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists and strings, for JSON."""
        return {
            "swapped": [list(s) for s in self.swapped],
            "skipped": [list(s) for s in self.skipped],
            "counts": self.counts(),
        }

    def summary(self) -> str:
        """One line."""
        parts = [f"{n} {family}" for family, n in sorted(self.counts().items())]
        text = f"swapped {len(self.swapped)} modules" + (f" ({', '.join(parts)})" if parts else "")
        return text + (f", left {len(self.skipped)}" if self.skipped else "")

    def __repr__(self) -> str:
        return f"<SwapReport: {self.summary()}>"

    def __str__(self) -> str:
        """The table: one row per kind of change and reason, with the paths that it stands for."""
        from ..cli import table_text

        rows = []
        for (old, new, what), paths in _grouped((path, (old, new, what)) for path, old, new, what in self._changes):
            rows.append((paths, _short(old), f"{new}: {what}" if self._family(what) == "blocks" else new))
        for (old, reason), paths in _grouped((path, (old, reason)) for path, old, reason in self.skipped):
            rows.append((paths, _short(old), f"left: {reason}"))
        if not rows:
            return self.summary()
        return table_text(self.summary(), ["modules", "from", "to"], rows)


def _short(name: str) -> str:
    """The class, and the library that it is from."""
    return f"{name.rpartition('.')[2]} ({name.partition('.')[0]})"


def _grouped(pairs: Any) -> list[tuple[Any, str]]:
    """Paths under what they share; numbers in paths are one star."""
    groups: dict[Any, list[str]] = {}
    for path, key in pairs:
        groups.setdefault(key, []).append(path or "(the model)")
    out = []
    for key, paths in groups.items():
        stars = Counter(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
        out.append((key, "\n".join(f"{path} x {n}" if n > 1 else path for path, n in stars.items())))
    return out
