"""Sharded and replicated models: the same numbers on any number of processes. Each process runs this file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
from small_models import MLP  # noqa: E402
from torch import nn  # noqa: E402

N, PROCESSES = 50, 3  # rows that do not divide evenly
WIDTHS = {"width": N, "base_width": 10}


def steps(module, model: nn.Module, rows: slice = slice(None)) -> list[torch.Tensor]:
    """Parameters after three steps, in full, whoever holds them."""
    from torch.distributed.tensor import DTensor

    optimizer = torch.optim.AdamW(module.param_groups(model, lr=1e-2, weight_decay=0.1, **WIDTHS))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def sharded(module, dtype: torch.dtype) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    with torch.device("meta"):
        model = MLP(N).to(dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"call model.to_empty\(device=...\) first"):
        module.init_(model, **WIDTHS)
    model.to_empty(device="cpu")
    module.init_(model, **WIDTHS)
    return model


def replicated(module, dtype: torch.dtype) -> nn.Module:
    model = nn.parallel.DistributedDataParallel(MLP(N).to(dtype))
    module.init_(model, **WIDTHS)
    return model


MAKERS = {"FSDP2": sharded, "DDP": replicated}


def one_process(rank: int, directory: str, how: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, directory)
    import generated_mlp

    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{directory}/store", PROCESSES), rank=rank, world_size=PROCESSES
    )
    model = MAKERS[how](generated_mlp, torch.float64)
    after = steps(generated_mlp, model, slice(2 * rank, 2 * rank + 2))
    if how == "FSDP2":
        after += [parameter.full_tensor() for parameter in sharded(generated_mlp, torch.bfloat16).parameters()]
    if rank == 0:
        torch.save(after, f"{directory}/after.pt")
    dist.barrier()
    os._exit(0)  # taking gloo's group down can abort or hang (torch 2.13)


@pytest.mark.parametrize("how", MAKERS)
def test_several_processes_train_as_one(generated, tmp_path: Path, how: str) -> None:
    module = generated("mlp")
    (tmp_path / "generated_mlp.py").write_text(Path(module.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), how], env=env) for rank in range(PROCESSES)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * PROCESSES
    finally:
        for rank in ranks:
            rank.kill()
    alone = MLP(N).double()
    module.init_(alone, **WIDTHS)
    expected = steps(module, alone)
    if how == "FSDP2":
        rounded = MLP(N).bfloat16()
        module.init_(rounded, **WIDTHS)
        expected += list(rounded.parameters())
    for actual, value in zip(torch.load(tmp_path / "after.pt"), expected, strict=True):
        torch.testing.assert_close(actual, value.detach())


if __name__ == "__main__":
    one_process(int(sys.argv[1]), sys.argv[2], sys.argv[3])
