"""The launches that the attention ops would make on a GPU that is not here: what jvpgraph.kernels.gate compiles.

The ops' own implementations run on meta tensors, with a compute capability that is pretended, and Triton's own binder
specialises what they pass: types, alignments, constants and options are those of a launch, and nothing says them twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptx_version_from_options
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from jvpgraph.kernels import attention_gluon, attention_kernel, backward_kernel
from jvpgraph.kernels.call import pretended_gpu

__all__ = ["Launch", "memory", "recording"]

KERNELS = (
    attention_kernel.attention_kernel,
    attention_gluon.attention_jvp_kernel,
    backward_kernel.queries_kernel,
    backward_kernel.keys_kernel,
)


OF_ARCH = ("arch", "supported_fp8_dtypes", "deprecated_fp8_dot_operand_dtypes")  # options that no kernel here reads


class Launch(NamedTuple):
    """What a launch would run."""

    source: Any  # an ASTSource: the kernel, the types of its arguments, its constants
    target: GPUTarget
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.source.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """By the names of the kernel's arguments."""
        names = self.source.fn.arg_names
        return {names[at[0]]: value for at, value in self.source.constants.items() if len(at) == 1}

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal where the same is compiled: up to the assembler, Triton lowers alike for all of Ampere and Ada."""
        family = 80 if self.target.arch < 90 else self.target.arch
        ours = {name: str(x) for name, x in self.options.items() if name not in OF_ARCH}
        return family, self.source.hash(), tuple(sorted(ours.items()))


class _Recorded:
    """Stands for a compiled kernel where a launch looks for one."""

    function = packed_metadata = None

    def __init__(self, launch: Launch, launches: list[Launch]) -> None:
        self.launch, self.launches = launch, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.launches.append(self.launch)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Inside, attention of meta tensors takes the way that it would take on a GPU of this compute capability, and its
    launches are collected instead of made."""
    launches: list[Launch] = []
    target = GPUTarget("cuda", arch, 32)
    device = -arch  # kernels keep what they compiled by device

    class Absent:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: device)
        get_current_stream = staticmethod(lambda _: 0)

    def record(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> _Recorded:
        return _Recorded(Launch(source, target, dict(options)), launches)

    active, driver._active = driver._active, Absent()
    compilers = []
    for kernel in KERNELS:
        kernel.device_caches[device]  # sets the compiler
        compilers.append(kernel.compile)
        kernel.compile = record
    try:
        with pretended_gpu(arch):
            yield launches
    finally:
        driver._active = active
        for kernel, compiler in zip(KERNELS, compilers):
            kernel.compile = compiler
            kernel.device_caches.pop(device, None)


def memory(launch: Launch) -> tuple[int, int]:
    """Bytes of shared memory and columns of tensor memory that the launch would take. They are known once Triton has
    laid out its buffers, long before there is a binary."""
    backend = make_backend(launch.target)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(options)
    module = launch.source.make_ir(launch.target, options, implementation, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, launch.source.language)
    for name, stage in stages.items():
        module = stage(module, {})
        if name == "ttgir":
            break
    # how the next stage begins
    arch = launch.target.arch
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    try:
        passes.ttgpuir.add_allocate_warp_groups(manager, False)
    except TypeError:  # before a flag for Triton's sanitizer
        passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, get_ptx_version_from_options(options, arch))
    nvidia.passes.ttnvgpuir.add_allocate_tensor_memory(manager)
    manager.run(module, "allocate")
    return module.get_int_attr("ttg.shared") or 0, module.get_int_attr("ttg.tensor_memory_size") or 0
