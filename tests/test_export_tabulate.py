"""Tables over the timestep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlsd.export.tabulate import tabulate
from rlsd.export.trace import CUDA_REWRITES, REWRITES, to_aten


class Timed(nn.Module):
    """x times what depends on the timestep alone, by two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        waves = torch.sin(t[:, None] * torch.logspace(-3, 0, 64)).half().to(x.dtype)
        return x * self.second(nn.functional.silu(self.first(waves)))


@pytest.mark.parametrize("batch", [1, 3])
def test_tables_of_halves_are_computed_in_float32(batch: int) -> None:
    module = Timed().half()
    graph = to_aten(module, [torch.ones(batch, 16).half(), torch.arange(batch)], [*REWRITES, *CUDA_REWRITES])
    tables: dict[str, torch.Tensor] = {}
    tabulate(graph, 1, 1000, tables)
    with torch.no_grad():
        want = module.float()(torch.ones(1000, 16), torch.arange(1000))
    (table,) = tables.values()
    assert table.dtype == torch.float16 and table.shape == (1000, 16)
    assert torch.allclose(table.float(), want, rtol=1.01 * 2**-11, atol=1e-6)  # half of a last place


def test_what_does_not_have_its_samples_first_is_no_table() -> None:
    class Across(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * torch.sin(t.float())[None, :, None]

    module, given = Across(), (torch.randn(4, 2, 3), torch.tensor([3, 998]))
    graph = to_aten(module, given)
    tabulate(graph, 1, 1000, {})
    assert torch.equal(graph(*given), module(*given))
