"""Folders with any bytes in them: they load as what they say, or end in an error of the package.

    pip install atheris
    python fuzz/fuzz_folders.py build/fuzz -max_total_time=1800 -len_control=0 -max_len=256 \\
        -rss_limit_mb=2048 -timeout=60

The first number chooses between an adapter, a zoo and a generator; the rest is what replaces a part of one of its
files.
"""

import json
import logging
import shutil
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np
import peft  # noqa: F401  not instrumented: it and the rest below would make each input slower
import torch
import transformers  # noqa: F401
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

with atheris.instrument_imports(include=["hf_icm_lora"]):
    import hf_icm_lora
    from hf_icm_lora import adapter

DATA = Path(__file__).parent.parent / "tests" / "data"
ZOO, GENERATOR = sorted(DATA.glob("zoo-*"))[-1], sorted(DATA.glob("generator-*"))[-1]
ADAPTER = next(ZOO.glob("adapters/*/step-4"))
# transformers' own: a wrong field, and tensors of other shapes or a file it cannot use.
OF_TRANSFORMERS = (StrictDataclassError, OSError, RuntimeError)
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
counts = {"loaded": 0, "refused": 0}


def mutated(data: atheris.FuzzedDataProvider, original: bytes) -> bytes:
    """Replace a part of a file, a value in its JSON, or all of it."""
    kind = data.ConsumeIntInRange(0, 3)
    if kind == 0:
        return data.ConsumeBytes(4096)
    if kind == 1:
        start = data.ConsumeIntInRange(0, len(original))
        end = data.ConsumeIntInRange(start, min(len(original), start + 64))
        return original[:start] + data.ConsumeBytes(64) + original[end:]
    header = original[:8] if original[8:9] == b"{" else b""
    size = struct.unpack("<Q", header)[0] if header else len(original)
    content = json.loads(original[len(header) : len(header) + size])
    place = content
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.PickValueInList(list(keys))
        if not isinstance(place[key], (dict, list)) or data.ConsumeProbability() < 0.3:
            if kind == 2 or not isinstance(place, dict):
                place[key] = value(data)
            else:
                place[data.ConsumeUnicode(40)] = place.pop(key)
            break
        place = place[key]
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    return (struct.pack("<Q", len(text)) if header else b"") + text + original[len(header) + size :]


def value(data: atheris.FuzzedDataProvider):
    """Anything that JSON can hold."""
    choices = [
        None, True, False, 0, -1, 1.5, 2**31, 10**12, float("nan"), float("inf"), "", "..", "../../etc", "F8_E4M3",
        "(a+)+$", [], {}, [[]], {"a": 1}, ["q_proj"], "pissa", "os", 16, 65535,
    ]  # fmt: skip
    kind = data.ConsumeIntInRange(0, 3)
    if kind == 0:
        return data.ConsumeUnicode(64)
    if kind == 1:
        return data.ConsumeInt(8)
    return data.PickValueInList(choices)


def read_plainly(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by its format alone."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, tensors = json.loads(content[8 : 8 + size]), {}
    header.pop("__metadata__", None)
    for name, about in header.items():
        start, end = (8 + size + offset for offset in about["data_offsets"])
        if about["dtype"] in DTYPES:
            tensors[name] = np.frombuffer(content[start:end], DTYPES[about["dtype"]]).reshape(about["shape"])
    return tensors


def check_adapter(folder: Path) -> None:
    config, state_dict = hf_icm_lora.load_adapter(folder, max_bytes=2**26)
    for name, array in read_plainly(folder / adapter.WEIGHTS_FILE).items():
        assert np.array_equal(state_dict[name].numpy(), array), name
    stored = json.loads((folder / adapter.CONFIG_FILE).read_text(encoding="utf-8"))
    assert all(stored[field] == value for field, value in config.items())
    modules = hf_icm_lora.LoraLayout.from_state_dict(state_dict, config, "shared_init")
    modules.pack(state_dict, config)
    hf_icm_lora.plain_adapter(config, state_dict)


def check_zoo(folder: Path) -> None:
    zoo = hf_icm_lora.LoraZoo(folder)
    for name in zoo:
        zoo.lora_weights(name)
    banks = zoo.task_vectors.banks
    for name, array in read_plainly(folder / "task_vectors.safetensors").items():
        index, mode = name.split(".")
        assert np.array_equal(list(banks.values())[int(index)][mode].numpy(), array), name
    zoo.as_dataset()[0]


def check_generator(folder: Path) -> None:
    model = hf_icm_lora.LoraGeneratorModel.from_pretrained(folder)
    vector = torch.zeros(model.config.num_task_vectors, model.config.task_vector_size)
    if model.zoo_normalizer.is_fitted:
        model.generate_state_dict(vector)


def test_one_input(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    choice = data.ConsumeIntInRange(0, 7)  # a generator takes ten times as long
    source, check = (
        (ADAPTER, check_adapter) if choice > 3 else (ZOO, check_zoo) if choice else (GENERATOR, check_generator)
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "it")
        shutil.copytree(source, folder)
        path = data.PickValueInList(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.write_bytes(mutated(data, path.read_bytes()))
        try:
            check(folder)
            counts["loaded"] += 1
        except hf_icm_lora.IcmLoraError:
            counts["refused"] += 1
        except OF_TRANSFORMERS:
            if check is not check_generator:
                raise
            counts["refused"] += 1
    if sum(counts.values()) % 1000 == 0:
        print(counts, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
