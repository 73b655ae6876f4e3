"""Products B @ A by their factors: their singular values, their best factors of another rank, their distances.

B @ A itself, `out_features x in_features`, is never built: QR decompositions and Gram matrices reduce everything to
`rank x rank`. All functions but `with_rank` take any number of leading dimensions. B is given as rows per rank
component: A `(..., rank, in_features)`, B `(..., rank, out_features)`.
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
