"""Verify method variants on a small backbone of every causal LM of transformers; write what came of it.

    python scripts/verify_backbones.py                    every architecture, then iapt/verified.json, docs/backbones.md
    python scripts/verify_backbones.py llama gpt_neox     these alone, printed

Each architecture runs in a process of its own, under limits of memory and time. Results stay in
outputs/backbones/<release of transformers>/, and an architecture that has one is not run again: a verification that
was interrupted goes on. `--again` runs it anew. About two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers

from tests.backbones import zoo
from tests.backbones.table import ROOT, document, shipped
from tests.backbones.variants import VARIANTS
from tests.backbones.verify import verify

RESULTS = ROOT / "outputs" / "backbones" / transformers.__version__
LARGEST = 20_000_000  # parameters: what stays larger is a whole model, of which one pass a cell takes minutes
MEMORY = 8 << 30
SECONDS = 300


def main() -> None:
    """Run what is asked for, print a line for each architecture, write the table if all of them have run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *zoo.names()], metavar="ARCHITECTURE")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _verify_here(options.names[0])
        return
    names = options.names or zoo.names()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (name, cells) in enumerate(
            zip(names, pool.map(lambda n: _result(n, options.again), names), strict=True), 1
        ):
            print(f"[{number}/{len(names)}] {name}: {_said(cells)}", flush=True)
    if not options.names:
        results = {name: _result(name, False) for name in names}
        table = shipped(results)
        (ROOT / "iapt" / "verified.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (ROOT / "docs" / "backbones.md").write_text(document(results), encoding="utf-8")


def _result(name: str, again: bool) -> dict[str, list[str]]:
    """Variant -> status and detail; the one variant "all" where the architecture was not built."""
    path = RESULTS / f"{name}.json"
    if again or not path.is_file():
        command = [sys.executable, "-m", "scripts.verify_backbones", "--child", name]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            died = f"the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        except subprocess.TimeoutExpired:
            found, died = None, f"took more than {SECONDS} s"
        path.write_text(json.dumps(found or {"all": ["unbuilt", died]}, indent=1) + "\n", encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _verify_here(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if reason := zoo.why_not_small(name, LARGEST):
        print(json.dumps({"all": ["unbuilt", reason]}))
        return
    try:
        with torch.no_grad():
            zoo.build_lm(name)(input_ids=torch.arange(3, 15)[None])
    except Exception as error:  # a size that is not known here: nothing is said about the architecture
        print(json.dumps({"all": ["unbuilt", f"{type(error).__name__}: {error}"[:200]]}))
        return
    cells = {}
    for variant in VARIANTS:
        cell = verify(name, variant)
        cells[variant] = [cell.status, cell.detail]
    print(json.dumps(cells))


def _said(cells: dict[str, list[str]]) -> str:
    count: dict[str, int] = {}
    for status, _ in cells.values():
        count[status] = count.get(status, 0) + 1
    bad = [f"\n    {variant}: {s}: {detail}" for variant, (s, detail) in cells.items() if s in ("wrong", "crashed")]
    return ", ".join(f"{n} {status}" for status, n in count.items()) + "".join(bad)


if __name__ == "__main__":
    main()
