"""widthwise: exact width-scaling rules, derived from an architecture's computation graph."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("widthwise")
except PackageNotFoundError:  # a checkout on sys.path, nothing installed
    __version__ = "0+checkout"
