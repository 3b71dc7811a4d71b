"""Regenerates the protobuf and gRPC modules beside nitsum.proto: `python -m nitsum_jax.server.proto.generate`.

The output is committed, so that installing the package needs no compiler; a test holds it up to date.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
PACKAGE_ROOT = PROTO_DIR.parents[2]
PROTO = PROTO_DIR / "nitsum.proto"


def generate(out_root: Path) -> None:
    """Writes the generated modules under `out_root`, at the path that the proto file has under the package root.

    Args:
      out_root: folder that stands for the package root.

    Raises:
      RuntimeError: protoc refused the file (it has printed why).
    """
    # The include path is the package root: imports in the generated code then are absolute.
    arguments = [
        f"-I{PACKAGE_ROOT}",
        f"--python_out={out_root}",
        f"--pyi_out={out_root}",
        f"--grpc_python_out={out_root}",
    ]
    if protoc.main(["protoc", *arguments, str(PROTO)]) != 0:
        raise RuntimeError(f"protoc failed on {PROTO.name}")


def generated_paths() -> list[Path]:
    """The generated files, relative to the package root."""
    folder = PROTO_DIR.relative_to(PACKAGE_ROOT)
    return [folder / name for name in ("nitsum_pb2.py", "nitsum_pb2.pyi", "nitsum_pb2_grpc.py")]


if __name__ == "__main__":
    generate(PACKAGE_ROOT)
    sys.stdout.write("".join(f"{path}\n" for path in generated_paths()))
