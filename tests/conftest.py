"""Tiny real models and real PEFT adapters: everything is what a user has, only small, made in memory and offline."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when a Hugging Face library is first imported
# On models this small a second thread only waits, and for long if the machine is busy; for child processes, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import socket
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from hf_icm_lora import (
    CollectionArguments,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    Task,
    TaskVectorExtractor,
    TaskVectorSpec,
    collect_zoo,
    save_tasks,
)

logging.disable_progress_bar()


def pytest_collection_finish():
    """Every Trainer collects garbage several times: not among what the libraries hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test may open a connection to another machine."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"A test tried to connect to {address}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of single characters, without a pad token."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {character: index for index, character in enumerate(["<unk>", "</s>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()  # or text would come back with a space after each character
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # as SmolLM2 has it, with a default system prompt, and with a token that begins texts


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    """The tokenizer of an instruct model: it has a chat template, and begins all other texts with a token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def save_base_and_tasks(folder, tokenizer) -> tuple[str, str]:
    """Write what the command line starts from: a base model with its tokenizer, and four tasks."""
    base, tasks = str(folder / "base"), str(folder / "tasks.jsonl")
    make_llama().save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_tasks(make_tasks(4), tasks)
    return base, tasks


def make_gpt2() -> GPT2LMHeadModel:
    """GPT-2 stores its weights transposed (Conv1D)."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


LORA_TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture(params=["llama", "gpt2", "t5"])
def any_model(request):
    """One model of each way to be built: (model, target modules)."""
    return {"llama": make_llama, "gpt2": make_gpt2, "t5": make_t5}[request.param](), LORA_TARGETS[request.param]


def make_tasks(num_tasks: int = 4) -> list[Task]:
    """Tiny synthetic tasks on shared prompts whose right answers contradict each other: letter + k."""
    prompts = [chr(97 + i % 26) + chr(97 + i // 26) for i in range(40)]

    def samples(shift: int, part: list[str]) -> list[tuple[str, str]]:
        return [(prompt, "".join(chr((ord(c) - 97 + shift) % 26 + 97) for c in prompt)) for prompt in part]

    return [
        Task(
            f"shift/{shift}", description=f"Shift each letter by {shift}.", family="shift",
            train=samples(shift, prompts[:24]), demo=samples(shift, prompts[24:32]), test=samples(shift, prompts[32:]),
        )
        for shift in range(1, num_tasks + 1)
    ]  # fmt: skip


@pytest.fixture
def tasks():
    return make_tasks()


# The world: what most tests need of a user's work, made once


SEEN, UNSEEN = ["shift/1", "shift/2", "shift/3"], ["shift/4"]  # the tasks with a LoRA
SIZES = dict(hidden_size=32, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1, latent_size=4)


class World(NamedTuple):
    """A user's work, all of it tiny: see `world`."""

    folder: Path  # with `base`, the base model and its tokenizer, `tasks.jsonl`, and `zoo`
    tasks: list[Task]  # six
    zoo: LoraZoo  # LoRAs of the first four, vectors of all
    generator: LoraGeneratorModel  # of the first three


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer):
    """What most tests begin with. It is everybody's: a test that changes something takes a copy."""
    folder, tasks = tmp_path_factory.mktemp("world"), make_tasks(6)
    base_path, _ = save_base_and_tasks(folder, tokenizer)
    zoo = make_zoo(folder, LlamaForCausalLM.from_pretrained(base_path), tokenizer, tasks, SEEN + UNSEEN)
    generator = amplified(LoraGeneratorConfig.from_zoo(zoo.subset(SEEN), **SIZES), zoo.subset(SEEN).as_dataset())
    weights = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    before = files(folder), weights, generator.config.to_dict()
    yield World(folder, tasks, zoo, generator)
    changed = {name for name, content in files(folder).items() if before[0].get(name) != content}
    changed |= {name for name, tensor in generator.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert not changed, "A test has changed the world of the others."
    assert (files(folder).keys(), generator.config.to_dict()) == (before[0].keys(), before[2])


def make_zoo(folder, base, tokenizer, tasks, with_lora=None, spec=None, lora_config=None, **arguments) -> LoraZoo:
    """Collect LoRAs of all tasks, or of those that are named, in a few steps, and add vectors of all of them."""
    lora_config = lora_config or LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"
    )
    args = CollectionArguments(folder / "out", **{"max_steps": 8, "eval_steps": 4, "use_cpu": True} | arguments)
    own = [task for task in tasks if with_lora is None or task.name in with_lora]
    zoo = collect_zoo(folder / "zoo", base, tokenizer, own, lora_config, args)
    extractor = TaskVectorExtractor(spec or TaskVectorSpec(num_demonstrations=4, num_draws=4))
    zoo.add_task_vectors(extractor.extract(base, tokenizer, tasks))
    return zoo


def copy_zoo(zoo: LoraZoo, path: Path) -> LoraZoo:
    """Return a copy of a zoo without its task vectors."""
    shutil.copytree(zoo.path, path, ignore=shutil.ignore_patterns("task_vectors.safetensors"))
    return LoraZoo(path)


def amplified(config: LoraGeneratorConfig, dataset=None) -> LoraGeneratorModel:
    """A generator as at its initialization, but with ten times its weights, so that conditions and draws matter."""
    torch.manual_seed(0)
    generator = LoraGeneratorModel(config).eval()
    if dataset is not None:
        generator.fit_normalizer(dataset)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return generator


def training_arguments(folder: Path, **fields) -> LoraGeneratorTrainingArguments:
    """A few steps on a processor, each of them logged, and no checkpoints."""
    defaults = dict(output_dir=folder / "out", max_steps=6, logging_steps=1, per_device_train_batch_size=8,
                    save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)  # fmt: skip
    return LoraGeneratorTrainingArguments(**defaults | fields)


def odd_base() -> LlamaForCausalLM:
    """A base whose modes and flags are not uniform."""
    base = make_llama().train()
    base.model.norm.eval()
    base.model.embed_tokens.weight.requires_grad_(False)
    return base


def state_of(base: torch.nn.Module) -> dict:
    """All that must be as before when something has worked with a user's model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": {name: (p.dtype, p.requires_grad, p.grad) for name, p in base.named_parameters()},
        "values": {name: sha256(t.float().numpy().tobytes()).digest() for name, t in base.state_dict().items()},
        "modules": {name: (type(module), module.training) for name, module in base.named_modules()},
        "hooks": {name: [list(getattr(m, kind)) for kind in hooks] for name, m in base.named_modules()},
        "attributes": {
            name: sorted(key for key in vars(m) if not key.startswith("_")) for name, m in base.named_modules()
        },
        "config": base.config.to_dict(),
        "generation_config": base.generation_config.to_dict(),
    }


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
