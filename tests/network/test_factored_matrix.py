"""Properties of FactoredMatrix: every operation agrees with the product multiplied out."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from hooked_hybrid.network.weights.factored import FactoredMatrix
from tests.loops import looped

LOW_RANK = (7, 3, 5)  # ldim, mdim, rdim
SQUARE = (6, 3, 6)
WIDE_INNER = (4, 9, 5)  # the inner dimension is not a saving: the rank is min(ldim, rdim)
LEADING = {
    "none": ((), ()),
    "heads": ((2,), (2,)),
    "layers_and_heads": ((2, 3), (2, 3)),
    "grouped_query": ((4, 2), (4, 1)),  # one key or value matrix shared by the heads of a group
    "only_left": ((3,), ()),
    "only_right": ((), (3,)),
    "both_ways": ((1, 2), (3, 1)),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def factored(
    sizes: tuple[int, int, int] = LOW_RANK,
    leading: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> FactoredMatrix:
    ldim, mdim, rdim = sizes
    A = random(*leading[0], ldim, mdim, seed=seed, dtype=dtype)
    B = random(*leading[1], mdim, rdim, seed=seed + 100, dtype=dtype)
    return FactoredMatrix(A, B)


SIZES = {"low_rank": LOW_RANK, "square": SQUARE, "wide_inner": WIDE_INNER}


def every() -> Iterator[Any]:
    """Return a matrix of each kind of sizes and leading dimensions."""
    for (size, sizes), (lead, leading) in itertools.product(SIZES.items(), LEADING.items()):
        yield pytest.param(factored(sizes, leading), id=f"{size}-{lead}")


every_M = looped("M", every)


def orthonormal(columns: Tensor) -> bool:
    gram = columns.mT @ columns
    return torch.allclose(gram, torch.eye(gram.shape[-1], dtype=gram.dtype), atol=1e-12)


# Construction and attributes


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING.keys())
def test_the_shape_is_that_of_the_broadcast_product(leading):
    A, B = random(*leading[0], 7, 3), random(*leading[1], 3, 5)
    M = FactoredMatrix(A, B)
    assert M.shape == (A @ B).shape
    assert M.ndim == (A @ B).ndim
    assert (M.ldim, M.mdim, M.rdim) == (7, 3, 5)
    assert M.has_leading_dims == (M.ndim > 2)
    assert M.A.shape == (*M.shape[:-2], 7, 3)
    assert M.B.shape == (*M.shape[:-2], 3, 5)
    assert_close(M.AB, A @ B, rtol=0, atol=1e-14)


def test_broadcasting_copies_no_factor():
    A, B = random(4, 2, 7, 3), random(4, 1, 3, 5)
    M = FactoredMatrix(A, B)
    assert M.A.data_ptr() == A.data_ptr()
    assert M.B.data_ptr() == B.data_ptr()


@every_M
def test_pair_is_the_two_factors(M):
    assert M.pair[0] is M.A
    assert M.pair[1] is M.B


@every_M
def test_transpose_transposes_the_product(M):
    assert isinstance(M.T, FactoredMatrix)
    assert torch.equal(M.T.AB, M.T.A @ M.T.B)
    assert_close(M.T.AB, M.AB.mT)
    assert torch.equal(M.T.T.A, M.A)


def test_repr_shows_the_shape_and_the_inner_dimension():
    text = repr(factored(LOW_RANK, ((2,), (2,))))
    assert "(2, 7, 5)" in text
    assert "mdim=3" in text


# Products


@every_M
@pytest.mark.parametrize("columns", [2, 11])
def test_times_a_matrix_stays_factored_and_is_the_product(M, columns):
    X = random(M.rdim, columns)
    product = M @ X
    assert isinstance(product, FactoredMatrix)
    assert product.mdim == min(M.mdim, M.rdim)
    assert_close(product.AB, M.AB @ X)


@every_M
@pytest.mark.parametrize("rows", [2, 11])
def test_a_matrix_times_it_stays_factored_and_is_the_product(M, rows):
    X = random(rows, M.ldim)
    product = X @ M
    assert isinstance(product, FactoredMatrix)
    assert product.mdim == min(M.mdim, M.ldim)
    assert_close(product.AB, X @ M.AB)


@every_M
def test_times_a_vector_is_a_tensor(M):
    v = random(M.rdim)
    assert isinstance(M @ v, Tensor)
    assert_close(M @ v, M.AB @ v)


@every_M
def test_a_vector_times_it_is_a_tensor(M):
    v = random(M.ldim)
    assert isinstance(v @ M, Tensor)
    assert_close(v @ M, v @ M.AB)


def test_a_parameter_multiplies_like_a_tensor():
    M, W = factored(), torch.nn.Parameter(random(5, 7))
    assert_close((M @ W).AB, M.AB @ W)
    assert_close((W @ M).AB, W @ M.AB)


def test_leading_dims_of_a_matrix_operand_broadcast():
    M = factored(LOW_RANK, ((2, 1), (2, 1)))
    assert (M @ random(3, 5, 4)).shape == (2, 3, 7, 4)
    assert_close((M @ random(3, 5, 4)).AB, M.AB @ random(3, 5, 4))
    assert_close((random(3, 4, 7) @ M).AB, random(3, 4, 7) @ M.AB)


@every_M
@pytest.mark.parametrize("mdim", [2, 8])
def test_product_of_two_is_the_product_with_the_smallest_inner_dimension(M, mdim):
    N = factored((M.rdim, mdim, 10), seed=2)
    product = M @ N
    assert isinstance(product, FactoredMatrix)
    assert product.mdim == min(M.mdim, M.rdim, N.mdim)
    assert_close(product.AB, M.AB @ N.AB)


def test_product_of_two_broadcasts_leading_dims():
    M, N = factored(SQUARE, ((2, 1), (2, 1))), factored(SQUARE, ((4,), (4,)), seed=2)
    assert (M @ N).shape == (2, 4, 6, 6)
    assert_close((M @ N).AB, M.AB @ N.AB)


@every_M
@pytest.mark.parametrize(
    "scalar", [2, -0.5, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[[2]]])], ids=str
)
def test_scaling_from_either_side_scales_the_product_and_keeps_shape_and_dtype(M, scalar):
    value = float(scalar)
    for scaled in (M * scalar, scalar * M):
        assert isinstance(scaled, FactoredMatrix)
        assert scaled.shape == M.shape
        assert scaled.A.dtype == torch.float64
        assert_close(scaled.AB, value * M.AB)


def test_ba_is_the_other_order():
    M = factored(SQUARE, ((4, 2), (4, 1)))
    assert_close(M.BA, M.B @ M.A)
    assert M.BA.shape == (4, 2, 3, 3)


# Decompositions


@every_M
def test_svd_reconstructs_the_product(M):
    U, S, Vh = M.svd()
    rank = min(M.ldim, M.mdim, M.rdim)
    assert U.shape == (*M.shape[:-1], rank)
    assert S.shape == (*M.shape[:-2], rank)
    assert Vh.shape == (*M.shape[:-2], M.rdim, rank)
    assert_close(U @ torch.diag_embed(S) @ Vh.mT, M.AB, rtol=1e-12, atol=1e-12)


@every_M
def test_singular_vectors_are_orthonormal(M):
    assert orthonormal(M.U)
    assert orthonormal(M.Vh)


@every_M
def test_singular_values_are_those_of_the_product_in_descending_order(M):
    assert_close(M.S, torch.linalg.svdvals(M.AB)[..., : M.S.shape[-1]], rtol=1e-12, atol=1e-12)
    assert (M.S.diff(dim=-1) <= 0).all()


@every_M
def test_u_s_vh_are_the_parts_of_svd(M):
    for part, expected in zip((M.U, M.S, M.Vh), M.svd(), strict=True):
        assert torch.equal(part, expected)


def test_svd_reconstructs_a_rank_deficient_product():
    A, B = random(7, 3), random(3, 5)
    A[:, 2] = 0
    U, S, Vh = FactoredMatrix(A, B).svd()
    assert orthonormal(U)
    assert orthonormal(Vh)
    assert S[-1] < 1e-12
    assert_close(U @ torch.diag(S) @ Vh.mT, A @ B, rtol=1e-12, atol=1e-12)


def test_svd_never_forms_the_product():
    M = factored((2**18, 2, 2**18))  # the product would take 512 GiB
    assert M.U.shape == (2**18, 2)
    assert M.norm().isfinite()
    assert M.make_even().shape == (2**18, 2**18)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING.keys())
def test_eigenvalues_are_those_of_the_product_without_its_zeros(leading):
    M = factored(SQUARE, leading)
    assert M.eigenvalues.is_complex()
    assert M.eigenvalues.shape == (*M.shape[:-2], 3)
    full = torch.linalg.eigvals(M.AB)
    for power in (1, 2, 3):  # equal power sums: equal multisets, whatever the order
        assert_close((M.eigenvalues**power).sum(-1), (full**power).sum(-1), rtol=1e-10, atol=1e-10)


@every_M
def test_norm_is_the_frobenius_norm(M):
    assert M.norm().shape == M.shape[:-2]
    assert_close(M.norm(), torch.linalg.matrix_norm(M.AB), rtol=1e-13, atol=0)
    assert_close(M.norm(), M.S.square().sum(-1).sqrt(), rtol=1e-13, atol=0)


@every_M
def test_make_even_keeps_the_product_and_balances_the_factors(M):
    even = M.make_even()
    assert_close(even.AB, M.AB, rtol=1e-12, atol=1e-12)
    assert_close(even.A.mT @ even.A, torch.diag_embed(M.S), rtol=1e-12, atol=1e-12)
    assert_close(even.B @ even.B.mT, torch.diag_embed(M.S), rtol=1e-12, atol=1e-12)


@every_M
def test_collapse_l_drops_the_left_rotation(M):
    assert M.collapse_l().shape == (*M.shape[:-2], M.S.shape[-1], M.rdim)
    assert_close(M.U @ M.collapse_l(), M.AB, rtol=1e-12, atol=1e-12)


@every_M
def test_collapse_r_drops_the_right_rotation(M):
    assert M.collapse_r().shape == (*M.shape[:-1], M.S.shape[-1])
    assert_close(M.collapse_r() @ M.Vh.mT, M.AB, rtol=1e-12, atol=1e-12)


# Indexing


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, None),
        (1, 2),
        (slice(None), 0),
        ...,
        (0, ...),
        None,
        (1, None),
        [0, 1],
        (torch.tensor([1, 0]), slice(None)),
        (torch.tensor([1, 0]), torch.tensor([2, 0])),
        torch.tensor([True, False]),
        (0, 1, slice(2, 5)),
        (..., slice(1, 3)),
        (..., slice(0, 4), slice(1, 3)),
        (0, ..., slice(1, 3)),
        (slice(None), 1, slice(None, None, 2), slice(2)),
        (..., [4, 0, 2], slice(None)),
        (0, slice(None), slice(None), torch.tensor([True, False, True, False, True])),
    ],
    ids=str,
)
def test_indexing_agrees_with_indexing_the_product(index):
    M = factored(LOW_RANK, ((2, 3), (2, 3)))
    assert isinstance(M[index], FactoredMatrix)
    assert_close(M[index].AB, M.AB[index])
    assert M[index].shape == M.AB[index].shape


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING.keys())
@pytest.mark.parametrize("row", [0, 6, -1, -7, torch.tensor(2)], ids=str)
def test_an_int_row_or_column_keeps_a_dimension_of_size_one(leading, row):
    M = factored((7, 3, 7), leading)
    row_slice = slice(int(row) % 7, int(row) % 7 + 1)
    assert_close(M[..., row, :].AB, M.AB[..., row_slice, :])
    assert_close(M[..., row].AB, M.AB[..., :, row_slice])
    assert_close(M[..., row, row].AB, M.AB[..., row_slice, row_slice])


def test_the_first_index_of_a_single_matrix_is_a_row():
    M = factored()
    assert M[2].shape == (1, 5)
    assert_close(M[2].AB, M.AB[2:3])


def test_row_and_column_lists_select_a_block():
    M = factored(LOW_RANK, ((2,), (2,)))
    assert_close(M[..., [5, 1], [0, 3, 4]].AB, M.AB[..., [5, 1], :][..., [0, 3, 4]])
    picked = M[[1, 0], [5, 1, 2]]
    assert_close(picked.AB, M.AB[[1, 0]][..., [5, 1, 2], :])


def test_iterating_visits_every_matrix_of_the_first_dimension_once():
    M = factored(LOW_RANK, ((3,), (3,)))
    assert [matrix.shape for matrix in M] == [(7, 5)] * 3
    assert len(list(factored())) == 7


def test_get_corner_is_the_corner_of_the_product():
    M = factored()
    assert_close(M.get_corner(), M.AB[:3, :3])
    assert_close(M.get_corner(2), M.AB[:2, :2])
    assert M.get_corner(100).shape == M.shape


def test_get_corner_crops_leading_dims_too():
    M = factored(LOW_RANK, ((4, 2), (4, 1)))
    assert_close(M.get_corner(3), M.AB[:3, :3, :3, :3])


@pytest.mark.parametrize("k", [0, 1, 2, -3, -4, -5])
def test_unsqueeze_adds_a_leading_dimension(k):
    M = factored(LOW_RANK, ((4, 2), (4, 1)))
    assert torch.equal(M.unsqueeze(k).AB, M.AB.unsqueeze(k))
    assert M.unsqueeze(k).shape == M.AB.unsqueeze(k).shape


# Gradients and dtypes

DIFFERENTIABLE = {
    "AB": lambda M: M.AB,
    "matrix": lambda M: (random(2, M.ldim) @ M @ random(M.rdim, 2)).AB,
    "vector": lambda M: M @ random(M.rdim),
    "S": lambda M: M.S,
    "norm": lambda M: M.norm(),
    "projector": lambda M: M.U @ M.U.mT,  # free of the sign choice of the singular vectors
    "make_even": lambda M: M.make_even().AB,
    "collapse_l": lambda M: M.collapse_l().mT @ M.collapse_l(),
    "collapse_r": lambda M: M.collapse_r() @ M.collapse_r().mT,
    "index": lambda M: (3.0 * M)[..., 1, :].AB,
}


@looped("sizes", SIZES.values())
@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
@pytest.mark.parametrize("leading", [((), ()), ((2,), (1,))], ids=["single", "broadcast"])
def test_gradients_match_finite_differences(sizes, leading, function):
    factors = [factor.clone().requires_grad_() for factor in _unexpanded(sizes, leading)]
    assert torch.autograd.gradcheck(lambda A, B: function(FactoredMatrix(A, B)), factors)


def _unexpanded(sizes, leading) -> tuple[Tensor, Tensor]:
    ldim, mdim, rdim = sizes
    return random(*leading[0], ldim, mdim), random(*leading[1], mdim, rdim, seed=100)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_results_keep_the_dtype_of_the_factors(dtype, tolerance):
    M = factored(SQUARE, ((4, 2), (4, 1)), dtype=dtype)
    exact = factored(SQUARE, ((4, 2), (4, 1)), dtype=dtype)
    exact = FactoredMatrix(exact.A.double(), exact.B.double())
    assert M.eigenvalues.dtype == dtype.to_complex()
    for actual, expected in [
        (M.AB, exact.AB),
        (M.S, exact.S),
        (M.norm(), exact.norm()),
        (M.make_even().AB, exact.AB),
    ]:
        assert actual.dtype == dtype
        assert_close(actual.double(), expected, rtol=tolerance, atol=10 * tolerance)


# Errors


def test_mismatched_inner_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"\[7, 3\] by shape \[4, 5\].*3 and 4.*transpose"):
        FactoredMatrix(random(7, 3), random(4, 5))


def test_leading_dimensions_that_do_not_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\[4\] and \[3\] do not broadcast.*unsqueeze"):
        FactoredMatrix(random(4, 7, 3), random(3, 3, 5))


def test_a_vector_is_not_a_factor():
    # Under the jaxtyping import hook the annotation refuses it first.
    with pytest.raises((ValueError, TypeCheckError)):
        FactoredMatrix(random(3), random(3, 5))


def test_factors_of_different_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"float64.*float32.*\.to\("):
        FactoredMatrix(random(7, 3), random(3, 5, dtype=torch.float32))


def test_factors_on_different_devices_are_refused():
    with pytest.raises(ValueError, match=r"cpu.*meta.*\.to\("):
        FactoredMatrix(random(7, 3), random(3, 5).to("meta"))


@pytest.mark.parametrize(
    "operand",
    [random(4, 2), random(4), factored((4, 2, 3)), random(3, 5, 2), torch.tensor(2.0)],
    ids=["matrix", "vector", "factored", "leading", "scalar"],
)
def test_an_operand_on_the_right_that_does_not_fit_is_refused(operand):
    with pytest.raises(ValueError, match=r"Cannot multiply shape \[2, 7, 5\] by shape"):
        factored(LOW_RANK, ((2,), (2,))) @ operand


@pytest.mark.parametrize(
    "operand",
    [random(2, 4), random(4), random(3, 2, 7), torch.tensor(2.0, dtype=torch.float64)],
    ids=["matrix", "vector", "leading", "scalar"],
)
def test_an_operand_on_the_left_that_does_not_fit_is_refused(operand):
    with pytest.raises(ValueError, match=r"by shape \[2, 7, 5\]"):
        operand @ factored(LOW_RANK, ((2,), (2,)))


@pytest.mark.parametrize("operand", [2.0, "text", [[1.0]]], ids=str)
def test_a_product_with_something_else_is_a_type_error(operand):
    with pytest.raises(TypeError, match="unsupported operand"):
        factored() @ operand
    with pytest.raises(TypeError, match="unsupported operand"):
        operand @ factored()


def test_scaling_by_more_than_one_number_is_refused():
    for multiply in (lambda M, x: M * x, lambda M, x: x * M):
        with pytest.raises(ValueError, match=r"1-element tensor, not shape \[5\].*`@`"):
            multiply(factored(), random(5))


def test_eigenvalues_of_a_rectangular_product_are_refused():
    for attribute in ("BA", "eigenvalues"):
        with pytest.raises(ValueError, match=r"ldim == rdim.*\[7, 5\].*\.S"):
            getattr(factored(), attribute)


@pytest.mark.parametrize(
    "index",
    [
        (0, 0, 0, 0),
        (0, 0, None),
        (..., None),
        (0, "row"),
        (..., ..., 0),
        (0, [[0, 1], [1, 0]]),
        torch.ones(2, 7, dtype=torch.bool),
        torch.tensor(True),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_is_refused(index):
    with pytest.raises(ValueError, match=r"does not fit a FactoredMatrix of shape \[2, 7, 5\]"):
        factored(LOW_RANK, ((2,), (2,)))[index]


@pytest.mark.parametrize("index", [(0, 7), (0, -8), (0, 0, 5), 2, (0, [7])], ids=str)
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        factored(LOW_RANK, ((2,), (2,)))[index]


@pytest.mark.parametrize("k", [2, 3, -1, -2, -5])
def test_unsqueeze_next_to_the_matrix_dimensions_is_refused(k):
    with pytest.raises(ValueError, match=r"only leading ones.*0 to 1 \(or -4 to -3\)"):
        factored(LOW_RANK, ((2,), (2,))).unsqueeze(k)


def test_norm_of_a_zero_matrix_has_a_finite_gradient():
    A, B = random(7, 3).requires_grad_(), torch.zeros(3, 5, dtype=torch.float64)
    norm = FactoredMatrix(A, B).norm()
    norm.backward()
    assert math.isclose(norm.item(), 0.0)
    assert A.grad is not None
    assert A.grad.isfinite().all()
