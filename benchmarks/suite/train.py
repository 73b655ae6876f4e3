"""Train the generator of the suite: `python benchmarks/suite/train.py`, after `collect.py`.

The recipe of the package, `train_generator`, on the LoRAs of seen tasks and on the samples of all `seen` and `samples`
tasks of `splits.json`, whose vectors the zoo then keeps. An interrupted run goes on from its last checkpoint. The
result in 8 bits, as it ships, goes to `OUTPUT_DIR/int8`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from bench import SPLITS, Bench, options_of, with_lora

from hf_icm_lora import LoraZoo, RecipeArguments, train_generator

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the packaged copy is its, and lies elsewhere on each machine
SIZES = {
    "transformer": {"hidden_size": 224, "intermediate_size": 448, "basis_size": 32},
    "conv1d": {},  # the paper's
}


@dataclass
class TrainOptions:
    output_dir: str = field(default="build/suite/generator", metadata={"help": "Where the generator goes."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py."})
    architecture: str = field(default="transformer", metadata={"help": "Or conv1d, the paper's."})
    seed: int = field(default=0, metadata={"help": "Of initialization and training."})
    num_loras: int = field(default=48, metadata={"help": "LoRAs of seen tasks for reconstruction."})
    reconstruction_steps: int = field(default=300, metadata={"help": "Steps on the zoo's LoRAs."})
    behavioural_steps: int = field(default=1600, metadata={"help": "Steps through the base model; may be 0."})
    learning_rate: float = field(default=8e-3, metadata={"help": "Of behavioural training."})


def main() -> None:
    options, bench = options_of(TrainOptions), Bench()
    args = RecipeArguments(
        output_dir=options.output_dir,
        reconstruction_steps=options.reconstruction_steps,
        max_steps=options.behavioural_steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
        report_to="none",
        resume_from_checkpoint="True" if any(Path(options.output_dir).glob("checkpoint-*")) else None,
    )
    generator = train_generator(
        LoraZoo(options.zoo).subset(with_lora("seen")[: options.num_loras]),
        bench.base,
        bench.tokenizer,
        [bench.suite[name] for name in SPLITS["seen"] + SPLITS["samples"]],
        args,
        architecture=options.architecture,
        base_model_name_or_path=BASE_MODEL,
        **SIZES[options.architecture],
    )
    generator.to_int8().save_pretrained(Path(options.output_dir) / "int8")


if __name__ == "__main__":
    main()
