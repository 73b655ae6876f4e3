"""Plain rivals of a generator: what can be made of the seen tasks' LoRAs and vectors without training anything.

Each task vector is averaged over its draws and then standardized: every entry has mean 0 and deviation 1 over the seen
tasks. Cosines and regression are those of standardized vectors.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5)
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Rivals:
    """Adapters for a task from those of the seen tasks.

    A seen task is never its own neighbour: `nearest`, `top_k_merge`, `distance` and `noisy_nearest` leave it out.

    Args:
        lora_weights (`Mapping[str, torch.Tensor]`): Seen task -> its LoRA, `(num_weights,)` fp32.
        task_vectors (`Mapping[str, torch.Tensor]`): Seen task -> its vector,
            `(num_draws, num_task_vectors, task_vector_size)` fp32; more tasks may be there.
        top_k (`int`, *optional*, defaults to 4): Neighbours that `top_k_merge` merges.
        temperature, penalty (`float`, *optional*): Of `top_k_merge` and `ridge`. By default those of `TEMPERATURES`
            and `PENALTIES` with the least `merge_error` and `ridge_error`: no test sample, no text is looked at.

    Attributes:
        mean (`torch.Tensor` of shape `(num_weights,)`): The mean of all seen tasks' LoRAs.

    Example:
        >>> weights = {"one": torch.tensor([1.0, 0.0]), "two": torch.tensor([0.0, 1.0])}
        >>> vectors = {"one": torch.tensor([[[1.0, 2.0]]]), "two": torch.tensor([[[2.0, 1.0]]])}
        >>> rivals = Rivals(weights, vectors)
        >>> rivals.nearest(torch.tensor([[[1.1, 2.0]]]), "three")
        tensor([1., 0.])
    """

    def __init__(
        self,
        lora_weights: Mapping[str, torch.Tensor],
        task_vectors: Mapping[str, torch.Tensor],
        top_k: int = 4,
        temperature: float | None = None,
        penalty: float | None = None,
    ):
        self.names = list(lora_weights)
        self.weights = torch.stack(list(lora_weights.values()))  # (tasks, num_weights)
        self.mean = self.weights.mean(0)
        self.deviation = (self.weights - self.mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
        vectors = torch.stack([task_vectors[name].mean(0).flatten() for name in self.names])
        self.center, self.scale = vectors.mean(0), vectors.std(0, correction=0).clamp(min=1e-6)
        self.vectors = self._standardized(vectors)  # (tasks, features)
        self.kernel = self.vectors @ self.vectors.T / self.vectors.shape[1]
        self.top_k = max(1, min(top_k, len(self.names) - 1))
        self.temperature = temperature or min(TEMPERATURES, key=self.merge_error)
        self.penalty = penalty or min(PENALTIES, key=self.ridge_error)
        self.dual = torch.linalg.solve(self._penalized(self.penalty), self.weights - self.mean)  # (tasks, num_weights)

    def nearest(self, vector: torch.Tensor, task: str) -> torch.Tensor:
        """Return the LoRA `(num_weights,)` of the seen task whose vector has the largest cosine with this one."""
        return self.weights[self._cosines(vector, task).argmax()]

    def top_k_merge(self, vector: torch.Tensor, task: str) -> torch.Tensor:
        """Return the nearest seen tasks' LoRAs `(num_weights,)`, weighted by a softmax of cosine / temperature."""
        return self._merged(self._cosines(vector, task), self.temperature)

    def ridge(self, vector: torch.Tensor) -> torch.Tensor:
        """Return what a ridge regression from vector to weights predicts, `(num_weights,)`; of a linear kernel."""
        query = self._standardized(vector.mean(0).flatten())
        return self.mean + (self.vectors @ query / len(query)) @ self.dual

    def distance(self, weights: torch.Tensor, task: str) -> float:
        """Return the distance to the nearest seen LoRA, in units of the usual one of the seen from their mean."""
        return (self._nearest_by_weights(weights, task)[1] / self.deviation).item()

    def noisy_nearest(self, weights: torch.Tensor, task: str, seed: int = 0) -> torch.Tensor:
        """Return the seen LoRA nearest to these weights `(num_weights,)`, plus noise of the length of its distance."""
        nearest, distance = self._nearest_by_weights(weights, task)
        noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed))
        return nearest + noise * (distance / noise.norm())

    def merge_error(self, temperature: float) -> float:
        """Return the mean squared error of merging the others' weights, over all seen tasks."""
        cosines = F.cosine_similarity(self.vectors[:, None], self.vectors[None], dim=2).fill_diagonal_(-torch.inf)
        merged = torch.stack([self._merged(row, temperature) for row in cosines])
        return (merged - self.weights).square().mean().item()

    def ridge_error(self, penalty: float) -> float:
        """Return the mean squared error of regression on the others, over all seen tasks.

        The closed form of leaving one task out: its residual is its dual weight over the inverse's diagonal.
        """
        inverse = torch.linalg.inv(self._penalized(penalty))
        residuals = inverse @ (self.weights - self.mean) / inverse.diagonal()[:, None]
        return residuals.square().mean().item()

    def _standardized(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - self.center) / self.scale

    def _penalized(self, penalty: float) -> torch.Tensor:
        return self.kernel + penalty * torch.eye(len(self.names))

    def _cosines(self, vector: torch.Tensor, task: str) -> torch.Tensor:
        query = self._standardized(vector.mean(0).flatten())
        cosines = F.cosine_similarity(self.vectors, query[None])
        if task in self.names and len(self.names) > 1:
            cosines[self.names.index(task)] = -torch.inf
        return cosines

    def _merged(self, cosines: torch.Tensor, temperature: float) -> torch.Tensor:
        values, indices = cosines.topk(self.top_k)
        return (values / temperature).softmax(0) @ self.weights[indices]

    def _nearest_by_weights(self, weights: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor]:
        others = [index for index, name in enumerate(self.names) if name != task] or [0]  # one task has no other
        distance, index = (self.weights[others] - weights).norm(dim=1).min(0)
        return self.weights[others[int(index)]], distance
