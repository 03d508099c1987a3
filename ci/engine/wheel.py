"""`make wheel`: in dist/, a wheel for every x86-64 CPU with AVX2, FMA, F16C and BMI2, and for CPython 3.10 and newer.

`make build` compiles for the CPU at hand and nothing here changes what it has built; both keep folders of their own.
"""

from __future__ import annotations

import argparse

from build import BUILD, ROOT, alone, build_wheel, prepare, without_page
from report import run_main, say


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with alone():
        prepare()
        wheel = build_wheel(ROOT / "dist", BUILD / "cmake-portable", "cmake.define.LLAMA_FLASH_PORTABLE=ON")
        say(f"wheel: {wheel.relative_to(ROOT)}{without_page()}")


if __name__ == "__main__":
    run_main(main)
