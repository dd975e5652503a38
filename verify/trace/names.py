"""Names and exponents: what axes, roles and patterns are called, and how sizes grow with the width."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import log

from sympy import Expr, Rational

from widthwise.derive.graph import Dim
from widthwise.verify.trace.axes import Axis
from widthwise.verify.trace.sites import Site

POWERS = tuple(Fraction(p, q) for q in (1, 2, 3, 4) for p in range(-2 * q, 2 * q + 1))


def exact_power(values: Sequence[float], widths: Sequence[int]) -> Fraction | None:
    """The power of the width that values follow exactly (floats: to 12 digits), if there is one."""
    if all(isinstance(each, int) for each in values):
        for power in POWERS:
            p, q = power.numerator, power.denominator
            if all(
                values[0] ** q * Fraction(width, widths[0]) ** p == value**q
                for value, width in zip(values, widths, strict=True)
            ):
                return power
        return None
    for power in POWERS:
        if all(
            abs(value / values[0] / (width / widths[0]) ** float(power) - 1) < 1e-12
            for value, width in zip(values, widths, strict=True)
        ):
            return power
    return None


def nearest_power(values: Sequence[float], widths: Sequence[int]) -> Fraction:
    """The slope of the values over the width, rounded to the next half."""
    last = max(range(len(widths)), key=lambda at: abs(log(widths[at] / widths[0])))
    slope = log(values[last] / values[0]) / log(widths[last] / widths[0])
    return Fraction(round(2 * slope), 2)


class Names:
    """Hands out names, each once, and remembers what it had to round."""

    def __init__(self, widths: Sequence[int], sites: Sequence[Site], everything: Sequence[str]) -> None:
        """``sites`` are those that are left after folding; ``everything`` are the names of all parameters."""
        self.widths = tuple(widths)
        self.warnings: list[str] = []
        self.practical: dict[Axis, int] = {}
        self._taken: set[str] = set()
        self._dims: dict[Axis, Dim] = {}
        self._all = tuple(everything)
        self._patterns: dict[Site, tuple[str, ...]] = {}
        self._roles = self._name_roles([site for site in sites if site.kind == "parameter"])

    def unique(self, name: str) -> str:
        """The name, or the name with a number."""
        made, count = name, 1
        while made in self._taken:
            count += 1
            made = f"{name}_{count}"
        self._taken.add(made)
        return made

    # -- exponents ---------------------------------------------------------------------------------------------

    def power(self, values: Sequence[float], where: Site) -> Expr:
        """The exponent that numbers of the forward pass follow.

        Raises:
            DeriveError: when they follow none.
        """
        if any(value == 0 for value in values):
            raise where.refuse(f"a factor is zero: {tuple(values)}")
        found = exact_power(tuple(map(float, values)), self.widths)
        if found is None:
            raise where.refuse(f"the factors {', '.join(f'{each:g}' for each in values)} follow no power of the width")
        return Rational(found.numerator, found.denominator)

    def dim(self, axis: Axis) -> Dim:
        """The engine's axis, with the exponent that its sizes show."""
        axis = axis.root
        if axis not in self._dims:
            name = self.unique("width" if axis.sizes == self.widths else _identifier(axis.origin) or "axis")
            exponent = self.exponent(axis.sizes, f"axis {name}")
            self._dims[axis] = Dim(name, exponent, self.practical.get(axis, 4096) if exponent != 0 else 4096)
        return self._dims[axis]

    def exponent(self, sizes: Sequence[int], what: str) -> Expr:
        """How sizes grow; where they follow no power exactly, the nearest, with a warning."""
        found = exact_power(sizes, self.widths)
        if found is None:
            found = nearest_power(sizes, self.widths)
            self.warnings.append(
                f"{what} has {', '.join(map(str, sizes))} entries at widths {', '.join(map(str, self.widths))}: "
                f"no power of the width; taken as n^{found}"
            )
        return Rational(found.numerator, found.denominator)

    # -- roles and patterns ------------------------------------------------------------------------------------

    def role(self, site: Site, piece: int | None = None) -> str:
        base = self._roles[site]
        return base if piece is None else self.unique(f"{base}_{piece}")

    def patterns(self, site: Site) -> tuple[str, ...]:
        """Globs for the real names of a parameter: numbers that vary become *, if that names nothing else."""
        if site in self._patterns:
            return self._patterns[site]
        found: dict[str, None] = {}
        forms: dict[str, list[str]] = {}
        for name in site.names:
            forms.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
        for names in forms.values():
            parts = [name.split(".") for name in names]
            glob = ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))
            match = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
            alone = all(name in site.names for name in self._all if match.fullmatch(name))
            found.update(dict.fromkeys([glob] if alone else names))
        self._patterns[site] = tuple(found)
        return self._patterns[site]

    def _name_roles(self, parameters: Sequence[Site]) -> dict[Site, str]:
        """The shortest end of each name that is its alone: ``q_proj``, else ``attn_q_proj``; a bias is
        ``q_proj_bias``."""
        parts = {site: _spoken(site.names[0]) for site in parameters}
        roles: dict[Site, str] = {}
        for site in parameters:
            mine = parts[site]
            others = [other for other in parts.values() if other != mine]
            length = 1
            while length < len(mine) and (
                mine[-length][0].isdigit() or any(other[-length:] == mine[-length:] for other in others)
            ):
                length += 1
            roles[site] = self.unique(_identifier("_".join(mine[-length:])))
        return roles


def _spoken(name: str) -> list[str]:
    """The parts of a parameter's name that say which it is: its layer, with ``_bias`` for the bias."""
    parts = name.split(".")
    layer = len(parts) - (2 if parts[-1] in ("weight", "bias") else 1)
    parts = [part for at, part in enumerate(parts) if at >= layer or not part.isdigit()]
    if parts[-1] == "weight" and len(parts) > 1:
        parts.pop()
    elif parts[-1] == "bias" and len(parts) > 1:
        parts[-2:] = [f"{parts[-2]}_bias"]
    return parts


def _identifier(text: str) -> str:
    made = re.sub(r"[^0-9A-Za-z_]+", "_", text).strip("_")
    return f"layer_{made}" if made[:1].isdigit() else made
