"""Episodes of in-context meta-learning from prepared files: examples of a task, and other samples to answer."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

EDGES = (20, 28, 40, 56, 80, 120, 200)  # tokens of a sample; tasks of one length share a batch
TEMPLATES = ("plain", "chat")
INVERSE = "inverse"  # in the place of an answer: the prompt is the answer to the completion
LONGEST_INVERSE = 12  # tokens of a prompt that becomes an answer
KINDS = 4  # of an answer's positions: what predicts its first token, its second, its last, and any other


class Episodes:
    """Draws batches of tasks. Everything drawn follows from one seed.

    Args:
        folder: what prepare.py wrote.
        shares: the files to draw from, and how often each is drawn from.
    """

    def __init__(self, folder: str | Path, shares: dict[str, float]):
        self.tasks, weights, flats, starts = [], [], {}, {}
        for split, share in shares.items():
            with np.load(Path(folder) / f"{split}.npz") as arrays:
                shift = sum(len(at) for at in starts.get("plain_prompt", []))
                for name in (name for name in arrays if not name.endswith("_at")):
                    flats.setdefault(name, []).append(arrays[name])
                    starts.setdefault(name, []).append(np.diff(arrays[f"{name}_at"]))
            meta = json.loads((Path(folder) / f"{split}.json").read_text(encoding="utf8"))
            self.constants, self.remaps = meta["constants"], meta["remaps"]
            families = Counter(task["family"] for task in meta["tasks"])
            own = np.array([families[task["family"]] ** -0.5 for task in meta["tasks"]])
            weights.append(own / own.sum() * share)
            for task in meta["tasks"]:
                for part in ("train", "demo", "test"):
                    task[part] = [edge + shift for edge in task[part]]
            self.tasks += meta["tasks"]
        self.arrays = {}
        for name in flats:
            self.arrays[name] = np.concatenate(flats[name])
            self.arrays[f"{name}_at"] = np.concatenate([[0], np.cumsum(np.concatenate(starts[name]))])
        self.weights = np.concatenate(weights)
        self.lengths = np.diff(self.arrays["plain_prompt_at"]) + np.diff(self.arrays["plain_completion_at"])
        typical = [np.percentile(self.lengths[slice(*task["train"])], 90) for task in self.tasks]
        self.bucket = np.minimum(np.searchsorted(EDGES, typical), len(EDGES) - 1)
        self.label_sets = [list(task["labels"].values()) for task in self.tasks if len(task["labels"]) > 1]
        ends = self.arrays["plain_prompt"][self.arrays["plain_prompt_at"][1:] - 1]
        self.colon = np.bincount(ends).argmax()
        self.invertible = [self.can_be_inverted(task) for task in self.tasks]

    def ids(self, name: str, index: int) -> list[int]:
        at = self.arrays[f"{name}_at"]
        return self.arrays[name][at[index] : at[index + 1]].tolist()

    def can_be_inverted(self, task: dict) -> bool:
        """Return whether a task's answers are almost unique, and its prompts short and apart from the template."""
        first, last = task["train"]
        at = self.arrays["plain_prompt_at"][first : last + 1]
        apart = (
            self.arrays["plain_prompt"][at[1:] - 1] == self.colon
        ).all()  # and no token of a full stop and a colon
        if task["labels"] or not apart or np.diff(at).max() > LONGEST_INVERSE:
            return False
        answers = {tuple(self.ids("plain_completion", row)) for row in range(first, last)}
        return len(answers) >= 0.95 * (last - first)

    def sample(self, index: int, template: str, answer: list | str | None) -> tuple[list[int], list[int]]:
        """Return the prompt's ids, and those of the completion, or of another answer, with what ends it."""
        prompt, completion = (self.ids(f"{template}_{part}", index) for part in ("prompt", "completion"))
        if answer == INVERSE and template == "chat":
            prompt, completion = completion, prompt
        elif answer == INVERSE:
            dash, *prompt, colon = prompt
            *completion, end = completion
            prompt, completion = [dash, *completion, colon], [*prompt, end]
        elif answer:
            completion = answer[TEMPLATES.index(template)]
        if template == "chat":
            return [*prompt, *self.constants["chat_after"]], [*completion, *self.constants["chat_end"]]
        return prompt, completion

    def opening(self, template: str, description: int | None) -> list[int]:
        """Return what stands before the first demonstration."""
        if template == "plain":
            return [] if description is None else self.ids("plain_description", description)
        if description is None:
            return self.constants["chat_before"]
        text = self.ids("chat_description", description)
        return [*self.constants["chat_system"], *text, *self.constants["chat_user"]]

    def renaming(self, task: dict, rng: np.random.Generator) -> list[list]:
        """Return another word for each label of a task, drawn at random; at times one word for several labels."""
        count, choice = len(task["labels"]), rng.random()
        if choice < 0.2:
            words = list(task["labels"].values())
        elif choice < 0.6:
            words = self.remaps[rng.integers(len(self.remaps))]
        else:
            words = self.label_sets[rng.integers(len(self.label_sets))]
        groups = int(rng.integers(2, count)) if count > 2 and rng.random() < 0.3 else count
        if len(words) < groups:
            words = [word for words in self.remaps for word in words]
        drawn = rng.permutation(len(words))[:groups]
        return [words[drawn[place % groups]] for place in rng.permutation(count)]

    def rows(self, index: int, bucket: int, rng: np.random.Generator) -> np.ndarray:
        """Return the training samples of a task that fit a bucket, shuffled."""
        first, last = self.tasks[index]["train"]
        order = first + rng.permutation(last - first)
        return order[self.lengths[order] <= EDGES[bucket] * 1.25]

    def draw(
        self,
        rng: np.random.Generator,
        demos: int,
        queries: int,
        budget: int,
        template: str,
        remap: float,
        describe: float,
        mix: float,
        inverse: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Return one batch of tasks of one bucket.

        Args:
            rng: draws everything.
            demos, queries: examples that the reader sees, 0 of them for a description alone, and samples that it does
                not see, per task.
            budget: tokens of the batch, about.
            template: plain or chat.
            remap: how often the labels of a classification are replaced by other words.
            describe: how often the reader begins with a description of the task.
            mix: how often a task is made of several: the answer is a word for the task that a prompt comes from.
            inverse: how often prompt and answer change places, where answers are almost unique.
        """
        mass = np.bincount(self.bucket, self.weights, minlength=len(EDGES))
        bucket = int(rng.choice(len(EDGES), p=mass / mass.sum()))
        extra = 30 if template == "chat" else 0
        tokens = demos * (EDGES[bucket] + 8) + (demos + queries) * (EDGES[bucket] + extra)
        count = int(np.clip(budget // tokens, 2, 96))
        inside = np.flatnonzero(self.bucket == bucket)
        chance = self.weights[inside] / self.weights[inside].sum()
        episodes = []
        for index in rng.choice(inside, size=min(count, len(inside)), replace=False, p=chance):
            task, description = self.tasks[index], None
            if rng.random() < mix:
                sources = rng.choice(inside, size=min(int(rng.integers(2, 5)), len(inside)), replace=False, p=chance)
                words = self.remaps[rng.integers(len(self.remaps))]
                drawn, turns = rng.permutation(len(words)), rng.integers(len(sources), size=demos + queries)
                pools = [self.rows(source, bucket, rng) for source in sources]
                rows = [(int(pools[i][place % len(pools[i])]), words[drawn[i]]) for place, i in enumerate(turns)]
            else:
                order = self.rows(index, bucket, rng)
                order = order[np.arange(demos + queries) % len(order)].tolist()
                rows = [(row, None) for row in order]
                if task["labels"] and rng.random() < remap:
                    own = [tuple(ids[0]) for ids in task["labels"].values()]
                    words = dict(zip(own, self.renaming(task, rng), strict=True))
                    rows = [(row, words[tuple(self.ids("plain_completion", row))]) for row in order]
                elif self.invertible[index] and rng.random() < inverse:
                    rows = [(row, INVERSE) for row in order]
                elif rng.random() < describe:
                    description = 4 * index + int(rng.integers(4))
            episodes.append((rows, description))
        return self.collate(episodes, demos, template)

    def held_out(
        self, indices, demos: int, queries: int, template: str, describe: bool = False, wording: int = 0
    ) -> dict:
        """Return the first demonstrations and test samples of tasks, as they are scored.

        wording: of the description, 0 to 3.
        """
        episodes = []
        for index in indices:
            demo, test = self.tasks[index]["demo"][0], self.tasks[index]["test"][0]
            rows = [*range(demo, demo + demos), *range(test, test + queries)]
            episodes.append(([(row, None) for row in rows], 4 * index + wording if describe else None))
        return self.collate(episodes, demos, template)

    def collate(self, episodes, demos: int, template: str) -> dict[str, torch.Tensor]:
        rows_ids, rows_start, answers, reader_ids, reader_start = [], [], [], [], []
        before = self.constants["chat_before"] if template == "chat" else []
        for rows, description in episodes:
            context = list(self.opening(template, description))
            for place, (index, answer) in enumerate(rows):
                prompt, completion = self.sample(index, template, answer)
                rows_ids.append([*before, *prompt, *completion])
                rows_start.append(len(before) + len(prompt) - 1)
                answers.append(completion)
                if place < demos:
                    if place and template == "chat":
                        context += self.constants["chat_next"]
                    reader_start.append(len(context) + len(prompt) - 1)
                    context += prompt + completion
            reader_ids.append(context)
        tasks, longest = len(episodes), max(map(len, answers))
        positions = torch.arange(longest)
        lengths = torch.tensor([len(ids) for ids in answers]).view(tasks, -1, 1)
        mask = positions < lengths
        kind = torch.where(positions == 0, 0, torch.where(positions == 1, 1, 2)).expand(mask.shape)
        kind = torch.where(positions == lengths - 1, 3, kind)
        starts = torch.tensor(reader_start, dtype=torch.long)  # of no numbers, torch would make floats
        return {
            "reader_ids": padded(reader_ids, 16),
            "reader_at": (starts.view(tasks, demos, 1) + positions) * mask[:, :demos],
            "reader_end": torch.tensor([len(ids) for ids in reader_ids]),
            "rows_ids": padded(rows_ids, 8).view(tasks, lengths.shape[1], -1),
            "rows_at": (torch.tensor(rows_start).view(tasks, -1, 1) + positions) * mask,
            "targets": padded(answers, 1).view(tasks, lengths.shape[1], longest),
            "mask": mask,
            "kind": kind.contiguous(),
        }


def padded(rows: list[list[int]], multiple: int) -> torch.Tensor:
    """Return rows of ids of one length, filled up on the right with 0."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    filled = np.zeros((len(rows), length), dtype=np.int64)
    for row, ids in zip(filled, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(filled)


class Stream(IterableDataset):
    """Batches of a run, one after another; several workers take turns."""

    def __init__(self, episodes: Episodes, seed: int, budget: int, first_step: int = 0):
        self.episodes, self.seed, self.budget, self.first_step = episodes, seed, budget, first_step

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        step, stride = (self.first_step, 1) if worker is None else (self.first_step + worker.id, worker.num_workers)
        while True:
            rng = np.random.default_rng([self.seed, step])
            demos = int(rng.choice([0, 4, 8, 12, 16], p=[0.15, 0.1, 0.2, 0.4, 0.15]))
            shares = {"remap": 0.4, "describe": 0.4, "mix": 0.1, "inverse": 0.1}
            if not demos:  # the description is all that tells what the task is
                shares = {"remap": 0.0, "describe": 1.0, "mix": 0.0, "inverse": 0.0}
            template = "chat" if rng.random() < 0.3 else "plain"
            yield self.episodes.draw(rng, demos, 8, self.budget, template, **shares)
            step += stride
