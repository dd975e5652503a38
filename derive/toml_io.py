"""Rule tables as canonical TOML, written with their hash and read back with suspicion.

A file is parsed, never evaluated: TOML, then a fixed schema, then the exponent grammar, then the hash.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w
from sympy import Expr

from widthwise.derive.errors import DeriveError
from widthwise.derive.exponents import parse
from widthwise.derive.table import KNOBS, Finding, Rule, RuleTable, TensorSize

LIMIT, LONGEST_LINE = 400_000, 20_000  # characters; real tables are a tenth of that

_AGAIN = "write it again with widthwise derive --format toml"
_HEADER = "# Width-scaling rules. Every knob is an exponent: multiply the base value by (n / n_base)^knob.\n"
_LOGS = (
    "# Where a rule has an lr_log, multiply lr by (ln N / ln N_base)^lr_log besides, and divide weight_decay by it;\n"
    "# N is the size of channels.\n"
)


def write_toml(table: RuleTable, command: str = "") -> str:
    """Canonical text: equal tables give equal bytes. Knobs that a role does not have are left out. ``command`` is
    noted as what made the file."""

    def plain(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if value is not None}

    content = table.as_dict()
    ordered = {"hash": content.pop("hash")} | content
    for key in ("rules", "tensors", "findings"):
        ordered[key] = [plain(entry) for entry in ordered[key]]
    logs = _LOGS if any(rule.lr_log is not None for rule in table.rules) else ""
    return _HEADER + logs + (f"# {command}\n" if command else "") + tomli_w.dumps(ordered, multiline_strings=False)


def read_toml(text: str, name: str = "the file") -> RuleTable:
    """The table that :func:`write_toml` wrote (without proofs).

    Raises:
        DeriveError: when it is not such a file, or its content does not match its hash.
    """
    if len(text) > LIMIT or max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
        raise DeriveError(f"{name} is larger than any rule table", cure="check that it is the right file")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeriveError(f"{name} is not TOML: {error}", cure=_AGAIN) from None
    reader = Reader(name)
    table = RuleTable(
        architecture=reader.text(content, "architecture"),
        optimizer=reader.text(content, "optimizer"),
        scaling=reader.text(content, "scaling"),
        regime=reader.text(content, "regime"),
        gauge=reader.text(content, "gauge"),
        options=reader.texts_by_name(content, "options"),
        assumptions=reader.texts(content, "assumptions", some=True),
        rules=tuple(reader.rule(entry) for entry in reader.entries(content, "rules")),
        tensors=tuple(reader.tensor(entry) for entry in reader.entries(content, "tensors")),
        findings=tuple(reader.finding(entry) for entry in reader.entries(content, "findings")),
    )
    reader.only(content, set(table.content()) | {"hash"})
    if reader.text(content, "hash") != table.hash:
        raise DeriveError(
            f"{name} was changed after it was derived: its hash does not match its content",
            cure="derive it again instead of editing it",
        )
    return table


class Reader:
    """Typed access to untrusted content; every surprise is a DeriveError that names its place."""

    def __init__(self, name: str, again: str = _AGAIN) -> None:
        self.name, self.again = name, again

    def refuse(self, what: str) -> DeriveError:
        return DeriveError(f"{self.name}: {what}", cure=self.again)

    def only(self, entry: Mapping[str, Any], known: set[str]) -> None:
        if extra := sorted(set(entry) - known):
            raise self.refuse(f"unknown key {extra[0]!r}")

    def text(self, entry: Mapping[str, Any], key: str) -> str:
        value = entry.get(key)
        if not isinstance(value, str):
            raise self.refuse(f"{key} is missing or not a text")
        return value

    def texts(self, entry: Mapping[str, Any], key: str, some: bool = False) -> tuple[str, ...]:
        value = entry.get(key)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value) or (some and not value):
            raise self.refuse(f"{key} is missing or not a list of texts")
        return tuple(value)

    def texts_by_name(self, entry: Mapping[str, Any], key: str) -> dict[str, str]:
        value = entry.get(key)
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise self.refuse(f"{key} is missing or not a table of texts")
        return dict(value)

    def entries(self, entry: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        value = entry.get(key)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.refuse(f"{key} is missing or not a list of tables")
        return value

    def exponent(self, entry: Mapping[str, Any], key: str) -> Expr | None:
        return None if key not in entry else parse(self.text(entry, key))

    def required(self, entry: Mapping[str, Any], key: str) -> Expr:
        return parse(self.text(entry, key))

    def rule(self, entry: dict[str, Any]) -> Rule:
        self.only(entry, {"role", "parameters", "shape", "binding", "assumed", "lr_log", "channels", *KNOBS})
        log = self.exponent(entry, "lr_log")
        return Rule(
            self.text(entry, "role"),
            self.texts(entry, "parameters"),
            self.texts(entry, "shape"),
            **{knob: self.exponent(entry, knob) for knob in KNOBS},
            binding=self.text(entry, "binding"),
            assumed=self.texts(entry, "assumed"),
            lr_log=log,
            channels="" if log is None else self.text(entry, "channels"),
        )

    def tensor(self, entry: dict[str, Any]) -> TensorSize:
        self.only(entry, {"name", "forward", "gradient", "coherent_in"})
        return TensorSize(
            self.text(entry, "name"),
            self.required(entry, "forward"),
            self.exponent(entry, "gradient"),
            self.texts(entry, "coherent_in"),
        )

    def finding(self, entry: dict[str, Any]) -> Finding:
        self.only(entry, {"kind", "where", "exponent", "message", "cure"})
        return Finding(
            self.text(entry, "kind"),
            self.text(entry, "where"),
            self.required(entry, "exponent"),
            self.text(entry, "message"),
            self.text(entry, "cure"),
        )
