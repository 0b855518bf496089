"""The program: command line, configuration, logging."""


def version() -> str:
    """The installed version; found out when it is wanted, since looking costs more than the rest of a start."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("runvol")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


__all__ = ["version"]
