"""Training a generator: `transformers.Trainer` with the loss of a conditional VAE."""

import math
from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainingArguments

from .errors import IcmLoraError
from .modeling_lora_generator import LoraGeneratorModel, LoraGeneratorOutput, kl_per_unit

ACTIVE_UNIT_NATS = 0.01  # a latent unit is active if it carries more than this on average


@dataclass
class LoraGeneratorTrainingArguments(TrainingArguments):
    r"""`TrainingArguments` with the weights of the generator's loss.

    The loss per sample is `reconstruction_loss + kl_weight * mean over latent units of max(kl, free_bits)`. In the
    usual terms of a beta-VAE with unit variance, beta = 2 * kl_weight * num_weights / latent_size.

    Args:
        kl_weight (`float`, *optional*, defaults to 0.01): Weight of the KL term.
        kl_warmup_ratio (`float`, *optional*, defaults to 0.2): Fraction of all steps over which it rises from zero.
            Evaluation always uses the full weight.
        free_bits (`float`, *optional*, defaults to 0.05): Nats per latent unit that cost nothing.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`): A loss that is not a number is an error here.
    """

    kl_weight: float = field(default=0.01, metadata={"help": "Weight of the KL term."})
    kl_warmup_ratio: float = field(default=0.2, metadata={"help": "Fraction of all steps over which it rises from 0."})
    free_bits: float = field(default=0.05, metadata={"help": "Nats per latent unit that cost nothing."})
    learning_rate: float = field(default=1e-3)
    warmup_steps: float = field(default=0.05)
    lr_scheduler_type: str = field(default="cosine")
    per_device_train_batch_size: int = field(default=16)
    per_device_eval_batch_size: int = field(default=32)
    max_grad_norm: float = field(default=1.0)
    logging_nan_inf_filter: bool = field(default=False)


class LoraGeneratorTrainer(Trainer):
    """Train a [`LoraGeneratorModel`] on packed adapters and task vectors.

    Logs and `evaluate()` report, beside the loss, averaged over samples: `reconstruction_loss` (from the posterior),
    `generation_loss` (from the task vector alone, which is what a user gets), `kl` in nats, and `active_units`.

    Args:
        model (`LoraGeneratorModel`): If its normalizer is not fitted yet, it is fitted on `train_dataset`.
        args (`LoraGeneratorTrainingArguments`, *optional*): How to train.
        train_dataset, eval_dataset (`Dataset`, *optional*): Items `{"lora_weights", "task_vector"}`, as from
            `LoraZoo.as_dataset()`. Split them by task, not by snapshot.
        kwargs: All else that `transformers.Trainer` takes.

    Example:
        >>> trainer = LoraGeneratorTrainer(model, args, train_dataset=seen.as_dataset())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: LoraGeneratorModel, args: LoraGeneratorTrainingArguments | None = None, **kwargs):
        args = args or LoraGeneratorTrainingArguments(output_dir="trainer_output")
        if not model.zoo_normalizer.is_fitted and kwargs.get("train_dataset") is not None:
            model.fit_normalizer(kwargs["train_dataset"])
        super().__init__(model=model, args=args, **kwargs)
        self.loss_is_scaled_for_ga = False  # compute_loss returns the mean of a batch
        self._terms: dict[str, list[dict[str, torch.Tensor]]] = {"train": [], "eval": []}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean of `reconstruction_loss + kl_weight * kl` over the batch, and remember both terms."""
        output: LoraGeneratorOutput = model(**inputs, return_loss=False, return_dict=True)
        units = _kl_per_unit(output)
        penalty = units.clamp(min=self.args.free_bits).mean(1)  # (batch,)
        loss = (output.reconstruction_loss + self._kl_weight(model.training) * penalty).mean()
        terms = {"reconstruction_loss": output.reconstruction_loss, "kl_per_unit": units}
        if model.training:
            self._terms["train"].append({name: values.detach() for name, values in terms.items()})
        return (loss, output) if return_outputs else loss

    def _kl_weight(self, training: bool) -> float:
        # A pure function of the step: a resumed run follows the same curve, and evaluations compare.
        warmup = self.args.kl_warmup_ratio * self.state.max_steps
        risen = min(1.0, (self.state.global_step + 1) / warmup) if training and warmup > 0 else 1.0
        return self.args.kl_weight * risen

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch; the generated weights stay here, only their error goes on."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
            normalizer = self.accelerator.unwrap_model(model).zoo_normalizer
            generated = model(task_vector=inputs["task_vector"], return_loss=False, return_dict=True).lora_weights
            error = normalizer.normalize(generated) - normalizer.normalize(inputs["lora_weights"])
        terms = {
            "reconstruction_loss": output.reconstruction_loss,
            "generation_loss": (error**2).mean(1),
            "kl_per_unit": _kl_per_unit(output),
        }
        # Per batch, since it drops the samples that padded the last one.
        self._terms["eval"].append(self.accelerator.gather_for_metrics(terms))
        return loss, None, None

    def evaluation_loop(self, *args, **kwargs):
        """Run the loop of `Trainer` and add the terms of the loss to what it returns."""
        self._terms["eval"].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._mean_terms("eval").items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the terms of the training loss since the last log."""
        if "loss" in logs:
            logs = logs | self._mean_terms("train")
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # the second after the last step, however short the run
        if not math.isfinite(loss):  # here and not at every step, which would wait for the device
            raise IcmLoraError(
                f"The loss became {loss} by step {self.state.global_step}: {logs}. Lower the learning rate, or look "
                "for an adapter with extreme values in the zoo."
            )
        super().log(logs, *args, **kwargs)

    def _mean_terms(self, split: str) -> dict[str, float]:
        batches, self._terms[split] = self._terms[split], []
        if not batches:
            return {}
        stacked = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}  # over samples
        if split == "train":
            stacked = self.accelerator.gather(stacked)
        units = stacked.pop("kl_per_unit").mean(0)  # (latent_size,)
        means = {name: values.mean().item() for name, values in stacked.items()}
        return means | {"kl": units.sum().item(), "active_units": int((units > ACTIVE_UNIT_NATS).sum())}


def _kl_per_unit(output: LoraGeneratorOutput) -> torch.Tensor:
    return kl_per_unit(output.posterior_mean, output.posterior_logvar, output.prior_mean, output.prior_logvar)
