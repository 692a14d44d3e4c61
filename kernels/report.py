#!/usr/bin/env python3
"""What the kernels cost: registers, shared memory and spills of each, and what is in their machine code.

    python3 kernels/report.py            prints the table of kernels/README.md
    python3 kernels/report.py --write    writes it there
    python3 kernels/report.py --check    fails where the table is old, a kernel spills, or a hot kernel is without
                                         tensor cores or asynchronous copies

Needs nvcc and cuobjdump: in $CUDA_HOME/bin, or on the path. No GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES = ["80", "90a"]
# Attention on tensor cores, where the time goes: these must have them and copy while they compute.
HOT = [f"{operation}_bf16_{head}{width}" for operation in ("attend_prefill", "attend_beams") for head in (64, 128)
       for width in ("", "_wide")]
# By warpgroups: for Hopper alone.
HOT_BY_WARPGROUPS = [f"{operation}_bf16_{head}_warpgroup{s}" for operation in ("attend_prefill", "attend_beams")
                     for head in (64, 128) for s in ("", "s")]
BEGIN, END = "<!-- made by report.py -->\n", "<!-- end -->\n"


def tool(name):
    home = os.environ.get("CUDA_HOME")
    path = Path(home) / "bin" / name if home else None
    return str(path) if path and path.exists() else name


def run(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} was not found; set CUDA_HOME (.ci/get-nvcc FOLDER fetches what is needed)")
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


def compile_kernels(source, architecture, folder):
    """The functions of a file: their resources and the instructions that matter."""
    cubin = Path(folder) / f"{source.stem}-{architecture}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    run(tool("nvcc"), "-cubin", "-std=c++17", "-O3", target, str(source), "-o", str(cubin))
    kernels = {}
    usage = run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        kernels[name] = {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"],
                         "shared": found["SHARED"], "mma": 0, "copies": 0, "spills": 0}
    name = None
    for line in run(tool("cuobjdump"), "--dump-sass", str(cubin)).splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = match[1]
        elif name:
            kernels[name]["mma"] += "HMMA" in line or "HGMMA" in line
            kernels[name]["copies"] += "LDGSTS" in line
            kernels[name]["spills"] += bool(re.search(r"\b(STL|LDL)\b", line))
    return kernels


def measure():
    sources = sorted(FOLDER.glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {(source, architecture): pool.submit(compile_kernels, source, architecture, folder)
                for source in sources for architecture in ARCHITECTURES}
        by_architecture = {architecture: {} for architecture in ARCHITECTURES}
        for (_, architecture), job in jobs.items():
            by_architecture[architecture].update(job.result())
    return by_architecture


def table(found):
    lines = ["| kernel | registers sm_80 / sm_90a | static shared, bytes | local memory, bytes | tensor-core "
             "instructions | asynchronous copies |", "| --- | --: | --: | --: | --: | --: |"]
    for name in sorted(found["90a"]):
        old, new = found["80"][name], found["90a"][name]
        lines.append(f"| {name} | {old['registers']} / {new['registers']} | {new['shared']} | "
                     f"{max(old['local'], new['local'])} | {new['mma'] or ''} | {new['copies'] or ''} |")
    return "\n".join(lines) + "\n"


def defects(found):
    for architecture, kernels in found.items():
        for name, kernel in kernels.items():
            if kernel["local"] or kernel["spills"]:
                yield f"{name} for sm_{architecture} touches local memory"
        for name in HOT + HOT_BY_WARPGROUPS * (architecture == "90a"):
            if not kernels[name]["mma"]:
                yield f"{name} for sm_{architecture} has no tensor-core instruction"
            if not kernels[name]["copies"]:
                yield f"{name} for sm_{architecture} has no asynchronous copy"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = measure()
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    old, after = rest.split(END)
    new = table(found)
    if arguments.write:
        readme.write_text(before + BEGIN + new + END + after)
    print(new)
    wrong = list(defects(found))
    if arguments.check and old != new:
        wrong.append("the table in kernels/README.md is old: python3 kernels/report.py --write")
    for defect in wrong:
        print(defect, file=sys.stderr)
    sys.exit(bool(wrong) and arguments.check)


main()
