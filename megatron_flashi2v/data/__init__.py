"""From annotations and video files to shards, and from shards to batches."""
