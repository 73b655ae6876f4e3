"""`evaluate.load` finds `BitsPerCharacter` here. It is all in the package: `pip install hf_icm_lora`."""

from hf_icm_lora.metrics import BitsPerCharacter

__all__ = ["BitsPerCharacter"]
