"""One self-contained page: every table, every plot as a data URI, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.metadata import version

from jinja2 import Environment, PackageLoader

from iapt.config.visible import visible
from iapt.report.plots import Plot
from iapt.report.sheet import BETTER, Sheet


def html(
    title: str, sheets: Sequence[Sheet], plots: Sequence[tuple[Plot, bytes | None]], folders: Sequence[str]
) -> str:
    """The page.

    Args:
        plots: each with its PNG, None where there is no figure.
        folders: what the report was made from.
    """
    pictures = [(plot, base64.b64encode(png).decode() if png else None) for plot, png in plots]
    environment = Environment(
        loader=PackageLoader("iapt.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.j2")
    page = template.render(
        title=title, sheets=sheets, pictures=pictures, folders=folders, version=version("iapt"), better=BETTER
    )
    return visible(page)
