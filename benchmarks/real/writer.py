"""The meta-learned closed form for SmolLM2, in as few operations as possible: what a GPU trains in minutes.

A reader, the frozen base with a trainable LoRA of its own, reads the examples of a task one after another. The base
reads each example alone. At every layer a weighted ridge regression writes the difference between the two into B of a
LoRA of `down_proj`, and the layers above go on with it. The rows that are scored pass through the same layers at the
same time. Everything is differentiable: the loss on those rows trains the reader, the keys A, and the regression's
weights and targets.

After the examples, or after a description alone, the reader reads a few memory tokens. Each is one more position of
the regression, with learned features: so a description without examples makes an adapter, too.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.real.episodes import KINDS

MAX_DEMOS = 32


def dequantise(name: str, raw: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a GGUF file in fp32: 4 bits with scale and offset, 8 bits with scale, or fp32 already."""
    if raw.dtype == torch.float32:
        return raw
    width = 34 if "embed_tokens" in name else 20  # bytes of a block of 32 numbers
    blocks = raw.view(raw.shape[0], -1, width)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if width == 34:
        return (blocks[..., 2:].contiguous().view(torch.int8) * scale).flatten(1)
    offset = blocks[..., 2:4].contiguous().view(torch.float16).float()
    numbers = torch.cat([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return (numbers * scale + offset).flatten(1)


class Base:
    """A frozen Llama: residual stream in fp32, products in `dtype`, projections of one input joined.

    Args:
        folder: what prepare.py wrote.
        compiled: whether chains of elementwise operations become one kernel each.
    """

    def __init__(self, folder: str | Path, device: str, dtype: torch.dtype, compiled: bool = False):
        shape = json.loads((Path(folder) / "base.json").read_text())
        self.heads, self.kv_heads, self.head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
        self.epsilon, self.theta = shape["epsilon"], shape["theta"]
        state = {}
        for part in sorted(Path(folder).glob("base.*.safetensors")):
            state |= {name: dequantise(name, raw.to(device)) for name, raw in load_file(part).items()}
        self.dtype = dtype
        self.embed = state["model.embed_tokens.weight"].to(dtype)
        self.norm = state["model.norm.weight"]
        self.size = self.embed.shape[1]
        count = sum("q_proj" in name for name in state)
        layers = [self._layer(state, f"model.layers.{index}.") for index in range(count)]
        self.stacked = {name: torch.stack([weights[name] for weights in layers]) for name in layers[0]}
        self.layers = unstacked(self.stacked)
        chains = (normed, rotated, gated)
        self.normed, self.rotated, self.gated = (torch.compile(f, dynamic=True) if compiled else f for f in chains)

    def _layer(self, state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        def joined(*names: str) -> torch.Tensor:
            return torch.cat([state[f"{prefix}{name}.weight"] for name in names]).to(self.dtype)

        return {
            "norm": state[f"{prefix}input_layernorm.weight"],
            "qkv": joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": joined("self_attn.o_proj"),
            "mlp_norm": state[f"{prefix}post_attention_layernorm.weight"],
            "gate_up": joined("mlp.gate_proj", "mlp.up_proj"),
            "down": joined("mlp.down_proj"),
        }

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.embed.device
        inverse = self.theta ** (-torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        angles = torch.arange(length, device=device)[:, None] * inverse.repeat(2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def layer(self, x: torch.Tensor, cos, sin, norm, qkv, o, mlp_norm, gate_up, down):
        """Return a layer's output (rows, length, size), fp32, and the inputs of its down projection."""
        rows, length, size = x.shape
        h = self.normed(x, norm, self.epsilon, self.dtype) @ qkv.T
        h = h.view(rows, length, -1, self.head_dim).transpose(1, 2)
        turned = self.rotated(h[:, : self.heads + self.kv_heads], cos, sin)
        q, k, v = turned[:, : self.heads], turned[:, self.heads :], h[:, self.heads + self.kv_heads :]
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + h.transpose(1, 2).reshape(rows, length, -1) @ o.T
        u = self.gated(self.normed(x, mlp_norm, self.epsilon, self.dtype) @ gate_up.T)
        return x + u @ down.T, u

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (self.size,), self.norm, self.epsilon).to(self.dtype) @ self.embed.T


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, epsilon).to(dtype)


def rotated(h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = h.chunk(2, -1)
    return h * cos + torch.cat([-right, left], -1) * sin


def gated(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def unstacked(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return one dictionary per layer. Unlike an index, `unbind` fills the gradient of a stack once, not per layer."""
    names, stacks = list(tensors), [tensor.unbind(0) for tensor in tensors.values()]
    return [dict(zip(names, own, strict=True)) for own in zip(*stacks, strict=True)]


class Writer(nn.Module):
    """All that is learned. Before training it is the plain closed form: the base itself reads, values are differences.

    Args:
        base: gives the shapes.
        rank: of the adapters that it writes.
        num_memory: tokens that the reader reads at its end.
        reader_rank: of the reader's LoRA, on all linear layers.
        state_rank, label_rank: of the maps from the reader's state, and from the next token, to values.
    """

    def __init__(
        self,
        base: Base,
        rank: int,
        num_memory: int = 0,
        reader_rank: int = 16,
        state_rank: int = 32,
        label_rank: int = 64,
    ):
        super().__init__()
        count, size = len(base.layers), base.size
        self.num_memory = num_memory
        self.keys = nn.Parameter(torch.zeros(count, rank, base.stacked["down"].shape[2]))  # A, shared by all tasks
        self.constant = nn.Parameter(torch.zeros(count, rank, size))  # the part of B that all tasks have
        self.log_penalty = nn.Parameter(torch.full((count,), math.log(0.3)))
        self.gain = nn.Parameter(torch.ones(count, size))
        self.log_kind = nn.Parameter(torch.zeros(count, KINDS))
        before = torch.arange(MAX_DEMOS)  # an example that was read after few others says little
        self.log_index = nn.Parameter(((before + 0.2) / (before + 2)).log())
        self.state_in = nn.Parameter(torch.randn(count, size, state_rank) / size**0.5)
        self.state_out = nn.Parameter(torch.zeros(count, state_rank, size))
        self.label_in = nn.Parameter(torch.randn(count, size, label_rank) / size**0.5)
        self.label_out = nn.Parameter(torch.zeros(count, label_rank, size))
        self.reader_a, self.reader_b = nn.ParameterDict(), nn.ParameterDict()
        for name in ("qkv", "o", "gate_up", "down"):
            _, outs, ins = base.stacked[name].shape
            self.reader_a[name] = nn.Parameter(torch.randn(count, reader_rank, ins) / ins**0.5)
            self.reader_b[name] = nn.Parameter(torch.zeros(count, outs, reader_rank))
        if num_memory:
            self.memory = nn.Parameter(torch.randn(num_memory, size) * float(base.embed.float().std()))
            self.memory_keys = nn.Parameter(torch.randn(count, num_memory, rank))
            self.memory_in = nn.Parameter(torch.randn(count, size, state_rank) / size**0.5)
            self.memory_out = nn.Parameter(torch.zeros(count, state_rank, size))
            self.log_memory = nn.Parameter(torch.full((count, num_memory), math.log(0.05)))
        self.register_buffer("key_scale", torch.ones(count))  # makes keys of unit length give features of about 1
        self.register_buffer("scale", torch.ones(count))  # of what a context changes in a layer's output

    def layers(self) -> list[dict[str, torch.Tensor]]:
        """Return what is learned for each layer, without the reader."""
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers())
        return unstacked({name: tensor for name, tensor in own.items() if name not in ("log_index", "memory")})

    def reader(self, base: Base) -> list[dict[str, torch.Tensor]]:
        """Return the weights of the base with the reader's LoRA in them, per layer."""
        merged = {}
        for name, weight in base.stacked.items():
            if name in self.reader_a:
                merged[name] = weight + (self.reader_b[name] @ self.reader_a[name]).to(base.dtype)
            else:
                merged[name] = weight
        return unstacked(merged)

    def groups(self, rate: float) -> list[dict]:
        """Return parameter groups: a step moves each kind by about the same share of its size."""
        reader = [*self.reader_a.values(), *self.reader_b.values()]
        maps = [self.constant, self.state_in, self.state_out, self.label_in, self.label_out]
        scalars = [self.log_penalty, self.gain, self.log_kind, self.log_index]
        if self.num_memory:
            maps += [self.memory, self.memory_in, self.memory_out]
            scalars += [self.memory_keys, self.log_memory]
        rates = ((reader, rate / 2), ([self.keys], rate / 5), (maps, rate), (scalars, rate * 5))
        return [{"params": params, "lr": lr} for params, lr in rates]

    def save(self, path: Path) -> None:
        """Write matrices in 8 bits with one scale per row, the rest in fp32."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            if tensor.dim() < 3:
                tensors[name] = tensor.float().contiguous()
                continue
            scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8).contiguous()
            tensors[f"{name}.row_scale"] = scale.float().contiguous()
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote. Memory tokens that a writer without them lacks stay as they are."""
        stored = load_file(path)
        scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".row_scale")}
        for name in [name for name, tensor in stored.items() if tensor.dtype == torch.int8]:
            stored[name] = stored[name] * scales[f"{name}.row_scale"]
        if "memory" not in stored:
            stored |= {name: tensor for name, tensor in self.state_dict().items() if "memory" in name}
        self.load_state_dict(stored)


def stored_sizes(path: Path) -> dict[str, int]:
    """Return the sizes of a stored writer that are not the same in all of them."""
    with safe_open(path, "pt") as file:
        num_memory = file.get_slice("memory").get_shape()[0] if "memory" in file.keys() else 0  # noqa: SIM118
        return {"rank": file.get_slice("keys").get_shape()[1], "num_memory": num_memory}


class Read(NamedTuple):
    """What the reader's states are after each layer, and its output after the last one.

    Args:
        answers: per layer, at the answers (tasks, demos, answer, size).
        memory: per layer, at the memory tokens (tasks, num_memory, size).
        last: (tasks, length, size).
    """

    answers: list[torch.Tensor]
    memory: list[torch.Tensor]
    last: torch.Tensor


class MetaClosedForm(nn.Module):
    """Reads examples, writes an adapter, and runs rows with it."""

    def __init__(self, base: Base, writer: Writer):
        super().__init__()
        self.base, self.writer = base, writer

    def read(self, batch: dict) -> Read:
        """Read the examples of tasks, or their descriptions alone, and then the memory tokens."""
        base, writer, at, end = self.base, self.writer, batch["reader_at"], batch["reader_end"]
        x = base.embed[F.pad(batch["reader_ids"], (0, writer.num_memory))].float()
        slots = end[:, None, None] + torch.arange(writer.num_memory, device=end.device)
        if writer.num_memory:
            places = slots.mT.expand(-1, -1, base.size)
            x = x.scatter(1, places, writer.memory.float().expand_as(places))
        cos, sin = base.rotary(x.shape[1])
        answers, memory = [], []
        for weights in writer.reader(base):
            x, _ = base.layer(x, cos, sin, **weights)
            answers.append(gather(x, at))
            memory.append(gather(x, slots)[:, 0])
        return Read(answers, memory, x)

    def last(self, ids: torch.Tensor, trained: bool) -> torch.Tensor:
        """Return the last layer's output for ids. trained: with the reader's LoRA."""
        x, (cos, sin) = self.base.embed[ids].float(), self.base.rotary(ids.shape[1])
        for weights in self.writer.reader(self.base) if trained else self.base.layers:
            x, _ = self.base.layer(x, cos, sin, **weights)
        return x

    def write(self, batch: dict, read: Read, collect=None):
        """Return the last layer's output at the answers of all rows, and B (tasks, rank, size) of every layer.

        collect: called per layer with the inputs of down_proj and what the context changes, at the examples' answers.
        """
        base, writer = self.base, self.writer
        tasks, rows, length = batch["rows_ids"].shape
        demos = read.answers[0].shape[1]
        mask, at = batch["mask"][:, :demos], batch["rows_at"]
        x, (cos, sin) = base.embed[batch["rows_ids"].view(-1, length)].float(), base.rotary(length)
        following = F.rms_norm(base.embed[batch["targets"][:, :demos]].float(), (base.size,))
        adapter = []
        for index, (weights, own) in enumerate(zip(base.layers, writer.layers(), strict=True)):
            y, u = base.layer(x, cos, sin, **weights)
            keys = own["keys"] * own["key_scale"]
            features = (u @ keys.to(base.dtype).T).view(tasks, rows, length, -1)
            constant = own["constant"] * own["scale"]
            y = y.view(tasks, rows, length, -1) + features @ constant.to(base.dtype)
            state = read.answers[index]
            change = state - gather(y, at[:, :demos])
            if collect is not None:
                collect(index, gather(u.view(tasks, rows, length, -1), at[:, :demos])[mask], change[mask])
            from_state = (F.rms_norm(state, (base.size,)) @ own["state_in"]) @ own["state_out"]
            from_label = (following @ own["label_in"]) @ own["label_out"]
            values = own["gain"] * change + own["scale"] * (from_state + from_label)
            weight = (own["log_kind"][batch["kind"][:, :demos]] + writer.log_index[:demos, None]).exp() * mask
            regressed = [gather(features, at[:, :demos]).float(), values, weight]
            regressed = [part.flatten(1, 2) for part in regressed]
            if writer.num_memory:
                of_memory = memory_positions(own, read.memory[index])
                regressed = [torch.cat(parts, 1) for parts in zip(regressed, of_memory, strict=True)]
            b = ridge(*regressed, own["log_penalty"].exp())
            adapter.append(b + constant)
            update = torch.bmm(features.flatten(1, 2), b.to(base.dtype))
            x = y.view(-1, length, base.size) + update.view(-1, length, base.size)
        return gather(x.view(tasks, rows, length, -1), at), adapter


def memory_positions(own: dict[str, torch.Tensor], states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return features, values and weights of memory tokens, as `ridge` takes them, from the reader's states there."""
    values = own["scale"] * (F.rms_norm(states, states.shape[-1:]) @ own["memory_in"] @ own["memory_out"])
    tasks = len(states)
    return own["memory_keys"].expand(tasks, -1, -1), values, own["log_memory"].exp().expand(tasks, -1)


class Solve(torch.autograd.Function):
    """X = M^-1 C for batches of small positive definite matrices, with the few kernels that its gradient needs."""

    @staticmethod
    def forward(ctx, matrix, right):
        factor, _ = torch.linalg.cholesky_ex(matrix)
        eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype).expand_as(matrix)
        lower = torch.linalg.solve_triangular(factor, eye, upper=False)
        inverse = lower.mT @ lower
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx, grad):
        inverse, solution = ctx.saved_tensors
        right = inverse @ grad
        return -right @ solution.mT, right


def ridge(a: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Return B (tasks, rank, size) of the weighted ridge regression of values on features.

    Args:
        a: features (tasks, positions, rank), fp32.
        values: what B should make of them (tasks, positions, size).
        weight: of each position (tasks, positions); 0 where there is none.
        penalty: in units of the features' mean square.
    """
    weighted = a * weight[..., None]
    strength = penalty * (weighted * a).sum((1, 2)) / weight.sum(1).clamp_min(1e-6) + 1e-6
    eye = torch.eye(a.shape[-1], device=a.device) * strength[:, None, None]
    return Solve.apply(weighted.mT @ a + eye, weighted.mT @ values)


def gather(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return x (tasks, length, size), or (tasks, rows, length, size), at positions `at` (tasks, rows, answer)."""
    if x.dim() == 3:
        found = x.gather(1, at.flatten(1)[..., None].expand(-1, -1, x.shape[-1]))
        return found.view(*at.shape, x.shape[-1])
    return x[:, : at.shape[1]].gather(2, at[..., None].expand(*at.shape, x.shape[-1]))


def nll(base: Base, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple:
    """Return each row's loss, the mean of its tokens, and whether greedy decoding would write the row to its end."""
    logits, wanted = base.logits(hidden[mask]), targets[mask]
    losses = F.cross_entropy(logits.float(), wanted, reduction="none")
    wrong = (logits.argmax(-1) != wanted).float()
    losses, wrong = (torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in (losses, wrong))
    return losses.sum(-1) / mask.sum(-1), wrong.sum(-1) == 0


@torch.no_grad()
def initialise(model: MetaClosedForm, batches: list[dict]) -> None:
    """Set the keys to the leading directions of down_proj's inputs at answers, and the scales by what is there."""
    writer = model.writer
    rank, width = writer.keys.shape[1:]
    moments = torch.zeros(len(model.base.layers), width, width, device=writer.keys.device)
    squares, count = torch.zeros_like(writer.scale), 0

    def collect(index, u, change):
        moments[index] += u.float().T @ u.float()
        squares[index] += change.square().mean(-1).sum()

    for batch in batches:
        model.write(batch, model.read(batch), collect)
        count += int(batch["mask"][:, : batch["reader_at"].shape[1]].sum())
    writer.scale.copy_((squares / count).sqrt())
    start = torch.randn(width, rank + 16, generator=torch.Generator().manual_seed(0)).to(moments.device)
    for index, moment in enumerate(moments):
        basis = start
        for _ in range(12):  # subspace iteration: all of the spectrum is not needed
            basis, _ = torch.linalg.qr(moment @ basis)
        values, vectors = torch.linalg.eigh(basis.T @ moment @ basis)
        writer.keys[index] = (basis @ vectors).flip(1)[:, :rank].T
        writer.key_scale[index] = (values.sum() / rank / count) ** -0.5
