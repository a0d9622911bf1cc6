"""Weight-space methods through peft: one method, `kind: peft`, for all of its types."""

from iapt.methods.peft import method

__all__ = ["method"]
