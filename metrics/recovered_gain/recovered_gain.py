"""`evaluate.load` finds `RecoveredGain` here. It is all in the package: `pip install hf_icm_lora`."""

from hf_icm_lora.metrics import RecoveredGain

__all__ = ["RecoveredGain"]
