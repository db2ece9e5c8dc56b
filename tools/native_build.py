"""Compiles `csrc/` when truemask is installed: once for each instruction set, into `src/truemask/_native`.

A build hook of hatchling, and a command: `python tools/native_build.py`. `CXX` names a compiler (default: g++, clang++
or c++, the first that is there), `TRUEMASK_NATIVE=off` leaves the kernel out. Without a compiler, or if it fails, the
install goes on without the kernel; a set that the compiler does not know is left out by itself. `missing.txt` says why,
and so do `truemask doctor` and plans.
"""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # as a command it needs nothing
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent.parent
SOURCES, PLACE = ROOT / "csrc", ROOT / "src" / "truemask" / "_native"
FLAGS = "-O3 -std=c++17 -fPIC -shared -pthread -fno-math-errno -ffp-contract=fast -Wall -Wextra -Wno-psabi".split()
STATIC = ("-static-libstdc++", "-static-libgcc")
SETS = runpy.run_path(str(ROOT / "src" / "truemask" / "backends" / "isa.py"))["SETS"]
ELSEWHERE = ("base", "amx_emulated")  # of the sets, those that other processors than x86 have, too
PROBE = """
#if defined(__AMX_TILE__)
void known() { asm volatile("tilerelease"); }
#endif
"""
SWITCH, OFF = "TRUEMASK_NATIVE", "off"


def variants() -> dict[str, list[str]]:
    """The compiler's flags for every instruction set of this machine's kind."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {one.name: list(one.compiler) for one in SETS if x86 or one.name in ELSEWHERE}


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ["g++", "clang++", "c++"]) if (found := shutil.which(name))), None
    )


def build(place: Path = PLACE, more: tuple[str, ...] = STATIC) -> str:
    """Compile what is not up to date; why there is no kernel, or nothing. What the compiler does not know is noted."""
    place.mkdir(parents=True, exist_ok=True)
    why = _reason()
    wrong, unknown = ([], []) if why else _all_compiled(place, more)
    why = why or "\n".join(wrong)
    note = place / "missing.txt"
    if why or unknown:
        text = "\n".join([why, *unknown]).strip()
        note.write_text(text + "\n", encoding="utf-8")
        print(
            f"truemask: {'the native kernel is left out' if why else 'left out of the native kernel'}: {text}",
            file=sys.stderr,
        )
    else:
        note.unlink(missing_ok=True)
    return why


def _all_compiled(place: Path, more: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Compile every variant; what went wrong, and for which of them the compiler is too old."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        texts = list(pool.map(lambda one: _compiled(place, one[0], one[1], more), variants().items()))
    failed = {name: text for name, text in zip(variants(), texts, strict=True) if text}
    unknown = [name for name in failed if _knows([]) and not _knows(variants()[name])]
    return [text for name, text in failed.items() if name not in unknown], [_left_out(place, name) for name in unknown]


def _knows(flags: list[str]) -> bool:
    """Whether the compiler, and its assembler, know the instructions of a variant."""
    command = [str(compiler()), *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=PROBE, capture_output=True, text=True).returncode == 0


def _left_out(place: Path, name: str) -> str:
    """Take away what an earlier compiler made of a variant that this one does not know; what is to be said of it."""
    for ending in ("so", "stamp"):
        (place / f"truemask_{name}.{ending}").unlink(missing_ok=True)
    return f"{name}: {compiler()} does not know these instructions; a newer compiler does (`CXX` names one)"


def _reason() -> str:
    if os.environ.get(SWITCH) == OFF:
        return f"{SWITCH}={OFF} said so when truemask was installed"
    if sys.platform == "win32":
        return "Windows is not supported yet"
    if compiler() is None:
        return "there was no C++ compiler (g++, clang++ or CXX) when truemask was installed"
    return ""


def _compiled(place: Path, name: str, flags: list[str], more: tuple[str, ...]) -> str:
    """Compile one variant, unless it is there already; what went wrong, or nothing."""
    target, stamp = place / f"truemask_{name}.so", place / f"truemask_{name}.stamp"
    sources = sorted(SOURCES.rglob("*.h")) + sorted(SOURCES.glob("*.cpp"))
    command = [str(compiler()), *FLAGS, *flags, *more]
    text = "\n".join([*command, *(path.read_text(encoding="utf-8") for path in sources)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    if target.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return ""
    part = place / f"{target.name}.{os.getpid()}.part"
    files = ["-I", str(SOURCES), "-o", str(part), str(SOURCES / "kernel.cpp")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    if done.returncode:
        return f"{command[0]} failed for {name}: {done.stderr.strip()[-2000:]}"
    part.replace(target)
    stamp.write_text(digest, encoding="utf-8")
    return ""


class NativeHook(BuildHookInterface):
    """What hatchling runs before it packs a wheel, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build; the wheel then fits this platform and any Python 3."""
        build()
        build_data["artifacts"] += ["src/truemask/_native/*.so", "src/truemask/_native/missing.txt"]
        if any(PLACE.glob("*.so")):
            build_data["pure_python"] = False
            platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform_tag}"


if __name__ == "__main__":
    sys.exit(1 if build() else 0)
