"""One of two processes that compute a decode step at TP 4 together; started by test_multihost.py.

    multihost_worker.py COORDINATOR NUMBER FOLDER

Both read the same weights, pool and step from FOLDER, give their two devices what lies on them, and issue the same
step.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import StepState, compile_step
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from tests.engine.step.multihost.case import BATCH, TP, VSHARDS, program


def main(coordinator: str, number: int, folder: Path) -> None:
    """Joins the other process, computes the step and writes the logits that this process sees."""
    jax.config.update("jax_num_cpu_devices", TP // 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, number, initialization_timeout=60)
    assert len(jax.devices()) == TP
    assert len(jax.local_devices()) == TP // 2
    mesh = instance_mesh(jax.devices(), InstanceSpec(tuple(range(TP))), VshardMap(VSHARDS))
    made = program()
    given = np.load(folder / "step.npz")

    def spread(value: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    leaves = tuple(spread(given[f"leaf{index}"], parameter.spec) for index, parameter in enumerate(made.parameters(TP)))
    state = StepState(spread(given["pool"], PartitionSpec(TP_AXIS)), spread(given["history"], PartitionSpec()))
    shape = StepShape(BATCH, 1)
    step = compile_step(made, shape, mesh, with_logits=True)
    everywhere = PartitionSpec()
    _, results = step(leaves, state, spread(given["packed"], everywhere), spread(made.no_masks(shape), everywhere))
    assert results.logits is not None
    np.savez(folder / f"result{number}.npz", logits=np.asarray(results.logits), tokens=np.asarray(results.tokens))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
