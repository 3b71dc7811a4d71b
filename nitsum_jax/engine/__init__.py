"""The room that runs models on layouts: one engine drives one cell.

It owns the KV pool (blocks of one head group each, of the same shape at every TP), the executables compiled ahead of
time per TP, phase and bucket, sampling on the device, the batch loops of the instances, and the switch from one layout
to another under live sequences.  It imports `models` and `meshes`, and knows nothing of the network.
"""
