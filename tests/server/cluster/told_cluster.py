"""nitsum-cluster that also deploys anew what a line of its standard input says; run by `cluster_process`."""

import dataclasses
import json
import sys
import threading

from nitsum_jax.cluster import main
from nitsum_jax.cluster.flags import ClusterOptions
from nitsum_jax.cluster.on_ray import ray_cluster
from nitsum_jax.server.launch.main import leave


class ToldDeployed(ray_cluster.Deployed):
    """Cells that can be changed from outside: a line is a JSON object of fields of the options."""

    def __init__(self, options: ClusterOptions) -> None:
        super().__init__(options)
        threading.Thread(target=self._listen, args=(options,), daemon=True).start()

    def _listen(self, options: ClusterOptions) -> None:
        for line in sys.stdin:
            options = dataclasses.replace(options, **json.loads(line))
            self.deploy(options)


if __name__ == "__main__":
    ray_cluster.Deployed = ToldDeployed  # type: ignore[misc]
    leave(main.main(sys.argv))
