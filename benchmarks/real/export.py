"""From a writer that train.py made to the tensors of a generator's learned closed form."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_icm_lora.layout import LoraLayout, LoraModule
from hf_icm_lora.learned_closed_form import LearnedClosedForm

PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}  # fmt: skip


def load_writer(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a writer in fp32."""
    stored = load_file(path)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".row_scale")}
    return {name: t * scales[f"{name}.row_scale"] if t.dtype == torch.int8 else t for name, t in stored.items()}


def closed_form_of(path: str | Path, base_model: torch.nn.Module) -> LearnedClosedForm:
    """Return the learned closed form that computes what a writer computes."""
    stored = load_writer(path)
    linear = {name: module for name, module in base_model.named_modules() if isinstance(module, torch.nn.Linear)}

    def module(name: str, rank: int) -> LoraModule:
        return LoraModule(name, linear[name].in_features, linear[name].out_features, rank)

    layers, rank = stored["keys"].shape[:2]
    reader_rank = stored["reader_a.down"].shape[1]
    names = [f"model.layers.{index}." for index in range(layers)]
    layout = LoraLayout(tuple(module(f"{name}mlp.down_proj", rank) for name in names), "frozen_a")
    own = tuple(module(name + part, reader_rank) for name in names for parts in PARTS.values() for part in parts)
    reader = LoraLayout(own, "free")
    model = LearnedClosedForm(layout, reader, stored["state_in"].shape[2], stored["label_in"].shape[2])

    factors: dict[tuple[str, str], torch.Tensor] = {}
    for joined, parts in PARTS.items():
        outs = [linear[f"model.layers.0.{part}"].out_features for part in parts]
        for part, b in zip(parts, stored[f"reader_b.{joined}"].split(outs, dim=1), strict=True):
            factors[f"model.layers.*.{part}", "lora_A"] = stored[f"reader_a.{joined}"]
            factors[f"model.layers.*.{part}", "lora_B"] = b.mT
    state = {name: tensor for name, tensor in stored.items() if not name.startswith("reader_")}
    for index, block in enumerate(reader.blocks):
        state[f"reader.{index}"] = factors[block.kind, block.factor]
    model.load_state_dict(state)
    return model.requires_grad_(False)
