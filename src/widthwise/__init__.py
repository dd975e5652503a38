"""widthwise: exact width-scaling rules, derived from an architecture's computation graph."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom asked for

    try:
        return version("widthwise")
    except PackageNotFoundError:  # a checkout on sys.path, nothing installed
        return "0+checkout"
