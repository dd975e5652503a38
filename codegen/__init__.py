"""Rules → source text. jinja2; never torch."""
