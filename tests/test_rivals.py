"""The plain rivals: each is what its name says, and none looks at the task that is scored."""

import pytest
import torch

from hf_icm_lora.rivals import PENALTIES, TEMPERATURES, Rivals

NAMES = [f"task/{index}" for index in range(6)]
GENERATOR = torch.Generator().manual_seed(0)
# Weights that a task vector tells a part of, as in a zoo: they are linear in it, plus noise.
VECTORS = {name: torch.randn(3, 2, 4, generator=GENERATOR) for name in [*NAMES, "another"]}
MAP = torch.randn(8, 10, generator=GENERATOR)
WEIGHTS = {name: VECTORS[name].mean(0).flatten() @ MAP + 0.5 * torch.randn(10, generator=GENERATOR) for name in NAMES}
STACKED = torch.stack(list(WEIGHTS.values()))


@pytest.fixture
def rivals():
    return Rivals(WEIGHTS, VECTORS)


def standardized(name):
    means = torch.stack([VECTORS[other].mean(0).flatten() for other in NAMES])
    return (VECTORS[name].mean(0).flatten() - means.mean(0)) / means.std(0, correction=0)


def cosines_with(name):
    return {
        other: torch.cosine_similarity(standardized(name), standardized(other), dim=0).item()
        for other in NAMES
        if other != name
    }


def test_mean_is_that_of_the_seen_tasks(rivals):
    torch.testing.assert_close(rivals.mean, sum(WEIGHTS.values()) / 6)


@pytest.mark.parametrize("name", [*NAMES, "another"])
def test_nearest_and_merge_go_by_cosine_and_never_pick_the_task_itself(rivals, name):
    cosines = cosines_with(name)
    best = sorted(cosines, key=cosines.get, reverse=True)[:4]
    assert torch.equal(rivals.nearest(VECTORS[name], name), WEIGHTS[best[0]])
    shares = (torch.tensor([cosines[other] for other in best]) / rivals.temperature).softmax(0)
    expected = sum(share * WEIGHTS[other] for share, other in zip(shares, best, strict=True))
    torch.testing.assert_close(rivals.top_k_merge(VECTORS[name], name), expected)


def test_a_task_under_another_name_is_its_own_neighbour(rivals):
    assert torch.equal(rivals.nearest(VECTORS[NAMES[2]], "another"), WEIGHTS[NAMES[2]])


def test_ridge_reproduces_the_seen_tasks_as_its_penalty_vanishes():
    def worst(penalty):
        rivals = Rivals(WEIGHTS, VECTORS, penalty=penalty)
        return max((rivals.ridge(VECTORS[name]) - WEIGHTS[name]).norm() / STACKED.norm() for name in NAMES)

    assert worst(1e-5) < 1e-3
    assert worst(1e-5) < worst(1e-1) < worst(10.0)
    indifferent = Rivals(WEIGHTS, VECTORS, penalty=1e8)
    torch.testing.assert_close(indifferent.ridge(VECTORS["another"]), indifferent.mean, rtol=0, atol=1e-5)


def test_ridge_is_that_of_the_primal_form():
    rivals, penalty = Rivals(WEIGHTS, VECTORS, penalty=0.3), 0.3
    x = torch.stack([standardized(name) for name in NAMES])
    maps = torch.linalg.solve(x.T @ x + penalty * x.shape[1] * torch.eye(8), x.T @ (STACKED - STACKED.mean(0)))
    expected = STACKED.mean(0) + standardized("another") @ maps
    torch.testing.assert_close(rivals.ridge(VECTORS["another"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.01, 0.3, 10.0])
def test_leaving_one_out_in_closed_form_equals_brute_force(rivals, penalty):
    """Up to what centres the data, which is the mean over all seen tasks in both."""
    x = torch.stack([standardized(name) for name in NAMES])
    kernel, targets, residuals = x @ x.T / 8, STACKED - STACKED.mean(0), []
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        penalized = kernel[rest][:, rest] + penalty * torch.eye(5)
        residuals.append(targets[i] - kernel[i, rest] @ torch.linalg.solve(penalized, targets[rest]))
    expected = torch.stack(residuals).square().mean().item()
    assert rivals.ridge_error(penalty) == pytest.approx(expected, rel=1e-3)


def test_error_of_merging_is_that_of_each_task_from_the_others():
    rivals = Rivals(WEIGHTS, VECTORS, temperature=0.2)
    errors = [(rivals.top_k_merge(VECTORS[name], name) - WEIGHTS[name]).square().mean() for name in NAMES]
    assert rivals.merge_error(0.2) == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_penalty_and_temperature_are_the_best_of_those_tried(rivals):
    for chosen, tried, error in (
        (rivals.penalty, PENALTIES, rivals.ridge_error),
        (rivals.temperature, TEMPERATURES, rivals.merge_error),
    ):
        errors = {value: error(value) for value in tried}
        assert errors[chosen] == min(errors.values())
        assert len(set(errors.values())) > 1


def test_distance_is_to_the_nearest_other_in_units_of_their_deviation(rivals):
    unit = torch.stack([(weights - STACKED.mean(0)).norm() ** 2 for weights in STACKED]).mean().sqrt()
    for name in (NAMES[1], "another"):
        own = torch.ones(10)
        expected = min((own - WEIGHTS[other]).norm() for other in NAMES if other != name) / unit
        assert rivals.distance(own, name) == pytest.approx(expected.item(), rel=1e-5)
    assert rivals.distance(WEIGHTS[NAMES[1]], "another") == 0
    assert rivals.distance(WEIGHTS[NAMES[1]], NAMES[1]) > 0


def test_noisy_nearest_is_as_far_from_the_nearest_as_the_weights_are(rivals):
    own = WEIGHTS[NAMES[1]] + 0.1
    nearest = min((other for other in NAMES if other != NAMES[1]), key=lambda other: (own - WEIGHTS[other]).norm())
    noisy = rivals.noisy_nearest(own, NAMES[1], seed=3)
    assert not torch.allclose(noisy, own)
    torch.testing.assert_close((noisy - WEIGHTS[nearest]).norm(), (own - WEIGHTS[nearest]).norm())
    assert torch.equal(noisy, rivals.noisy_nearest(own, NAMES[1], seed=3))
    assert not torch.equal(noisy, rivals.noisy_nearest(own, NAMES[1], seed=4))


def test_one_seen_task_is_all_there_is():
    rivals = Rivals({"only": WEIGHTS[NAMES[0]]}, {"only": VECTORS[NAMES[0]]})
    for made in (rivals.mean, rivals.nearest(VECTORS["another"], "only"), rivals.top_k_merge(VECTORS["another"], "x")):
        torch.testing.assert_close(made, WEIGHTS[NAMES[0]])
    torch.testing.assert_close(rivals.ridge(VECTORS["another"]), WEIGHTS[NAMES[0]])
    assert rivals.distance(WEIGHTS[NAMES[0]], "only") == 0
