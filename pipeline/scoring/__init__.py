"""What is measured of each image of a pair dataset, kept beside its shards."""
