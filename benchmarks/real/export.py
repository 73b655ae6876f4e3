"""From a writer that train.py made to a generator: the same closed form, in the package's own terms."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_icm_lora import LoraGeneratorConfig, LoraGeneratorModel
from hf_icm_lora.base_model import base_model_fingerprint
from hf_icm_lora.layout import LoraLayout, LoraModule
from hf_icm_lora.learned_closed_form import MATRICES

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}  # fmt: skip


def load_writer(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a writer in fp32."""
    stored = load_file(path)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".row_scale")}
    return {name: t * scales[f"{name}.row_scale"] if t.dtype == torch.int8 else t for name, t in stored.items()}


def generator_of(path: str | Path, base_model: torch.nn.Module, **sizes) -> LoraGeneratorModel:
    """Return a generator whose closed form computes what a writer computes. Its network was not trained yet.

    Args:
        path (`str` or `Path`): A writer.safetensors of train.py.
        base_model (`PreTrainedModel`): The base that it was trained for.
        sizes: Further fields of the configuration, of the network for instance.
    """
    stored = load_writer(path)
    linear = {name: module for name, module in base_model.named_modules() if isinstance(module, torch.nn.Linear)}

    def module(name: str, rank: int) -> LoraModule:
        return LoraModule(name, linear[name].in_features, linear[name].out_features, rank)

    count, rank = stored["keys"].shape[:2]
    reader_rank = stored["reader_a.down"].shape[1]
    layers = [f"model.layers.{index}." for index in range(count)]
    layout = LoraLayout(tuple(module(f"{layer}mlp.down_proj", rank) for layer in layers), "frozen_a")
    read = tuple(module(layer + part, reader_rank) for layer in layers for parts in PARTS.values() for part in parts)
    reader = LoraLayout(read, "free")
    closed_form = {
        "reader": reader.to_dict(),
        "state_rank": stored["state_in"].shape[2],
        "label_rank": stored["label_in"].shape[2],
    }
    config = LoraGeneratorConfig(
        layout=layout.to_dict(),
        lora_config={"r": rank, "lora_alpha": rank, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
        base_model_name_or_path=BASE_MODEL,
        base_model_fingerprint=base_model_fingerprint(base_model),
        closed_form=closed_form,
        **sizes,
    )
    generator = LoraGeneratorModel(config)

    factors: dict[tuple[str, str], torch.Tensor] = {}
    for joined, parts in PARTS.items():
        outs = [linear[f"{layers[0]}{part}"].out_features for part in parts]
        for part, b in zip(parts, stored[f"reader_b.{joined}"].split(outs, dim=1), strict=True):
            factors[f"model.layers.*.{part}", "lora_A"] = stored[f"reader_a.{joined}"]
            factors[f"model.layers.*.{part}", "lora_B"] = b.mT
    matrices = {f"{name}.weight" if name in MATRICES else name: t for name, t in stored.items() if "reader_" not in name}
    matrices |= {f"reader.{i}.weight": factors[block.kind, block.factor] for i, block in enumerate(reader.blocks)}
    generator.closed_form.load_state_dict(matrices)
    return generator.eval()
