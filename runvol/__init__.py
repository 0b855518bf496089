"""The program: command line, configuration, logging."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("runvol")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
