"""The layout: vectors and state dicts are one thing in two forms, and an adapter in either form acts alike."""

import copy
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import GPT2LMHeadModel

from hf_icm_lora import CorruptAdapterError, IncompatibleAdapterError, LoraLayout, attach_adapter
from hf_icm_lora.layout import PREFIX, LoraModule, split
from hf_icm_lora.lora_config import canonical_lora_config

IDS = torch.tensor([[5, 17, 3, 99, 42, 8]])
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj"]


def logits(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def peft_adapter(base, targets, seed=0, **fields):
    """A trained adapter as PEFT has it: (its model, its configuration, its state dict)."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets} | fields)
    config.fan_in_fan_out = isinstance(base, GPT2LMHeadModel)  # else PEFT sets it, with a warning
    model = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return model, config.to_dict(), get_peft_model_state_dict(model, save_embedding_layers=False)


def products(state_dict, scaling=1.0):
    names = {key.rsplit(".lora_", 1)[0] for key in state_dict}
    return {n: scaling * state_dict[f"{n}.lora_B.weight"] @ state_dict[f"{n}.lora_A.weight"] for n in names}


def plain_config(rank=4, alpha=4):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": TARGETS}


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init", "free"])
def test_round_trip_keeps_each_product_and_the_logits(any_model, gauge):
    base, targets = any_model
    theirs, config, state_dict = peft_adapter(base, targets)
    layout = LoraLayout.from_state_dict(state_dict, config, gauge)
    unpacked = layout.unpack(*layout.pack(state_dict, config))

    assert unpacked.keys() == state_dict.keys()
    expected, found = products(state_dict, scaling=10 / 4), products(unpacked)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    ours = attach_adapter(base, canonical_lora_config(config, layout.max_rank), unpacked)
    assert not torch.allclose(logits(theirs), _without_adapter(ours), atol=1e-2)  # the adapter matters at all
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gauge", ["frozen_a", "shared_init", "free"])
def test_scaled_weights_are_the_scaled_product(any_model, gauge):
    base, targets = any_model
    _, config, state_dict = peft_adapter(base, targets)
    layout = LoraLayout.from_state_dict(state_dict, config, gauge)
    lora_weights, shared_weights = layout.pack(state_dict, config)
    before = products(layout.unpack(lora_weights, shared_weights))
    half, nothing = layout.scaled(torch.stack([lora_weights, lora_weights]), 0.5), layout.scaled(lora_weights, 0.0)
    assert half.shape == (2, layout.num_weights)
    for weights, scale in ((half[0], 0.5), (half[1], 0.5), (nothing, 0.0)):
        for name, product in products(layout.unpack(weights, shared_weights)).items():
            torch.testing.assert_close(product, scale * before[name])


def _without_adapter(model):
    with model.disable_adapter():
        return logits(model)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"alpha_pattern": {"q_proj": 3}}, id="alpha_pattern"),
        pytest.param({"alpha_pattern": {r"layers\.1\..*q_proj": 3, "v_proj": 1}}, id="alpha_pattern_regex"),
        pytest.param({"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 7}}, id="alpha_pattern_full_path"),
        pytest.param({"alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 20}}, id="alpha_pattern_first_wins"),
        pytest.param({"rank_pattern": {"v_proj": 2}}, id="rank_pattern"),
        pytest.param({"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1}}, id="both_patterns"),
        pytest.param({"rank_pattern": {"v_proj": 2}, "use_rslora": True}, id="rank_pattern_rslora"),
    ],
)
def test_scaling_is_folded_as_peft_applies_it(llama, fields):
    theirs, config, state_dict = peft_adapter(llama, TARGETS, **fields)
    layout = LoraLayout.from_state_dict(state_dict, config, "shared_init")
    unpacked = layout.unpack(*layout.pack(state_dict, config))
    assert {tensor.shape[0] for key, tensor in unpacked.items() if ".lora_A." in key} == {layout.max_rank}
    ours = attach_adapter(llama, canonical_lora_config(config, layout.max_rank), unpacked)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_unpacked_tensors_are_contiguous_and_alias_nothing(llama):
    _, config, state_dict = peft_adapter(llama, TARGETS)
    layout = LoraLayout.from_state_dict(state_dict, config, "frozen_a")
    vectors = layout.pack(state_dict, config)
    unpacked = layout.unpack(*vectors)
    assert all(tensor.is_contiguous() for tensor in unpacked.values())
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*unpacked.values(), *vectors)]
    assert len(set(storages)) == len(storages)


def test_order_and_dtype_of_the_state_dict_do_not_matter(llama):
    _, config, state_dict = peft_adapter(llama, TARGETS)
    half = {key: state_dict[key].bfloat16() for key in reversed(state_dict)}
    full = {key: half[key].double() for key in state_dict}
    layout = LoraLayout.from_state_dict(full, config, "frozen_a")
    assert layout == LoraLayout.from_state_dict(half, config, "frozen_a")
    for one, other in zip(layout.pack(full, config), layout.pack(half, config), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


names = st.lists(
    st.sampled_from(["layers", "blocks", "attn", "q", "v_proj", "0", "1", "2", "10"]), min_size=1, max_size=4
)
sizes = st.integers(1, 5)
layouts = st.builds(
    lambda modules, gauge: LoraLayout(tuple(LoraModule(".".join(name), *rest) for name, *rest in modules), gauge),
    st.lists(st.tuples(names, sizes, sizes, sizes), min_size=1, max_size=6, unique_by=lambda m: ".".join(m[0])),
    st.sampled_from(["frozen_a", "shared_init"]),
)


@given(layouts, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_unpack_undoes_pack_for_any_names_sizes_and_ranks(layout, random):
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    state_dict = {}
    for module in random.sample(layout.modules, len(layout.modules)):
        state_dict[f"{PREFIX}{module.name}.lora_A.weight"] = torch.randn(
            module.rank, module.in_features, generator=generator
        )
        state_dict[f"{PREFIX}{module.name}.lora_B.weight"] = torch.randn(
            module.out_features, module.rank, generator=generator
        )
    assert LoraLayout.from_state_dict(state_dict, plain_config(), layout.gauge) == layout
    alpha_pattern = {f"^{re.escape(module.name)}": module.rank for module in layout.modules}  # scaling 1 everywhere
    vectors = layout.pack(state_dict, plain_config() | {"alpha_pattern": alpha_pattern})
    assert [len(vector) for vector in vectors] == [layout.num_weights, layout.num_shared_weights]
    unpacked = layout.unpack(*vectors)
    assert unpacked.keys() == state_dict.keys()
    for module in layout.modules:
        a, b = (unpacked[f"{PREFIX}{module.name}.lora_{factor}.weight"] for factor in "AB")
        assert a.shape == (layout.max_rank, module.in_features)
        assert b.shape == (module.out_features, layout.max_rank)
        assert torch.equal(a[: module.rank], state_dict[f"{PREFIX}{module.name}.lora_A.weight"])
        assert torch.equal(b[:, : module.rank], state_dict[f"{PREFIX}{module.name}.lora_B.weight"])
        assert not a[module.rank :].any()
        assert not b[:, module.rank :].any()


@given(layouts)
@settings(max_examples=50, deadline=None)
def test_layout_survives_json(layout):
    again = LoraLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.fingerprint == layout.fingerprint
    assert again.blocks == layout.blocks


@given(layouts)
@settings(max_examples=50, deadline=None)
def test_blocks_are_contiguous_and_cover_the_vector(layout):
    for blocks, length in (
        (layout.blocks, layout.num_weights),
        (layout.shared_blocks, layout.num_shared_weights),
    ):
        vector = torch.arange(length)
        parts = split(vector, blocks)
        assert torch.equal(torch.cat([part.reshape(-1) for part in parts] or [vector]), vector)
        for part, block in zip(parts, blocks, strict=True):
            assert part.is_contiguous()
            assert part.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()  # a view, no copy
            assert part.shape == (len(block.keys()), block.rank, block.width)
    keys = [key for block in (*layout.blocks, *layout.shared_blocks) for key in block.keys()]
    expected = {f"{PREFIX}{m.name}.lora_{factor}.weight" for m in layout.modules for factor in "AB"}
    assert sorted(keys) == sorted(expected)


def test_matrices_of_one_kind_lie_by_position_and_not_by_spelling():
    layout = LoraLayout(tuple(LoraModule(f"layers.{i}.q", 3, 3, 1) for i in (10, 2, 0)), "frozen_a")
    (block,) = layout.blocks
    assert [module.position for module in block.modules] == [(0,), (2,), (10,)]
    assert block.kind == "layers.*.q"


def test_modules_of_one_kind_with_other_shapes_make_other_blocks():
    modules = [LoraModule("s.0.q", 4, 6, 2), LoraModule("s.1.q", 4, 6, 2), LoraModule("s.2.q", 4, 8, 2)]
    layout = LoraLayout((*modules, LoraModule("s.3.q", 4, 6, 3)), "shared_init")
    described = [(block.factor, block.count, block.rank, block.width) for block in layout.blocks]
    assert described == [
        ("lora_A", 3, 2, 4),
        ("lora_A", 1, 3, 4),
        ("lora_B", 2, 2, 6),
        ("lora_B", 1, 2, 8),
        ("lora_B", 1, 3, 6),
    ]


def test_fingerprint_changes_exactly_if_the_layout_does():
    modules = (LoraModule("layers.0.q", 4, 6, 2), LoraModule("layers.1.q", 4, 6, 2))
    layout = LoraLayout(modules, "frozen_a")
    assert LoraLayout(modules[::-1], "frozen_a").fingerprint == layout.fingerprint
    others = [
        LoraLayout(modules, "shared_init"),
        LoraLayout(modules[:1], "frozen_a"),
        *(
            LoraLayout((modules[0], LoraModule(*changed)), "frozen_a")
            for changed in [
                ("layers.2.q", 4, 6, 2),
                ("layers.1.q", 5, 6, 2),
                ("layers.1.q", 4, 7, 2),
                ("layers.1.q", 4, 6, 3),
            ]
        ),
    ]
    fingerprints = {layout.fingerprint, *(other.fingerprint for other in others)}
    assert len(fingerprints) == len(others) + 1


def _drop(key):
    return lambda state_dict: state_dict.pop(key)


def _put(key, tensor):
    return lambda state_dict: state_dict.update({key: tensor})


def _nan(state_dict):
    state_dict[f"{Q0}.lora_A.weight"][1, 2] = math.nan


def _rank_two(state_dict):
    state_dict.update({key: t[:2] if ".lora_A." in key else t[:, :2] for key, t in state_dict.items()})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(_nan, CorruptAdapterError, rf"{Q0}\.lora_A\.weight holds 1 values", id="nan"),
        pytest.param(
            _drop(f"{Q0}.lora_B.weight"),
            CorruptAdapterError,
            r"layers\.0\..*q_proj: lora_B.weight is missing",
            id="no_b",
        ),
        pytest.param(
            _drop(f"{Q0}.lora_A.weight"),
            CorruptAdapterError,
            r"layers\.0\..*q_proj: lora_A.weight is missing",
            id="no_a",
        ),
        pytest.param(
            _put("lm_head.weight", torch.ones(2)), CorruptAdapterError, r"found \['lm_head.weight'\]", id="stray"
        ),
        pytest.param(
            _put(f"{Q0}.lora_magnitude_vector", torch.ones(2)), CorruptAdapterError, "lora_magnitude_vector", id="dora"
        ),
        pytest.param(
            _put(f"{Q0}.lora_A.weight", torch.ones(3, 32)),
            IncompatibleAdapterError,
            r"q_proj: .*\(3, 32\) and \(32, 4\)",
            id="ranks",
        ),
        pytest.param(
            _put(f"{Q0}.lora_A.weight", torch.ones(4)), IncompatibleAdapterError, r"q_proj: .*\(4,\)", id="vector"
        ),
        pytest.param(
            _put(f"{Q0}.lora_A.weight", torch.ones(4, 9)),
            IncompatibleAdapterError,
            r"another layout.*layers\.0\..*q_proj: expected rank 4, 32 -> 32, found rank 4, 9 -> 32",
            id="width",
        ),
        pytest.param(
            _rank_two,
            IncompatibleAdapterError,
            r"another layout.*expected rank 4.*found rank 2.*and 1 more",
            id="rank",
        ),
    ],
)
def test_bad_state_dicts_get_the_typed_error_that_names_the_place(llama, spoil, error, message):
    _, config, state_dict = peft_adapter(llama, TARGETS)
    layout = LoraLayout.from_state_dict(state_dict, config, "frozen_a")
    state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
    spoil(state_dict)
    with pytest.raises(error, match=message):
        layout.pack(state_dict, config)


def test_missing_and_further_modules_are_another_layout(llama):
    _, config, state_dict = peft_adapter(llama, TARGETS)
    layout = LoraLayout.from_state_dict(state_dict, config, "frozen_a")
    fewer = {key: tensor for key, tensor in state_dict.items() if not key.startswith(Q0)}
    with pytest.raises(IncompatibleAdapterError, match=r"layers\.0\..*q_proj: expected .* found no such module"):
        layout.pack(fewer, config)
    small = LoraLayout.from_state_dict(fewer, config, "frozen_a")
    with pytest.raises(IncompatibleAdapterError, match=r"layers\.0\..*q_proj: expected no such module, found rank 4"):
        small.pack(state_dict, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gauge": "polar", "modules": [["q", 2, 2, 1]]}, "gauge .* found 'polar'"),
        ({"gauge": "frozen_a", "modules": []}, "at least one adapted module"),
        ({"gauge": "frozen_a", "modules": [["q", 2, 2, 0]]}, "q: expected positive sizes"),
        ({"gauge": "frozen_a", "modules": [["q", 2, 2.5, 1]]}, "q: expected positive sizes"),
        ({"gauge": "frozen_a", "modules": [["q", 2, 2]]}, "Not a LoRA layout"),
        ({"gauge": "frozen_a", "modules": [["q", 2, 2, 1], ["q", 2, 2, 1]]}, "q: .*twice"),
        ({"modules": [["q", 2, 2, 1]]}, "Not a LoRA layout"),
        ({"gauge": "frozen_a", "modules": 3}, "Not a LoRA layout"),
    ],
)
def test_layouts_that_are_none_are_refused(values, message):
    with pytest.raises(IncompatibleAdapterError, match=message):
        LoraLayout.from_dict(values)


def test_vectors_of_another_length_are_refused():
    layout = LoraLayout((LoraModule("q", 2, 3, 1),), "frozen_a")
    with pytest.raises((ValueError, RuntimeError), match="split|size|length"):
        layout.unpack(torch.zeros(4), torch.zeros(2))


def test_packing_does_not_change_the_state_dict(llama):
    _, config, state_dict = peft_adapter(llama, TARGETS)
    before = {key: tensor.clone() for key, tensor in state_dict.items()}
    LoraLayout.from_state_dict(state_dict, config, "free").pack(state_dict, config)
    assert all(torch.equal(before[key], state_dict[key]) for key in before)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([9, 8, 8, 8], "m0: expected rank 2, 8 -> 4, found rank 2, 9 -> 4."),
        (
            [9, 9, 9, 8],
            "m0: expected rank 2, 8 -> 4, found rank 2, 9 -> 4; m1: expected rank 2, 8 -> 4, found rank 2, 9 -> 4; "
            "m2: expected rank 2, 8 -> 4, found rank 2, 9 -> 4.",
        ),
        (
            [9, 9, 9, 9],
            "m0: expected rank 2, 8 -> 4, found rank 2, 9 -> 4; m1: expected rank 2, 8 -> 4, found rank 2, 9 -> 4; "
            "m2: expected rank 2, 8 -> 4, found rank 2, 9 -> 4; and 1 more.",
        ),
        ([8, 8, 8], "m3: expected rank 2, 8 -> 4, found no such module."),
        ([8, 8, 8, 8, 8], "m4: expected no such module, found rank 2, 8 -> 4."),
    ],
)
def test_three_differences_of_a_layout_are_named(widths, message):
    def state_dict(widths):
        sizes = {f"m{i}": width for i, width in enumerate(widths)}
        halves = {f"{PREFIX}{name}.lora_A.weight": torch.ones(2, width) for name, width in sizes.items()}
        return halves | {f"{PREFIX}{name}.lora_B.weight": torch.ones(4, 2) for name in sizes}

    config = {"r": 2, "lora_alpha": 2}
    layout = LoraLayout.from_state_dict(state_dict([8] * 4), config, "frozen_a")
    layout.pack(state_dict([8] * 4), config)
    with pytest.raises(IncompatibleAdapterError, match=f"^The adapter has another layout. {re.escape(message)}$"):
        layout.pack(state_dict(widths), config)
