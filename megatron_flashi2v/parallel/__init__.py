"""Process groups, slices of parameters, sequence sharding, gradient rules and the packing of pipeline hops."""
