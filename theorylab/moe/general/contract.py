"""What gates and experts share: sizes and precision, read from their arrays."""

from __future__ import annotations

from typing import Any

from theorylab.core.module import Module


class Part(Module):
    """A gate, or experts: arrays with one row per expert."""

    @property
    def experts(self) -> int:
        """Number of experts k."""
        raise NotImplementedError(f"{type(self).__name__} must define experts")

    @property
    def dim(self) -> int:
        """Number of inputs d."""
        raise NotImplementedError(f"{type(self).__name__} must define dim")

    @property
    def dtype(self) -> Any:
        """Precision of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define dtype")


class Coefficients(Part):
    """A part with coefficients of shape `(k, d)`."""

    coef: Any

    @property
    def experts(self) -> int:
        return self.coef.shape[-2]

    @property
    def dim(self) -> int:
        return self.coef.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.coef.dtype
