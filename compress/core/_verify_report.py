"""What verify gives back: checks and notices."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["integrity", "coverage", "parity"]
LEVELS: tuple[Level, ...] = ("integrity", "coverage", "parity")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `detail` says what was found or, if not ok, what is wrong and where."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass
class VerifyReport:
    """All checks of one folder. `notices` are things not checked, and why. `bytes`: weights that were looked at."""

    folder: Path
    level: Level
    checks: list[Check] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for --json."""
        checks = [
            {"name": check.name, "ok": check.ok, "detail": check.detail, "seconds": round(check.seconds, 3)}
            for check in self.checks
        ]
        return {
            "folder": str(self.folder),
            "level": self.level,
            "ok": self.ok,
            "bytes": self.bytes,
            "checks": checks,
            "notices": self.notices,
        }
