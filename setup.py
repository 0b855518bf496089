"""Generates the stubs of proto/ while the package is built; nothing generated is ever committed."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
STUBS = "runvol_proto"


def generate(target: Path) -> None:
    """Write `target` (a package) from every .proto file, with type information beside it."""
    import grpc_tools
    from grpc_tools import protoc

    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text('"""Generated from proto/ when the package was built."""\n')
    (target / "py.typed").touch()
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(ROOT.glob("proto/*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={STUBS}={ROOT / 'proto'}",
        f"--proto_path={well_known}",
        f"--python_out={target.parent}",
        f"--pyi_out={target.parent}",
        *(f"{STUBS}/{source.name}" for source in sources),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("setup.py: protoc refused proto/*.proto; its message stands above")


# setuptools looks for every package's folder before build_py runs.
generate(ROOT / STUBS)


class BuildWithStubs(build_py):
    def run(self) -> None:
        generate(ROOT / STUBS)
        super().run()


class SourceWithoutStubs(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [name for name in files if not name.startswith(f"{STUBS}/")])


setup(cmdclass={"build_py": BuildWithStubs, "sdist": SourceWithoutStubs})
