"""Cards: what the reader of a repository with a generator, an adapter or a zoo is told.

The texts are the Jinja templates in `templates/`; a card is a `huggingface_hub.ModelCard`, with metadata that the Hub
understands.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .errors import PublishingError
from .provenance import LIBRARY, is_local
from .report import format_report, stored_bytes

TEMPLATES = Path(__file__).parent / "templates"
AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
KINDS = ("mean", "median", "min")  # of figures over tasks
FOLDER = "path/to/this/folder"  # stands in a card for the repository, while it is not in one
MOST_TASKS, MOST_EXAMPLES = 200, 32  # in a card
CLOSED_FORM = (
    "With examples, it writes in closed form: the base model, with a LoRA of its own, reads the examples, and a "
    "regression in each layer carries what it has read into weights. Without examples, a network writes: "
)
WITH_MEMORY = (
    "It writes in closed form: the base model, with a LoRA of its own, reads the examples, the description, or both, "
    "and a regression in each layer carries what it has read into weights."
)
NETWORK = (
    "a conditional VAE, trained over a zoo of adapters and conditioned on task vectors, after *In-Context Meta LoRA "
    "Generation* ([arXiv 2501.17635](https://arxiv.org/abs/2501.17635))."
)
NOT_EVALUATED = (
    "Not evaluated yet: `evaluate_generator` makes the table, `hf-icm-lora push --evaluation` puts it here."
)


def generator_card(
    generator,
    *,
    repo_id: str | None = None,
    report: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Write a generator's card from its configuration and, if there is one, its evaluation.

    Args:
        generator (`LoraGeneratorModel`): Its configuration says how it was trained.
        repo_id (`str`, *optional*): Where it will be.
        report (`Mapping`, *optional*): From [`evaluate_generator`].
        pictures (`Sequence[str]`, *optional*): Names of image files beside the card, shown under the table.
        license (`str`, *optional*): As the Hub names it, such as `"apache-2.0"`.
        tags (`Sequence[str]`, *optional*): More tags.

    Example:
        >>> generator_card(generator, report=report).save("generator/README.md")  # doctest: +SKIP
    """
    config, layout = generator.config, generator.layout
    size_of = stored_bytes(generator)
    spec, names = config.task_vector_spec or {}, config.training_tasks or []
    base = config.base_model_name_or_path or ""
    pooled = ", ".join(spec.get("pooling", ()))
    read = f"hidden states of layers {', '.join(map(str, spec.get('layers', ())))}, averaged over {pooled}"
    size = f"{config.num_task_vectors} rows of {config.task_vector_size}, {config.condition_size} directions of them"
    card = ModelCard.from_template(
        _card_data(ModelCardData, base, license, ["lora", "peft", "text-generation", *tags]),
        str(TEMPLATES / "generator.md"),
        title=_title(repo_id, f"Generator of LoRA adapters for {_name_of(base)}"),
        repo_id=repo_id or FOLDER,
        base_link=_link(base),
        base_model=_name_of(base),
        auto_class=_auto_class(config.lora_config),
        rank=layout.max_rank,
        target_modules=_target_modules(config.lora_config),
        method=_method(config),
        template=_form(config.template),
        other_templates=' `template=` chooses another one, such as `"chat"`.' if config.closed_form else "",
        fingerprint=(config.base_model_fingerprint or "")[:12],
        num_weights=f"{layout.num_weights:,}",
        architecture="the paper's convolutions" if config.architecture == "conv1d" else "a transformer over matrices",
        num_parameters=f"{sum(p.numel() for p in generator.parameters()) / 1e6:.1f} million",
        megabytes=f"{size_of['generator_bytes'] / 1e6:.1f}",
        stored=(", matrices in 8 bits" if config.weight_format == "int8" else "")
        + ("" if config.has_encoder else ", without its encoder"),
        break_even=size_of["break_even_tasks"],
        condition=f"{read}, of the frozen base model: {size}",
        num_tasks=len(names),
        tasks=_listed(names),
        training="\n\n".join(map(_told_run, config.training_runs or [])) or "There is no record of it.",
        evaluation=NOT_EVALUATED,
    )
    return add_evaluation(card, report, pictures) if report else card


def add_evaluation(card: ModelCard, report: Mapping[str, Any], pictures: Sequence[str] = ()) -> ModelCard:
    """Put an evaluation into a generator's card, as a table and as metadata, in place of an older one.

    Args:
        card (`ModelCard`): With the marks `<!-- evaluation -->` and `<!-- end evaluation -->`.
        report (`Mapping`): From [`evaluate_generator`].
        pictures (`Sequence[str]`, *optional*): Names of image files beside the card.

    Raises:
        PublishingError: if the card has no place for it.
    """
    before, start, rest = card.content.partition("<!-- evaluation -->")
    _, end, after = rest.partition("<!-- end evaluation -->")
    heading = re.search("^# (.+)$", card.text, re.MULTILINE)
    if not end or not heading:
        raise PublishingError(
            "The card has no place for an evaluation: expected a heading, <!-- evaluation --> and, after it, "
            "<!-- end evaluation -->."
        )
    shown = [format_report(report).rstrip(), *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures)]
    made = f"Made by `{report['command']}` on {report['date'][:10]}, seed {report['seed']}."
    renewed = ModelCard(before + start + "\n\n" + "\n\n".join([*shown, made]) + "\n\n" + end + after)
    data: Any = renewed.data
    data.model_name = data.get("model_name") or heading[1]
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            task_name="LoRA generation",
            dataset_type="tasks",
            dataset_name=f"{split} tasks ({len(rows['base']['tasks'])})",
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{name}, {row}",
            metric_value=round(summary[key], 4),
        )
        for split, rows in report["splits"].items()
        for row, summary in rows.items()
        for metric, name, key in _told_figures(row)
        if summary[key] is not None
    ]
    return renewed


def _told_figures(row: str) -> list[tuple[str, str, str]]:
    """Return which figures of a row are metadata: metric, name and key in the summary, right answers first."""
    figures = [("exact_match", "right answers", "exact_match")]
    if row in ("base", "task_lora"):  # of which 0 and 1 are recovered
        return figures
    if row != "generated":
        return [*figures, ("recovered_accuracy", "mean recovered accuracy", "mean_recovered_accuracy")]
    for metric in ("recovered_accuracy", "recovered_gain"):
        figures += [(metric, f"{kind} {metric.replace('_', ' ')}", f"{kind}_{metric}") for kind in KINDS]
    return figures


def addressed(card: ModelCard, repo_id: str, local_base: str, base: str) -> ModelCard:
    """Return the card of a local folder as that of a repository, so that its snippet runs for others.

    Args:
        card (`ModelCard`): Of a generator or an adapter.
        repo_id (`str`): Where it will be.
        local_base (`str`): The base model as the folder names it.
        base (`str`): The base model's id on the Hub.
    """
    content = card.content.replace(FOLDER, repo_id)
    if local_base != base:
        name = _name_of(local_base)
        content = content.replace(f'from_pretrained("{name}")', f'from_pretrained("{base}")')
        content = content.replace(f"`{name}`", _link(base))
    moved = ModelCard(content)
    data: Any = moved.data
    data.base_model, data.base_model_relation = base, "adapter"
    return moved


def adapter_card(
    lora_config: Mapping[str, Any],
    generated: Mapping[str, Mapping[str, Any]],
    repo_id: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Write the card of generated adapters.

    Args:
        lora_config (`Mapping`): Fields of `LoraConfig`.
        generated (`Mapping[str, Mapping]`): Adapter name -> what `model.lora_generation` says about it.
        repo_id (`str`, *optional*): Where it will be.
        tags (`Sequence[str]`, *optional*): More tags.
    """
    base, about = lora_config.get("base_model_name_or_path") or "", next(iter(generated.values()))
    source = about["generator"]
    if "id" in source:
        generator = f"[{source['id']}](https://huggingface.co/{source['id']}) (revision `{source['revision'][:12]}`)"
    elif "function" in source:
        generator = f"`hf_icm_lora.{source['function']}`, without a generator"
    else:
        generator = f"a generator of LoRAs (`{source['folder']}`)" if source["folder"] else "a generator of LoRAs"
    kept_apart = ("generator", "template", "description", "examples")
    rows = [
        (name, [(key.replace("_", " "), _told(value)) for key, value in facts.items() if key not in kept_apart])
        for name, facts in generated.items()
    ]
    data = _card_data(ModelCardData, base, None, ["lora", "generated", *tags])
    data.library_name = "peft"  # who loads it; the tag says who made it
    if lora_config.get("task_type") == "CAUSAL_LM":
        data.pipeline_tag = "text-generation"
    return ModelCard.from_template(
        data,
        str(TEMPLATES / "adapter.md"),
        title=_title(repo_id, f"A generated LoRA adapter for {_name_of(base)}"),
        repo_id=repo_id or FOLDER,
        base_link=_link(base),
        auto_class=_auto_class(lora_config).replace("AutoModel", "AutoPeftModel"),
        generator=generator,
        after=", then refined by gradient steps on the examples" if about.get("refine_steps") else "",
        adapters=[
            (
                f"Adapter `{name}`",
                table,
                _described(generated[name].get("description")),
                "\n".join(
                    json.dumps(e, ensure_ascii=False) for e in generated[name].get("examples", [])[:MOST_EXAMPLES]
                ),
                _form(generated[name]["template"]),
            )
            for name, table in rows
        ],
    )


def zoo_card(zoo, *, repo_id: str, base_model_name_or_path: str, license: str | None = None) -> DatasetCard:
    """Write the card of a zoo, whose table of tasks `datasets.load_dataset` reads.

    Args:
        zoo (`LoraZoo`): The zoo.
        repo_id (`str`): Where it will be.
        base_model_name_or_path (`str`): The base model's name there.
        license (`str`, *optional*): As the Hub names it.
    """
    base, lora_config = base_model_name_or_path, zoo.lora_config
    data = _card_data(DatasetCardData, base, license, ["lora", "peft"])
    data.configs = [{"config_name": "default", "data_files": "tasks.jsonl"}]
    return DatasetCard.from_template(
        data,
        str(TEMPLATES / "zoo.md"),
        title=_title(repo_id, f"Zoo of LoRA adapters for {_name_of(base)}"),
        repo_id=repo_id,
        base_link=_link(base),
        rank=zoo.layout.max_rank,
        target_modules=_target_modules(lora_config),
        template=_form(zoo.template),
        fingerprint=zoo.base_model_fingerprint[:12],
        layout=zoo.layout.fingerprint[:12],
        num_weights=f"{zoo.layout.num_weights:,}",
        gauge="and one A that all of them share" if zoo.layout.gauge == "frozen_a" else f"gauge `{zoo.layout.gauge}`",
        num_tasks=len(zoo),
        vectors=" and the vectors of their tasks" if zoo.has_task_vectors else "",
        rows=zoo.task_table(),
    )


def _card_data(kind: type, base: str, license: str | None, tags: Sequence[str]):
    data = kind(license=license, tags=[LIBRARY, *dict.fromkeys(tags)])
    data.library_name = LIBRARY
    if base and not is_local(base):
        data.base_model = base
        data.base_model_relation = "adapter"
    return data


def _title(repo_id: str | None, otherwise: str) -> str:
    return repo_id.split("/")[-1] if repo_id else otherwise


def _name_of(base: str) -> str:
    return (Path(base).name if is_local(base) else base) or "a base model"


def _link(base: str) -> str:
    return f"`{_name_of(base)}`" if not base or is_local(base) else f"[{base}](https://huggingface.co/{base})"


def _auto_class(lora_config: Mapping[str, Any] | None) -> str:
    return AUTO_CLASSES.get((lora_config or {}).get("task_type") or "", "AutoModel")


def _target_modules(lora_config: Mapping[str, Any]) -> str:
    modules = lora_config.get("target_modules") or []
    return f"`{modules}`" if isinstance(modules, str) else ", ".join(f"`{name}`" for name in modules)


def _form(template: str) -> str:
    """Say of what form prompts are: "of the form ..."."""
    if template == "chat":
        return "that the chat template of the base model's tokenizer gives"
    visible = template.replace("\n", "\\n")
    return f"`{visible}`"


def _listed(names: Sequence[str]) -> str:
    """Tasks are named `family/task`: a card groups them, and stays readable with a thousand."""
    families: dict[str, list[str]] = {}
    for name in names:
        family, _, rest = name.rpartition("/")
        families.setdefault(family, []).append(rest)
    if len(names) > MOST_TASKS:
        told = ", ".join(f"{family or 'others'} ({len(members)})" for family, members in families.items())
        return f"By family: {told}. `config.json` names all of them."
    return "\n".join(f"- {f'{family}: ' if family else ''}{', '.join(m)}" for family, m in families.items()) or "None."


def _told_run(run: Mapping[str, Any]) -> str:
    kept_apart = ("command", "versions", "machine")
    rows = [f"| {key.replace('_', ' ')} | {_told(value)} |" for key, value in run.items() if key not in kept_apart]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    return "\n".join([f"`{run['command']}`\n", "| | |", "| --- | --- |", *rows, f"| machine | {machine} |"]) + (
        f"\n| versions | {versions} |"
    )


def _method(config) -> str:
    if config.closed_form is None:
        return NETWORK[0].upper() + NETWORK[1:]
    return WITH_MEMORY if config.closed_form.get("num_memory") else CLOSED_FORM + NETWORK


def _described(description: str | Mapping[str, float] | None) -> str | None:
    if isinstance(description, Mapping):  # several, with weights
        return "; ".join(f"{weight:g} x {text}" for text, weight in description.items())
    return description


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
