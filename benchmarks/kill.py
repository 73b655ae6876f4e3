"""Is anything lost when collecting is killed? `python benchmarks/kill.py` kills it at random moments and resumes it.

A tiny random Llama and a few tasks are made in memory. A child process collects them into a zoo and gets a SIGKILL
after a random part of the processor time that a whole collection takes, which other work on the machine does not
shift. What the zoo then lists must load and be what an uninterrupted collection wrote; another child resumes, and then
every entry must be, byte by byte but for the seconds that the record states. Children are forked after the imports, so
that a run takes about a second. Linux only.
"""

import gc
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from suite.bench import options_of, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_icm_lora import CollectionArguments, LoraZoo, Task, ZooError, collect_zoo
from hf_icm_lora.files import TEMPORARY

NUM_TASKS = 3


@dataclass
class KillOptions:
    kills: int = field(default=200, metadata={"help": "Collections to kill."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    output: str = field(default="benchmarks/results/kill.json", metadata={"help": "Where the figures go."})


def make_base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Make a tiny Llama and a tokenizer of single characters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {character: index for index, character in enumerate(["<unk>", "</s>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    return LlamaForCausalLM(config).eval(), tokenizer


def collect(path: Path, base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Collect the tasks into a zoo, or what is missing of them."""
    tasks = [
        Task(f"repeat/{n}", train=[(c, c * n) for c in "abcdefgh"], demo=[(c, c * n) for c in "ijkl"])
        for n in range(1, NUM_TASKS + 1)
    ]
    lora_config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = CollectionArguments(
        output_dir=str(path.parent / "trainer"), max_steps=2, eval_steps=1, patience=9, use_cpu=True
    )
    collect_zoo(path, base, tokenizer, tasks, lora_config, args)


def fork(function: Callable, *args) -> int:
    """Call a function in a child process and return its id."""
    if process := os.fork():
        return process
    try:
        function(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def finish(process: int) -> tuple[int, float]:
    """Wait for a child process; return its exit code, negative if a signal ended it, and its processor time."""
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def kill_after(process: int, seconds: float) -> None:
    """Send SIGKILL to a child process when it has used this much processor time, or has ended."""
    clock, ended = (~process << 3) | 2, os.WEXITED | os.WNOHANG | os.WNOWAIT  # the clock's number: clock_getcpuclockid
    while time.clock_gettime(clock) < seconds and os.waitid(os.P_PID, process, ended) is None:
        time.sleep(0.0002)
    os.kill(process, signal.SIGKILL)


def entries(path: Path) -> dict[str, dict[str, str]]:
    """Open a zoo, load all that it lists, and return task -> file -> hash; of a record without its seconds."""
    found = {}
    for name, record in LoraZoo(path).records.items():
        zoo, files = LoraZoo(path, [name]), {}
        for step in record["snapshots"]:
            zoo.lora_weights(name, step)
        for file in sorted(record["folder"].rglob("*.*")):
            content = file.read_bytes()
            if file.name == "task.json":
                content = json.dumps(json.loads(content) | {"seconds": None}).encode()
            files[str(file.relative_to(record["folder"]))] = hashlib.sha256(content).hexdigest()
        found[name] = files
    return found


def run(options: KillOptions) -> dict:
    """Kill and resume as often as asked, and return the figures."""
    logging.disable_progress_bar()
    moments, base, tokenizer = random.Random(options.seed), *make_base()
    gc.freeze()  # every Trainer collects garbage: not among what the libraries hold
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for name in ("reference", "again"):  # the second is not the first use of anything
            code, used = finish(fork(collect, Path(folder) / name, base, tokenizer))
            assert code == 0
            seconds.append(used)
        expected = entries(Path(folder) / "reference")
        assert entries(Path(folder) / "again") == expected
        assert len(expected) == NUM_TASKS
        figures = {"kills": options.kills, "during_collection": 0, "while_writing": 0, "before_the_zoo": 0}
        figures |= {"tasks_complete_when_killed": [0] * (NUM_TASKS + 1), "losses": 0, "differing": 0}
        for index in range(options.kills):
            path = Path(folder) / str(index)
            process = fork(collect, path, base, tokenizer)
            kill_after(process, moments.uniform(0, seconds[1]))
            figures["during_collection"] += finish(process)[0] == -signal.SIGKILL
            figures["while_writing"] += any(path.rglob(f"{TEMPORARY}*"))
            try:
                killed = entries(path)
            except ZooError:  # it was not made yet
                killed = {}
                figures["before_the_zoo"] += 1
            figures["tasks_complete_when_killed"][len(killed)] += 1
            assert finish(fork(collect, path, base, tokenizer))[0] == 0
            resumed = entries(path)
            figures["losses"] += len(killed.keys() - resumed.keys()) + len(expected.keys() - resumed.keys())
            both = [(killed, name) for name in killed] + [(resumed, name) for name in resumed]
            figures["differing"] += sum(found[name] != expected.get(name) for found, name in both)
        return figures | {"seconds_per_collection": round(seconds[1], 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # a dependency's about its own code
    options = options_of(KillOptions)
    figures = run(options)
    write(options.output, figures, options.seed)
    print(json.dumps(figures, indent=2))
    sys.exit(1 if figures["losses"] or figures["differing"] else 0)
