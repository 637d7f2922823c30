"""From a template to one HTML file with its styles and its script. A policy forbids it to load anything else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from llmsqueeze import __version__
from llmsqueeze.publish import numbers

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = "templates"


def render(template: str, **context: Any) -> str:
    """The page. The values in the context are text and are escaped. A script in them would not run, because the policy
    names ours by its hash.
    """
    from markupsafe import Markup

    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    inline = {"style": Markup(style), "script": Markup(script), "policy": policy}
    return environment().get_template(template).render(**inline, version=__version__, **context)


@cache
def environment() -> Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "size": numbers.size,
        "integer": numbers.integer,
        "fixed": numbers.fixed,
        "percent": numbers.percent,
    }
    return templates


def asset(name: str) -> str:
    return (files("llmsqueeze.publish.page") / FOLDER / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """The name of an inline style or script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
