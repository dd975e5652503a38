"""Which role limits the learning rate of SGD, and does that change with the width?

python bench/sgd_curvature.py > docs/results/sgd_curvature.md        # ten minutes on two idle CPU cores

The rules give each role a rate; steps are stable while rate times curvature stays below a constant. So the Hessian is
taken with every parameter scaled by the root of its rate (relative to the learning rate at the base width): its largest
eigenvalue, how much of that eigenvector lies in each role, and the largest eigenvalue of single roles. Each scaling
with a usual eps of the norms, and with one of a third of what the output norm typically reads (finding norm-tail).
"""

import argparse
import platform
from collections.abc import Sequence
from itertools import product
from math import sqrt
from multiprocessing import get_context

import torch
from coord_check_gates import BASE, batches
from torch import Tensor

from widthwise.codegen.request import Request
from widthwise.verify.coord.described import Described
from widthwise.verify.coord.run import Measurements
from widthwise.verify.coord.stats import fit
from widthwise.verify.coord.subject import Batch, Model
from widthwise.verify.data import VOCABULARY

LR, WARMUP, LENGTH = 0.1, 15, 16
STEPS = (0, 120)
CASES = tuple(product(("heads-fixed", "head-dim-fixed"), (1e-5, 2e-3)))  # scaling, eps of every norm
ROLES = ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj", "gate_proj", "embeddings")
SHARES = ("q_proj", "q_conv1d", "k_proj", "k_conv1d", "g_proj", "o_proj", "gate_proj", "embeddings")


def largest(
    loss: Tensor, parameters: Sequence[Tensor], scales: Sequence[float], times: int
) -> tuple[float, list[float]]:
    """The largest eigenvalue of the scaled Hessian, and the share of each parameter in its vector: power iteration."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    vector = [torch.randn_like(each) for each in parameters]
    size = 0.0
    for _ in range(times):
        size = sqrt(sum(float(each.square().sum()) for each in vector))
        along = sum((a * b / size * scale).sum() for a, b, scale in zip(gradients, vector, scales, strict=True))
        assert isinstance(along, Tensor)
        found = torch.autograd.grad(along, parameters, retain_graph=True)
        vector = [each * scale for each, scale in zip(found, scales, strict=True)]
    size = sqrt(sum(float(each.square().sum()) for each in vector))
    return size, [float(each.square().sum()) / size**2 for each in vector]


def note(found: Measurements, model: Model, rates: Sequence[float], probe: Batch, step: int, seed: int) -> None:
    roles, parameters = list(model.parameters), list(model.parameters.values())
    scales = [sqrt(rate / LR) for rate in rates]
    whole, shares = largest(model.forward(probe)["loss"], parameters, scales, 12)
    found.note("curvature", "all", step, seed, value=whole)
    for role, share in zip(roles, shares, strict=True):
        found.note("share", role, step, seed, value=share)
    for role in ROLES:
        index = roles.index(role)
        alone, _ = largest(model.forward(probe)["loss"], [parameters[index]], [scales[index]], 6)
        found.note("curvature", role, step, seed, value=alone)


def one(given: tuple[str, float, int, int]) -> Measurements:
    """Train one model under SGD with momentum 0.9 and clipping, and look at its curvature on the way."""
    scaling, eps, width, seed = given
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    request = Request("gated_deltanet", "sgd", scaling)
    graph = request.graph()
    usual = {"lm_head": BASE**-0.5, "a_proj": 1.0}
    sizes = {"vocab": VOCABULARY, "d_k": 16, "d_v": 32, "H": 4}
    model = Described(graph, request.table(graph), BASE, sizes=sizes, lr=LR, norm_eps=eps, multipliers=usual).make(
        width, seed
    )
    groups = model.optimizer.param_groups
    rates = [float(group["lr"]) for group in groups]
    data, probe = batches(seed, LENGTH), next(batches(seed + 99, LENGTH))
    found = Measurements((width,))
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            note(found, model, rates, probe, step, seed)
        model.optimizer.zero_grad(set_to_none=True)
        model.forward(next(data))["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(model.parameters.values()), 1.0)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"], group["momentum"] = rate * min(1.0, (step + 1) / WARMUP), 0.9
        model.optimizer.step()
    return found


def cell(found: Measurements, kind: str, name: str, step: int) -> str:
    slope = fit(found.widths, found.rows(kind, name, step, "value"))
    values = ", ".join(f"{each:.2g}" for each in found.average(kind, name, step, "value"))
    return f"{slope.value:+.2f} ± {slope.error:.2f} ({values})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    print("# What limits the learning rate of SGD\n")
    print(
        f"`python bench/sgd_curvature.py`: Gated DeltaNet, one layer, bytes of the Python standard library, momentum "
        f"0.9, learning rate {LR} at width {BASE}, widths {asked.widths}, {asked.seeds} seeds. Rate times curvature "
        "before training and after 120 steps: slope in n ± standard error (values by width); derived: 0. torch "
        f"{torch.__version__}, Python {platform.python_version()}.\n"
    )
    with get_context("spawn").Pool(asked.jobs) as pool:
        for scaling, eps in CASES:
            found = Measurements(tuple(asked.widths))
            for part in pool.imap(one, [(scaling, eps, w, s) for s, w in product(range(asked.seeds), asked.widths)]):
                found.join(part)
            print(f"## {scaling}, eps {eps:g}\n\n| | {' | '.join(f'step {step}' for step in STEPS)} |\n|---|---|---|")
            for name in ("all", *ROLES):
                print(f"| rate × curvature, {name} | {' | '.join(cell(found, 'curvature', name, s) for s in STEPS)} |")
            for name in SHARES:
                shares = (found.means("share", name, step, "value") for step in STEPS)
                told = " | ".join(", ".join(f"{100 * each:.0f}%" for each in share) for share in shares)
                print(f"| share of {name} in the top eigenvector, by width | {told} |")
            print(flush=True)


if __name__ == "__main__":
    main()
