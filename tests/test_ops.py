"""The fused kernels against torch's operators, and those against the formulas."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import CPU, KERNEL_DEVICES, relative_error

from engine.ops import HeadNorms, Ops, TorchOps, choose_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SKIPPED = (1, 4)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(params=KERNEL_DEVICES)
def kernels(request: pytest.FixtureRequest) -> tuple[Ops, str]:
    from engine.triton_ops import TritonOps  # noqa: PLC0415 (a skipped run has no triton)

    return TritonOps(), request.param


def test_a_cpu_gets_torchs_operators() -> None:
    assert isinstance(choose_ops(CPU), TorchOps)


def test_torch_ops_follow_the_formulas() -> None:
    ops, x, residual, weight = (
        TorchOps(),
        draw((3, 8), torch.float64, "cpu"),
        draw((3, 8), torch.float64, "cpu", 1),
        2.0,
    )
    weights = torch.full((8,), weight, dtype=torch.float64)
    both = x + residual
    expected = both / (both.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(both, weights, 1e-3), expected)
    torch.testing.assert_close(ops.add_rms_norm(residual, x, weights, 1e-3), expected)
    torch.testing.assert_close(residual, both)
    gate, up = x[:, :4].clone(), x[:, 4:].clone()
    torch.testing.assert_close(ops.silu_and_mul(x), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("normed", [False, True])
def test_torch_ops_rotate_pairs_of_dimensions_by_their_angle_and_store_keys_and_values(normed: bool) -> None:
    heads, kv_heads, dim, page_tokens = 4, 2, 6, 4
    qkv = draw((5, (heads + 2 * kv_heads) * dim), torch.float64, "cpu")
    angles = draw((5, dim // 2), torch.float64, "cpu", 1)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norms = HeadNorms(*draw((2, dim), torch.float64, "cpu", 2), 1e-5) if normed else None
    cache = torch.full((3, 2, page_tokens, kv_heads, dim), 7.0, dtype=torch.float64)
    slots = torch.tensor([9, -1, 4, 3, -1])
    split = qkv.view(5, heads + 2 * kv_heads, dim).clone().split((heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        parts = [torch.nn.functional.rms_norm(split[0], (dim,), norms.q_weight, norms.eps)]
        parts += [torch.nn.functional.rms_norm(split[1], (dim,), norms.k_weight, norms.eps), split[2]]
    else:
        parts = list(split)

    def turned(x: torch.Tensor) -> torch.Tensor:
        number = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.exp(1j * angles)[:, None]
        return torch.cat((number.real, number.imag), -1)

    q = TorchOps().rotate_and_store(qkv, cos, sin, cache, slots, heads, kv_heads, norms)
    torch.testing.assert_close(q, turned(parts[0]))
    expected = torch.full_like(cache, 7.0)
    for token in range(5):
        if token not in SKIPPED:
            block, offset = divmod(int(slots[token]), page_tokens)
            expected[block, 0, offset], expected[block, 1, offset] = turned(parts[1])[token], parts[2][token]
    torch.testing.assert_close(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (7, 96), (3, 4096), (2, 5000)])
def test_kernels_norm_like_torch(kernels: tuple[Ops, str], dtype: torch.dtype, tokens: int, hidden: int) -> None:
    ops, device = kernels
    x, residual = draw((tokens, hidden), dtype, device, 1), 3 * draw((tokens, hidden), dtype, device, 2)
    weight = draw((hidden,), dtype, device, 3)
    expected = TorchOps().rms_norm(x, weight, 1e-5)
    assert relative_error(ops.rms_norm(x, weight, 1e-5), expected) < TOLERANCE[dtype]
    expected_residual = residual.clone()
    expected = TorchOps().add_rms_norm(expected_residual, x, weight, 1e-5)
    assert relative_error(ops.add_rms_norm(residual, x, weight, 1e-5), expected) < TOLERANCE[dtype]
    torch.testing.assert_close(residual, expected_residual, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 48), (5, 1664), (2, 2048)])
def test_kernels_gate_like_torch(kernels: tuple[Ops, str], dtype: torch.dtype, tokens: int, width: int) -> None:
    ops, device = kernels
    gate_up = 3 * draw((tokens, 2 * width), dtype, device)
    found = ops.silu_and_mul(gate_up.clone())
    assert found.shape == (tokens, width)
    assert relative_error(found, TorchOps().silu_and_mul(gate_up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_tokens"), [(8, 2, 64, 16), (7, 1, 80, 16), (4, 4, 96, 1), (32, 8, 128, 128)]
)
def test_kernels_rotate_and_store_like_torch(
    kernels: tuple[Ops, str], dtype: torch.dtype, normed: bool, heads: int, kv_heads: int, dim: int, page_tokens: int
) -> None:
    ops, device = kernels
    tokens = 6
    qkv = draw((tokens, (heads + 2 * kv_heads) * dim), dtype, device)
    angles = draw((tokens, dim // 2), torch.float32, device, 1)
    cos = torch.cat((angles.cos(),) * 2, -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    norms = HeadNorms(*draw((2, dim), dtype, device, 2), 1e-5) if normed else None
    slots = torch.randperm(12 * page_tokens, generator=torch.Generator().manual_seed(4))[:tokens].to(device)
    slots[list(SKIPPED)] = -1
    cache = draw((12, 2, page_tokens, kv_heads, dim), dtype, device, 5)
    expected_cache = cache.clone()
    expected = TorchOps().rotate_and_store(qkv.clone(), cos, sin, expected_cache, slots, heads, kv_heads, norms)
    untouched = cache.clone()
    q = ops.rotate_and_store(qkv, cos, sin, cache, slots, heads, kv_heads, norms)
    assert q.is_contiguous()
    assert relative_error(q, expected) < TOLERANCE[dtype]
    assert relative_error(cache, expected_cache) < TOLERANCE[dtype]
    written = (expected_cache != untouched).any(-1)
    assert written.sum() == 2 * kv_heads * (tokens - len(SKIPPED))
    assert torch.equal(cache[~written], untouched[~written]), "slots that no token names keep what they hold"


def test_the_kernels_compile_for_hopper_where_no_gpu_is() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), *sys.path])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "compiled_kernels.py")],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_rms_norm_kernel", "_add_rms_norm_kernel", "_silu_and_mul_kernel"] + [
        "_rotate_and_store_kernel"
    ] * 2 + ["_plan_kernel", "_attend_kernel", "_attend_kernel", "_attend_kernel", "_join_kernel"]
