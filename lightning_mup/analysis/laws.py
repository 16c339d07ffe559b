"""How each method's loss falls with compute, from the runs that savings compare, with one irreducible loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_mup.analysis.forecast import Checklist, as_table
from lightning_mup.analysis.page import paragraphs, table
from lightning_mup.analysis.runs import listed
from lightning_mup.analysis.savings import COSTS, Carried, Savings
from lightning_mup.analysis.scaling_law import JointLaw, fit_joint

_COSTS = 3  # different costs that a method needs to say where its line lies
_HEADER = ("runs of", "C0 [95%]", "c [95%]", "points")


@dataclass(frozen=True)
class Laws:
    """``L = E + (C/C0)^-c`` of each method, with one E; or why there is none.

    Args:
        joint: the fit; None where the runs do not suffice.
        refused: why, ``""`` where they do.
        left_out: labels of methods with fewer than three different costs.
        checklist: what an exported fit must say.
    """

    joint: JointLaw | None
    refused: str = ""
    left_out: tuple[str, ...] = ()
    checklist: Checklist = field(default_factory=Checklist)

    def as_dict(self) -> dict[str, object]:
        """Return everything as plain values, with the checklist."""
        fit = as_table(self.joint, self.checklist) if self.joint else {"refused": self.refused}
        return {**fit, "left_out": list(self.left_out)}


def find_laws(savings: Savings) -> Laws:
    """Fit the laws of the runs that count; see :func:`~lightning_mup.analysis.scaling_law.fit_joint`.

    Args:
        savings: names the runs and what their cost is.

    Examples:
        >>> find_laws(Savings("adamw, mup", "", "flops", "val_loss", {}, {})).refused
        'no method has runs at 3 different costs'
    """
    enough = {label: c for label, c in savings.carried.items() if len({t.cost for t in c.trials}) >= _COSTS}
    left_out = tuple(label for label in savings.carried if label not in enough)
    if not enough:
        return Laws(None, f"no method has runs at {_COSTS} different costs", left_out)
    points = {label: ([t.cost for t in c.trials], [t.loss for t in c.trials]) for label, c in enough.items()}
    try:
        return Laws(fit_joint(points), left_out=left_out, checklist=_checklist(savings, enough))
    except ValueError as error:
        return Laws(None, str(error), left_out)


def law_parts(laws: Laws) -> list[str]:
    """Return the section of a report's page, as HTML.

    Examples:
        >>> law_parts(Laws(None, "too few runs"))[1]
        '<p>No law was fitted: too few runs.</p>'
    """
    title = "<h3>Loss against cost, as a law</h3>"
    if laws.joint is None:
        return [title, *paragraphs([f"No law was fitted: {laws.refused}."])]
    rows = [
        [label, str(law.estimates["C0"]), str(law.estimates["c"]), str(len(law.table["loss"]))]
        for label, law in laws.joint.laws.items()
    ]
    fitting = next(iter(laws.joint.laws.values())).fitting
    notes = dict.fromkeys(note for law in laws.joint.laws.values() for note in law.notes)
    told = [f"left out, because of too few costs: {listed(laws.left_out)}"] if laws.left_out else []
    return [
        title,
        *paragraphs(
            [f"L = E + (C/C0)^-c, with one irreducible loss E = {laws.joint.irreducible} nats for all methods."]
        ),
        table(_HEADER, rows),
        *paragraphs(
            [
                f"How: {fitting.objective}; {fitting.optimizer}; start: {fitting.start}, of which "
                f"{100 * fitting.agreeing:.0f}% agree; intervals: {fitting.intervals}.",
                *(f"{note[:1].upper()}{note[1:]}." for note in (*notes, *told)),
            ]
        ),
    ]


def _checklist(savings: Savings, carried: Mapping[str, Carried]) -> Checklist:
    runs = [run for found in carried.values() for run in found.runs]
    return Checklist(
        metric=savings.metric,
        loss="validation loss after the last step"
        if savings.metric == "val_loss"
        else "mean of the last tenth of steps",
        data=savings.data,
        runs=listed(sorted({run.name for run in runs})),
        flops=COSTS[savings.cost],
        training="one learning rate and weight decay at the base for all sizes of a method, carried over by its rules",
        selection="final losses of all runs with these settings, repeats included",
    )
