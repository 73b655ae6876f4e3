"""The gauge: pairs of one product have one form, which changes little where the product does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_icm_lora import LoraLayout
from hf_icm_lora.gauge import align, balance, mean_reference, product_error
from hf_icm_lora.layout import LoraModule

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


def canonical(a, b, reference):
    return align(*balance(a, b)[:2], *reference)


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


@given(seeds, shapes)
@settings(max_examples=60, deadline=None)
def test_canonical_form_is_invariant_and_idempotent_and_keeps_the_product(seed, shape):
    a, b = pair(seed, *shape)
    reference = pair(seed + 7, *shape)
    expected = canonical(a, b, reference)
    torch.testing.assert_close(product(*expected), product(a, b))
    permutation = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    for other in (
        turned(a, b, invertible(seed, shape[0])),
        (a[permutation], b[permutation]),
        (-a, -b),
        expected,
    ):
        for found, wanted in zip(canonical(*other, reference), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@given(seeds, shapes)
@settings(max_examples=30, deadline=None)
def test_product_survives_in_single_precision(seed, shape):
    a, b = (x.float() for x in pair(seed, *shape))
    reference = tuple(x.float() for x in pair(seed + 7, *shape))
    found_a, found_b = canonical(a, b, reference)
    assert (found_a.dtype, found_b.dtype) == (torch.float32, torch.float32)
    scale = product(a, b).abs().max().item()
    torch.testing.assert_close(product(found_a, found_b), product(a, b), atol=2e-6 * scale, rtol=1e-5)


@given(seeds, st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_equal_singular_values_do_not_unsettle_the_aligned_form(seed, rank):
    # Orthonormal factors: every singular value is 1, so a decomposition may return any rotation of them.
    a, b = (torch.linalg.qr(drawn(seed + i, 7, rank))[0].mT for i in (0, 1))
    # The reference overlaps with the pair, as the mean of a zoo does: else no rotation is the nearest.
    reference = (a + 0.1 * drawn(seed + 2, rank, 7), b + 0.1 * drawn(seed + 3, rank, 7))
    expected = canonical(a, b, reference)
    nearby = canonical(a + 1e-7 * drawn(seed + 4, rank, 7), b + 1e-7 * drawn(seed + 5, rank, 7), reference)
    for found, wanted in zip(nearby, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_without_a_reference_equal_singular_values_do_unsettle():
    # The control of the test above: what it guards against happens.
    a, b = (torch.linalg.qr(drawn(i, 7, 3))[0].mT for i in (0, 1))
    shift = max(
        (balance(a + 1e-7 * drawn(s, 3, 7), b + 1e-7 * drawn(s + 50, 3, 7))[0] - balance(a, b)[0]).abs().max().item()
        for s in range(10)
    )
    assert shift > 0.1


@pytest.mark.parametrize(("rank", "width", "height"), [(8, 6, 3), (8, 3, 6), (4, 4, 4), (1, 5, 5)])
@pytest.mark.parametrize("scale_of_b", [1.0, 0.0])
def test_odd_shapes_and_zero_b(rank, width, height, scale_of_b):
    a, b = drawn(0, rank, width, dtype=torch.float32), scale_of_b * drawn(1, rank, height, dtype=torch.float32)
    reference = drawn(2, rank, width, dtype=torch.float32), drawn(3, rank, height, dtype=torch.float32)
    balanced_a, balanced_b, singular_values = balance(a, b)
    assert (balanced_a.shape, balanced_b.shape, singular_values.shape) == (a.shape, b.shape, (rank,))
    rows = balanced_a.norm(dim=1)
    assert (rows[1:] <= rows[:-1] + 1e-6).all()  # by falling singular value
    for found in ((balanced_a, balanced_b), align(balanced_a, balanced_b, *reference)):
        assert all(x.isfinite().all() for x in found)
        torch.testing.assert_close(product(*found), product(a, b), atol=1e-5, rtol=1e-5)


def test_leading_dimensions_are_a_loop():
    a, b = pair(0, 3, 6, 5, 2, 4)
    reference = pair(5, 3, 6, 5, 4)
    together = canonical(a, b, reference)
    for i in range(2):
        for j in range(4):
            alone = canonical(a[i, j], b[i, j], (reference[0][j], reference[1][j]))
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[i, j], other)


def test_alignment_is_the_nearest_rotation():
    a, b, _ = balance(*pair(0, 3, 6, 5))
    reference = pair(9, 3, 6, 5)

    def distance(one):
        return sum((x - y).square().sum().item() for x, y in zip(one, reference, strict=True))

    best = distance(align(a, b, *reference))
    rotations = (torch.linalg.qr(drawn(seed, 3, 3))[0] for seed in range(200))
    assert all(best <= distance((q @ a, q @ b)) for q in rotations)


def test_the_mean_of_one_adapter_in_many_coordinates_is_that_adapter():
    a, b = pair(0, 3, 6, 5)
    turns = [turned(a, b, invertible(seed, 3)) for seed in range(5)]
    stacked = (torch.stack([x for x, _ in turns]), torch.stack([y for _, y in turns]))
    raw = product(*(x.mean(0) for x in stacked))
    found = product(*mean_reference(*balance(*stacked)[:2]))
    torch.testing.assert_close(found, product(a, b))
    assert (raw - product(a, b)).norm() > 0.1 * product(a, b).norm()  # of raw factors the mean is another adapter


def test_alignment_brings_noisy_copies_together():
    a, b = pair(0, 3, 6, 5)
    copies = [turned(a + 0.05 * drawn(s, 3, 6), b + 0.05 * drawn(s + 90, 3, 5), invertible(s, 3)) for s in range(8)]
    balanced = balance(*(torch.stack(x) for x in zip(*copies, strict=True)))[:2]
    aligned = align(*balanced, *mean_reference(*balanced))

    def spread(x):
        return (x - x.mean(0)).norm() / x.norm()

    assert spread(aligned[0]) < 0.1
    assert spread(aligned[0]) <= spread(balanced[0]) + 1e-9


@given(seeds, shapes)
@settings(max_examples=30, deadline=None)
def test_product_error_is_that_of_the_products(seed, shape):
    one, other = pair(seed, *shape, 2), pair(seed + 9, *shape, 2)
    expected = (product(*one) - product(*other)).square().sum((-1, -2))
    torch.testing.assert_close(product_error(*one, *other), expected)
    torch.testing.assert_close(product_error(*one, *one), torch.zeros_like(expected), atol=1e-9, rtol=0)


def test_layout_treats_every_module_as_the_functions_do():
    modules = [("x.a", 6, 5, 3), ("y", 4, 7, 2), ("x.b", 6, 5, 3), ("x.c", 5, 6, 3)]  # two of one size, the rest apart
    layout, nothing = LoraLayout(tuple(LoraModule(*module) for module in modules), "canonical"), torch.zeros(0)
    vectors, reference = drawn(0, 2, layout.num_weights), drawn(1, layout.num_weights)
    given, towards = layout.factors(vectors, nothing), layout.factors(reference, nothing)
    bare, turned_to = layout.canonical(vectors), layout.canonical(vectors, reference)
    mean = layout.mean_reference(vectors)
    assert [v.shape for v in (bare, turned_to, mean)] == [vectors.shape, vectors.shape, reference.shape]
    for name, *_ in modules:
        a, b, _ = balance(*given[name])
        for found, wanted in (
            (layout.factors(bare, nothing)[name], (a, b)),
            (layout.factors(turned_to, nothing)[name], align(a, b, *towards[name])),
            (layout.factors(mean, nothing)[name], mean_reference(a, b)),
        ):
            torch.testing.assert_close(found, wanted)
