"""Does llama.cpp do with an adapter what PEFT does? `python benchmarks/serving.py`, with the extra `llama`.

Adapters that the shipped generator writes for validation tasks are exported as GGUF and loaded beside the packaged
SmolLM2 (4 bits) in llama.cpp, and attached with PEFT to the same weights in fp32. Both read the same tokens: the
task's own prompts with their answers. Compared are, at every position, the most likely next tokens, and the
distributions.

The control is the base model without an adapter: llama.cpp also rounds what goes into its matrix products to 8 bits.
"""

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from llama_cpp import Llama
from suite.bench import SPLITS, Bench, options_of, write
from suite.page import llama_cpp
from tqdm import tqdm

from hf_icm_lora import attach_adapter, export_gguf
from hf_icm_lora.completion import render
from hf_icm_lora.smollm2 import smollm2_gguf_path


@dataclass
class LlamaCppOptions:
    num_tasks: int = field(default=8, metadata={"help": "Validation tasks."})
    num_samples: int = field(default=16, metadata={"help": "Test samples of each, read in one text."})
    output: str = field(default="benchmarks/results/llama_cpp.json", metadata={"help": "Where the figures go."})


def llama_cpp_logits(gguf: Path, lora: Path | None, ids: list[int]) -> torch.Tensor:
    llama = Llama(str(gguf), lora_path=lora and str(lora), n_ctx=1024, logits_all=True, verbose=False)
    llama.eval(ids)
    logits = torch.tensor(llama.scores[: len(ids)])
    llama.close()
    return logits


def compared(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return agreement on the most likely token and KL(expected || found), means over positions."""
    kl = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return {"top1": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(), "kl": kl.mean().item()}


@torch.no_grad()
def main() -> None:
    options, bench = options_of(LlamaCppOptions), Bench(dtype=torch.float32)
    base, tokenizer, generator = bench.base, bench.tokenizer, bench.generator
    rows = {}
    for name in tqdm(SPLITS["validation"][: options.num_tasks]):
        task = bench.suite[name]
        samples = task.test[: options.num_samples]
        text = "".join("".join(render(sample, generator.config.template, tokenizer)) for sample in samples)
        ids = tokenizer(text)["input_ids"]
        batch = torch.tensor([ids])
        state_dict = generator.generate_state_dict(bench.vector(task.demo[:12]))
        plain = base(input_ids=batch).logits[0]
        model = attach_adapter(base, generator.adapter_config(), state_dict)
        adapted = model(input_ids=batch).logits[0]
        base = model.unload()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.gguf"
            export_gguf(file, generator.adapter_config(), state_dict, base.config)
            rows[name] = {
                "positions": len(ids),
                "base": compared(llama_cpp_logits(smollm2_gguf_path(), None, ids), plain),
                "adapter": compared(llama_cpp_logits(smollm2_gguf_path(), file, ids), adapted),
                "effect_of_adapter": compared(plain, adapted),
            }
        gc.collect()
    total = sum(row["positions"] for row in rows.values())
    report = {"positions": total, "tasks": rows}
    for kind in ("base", "adapter", "effect_of_adapter"):
        report |= {
            f"{measure}_{kind}": sum(row["positions"] * row[kind][measure] for row in rows.values()) / total
            for measure in ("top1", "kl")
        }
    report["top1_agreement_base"], report["top1_agreement_adapter"] = (
        report.pop("top1_base"),
        report.pop("top1_adapter"),
    )
    write(options.output, report)
    print(llama_cpp(report))


if __name__ == "__main__":
    main()
