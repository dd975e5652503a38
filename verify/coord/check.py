"""The coordinate check: predictions, measurements and verdicts of one subject, as one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from widthwise.derive.errors import DeriveError
from widthwise.verify.coord.predict import Prediction
from widthwise.verify.coord.run import Measurements, measure
from widthwise.verify.coord.stats import MEANING, Result, Verdict, results
from widthwise.verify.coord.subject import Subject
from widthwise.verify.coord.words import finding

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Per tensor, for each step, the size at every width (geometric mean over seeds): at step 0 the tensor's, later that
of its change."""


@dataclass(frozen=True)
class Report:
    """What a check found. It passes when no verdict is ``fail``; what is not resolved is said, and fails a strict
    reader."""

    title: str
    rules: str
    widths: tuple[int, ...]
    seeds: int
    steps: int
    results: tuple[Result, ...]
    curves: Curves
    reference: Curves = field(default_factory=dict)
    interrupted: bool = False

    @property
    def counts(self) -> dict[Verdict, int]:
        counted = Counter(each.verdict for each in self.results)
        return {verdict: counted[verdict] for verdict in MEANING}

    @property
    def passed(self) -> bool:
        return not self.counts["fail"]

    @property
    def findings(self) -> tuple[str, ...]:
        """What failed, in words, in the order of the forward pass: the knobs themselves where they show, because the
        rest follows from them."""
        failed = [each for each in self.results if each.verdict == "fail"]
        knobs = [each for each in failed if each.kind in ("weight", "step")]
        rest = f"{len(failed) - len(knobs)} more predictions fail, which may follow from that."
        return (*map(finding, knobs or failed), *([rest] if 0 < len(knobs) < len(failed) else []))

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rules": self.rules,
            "widths": list(self.widths),
            "seeds": self.seeds,
            "steps": self.steps,
            "interrupted": self.interrupted,
            "passed": self.passed,
            "counts": self.counts,
            "meaning": MEANING,
            "findings": list(self.findings),
            "results": [each.as_dict() for each in self.results],
            "curves": {"rules": dict(self.curves), "standard": dict(self.reference)},
        }


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The widths in order.

    Raises:
        DeriveError: when they cannot tell a slope.
    """
    given = tuple(sorted(set(widths)))
    if len(given) < len(widths) or any(width < 1 for width in given):
        raise DeriveError(f"widths {' '.join(map(str, widths))} must differ and be positive", cure="give three or more")
    if len(given) < 3:
        raise DeriveError(
            f"{len(given)} widths cannot tell a power from something else",
            cure="give three or more, such as 64 128 256",
        )
    if given[-1] < 4 * given[0]:
        raise DeriveError(
            f"widths from {given[0]} to {given[-1]} are too close to tell exponents apart",
            cure="let the largest be at least four times the smallest",
        )
    return given


def coordinate_check(
    subject: Subject,
    predicted: Sequence[Prediction],
    widths: Sequence[int],
    *,
    title: str = "",
    rules: str = "",
    seeds: Sequence[int] = range(10),
    steps: int = 2,
    follows_gradient: bool = False,
    reference: Subject | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Run the subject at every width and seed and hold it against the predictions.

    Args:
        follows_gradient: the optimizer's steps are as heavy-tailed as its gradients, as SGD's are.
        reference: something to be shown beside, two seeds of it (the standard parametrization).
        progress: called after each of the ``(len(seeds) + 2 if reference) · len(widths)`` models.

    An interruption (Ctrl-C) ends it early, with what two or more whole seeds have shown.

    Raises:
        DeriveError: for widths that cannot tell a slope; a subject that cannot be run, or diverges.
    """
    widths = check_widths(widths)
    found, beside = Measurements(widths), Measurements(widths)
    interrupted = False
    wanted = {each.name for each in predicted} | {"loss"}
    try:
        if reference is not None:
            measure(reference, widths, list(seeds)[:2], steps=steps, wanted=wanted, progress=progress, into=beside)
        measure(subject, widths, seeds, steps=steps, wanted=wanted, progress=progress, into=found)
    except KeyboardInterrupt:
        interrupted = True
        if found.whole_seeds < 2:
            raise
    named = {each.name for each in predicted if each.kind == "forward"}
    crowded = {each.crowded.role: each.crowded for each in predicted if each.crowded is not None}
    slowed = {role: [subject.slowed(rule, width) for width in widths] for role, rule in crowded.items()}
    return Report(
        title,
        rules,
        widths,
        found.whole_seeds,
        steps,
        results(found, predicted, steps, follows_gradient=follows_gradient, slowed=slowed),
        curves(found, steps, named),
        curves(beside, steps, named),
        interrupted,
    )


def curves(found: Measurements, steps: int, wanted: Container[str]) -> Curves:
    """What a plot shows of these tensors."""
    names = [name for kind, name, step, _ in found.sizes if kind == "forward" and step == 0]
    drawn = {}
    for name in (name for name in dict.fromkeys(names) if name in wanted):
        panels = [found.average("forward" if step == 0 else "change", name, step, "rms") for step in range(steps + 1)]
        if all(panels):
            drawn[name] = panels
    return drawn
