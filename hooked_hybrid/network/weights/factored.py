"""Low-rank products kept as two factors, as in the OV and QK circuits of an attention head."""

import operator
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor


class FactoredMatrix:
    """Represent the product `A @ B` without multiplying it out.

    Names and behaviour follow TransformerLens. `A` and `B` broadcast over their leading dimensions
    and are stored expanded (views, no copy). Everything is differentiable in `A` and `B`. Factors
    of 16 bits are decomposed in float32, and the results (`svd`, `eigenvalues`, `norm`,
    `make_even`, `collapse_l`, `collapse_r`) are float32 too. Gradients of decompositions need
    factors of full rank, and those of the singular vectors need distinct singular values.

    Attributes:
        A: Left factor [..., ldim, mdim].
        B: Right factor [..., mdim, rdim].
        shape, ndim: Shape of the product [..., ldim, rdim] and its number of dimensions.
        ldim, mdim, rdim: Rows of the product, inner dimension, columns of the product.
        has_leading_dims: Whether this is a batch of matrices.

    Raises:
        ValueError: If a factor is not a matrix, if the inner or leading dimensions do not fit, or
            if the factors differ in dtype or device.

    Examples:
        >>> from hooked_hybrid import FactoredMatrix
        >>> ov = FactoredMatrix(model.W_V.weight[0, 0], model.W_O.weight[0, 3])
        >>> ov.shape, ov.mdim  # of head 3, whose values every head of the layer shares
        (torch.Size([128, 128]), 16)
        >>> ov.svd()[1].shape
        torch.Size([16])
    """

    # The leading `_` leaves the check of mdim to `_check_product`, whose message says what to do.
    def __init__(self, A: Float[Tensor, "... ldim _mdim"], B: Float[Tensor, "... _mdim rdim"]):
        self.shape = _check_product(A.shape, B.shape)
        if A.dtype != B.dtype or A.device != B.device:
            left, right = f"{A.dtype} on {A.device}", f"{B.dtype} on {B.device}"
            raise ValueError(f"A is {left} and B is {right}: convert one with `.to(...)` first.")
        self.A: Tensor = A.expand(*self.shape[:-2], *A.shape[-2:])
        self.B: Tensor = B.expand(*self.shape[:-2], *B.shape[-2:])
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.ndim, self.has_leading_dims = len(self.shape), len(self.shape) > 2

    @property
    def pair(self) -> tuple[Float[Tensor, "... ldim mdim"], Float[Tensor, "... mdim rdim"]]:
        """Return the two factors (A [..., ldim, mdim], B [..., mdim, rdim])."""
        return self.A, self.B

    @property
    def T(self) -> "FactoredMatrix":
        """Return the transpose [..., rdim, ldim], still factored."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def AB(self) -> Float[Tensor, "... ldim rdim"]:
        """Return the product multiplied out [..., ldim, rdim]."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "... mdim mdim"]:
        """Return the factors multiplied in the other order [..., mdim, mdim].

        Raises:
            ValueError: If ldim differs from rdim.

        """
        if self.ldim != self.rdim:
            raise ValueError(
                f"BA and the eigenvalues need ldim == rdim, but the shape is {list(self.shape)}: "
                "use the singular values `.S` instead."
            )
        return self.B @ self.A

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, (Tensor, FactoredMatrix)):
            return NotImplemented
        _check_product(self.shape, (*other.shape, 1) if other.ndim == 1 else other.shape)
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if other.ndim == 1:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        if self.mdim < self.rdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return NotImplemented
        _check_product((1, *other.shape) if other.ndim == 1 else other.shape, self.shape)
        return self.T @ other if other.ndim == 1 else (self.T @ other.mT).T

    def __mul__(self, scalar: int | float | Tensor) -> "FactoredMatrix":
        if isinstance(scalar, Tensor):
            if scalar.numel() != 1:
                raise ValueError(
                    f"`*` takes a number or a 1-element tensor, not shape {list(scalar.shape)}: "
                    "use `@` for a matrix product, or scale `.A` or `.B`."
                )
            scalar = scalar.reshape(())
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Index the leading dimensions, then the rows (in A) and the columns (in B).

        An int keeps a row or column dimension with size 1, so the result stays factored, and drops
        a leading one. Lists of rows and of columns select a block, not pairs of entries.

        Raises:
            ValueError: If the index has too many entries, or one that cannot index rows or columns.
            IndexError: If an int is out of range.

        """
        leading, rows, columns = _split_index(index, self.shape)
        A, B = (self.A[leading], self.B[leading]) if leading else self.pair
        return FactoredMatrix(A[..., rows, :], B[..., :, columns])

    def __repr__(self) -> str:
        A = self.A
        return f"FactoredMatrix(shape={tuple(self.shape)}, mdim={self.mdim}, {A.dtype}, {A.device})"

    def svd(
        self,
    ) -> tuple[Float[Tensor, "... ldim k"], Float[Tensor, "... k"], Float[Tensor, "... rdim k"]]:
        """Return the singular value decomposition (U, S, Vh) of the product.

        As in TransformerLens, `Vh` holds V, not its transpose: `AB = U @ diag(S) @ Vh.mT`, unlike
        `torch.linalg.svd`. The [ldim, rdim] product is never formed: this works on the QR factors
        of A and B. Nothing is cached: to use several of `.U`, `.S` and `.Vh`, call this once.

        Returns:
            U [..., ldim, k], S [..., k] in descending order and Vh [..., rdim, k], where k is
            min(ldim, mdim, rdim), that is mdim for a low-rank product.

        Examples:
            >>> ov = analysis.ov_circuit(model, 5)
            >>> ov.svd()[1].shape
            torch.Size([8, 16])
        """
        A, B = self._wide().pair
        (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A), torch.linalg.qr(B.mT)
        U, S, V_transposed = torch.linalg.svd(R_A @ R_B.mT, full_matrices=False)
        return Q_A @ U, S, Q_B @ V_transposed.mT

    @property
    def U(self) -> Float[Tensor, "... ldim k"]:
        """Return the left singular vectors, as columns [..., ldim, k]."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "... k"]:
        """Return the singular values in descending order [..., k]."""
        return self.svd()[1]

    @property
    def Vh(self) -> Float[Tensor, "... rdim k"]:
        """Return the right singular vectors, as columns [..., rdim, k] (see `svd` for the name)."""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Complex[Tensor, "... mdim"]:
        """Return the eigenvalues of BA [..., mdim]: those of AB, up to zeros. Raises as `BA`."""
        return torch.linalg.eigvals(self._wide().BA)

    def norm(self) -> Float[Tensor, "..."]:
        """Return the Frobenius norm of each matrix [...], without forming the product.

        Examples:
            >>> analysis.ov_circuit(model, 5).norm().shape
            torch.Size([8])
        """
        A, B = self._wide().pair
        left = torch.linalg.qr(A).R if self.ldim > self.mdim else A
        return torch.linalg.matrix_norm(left @ B)

    def _wide(self) -> "FactoredMatrix":
        """Return the same product with factors in float32 or float64."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        if self.A.dtype == wide:
            return self
        return FactoredMatrix(self.A.to(wide), self.B.to(wide))

    def make_even(self) -> "FactoredMatrix":
        """Return the same product as (U sqrt(S)) @ (sqrt(S) Vh^T), with inner dimension k.

        Examples:
            >>> ov = analysis.ov_circuit(model, 5)
            >>> torch.allclose(ov.make_even().AB, ov.AB, atol=1e-4)
            True
        """
        U, S, Vh = self.svd()
        root = S.sqrt().unsqueeze(-2)
        return FactoredMatrix(U * root, (Vh * root).mT)

    def collapse_l(self) -> Float[Tensor, "... k rdim"]:
        """Return S Vh^T [..., k, rdim]: the product with its left rotation removed.

        Examples:
            >>> analysis.ov_circuit(model, 5).collapse_l().shape
            torch.Size([8, 16, 128])
        """
        _, S, Vh = self.svd()
        return S.unsqueeze(-1) * Vh.mT

    def collapse_r(self) -> Float[Tensor, "... ldim k"]:
        """Return U S [..., ldim, k]: the product with its right rotation removed.

        Examples:
            >>> analysis.ov_circuit(model, 5).collapse_r().shape
            torch.Size([8, 128, 16])
        """
        U, S, _ = self.svd()
        return U * S.unsqueeze(-2)

    def get_corner(self, k: int = 3) -> Float[Tensor, "..."]:
        """Return the first k entries of the product along every dimension, leading ones too.

        Examples:
            >>> analysis.ov_circuit(model, 5).get_corner(2).shape
            torch.Size([2, 2, 2])
        """
        return self[(slice(k),) * self.ndim].AB

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Insert a leading dimension of size 1 at position k of the result.

        Raises:
            ValueError: If k is not the position of a leading dimension.

        Examples:
            >>> analysis.ov_circuit(model, 5).unsqueeze(0).shape
            torch.Size([1, 8, 128, 128])
        """
        if not (0 <= k <= self.ndim - 2 or -self.ndim - 1 <= k <= -3):
            raise ValueError(
                f"Cannot insert a dimension at {k} in shape {list(self.shape)}: only leading ones "
                f"can be added, k from 0 to {self.ndim - 2} (or {-self.ndim - 1} to -3)."
            )
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))


def _check_product(left: tuple[int, ...], right: tuple[int, ...]) -> torch.Size:
    """Return the shape of a (batched) matrix product, or raise a ValueError that explains."""
    problem = f"Cannot multiply shape {list(left)} by shape {list(right)}: "
    if len(left) < 2 or len(right) < 2:
        raise ValueError(problem + "both need rows and columns; add one with `.unsqueeze`.")
    if left[-1] != right[-2]:
        raise ValueError(
            problem + f"the inner dimensions are {left[-1]} and {right[-2]} and must be equal. "
            "Check the order, or transpose one of them."
        )
    try:
        leading = torch.broadcast_shapes(left[:-2], right[:-2])
    except RuntimeError as error:
        raise ValueError(
            problem + f"the leading dimensions {list(left[:-2])} and {list(right[:-2])} do not "
            "broadcast. Add size-1 dimensions with `.unsqueeze`, or repeat the smaller one."
        ) from error
    return torch.Size((*leading, left[-2], right[-1]))


def _split_index(index: Any, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], Any, Any]:
    """Split an index into one for the leading dimensions, one for the rows, one for the columns."""
    index = index if isinstance(index, tuple) else (index,)
    entries = [torch.as_tensor(entry) if isinstance(entry, list) else entry for entry in index]
    missing = len(shape) - sum(entry is not None and entry is not ... for entry in entries)
    gap = next((i for i, entry in enumerate(entries) if entry is ...), len(entries))
    entries[gap : gap + 1] = [slice(None)] * missing
    try:
        masks = [e for e in entries if isinstance(e, Tensor) and e.dtype == torch.bool]
        if missing < 0 or any(mask.ndim != 1 for mask in masks):
            raise TypeError("too many entries, or a mask that is not 1-d")
        rows, columns = _keep_dim(entries[-2], shape[-2]), _keep_dim(entries[-1], shape[-1])
    except TypeError as error:
        raise ValueError(
            f"Index {index} does not fit a FactoredMatrix of shape {list(shape)} ({error}): give "
            f"at most {len(shape)} entries, for rows and columns an int, slice or 1-d tensor each. "
            "Add new dimensions before the rows; for anything else index `.AB`."
        ) from error
    return tuple(entries[:-2]), rows, columns


def _keep_dim(entry: Any, size: int) -> Any:
    """Turn a row or column index into one that keeps its dimension: an int i into i:i+1."""
    if isinstance(entry, slice) or (isinstance(entry, Tensor) and entry.ndim == 1):
        return entry
    position = operator.index(entry)
    if not -size <= position < size:
        raise IndexError(f"Index {position} is out of range for a dimension of size {size}.")
    return slice(position % size, position % size + 1)
