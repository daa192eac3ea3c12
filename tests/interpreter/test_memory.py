"""What the watched interpreter catches, and that it lets sound kernels pass."""

from __future__ import annotations

import re

import pytest
import torch

from tests import where

if not where.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from gptfast.kernels.triton import launch
from gptfast.kernels.triton.tiles import Tile
from tests.interpreter import kernels


@pytest.mark.parametrize(("load", "store"), [(True, False), (False, True)])
def test_a_missing_mask(load: bool, store: bool) -> None:
    x, y = torch.randn(100), torch.empty(100)
    with pytest.raises(InterpreterError, match=r"28 of 64 lanes of a (load|store) are outside [xy], \(100,\)"):
        kernels._copy_kernel[(2,)](x, y, 100, IS_LOAD_MASKED=load, IS_STORE_MASKED=store, N=64)
    kernels._copy_kernel[(2,)](x, y, 100, IS_LOAD_MASKED=True, IS_STORE_MASKED=True, N=64)
    assert torch.equal(x, y)


def test_the_gaps_of_a_strided_tensor() -> None:
    wide = torch.randn(4, 10)
    with pytest.raises(InterpreterError, match="lanes of a load are outside"):
        kernels._copy_kernel[(1,)](wide[:, :8], torch.empty(32), 32, IS_LOAD_MASKED=True, IS_STORE_MASKED=True, N=32)
    y = torch.empty(16)
    kernels._copy_kernel[(1,)](wide.T[:1], y, 1, IS_LOAD_MASKED=True, IS_STORE_MASKED=True, N=16)
    assert y[0] == wide[0, 0]


def test_two_programs_write_one_element() -> None:
    x, y = torch.randn(128), torch.empty(128)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) writes what program \(0, 0, 0\) wrote, in y"):
        kernels._overlap_kernel[(2,)](x, y, STEP=63, N=64)
    kernels._overlap_kernel[(2,)](x, y, STEP=64, N=64)


@pytest.mark.parametrize(
    ("sources", "said"),
    [((0, 0), "reads what program (0, 0, 0) wrote"), ((1, 2), "writes what program (0, 0, 0) read")],
)
def test_one_program_reads_what_another_writes(sources: tuple[int, int], said: str) -> None:
    """Whichever of them the interpreter happens to run first."""
    x = torch.randn(3)
    with pytest.raises(InterpreterError, match=re.escape(said)):
        kernels._neighbour_kernel[(2,)](x, *sources)
    kernels._neighbour_kernel[(2,)](x, 0, 1)


def test_a_program_reads_what_it_wrote_without_a_barrier() -> None:
    x, y = torch.randn(64), torch.empty(64)
    with pytest.raises(InterpreterError, match="reads what it wrote with no barrier in between, in y"):
        kernels._reread_kernel[(1,)](x, y, IS_SAFE=False, N=64)
    kernels._reread_kernel[(1,)](x, y, IS_SAFE=True, N=64)
    assert torch.equal(y, x.flip(0))


def test_lanes_of_one_store_that_disagree() -> None:
    y = torch.empty(64, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="two lanes of one store of program"):
        kernels._lanes_kernel[(1,)](y, DIVISOR=2, N=64)
    kernels._lanes_kernel[(1,)](y, DIVISOR=1, N=64)


def test_memory_that_only_its_address_names() -> None:
    """A kernel may follow an address to a tensor that the launch was told of, and to no other."""
    x, y = torch.randn(64), torch.empty(64)
    addresses = torch.tensor([x.data_ptr()])
    with pytest.raises(InterpreterError, match="lanes of a load are outside"):
        kernels._indirect_kernel[(1,)](addresses, y, N=64)
    launch(kernels._indirect_kernel, (1,), addresses, y, N=64, tile=Tile(num_warps=1), reaches=[x])
    assert torch.equal(x, y)
