"""LayerNorm with a sum, and pull-backs of LayerNorm, GELU and softmax.

The kernels against float64 of their definitions, these against autograd.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from norm_case import DEVICE, affine, check, double, launching_fixture, normal  # noqa: E402, F401

from rlsd.kernels import norm  # noqa: E402
from rlsd.kernels.norm import naive, rows  # noqa: E402

TYPES = [torch.float16, torch.bfloat16, torch.float32]
EPSILON = 1e-5


kernels = pytest.mark.usefixtures("launching")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 384), (3, 1024), (1, 512)])
def test_layer_norm(shape, kind):
    cotangent, x, added = (normal(shape, kind, mean=mean, seed=mean) for mean in (0, 3, 1))
    weight = 1 + 0.5 * normal(shape[-1:])
    for more in (None, added):
        given = (cotangent, x, weight, EPSILON, more)
        exact = naive.layer_norm_pull(*double(given))
        check([rows.layer_norm_pull(*given)], [naive.layer_norm_pull(*given)], [exact], tiny=1e-6)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 320), (2, 1024), (1, 1280)])
def test_layer_norm_of_a_sum(shape, kind):
    x, residual = normal(shape, kind, mean=3), normal(shape, kind, mean=1, seed=1)
    x_bias, weight, bias = (normal(shape[-1:], seed=seed) for seed in (2, 3, 4))
    for more in (None, residual):
        given = (x, x_bias, weight, bias, EPSILON, more)
        exact = naive.add_layer_norm(*double(given))
        check(rows.add_layer_norm(*given), naive.add_layer_norm(*given), exact, tiny=1e-6)


@kernels
def test_what_is_normalised_is_the_sum_as_it_is_written():
    """Far from 0 halves are coarse: rows of the sum before its rounding would be normalised to something else."""
    x, residual = (normal((3, 48), torch.float16, mean=600, seed=seed) for seed in (0, 1))
    weight, bias, x_bias = affine(48)[0], torch.zeros(48, device=DEVICE), 0.3 * normal((48,), seed=2)
    y, total = rows.add_layer_norm(x, x_bias, weight, bias, EPSILON, residual)
    want = torch.nn.functional.layer_norm(total.double(), (48,), *double([weight, bias]), EPSILON)
    assert (y.double() - want).abs().max() < 2e-3


@kernels
def test_the_sum_may_be_written_where_the_result_will_be():
    """The engine does so where nobody wants the sum: a barrier lies between the two, which the watch looks for."""
    x, (weight, bias) = normal((3, 48)), affine(48)
    want, _ = naive.add_layer_norm(x, bias, weight, bias, EPSILON)
    y = torch.empty_like(x)
    rows.add_layer_norm_kernel[(3,)](x, bias, x, weight, bias, y, y, 48, EPSILON, 0, BLOCK=512, num_warps=2)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(3, 16), (5, 1000), (1, 2, 1024)])
def test_gelu(shape, kind):
    given = normal(shape, kind), 3 * normal(shape, kind, seed=1)
    check([rows.gelu_pull(*given)], [naive.gelu_pull(*given)], [naive.gelu_pull(*double(given))], tiny=1e-6)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (4, 197), (2, 1024), (1, 2, 2100)])
def test_softmax(shape, kind):
    y = torch.softmax(3 * normal(shape, seed=1), -1).to(kind)
    given = normal(shape, kind), y, 0.125
    check([rows.softmax_pull(*given)], [naive.softmax_pull(*given)], [naive.softmax_pull(*double(given))], tiny=1e-6)


def test_definitions_are_the_gradients():
    x, weight, bias = (normal(shape, seed=i).double() for i, shape in enumerate([(3, 5, 24), (24,), (24,)]))
    x.requires_grad_()
    cotangent = normal(x.shape, seed=4).double()

    def pulled(y):
        return torch.autograd.grad(y, x, cotangent)[0]

    want = pulled(torch.nn.functional.layer_norm(x, (24,), weight, bias, EPSILON))
    ours = norm.layer_norm_pull(cotangent, x.detach(), weight, EPSILON)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
    added = norm.layer_norm_pull(cotangent, x.detach(), weight, EPSILON, cotangent)
    torch.testing.assert_close(added, want + cotangent, rtol=1e-12, atol=1e-12)
    want = pulled(torch.nn.functional.gelu(x))
    torch.testing.assert_close(norm.gelu_pull(cotangent, x.detach()), want, rtol=1e-12, atol=1e-12)
    y = torch.softmax(0.5 * x, -1)
    want = pulled(y)
    torch.testing.assert_close(norm.softmax_pull(cotangent, y.detach(), 0.5), want, rtol=1e-12, atol=1e-12)


def test_the_exporters_operators_have_these_gradients():
    pytest.importorskip("rlsd.export.fused_ops")
    ours = torch.ops.rlsd
    x = normal((2, 3, 16)).double().requires_grad_()
    weight, bias = normal((16,), seed=1).double(), normal((16,), seed=2).double()
    assert torch.autograd.gradcheck(lambda x: ours.layer_norm(x, weight, bias, EPSILON), (x,))
    assert torch.autograd.gradcheck(ours.gelu, (x,))
    q, k, v = (normal((2, n, 16), seed=n).double().requires_grad_() for n in (3, 4, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: ours.attention(q, k, v, 2), (q, k, v))
    with pytest.raises(NotImplementedError, match="weight and bias"):
        ours.layer_norm(x, weight.requires_grad_(), bias, EPSILON).sum().backward()


def test_operators_are_what_they_register():
    x, weight = normal((2, 3, 16), torch.float16), normal((16,))
    for operator, given in (
        (torch.ops.rlsd.add_layer_norm, (x, weight, weight, weight, EPSILON, x)),
        (torch.ops.rlsd.layer_norm_pull, (x, x, weight, EPSILON, x)),
        (torch.ops.rlsd.gelu_pull, (x, x)),
        (torch.ops.rlsd.softmax_pull, (x, x, 0.5)),
    ):
        torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))


X, V = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", lambda: norm.add_layer_norm(V, V, V, V, EPSILON)),
        ("x_bias", lambda: norm.add_layer_norm(X, V[:4], V, V, EPSILON)),
        ("bias", lambda: norm.add_layer_norm(X, V, V, X, EPSILON)),
        ("epsilon", lambda: norm.add_layer_norm(X, V, V, V, -1.0)),
        ("residual", lambda: norm.add_layer_norm(X, V, V, V, EPSILON, X[:1])),
        ("x", lambda: norm.layer_norm_pull(V, V, V, EPSILON)),
        ("cotangent", lambda: norm.layer_norm_pull(X[:1], X, V, EPSILON)),
        ("weight", lambda: norm.layer_norm_pull(X, X, V[:4], EPSILON)),
        ("epsilon", lambda: norm.layer_norm_pull(X, X, V, -1.0)),
        ("added", lambda: norm.layer_norm_pull(X, X, V, EPSILON, X.half())),
        ("x", lambda: norm.gelu_pull(X, X.int())),
        ("cotangent", lambda: norm.gelu_pull(X.half(), X)),
        ("y", lambda: norm.softmax_pull(V, V)),
        ("cotangent", lambda: norm.softmax_pull(X[:1], X)),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
