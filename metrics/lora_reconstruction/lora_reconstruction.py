"""`evaluate.load` finds `LoraReconstruction` here. It is all in the package: `pip install hf_icm_lora`."""

from hf_icm_lora.metrics import LoraReconstruction

__all__ = ["LoraReconstruction"]
