"""Brings tables and pictures of docs/results/transfer.md up to date with the results beside it.

    python bench/transfer/page.py

Between ``<!-- NAME -->`` and ``<!-- end -->`` go what the runs of docs/results/transfer/NAME.jsonl say of themselves
(device, versions, steps, tokens, parameters), the table of ``widthwise plot``, and its picture.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from widthwise.verify.transfer import report
from widthwise.verify.transfer.results import Results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "transfer.md"
BLOCK = re.compile(r"<!-- (?P<name>[a-z0-9-]+) -->\n.*?<!-- end -->\n", re.DOTALL)


def block(found: re.Match[str]) -> str:
    name = found["name"]
    file = PAGE.with_suffix("") / f"{name}.jsonl"
    entries = list(Results(file).load().values())
    report.plot(entries, file.with_suffix(".png"))
    told = facts(entries, name)
    table = report.markdown(entries)
    picture = f"![loss against learning rate: {name}](transfer/{name}.png)"
    return f"<!-- {name} -->\n{told}\n\n{table}\n{picture}\n<!-- end -->\n"


def facts(entries: list[dict], name: str) -> str:
    def distinct(key: str, values: list | None = None) -> str:
        return ", ".join(dict.fromkeys(str(entry[key]) for entry in values or entries))

    training = entries[0]["training"]
    parameters = {entry["width"]: entry["parameters"] for entry in entries}
    seeds = {width: len({e["seed"] for e in entries if e["width"] == width}) for width in parameters}
    diverged = sum(entry["diverged"] is not None for entry in entries)
    return (
        f"[{len(entries)} runs](transfer/{name}.jsonl) of {training['steps']} steps × {training['batch']} × "
        f"{training['length']} tokens ({entries[0]['tokens'] / 1e6:.2f} M a run); width (parameters, seeds): "
        + ", ".join(f"{width} ({parameters[width] / 1e6:.1f} M, {seeds[width]})" for width in sorted(parameters))
        + f"; {distinct('device')}, torch {distinct('torch')}, Python {distinct('python')}; "
        f"{sum(entry['seconds'] for entry in entries) / 60:.0f} minutes of processes"
        + (f"; {diverged} diverged." if diverged else "; none diverged.")
    )


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(block, text), encoding="utf-8")


if __name__ == "__main__":
    main()
