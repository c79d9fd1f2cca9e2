"""Build the native CPU library with CMake and Ninja; pyproject.toml has everything else."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "flamingo_kernels._cpp.libflamingo_cpu"


def tool(name: str) -> str:
    # Look beside this Python too: the virtual environment need not be activated.
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=places)
    if found is None:
        raise FileNotFoundError(f"{name} was not found")
    return found


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # ctypes loads the library, so its name carries no Python version.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "native"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            cmake, ninja = tool("cmake"), tool("ninja")
            configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
            options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release"]
            subprocess.run(configure + options, check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "flamingo_cpu"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"\nflamingo_kernels: building the native CPU library failed: {error}\n"
                "It needs a C++17 compiler (GCC or Clang), cmake and ninja. Set\n"
                "FLAMINGO_BUILD_CPP=0 to install without it: every kernel but 'cpp' then works.\n"
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replace the file, not its contents: a process that has loaded the old one keeps it.
        target.unlink(missing_ok=True)
        shutil.copy2(build / target.name, target)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple:
        python, abi, platform = super().get_tag()
        # The library links no Python, so one wheel serves every version of it.
        return ("py3", "none", platform) if build_cpp else (python, abi, platform)


build_cpp = os.environ.get("FLAMINGO_BUILD_CPP", "1") != "0"
setup(
    ext_modules=[Extension(LIBRARY, sources=[])] if build_cpp else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
