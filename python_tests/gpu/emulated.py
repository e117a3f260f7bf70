"""An op that runs as on a GPU: each of its launches is compiled for a target, and its PTX executed on the CPU."""

from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch

from compsparse_kernels.ops.triton_launch import Launch
from python_tests.gpu.aot import compile_launch
from python_tests.gpu.problems import SHARED_MEMORY
from python_tests.gpu.ptx.torch_launch import run_compiled


@contextmanager
def emulated(kernels: ModuleType, written: dict[str, tuple[str, ...]], target: str, backwards: bool = False):
    """Launches of ``kernels`` inside run as PTX of ``target``, their programs in order or ``backwards``.

    ``written``: of each kernel the arguments that hold results; a store to any other is a fault.
    """

    def run(launch: Launch) -> None:
        config = kernels.suitable(launch.kernel.configs, launch.arguments, SHARED_MEMORY)[0]
        compiled = compile_launch(launch, config, target)
        results = [launch.arguments[name] for name in written[launch.kernel.fn.__name__]]
        inputs = [
            position
            for position, value in enumerate(compiled.arguments)
            if isinstance(value, torch.Tensor) and not any(value is one for one in results)
        ]
        order = range(launch.programs)
        run_compiled(compiled, readonly=inputs, order=order[::-1] if backwards else order)

    with mock.patch.object(Launch, "__call__", run):
        yield
