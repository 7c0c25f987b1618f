"""What a run reads: where its weights come from, whether they fit, and its inputs identified by content."""
