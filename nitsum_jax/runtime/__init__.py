"""An engine with a policy: text in, text out, and no sockets.

What a server, a notebook and a benchmark have in common: checks of a call, its prompt as ids, the engine's policy
by latency tiers, the controller of the layout, and outputs as they grow.  It knows no protocol of the network.
"""
