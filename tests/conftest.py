"""Tiny real models and real PEFT adapters: everything is what a user has, only small, made in memory and offline."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when a Hugging Face library is first imported

import socket

import pytest
import torch
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

from hf_icm_lora import Task, save_tasks

logging.disable_progress_bar()
torch.set_num_threads(1)  # on models this small a second thread only waits, and for long if the machine is busy


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
