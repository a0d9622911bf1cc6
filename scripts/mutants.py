"""Is the contract able to fail? Breaks the package on purpose, one way at a time, and demands a failing test.

    python scripts/mutants.py            # a few minutes; exit code 1 if a break goes unnoticed
    python scripts/mutants.py --check    # at once: is every text that would be replaced still there?

The package and its tests are copied to a temporary folder; nothing is ever changed here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("iapt", "tests", "configs", "scripts", "docs", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """One break.

    Attributes:
        name: what is broken.
        path: the file.
        old: the text to replace; it must stand in the file exactly once.
        new: what it becomes.
        tests: the tests that ought to notice, as pytest's -k; few, so that all mutants run in minutes.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "1 gradients reach the backbone",
        "iapt/model/backbone.py",
        "lm.requires_grad_(False)",
        "lm.requires_grad_(True)",
        "test_1_a_built_backbone",
    ),
    Mutant(
        "2 the closed form is off by one",
        "iapt/methods/prompt_tuning.py",
        "return config.num_soft_tokens * backbone.embedding_size",
        "return config.num_soft_tokens * backbone.embedding_size + 1",
        "test_2 and prompt_tuning-before and llama",
    ),
    Mutant(
        "3 pooling looks at padding",
        "iapt/nn/pooling.py",
        '(states @ queries).masked_fill(~mask.unsqueeze(-1), float("-inf"))',
        "states @ queries",
        "test_3 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "3 positions count columns, padding too",
        "iapt/model/engine.py",
        '["position_ids"] = (mask.long().cumsum(1) - 1)',
        '["position_ids"] = (torch.ones_like(mask).long().cumsum(1) - 1)',
        "test_3 and prompt_tuning-before and gpt2",
    ),
    Mutant(
        "3 soft tokens are written left of the padding",
        "iapt/model/engine.py",
        "slots = padding + torch.arange(",
        "slots = 0 * padding + torch.arange(",
        "test_3 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "3 padding of the response counts as label",
        "iapt/model/adapted.py",
        "batch.response_ids.masked_fill(~batch.response_mask, -100)",
        "batch.response_ids",
        "test_3 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "4 rotary positions start anew behind the cache",
        "iapt/model/engine.py",
        "(mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]",
        "(mask.long()[:, -embeds.shape[1] :].cumsum(1) - 1).clamp(min=0)",
        "test_4_cached_greedy and iapt-after_instruction-8-llama",
    ),
    Mutant(
        "4 the instruction's last token is cached twice",
        "iapt/model/engine.py",
        "                    cache.crop(-1)\n                mask = mask[:, :-1]\n",
        "                    mask = torch.cat([mask[:, :1], mask], 1)\n                mask = mask[:, :-1]\n",
        "test_4_cached_greedy and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "5 the second choice continues the first",
        "iapt/model/cache.py",
        "        if self._keep:",
        "        if True:",
        "test_5 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "6 a resumed run forgets the optimizer's state",
        "iapt/training/trainer.py",
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "test_6_resumed and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "7 the generator reads the response",
        "iapt/model/edits/base.py",
        "else take(hidden, self.columns)",
        "else hidden[:, -self.columns.shape[1] :]",
        "test_7_no_soft and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "7 a late prompt is seen below its layer",
        "iapt/model/edits/masked_layers.py",
        "if plan.soft is None or index not in plan.hidden:",
        "if True:",
        "test_7_no_token_sees and llama",
    ),
    Mutant(
        "8 recomputed attention sees a late prompt",
        "iapt/model/hooks.py",
        "was, self.plan = self.plan, plan  # in the backward pass it is another one, or none",
        "was = self.plan",
        "test_8 and (lpt or prefix_tuning) and llama",
    ),
    Mutant(
        "9 accumulation averages means",
        "iapt/training/trainer.py",
        'self.model.loss(batch, "sum") * (weight / count)',
        'self.model.loss(batch, "mean") * (weight / parts)',
        "test_9_accumulated and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "9 processes keep their own gradients",
        "iapt/training/trainer.py",
        "gradients = [s.view_as(g) for s, g in zip(summed, gradients, strict=True)]",
        "pass",
        "test_9_two and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "10 the adapter takes the backbone's dtype",
        "iapt/model/adapted.py",
        "method.to(backbone.lm.device) if",
        "method.to(backbone.lm.device, backbone.lm.dtype) if",
        "test_10 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "11 switched off, soft tokens still enter",
        "iapt/model/adapted.py",
        "was, self.engine.active = self.engine.active, False",
        "was, self.engine.active = self.engine.active, True",
        "test_11 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "13 rows are served by another adapter",
        "iapt/model/edits/rows.py",
        "(served == index)",
        "(served != index)",
        "test_13 and iapt-before_instruction-8-llama",
    ),
    Mutant(
        "13 keys and values are all one adapter's",
        "iapt/model/edits/keys_values.py",
        "(method.keys_values(layer, keys[of]",
        "(self.methods[0].keys_values(layer, keys[of]",
        "test_13 and prefix_tuning-keys_values-mlp-6-llama",
    ),
    Mutant(
        "4 decoding begins with the last token unedited",
        "iapt/model/hooks.py",
        "return enter(first.pop(), output) if first else None",
        "return None",
        "test_4_cached_greedy and dept and llama",
    ),
    Mutant(
        "4 decoding forgets the scaling vectors",
        "iapt/model/edits/output_scale.py",
        '-> Scales:\n        """The vectors, which scale all columns to come as well."""\n        return kept',
        "-> Scales:\n        return {}",
        "test_4_cached_greedy and para and llama",
    ),
]


def misfits() -> list[str]:
    """A line for every mutant whose text does not stand in its file exactly once."""
    counts = [(m, (ROOT / m.path).read_text(encoding="utf-8").count(m.old)) for m in MUTANTS]
    return [f"{m.name}: {m.path} holds its text {n} times: {m.old!r}" for m, n in counts if n != 1]


def run_tests(copy: Path, tests: str) -> tuple[int, str]:
    """The contract tests that -k selects, of the copy: (exit code, output)."""
    options = ["--full", "-x", "-q", "-p", "no:cacheprovider", "-k", tests]
    command = [sys.executable, "-m", "pytest", "tests/contracts", *options]
    return _python(copy, command)


def check_copy(copy: Path) -> None:
    """The copy is what gets imported. Raises SystemExit if an installed package comes first."""
    _, where = _python(copy, [sys.executable, "-c", "import iapt.model.adapted as m; print(m.__file__)"])
    if not Path(where.strip()).resolve().is_relative_to(copy.resolve()):
        sys.exit(f"the tests would import {where.strip()}, not the copy in {copy}")


def _python(copy: Path, command: list[str]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def killer(code: int, output: str) -> str | None:
    """The first test that failed; None if none did, or if the run broke before it could tell."""
    found = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", output, re.M)
    return found[1] if code == 1 and found else None


def main() -> int:
    """Run them all; the exit code says whether every break was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look whether every text is still there")
    parser.add_argument("--only", default="", help="the mutants whose names contain this")
    args = parser.parse_args()
    for line in (found := misfits()):
        print(line)
    if found or args.check:
        return bool(found)
    chosen = [m for m in MUTANTS if args.only in m.name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, copy / name)
        check_copy(copy)
        code, output = run_tests(copy, " or ".join(f"({m.tests})" for m in chosen))
        print("unbroken: " + ("passes" if code == 0 else output[-3000:]), flush=True)
        if code != 0:
            return 1
        survivors = 0
        for mutant in chosen:
            start, file = time.perf_counter(), copy / mutant.path
            whole = file.read_text(encoding="utf-8")
            file.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
            code, output = run_tests(copy, mutant.tests)
            file.write_text(whole, encoding="utf-8")
            test = killer(code, output)
            survivors += test is None
            verdict = f"killed by {test}" if test else f"SURVIVED (pytest ended with {code})\n{output[-2000:]}"
            print(f"{mutant.name:<50} {verdict}  {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
