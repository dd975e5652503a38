"""Rule tables as files that can be checked for drift: they carry the command that makes them."""

from __future__ import annotations

from widthwise.codegen.request import Request
from widthwise.derive.render import markdown
from widthwise.derive.toml_io import write_toml


def derived_text(request: Request, form: str) -> str:
    """A rule table in a ``form`` of toml or markdown."""
    command = f"widthwise derive {request.arguments} --format {form}"
    table = request.table()
    if form == "toml":
        return write_toml(table, command)
    return f"<!-- {command} -->\n{markdown(table)}"
