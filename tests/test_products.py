"""Products by their factors: one balanced form, the best pair of a lower rank, distances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_icm_lora.products import balance, product_error, with_rank

shapes = st.tuples(st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))  # rank, in_features, out_features
seeds = st.integers(0, 2**32 - 1)


def drawn(seed, *shape, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(seed, rank, width, height, *leading):
    return drawn(seed, *leading, rank, width), drawn(seed + 1, *leading, rank, height)


def product(a, b):
    return b.mT @ a


def invertible(seed, rank):
    """A matrix of condition number 6."""
    q1, q2 = (torch.linalg.qr(drawn(seed + i, rank, rank))[0] for i in (0, 1))
    return q1 @ torch.diag(torch.linspace(0.5, 3, rank, dtype=torch.double)) @ q2


def turned(a, b, r):
    """The same adapter in other coordinates: R A and B R^-1."""
    return r @ a, torch.linalg.inv(r).mT @ b


@given(seeds, shapes)
@settings(max_examples=60, deadline=None)
def test_balanced_form_depends_on_the_product_alone(seed, shape):
    a, b = pair(seed, *shape)
    balanced_a, balanced_b, singular_values = balance(a, b)
    torch.testing.assert_close(product(balanced_a, balanced_b), product(a, b))
    torch.testing.assert_close(balanced_a @ balanced_a.mT, torch.diag(singular_values), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(balanced_b @ balanced_b.mT, torch.diag(singular_values), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(singular_values, torch.linalg.svdvals(product(a, b))[: shape[0]])
    other_a, other_b, _ = balance(*turned(a, b, invertible(seed, shape[0])))
    torch.testing.assert_close(other_a, balanced_a, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other_b, balanced_b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("rank", "width", "height"), [(8, 6, 3), (8, 3, 6), (4, 4, 4), (1, 5, 5)])
@pytest.mark.parametrize("scale_of_b", [1.0, 0.0])
def test_odd_shapes_and_zero_b(rank, width, height, scale_of_b):
    a, b = drawn(0, rank, width, dtype=torch.float32), scale_of_b * drawn(1, rank, height, dtype=torch.float32)
    balanced_a, balanced_b, singular_values = balance(a, b)
    assert (balanced_a.shape, balanced_b.shape, singular_values.shape) == (a.shape, b.shape, (rank,))
    rows = balanced_a.norm(dim=1)
    assert (rows[1:] <= rows[:-1] + 1e-6).all()  # by falling singular value
    assert balanced_a.isfinite().all()
    assert balanced_b.isfinite().all()
    torch.testing.assert_close(product(balanced_a, balanced_b), product(a, b), atol=1e-5, rtol=1e-5)


def test_leading_dimensions_are_a_loop():
    a, b = pair(0, 3, 6, 5, 2, 4)
    together = balance(a, b)
    for i in range(2):
        for j in range(4):
            alone = balance(a[i, j], b[i, j])
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[i, j], other)


@given(seeds, shapes, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_pair_of_another_rank_is_the_best_that_the_rank_can_do(seed, shape, rank):
    a, b = pair(seed, *shape)
    cut_a, cut_b, lost, energy = with_rank(a, b, rank)
    assert (cut_a.shape, cut_b.shape) == ((rank, shape[1]), (rank, shape[2]))
    u, s, vh = torch.linalg.svd(product(a, b), full_matrices=False)
    torch.testing.assert_close(product(cut_a, cut_b), (u[:, :rank] * s[:rank]) @ vh[:rank])
    assert lost == pytest.approx(s[rank:].square().sum().item(), abs=1e-9)
    assert energy == pytest.approx(s.square().sum().item())


@given(seeds, shapes)
@settings(max_examples=30, deadline=None)
def test_product_error_is_that_of_the_products(seed, shape):
    one, other = pair(seed, *shape, 2), pair(seed + 9, *shape, 2)
    expected = (product(*one) - product(*other)).square().sum((-1, -2))
    torch.testing.assert_close(product_error(*one, *other), expected)
    torch.testing.assert_close(product_error(*one, *one), torch.zeros_like(expected), atol=1e-9, rtol=0)
