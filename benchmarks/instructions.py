"""Counts the instructions per weight of the kernels for ARM, under emulation; prints Markdown.

    python -m benchmarks.instructions [--inputs 512]

Requires aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user). The
additional instructions of a product with three tiles, compared with a product with two, are divided by the weights of a
tile, so that the rest of the program does not count. The counts do not show how long an instruction takes.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "tests" / "native" / "one_product.c"
PATHS = ("neon-dotprod", "plain")
TILE = 16
PLAIN, TABLE, FLOAT_TABLE, E4M3 = 0, 1, 2, 3
FLOAT16, BFLOAT16, FLOAT32, E8M0, STEPS, UNSIGNED_STEPS, NONE = 0, 1, 2, 3, 4, 5, 9
LAYOUTS = {
    "int8 (--weights)": (PLAIN, 8, 0, BFLOAT16, NONE),
    "int4 (--weights)": (PLAIN, 4, 32, BFLOAT16, BFLOAT16),
    "Q4_0": (PLAIN, 4, 32, FLOAT16, NONE),
    "Q8_0": (PLAIN, 8, 32, FLOAT16, NONE),
    "Q4_K": (PLAIN, 4, 32, UNSIGNED_STEPS, UNSIGNED_STEPS),
    "Q6_K": (PLAIN, 6, 16, STEPS, NONE),
    "MXFP4": (TABLE, 4, 32, E8M0, NONE),
    "NF4": (FLOAT_TABLE, 4, 64, FLOAT32, NONE),
    "FP8": (E4M3, 8, 128, FLOAT32, NONE),
}
"""Code, bits, group, scale and zero as in `native/grouped.h`."""


def instructions(program: Path, path: str, layout: tuple[int, ...], inputs: int, tiles: int) -> int:
    """The number of instructions that the whole program executes."""
    numbers = [str(number) for number in (*layout, inputs, tiles)]
    command = ["qemu-aarch64", "-cpu", "max", "-one-insn-per-tb", "-d", "exec,nochain", str(program), path, *numbers]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        count = sum(line.startswith(b"Trace ") for line in running.stderr)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=512)
    inputs: int = parser.parse_args().inputs
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "one_product"
        options = ["-static", "-O3", "-ffp-contract=off", "-w"]
        subprocess.run(["aarch64-linux-gnu-gcc", *options, str(PROGRAM), "-o", str(program), "-lm"], check=True)
        print(f"| layout | {' | '.join(f'{path}: instructions per weight' for path in PATHS)} |")
        print("|---|---|---|")
        for name, layout in LAYOUTS.items():
            cells: list[str] = []
            for path in PATHS:
                two, three = (instructions(program, path, layout, inputs, tiles) for tiles in (2, 3))
                cells.append(f"{(three - two) / (TILE * inputs):.2f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
