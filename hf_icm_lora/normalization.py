"""What one unit of weight and of task vector means: statistics of the training data."""

from collections.abc import Iterable

import torch
from torch import nn

from .configuration_lora_generator import LoraGeneratorConfig
from .products import product_error


class ZooNormalizer(nn.Module):
    """Statistics of the training data, in fp32: what one unit of weight and of task vector means.

    Of the zoo: the elementwise mean adapter, one scale per matrix, since B is small beside A and layers differ, and
    the weights that all adapters share. With a closed form there are neither: A is there, and nothing is taken off.
    Of the task vectors: mean and scale of every entry, and the principal directions, which turn a vector into a
    condition.

    A condition is half whitened: each direction is divided by the fourth root of its variance. A few directions hold
    most of the variance of hidden states, and what tells two tasks of a family apart has little of it: gradient
    descent would come to it last. Full whitening, on the other hand, would make noise as loud as what matters.
    """

    weight_mean: torch.Tensor  # (num_weights,), unless there is a closed form
    weight_scale: torch.Tensor  # (num_matrices,)
    shared_weights: torch.Tensor  # (num_shared_weights,), unless there is a closed form
    product_scale: torch.Tensor  # (num_modules,), where products are compared
    vector_mean: torch.Tensor  # (num_task_vectors, task_vector_size)
    vector_scale: torch.Tensor  # the same
    vector_directions: torch.Tensor  # (condition_size, num_task_vectors * task_vector_size)
    is_fitted: torch.Tensor  # (1,), 0 or 1

    def __init__(self, config: LoraGeneratorConfig):
        super().__init__()
        layout = config.lora_layout
        self.layout, self.sizes = layout, [b.rank * b.width for b in layout.blocks for _ in b.modules]
        vector = (config.num_task_vectors, config.task_vector_size)
        self.centred = config.closed_form is None  # A is in the closed form, and its network starts from nothing
        if self.centred:
            self.register_buffer("weight_mean", torch.zeros(layout.num_weights))
            self.register_buffer("shared_weights", torch.zeros(layout.num_shared_weights))
        self.register_buffer("weight_scale", torch.ones(len(self.sizes)))
        self.compares_products = config.reconstruction == "products"
        if self.compares_products:
            self.register_buffer("product_scale", torch.ones(len(layout.modules)))
        self.register_buffer("vector_mean", torch.zeros(vector))
        self.register_buffer("vector_scale", torch.ones(vector))
        self.register_buffer("vector_directions", torch.zeros(config.condition_size, vector[0] * vector[1]))
        self.register_buffer("is_fitted", torch.zeros(1))

    def fit_weights(self, batches: Iterable[torch.Tensor], shared_weights: torch.Tensor) -> None:
        """Fit to adapters, batches of `(batch, num_weights)`."""
        count, mean, squares, products = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
        for batch in batches:  # Welford's update, batch by batch (Chan, Golub, LeVeque 1983)
            own = batch.double().mean(0)
            shift, total = own - mean, count + len(batch)
            squares = squares + (batch.double() - own).square().sum(0) + shift**2 * (count * len(batch) / total)
            mean, count = mean + shift * (len(batch) / total), total
            if self.compares_products:
                products = products + self._product_errors(batch, shared_weights).sum(0)
        mean_squares = squares / count if self.centred else squares / count + mean**2
        scale = torch.stack([v.mean().sqrt() for v in mean_squares.split(self.sizes)])
        if self.centred:
            self.weight_mean.copy_(mean)
            self.shared_weights.copy_(shared_weights)
        # A matrix that never varies has scale 0: the floor makes it come out as its mean, instead of as NaN.
        self.weight_scale.copy_(scale.clamp(min=max(1e-3 * scale.median().item(), 1e-8)))
        if self.compares_products:
            usual = products / count
            self.product_scale.copy_(usual.clamp(min=max(1e-6 * usual.median().item(), 1e-16)))

    def fit_vectors(self, vectors: torch.Tensor) -> None:
        """Fit to task vectors, `(num_vectors, num_task_vectors, task_vector_size)`."""
        scale = vectors.double().std(0, correction=0)
        self.vector_mean.copy_(vectors.double().mean(0))
        self.vector_scale.copy_(scale.clamp(min=max(1e-3 * scale.median().item(), 1e-8)))
        normalized = ((vectors.to(self.vector_mean) - self.vector_mean) / self.vector_scale).flatten(1)
        *_, singular_values, directions = torch.linalg.svd(normalized, full_matrices=False)
        known = min(len(self.vector_directions), int((singular_values > 1e-4 * singular_values[0]).sum()))
        deviations = singular_values[:known] / len(vectors) ** 0.5
        # The mean square of an entry of a condition is 1: half whitened, direction i has the variance deviation i.
        unit = (deviations.sum() / len(self.vector_directions)).sqrt()
        self.vector_directions.zero_()  # few vectors span fewer directions: the others stay silent
        self.vector_directions[:known] = directions[:known] / (deviations.sqrt() * unit)[:, None]

    def normalize(self, lora_weights: torch.Tensor) -> torch.Tensor:
        centred = lora_weights.float() - self.weight_mean if self.centred else lora_weights.float()
        return centred / self._scale_of_each_weight()

    def denormalize(self, normalized: torch.Tensor) -> torch.Tensor:
        scaled = normalized.float() * self._scale_of_each_weight()
        return scaled + self.weight_mean if self.centred else scaled

    def error(self, lora_weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return what reconstruction minimizes, `(batch,)`, of two batches of weights `(batch, num_weights)`."""
        if self.compares_products:
            return (self._product_errors(lora_weights, self.shared_weights, target) / self.product_scale).mean(1)
        return ((lora_weights.float() - target.float()) / self._scale_of_each_weight()).square().mean(1)

    def _product_errors(
        self, lora_weights: torch.Tensor, shared_weights: torch.Tensor, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return |B @ A - target|^2 of each module, `(batch, num_modules)`; without a target that of 0."""
        own = self.layout.stacked_factors(lora_weights.float(), shared_weights)
        target = torch.zeros_like(lora_weights) if target is None else target
        others = self.layout.stacked_factors(target.float(), shared_weights)
        # A shared A has no batch dimension.
        pairs = [[x.expand(len(lora_weights), *x.shape[-3:]) for x in (*own[n], *others[n])] for n in own]
        return torch.cat([product_error(*pair) for pair in pairs], dim=1)

    def condition(self, task_vector: torch.Tensor) -> torch.Tensor:
        normalized = (task_vector.float() - self.vector_mean) / self.vector_scale
        return normalized.flatten(1) @ self.vector_directions.float().T  # also where all of the model was cast

    def _scale_of_each_weight(self) -> torch.Tensor:
        blocks = self.layout.blocks
        scales = self.weight_scale.split([block.count for block in blocks])
        # By copies of whole rows: `repeat_interleave` takes as long as the decoder's matrix products do.
        return torch.cat(
            [
                scale[:, None].expand(-1, block.rank * block.width).flatten()
                for scale, block in zip(scales, blocks, strict=True)
            ]
        )
