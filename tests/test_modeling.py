"""LoraGeneratorModel keeps the contract of a transformers model; names as in transformers' ModelTesterMixin."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from conftest import LORA_TARGETS, make_gpt2, make_llama, make_t5
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel

from hf_icm_lora import (
    IncompatibleAdapterError,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorOutput,
    LoraLayout,
    NotFittedError,
    TaskVectorError,
    TaskVectorSpec,
)
from hf_icm_lora.adapter import adapter_state_dict
from hf_icm_lora.modeling_lora_generator import check_size, kl_per_unit
from hf_icm_lora.networks import TokenwiseLinear

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_encoder_layers=1, num_decoder_layers=2, num_attention_heads=4,
    latent_size=6, num_task_vectors=2, task_vector_size=8,
)  # fmt: skip
BASES = {"llama": make_llama, "gpt2": make_gpt2, "t5": make_t5}
VARIANTS = {
    "matrix": {},
    "rank": {"token_granularity": "rank"},
    "standard": {"prior": "standard"},
    "none": {"prior": "none"},
    "conv1d": {"architecture": "conv1d"},
    "conv1d-none": {"architecture": "conv1d", "prior": "none"},
    "gpt2": {"base": "gpt2"},
    "t5": {"base": "t5"},
    "t5-rank": {"base": "t5", "token_granularity": "rank", "prior": "standard"},
    "t5-conv1d": {"base": "t5", "architecture": "conv1d", "prior": "standard"},
    "shared_init": {"gauge": "shared_init"},
    "products": {"gauge": "shared_init", "reconstruction": "products"},
    "products-frozen_a": {"reconstruction": "products"},
}
_CONFIGS = {}


class RandomAdapters(Dataset):
    """Items as from a zoo: adapters around a mean, with another scale for every matrix."""

    def __init__(self, config, size=12, seed=0):
        rng = torch.Generator().manual_seed(seed)
        blocks = config.lora_layout.blocks
        scale = torch.cat(
            [torch.full((b.rank * b.width,), 0.01 * (i + 1)) for i, b in enumerate(blocks) for _ in b.modules]
        )
        self.lora_weights = 0.05 + scale * torch.randn(size, len(scale), generator=rng)
        shape = (size, config.num_task_vectors, config.task_vector_size)
        self.task_vectors = 3 + 5 * torch.randn(shape, generator=rng)
        self.shared_weights = torch.randn(config.lora_layout.num_shared_weights, generator=rng)

    def __len__(self):
        return len(self.lora_weights)

    def __getitem__(self, index):
        return {"lora_weights": self.lora_weights[index], "task_vector": self.task_vectors[index]}

    def each_adapter(self):
        return iter(self.lora_weights)

    def batch(self, size=5):
        return {"lora_weights": self.lora_weights[:size], "task_vector": self.task_vectors[:size]}


def make_config(base="llama", gauge="frozen_a", **kwargs):
    if (base, gauge) not in _CONFIGS:
        fields = {"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS[base], "fan_in_fan_out": base == "gpt2"}
        with torch.random.fork_rng():
            model = get_peft_model(BASES[base](), LoraConfig(**fields))
        layout = LoraLayout.from_state_dict(adapter_state_dict(model), fields, gauge)
        _CONFIGS[base, gauge] = {
            "layout": layout.to_dict(),
            "lora_config": fields,
            "base_model_name_or_path": base,
            "base_model_fingerprint": "0" * 64,
            "task_vector_spec": TaskVectorSpec().to_dict(),
        }
    return LoraGeneratorConfig(**_CONFIGS[base, gauge], **(SIZES | kwargs))


def make_model(seed=0, fitted=True, **kwargs):
    """A generator in eval mode, and random adapters of its layout on which its normalizer was fitted."""
    torch.manual_seed(seed)
    model = LoraGeneratorModel(make_config(**kwargs)).eval()
    dataset = RandomAdapters(model.config)
    if fitted:
        model.fit_normalizer(dataset, batch_size=5)
    return model, dataset


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


# Without the encoder


def test_without_encoder_generates_the_same_and_is_smaller(tmp_path, variant):
    model, dataset = make_model(**variant)
    small = model.without_encoder()
    expected = model.decode_task_vector(dataset.task_vectors[0])
    assert torch.equal(small.decode_task_vector(dataset.task_vectors[0]), expected)
    assert model.config.has_encoder  # the one it was made from is as before
    assert not {name for name in small.state_dict() if "encoder." in name or "in_projections" in name}
    if model.config.prior != "none":
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        with pytest.raises(NotFittedError, match=r"without_encoder\(\): it generates adapters but cannot reconstruct"):
            small(**dataset.batch())
    small.save_pretrained(tmp_path)
    again = copy.deepcopy(LoraGeneratorModel.from_pretrained(tmp_path))
    assert torch.equal(again.decode_task_vector(dataset.task_vectors[0]), expected)


@pytest.mark.parametrize("architecture", ["transformer", "conv1d"])
def test_sizes_are_counted_exactly_and_without_drawing(monkeypatch, architecture):
    config = make_config(architecture=architecture)
    size = sum(tensor.numel() for tensor in LoraGeneratorModel(config).state_dict().values())
    monkeypatch.setattr("hf_icm_lora.modeling_lora_generator.MAX_PARAMETERS", size)
    torch.manual_seed(0)
    check_size(config)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr("hf_icm_lora.modeling_lora_generator.MAX_PARAMETERS", size - 1)
    with pytest.raises(
        IncompatibleAdapterError, match=f"up to {size - 1:,} parameters, found ones that make {size:,}"
    ):
        LoraGeneratorModel(config)


def test_without_encoder_keeps_dtypes_and_shares_no_memory(tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    half = LoraGeneratorModel.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    small = half.without_encoder()
    assert small.training
    dtypes = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    assert all(tensor.dtype == dtypes[name] for name, tensor in small.state_dict().items())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    assert not any((parameter == 7.0).all() for parameter in half.parameters())


# In 8 bits


def test_int8_generates_nearly_the_same_in_a_quarter_of_the_size(tmp_path):
    model, dataset = make_model()
    small = model.to_int8()
    expected = model.decode_task_vector(dataset.task_vectors[0])
    found = small.decode_task_vector(dataset.task_vectors[0])
    assert 0 < (found - expected).norm() / expected.norm() < 0.02
    assert model.config.weight_format == "float"
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "large")
    again = LoraGeneratorModel.from_pretrained(tmp_path / "small")
    assert again.config.weight_format == "int8"
    assert torch.equal(again.decode_task_vector(dataset.task_vectors[0]), found)
    stored = {name: tensor.dtype for name, tensor in again.state_dict().items() if name.endswith("original0")}
    assert set(stored.values()) == {torch.int8}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "large")]
    assert sizes[0] < 0.5 * sizes[1]  # biases, embeddings and statistics stay as they are


def test_int8_and_back_is_trained_again():
    model, dataset = make_model()
    small = model.to_int8()
    back = small.to_float()
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in back.parameters())
    vector = dataset.task_vectors[0]
    assert torch.equal(back.decode_task_vector(vector), small.decode_task_vector(vector))
    again = back.to_int8()
    torch.testing.assert_close(
        again.decode_task_vector(vector), small.decode_task_vector(vector), rtol=1e-3, atol=1e-4
    )


# What ModelTesterMixin asks of every model


def test_save_load_is_exact_to_the_bit(tmp_path, variant):
    model, dataset = make_model(**variant)
    model.save_pretrained(tmp_path)
    again, info = LoraGeneratorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not again.training
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    again = copy.deepcopy(again)  # into memory of its own: matrix products may round by the alignment of a file's map
    for one, two in zip(model(**dataset.batch()).to_tuple(), again(**dataset.batch()).to_tuple(), strict=True):
        assert torch.equal(one, two)
    generated = model.decode_task_vector(dataset.task_vectors[0])
    assert torch.equal(generated, again.decode_task_vector(dataset.task_vectors[0]))


def test_auto_classes_load_it(tmp_path):
    model, dataset = make_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LoraGeneratorConfig
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is LoraGeneratorModel
    assert torch.equal(model(**dataset.batch()).loss, again(**dataset.batch()).loss)
    assert type(AutoModel.from_config(model.config)) is LoraGeneratorModel


def test_save_pretrained_writes_safetensors_only(tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LoraGeneratorModel"]


def test_determinism(variant):
    model, dataset = make_model(**variant)
    first, second = model(**dataset.batch()), model(**dataset.batch())
    assert all(torch.equal(one, two) for one, two in zip(first.to_tuple(), second.to_tuple(), strict=True))
    same_seed, _ = make_model(**variant)
    assert torch.equal(first.loss, same_seed(**dataset.batch()).loss)


def test_training_draws_noise_and_eval_does_not():
    model, dataset = make_model()
    model.train()
    assert not torch.equal(model(**dataset.batch()).lora_weights, model(**dataset.batch()).lora_weights)
    model, dataset = make_model(prior="none")
    model.train()
    assert torch.equal(model(**dataset.batch()).lora_weights, model(**dataset.batch()).lora_weights)


def test_model_outputs_equivalence(variant):
    model, dataset = make_model(**variant)
    for inputs, count in ((dataset.batch(), 8), ({"task_vector": dataset.task_vectors[:5]}, 3)):
        as_dict, as_tuple = model(**inputs, return_dict=True), model(**inputs, return_dict=False)
        assert isinstance(as_dict, LoraGeneratorOutput)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(as_dict) == count
        assert all(torch.equal(one, two) for one, two in zip(as_dict.values(), as_tuple, strict=True))
    assert isinstance(model(**dataset.batch()), LoraGeneratorOutput)


def test_without_return_loss_there_is_none():
    model, dataset = make_model()
    output = model(**dataset.batch(), return_loss=False)
    assert output.loss is None
    assert output.reconstruction_loss.shape == (5,)


def test_output_shapes(variant):
    model, dataset = make_model(**variant)
    output = model(**dataset.batch())
    assert output.loss.shape == ()
    assert output.reconstruction_loss.shape == output.kl.shape == (5,)
    assert output.lora_weights.shape == (5, model.layout.num_weights)
    latents = (output.posterior_mean, output.posterior_logvar, output.prior_mean, output.prior_logvar)
    assert all(latent.shape == (5, 6) for latent in latents)


def test_batching_equivalence(variant):
    model, dataset = make_model(**variant)
    together = model(**dataset.batch())
    generated = model(task_vector=dataset.task_vectors[:5]).lora_weights
    for i in range(5):
        alone = model(**{name: values[i : i + 1] for name, values in dataset.batch().items()})
        for name in ("reconstruction_loss", "kl", "lora_weights", "posterior_mean", "prior_logvar"):
            torch.testing.assert_close(alone[name][0], together[name][i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model.decode_task_vector(dataset.task_vectors[i]), generated[i], rtol=1e-4, atol=1e-5
        )


def test_forward_signature():
    names = list(inspect.signature(LoraGeneratorModel.forward).parameters)
    assert names == ["self", "task_vector", "lora_weights", "return_loss", "return_dict"]
    assert LoraGeneratorModel.main_input_name == names[1]


def test_training_gives_every_parameter_a_gradient(variant):
    model, dataset = make_model(**variant)
    model.train()
    model(**dataset.batch()).loss.backward()
    # Without a latent nothing is encoded, and the decoder's z is zero: in the transformer these are not used.
    unused = {
        name
        for name, _ in model.named_parameters()
        if variant.get("prior") == "none" and ("in_projections" in name or name == "network.latent_proj.weight")
    } if variant.get("architecture") != "conv1d" else set()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in unused:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("name", ["rank", "none", "conv1d", "t5"])
def test_one_batch_can_be_learned(name):
    model, dataset = make_model(**VARIANTS[name])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**dataset.batch(2)).reconstruction_loss.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("architecture", ["transformer", "conv1d"])
def test_loading_in_bfloat16_keeps_the_normalizer_in_fp32(tmp_path, architecture):
    model, dataset = make_model(architecture=architecture)
    model.save_pretrained(tmp_path)
    half = LoraGeneratorModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.zoo_normalizer.buffers()} == {torch.float32}
    for name, buffer in model.zoo_normalizer.named_buffers():
        assert torch.equal(buffer, half.zoo_normalizer.get_buffer(name))
    output, generated = half(**dataset.batch()), half.decode_task_vector(dataset.task_vectors[0])
    assert output.loss.dtype == output.kl.dtype == generated.dtype == torch.float32
    torch.testing.assert_close(generated, model.decode_task_vector(dataset.task_vectors[0]), rtol=0, atol=5e-3)
    output.loss.backward()


def test_casting_all_of_a_generator_leaves_it_usable():
    model, dataset = make_model()
    expected = model.decode_task_vector(dataset.task_vectors[0])
    generated = model.to(torch.bfloat16).decode_task_vector(dataset.task_vectors[0])
    assert generated.dtype == torch.float32
    torch.testing.assert_close(generated, expected, rtol=0, atol=2e-2)


def test_missing_keys_are_reported_and_never_garbage(tmp_path, variant):
    model, dataset = make_model(**variant)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = {name for name in state if name.startswith("zoo_normalizer.")} | {"network.latent_proj.weight"}
    save_file({k: v for k, v in state.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = LoraGeneratorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert lost == set(info["missing_keys"])
    assert not again.zoo_normalizer.is_fitted
    fresh = LoraGeneratorModel(model.config).zoo_normalizer
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, again.zoo_normalizer.get_buffer(name)), name
    with pytest.raises(NotFittedError, match="fit_normalizer"):
        again(**dataset.batch())


def test_mismatched_shapes_are_an_error(tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"latent_size": 7}))
    with pytest.raises(
        RuntimeError, match="(?s)latent_proj.*size mismatch|size mismatch.*latent_proj|ignore_mismatched"
    ):
        LoraGeneratorModel.from_pretrained(tmp_path)


def test_unexpected_keys_are_reported(tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"network.extra": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = LoraGeneratorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"network.extra"}


def test_initialization_starts_near_the_mean_adapter(variant):
    model, dataset = make_model(**variant)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert set(dict(model.named_buffers())) == {f"zoo_normalizer.{n}" for n, _ in model.zoo_normalizer.named_buffers()}
    output = model(task_vector=dataset.task_vectors)
    # In units of the spread over the training tasks, where another task's adapter is sqrt(2) away.
    assert model.zoo_normalizer.normalize(output.lora_weights).square().mean() < 0.5
    assert output.prior_mean.abs().max() < 1
    assert output.prior_logvar.abs().max() < 1


# Inputs that do not fit


@pytest.mark.parametrize("call", ["forward", "decode_task_vector", "generate_state_dict"])
def test_unfitted_generator_says_so(call):
    model, dataset = make_model(fitted=False)
    with pytest.raises(NotFittedError, match="fit_normalizer"):
        getattr(model, call)(task_vector=dataset.task_vectors[:1])


@pytest.mark.parametrize("shape", [(3, 2, 9), (3, 1, 8), (2, 8), (3, 16), (1, 3, 2, 8)])
def test_task_vector_of_another_size_is_refused(shape):
    model, _ = make_model()
    with pytest.raises(TaskVectorError, match=r"\(batch, 2, 8\)"):
        model(task_vector=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(9,), (16,), (2, 9), (3, 1, 8), (1, 3, 2, 8)])
def test_decoding_a_task_vector_of_another_size_is_refused(shape):
    model, _ = make_model()
    with pytest.raises(TaskVectorError, match=r"\(batch, 2, 8\)"):
        model.decode_task_vector(torch.zeros(shape))


def test_missing_task_vector_is_refused():
    model, dataset = make_model()
    with pytest.raises(TypeError, match="task_vector"):
        model(lora_weights=dataset.lora_weights[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_task_vector_that_is_not_finite_is_refused(value):
    model, dataset = make_model()
    vector = dataset.task_vectors[:2].clone()
    vector[1, 0, 3] = value
    with pytest.raises(TaskVectorError, match="not finite"):
        model(task_vector=vector)
    with pytest.raises(TaskVectorError, match="not finite"):
        model.generate_state_dict(vector)


def test_wrong_number_of_weights_is_refused():
    model, dataset = make_model()
    vector = dataset.task_vectors[:3]
    for weights in (dataset.lora_weights[:3, :-1], dataset.lora_weights[:1], dataset.lora_weights[0]):
        with pytest.raises(IncompatibleAdapterError, match=rf"\(3, {model.layout.num_weights}\)"):
            model(lora_weights=weights, task_vector=vector)


def test_wrong_number_of_shared_weights_is_refused():
    model, dataset = make_model(fitted=False)
    dataset.shared_weights = dataset.shared_weights[:-1]
    with pytest.raises(IncompatibleAdapterError, match="shared weights"):
        model.fit_normalizer(dataset)
    assert not model.zoo_normalizer.is_fitted


# The loss


def test_reconstruction_loss_is_per_sample_and_zero_for_a_perfect_reconstruction(monkeypatch, variant):
    model, dataset = make_model(**variant)
    batch = dataset.batch(3)
    target = model.zoo_normalizer.normalize(batch["lora_weights"])
    offset = torch.tensor([0.0, 1.0, 2.0])[:, None]
    monkeypatch.setattr(model.network, "decode", lambda z, vector: target + offset)
    output = model(**batch)
    assert output.reconstruction_loss.shape == (3,)
    if variant.get("reconstruction") == "products":
        torch.testing.assert_close(output.reconstruction_loss[0], torch.tensor(0.0), atol=1e-5, rtol=0)
        assert 0.01 < output.reconstruction_loss[1] < output.reconstruction_loss[2]
    else:
        torch.testing.assert_close(output.reconstruction_loss, torch.tensor([0.0, 1.0, 4.0]))
    torch.testing.assert_close(output.lora_weights[0], batch["lora_weights"][0])
    expected = (output.reconstruction_loss + output.kl / model.layout.num_weights).mean()
    torch.testing.assert_close(output.loss, expected)


def test_mean_adapter_has_reconstruction_loss_one(monkeypatch):
    model, dataset = make_model()
    monkeypatch.setattr(model.network, "decode", lambda z, vector: z.new_zeros(len(z), model.layout.num_weights))
    output = model(**dataset.batch(len(dataset)))
    torch.testing.assert_close(output.reconstruction_loss.mean(), torch.tensor(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init"])
def test_products_are_compared_whatever_their_factors(monkeypatch, gauge):
    model, dataset = make_model(gauge=gauge, reconstruction="products")
    layout, shared = model.layout, dataset.shared_weights

    def squares(lora_weights, target):
        """Squared error of each product, (num_modules, batch)."""
        own, wanted = (layout.factors(x, shared) for x in (lora_weights, target))
        pairs = [(own[m.name], wanted[m.name]) for m in layout.modules]
        return torch.stack([(b.mT @ a - d.mT @ c).square().sum((1, 2)) for (a, b), (c, d) in pairs])

    def decode_as(weights):
        monkeypatch.setattr(model.network, "decode", lambda z, vector: model.zoo_normalizer.normalize(weights))
        return model(lora_weights=dataset.lora_weights, task_vector=dataset.task_vectors).reconstruction_loss

    usual = squares(dataset.lora_weights, torch.zeros_like(dataset.lora_weights)).mean(1, keepdim=True)
    other = dataset.lora_weights.flip(0)
    error = squares(other, dataset.lora_weights)
    torch.testing.assert_close(decode_as(other), (error / usual).mean(0), rtol=1e-3, atol=1e-4)
    zero = torch.zeros_like(dataset.lora_weights)
    torch.testing.assert_close(decode_as(zero).mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    if gauge == "shared_init":  # twice A and half of B is the same adapter
        factor = torch.cat([torch.full((b.size,), 2 if b.factor == "lora_A" else 0.5) for b in layout.blocks])
        assert decode_as(factor * dataset.lora_weights).abs().max() < 1e-4


def test_padding_of_conv1d_never_enters_the_loss():
    model, dataset = make_model(architecture="conv1d")
    plain = model(**dataset.batch())
    ends = []

    def spoil(module, inputs, output):
        output = output.clone()
        output[..., model.layout.num_weights :] = 1e6
        output.requires_grad_().retain_grad()
        ends.append(output)
        return output

    model.network.out_conv.register_forward_hook(spoil)
    spoiled = model(**dataset.batch())
    assert ends[0].shape[-1] > model.layout.num_weights  # there is padding
    assert torch.equal(plain.loss, spoiled.loss)
    assert torch.equal(plain.lora_weights, spoiled.lora_weights)
    spoiled.loss.backward()
    assert ends[0].grad[..., : model.layout.num_weights].any()
    assert not ends[0].grad[..., model.layout.num_weights :].any()


def test_kl_per_unit_equals_that_of_torch_distributions():
    rng = torch.Generator().manual_seed(0)
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 7, 5, generator=rng)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(prior_mean, (0.5 * prior_logvar).exp()))
    torch.testing.assert_close(kl_per_unit(mean, logvar, prior_mean, prior_logvar), expected)
    assert not kl_per_unit(mean, logvar, mean, logvar).any()


def test_kl_of_the_output_is_its_own_terms_summed_over_units():
    model, dataset = make_model()
    output = model(**dataset.batch())
    posterior = Normal(output.posterior_mean, (0.5 * output.posterior_logvar).exp())
    prior = Normal(output.prior_mean, (0.5 * output.prior_logvar).exp())
    torch.testing.assert_close(output.kl, kl_divergence(posterior, prior).sum(1))


@pytest.mark.parametrize("prior", ["standard", "none"])
def test_prior_without_a_network_is_standard_normal(prior):
    model, dataset = make_model(prior=prior)
    output = model(**dataset.batch())
    assert model.prior is None
    assert not output.prior_mean.any()
    assert not output.prior_logvar.any()
    assert bool(output.kl.any()) == (prior == "standard")


# Generation


def test_generated_state_dict_is_what_peft_saves():
    for base in BASES:
        model, dataset = make_model(base=base)
        generated = model.generate_state_dict(dataset.task_vectors[0])
        expected = get_peft_model(BASES[base](), LoraConfig(**model.config.lora_config))
        assert {k: v.shape for k, v in generated.items()} == {
            k: v.shape for k, v in adapter_state_dict(expected).items()
        }
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in generated.values())
        packed, shared = model.layout.pack(generated, {"r": 4, "lora_alpha": 4})
        assert torch.equal(packed, model.decode_task_vector(dataset.task_vectors[0]))
        assert torch.equal(shared, dataset.shared_weights)


def test_draws_of_a_task_vector_are_averaged():
    model, dataset = make_model()
    draws = dataset.task_vectors[:4]
    alone = torch.stack([model.decode_task_vector(draw) for draw in draws])
    assert alone.std(0).max() > 0
    torch.testing.assert_close(model.decode_task_vector(draws), alone.mean(0))


def test_one_flat_row_is_a_task_vector():
    model, dataset = make_model(num_task_vectors=1)
    vector = dataset.task_vectors[0]
    assert torch.equal(model.decode_task_vector(vector[0]), model.decode_task_vector(vector))


def test_a_torch_generator_draws_from_the_prior_and_nothing_else_does(variant):
    model, dataset = make_model(**variant)
    vector, before = dataset.task_vectors[0], torch.get_rng_state()

    def draw(seed):
        return model.decode_task_vector(vector, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(2)) == (variant.get("prior") == "none")
    mean = model(task_vector=vector[None]).lora_weights[0]
    torch.testing.assert_close(model.decode_task_vector(vector), mean)
    assert torch.equal(before, torch.get_rng_state())


def test_decoding_keeps_the_mode_and_ignores_dropout():
    model, dataset = make_model(dropout=0.5)
    expected = model.decode_task_vector(dataset.task_vectors[0])
    model.train()
    assert torch.equal(model.decode_task_vector(dataset.task_vectors[0]), expected)
    assert model.training
    assert model.network.training


# The normalizer


def test_statistics_equal_those_of_numpy(variant):
    model, dataset = make_model(**variant)
    normalizer, weights = model.zoo_normalizer, dataset.lora_weights.double().numpy()
    vectors = dataset.task_vectors.double().numpy()
    np.testing.assert_allclose(normalizer.weight_mean, weights.mean(0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.vector_mean, vectors.mean(0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.vector_scale, vectors.std(0), rtol=1e-5)
    _, deviations, _ = np.linalg.svd(((vectors - vectors.mean(0)) / vectors.std(0)).reshape(len(vectors), -1))
    conditions = normalizer.condition(dataset.task_vectors).double().numpy()
    expected = np.zeros(model.config.condition_size)
    known = min(len(expected), len(vectors) - 1)  # centered vectors span one direction less than there are vectors
    expected[:known] = deviations[:known] / deviations[:known].sum() * len(expected)
    np.testing.assert_allclose((conditions**2).mean(0), expected, rtol=1e-4, atol=1e-6)
    products = conditions.T @ conditions
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-3)
    start, scales = 0, iter(normalizer.weight_scale)
    for block in model.layout.blocks:
        for _ in block.modules:
            part = weights[:, start : start + block.rank * block.width]
            np.testing.assert_allclose(next(scales), np.sqrt(((part - part.mean(0)) ** 2).mean()), rtol=1e-5)
            start += block.rank * block.width
    assert start == model.layout.num_weights
    assert next(scales, None) is None
    assert torch.equal(normalizer.shared_weights, dataset.shared_weights)


def test_statistics_do_not_depend_on_the_batch_size():
    model, dataset = make_model(fitted=False)
    model.fit_normalizer(dataset, batch_size=12)
    other, _ = make_model(fitted=False)
    other.fit_normalizer(dataset, batch_size=5)
    for name, buffer in model.zoo_normalizer.named_buffers():
        torch.testing.assert_close(buffer, other.zoo_normalizer.get_buffer(name))


def test_normalize_undoes_denormalize():
    model, dataset = make_model()
    normalizer, x = model.zoo_normalizer, torch.randn(3, model.layout.num_weights)
    torch.testing.assert_close(normalizer.normalize(normalizer.denormalize(x)), x, rtol=1e-4, atol=1e-4)
    weights = dataset.lora_weights
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(weights)), weights, rtol=1e-5, atol=1e-7)
    normalized = normalizer.normalize(weights)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(normalized.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.3])
@pytest.mark.parametrize("how_many", ["one", "all but one", "all"])
@pytest.mark.parametrize("architecture", ["transformer", "conv1d"])
def test_constant_matrices_come_out_as_their_mean(architecture, how_many, constant):
    model, dataset = make_model(fitted=False, architecture=architecture)
    sizes = model.zoo_normalizer.sizes
    size = {"one": sizes[0], "all but one": sum(sizes[:-1]), "all": sum(sizes)}[how_many]
    dataset.lora_weights[:, :size] = constant
    dataset.task_vectors[:, 0, 0] = constant
    model.fit_normalizer(dataset)
    output = model(**dataset.batch())
    assert output.loss.isfinite()
    assert output.reconstruction_loss.max() < 10
    generated = model.decode_task_vector(dataset.task_vectors[0])
    assert generated.isfinite().all()
    torch.testing.assert_close(generated[:size], torch.full((size,), constant), rtol=0, atol=1e-4)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_token_identities_tell_all_matrices_apart(base):
    for granularity in ("matrix", "rank"):
        model, _ = make_model(base=base, token_granularity=granularity)
        identities = model.network.tokens.identities()
        distances = torch.cdist(identities, identities) + torch.eye(len(identities))
        assert len(identities) == sum(b.count * (b.rank if granularity == "rank" else 1) for b in model.layout.blocks)
        assert distances.min() > 1e-3


def test_weights_pass_through_tokens_in_their_order():
    """With identity projections, embedding and unembedding give the vector back."""
    for granularity in ("matrix", "rank"):
        model, dataset = make_model(token_granularity=granularity, hidden_size=128, basis_size=128)
        tokens, weights = model.network.tokens, dataset.lora_weights
        with torch.no_grad():
            tokens.coordinate_norm = torch.nn.Identity()
            for one in (*tokens.in_projections, tokens.coordinate_proj, *tokens.bases):
                one.weight.copy_(torch.eye(*one.weight.shape[-2:]))
                one.bias.zero_()
            assert torch.equal(tokens.unembed(tokens.embed(weights), torch.zeros(())), weights)


def test_first_argument_is_the_main_input():
    model, dataset = make_model()
    vector, weights = dataset.task_vectors[:2], dataset.lora_weights[:2]
    by_position, by_name = model.eval()(vector, weights), model(lora_weights=weights, task_vector=vector)
    assert torch.equal(by_position.lora_weights, by_name.lora_weights)
    assert torch.equal(model(vector).lora_weights, model(task_vector=vector).lora_weights)


def test_linear_path_reaches_each_matrix_on_its_own():
    """Without the decoder, the coordinates before the norm are affine in the task vector; matrices differ."""
    model, dataset = make_model()
    network, seen = model.network, []
    with torch.no_grad():
        network.tokens.coordinate_proj.weight.zero_()
    network.tokens.coordinate_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vectors = dataset.batch(2)["task_vector"]
    for vector in (vectors[:1], vectors[1:], vectors.mean(0, keepdim=True)):
        model(task_vector=vector)
    torch.testing.assert_close(seen[2], (seen[0] + seen[1]) / 2, atol=1e-5, rtol=1e-4)
    assert (seen[0] - seen[1]).abs().amax(-1).min() > 1e-4
    assert torch.cdist(seen[0][0], seen[0][0]).add(torch.eye(seen[0].shape[1])).min() > 1e-4


def test_each_token_has_a_linear_layer_of_its_own():
    torch.manual_seed(0)
    layer = TokenwiseLinear(3, 4, 5)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(2, 3, 4)
    for token in range(3):
        expected = torch.nn.functional.linear(x[:, token], layer.weight[token].T, layer.bias[token])
        torch.testing.assert_close(layer(x)[:, token], expected)
