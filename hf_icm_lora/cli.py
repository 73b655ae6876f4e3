"""The command line: `hf-icm-lora COMMAND`, with a command for each step from tasks to a served adapter.

Each command is one call of the API. With `--json` it prints its result as one JSON object, and nothing else to stdout.
"""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import HfArgumentParser

from .adapter import adapter_folder, load_adapter, save_adapter
from .base_model import find_base_model, load_base_model
from .collection import CollectionArguments, collect_zoo
from .completion import DEFAULT_TEMPLATE
from .configuration_lora_generator import LoraGeneratorConfig
from .errors import AlreadyExistsError, ArgumentError, IcmLoraError, IncompatibleAdapterError, TaskError
from .evaluation import MORE_ROWS, descriptions, evaluate_generator
from .files import as_plain
from .hub import CARD_FILE, push_files, require_hub_id, save_adapter_card
from .importing import import_zoo
from .lora_config import lora_config_to_dict
from .model_card import add_evaluation, addressed
from .modeling_lora_generator import LoraGeneratorModel
from .plots import require_matplotlib, write_plots
from .processes import leave_group, state
from .provenance import is_local, package_versions
from .report import REPORT_FILE, format_report, read_report
from .serving import check_serving_compatibility, export_gguf, plain_adapter
from .smollm2 import smollm2_generator_path
from .suite import built_in_tasks
from .task_vectors import TaskVectorExtractor, TaskVectorSpec
from .tasks import Task, load_tasks
from .trainer import RecipeArguments, train_generator
from .zoo import ZOO_FILE, LoraZoo

Result = tuple[str, dict]  # what is printed for people, and for programs


def _base_model(default: str | None, more: str = ""):
    text = f"Path or Hub id of the base model, or 'smollm2' for the packaged one. {more}".strip()
    return field(default=default, metadata={"help": text})


@dataclass
class BaseOptions:
    base_model: str | None = _base_model(None, "By default the zoo's.")
    dtype: Literal["fastest", "bfloat16", "float16", "float32"] = field(
        default="fastest", metadata={"help": "Of the base; by default bfloat16 if that is not slower than float32."}
    )


@dataclass
class TaskOptions:
    tasks: str = field(default="built-in", metadata={"help": "A JSON Lines file of tasks, or 'built-in'."})
    families: list[str] | None = field(default=None, metadata={"help": "Keep only tasks of these families."})
    names: list[str] | None = field(default=None, metadata={"help": "Keep only these tasks."})


@dataclass
class CollectOptions(BaseOptions, TaskOptions):
    base_model: str = _base_model("smollm2")
    r: int = field(default=8, metadata={"help": "Rank of the LoRAs."})
    lora_alpha: int = field(default=16, metadata={"help": "Scaling is lora_alpha / r."})
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class ZooOption:
    zoo: str = field(default="zoo", metadata={"help": "Directory of the zoo, or its Hub id where it is only read."})


@dataclass
class VectorsOptions(BaseOptions, TaskOptions, ZooOption):
    num_demonstrations: int = field(default=12, metadata={"help": "Most demonstrations in one prompt."})
    min_demonstrations: int = field(default=3, metadata={"help": "Fewest; the draws run evenly from most to fewest."})
    num_draws: int = field(default=3, metadata={"help": "Vectors per task and mode."})
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Hidden states, -1 is the last; by default three, from the middle to the last."},
    )
    pooling: list[str] = field(
        default_factory=lambda: ["prompts", "completions"],
        metadata={"help": "Tokens to average, one row each: last, prompts, completions, mean."},
    )


@dataclass
class TrainOptions(BaseOptions, TaskOptions, ZooOption):
    unseen: list[str] | None = field(default=None, metadata={"help": "Tasks to keep out of training, for evaluation."})
    architecture: str = field(default="transformer", metadata={"help": "transformer, or the paper's conv1d."})
    hidden_size: int = field(default=256)
    latent_size: int = field(default=32)
    prior: str = field(default="learned", metadata={"help": "learned, standard or none."})


@dataclass
class GenerateOptions(BaseOptions):
    base_model: str | None = _base_model(None, "By default the generator's.")
    generator: str = field(
        default="smollm2", metadata={"help": "Path or Hub id of the generator, or 'smollm2' for the shipped one."}
    )
    output_dir: str = field(
        default="adapter", metadata={"help": "Where the adapter goes; must not exist yet.", "aliases": ["--out"]}
    )
    examples: str | None = field(default=None, metadata={"help": "JSON Lines with prompt and completion."})
    description: str | None = field(default=None, metadata={"help": "The task in a sentence."})
    template: str | None = field(default=None, metadata={"help": "Of prompts, or chat; by default the generator's."})
    fit_scale: bool = field(default=True, metadata={"help": "Whether to weaken it to what suits the examples."})
    refine_steps: int = field(default=0, metadata={"help": "Gradient steps on the examples after that."})
    on_unfamiliar: Literal["generate", "base", "raise"] = field(
        default="generate", metadata={"help": "What to do where the adapter does harm on its own examples."}
    )


_FURTHER_ROWS = " ".join(
    ["Further rows to score.", *(f"{row}: {text}" for row, text in descriptions(MORE_ROWS).items())]
)


@dataclass
class EvaluateOptions(BaseOptions, TaskOptions, ZooOption):
    generator: str = field(default="generator", metadata={"help": "Path or Hub id, or 'smollm2' for the shipped one."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where evaluation.json and .md go."})
    num_examples: int = field(default=12, metadata={"help": "Examples per task that everyone is given."})
    more_rows: list[str] = field(default_factory=list, metadata={"help": _FURTHER_ROWS})
    refine_steps: int = field(default=20, metadata={"help": "Of the rows refined and fine_tuned."})
    template: str | None = field(default=None, metadata={"help": "To score all rows in; by default the zoo's."})
    by_family: bool = field(default=False, metadata={"help": "Means over families of equal weight, not over tasks."})
    plots: bool = field(default=False, metadata={"help": "Draw pictures (PNG) into output_dir; needs matplotlib."})


@dataclass
class PushOptions:
    path: str = field(metadata={"help": "Folder of a generator, an adapter or a zoo."})
    repo_id: str = field(metadata={"help": "Where it goes: user/name."})
    private: bool | None = field(default=None, metadata={"help": "Make the repository private, if it is new."})
    revision: str | None = field(default=None, metadata={"help": "Branch; it is made if there is none."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    commit_message: str | None = field(default=None)
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the base model, if it was a local one."})
    license: str | None = field(default=None, metadata={"help": "For the card, such as apache-2.0."})
    evaluation: str | None = field(
        default=None, metadata={"help": "Directory that evaluate wrote: its table and pictures go into the card."}
    )


@dataclass
class ImportOptions(ZooOption, BaseOptions):
    adapters: list[str] = field(
        default_factory=list, metadata={"help": "PEFT folders or Hub ids; their names are the tasks'."}
    )
    base_model: str = _base_model("smollm2")
    rank: int | None = field(default=None, metadata={"help": "Rank of the zoo; by default the largest of them."})
    template: str = field(default=DEFAULT_TEMPLATE, metadata={"help": "Text with {prompt} and {completion}; or chat."})


@dataclass
class CheckOptions:
    adapter: str = field(metadata={"help": "A PEFT folder, or its Hub id."})
    server: Literal["vllm", "sglang", "lorax", "llama.cpp"] = field(
        metadata={"help": "What is to serve it.", "aliases": ["--for"]}
    )


@dataclass
class ExportOptions:
    adapter: str = field(metadata={"help": "A PEFT folder with any plain LoRA, or its Hub id."})
    output: str = field(metadata={"help": "Folder, or file, that does not exist yet.", "aliases": ["--out"]})
    format: Literal["peft", "gguf"] = field(default="peft", metadata={"help": "gguf is what llama.cpp reads."})
    rank: int | None = field(default=None, metadata={"help": "A rank for all modules; by default the largest."})
    dtype: Literal["float32", "float16", "bfloat16"] = field(default="float32")
    base_model: str | None = _base_model(None, "Its config.json is read for GGUF; by default the adapter's.")


@dataclass
class CompletionOptions:
    shell: Literal["bash", "zsh"] = field(metadata={"help": "The shell to complete in."})


def collect(options: CollectOptions, args: CollectionArguments) -> Result:
    """Fine-tune one LoRA per task into a zoo."""
    base, tokenizer = load_base_model(options.base_model, options.dtype)
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    lora_config = LoraConfig(
        r=options.r, lora_alpha=options.lora_alpha, target_modules=options.target_modules, task_type=task_type
    )
    zoo = collect_zoo(str(args.output_dir), base, tokenizer, select_tasks(options), lora_config, args)
    return str(zoo), {"zoo": str(zoo.path), "tasks": list(zoo), "num_weights": zoo.layout.num_weights}


def vectors(options: VectorsOptions) -> Result:
    """Extract the task vectors of all tasks of a zoo."""
    zoo = LoraZoo(options.zoo)
    tasks = [task for task in select_tasks(options) if task.name in zoo]
    if missing := sorted(set(zoo) - {task.name for task in tasks}):
        raise TaskError(
            f"--tasks, --families and --names leave {len(tasks)} of the zoo's {len(zoo)} tasks in {options.tasks!r}, "
            f"but a generator needs the vectors of all: there is no {', '.join(missing[:3])}."
        )
    base, tokenizer = load_base_model(options.base_model or zoo.base_model_name_or_path, options.dtype)
    chosen = {"layers": tuple(options.layers)} if options.layers else {}
    spec = TaskVectorSpec.for_base_model(
        base,
        template=zoo.template,
        num_demonstrations=options.num_demonstrations,
        min_demonstrations=options.min_demonstrations,
        num_draws=options.num_draws,
        pooling=tuple(options.pooling),
        **chosen,
    )
    extracted = TaskVectorExtractor(spec).extract(base, tokenizer, tasks)
    if state().is_main_process:
        zoo.add_task_vectors(extracted)
    told = {"zoo": str(zoo.path), "tasks": [task.name for task in tasks], "spec": spec.to_dict()}
    return f"{zoo}: task vectors of {len(tasks)} tasks", told


def train(options: TrainOptions, args: RecipeArguments) -> Result:
    """Train a generator: on the LoRAs of a zoo, then through the base model on the samples of all tasks."""
    zoo, unseen = open_zoo(options.zoo), set(options.unseen or ())
    tasks = select_tasks(options)
    if unknown := sorted(unseen - {task.name for task in tasks}):
        raise TaskError(f"--unseen: {unknown[:3]} not found among the {len(tasks)} tasks of {options.tasks!r}.")
    base, tokenizer = load_base_model(options.base_model or zoo.base_model_name_or_path, options.dtype)
    generator = train_generator(
        zoo,
        base,
        tokenizer,
        [task for task in tasks if task.name not in unseen],
        args,
        eval_tasks=[task for task in tasks if task.name in unseen],
        architecture=options.architecture,
        hidden_size=options.hidden_size,
        latent_size=options.latent_size,
        prior=options.prior,
    )
    runs = generator.config.training_runs or []
    told = [f"loss of unseen tasks: {run['unseen_loss']:.4f} nats per token" for run in runs if "unseen_loss" in run]
    return "\n".join([str(args.output_dir), *told]), {"generator": args.output_dir, "training_runs": runs}


def generate(options: GenerateOptions) -> Result:
    """Write the adapter of a task as a PEFT folder."""
    if Path(options.output_dir).exists():  # before the work, not after it
        raise AlreadyExistsError(f"{options.output_dir} exists already: choose another --output_dir.")
    generator = load_generator(options.generator)
    known = "smollm2" if options.generator == "smollm2" else generator.config.base_model_name_or_path
    name = options.base_model or known
    if not name:
        raise ArgumentError(f"{options.generator} names no base model: pass --base_model.")
    base, tokenizer = load_base_model(name, options.dtype)
    examples = None
    if options.examples:
        lines = Path(options.examples).read_text(encoding="utf-8").split("\n")
        examples = [json.loads(line) for line in lines if line.strip()]
    model = generator.generate_adapter(
        base,
        processing_class=tokenizer,
        examples=examples,
        description=options.description,
        template=options.template,
        fit_scale=options.fit_scale,
        refine_steps=options.refine_steps,
        on_unfamiliar=options.on_unfamiliar,
    )
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    known_as = generator.config.base_model_name_or_path if name == known else name  # and not a path of this machine
    lora_config = lora_config_to_dict(cast(LoraConfig, model.peft_config["default"]))
    lora_config["base_model_name_or_path"] = known_as
    save_adapter(options.output_dir, lora_config, state_dict)
    save_adapter_card(model, options.output_dir)
    return options.output_dir, {"adapter": options.output_dir, **model.lora_generation["default"].to_dict()}


def evaluate(options: EvaluateOptions) -> Result:
    """Score a generator and all plain rivals."""
    if options.plots:
        require_matplotlib()  # before the work, not after it
    zoo, generator = open_zoo(options.zoo), load_generator(options.generator)
    base, tokenizer = load_base_model(options.base_model or zoo.base_model_name_or_path, options.dtype)
    tasks = [task for task in select_tasks(options) if task.name in zoo]
    report = evaluate_generator(
        generator,
        base,
        tokenizer,
        zoo,
        tasks,
        num_examples=options.num_examples,
        more_rows=options.more_rows,
        refine_steps=options.refine_steps,
        template=options.template,
        by_family=options.by_family,
        output_dir=options.output_dir,
    )
    pictures = []
    if options.plots and state().is_main_process:
        pictures = write_plots(options.output_dir, generator, zoo, report, options.generator)
    told = report | {"pictures": [str(picture) for picture in pictures]}
    return "\n".join([format_report(report), *map(str, pictures)]), told


def push(options: PushOptions) -> Result:
    """Upload the folder of a generator, an adapter or a zoo to the Hub, in one commit."""
    path = Path(options.path)
    target: dict[str, Any] = {"private": options.private, "revision": options.revision}
    target |= {"create_pr": options.create_pr, "commit_message": options.commit_message}
    if options.evaluation and not (path / "config.json").exists():
        raise ArgumentError(f"--evaluation goes with a generator; {path} holds none.")
    if (path / ZOO_FILE).exists():
        target |= {"base_model_name_or_path": options.base_model, "license": options.license}
        url: str = LoraZoo(path).push_to_hub(options.repo_id, **target)
    elif (path / "adapter_config.json").exists():
        url = push_folder(path, "adapter_config.json", options, target)
    elif (path / "config.json").exists():
        LoraGeneratorConfig.from_pretrained(path)  # or IncompatibleAdapterError
        url = push_folder(path, "config.json", options, target)
    else:
        raise FileNotFoundError(f"{path} is no folder of a generator, an adapter or a zoo.")
    return url, {"url": url, "repo_id": options.repo_id}


def push_folder(path: Path, config_file: str, options: PushOptions, target: dict) -> str:
    """Upload a generator or an adapter as it lies there: its configuration, its weights and its card."""
    config = json.loads((path / config_file).read_text(encoding="utf-8"))
    local_base = config.get("base_model_name_or_path") or ""
    base = options.base_model or local_base
    require_hub_id(base, "pass --base_model")
    config["base_model_name_or_path"] = base
    files: dict[str, str | Path | bytes] = {file.name: file for file in path.glob("*.safetensors*")}
    files[config_file] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    if (path / CARD_FILE).exists():
        card = addressed(ModelCard.load(path / CARD_FILE), options.repo_id, local_base, base)
        if options.evaluation:
            report = read_report(Path(options.evaluation) / REPORT_FILE)
            pictures = sorted(Path(options.evaluation).glob("*.png"))
            card = add_evaluation(card, report, [f"evaluation/{picture.name}" for picture in pictures])
            files |= {f"evaluation/{picture.name}": picture for picture in pictures}
            files[f"evaluation/{REPORT_FILE}"] = Path(options.evaluation) / REPORT_FILE
        if options.license:
            card.data["license"] = options.license
        files[CARD_FILE] = card.content.encode()
    elif options.evaluation:
        raise FileNotFoundError(f"{path} has no {CARD_FILE} to put the evaluation into: save the generator again.")
    return push_files(files, options.repo_id, keep_card=not options.evaluation, **target)


def import_adapters(options: ImportOptions) -> Result:
    """Make a zoo of LoRAs that were trained elsewhere."""
    base, _ = load_base_model(options.base_model, options.dtype)
    zoo, rows = import_zoo(options.zoo, options.adapters, base, rank=options.rank, template=options.template)
    lines = [f"{row['status']}\t{row['source']}\t{row['reason'] or '; '.join(row['changes'])}" for row in rows]
    told = {"zoo": str(zoo.path), "gauge": zoo.layout.gauge, "rank": zoo.layout.max_rank, "adapters": rows}
    return "\n".join([*lines, f"{zoo}, gauge {zoo.layout.gauge}"]), told


def check(options: CheckOptions) -> Result:
    """Say what a server would make of an adapter; exit code 1 if it has a problem with it."""
    problems, notes = check_serving_compatibility(adapter_folder(options.adapter), options.server)
    if problems:
        raise IncompatibleAdapterError(f"{options.server}: {' '.join(problems)}")
    lines = [f"{options.server} takes {options.adapter}{'.' if notes else ' as it is.'}", *notes]
    return "\n".join(lines), {"adapter": options.adapter, "server": options.server, "notes": notes}


def export(options: ExportOptions) -> Result:
    """Write an adapter in the form that every server reads, or as GGUF for llama.cpp."""
    if Path(options.output).exists():
        raise AlreadyExistsError(f"{options.output} exists already: choose another --output.")
    dtype, (lora_config, state_dict) = getattr(torch, options.dtype), load_adapter(adapter_folder(options.adapter))
    config, plain, lost = plain_adapter(lora_config, state_dict, rank=options.rank, dtype=dtype)
    if options.format == "gguf":
        name = options.base_model or config.get("base_model_name_or_path")
        if not name:
            raise IncompatibleAdapterError(f"{options.adapter} names no base model: pass --base_model.")
        export_gguf(options.output, config, plain, find_base_model(name)[1], dtype=dtype)
    else:
        save_adapter(options.output, config, plain)
    told = {"output": options.output, "rank": config["r"], "lost_energy": lost}
    return options.output + (f" ({lost:.2%} of the energy lost)" if lost else ""), told


def completion(options: CompletionOptions) -> Result:
    """Print a script that completes commands and options: `source <(hf-icm-lora completion bash)`."""
    script = completion_script(options.shell)
    return script, {"script": script}


def completion_script(shell: str) -> str:
    """Return a completion script for bash or zsh, which reads bash's."""
    words = {}
    for name, (_, options) in COMMANDS.items():
        actions = HfArgumentParser(options)._actions
        words[name] = " ".join(sorted({option for action in actions for option in action.option_strings}))
    cases = "\n".join(f"        {name}) words='{options}' ;;" for name, options in words.items())
    return f"""{"autoload -U +X bashcompinit && bashcompinit" if shell == "zsh" else ""}
_hf_icm_lora() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words='{" ".join(words)}' ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _hf_icm_lora hf-icm-lora""".lstrip()


def env() -> Result:
    """Print what a bug report needs."""
    found: dict[str, Any] = {"platform": platform.platform(), **package_versions()}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    found |= {"device": str(device), "threads": torch.get_num_threads()}
    return "\n".join(f"- {name}: {value}" for name, value in found.items()), found


def open_zoo(name: str) -> LoraZoo:
    """Open a zoo in a folder or, if there is none, from the Hub."""
    looks_like_id = not is_local(name) and "/" in name
    return LoraZoo.from_hub(name) if looks_like_id else LoraZoo(name)


def load_generator(name: str) -> LoraGeneratorModel:
    """Load a generator from a folder or the Hub, or the shipped one."""
    return LoraGeneratorModel.from_pretrained(smollm2_generator_path() if name == "smollm2" else name)


def select_tasks(options: TaskOptions) -> list[Task]:
    """Load the tasks that the options name."""
    tasks = built_in_tasks() if options.tasks == "built-in" else load_tasks(options.tasks)
    known: dict[str, set] = {"families": {task.family for task in tasks}, "names": {task.name for task in tasks}}
    for option, values in known.items():
        if unknown := sorted(set(getattr(options, option) or ()) - values):
            raise TaskError(f"--{option}: {unknown[:3]} not found in {options.tasks!r}.")
    tasks = [task for task in tasks if options.families is None or task.family in options.families]
    return [task for task in tasks if options.names is None or task.name in options.names]


COMMANDS: dict[str, tuple[Callable[..., Result], tuple[Any, ...]]] = {  # and the dataclasses of its options
    "collect": (collect, (CollectOptions, CollectionArguments)),
    "vectors": (vectors, (VectorsOptions,)),
    "train": (train, (TrainOptions, RecipeArguments)),
    "generate": (generate, (GenerateOptions,)),
    "evaluate": (evaluate, (EvaluateOptions,)),
    "push": (push, (PushOptions,)),
    "import": (import_adapters, (ImportOptions,)),
    "check": (check, (CheckOptions,)),
    "export": (export, (ExportOptions,)),
    "env": (env, ()),
    "completion": (completion, (CompletionOptions,)),
}
POSITIONAL = {"push": ("path", "repo_id"), "check": ("adapter",), "export": ("adapter",), "completion": ("shell",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 1 for an error in what it was given, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback, as_json = "--traceback" in argv, "--json" in argv
    argv = [argument for argument in argv if argument not in ("--traceback", "--json")]
    if not argv or argv[0] not in COMMANDS:
        parser = argparse.ArgumentParser("hf-icm-lora", description=__doc__)
        parser.add_argument("command", choices=COMMANDS, help="one of them; `hf-icm-lora COMMAND --help` says more")
        parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        parser.parse_args(argv[:1])  # exits
    function, dataclasses = COMMANDS[argv[0]]
    parser = HfArgumentParser(dataclasses, prog=f"hf-icm-lora {argv[0]}", description=function.__doc__)
    try:
        if argv[0] == "collect":
            leave_group()  # before its arguments take a device: processes that were launched together share the tasks
        *options, unknown = parser.parse_args_into_dataclasses(named_arguments(argv), True, look_for_args_file=False)
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")  # exits
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # the Trainer prints its logs
            text, result = function(*options)
        if state().is_main_process:
            told = json.dumps(as_plain(result), ensure_ascii=False, allow_nan=False) if as_json else text
            print(f"{told}\n", end="")  # in one piece: several collectors may write into one pipe
    except (IcmLoraError, OSError, ImportError, ValueError, StrictDataclassError, SafetensorError) as error:
        if show_traceback:
            raise
        print(f"hf-icm-lora {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def named_arguments(argv: Sequence[str]) -> list[str]:
    """Return a command's arguments; the first ones of some may stand without their names: `push PATH REPO_ID`."""
    names, rest = POSITIONAL.get(argv[0], ()), list(argv[1:])
    named = []
    for name in names:
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{name}", rest.pop(0)]
    return named + rest


if __name__ == "__main__":  # for `accelerate launch -m hf_icm_lora.cli collect ...`
    sys.exit(main())
