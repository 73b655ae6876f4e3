"""Train the generator of the suite: `python benchmarks/suite/train.py`, after `collect.py`.

First on the zoo's LoRAs of seen tasks, then through the frozen base model on the samples of all `seen` and `samples`
tasks of `splits.json`. Task vectors are extracted once. An interrupted run goes on from its last checkpoint. With
`--generator` behavioural training goes on from a generator that is there already, such as the shipped one. The result
in 8 bits, as it ships, goes to `OUTPUT_DIR/int8`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from bench import SPEC, SPLITS, Bench, options_of, with_lora
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_icm_lora import (
    BehaviouralCollator,
    BehaviouralDataset,
    CompletionCollator,
    LoraGeneratorConfig,
    LoraGeneratorModel,
    LoraGeneratorTrainer,
    LoraGeneratorTrainingArguments,
    LoraZoo,
    TaskVectorExtractor,
    TaskVectors,
)

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the packaged copy is its, and lies elsewhere on each machine
SIZES = {
    "transformer": {"hidden_size": 224, "intermediate_size": 448, "basis_size": 32},
    "conv1d": {},  # the paper's
}


@dataclass
class TrainOptions:
    output_dir: str = field(default="build/suite/generator", metadata={"help": "Where the generator goes."})
    zoo: str = field(default="build/suite/zoo", metadata={"help": "The zoo of collect.py."})
    vectors: str = field(default="build/suite/task_vectors.safetensors", metadata={"help": "Extracted if missing."})
    generator: str | None = field(default=None, metadata={"help": "One to go on with, instead of a new one."})
    architecture: str = field(default="transformer", metadata={"help": "Or conv1d, the paper's."})
    seed: int = field(default=0, metadata={"help": "Of initialization and training."})
    num_loras: int = field(default=48, metadata={"help": "LoRAs of seen tasks for reconstruction."})
    reconstruction_steps: int = field(default=300, metadata={"help": "Steps on the zoo's LoRAs."})
    behavioural_steps: int = field(default=1600, metadata={"help": "Steps through the base model; may be 0."})
    learning_rate: float = field(default=8e-3, metadata={"help": "Of behavioural training."})


def main() -> None:
    options, bench = options_of(TrainOptions), Bench()
    output_dir = Path(options.output_dir)
    base, tokenizer = bench.base, bench.tokenizer
    tasks = [bench.suite[name] for name in SPLITS["seen"] + SPLITS["samples"]]

    if Path(options.vectors).exists():
        vectors = TaskVectors.load(options.vectors)
    else:
        extractor = TaskVectorExtractor(SPEC)
        vectors = extractor.extract(base, tokenizer, tasks)
        vectors.save(options.vectors)

    behavioural_dataset = BehaviouralDataset(tasks, vectors, num_samples=8)
    common = {"seed": options.seed, "report_to": "none", "save_only_model": False}
    set_seed(options.seed)
    checkpoints = output_dir / "checkpoints"
    last = get_last_checkpoint(checkpoints) if checkpoints.exists() else None
    if start := last or options.generator:
        generator = LoraGeneratorModel.from_pretrained(start).to_float()
    else:
        zoo = LoraZoo(options.zoo).subset(with_lora("seen")[: options.num_loras])
        zoo.add_task_vectors(vectors)
        sizes = {"architecture": options.architecture, **SIZES[options.architecture]}
        generator = LoraGeneratorModel(LoraGeneratorConfig.from_zoo(zoo, **sizes))
        dataset = zoo.as_dataset(num_snapshots=1)
        generator.fit_normalizer(dataset, behavioural_dataset)
        trainer = LoraGeneratorTrainer(
            generator,
            LoraGeneratorTrainingArguments(
                output_dir=str(output_dir / "reconstruction"), max_steps=options.reconstruction_steps,
                learning_rate=2e-3, logging_steps=50, save_strategy="no", **common,
            ),
            train_dataset=dataset,
        )  # fmt: skip
        trainer.train()
        trainer.save_state()
        generator = generator.without_encoder()  # reconstruction is over, and the encoder is half the size

    if options.behavioural_steps:
        trainer = LoraGeneratorTrainer(
            generator,
            LoraGeneratorTrainingArguments(
                output_dir=str(checkpoints), max_steps=options.behavioural_steps, per_device_train_batch_size=16,
                learning_rate=options.learning_rate, logging_steps=25, save_steps=300,
                # Constant for the first half: a longer run can go on from a checkpoint before its end.
                lr_scheduler_type="warmup_stable_decay",
                lr_scheduler_kwargs={"num_decay_steps": options.behavioural_steps // 2}, **common,
            ),
            base_model=base,
            train_dataset=behavioural_dataset,
            data_collator=BehaviouralCollator(CompletionCollator(tokenizer, template=SPEC.template, row_length=48)),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last)
        trainer.save_state()
    generator.config.base_model_name_or_path = BASE_MODEL
    generator.save_pretrained(output_dir)
    generator.to_int8().save_pretrained(output_dir / "int8")


if __name__ == "__main__":
    main()
