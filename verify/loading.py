"""Generated source as a module, without a file."""

from __future__ import annotations

import hashlib
import linecache
import sys
from types import ModuleType


def imported(text: str, stem: str) -> ModuleType:
    """The module that a text is, made once. It stays importable by its name, as torch.compile and pickle want, and
    tracebacks show its lines. For text that we generated: it is run."""
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    try:
        exec(compile(text, module.__file__, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module
