"""The room of devices: which there are, how a cell is cut into instances, and where the weights lie.

`devices` finds (or emulates) the accelerators; `layout` is the pure language of layouts (text form, validation,
enumeration) and `vshards` the pure map from virtual shards to device ranks; `mesh` turns an instance into a JAX mesh,
`weight_bank` keeps each device's vshards as buffers of their own and wraps them for any instance without a copy, and
`reshard` is the general path for everything that does have to move.  Nothing here knows what a model is.
"""
