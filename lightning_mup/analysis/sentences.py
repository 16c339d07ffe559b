"""What to see in each picture, one sentence each, made from the numbers and claiming no more than these."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_mup.analysis.features import Feature
from lightning_mup.analysis.groups import Group
from lightning_mup.analysis.transfer import WORDS, TransferReport

_SAME = 1.25  # a ratio between 1/1.25 and 1.25 is called the same
_CLOSE = 0.14  # octaves; 10%
_VERBS = {"stands": "stays where it is", "moves": "moves", "unclear": "cannot be told to stay or to move"}


def of_valleys(report: TransferReport) -> str:
    """Say how far each group's optimum is from the base's at the largest size, and how many runs diverged.

    Examples:
        >>> of_valleys(TransferReport((), "width", "lr", "val_loss", ""))
        'No run diverged.'
    """
    parts = [part for group in report.groups if (part := _shift(group, report))]
    count = len(report.diverged)
    runs = (
        "No run diverged"
        if not count
        else f"{count} {'run' if count == 1 else 'runs'} diverged (crosses in the band at the top)"
    )
    return f"{_joined(parts)}{runs}."


def in_short(group: Group, report: TransferReport) -> str:
    """Say in two lines what stands above a panel: whether the optimum moves, and what carrying it over costs."""
    drift, at, word = group.drift, group.target, WORDS[report.tuned]
    slope = f": slope {drift.slope:+.2f} [{drift.low:+.2f}, {drift.high:+.2f}]" if math.isfinite(drift.slope) else ""
    first = f"best {word} {drift.verdict}{slope}"
    if at is group.at_base or math.isnan(at.loss):
        return first
    cost = "diverges" if at.loss == math.inf else f"costs {at.lost:.3f} nats"
    return f"{first}\ncarried from {report.axis} {group.base} to {at.size}, it {cost}"


def of_drift(report: TransferReport) -> str:
    """Say how each group's optimum moves with size, with the slope and its interval.

    Examples:
        >>> of_drift(TransferReport((), "width", "lr", "val_loss", ""))
        ''
    """
    return " ".join(f"{_drift(group, report)}." for group in report.groups)


def of_losses(report: TransferReport) -> str:
    """Say what transferring costs at the largest size of each group.

    Examples:
        >>> of_losses(TransferReport((), "width", "lr", "val_loss", ""))
        ''
    """
    found = [_lost(group, report) for group in report.groups if group.target is not group.at_base]
    return " ".join(f"{text}." for text in found)


def of_features(features: Sequence[Feature], axis: str) -> str:
    """Say by which factor feature changes at the last step differ between the smallest and the largest size.

    Examples:
        >>> made = [Feature("muon, mup", n, "hidden", 10, 0.1 * n / 64) for n in (64, 128)]
        >>> of_features(made, "width")
        'From width 64 to 128, features change at step 10 by a factor of 2 (muon, mup: hidden).'
    """
    parts = []
    for label in dict.fromkeys(f.group for f in features):
        mine = [f for f in features if f.group == label]
        last, low, high = max(f.step for f in mine), min(f.size for f in mine), max(f.size for f in mine)
        at = {(f.size, f.role): f.value for f in mine if f.step == last}
        ratios = {
            role: at[high, role] / value for (size, role), value in at.items() if size == low and (high, role) in at
        }
        if not ratios:
            continue
        role = max(ratios, key=lambda r: abs(math.log(ratios[r])))
        same = 1 / _SAME < ratios[role] < _SAME
        what = (
            f"by at most 25% more or less ({label})" if same else f"by a factor of {ratios[role]:.2g} ({label}: {role})"
        )
        parts.append(f"From {axis} {low} to {high}, features change at step {last} {what}.")
    return " ".join(parts)


def of_cost(group: Group) -> str:
    """Say what tuning at the base cost, as a share of one target run and of tuning at the target; "" without target."""
    if not math.isfinite(group.share_of_run):
        return ""
    return (
        f"{group.label}: tuning at the base took {len(group.at_base.runs)} runs and {group.at_base.flops:.3g} FLOPs, "
        f"{_percent(group.share_of_run)} of one run at the largest size and {_percent(group.share_of_tuning)} of as "
        f"many runs there."
    )


def _shift(group: Group, report: TransferReport) -> str:
    base, target = group.at_base.optimum, group.target.optimum
    if group.target is group.at_base or not (base.bracketed and target.bracketed):
        return ""
    shift = target.log2_value - base.log2_value
    where = f"{group.label}: at {report.axis} {group.target.size} the best {WORDS[report.tuned]}"
    if abs(shift) < _CLOSE:
        return f"{where} is within {100 * (2.0**_CLOSE - 1):.0f}% of the base's"
    return f"{where} is {2.0**shift:.2g} times the base's"


def _drift(group: Group, report: TransferReport) -> str:
    drift = group.drift
    what = f"{group.label}: the best {WORDS[report.tuned]} {_VERBS[drift.verdict]} with {report.axis}"
    if not math.isfinite(drift.slope):
        return what
    return f"{what} (slope {drift.slope:+.2f}, 95% interval {drift.low:+.2f} to {drift.high:+.2f})"


def _lost(group: Group, report: TransferReport) -> str:
    at = group.target
    where = f"{group.label}: the base's best {WORDS[report.tuned]}"
    if at.loss == math.inf:
        return f"{where} diverges at {report.axis} {at.size}"
    if math.isnan(at.loss):
        return f"{where} is outside of what was run at {report.axis} {at.size}"
    if math.isnan(at.lost_low):
        return f"{where} costs about {at.lost:.3f} nats at {report.axis} {at.size} against the best one there"
    told = "which is more than noise" if at.lost_low > 0 else "which is not told apart from none"
    cost = f"costs {at.lost:.4f} nats at {report.axis} {at.size} against the best one there"
    return f"{where} {cost}, {told} (95% interval {at.lost_low:+.4f} to {at.lost_high:+.4f})"


def _joined(parts: Sequence[str]) -> str:
    return "".join(f"{part}. " for part in parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
