"""What users have on disk: activation shards and pictures."""
