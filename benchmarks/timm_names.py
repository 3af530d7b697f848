"""Every model that timm lists, made by its `hat_` name on the meta device, where large models take no memory.

    python benchmarks/timm_names.py [PATTERN]

Resumes after an interruption. The result per model is its units, the share of elements whose owner and reader are
known, and seconds of CPU time, or the error. The models are mapped, not verified: without weights there is nothing to
attack (`hatcl zoo` does that).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import timm
import torch
from common import read, save

import hatcl  # noqa: F401 (teaches timm the names)


def made(name: str) -> dict[str, Any]:
    began = time.process_time()
    try:
        with torch.device("meta"):
            model = timm.create_model(f"hat_{name}", num_tasks=2)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    unit_map = model.hat_gates.unit_map
    return {"units": unit_map.num_units, "known": unit_map.known, "seconds": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    args = parser.parse_args()
    models: dict[str, Any] = read("timm_names").get("models", {})
    for i, name in enumerate(timm.list_models(args.pattern)):
        if name not in models:
            models[name] = made(name)
            if i % 10 == 0:
                report(models)
                print(f"{i} {name} {models[name]}", flush=True)
    report(models)
    print({k: v for k, v in read("timm_names").items() if k not in ("models", "machine")})


def report(models: dict[str, Any]) -> None:
    fine = [m for m in models.values() if "failure" not in m]
    save(
        "timm_names",
        {
            "listed": len(timm.list_models()),
            "tried": len(models),
            "made": len(fine),
            "median_known": statistics.median(m["known"] for m in fine),
            "least_known": min(m["known"] for m in fine),
            "models": dict(sorted(models.items())),
        },
    )


if __name__ == "__main__":
    main()
