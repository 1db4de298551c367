"""Launches Triton kernels at little cost to the host."""

from typing import Any

import torch


class Launcher:
    """A Triton kernel, compiled once for each dtype of its first tensor and each set of constants.

    Triton's own launch looks at every argument, every time, for the variant that fits. Here the first launch with some
    constants decides: later tensors must be aligned to 16 bytes where the first ones were, as torch allocates them, and
    integers must be named in the kernel's `do_not_specialize`. One process drives one GPU.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[torch.dtype, tuple[int, ...]], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[int, ...], warps: int = 4
    ) -> None:
        """`arguments`, then `constants` are the kernel's parameters; `warps` follow from constants.

        The first argument is a tensor whose dtype decides those of all others.
        """
        key = arguments[0].dtype, constants
        compiled = self.compiled.get(key)
        if compiled is None:
            # An interpreted kernel returns None, and goes on being launched in this way.
            self.compiled[key] = self.kernel[grid](*arguments, *constants, num_warps=warps)
        else:
            compiled[grid](*arguments, *constants)
