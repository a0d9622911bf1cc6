"""What a run's own process executes: `python -m iapt.runs.worker FOLDER`, resolved config in FOLDER/config.yaml.

With `hardware.num_processes` above one it first starts the ranks, which are this same module again. The exit
code is the command line's: 2 bad input, 1 a failed run, 130 interrupted; the reason stands in summary.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from iapt.config.errors import TrainingError, UserError
from iapt.folder.files import read_config
from iapt.methods.settings import load_config
from iapt.runs import launch
from iapt.runs.sweep import share


def main() -> int:
    """Run the folder given on the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m iapt.runs.worker")
    parser.add_argument("folder", type=Path, help="a run folder with config.yaml")
    parser.add_argument("--quiet", action="store_true", help="the caller prints why the run failed")
    parser.add_argument("--parent", type=int, help="stop when this process is gone")
    args = parser.parse_args()
    if args.parent is not None:
        threading.Thread(target=_stop_without, args=(args.parent,), daemon=True).start()
    share(args.folder)
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("iapt").setLevel(logging.INFO if rank == 0 else logging.WARNING)

    folder: Path = args.folder
    saved = read_config(folder)
    try:
        config = load_config(saved)
        if config.hardware.num_processes > 1 and "RANK" not in os.environ:
            return launch.start_ranks(folder, config)
        from iapt.runs import experiment

        experiment.run(config, folder)
        _leave_group()
    except KeyboardInterrupt:
        return 130
    except (UserError, TrainingError) as error:
        first = launch.record_failure(folder, error, saved)
        if first and not args.quiet:
            print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # Ranks that fail because another one did would bury the traceback that matters.
        if launch.record_failure(folder, error, saved):
            traceback.print_exc()
        return 1
    return 0


def _leave_group() -> None:
    """Ranks that just end may find gloo's threads still at work, and abort after all is done."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _stop_without(parent: int) -> None:
    """A killed sweep must not leave a run behind that goes on unseen and keeps its GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
