"""The native CPU kernels: one shared object per level of instruction sets, from the same sources.

All else that setuptools needs stands in pyproject.toml. The objects are plain C interfaces, opened through ctypes: no
header of Python or torch is needed to build them. They are optional: without a compiler, or where a level does not
compile, the install succeeds and torch serves, which the first call says.

KVPASS_CPU_LEVELS names the levels to build, separated by commas (default all that suit the machine; ``none`` for none).
KVPASS_CPU_FLAGS holds further flags for compiler and linker, such as those of a sanitizer.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-ffp-contract=fast",
    "-g0",
    "-w",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {
    "base": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
FOLDER = "kernels/cpu"
MORE = os.environ.get("KVPASS_CPU_FLAGS", "").split()


def chosen_levels() -> list[str]:
    """Levels to build on this machine."""
    if sys.platform == "win32":
        return []
    wanted = os.environ.get("KVPASS_CPU_LEVELS")
    if wanted:
        return [level for level in wanted.split(",") if level in LEVELS]
    return list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["base"]


class BuildKernels(build_ext):
    """Compiles each level in a folder of its own, all levels at once, under names that Python's version is not in."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = True

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        level = ext.name.rpartition("libkvpass_cpu_")[2]
        target = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], target):
            return
        objects = self.compiler.compile(
            ext.sources,
            output_dir=os.path.join(self.build_temp, level),
            include_dirs=[FOLDER],
            extra_postargs=ext.extra_compile_args,
        )
        self.compiler.link_shared_object(objects, target, target_lang="c++", extra_postargs=["-pthread", *MORE])


setup(
    ext_modules=[
        Extension(
            f"kvpass.kernels.cpu.libkvpass_cpu_{level}",
            sources=[f"{FOLDER}/kernels.cpp"],
            depends=sorted(str(path) for path in Path(FOLDER).rglob("*.h")),
            extra_compile_args=[*COMMON, *LEVELS[level], *MORE],
            optional=True,
        )
        for level in chosen_levels()
    ],
    cmdclass={"build_ext": BuildKernels},
)
