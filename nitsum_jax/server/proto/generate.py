"""Regenerates the protobuf and gRPC modules beside the .proto files: `python -m nitsum_jax.server.proto.generate`.

The output is committed, so that installing the package needs no compiler; a test holds it up to date.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
PACKAGE_ROOT = PROTO_DIR.parents[2]
PROTOS = tuple(sorted(PROTO_DIR.glob("*.proto")))


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
    if protoc.main(["protoc", *arguments, *map(str, PROTOS)]) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(proto.name for proto in PROTOS)}")


def generated_paths() -> list[Path]:
    """The generated files, relative to the package root."""
    folder = PROTO_DIR.relative_to(PACKAGE_ROOT)
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [folder / f"{proto.stem}{suffix}" for proto in PROTOS for suffix in suffixes]


if __name__ == "__main__":
    generate(PACKAGE_ROOT)
    sys.stdout.write("".join(f"{path}\n" for path in generated_paths()))
