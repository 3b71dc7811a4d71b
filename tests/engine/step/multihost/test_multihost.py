"""A cell over several processes (docs/server/multihost.md): the proof that its steps can be the same to the bit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.program import StepState
from nitsum_jax.meshes.mesh import TP_AXIS
from tests.engine.rig import PAGE_SIZE, StepRig
from tests.engine.step.multihost import worker
from tests.engine.step.multihost.case import BATCH, DTYPE, MAX_LEN, TP, VARIANT, VSHARDS, program

TIMEOUT_S = 200


def inputs(rig: StepRig) -> dict[str, np.ndarray]:
    """A decode step of sequences of several lengths, and what it needs."""
    packer = Packer(StepShape(BATCH, 1), VSHARDS, rig.program.pages, BATCH)
    history = np.zeros(rig.program.history_shape, np.int32)
    for row, context in enumerate((1, 15, 16, 40)):
        history[row, context] = 7 + row
        used = -(-(context + 1) // PAGE_SIZE)
        packer.add(
            sampling_columns(SamplingParams(), 0, context, min_tokens=0, logprobs=False),
            row=row,
            context=context,
            tokens=None,
            emit=True,
            page_table=rig.page_table[row, :, :used],
            steering=None,
        )
    leaves = {f"leaf{index}": np.asarray(leaf) for index, leaf in enumerate(rig.leaves(TP))}
    return {**leaves, "pool": np.concatenate([rig.past] * TP), "history": history, "packed": packer.done()}


def test_two_processes_compute_a_decode_step_to_the_bits_of_one(tmp_path: Path) -> None:
    rig = StepRig(VARIANT, DTYPE, vshards=VSHARDS, batch=BATCH, max_model_len=MAX_LEN)
    assert program().pool == rig.program.pool
    given = inputs(rig)
    np.savez(tmp_path / "step.npz", allow_pickle=False, **given)

    mesh = rig.mesh(TP)
    pool = jax.device_put(jnp.asarray(given["pool"]), NamedSharding(mesh, PartitionSpec(TP_AXIS)))
    history = jax.device_put(jnp.asarray(given["history"]), NamedSharding(mesh, PartitionSpec()))
    shape = StepShape(BATCH, 1)
    masks = rig.program.no_masks(shape)
    _, one = rig.compiled(shape, TP)(rig.leaves(TP), StepState(pool, history), given["packed"], masks)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    root = Path(worker.__file__).resolve().parents[4]
    environment = os.environ | {"PYTHONPATH": str(root)}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, "-m", "tests.engine.step.multihost.worker", coordinator]
    workers = [
        subprocess.Popen([*command, str(number), str(tmp_path)], env=environment, cwd=root, stderr=subprocess.PIPE)
        for number in range(2)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1].decode() for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 0], "\n".join(errors)[-3000:]
    assert one.logits is not None
    logits, tokens = np.asarray(one.logits), np.asarray(one.tokens)
    assert np.isfinite(logits[:, : rig.cut.config.vocab_size]).all()  # what is behind is padding
    for number in range(2):
        with np.load(tmp_path / f"result{number}.npz") as two:
            np.testing.assert_array_equal(two["logits"].view(np.int32), logits.view(np.int32))
            np.testing.assert_array_equal(two["tokens"], tokens)
