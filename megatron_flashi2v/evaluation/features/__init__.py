"""Networks whose features the distances compare, one file each."""
