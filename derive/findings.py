"""Findings: what the sizes imply and a hand derivation would miss. One function a criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from widthwise.derive.backward import Backward
from widthwise.derive.channels import channels
from widthwise.derive.exponents import HALF, ZERO, at_most, n_to, show
from widthwise.derive.facts import ancestry
from widthwise.derive.forward import Forward
from widthwise.derive.graph import atoms, extent
from widthwise.derive.ops.einsum import summed
from widthwise.derive.ops.norm import divisor
from widthwise.derive.ops.pointwise import NONLINEARITIES
from widthwise.derive.ops.structure import factor
from widthwise.derive.ops.weights import operator_norm
from widthwise.derive.optimizers import Law
from widthwise.derive.scan_norms import near_zero, outgrown
from widthwise.derive.table import Finding, RuleTable
from widthwise.derive.update import Update


def sinking_norms(walk: Forward) -> Iterator[Finding]:
    """A norm is scale-free only while what it divides by stays above its width-independent eps."""
    for node in walk.graph.ordered:
        if node.op not in ("rms_norm", "layer_norm", "l2_norm", "batch_norm"):
            continue
        source = node.inputs[0]
        maker = walk.graph.makers.get(source)
        size = divisor(node, walk.states[source].init.size)
        carrier = maker.attrs.get("carrier") if maker is not None and maker.op == "scale" else None
        applied = walk.knobs.value(factor(walk, maker)) if maker is not None and carrier else ZERO
        bare = size - applied
        if at_most(ZERO, bare):
            continue
        where = maker.inputs[0] if maker is not None and carrier else source
        cured = at_most(ZERO, size)
        message = (
            f"{where} has size {n_to(bare)} in front of a norm with eps {node.attrs['eps']:g}: as the width "
            f"grows it sinks below eps and the output dies"
        )
        cure = f"a multiplier {n_to(-bare)} before the norm, or its eps ∝ {n_to(2 * bare)}"
        if cured:
            cure += f" (applied here: {carrier} = {n_to(applied)})"
        yield Finding("norm-eps", where, bare, message, cure)


def near_zero_norms(walk: Forward) -> Iterator[Finding]:
    """What a norm divides by is nearest to zero at the first tokens of a sequence, in one of many heads."""
    for each in near_zero(walk):
        scan, norm = each.scan, each.norm
        q, k, v = scan.inputs[:3]
        yield Finding(
            "norm-tail",
            scan.output,
            each.exponent,
            f"{scan.output} of a sequence's first token is {v} times one inner product {q}·{k}, which may be near "
            f"zero, and {norm.output} divides by it. Of N such products (one a head, layer and sequence) the smallest "
            f"is 1/N of a typical one; the largest gradient through the norm grows with their number, "
            f"{n_to(each.exponent)}, until the norm's eps ({norm.attrs['eps']:g}) stops it",
            f"a norm eps near the typical mean square of {norm.inputs[0]}, say a third of it (measured: "
            "docs/results/transfer.md)",
        )


def loud_operators(walk: Forward) -> Iterator[Finding]:
    """W₀·Δx obeys the operator norm of W₀, which for few outputs lies above its size at initialization."""
    for node in walk.graph.ordered:
        if node.op != "linear":
            continue
        x, weight = walk.inputs(node)
        if x.change is None:
            continue
        role = node.attrs.get("carrier") or node.inputs[1]
        shape = walk.graph.shapes[node.inputs[1]]
        fan_in, fan_out = extent(atoms(shape[-1:])), extent(atoms(shape[:-1]))
        multiplier = walk.knobs.value(walk.multiplier(node, node.inputs[1]))
        excess = multiplier + weight.init.size + operator_norm(fan_in, fan_out) + x.change
        if "absolute" in walk.demands(node.output) and not at_most(excess, ZERO):
            yield Finding(
                "operator-norm",
                role,
                excess,
                f"the contribution of {role} to {node.output} grows as {n_to(excess)} once training aligns "
                f"{node.inputs[0]} with the initial weight: its operator norm exceeds its incoherent size, "
                f"because it has fewer outputs than inputs",
                f"initialize {role} with std ∝ {n_to(weight.init.size - excess)}",
            )


def nonlinear_means(walk: Forward) -> Iterator[Finding]:
    """A nonlinearity that is not odd leaves a mean, and a sum of products of means is coherent."""
    for met in walk.met:
        gap = met.partial.axis.exponent * HALF
        node = met.node
        practical = met.partial.crossover > met.partial.axis.practical
        now = (
            "incoherent up to there (this table)"
            if practical and walk.assume.nonlinear_mean == "crossover"
            else "coherent (this table)"
            if walk.assume.nonlinear_mean != "ignored"
            else "ignored (this table)"
        )
        yield Finding(
            "nonlinear-coherence",
            node.output,
            gap,
            f"the inner product over {met.partial.axis} behind {node.output} has a mean fraction of "
            f"{met.partial.fraction:.3f}, left by a nonlinearity: beyond {met.partial.axis} ≈ "
            f"{met.partial.crossover:.0f} it is coherent and {n_to(gap)} larger; {now}",
            "derive with --regime asymptotic for axes longer than that",
        )


def off_scale_inputs(walk: Forward) -> Iterator[Finding]:
    """A nonlinearity is felt only where its input is Θ(1)."""
    for node in walk.graph.ordered:
        if node.op not in NONLINEARITIES or node.op == "softmax":
            continue
        source = node.inputs[0]
        size = walk.states[source].init.size
        if not at_most(ZERO, size):
            trained = walk.states[source].trained
            yield Finding(
                "vanishing-input",
                source,
                size,
                f"{source} is {n_to(size)} at initialization, so {node.op} starts out at its value at "
                f"zero; training brings it to {n_to(trained)}",
                "none needed where training brings it to n^0"
                if at_most(ZERO, trained)
                else f"raise what makes {source} by {n_to(-trained)}",
            )


def broken_bounds(walk: Forward) -> Iterator[Finding]:
    """Knobs that were fixed by hand, or an architecture's own factors, may break a bound."""
    told: set[int] = set()
    for violation in walk.knobs.violations:
        fact = violation.constraint.fact
        downstream = any(id(cause) in told for cause in ancestry(fact))
        told.add(id(fact))
        if downstream or fact.because.startswith("W₀·Δx: "):
            continue  # told by its cause, or by loud_operators, which names the weight
        yield Finding(
            "growth",
            fact.subject,
            violation.excess,
            f"{fact.subject} is {n_to(violation.excess)} too large: {violation.constraint.reason}",
            f"lower what makes it by {n_to(-violation.excess)}",
        )


def met_again(walk: Forward) -> Iterator[Finding]:
    """A tied readout meets, in each token's own logit, the row that the token was read as: a sum of squares."""
    for node in walk.graph.ordered:
        if node.op != "linear" or node.attrs.get("base") != "fan_in":
            continue
        source, role = node.inputs
        shared = any(flip.source == role for term in walk.states[source].init.terms for flip in term.odd)
        if not shared or not any(reader.op == "embedding" for reader, _ in walk.graph.consumers(role)):
            continue
        carrier = str(node.attrs.get("carrier") or role)
        excess = extent(atoms(walk.graph.shapes[role][-1:])) * HALF
        base = n_to(excess).replace("n", "n_base", 1)
        yield Finding(
            "tied-readout",
            carrier,
            excess,
            f"each token meets its own row of {role} in {node.output}, a coherent sum: with the usual base multiplier "
            f"that one is {base} above the others, at every width. Sizes of gradients take weights and back-propagated "
            "gradients as independent at initialization, which holds only while these are Θ(1)",
            f"lower the base multiplier of {carrier} by {base}",
        )


def short_lived(walk: Backward, updates: Mapping[str, Update], law: Law) -> Iterator[Finding]:
    """A gain shared along a growing axis sums what it scales times its gradient: incoherent at initialization. But the
    first step of a linear map behind it, ΔW ∝ g xᵀ, sends back ΔWᵀg ∝ (gᵀg) x, which follows x itself, and so coheres
    with everything that scales x (a norm between would take just that part away)."""
    for node in walk.graph.ordered if walk.assume.forward_backward == "symmetry" else ():
        for role, other in (node.inputs, node.inputs[::-1]) if node.op == "einsum" else ():
            reader = _linear_behind(walk.forward, node.output)
            if role not in updates or reader is None:
                continue
            over = summed(node.shape, walk.graph.shapes[other], walk.graph.shapes[role])
            gradient = walk.gradients[node.output]
            gap = gradient.size + walk.trained(other).size + extent(over) - walk.gradients[role].size
            update = updates[role]
            late = replace(update.weight, gradient=update.weight.gradient + gap)
            slower = law.step(update.weight).entry - law.step(late).entry
            if slower != ZERO and not at_most(update.lr, update.allowed + slower):
                axes = ", ".join(map(str, over))
                yield Finding(
                    "early-branch",
                    role,
                    gap,
                    f"∂L/∂{role} is summed over {axes} incoherently at initialization, which its lr {n_to(update.lr)} "
                    f"rests on; from the first step of {reader} on it is coherent and {n_to(gap)} larger, because "
                    f"gradients then follow what {reader} reads, which {role} scales with no norm between",
                    f"lr {n_to(update.allowed + slower)} for more than the first steps, as with --regime asymptotic",
                )


def _linear_behind(walk: Forward, tensor: str) -> str | None:
    """The first weight of a linear map that reads a tensor, through nothing that would fix the tensor's scale."""
    passed = [tensor]
    for name in passed:  # grows on the way
        for reader, slot in walk.graph.consumers(name):
            if reader.op == "linear" and slot == 0:
                return reader.inputs[1]
            passes = reader.op in ("einsum", "reshape", "scale", "add", *NONLINEARITIES) and reader.op != "softmax"
            if passes and reader.output not in passed:
                passed.append(reader.output)
    return None


def wrong_steps(updates: Mapping[str, Update]) -> Iterator[Finding]:
    """A learning rate fixed by hand may move what it feeds by more than is tolerated, or by less and less."""
    for role, update in updates.items():
        if update.excess != ZERO:
            too = "grows" if at_most(ZERO, update.excess) else "vanishes" if at_most(update.excess, ZERO) else "drifts"
            yield Finding(
                "step-size",
                role,
                update.excess,
                f"with lr {n_to(update.lr)} the own step of {role} {too} as {n_to(update.excess)} relative to what it "
                "may move",
                f"lr {n_to(update.lr - update.excess)}",
            )


def drifting_gradients(walk: Backward) -> Iterator[Finding]:
    """A gradient that grows from layer to layer has no one rule for all layers of a repeated block."""
    for before, after in walk.graph.carries:
        if before in walk.gradients and after in walk.gradients:
            drift = walk.gradients[before].size - walk.gradients[after].size
            if drift != ZERO:
                yield Finding(
                    "gradient-depth",
                    before,
                    drift,
                    f"the gradient changes by {n_to(drift)} in each repeated layer; sizes printed are those of the "
                    "last layer",
                    "find the factor that the branch lacks (a norm on what grows, or a smaller fixed scale)",
                )


def outgrown_norms(walk: Forward, updates: Mapping[str, Update], law: Law) -> Iterator[Finding]:
    """Steps that follow gradients move what a norm divides by faster and faster; its output turns. Past the crossovers
    training has made q·k as coherent as its changes, and rates are smaller for it."""
    for each in outgrown(walk) if law.follows and walk.assume.regime != "asymptotic" else ():
        scan = each.scan
        free = [role for role in each.roles if not at_most(updates[role].lr, updates[role].allowed - each.excess)]
        if free:
            yield Finding(
                "norm-outgrown",
                scan.output,
                each.excess,
                f"steps of {', '.join(free)} move {scan.inputs[0]}·{scan.inputs[1]} coherently, which begins "
                f"incoherent: {scan.output} changes by {n_to(each.excess)} of its size, and as {each.norm.output} "
                "keeps its own, it turns by more in a wider model",
                f"lr of these {n_to(-each.excess)} slower, as with --regime throughout, and a larger norm eps "
                "(measured: docs/results/transfer.md)",
            )


def early_channels(walk: Backward, law: Law) -> Iterator[Finding]:
    """Where three or more factors multiply, steps that follow gradients let the channel that is ahead get away."""
    for each in channels(walk.graph) if law.follows and walk.assume.channels == "typical" else ():
        if each.counted != ZERO:
            yield Finding(
                "largest-channel",
                each.at,
                ZERO,
                f"{each.told}; under steps that follow gradients the largest channel gets away first, the sooner the "
                "more there are: until it is away the largest stable lr of these roles falls as "
                f"(ln N)^{show(each.counted)}, which is no power of n",
                "derive with --assume first-channel, or carrying-channel, which also slows what one channel carries "
                "once it is away (what they cost: docs/results/transfer.md), or sweep the learning rate again at "
                "several times the width",
            )


def other_branch(here: RuleTable, past: RuleTable) -> Iterator[Finding]:
    """Rules that change past the crossovers: both branches are derived, the one below them is printed."""
    rates = here.regime != "throughout"  # those hold on both sides already
    knobs = ("init_std", "multiplier", "lr") if rates else ("init_std", "multiplier")
    cure = "derive with --regime asymptotic for widths past the crossovers (docs/theory.md has estimates)"
    cure += ", or throughout for rates that hold on both sides" * rates
    for rule, other in zip(here.rules, past.rules, strict=True):
        for knob in knobs:
            mine, theirs = getattr(rule, knob), getattr(other, knob)
            if mine is not None and mine != theirs:
                yield Finding(
                    "crossover",
                    rule.role,
                    theirs - mine,
                    f"{knob} {n_to(mine)} below the crossovers, {n_to(theirs)} past them",
                    cure,
                )


def collect(walk: Backward, updates: Mapping[str, Update], law: Law) -> tuple[Finding, ...]:
    """All findings of one derivation, in the order of the criteria, each once."""
    found: dict[tuple[str, str], Finding] = {}
    for criterion in (
        sinking_norms,
        near_zero_norms,
        loud_operators,
        nonlinear_means,
        off_scale_inputs,
        met_again,
        broken_bounds,
    ):
        for finding in criterion(walk.forward):
            found.setdefault((finding.kind, finding.where), finding)
    trained = (*wrong_steps(updates), *short_lived(walk, updates, law), *drifting_gradients(walk))
    for finding in (*trained, *outgrown_norms(walk.forward, updates, law), *early_channels(walk, law)):
        found.setdefault((finding.kind, finding.where), finding)
    return tuple(found.values())
