"""`iapt-report`: tables, plots and one page out of run folders, which are only read.

iapt-report outputs/sweeps/...                         # medians over seeds; files go to report/
iapt-report outputs --baseline lora --show median,range
iapt-report outputs --reference --format latex         # published values beside ours; LaTeX on stdout
iapt-report --compare outputs/sweeps/A outputs/sweeps/B
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from iapt.config.errors import UserError, suggest
from iapt.config.visible import visible

if TYPE_CHECKING:
    from iapt.report.cells import Board, Row
    from iapt.report.plots import Plot
    from iapt.report.runs import Run
    from iapt.report.sheet import Sheet, Tests


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; iapt-report --help lists what there is")


def main() -> None:
    """Entry point of `iapt-report`."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: Sequence[str]) -> list[Path]:
    """Print the tables and write the report.

    Args:
        arguments: the command line.

    Returns:
        The files written.

    Raises:
        UserError: bad arguments, no runs, runs that do not belong together, files that are not a report's.
    """
    args = _parse(arguments)
    # Only now: --help and a mistyped option need neither torch nor matplotlib.
    from iapt.report import output
    from iapt.report.cells import gather
    from iapt.report.runs import read_runs

    read = [read_runs(paths) for paths in ([[p] for p in args.compare] if args.compare else [args.folders])]
    runs: list[Run] = [run for group in read for run in group]
    output.check_out(args.out, runs)
    groups = [gather(group, args.allow_mixed, args.all_metrics) for group in read]
    plots: list[Plot] = []
    tests: dict[str, Tests] = {}
    if args.compare:
        from iapt.report.compare import compare_sheets

        sheets = compare_sheets(groups[0], groups[1], tuple(map(str, args.compare)), args.resamples)
    else:
        sheets, tests = _sheets(groups[0], args)
        plots = _plots(groups[0])
    files = _files(sheets, plots, [board for group in groups for board in group], tests, args)
    _print(sheets, args.format)
    written = output.write(args.out, files)
    for plot in plots:
        if plot.figure is None:
            print(visible(f"not drawn: {plot.title}: {plot.reason}"), file=sys.stderr)
    print(f"{len(runs)} run folders read, {len(written)} files in {args.out}", file=sys.stderr)
    return written


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="iapt-report", description="Tables, plots and one page out of run folders, which are only read."
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two sweeps, cell by cell")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the files go (default: report)")
    parser.add_argument("--format", default="rich", help="on stdout: rich (default), markdown, latex or csv")
    parser.add_argument("--show", default="median", help="of a cell's seeds: any of median,mean,std,n,range")
    parser.add_argument("--baseline", metavar="METHOD", help="test every other row against this one")
    parser.add_argument("--reference", action="store_true", help="published values beside ours, with their source")
    parser.add_argument(
        "--all-metrics", action="store_true", help="a column for each metric, not just the reported one"
    )
    parser.add_argument(
        "--allow-mixed", action="append", default=[], metavar="KEY", help="let a cell's runs differ in KEY"
    )
    parser.add_argument("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: 2000)")
    args = parser.parse_args(arguments)

    from iapt.report.cells import MUST_AGREE
    from iapt.report.render import FORMATS
    from iapt.report.sheet import SHOWN

    args.show = [name.strip() for name in args.show.split(",")]
    allowed = {"--show": (args.show, SHOWN), "--allow-mixed": (args.allow_mixed, MUST_AGREE)}
    allowed["--format"] = ([args.format], ("rich", *FORMATS))
    for option, (given, known) in allowed.items():
        for name in given:
            if name not in known:
                raise UserError(f"{option} = {name}: unknown; {suggest(name, known)}")
    if args.resamples < 100:
        raise UserError(f"--resamples = {args.resamples}: must be at least 100")
    if bool(args.folders) == bool(args.compare):
        raise UserError("give one or more FOLDERs, or --compare A B" + (", not both" if args.folders else ""))
    for option in ("baseline", "reference"):
        if args.compare and getattr(args, option):
            raise UserError(f"--{option}: has no meaning with --compare")
    return args


def _sheets(boards: list[Board], args: argparse.Namespace) -> tuple[list[Sheet], dict[str, Tests]]:
    from iapt.report.published import reference_sheet
    from iapt.report.sheet import against, differences_sheet, main_sheet
    from iapt.report.transfer_matrix import transfer_sheets

    baselines = _baselines(boards, args.baseline)
    sheets: list[Sheet] = []
    tests: dict[str, Tests] = {}
    for board in boards:
        baseline = baselines.get(board.backbone)
        if baseline:
            tests[board.backbone] = against(board, baseline, args.resamples)
        sheets.append(main_sheet(board, args.show, baseline, tests.get(board.backbone)))
        if baseline:
            sheets.append(differences_sheet(board, baseline, tests[board.backbone]))
        sheets += transfer_sheets(board)
        if args.reference:
            sheets.append(reference_sheet(board))
    return sheets, tests


def _baselines(boards: list[Board], name: str | None) -> dict[str, Row]:
    """Backbone -> the row called `name`, or the only one of that method."""
    found: dict[str, Row] = {}
    for board in boards if name else []:
        exact = [row for row in board.rows if str(row) == name]
        fitting = exact or [row for row in board.rows if row.method == name]
        if len(fitting) > 1:
            raise UserError(f"--baseline = {name}: has several rows; give one of: {'; '.join(map(str, fitting))}")
        if fitting:
            found[board.backbone] = fitting[0]
    if name and not found:
        rows = {str(row) for board in boards for row in board.rows}
        raise UserError(f"--baseline = {name}: no such row; {suggest(name, rows)}")
    return found


def _plots(boards: list[Board]) -> list[Plot]:
    from iapt.report.plots import plots
    from iapt.report.transfer_matrix import transfer_plots

    return [plot for board in boards for plot in (*plots(board), *transfer_plots(board))]


def _files(
    sheets: list[Sheet], plots: list[Plot], boards: list[Board], tests: dict[str, Tests], args: argparse.Namespace
) -> dict[str, bytes]:
    from iapt.report.page import html
    from iapt.report.plots import show_names_as_they_are
    from iapt.report.render import FORMATS, cells_csv

    files = {f"{sheet.name}{suffix}": render(sheet).encode() for sheet in sheets for suffix, render in FORMATS.values()}
    pictures: list[tuple[Plot, bytes | None]] = []
    for plot in plots:
        pictures.append((plot, None))
        if plot.figure is not None:
            file = io.BytesIO()
            show_names_as_they_are(plot.figure)
            plot.figure.savefig(file, format="png", dpi=140)
            pictures[-1] = plot, file.getvalue()
            files[f"plots/{plot.name}.png"] = file.getvalue()
    if not args.compare:
        files["cells.csv"] = cells_csv(boards, tests).encode()
    folders = [str(folder) for folder in args.compare or args.folders]
    title = "A and B compared" if args.compare else "Results"
    files["report.html"] = html(title, sheets, pictures, folders).encode()
    return files


def _print(sheets: list[Sheet], name: str) -> None:
    from iapt.report.render import FORMATS, rich_table

    if name != "rich":
        print("\n".join(FORMATS[name][1](sheet) for sheet in sheets), end="")
        return
    for sheet in sheets:
        if not sheet.lines:
            print(visible("\n".join([sheet.title, *sheet.notes])))
            continue
        table = rich_table(sheet)
        console = Console(highlight=False)
        if not sys.stdout.isatty():
            # Rich assumes 80 columns for a pipe; the notes fold, the table must not.
            table.caption, caption = None, table.caption
            widest = max(80, Console(width=100_000).measure(table).maximum)
            table.caption, console = caption, Console(width=widest, highlight=False, color_system=None)
        console.print(table)


if __name__ == "__main__":
    main()
