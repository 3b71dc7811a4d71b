"""nitsum-serve with a fake engine, as a process: `python -m tests.server.fake_server [flags]`.

The model named "slow" takes long to load, and "broken" is one that does not load; an unknown one is refused.
"""

import sys
import time

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.launch.flags import LaunchOptions
from nitsum_jax.server.launch.main import Admitted, Loaded, Sink, main
from tests.server.fake_engine import FakeEngine
from tests.server.harness import says, served_model


def load(options: LaunchOptions, sink: Sink, admitted: Admitted) -> Loaded:
    if options.model == "slow":
        time.sleep(60)
    if options.model == "broken":
        raise ZeroDivisionError("division\nby zero")
    if options.model != "fake":
        raise InvalidInputError(f"unknown model {options.model!r}: known are fake, slow and broken")
    engine = FakeEngine(
        sink, says("word ", end=False), step_s=0.01, max_queue=options.engine["max_queue"], admitted=admitted
    )
    if options.engine["layout"] is not None:
        engine.set_layout(options.engine["layout"]).result(timeout=5)
    return Loaded(engine, served_model())


if __name__ == "__main__":
    sys.exit(main(sys.argv, load))
