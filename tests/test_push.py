"""To the Hub and back with the real clients, against the stand-in of `hub.py`: each `check_*` in one other process.

That process knows no other Hub, and a cache of its own; what it makes first is what a user has: a base model, a zoo
and a generator in local folders.
"""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from hub import Hub

EXAMPLES = [("ab", "bc"), ("cd", "de"), ("ef", "fg"), ("gh", "hi")]
DESCRIPTION = "Shift each letter by 1."
OWN_FILES = {".gitattributes", "README.md", "config.json", "model.safetensors"}


class OwnWorld:
    """A user's folder with copies of what `world` in conftest.py made, and a generator of two of its tasks."""

    def __init__(self, folder: Path, made: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_icm_lora import LoraZoo, load_tasks

        for name in ("base", "zoo"):
            shutil.copytree(made / name, folder / name)
        self.folder, self.made, self.tasks = folder, made, load_tasks(made / "tasks.jsonl")
        self.base = AutoModelForCausalLM.from_pretrained(folder / "base")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.zoo = LoraZoo(folder / "zoo")
        self.vectors = self.zoo.task_vectors
        torch.manual_seed(0)
        self.seen = self.zoo.subset(["shift/1", "shift/2"])
        self.generator = self.new_generator()
        self.generator.fit_normalizer(self.seen.as_dataset())
        self.generator.eval()

    def new_generator(self):
        from conftest import SIZES

        from hf_icm_lora import LoraGeneratorConfig, LoraGeneratorModel

        config = LoraGeneratorConfig.from_zoo(self.seen, base_model_name_or_path="user/base", **SIZES)
        return LoraGeneratorModel(config)


def files(hub, repo_id, revision="main", kind="model"):
    return hub.repos[kind, repo_id].files(revision)


def same_weights(one, other):
    import torch

    return one.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )


def one_line(error):
    return " ".join(str(error.value).split())


# A generator


def check_generator_there_and_back(hub, world):
    import copy

    from huggingface_hub import HfApi, ModelCard
    from transformers import AutoModel

    from hf_icm_lora import LoraGeneratorModel, generator_card

    hub.log.clear()
    url = world.generator.push_to_hub("user/generator", private=True, tags=["shifting"])
    assert url.startswith(f"{hub.url}/user/generator/commit/")
    assert len([path for method, path in hub.log if "/commit/" in path]) == 1
    assert set(files(hub, "user/generator")) == OWN_FILES
    assert hub.repos["model", "user/generator"].private
    assert same_weights(LoraGeneratorModel.from_pretrained("user/generator"), world.generator)
    auto = AutoModel.from_pretrained("user/generator", token="hf_user")
    assert isinstance(auto, LoraGeneratorModel)
    assert same_weights(auto, world.generator)
    with pytest.raises(OSError, match="not a valid model identifier|user/generator"):
        LoraGeneratorModel.from_pretrained("user/generator", token="hf_other", cache_dir=world.folder / "other")
    card = ModelCard.load("user/generator")
    assert card.data.library_name == "hf_icm_lora"
    assert card.data.base_model == "user/base"
    assert card.data.base_model_relation == "adapter"
    assert set(card.data.tags) >= {"hf_icm_lora", "lora", "shifting"}
    assert 'LoraGeneratorModel.from_pretrained("user/generator")' in card.text
    assert "shift: 1, 2" in card.text

    # Weights in other files than before leave none behind, which readers would prefer.
    bigger = copy.deepcopy(world.generator)
    bigger.zoo_normalizer.weight_mean += 1
    for size, more in (("20KB", True), ("50GB", False)):
        bigger.push_to_hub("user/generator", max_shard_size=size)
        names = set(files(hub, "user/generator"))
        assert ("model.safetensors.index.json" in names) is more
        assert ("model.safetensors" in names) is not more
        assert any("-of-" in name for name in names) is more
        assert same_weights(LoraGeneratorModel.from_pretrained("user/generator"), bigger)

    # A card that somebody has written stays; an own one is taken where there is none.
    card.text += "\nWritten by hand.\n"
    HfApi().upload_file(repo_id="user/generator", path_or_fileobj=card.content.encode(), path_in_repo="README.md")
    world.generator.push_to_hub("user/generator")
    assert b"Written by hand." in files(hub, "user/generator")["README.md"]
    mine = generator_card(world.generator, license="mit")
    world.generator.push_to_hub("user/mine", card=mine, commit_message="Mine")
    assert ModelCard.load("user/mine").data.license == "mit"


def check_revisions_and_pull_requests(hub, world):
    from huggingface_hub import HfApi

    from hf_icm_lora import LoraGeneratorModel

    main = world.new_generator()
    main.fit_normalizer(world.seen.as_dataset())
    main.push_to_hub("user/revisions")
    world.generator.push_to_hub("user/revisions", revision="dev")
    world.generator.push_to_hub("user/revisions", create_pr=True)
    assert same_weights(LoraGeneratorModel.from_pretrained("user/revisions"), main)
    for revision in ("dev", "refs/pr/1", HfApi().model_info("user/revisions", revision="dev").sha):
        assert same_weights(LoraGeneratorModel.from_pretrained("user/revisions", revision=revision), world.generator)
    with pytest.raises(OSError, match="none is not a valid git identifier"):
        LoraGeneratorModel.from_pretrained("user/revisions", revision="none")
    folder = world.folder / "below"
    world.generator.save_pretrained(folder / "a" / "b")
    HfApi().create_repo("below")
    HfApi().upload_folder(repo_id="user/below", folder_path=folder)
    below = LoraGeneratorModel.from_pretrained("user/below", subfolder="a/b")
    assert same_weights(below, world.generator)
    assert below.config._commit_hash == HfApi().model_info("user/below").sha
    state_dict = world.generator.state_dict()
    alone = LoraGeneratorModel.from_pretrained(None, config=world.generator.config, state_dict=state_dict)
    assert same_weights(alone, world.generator)
    world.generator.push_to_hub("user/revisions", token="hf_other", create_pr=True)  # as someone else
    assert "refs/pr/2" in hub.repos["model", "user/revisions"].branches


def check_save_pretrained_pushes(hub, world):
    folder = world.folder / "saved-and-pushed"
    world.generator.save_pretrained(folder, push_to_hub=True, repo_id="user/pushed", private=True)
    assert {path.name for path in folder.iterdir()} == OWN_FILES - {".gitattributes"}
    assert set(files(hub, "user/pushed")) == OWN_FILES
    (folder / "README.md").write_text("# By hand")
    world.generator.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# By hand"


def check_interrupted_uploads(hub, world):
    from huggingface_hub import HfApi

    hub.log.clear()
    world.generator.push_to_hub("user/whole")
    requests = len(hub.log)
    assert requests > 3
    for nth in range(1, requests + 1):
        hub.blobs.clear()
        hub.repos.pop(("model", "user/broken"), None)
        hub.fail(nth=nth, status=403)
        with pytest.raises(Exception, match="403|Error while uploading"):
            world.generator.push_to_hub("user/broken")
        if HfApi().repo_exists("user/broken"):
            assert set(files(hub, "user/broken")) == {".gitattributes"}
    world.generator.push_to_hub("user/broken")
    assert set(files(hub, "user/broken")) == OWN_FILES


# The trainer


def trainer(world, **more):
    from hf_icm_lora import LoraGeneratorTrainer, LoraGeneratorTrainingArguments

    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True}
    options |= {"output_dir": str(world.folder / "trainer"), "report_to": [], "disable_tqdm": True}
    args = LoraGeneratorTrainingArguments(**options | more)
    return LoraGeneratorTrainer(world.new_generator(), args, train_dataset=world.seen.as_dataset())


def check_trainer(hub, world):
    from huggingface_hub import ModelCard

    from hf_icm_lora import IcmLoraError, LoraGeneratorModel, PublishingError

    one = trainer(
        world, push_to_hub=True, hub_model_id="user/trained", hub_strategy="every_save", hub_always_push=True
    )
    hub.log.clear()
    one.train()
    repo = hub.repos["model", "user/trained"]
    assert len(repo.commits) == 3  # the empty one, and one for each checkpoint
    one.push_to_hub(license="apache-2.0", language="en")
    assert len(repo.commits) == 4
    for commit in list(repo.commits)[1:]:
        assert set(repo.files(commit)) == OWN_FILES  # no pickle, no optimizer, no logs
    assert not list(Path(one.args.output_dir).rglob("training_args.bin"))
    card = ModelCard.load("user/trained")
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert "| steps | 4 |" in card.text
    assert "| trained on | adapters |" in card.text
    loaded = LoraGeneratorModel.from_pretrained("user/trained")
    assert same_weights(loaded, one.model)
    assert loaded.config.training_runs[0]["steps"] == 4

    two = trainer(world, output_dir=str(world.folder / "later"))
    two.train()
    assert set(files(hub, two.push_to_hub(private=True).repo_url.repo_id)) == OWN_FILES
    future = two.push_to_hub(blocking=False, commit_message="Again")
    assert future.result().startswith(hub.url)

    with pytest.raises(IcmLoraError, match="pickles"):
        trainer(world, push_to_hub=True, hub_strategy="checkpoint")
    local = trainer(world)
    local.model.config.base_model_name_or_path = str(world.folder / "base")
    with pytest.raises(PublishingError, match="no id on the Hub"):
        local.push_to_hub()


# Adapters


def check_adapter_there_and_back(hub, world):
    import torch
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from hf_icm_lora import LoraGeneratorModel, push_adapter

    world.base.push_to_hub("user/base")
    world.tokenizer.push_to_hub("user/base")
    world.generator.push_to_hub("user/source")
    generator = LoraGeneratorModel.from_pretrained("user/source")
    base = AutoModelForCausalLM.from_pretrained("user/base")
    task = {"examples": EXAMPLES, "description": DESCRIPTION, "processing_class": world.tokenizer}
    model = generator.generate_adapter(base, **task, generator=torch.Generator().manual_seed(7))
    push_adapter(model, "user/adapter", private=True, tags=["shifting"])
    assert set(files(hub, "user/adapter")) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    loaded, ids = AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval(), torch.arange(2, 42).reshape(2, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, world.base(ids).logits)
    card = ModelCard.load("user/adapter")
    assert (card.data.library_name, card.data.base_model) == ("peft", "user/base")
    assert set(card.data.tags) == {"hf_icm_lora", "lora", "generated", "shifting"}
    revision = hub.repos["model", "user/source"].sha("main")[:12]
    about = model.lora_generation["default"]
    for told in (
        "user/source",
        revision,
        DESCRIPTION,
        '"prompt": "ab"',
        "| seed | 7 |",
        "- {prompt}: {completion}\\n",
    ):
        assert told in card.text, (told, card.text)
    assert f"| gain on examples | {about.gain_on_examples:.4g} |" in card.text
    assert "for PEFT" not in card.text  # that would be PEFT's own card

    model = generator.generate_adapter(model, **task, adapter_name="second")
    push_adapter(model, "user/secret", describe_task=False)
    card = ModelCard.load("user/secret").text
    assert card.index("Adapter `second`") < card.index("Adapter `default`")  # the active one first
    assert DESCRIPTION not in card
    assert '"prompt"' not in card


def check_from_an_empty_cache(hub, world):
    """A script that knows a repository's id alone."""
    world.base.push_to_hub("user/base")
    world.tokenizer.push_to_hub("user/base")
    world.generator.push_to_hub("user/known")
    script = f"""
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
import hf_icm_lora
generator = AutoModel.from_pretrained("user/known")
name = generator.config.base_model_name_or_path
base, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
model = generator.generate_adapter(base, processing_class=tokenizer, examples={EXAMPLES!r})
inputs = tokenizer("- ij:", return_tensors="pt", return_token_type_ids=False)
print(len(tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])))
"""
    environment = hub.environment(world.folder / "empty")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) > 5


# Zoos


def check_zoo_there_and_back(hub, world):
    import torch
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    from hf_icm_lora import LoraZoo, PublishingError, ZooError

    with pytest.raises(PublishingError, match="no id on the Hub: pass its id as base_model_name_or_path"):
        world.zoo.push_to_hub("user/zoo")
    hub.log.clear()
    world.zoo.push_to_hub("user/zoo", base_model_name_or_path="user/base", license="mit", private=True)
    assert len([path for method, path in hub.log if "/commit/" in path]) == 1
    zoo = LoraZoo.from_hub("user/zoo")
    assert list(zoo) == list(world.zoo)
    assert zoo.base_model_name_or_path == "user/base"
    for name in zoo:
        assert torch.equal(zoo.lora_weights(name), world.zoo.lora_weights(name))
        assert zoo.records[name]["snapshots"] == world.zoo.records[name]["snapshots"]
        for mode, bank in world.vectors.banks[name].items():
            assert torch.equal(zoo.task_vectors.banks[name][mode], bank)
    table = load_dataset("user/zoo", split="train")
    assert table["name"] == list(world.zoo)
    assert table["family"] == ["shift"] * 4
    card = DatasetCard.load("user/zoo")
    assert card.data.license == "mit"
    assert card.data.to_dict()["base_model"] == "user/base"
    assert "| shift/2 |" in card.text

    world.zoo.subset(["shift/3"]).push_to_hub("user/part", base_model_name_or_path="user/base")
    assert list(LoraZoo.from_hub("user/part", local_dir=world.folder / "part")) == ["shift/3"]
    with pytest.raises(ZooError, match="no complete task 'x'|no complete task"):
        LoraZoo.from_hub("user/part", ["shift/1"])


def check_a_streamed_zoo(hub, world):
    import shutil

    import torch

    from hf_icm_lora import ArgumentError, LoraZoo, ZooError
    from hf_icm_lora.training_data import LoraZooDataset

    world.zoo.push_to_hub("user/streamed", base_model_name_or_path="user/base")
    hub.log.clear()
    zoo = LoraZoo.from_hub("user/streamed", streaming=True)
    assert not list(zoo.path.rglob("adapter_model.safetensors"))
    assert not [path for _, path in hub.log if path.endswith("adapter_model.safetensors")]
    tempfile.tempdir = tempfile.mkdtemp(dir=world.folder)
    for name in zoo.subset(list(zoo)[::-1]):
        assert torch.equal(zoo.lora_weights(name), world.zoo.lora_weights(name))
    LoraZooDataset.most_in_memory, most = 0, LoraZooDataset.most_in_memory
    streamed, local = zoo.as_dataset(), world.zoo.as_dataset()
    LoraZooDataset.most_in_memory = most
    assert streamed.lora_weights is None
    assert all(torch.equal(*pair) for pair in zip(streamed.each_adapter(), local.each_adapter(), strict=True))
    assert not list(zoo.path.rglob("adapter_model.safetensors"))
    assert not list(Path(tempfile.gettempdir()).iterdir())
    tempfile.tempdir = None
    with pytest.raises(ZooError, match="a streamed zoo is for reading"):
        zoo.push_to_hub("user/again", base_model_name_or_path="user/base")
    with pytest.raises(ArgumentError, match="either streamed or downloaded"):
        LoraZoo.from_hub("user/streamed", streaming=True, local_dir=world.folder / "streamed")
    shutil.rmtree(zoo.path.parent.parent)
    assert list(LoraZoo.from_hub("user/streamed", ["shift/2"])) == ["shift/2"]
    assert len(list(zoo.path.rglob("adapter_model.safetensors"))) == len(zoo.records["shift/2"]["snapshots"])


def check_adapters_are_imported_by_id(hub, world):
    import torch

    from hf_icm_lora import LoraZoo, check_serving_compatibility, import_zoo
    from hf_icm_lora.adapter import adapter_folder
    from hf_icm_lora.cli import main

    base = world.base
    base.push_to_hub("user/base")
    for seed in (1, 2):
        task = {
            "examples": EXAMPLES,
            "processing_class": world.tokenizer,
            "generator": torch.Generator().manual_seed(seed),
        }
        model = world.generator.generate_adapter(base, **task)
        model.push_to_hub(f"user/imported-{seed}")
        base = model.unload()
    names = ["user/imported-1", "user/imported-2", "user/base", "user/nothing"]
    zoo, table = import_zoo(world.folder / "imported", names, base, base_model_name_or_path="user/base")
    assert list(zoo) == ["imported-1", "imported-2"]
    assert [row["status"] for row in table] == ["taken", "taken", "refused", "refused"]
    assert "adapter_config.json" in table[2]["reason"]
    assert "404" in table[3]["reason"]
    assert zoo.layout.gauge == "frozen_a"
    assert zoo.records["imported-1"]["source"] == "user/imported-1"
    _, table = import_zoo(world.folder / "other", names[:2], base, base_model_name_or_path="user/base", rank=2)
    other = LoraZoo(world.folder / "other")
    assert other.layout.gauge == "free"
    other.push_to_hub("user/other")
    pulled = LoraZoo.from_hub("user/other")
    assert torch.equal(pulled.lora_weights("imported-2"), other.lora_weights("imported-2"))
    assert check_serving_compatibility(adapter_folder("user/imported-1"), "vllm") == ([], [])
    out = str(world.folder / "exported")
    assert main(["export", "user/imported-1", "--out", out, "--rank", "1"]) == 0
    assert main(["check", out, "--for", "lorax"]) == 0


# The command line


def check_command_line(hub, world):
    from huggingface_hub import ModelCard

    from hf_icm_lora import LoraZoo, save_tasks
    from hf_icm_lora.cli import main

    world.base.push_to_hub("user/base")
    world.tokenizer.push_to_hub("user/base")
    folder, tasks = world.folder / "cli", world.folder / "tasks.jsonl"
    save_tasks(world.tasks, tasks)
    world.generator.config.base_model_name_or_path = str(world.folder / "base")  # as collected from a local folder
    world.generator.save_pretrained(folder / "generator")
    world.generator.config.base_model_name_or_path = "user/base"
    assert main(["push", str(world.zoo.path), "user/cli-zoo", "--base_model", "user/base"]) == 0
    push = ["push", str(folder / "generator"), "user/cli-generator", "--base_model", "user/base", "--license", "mit"]
    assert main(push) == 0
    card = ModelCard.load("user/cli-generator")
    assert (card.data.base_model, card.data.license) == ("user/base", "mit")
    assert card.text.count('from_pretrained("user/base")') == 2
    assert 'LoraGeneratorModel.from_pretrained("user/cli-generator")' in card.text
    assert "`base`" not in card.text
    evaluate = ["evaluate", "--generator", "user/cli-generator", "--zoo", "user/cli-zoo", "--tasks", str(tasks)]
    out = str(folder / "evaluation")
    assert main([*evaluate, "--num_examples", "4", "--dtype", "float32", "--output_dir", out]) == 0
    assert main([*push, "--evaluation", out]) == 0
    assert set(files(hub, "user/cli-generator")) == OWN_FILES | {"evaluation/evaluation.json"}
    card = ModelCard.load("user/cli-generator")
    assert "| wrong_condition |" in card.text
    results = {(result.dataset_name, result.metric_name): result.metric_value for result in card.data.eval_results}
    report = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    for split, number in (("seen", 2), ("unseen", 2)):
        for row in ("generated", "ridge", "few_shot_prompt"):
            name, share = f"{split} tasks ({number})", report["splits"][split][row]["exact_match"]
            assert results[name, f"right answers, {row}"] == pytest.approx(share, abs=1e-4), (split, row)
        gain = report["splits"][split]["generated"]["mean_recovered_gain"]
        assert results[name, "mean recovered gain, generated"] == pytest.approx(gain, abs=1e-4), split

    train = [
        "train",
        "--zoo",
        "user/cli-zoo",
        "--tasks",
        str(tasks),
        "--reconstruction_steps",
        "2",
        "--dtype",
        "float32",
    ]
    train += ["--hidden_size", "32", "--latent_size", "4", "--max_steps", "2", "--save_strategy", "no", "--report_to"]
    train += ["none", "--disable_tqdm", "True", "--use_cpu", "True", "--push_to_hub", "True"]
    assert main([*train, "--output_dir", str(folder / "cli-trained")]) == 0
    assert set(files(hub, "user/cli-trained")) == OWN_FILES
    assert b"through the base model" in files(hub, "user/cli-trained")["README.md"]
    assert ("model", "user/reconstruction") not in hub.repos

    adapter = folder / "adapter"
    generate = ["generate", "--generator", "user/cli-generator", "--description", DESCRIPTION, "--out", str(adapter)]
    assert main([*generate, "--dtype", "float32"]) == 0
    assert "user/cli-generator" in (adapter / "README.md").read_text()
    assert main(["push", str(adapter), "user/cli-adapter"]) == 0
    card = ModelCard.load("user/cli-adapter").text
    assert DESCRIPTION in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("user/cli-adapter")' in card
    assert list(LoraZoo.from_hub("user/cli-zoo")) == list(world.zoo)


def check_command_line_errors(hub, world):
    import contextlib
    import io

    from hf_icm_lora.cli import main

    world.generator.save_pretrained(world.folder / "plain")

    def error_of(*argv):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            assert main([str(argument) for argument in argv]) == 1
        line = stderr.getvalue().splitlines()[-1]
        assert line.startswith(f"hf-icm-lora {argv[0]}: ")
        return line

    generate = ("generate", "--description", "x", "--out", world.folder / "never", "--generator")
    assert "user/nothing" in error_of(*generate, "user/nothing")
    assert "no id on the Hub" in error_of("push", world.zoo.path, "user/local")
    assert "403" in error_of("push", world.folder / "plain", "other/generator")
    assert "is no folder of" in error_of("push", world.folder, "user/x")
    assert "no generator" in error_of("push", world.folder / "base", "user/x")
    assert "repo" in error_of("push", world.folder / "plain", "not an id").lower()
    assert "user/none" in error_of("evaluate", "--zoo", "user/none")
    assert ("model", "user/x") not in hub.repos


# What else a repository may be


def check_bad_repositories(hub, world):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from transformers import AutoModel

    from hf_icm_lora import IncompatibleAdapterError, LoraGeneratorModel, LoraZoo, ZooError

    api, load = HfApi(), LoraGeneratorModel.from_pretrained
    world.base.push_to_hub("user/llama")
    with pytest.raises(IncompatibleAdapterError, match="user/llama is no generator of adapters: .* found 'llama'"):
        load("user/llama")
    world.generator.push_to_hub("user/newer")
    config = json.loads(files(hub, "user/newer")["config.json"])
    for repo_id, changed in (("user/newer", config | {"format_version": 99}),):
        content = json.dumps(changed).encode()
        api.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo="config.json")
        for loader in (load, AutoModel.from_pretrained):
            with pytest.raises(IncompatibleAdapterError, match="found version 99.*upgrade hf_icm_lora"):
                loader(repo_id)

    world.generator.push_to_hub("user/missing")
    api.delete_file("model.safetensors", "user/missing")
    with pytest.raises(OSError, match="model.safetensors"):
        load("user/missing")
    world.generator.push_to_hub("user/gated")
    hub.repos["model", "user/gated"].gated = True
    with pytest.raises(OSError, match="gated|restricted"):
        load("user/gated", token="hf_other")
    with pytest.raises(OSError, match="user/absent"):
        load("user/absent")

    world.zoo.push_to_hub("user/gated-zoo", base_model_name_or_path="user/base")
    hub.repos["dataset", "user/gated-zoo"].gated = True
    with pytest.raises(GatedRepoError):
        LoraZoo.from_hub("user/gated-zoo", token="hf_other")
    with pytest.raises(RepositoryNotFoundError):
        LoraZoo.from_hub("user/absent")
    with pytest.raises(HFValidationError):
        LoraZoo.from_hub("not an id")
    api.create_repo("user/empty", repo_type="dataset")
    with pytest.raises(ZooError, match="'user/empty' is no zoo: expected zoo.json"):
        LoraZoo.from_hub("user/empty")
    with pytest.raises(Exception, match="401|403"):
        world.generator.push_to_hub("user/no-token", token=False)


def check_offline_with_a_cold_cache(hub, world):
    world.generator.push_to_hub("user/cold")
    arguments = ["generate", "--generator", "user/cold", "--description", "x", "--out", str(world.folder / "none")]
    script = f"""
from hf_icm_lora import LoraGeneratorModel
from hf_icm_lora.cli import main
try:
    LoraGeneratorModel.from_pretrained("user/cold")
except OSError as error:
    print(error)
raise SystemExit(main({arguments!r}))
"""
    environment = hub.environment(world.folder / "cold") | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "offline" in run.stdout
    assert run.stderr.splitlines()[-1].startswith("hf-icm-lora generate: ")


def check_no_code_from_a_repository_is_run(hub, world):
    from huggingface_hub import HfApi
    from transformers import AutoModel

    from hf_icm_lora import LoraGeneratorModel

    world.generator.push_to_hub("user/hostile")
    config = json.loads(files(hub, "user/hostile")["config.json"])
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    for name, content in (("config.json", json.dumps(config)), ("evil.py", "raise SystemExit('run')")):
        HfApi().upload_file(repo_id="user/hostile", path_or_fileobj=content.encode(), path_in_repo=name)
    hub.log.clear()
    for load in (LoraGeneratorModel.from_pretrained, AutoModel.from_pretrained):
        for trusted in ({}, {"trust_remote_code": True}):
            model = load("user/hostile", **trusted)
            assert type(model) is LoraGeneratorModel
            assert same_weights(model, world.generator)
    assert not [path for method, path in hub.log if "evil" in path]


def check_nothing_private_was_published(hub, world):
    """After all other checks: no path of this machine, no token and no pickle in any file of any repository."""
    assert len(hub.repos) > 10
    private = [f"{world.folder}", f"{world.made}", "hf_user", "hf_other", f"{Path.home()}/"]
    for (_, repo_id), repo in hub.repos.items():
        for revision in repo.commits:
            for name, content in repo.files(revision).items():
                assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), (repo_id, name)
                for secret in private:
                    assert secret.encode() not in content, (repo_id, name, secret)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


def main():
    """Run the checks and print the tracebacks of those that fail."""
    tracebacks = {}
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        environment = hub.environment(Path(folder, "home"))
        os.environ.clear()
        os.environ.update(environment)
        world = OwnWorld(Path(folder), Path(sys.argv[1]))
        gc.freeze()  # every Trainer collects garbage: not among what the libraries hold
        for name, check in CHECKS.items():
            if sys.argv[2:] and name not in sys.argv:  # to look at some of them alone
                continue
            try:
                check(hub, world)
            except BaseException:
                tracebacks[name] = traceback.format_exc()
    print(json.dumps(tracebacks))


@pytest.fixture(scope="module")
def tracebacks(world):
    run = subprocess.run([sys.executable, __file__, world.folder], stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_there_and_back(name, tracebacks):
    assert name not in tracebacks, re.sub(r"\n\n+", "\n", tracebacks[name])


if __name__ == "__main__":
    main()
