"""Process groups, sequence sharding, gradient rules and the packing of pipeline hops."""
