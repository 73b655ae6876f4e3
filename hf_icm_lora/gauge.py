"""The gauge: B @ A is unique, (A, B) is not, and adapters of different origin must be brought into one form.

B R^-1 and R A are the same adapter for any invertible R, so two trainings that found the same change of the base model
have unrelated numbers. Two steps take that freedom away, and nothing else:

    balance   B and A get the same Gram matrix, B^T B = A A^T: what is left of R is a rotation
    align     of all rotations the one that brings them nearest to a reference

The first comes from the singular value decomposition. Its signs are arbitrary; where singular values are equal, so are
its order and directions. The second depends on neither: the nearest rotation to a reference changes little where the
adapter does (orthogonal Procrustes problem, Schönemann 1966).

B @ A itself, `out_features x in_features`, is never built: QR decompositions reduce everything to `rank x rank`. All
functions take any number of leading dimensions, B as rows per rank component: A `(..., rank, in_features)`,
B `(..., rank, out_features)`.
"""

import torch


def balance(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring pairs into the form of a singular value decomposition, sqrt(S) on each side.

    B^T = Q_b R_b and A^T = Q_a R_a (QR), R_b R_a^T = U S V^T (an `r x r` core), so B @ A is (Q_b U) S (Q_a V)^T. The
    sign of each component makes the largest entry of its row of A positive.

    Args:
        lora_a (`torch.Tensor` of shape `(..., rank, in_features)`), lora_b (`(..., rank, out_features)`).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: A and B of the same shapes, dtypes and product, and the
        singular values of the product `(..., rank)`, falling, in fp64.
    """
    q_b, r_b = torch.linalg.qr(lora_b.double().mT)
    q_a, r_a = torch.linalg.qr(lora_a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s.sqrt()[..., None]
    a, b = root * (vh @ q_a.mT), root * (q_b @ u).mT  # min(rank, in, out) components
    signs = a.gather(-1, a.abs().argmax(-1, keepdim=True)).sign()
    signs[signs == 0] = 1
    missing = lora_a.shape[-2] - s.shape[-1]  # where the rank is larger than a side, the rest is zero
    a, b = (torch.nn.functional.pad(signs * x, (0, 0, 0, missing)) for x in (a, b))
    return a.to(lora_a.dtype), b.to(lora_b.dtype), torch.nn.functional.pad(s, (0, missing))


def with_rank(
    lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Bring a pair to a rank: padded with zeros, which is exact, or cut to its largest singular values.

    Args:
        lora_a (`torch.Tensor` of shape `(own_rank, in_features)`), lora_b (`(own_rank, out_features)`).
        rank (`int`): The rank to come.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, float, float]`: A and B of that rank; the sum of the squared singular values
        that were cut off, and of all of them, which is the squared Frobenius norm of B @ A.
    """
    missing = rank - len(lora_a)
    if missing >= 0:
        energy = ((lora_a @ lora_a.T) * (lora_b @ lora_b.T)).sum().item()
        a, b = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (lora_a, lora_b))
        return a, b, 0.0, energy
    a, b, values = balance(lora_a, lora_b)
    squares = values.square()
    return a[:rank], b[:rank], squares[rank:].sum().item(), squares.sum().item()


def align(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    reference_a: torch.Tensor,
    reference_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate balanced pairs to lie nearest to a reference, which does not change their product.

    Args:
        lora_a, lora_b (`torch.Tensor`): As from [`balance`].
        reference_a, reference_b (`torch.Tensor`): Of the same shapes, or without the leading dimensions.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: R A and R B, where the rotation R minimizes |R A - reference_a|^2 +
        |R B - reference_b|^2.
    """
    pairs = ((reference_a, lora_a), (reference_b, lora_b))
    u, _, vh = torch.linalg.svd(sum(reference.double() @ own.double().mT for reference, own in pairs))
    rotation = u @ vh  # (..., rank, rank)
    return (rotation @ lora_a.double()).to(lora_a.dtype), (rotation @ lora_b.double()).to(lora_b.dtype)


def mean_reference(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    num_rounds: int = 10,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of balanced pairs after aligning each with it (generalized Procrustes analysis, Gower 1975).

    Args:
        lora_a (`torch.Tensor` of shape `(num_adapters, ..., rank, in_features)`), lora_b: As from [`balance`].
        num_rounds (`int`, *optional*, defaults to 10): Rounds of aligning and averaging, from the first adapter on.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The reference, without the first dimension.
    """
    reference = lora_a[0], lora_b[0]
    for _ in range(num_rounds):
        reference = tuple(x.mean(0) for x in align(lora_a, lora_b, *reference))
    return reference


def product_error(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    target_a: torch.Tensor,
    target_b: torch.Tensor,
) -> torch.Tensor:
    """Return the squared Frobenius norm of B @ A - target_b @ target_a, from `rank x rank` Gram matrices.

    With the difference written as one pair of twice the rank, |sum_i b_i a_i^T|^2 = sum_ij (b_i b_j) (a_i a_j).

    Args:
        lora_a, target_a (`torch.Tensor` of shape `(..., rank, in_features)`), lora_b, target_b (`(..., rank,
        out_features)`).

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    a, b = torch.cat([lora_a, target_a], dim=-2), torch.cat([lora_b, -target_b], dim=-2)
    return ((a @ a.mT) * (b @ b.mT)).sum((-1, -2))
