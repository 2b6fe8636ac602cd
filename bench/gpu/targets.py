"""What the engine shall reach on one H100, and whether a result line does."""

from __future__ import annotations

from collections.abc import Sequence

from rlsd.bench.gpu import Line

MET, MISSED = "met", "missed"
OURS = "engine"
RATE = "A: particle-steps/s at N = 8"
AGAINST_COMPILE, AGAINST_PUBLISHED = "A: times torch.compile at N = 8", "A: times the published structure at N = 8"
SHARE = {"B": "B: share of the roofline", "C": "C: share of the roofline"}
PULL, REPULSION = "C: times torch.compile, forward and backward", "D: times PyTorch, N <= 256"
HOST, PACKED = "E: share of the time outside kernels", "F: times one after another"
ALL = (RATE, AGAINST_COMPILE, AGAINST_PUBLISHED, *SHARE.values(), PULL, REPULSION, HOST, PACKED)


def judge(line: Line) -> list[Line]:
    """The targets that a line has a figure for: target, name (with the case), wanted, value, verdict."""
    if line.get("method") != OURS or "median" not in line:
        return []
    speedup, found = line.get("speedup", {}), []

    def at_least(target: str, wanted: float, value: float | None) -> None:
        if value is not None:
            found.append(_verdict(line, target, f">= {wanted:g}", value, value >= wanted))

    match line["section"]:
        case "A" if line["particles"] == 8:
            at_least(RATE, 67, line["median"])
            at_least(AGAINST_COMPILE, 1.2, speedup.get("compiled"))
            at_least(AGAINST_PUBLISHED, 8, speedup.get("published"))
        case ("B" | "C") as section:
            at_least(SHARE[section], 0.55, line["roofline_share"] if line["batch"] >= 8 else None)
            at_least(PULL, 1.5, speedup.get("compiled") if line["both_ways"] else None)
        case "D" if line["particles"] <= 256:
            at_least(REPULSION, 5, speedup.get("pytorch"))
        case "E":
            found.append(_verdict(line, HOST, "<= 0.01", line["median"], line["median"] <= 0.01))
        case "F":
            at_least(PACKED, 2, speedup.get("one by one"))
    return found


def _verdict(line: Line, target: str, wanted: str, value: float, met: bool) -> Line:
    name = f"{target} ({line['case']})"
    return {"target": target, "name": name, "wanted": wanted, "value": value, "verdict": MET if met else MISSED}


def not_measured(judged: Sequence[Line]) -> list[str]:
    """The targets that no line had a figure for."""
    return [target for target in ALL if target not in {each["target"] for each in judged}]
