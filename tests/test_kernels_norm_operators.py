"""The torch operators of kernels/norm: their definitions, gradients and errors."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from norm_case import DEVICE, affine, double, normal  # noqa: E402

from rlsd.kernels import norm  # noqa: E402
from rlsd.kernels.norm import naive  # noqa: E402

# The definitions


@pytest.mark.parametrize("silu", [True, False])
def test_definitions_are_those_of_the_exporter(silu):
    export = pytest.importorskip("rlsd.export.ops")
    x, cotangent = normal((2, 4, 6, 12)).double(), normal((2, 4, 6, 12), seed=1).double()
    first = lambda t: t.permute(0, 3, 1, 2).contiguous()  # noqa: E731
    given = (*double(affine(12)), 3, 1e-5, silu)
    y, mean, rstd = naive.group_norm(x, *given)
    for ours, theirs in zip((first(y), mean, rstd), export.group_norm(first(x), *given), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = naive.group_norm_pull(cotangent, x, mean, rstd, *given[:3], silu)
    theirs = export.group_norm_pull(first(cotangent), first(x), mean, rstd, *given[:3], silu)
    assert torch.allclose(first(ours), theirs, rtol=1e-12, atol=1e-12)
    row, added = normal((2, 1, 1, 12), seed=4).double(), normal(x.shape, seed=5).double()
    for ours, theirs in zip(naive.group_norm(x, *given, row), export.group_norm(x, *given, True, row), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = naive.group_norm_pull(cotangent, x, mean, rstd, *given[:3], silu, added, row)
    theirs = export.group_norm_pull(cotangent, x, mean, rstd, *given[:3], silu, True, added, row)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(first(naive.interleave(x, "shuffle")), export.interleave(first(x)))
    assert torch.equal(first(naive.interleave_pull(x, "shuffle")), export.interleave_pull(first(x)))
    blocks = x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2).contiguous()
    assert torch.equal(naive.interleave(blocks, "blocks"), naive.interleave(x, "shuffle"))
    bias = normal((3,), seed=6).double()
    assert torch.equal(naive.interleave(blocks, "blocks", bias), export.interleave(blocks, True, bias))


@pytest.mark.parametrize("order", ["blocks", "shuffle"])
def test_interleave_pull_is_the_adjoint(order):
    phases, image = normal((2, 4, 5, 12)).double(), normal((2, 6, 8, 3)).double()
    across = (naive.interleave(phases, order) * image).sum()
    assert torch.allclose(across, (phases * naive.interleave_pull(image, order)).sum(), rtol=1e-12)


# The operators


@pytest.mark.parametrize("silu", [True, False])
def test_gradients(silu):
    x, other = (normal((2, 3, 2, 6), seed=seed).double().requires_grad_(True) for seed in (1, 2))
    export = pytest.importorskip("rlsd.export.ops")
    row, shared = (normal((n, 1, 1, 6), seed=3).double().requires_grad_(True) for n in (2, 1))
    given = (*double(affine(6)), 3, 1e-5, silu)
    assert torch.autograd.gradcheck(lambda x: norm.group_norm(x, *given)[0], (x,))
    assert torch.autograd.gradcheck(lambda x, r: norm.add_group_norm(x, r, *given)[::3], (x, other))
    for x_bias in (row, shared):
        assert torch.autograd.gradcheck(lambda x, b: norm.group_norm(x, *given, b)[0], (x, x_bias))
        assert torch.autograd.gradcheck(lambda x, b: export.group_norm(x, *given, True, b)[0], (x, x_bias))
        run = lambda x, r, b: norm.add_group_norm(x, r, *given, b)[::3]  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, other, x_bias))
    phases = normal((2, 3, 2, 8)).double().requires_grad_(True)
    for order in ("blocks", "shuffle"):
        assert torch.autograd.gradcheck(lambda p, order=order: norm.interleave(p, order), (phases,))


def test_no_gradient_where_none_is_promised():
    x, (weight, bias) = normal((1, 2, 2, 4)).requires_grad_(True), affine(4)
    _, mean, rstd = norm.group_norm(x, weight, bias, 2, 1e-5, True)
    assert not mean.requires_grad and not rstd.requires_grad
    with pytest.raises(NotImplementedError, match="weight and bias"):
        norm.group_norm(x, weight.requires_grad_(True), bias, 2, 1e-5, True)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="weight and bias"):
        norm.interleave(x, "blocks", torch.ones(1, device=DEVICE, requires_grad=True)).sum().backward()


def test_operators_are_what_they_register():
    x, residual = (normal((2, 3, 2, 8), torch.float16, seed=seed).requires_grad_(True) for seed in (1, 2))
    (weight, bias), x_bias = affine(8), normal((1, 1, 1, 8), torch.float16)
    statistics, image = (normal((2, 2)), normal((2, 2))), normal((2, 2, 4, 8), torch.float16)
    ops, tests = torch.ops.rlsd, ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, given in (
        (ops.group_norm_nhwc, (x, weight, bias, 2, 1e-5, True)),
        (ops.group_norm_nhwc, (x, weight, bias, 2, 1e-5, True, x_bias)),
        (ops.add_group_norm_nhwc, (x, residual, weight, bias, 2, 1e-5, True)),
        (ops.add_group_norm_nhwc, (x, residual, weight, bias, 2, 1e-5, True, x_bias)),
        (ops.group_norm_pull_nhwc, (x.detach(), x.detach(), *statistics, weight, bias, 2, True, residual.detach())),
        (ops.group_norm_pull_phases, (image, image, *statistics, weight, bias, 2, True)),
        (ops.bias_residual_nhwc, (x.detach(), bias, residual.detach(), True)),
        (ops.bias_residual_nhwc, (x.flatten(1, 2), bias, residual.flatten(1, 2), False)),
        (ops.interleave_nhwc, (x,)),
        (ops.interleave_nhwc, (x.detach(), "blocks", torch.ones(2, device=DEVICE))),
        (ops.interleave_pull_nhwc, (normal((1, 2, 4, 3)), "shuffle")),
    ):
        torch.library.opcheck(operator.default, given, test_utils=tests)


X, V, S = torch.zeros(2, 3, 2, 8), torch.zeros(8), torch.zeros(2, 2)


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", lambda: norm.group_norm(X[0], V, V, 2, 1e-5, True)),
        ("x", lambda: norm.group_norm(X.int(), V, V, 2, 1e-5, True)),
        ("x", lambda: norm.group_norm(X[:0], V, V, 2, 1e-5, True)),
        ("weight", lambda: norm.group_norm(X, V[:4], V, 2, 1e-5, True)),
        ("bias", lambda: norm.group_norm(X, V, X, 2, 1e-5, True)),
        ("groups", lambda: norm.group_norm(X, V, V, 3, 1e-5, True)),
        ("groups", lambda: norm.group_norm(X, V, V, 0, 1e-5, True)),
        ("epsilon", lambda: norm.group_norm(X, V, V, 2, -1.0, True)),
        ("epsilon", lambda: norm.group_norm(X, V, V, 2, float("inf"), True)),
        ("residual", lambda: norm.add_group_norm(X, X[:, :1].contiguous(), V, V, 2, 1e-5, True)),
        ("residual", lambda: norm.add_group_norm(X, X.half(), V, V, 2, 1e-5, True)),
        ("residual", lambda: norm.add_group_norm(X, X[:, :1, :1].contiguous(), V, V, 2, 1e-5, True)),
        ("x_bias", lambda: norm.group_norm(X, V, V, 2, 1e-5, True, V)),
        ("x_bias", lambda: norm.group_norm(X, V, V, 2, 1e-5, True, X[:, :1, :1].half())),
        ("x_bias", lambda: norm.add_group_norm(X, X, V, V, 2, 1e-5, True, X[:, :1].contiguous())),
        ("x_bias", lambda: norm.group_norm_pull(X, X, S, S, V, V, 2, True, None, torch.zeros(3, 1, 1, 8))),
        ("bias", lambda: norm.interleave(X, "blocks", V)),
        ("cotangent", lambda: norm.group_norm_pull(X.half(), X, S, S, V, V, 2, True)),
        ("mean", lambda: norm.group_norm_pull(X, X, S.half(), S, V, V, 2, True)),
        ("rstd", lambda: norm.group_norm_pull(X, X, S, S[:1], V, V, 2, True)),
        ("added", lambda: norm.group_norm_pull(X, X, S, S, V, V, 2, True, X[:1])),
        ("cotangent", lambda: norm.group_norm_pull_phases(X, X, S, S, V, V, 2, True)),
        ("added", lambda: norm.group_norm_pull_phases(X, X, S, S, V, V, 2, True, X[:1])),
        ("bias", lambda: norm.bias_residual(X, V[:4])),
        ("residual", lambda: norm.bias_residual(X, V, X[:1])),
        ("phases", lambda: norm.interleave(X[:, :1].contiguous())),
        ("phases", lambda: norm.interleave(X[..., :6].contiguous())),
        ("cotangent", lambda: norm.interleave_pull(X)),
        ("cotangent", lambda: norm.interleave_pull(X[:, :2, :1].contiguous())),
        ("order", lambda: norm.interleave(X, "rows")),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()


def test_strides_matter_on_a_gpu_only():
    x, v = normal((2, 3, 5, 8)).transpose(1, 2), torch.ones(8, device=DEVICE)
    calls = (
        lambda x: norm.group_norm(x, v, v, 2, 1e-5, True)[0],
        lambda x: norm.add_group_norm(x, x, v, v, 2, 1e-5, True)[0],
        lambda x: norm.bias_residual(x, v, x),
    )
    for call in calls:
        if DEVICE.type == "cuda":
            with pytest.raises(ValueError, match=r"^x "):
                call(x)
        else:
            assert torch.allclose(call(x), call(x.contiguous()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [0, 3])
def test_pull_back_of_one_result_of_a_normalised_sum(part):
    x, residual, weight, bias = (normal(shape).double() for shape in ((2, 3, 2, 8), (2, 3, 2, 8), (8,), (8,)))
    sources = [x.requires_grad_(), residual.requires_grad_()]
    given = (x, residual, weight, bias, 2, 1e-5, True)
    ours, plain = norm.add_group_norm(*given)[part], naive.add_group_norm(*given)[part]
    cotangent = normal(plain.shape, seed=3).double()
    pulled = zip(*(torch.autograd.grad(y, sources, cotangent) for y in (ours, plain)))
    assert all(torch.allclose(mine, known, rtol=0, atol=1e-12) for mine, known in pulled)


def test_pull_back_of_a_bias_and_residual():
    x, residual = (normal((2, 5, 8), seed=i).requires_grad_() for i in range(2))
    cotangent, bias = normal((2, 5, 8), seed=2), torch.ones(8, device=DEVICE)
    pulled = torch.autograd.grad(norm.bias_residual(x, bias, residual), [x, residual], cotangent)
    assert all(torch.equal(part, cotangent) for part in pulled)
    with pytest.raises(NotImplementedError, match="SiLU"):
        norm.bias_residual(x, bias, residual, True).sum().backward()
