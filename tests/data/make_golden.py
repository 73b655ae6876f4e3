"""Write a zoo and a generator of the current formats, with the numbers that they must give for ever.

    python tests/data/make_golden.py

Run it for a new format version alone, and keep the folders of the older ones.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_icm_lora import LoraGeneratorConfig, LoraGeneratorModel, LoraLayout, LoraZoo, TaskVectors, TaskVectorSpec
from hf_icm_lora.completion import DEFAULT_TEMPLATE
from hf_icm_lora.configuration_lora_generator import FORMAT_VERSION as GENERATOR_VERSION
from hf_icm_lora.layout import PREFIX
from hf_icm_lora.zoo import FORMAT_VERSION as ZOO_VERSION

FOLDER = Path(__file__).parent
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
NAMES = ["capital", "Größe/日本"]
SIZES = dict(
    hidden_size=16, intermediate_size=16, basis_size=4, num_encoder_layers=1, num_decoder_layers=1,
    num_attention_heads=2, latent_size=4, condition_size=8,
)  # fmt: skip


def make_state_dict(rng: torch.Generator, seed_of_a: int = 0) -> dict[str, torch.Tensor]:
    state_dict, rng_of_a = {}, torch.Generator().manual_seed(seed_of_a)
    for layer in range(2):
        for name, width in (("q_proj", 32), ("v_proj", 16)):
            key = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
            state_dict[f"{key}.lora_A.weight"] = 0.3 * torch.randn(2, 32, generator=rng_of_a)
            state_dict[f"{key}.lora_B.weight"] = 0.3 * torch.randn(width, 2, generator=rng)
    return state_dict


def main() -> None:
    rng = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    zoo = LoraZoo.create(
        FOLDER / f"zoo-{ZOO_VERSION}",
        layout=LoraLayout.from_state_dict(make_state_dict(rng), CONFIG, "frozen_a"),
        lora_config=CONFIG,
        base_model_name_or_path="tiny/llama",
        base_model_fingerprint="f" * 64,
        template=DEFAULT_TEMPLATE,
    )
    for name in NAMES:
        zoo.add(
            name,
            {4: make_state_dict(rng), 8: make_state_dict(rng)},
            best_step=4,
            description=f"Do {name}.",
            family="f",
        )
    banks = {name: {"demonstrations": torch.randn(3, 2, 32, generator=rng)} for name in NAMES}
    zoo.add_task_vectors(TaskVectors(TaskVectorSpec(num_draws=3), "f" * 64, banks))
    generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **SIZES)).eval()
    generator.fit_normalizer(zoo.as_dataset())
    folder = FOLDER / f"generator-{GENERATOR_VERSION}"
    generator.save_pretrained(folder)
    (folder / "README.md").unlink()
    for name in NAMES:
        expected = {"best": zoo.lora_weights(name), "last": zoo.lora_weights(name, 8)}
        expected |= {"task_vectors": banks[name]["demonstrations"]}
        expected |= {"generated": generator.decode_task_vector(banks[name]["demonstrations"])}
        save_file(expected, FOLDER / f"expected-{NAMES.index(name)}.safetensors")


if __name__ == "__main__":
    main()
