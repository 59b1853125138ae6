"""Build the native CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests on them.

The objects are built in a temporary copy of the kernels' folder, and only `--levels` of them. Any finding ends the run.

    python benchmarks/sanitize_kernels.py [--levels base avx512_vnni]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="*", default=["base", "avx512_vnni"], help="levels to build and test")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument(
        "tests", nargs="*", default=["tests/kernels/cpu/test_cpu_kernels.py", "tests/kernels/cpu/test_cpu_features.py"]
    )
    options = parser.parse_args()
    preload = [find_runtime(options.compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kvpass")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so"))
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        # base is always built: it tells which levels the processor has
        levels = ",".join(dict.fromkeys(["base", *options.levels]))
        environment = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": FLAGS, "KVPASS_CPU_LEVELS": levels}
        subprocess.run(
            build, cwd=copy, env={**environment, "CC": options.compiler, "CXX": options.compiler}, check=True
        )
        # Python itself never frees all that it holds, and torch's pool of threads is not ours to judge.
        environment |= {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options.tests]
        return subprocess.run(tests, cwd=copy, env=environment).returncode


def find_runtime(compiler: str, name: str) -> str:
    """Path of one of the compiler's libraries."""
    asked = [compiler, f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
