"""What IMAGES may be: files, tar shards, datasets."""
