"""An op that runs as on a GPU: each of its launches is compiled for a target, and its PTX executed on the CPU."""

from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch

from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.aot import Compiled, compile_launch
from python_tests.gpu.problems import SHARED_MEMORY
from python_tests.gpu.ptx.torch_launch import run_compiled


@contextmanager
def emulated(kernels: ModuleType, written: dict[str, tuple[str, ...]], target: str, backwards: bool = False):
    """Launches of ``kernels`` inside run as PTX of ``target``, their programs in order or ``backwards``.

    ``written``: of each kernel the arguments that hold results; a store to any other is a fault.
    """

    def run(launch: Launch) -> None:
        order = range(launch.programs)
        compiled = compiled_for(launch, kernels, target)
        execute(compiled, written[launch.kernel.fn.__name__], order=order[::-1] if backwards else order)

    with mock.patch.object(Launch, "__call__", run):
        yield


def compiled_for(launch: Launch, kernels: ModuleType, target: str, most_warps: bool = False) -> Compiled:
    """In the first configuration that suits, or in that with most warps."""
    suitable = kernels.suitable(launch.kernel.configs, launch.arguments, SHARED_MEMORY)
    config = max(suitable, key=lambda config: config.num_warps) if most_warps else suitable[0]
    return compile_launch(launch, config, target)


def execute(compiled: Compiled, written: tuple[str, ...], **options) -> dict[str, int]:
    """Runs it and returns how often each instruction ran; a store to any parameter but those ``written`` is a fault."""
    named = dict(zip(compiled.parameters, compiled.arguments, strict=True))
    results = [named[name] for name in written if name in named]
    inputs = [
        position
        for position, value in enumerate(compiled.arguments)
        if isinstance(value, torch.Tensor) and not any(value is one for one in results)
    ]
    return run_compiled(compiled, readonly=inputs, **options)
