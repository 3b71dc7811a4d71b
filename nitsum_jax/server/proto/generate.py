"""Regenerates the protobuf and gRPC modules beside the .proto files: `python -m nitsum_jax.server.proto.generate`.

The output is committed, so that installing the package needs no compiler; a test holds it up to date.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
PACKAGE_ROOT = PROTO_DIR.parents[2]
PROTOS = ("nitsum", "jetstream", "admin")


def generate(out_root: Path) -> None:
    """Writes the generated modules under `out_root`, at the paths that the proto files have under the package root.

    Args:
      out_root: folder that stands for the package root.

    Raises:
      RuntimeError: protoc refused a file (it has printed why).
    """
    # The include path is the package root: imports in the generated code then are absolute.
    arguments = [
        f"-I{PACKAGE_ROOT}",
        f"--python_out={out_root}",
        f"--pyi_out={out_root}",
        f"--grpc_python_out={out_root}",
    ]
    for name in PROTOS:
        if protoc.main(["protoc", *arguments, str(PROTO_DIR / f"{name}.proto")]) != 0:
            raise RuntimeError(f"protoc failed on {name}.proto")


def generated_paths() -> list[Path]:
    """The generated files, relative to the package root."""
    folder = PROTO_DIR.relative_to(PACKAGE_ROOT)
    return [folder / f"{name}_{kind}" for name in PROTOS for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py")]


if __name__ == "__main__":
    generate(PACKAGE_ROOT)
    sys.stdout.write("".join(f"{path}\n" for path in generated_paths()))
