"""How Ray Serve finds a replica: by its name, which the front door has chosen by what cells report.

A call of the front door begins with the name of its cell.  Serve creates this router in every process that has a
handle, so it also tells that process which replicas there are.  Serve copies this module by its source into those
processes, so what is shared there is imported when it is used.
"""

from collections.abc import Sequence

from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class CellRequestRouter(RequestRouter):
    """Sends each call to the cell that its first argument names."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The cell that is named; of a call that names none, all, with the fewest streams first."""
        named = pending_request.args[0] if pending_request is not None and pending_request.args else None
        found = [replica for replica in candidate_replicas if replica.replica_id.unique_id == named]
        if found:
            return [found]
        if named is not None and pending_request is not None:
            # It is gone: the call fails, rather than being tried for ever. Serve looks whether it is over where it is
            # given candidates, and would spin without a pause where it is given none.
            if not pending_request.future.done():
                pending_request.future.set_exception(RayServeException(f"there is no cell {named} any more"))
            return [list(candidate_replicas)]
        return [sorted(candidate_replicas, key=lambda one: float((one.routing_stats or {}).get("streams", 0.0)))]

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Replicas came or went."""
        from nitsum_jax.cluster.on_ray.directory import DIRECTORY

        super().update_replicas(list(replicas))
        DIRECTORY.changed(frozenset(replica.replica_id.unique_id for replica in replicas))
